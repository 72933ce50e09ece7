// Launches of kernels on the host, in place of csrc's header of this name.
#pragma once

#include <cuda_runtime_api.h>

namespace moe_ext::cuda::kernels {

template <class... Params, class... Args>
void launch(
    void (*kernel)(Params...), int64_t blocks, int threads, size_t shared, cudaStream_t,
    Args... args) {
  emulation::grid_size = {static_cast<unsigned>(blocks)};
  emulation::block_size = {static_cast<unsigned>(threads)};
  for (int64_t i = 0; i < blocks; ++i) {
    emulation::block_index = {static_cast<unsigned>(i)};
    // NaN, not zeros.
    emulation::shared_memory.assign(shared + emulation::kSharedAlignment, static_cast<char>(0xff));
    emulation::run_block(threads, [&] { kernel(args...); });
  }
}

inline char* dynamic_shared() {
  const auto at = reinterpret_cast<uintptr_t>(emulation::shared_memory.data());
  constexpr uintptr_t kAlignment = emulation::kSharedAlignment;
  return reinterpret_cast<char*>((at + kAlignment - 1) / kAlignment * kAlignment);
}

}  // namespace moe_ext::cuda::kernels
