// What the kernels share: storage types, sums over a warp, packs, memory. Compiled by nvcc, and by
// the host's compiler, to which tests/emulation gives the headers of CUDA.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "cuda/kernels/kernels.h"
#include "cuda/kernels/launch.cuh"
#include "cuda/kernels/tuning.cuh"

namespace moe_ext::cuda::kernels {

constexpr unsigned kAllLanes = 0xffffffffu;

using BFloat16 = __nv_bfloat16;
using Half = __half;

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

// The same for kF64 and kF32, which the router's mathematics runs in.
template <class Fn>
void dispatch_compute(Type type, const Fn& fn) {
  if (type == Type::kF64) return fn(double{});
  fn(float{});
}

// Calls fn with the ids as numbers of their type.
template <class Fn>
void dispatch_ids(IdType type, const void* ids, const Fn& fn) {
  if (type == IdType::kI64) return fn(static_cast<const int64_t*>(ids));
  fn(static_cast<const int32_t*>(ids));
}

__device__ inline int lane() { return threadIdx.x % kWarp; }

// Every lane gets the sum, in an order that does not depend on the lane.
template <class T>
__device__ T warp_sum(T x) {
  for (int mask = kWarp / 2; mask > 0; mask /= 2) x += __shfl_xor_sync(kAllLanes, x, mask);
  return x;
}

// Sums up to and with each lane's.
template <class T>
__device__ T warp_scan(T x) {
  for (int by = 1; by < kWarp; by *= 2) {
    const T other = __shfl_up_sync(kAllLanes, x, by);
    if (lane() >= by) x += other;
  }
  return x;
}

// Of n owners with count(i) tiles (or rows, or tokens) each: whose number `index` of all is, and
// how many come before his; -1 past the last. A warp computes it together.
struct Owner {
  int64_t i, before;
};
template <class Fn>
__device__ Owner find_owner(int64_t n, int64_t index, const Fn& count) {
  int64_t before = 0;
  for (int64_t first = 0; first < n; first += kWarp) {
    const int64_t own = first + lane() < n ? count(first + lane()) : 0;
    const int64_t up_to = before + warp_scan(own);
    const unsigned is_past = __ballot_sync(kAllLanes, up_to > index);
    if (is_past != 0) {
      const int owner = __ffs(static_cast<int>(is_past)) - 1;
      return {first + owner, __shfl_sync(kAllLanes, up_to - own, owner)};
    }
    before = __shfl_sync(kAllLanes, up_to, kWarp - 1);
  }
  return {-1, before};
}

// Who owns a row; -1 at or past offsets[E].
__device__ inline int64_t expert_of_row(const int32_t* offsets, int64_t E, int64_t row) {
  if (row >= offsets[E]) return -1;
  int64_t first = 0, last = E;  // offsets[first] <= row < offsets[last]
  while (last - first > 1) {
    const int64_t middle = (first + last) / 2;
    (offsets[middle] <= row ? first : last) = middle;
  }
  return first;
}

// Several elements that are read or written at once: kPackBytes where they lie so, else one.
template <class T, int kCount>
struct alignas(sizeof(T) * kCount) Pack {
  T values[kCount];
};
template <class T>
constexpr int kPackOf = kPackBytes / sizeof(T);

// Whether all rows may be read by packs.
inline bool is_aligned(const void* data, int64_t row_elements, int64_t element_bytes) {
  return reinterpret_cast<uintptr_t>(data) % kPackBytes == 0 &&
         row_elements * element_bytes % kPackBytes == 0;
}

inline int64_t size_of(Type type) { return type == Type::kF64 ? 8 : type == Type::kF32 ? 4 : 2; }

// Calls fn with the number of elements to go by: a whole pack if all rows lie so, or 1.
template <class T, class Fn, class... Data>
void dispatch_pack(int64_t row_elements, const Fn& fn, const Data*... data) {
  if ((is_aligned(data, row_elements, sizeof(T)) && ...)) {
    fn(std::integral_constant<int, kPackOf<T>>{});
  } else {
    fn(std::integral_constant<int, 1>{});
  }
}

// Cuts memory into arrays; of no memory, counts the bytes.
class Arena {
 public:
  explicit Arena(void* data) : start_(reinterpret_cast<uintptr_t>(data)) {}
  template <class T>
  T* take(int64_t count) {
    const uintptr_t at = start_ + bytes_;
    bytes_ += (count * sizeof(T) + 255) / 256 * 256;
    return reinterpret_cast<T*>(at);
  }
  size_t bytes() const { return bytes_; }

 private:
  uintptr_t start_;
  size_t bytes_ = 0;
};

// Blocks of a kernel that goes row by row, a warp for each.
inline int64_t blocks_for(int64_t rows) { return ceil_div(rows, kRowsPerBlock); }

}  // namespace moe_ext::cuda::kernels
