// What only nvcc can compile of a launch; tests/emulation has its own header of this name.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

namespace moe_ext::cuda::kernels {

// `shared`: bytes of dynamic_shared().
template <class... Params, class... Args>
void launch(
    void (*kernel)(Params...), int64_t blocks, int threads, size_t shared, cudaStream_t stream,
    Args... args) {
  kernel<<<static_cast<unsigned>(blocks), threads, shared, stream>>>(args...);
}

__device__ inline char* dynamic_shared() {
  extern __shared__ __align__(128) char memory[];
  return memory;
}

}  // namespace moe_ext::cuda::kernels
