// What the kernels share: storage types, sums over a warp, launching. Compiled by nvcc alone; the
// host compiles it too, under tests/cuda_emulation.h.
#pragma once

#include <cstdint>

#include "common/host_device.h"
#include "cuda/kernels/kernels.h"
#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace moe_ext::cuda {

constexpr int kWarp = 32;
constexpr int kThreads = 256;  // of a block, where nothing speaks for another number
constexpr unsigned kAllLanes = 0xffffffffu;

#ifdef __CUDACC__
using BFloat16 = __nv_bfloat16;
using Half = __half;

// `shared`: bytes of dynamic_shared().
template <class... Params, class... Args>
void launch(
    void (*kernel)(Params...), int64_t blocks, int threads, size_t shared, cudaStream_t stream,
    Args... args) {
  kernel<<<static_cast<unsigned>(blocks), threads, shared, stream>>>(args...);
}

__device__ inline char* dynamic_shared() {
  extern __shared__ __align__(16) char memory[];
  return memory;
}
#endif

// Sums are kept, and mathematics is done, in fp32, or in fp64 for fp64.
template <class T>
struct ComputeOf {
  using type = float;
};
template <>
struct ComputeOf<double> {
  using type = double;
};
template <class T>
using Compute = typename ComputeOf<T>::type;

__device__ inline float widen(float x) { return x; }
__device__ inline double widen(double x) { return x; }
__device__ inline float widen(BFloat16 x) { return __bfloat162float(x); }
__device__ inline float widen(Half x) { return __half2float(x); }

template <class T>
__device__ T narrow(Compute<T> x);
template <>
__device__ inline float narrow<float>(float x) {
  return x;
}
template <>
__device__ inline double narrow<double>(double x) {
  return x;
}
template <>
__device__ inline BFloat16 narrow<BFloat16>(float x) {
  return __float2bfloat16_rn(x);
}
template <>
__device__ inline Half narrow<Half>(float x) {
  return __float2half_rn(x);
}

// Calls fn with a value of the storage type.
template <class Fn>
void dispatch(Type type, const Fn& fn) {
  switch (type) {
    case Type::kF64:
      return fn(double{});
    case Type::kF32:
      return fn(float{});
    case Type::kBf16:
      return fn(BFloat16{});
    case Type::kF16:
      return fn(Half{});
  }
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Every lane gets the sum, in an order that does not depend on the lane.
template <class T>
__device__ T warp_sum(T x) {
  for (int mask = kWarp / 2; mask > 0; mask /= 2) x += __shfl_xor_sync(kAllLanes, x, mask);
  return x;
}

// Several elements that are read or written at once: 16 bytes where they lie so, else one.
template <class T, int kCount>
struct alignas(sizeof(T) * kCount) Pack {
  T values[kCount];
};
template <class T>
constexpr int kPackOf = 16 / sizeof(T);

inline bool is_aligned(const void* data, int64_t row_elements, int64_t element_bytes) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && row_elements * element_bytes % 16 == 0;
}

}  // namespace moe_ext::cuda
