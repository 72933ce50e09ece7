// A row of numbers, walked by a warp.
#pragma once

#include "common/score_function.h"
#include "cuda/kernels/device.cuh"

namespace moe_ext::cuda::kernels {

// As common/score_function.h asks.
template <class T>
struct WarpRow {
  using Scalar = T;
  using V = T;

  struct At {
    int64_t place;
    __device__ T operator()(const T* p) const { return p[place]; }
    __device__ void set(T* p, T value) const { p[place] = value; }
  };

  template <class Fn>
  static __device__ void each(int64_t n, const Fn& fn) {
    for (int64_t i = lane(); i < n; i += kWarp) fn(At{i});
  }

  template <class Fn>
  static __device__ T sum(int64_t n, const Fn& fn) {
    T total = 0;
    each(n, [&](At at) { total += fn(at); });
    return warp_sum(total);
  }

  static __device__ T max_or_nan(const T* z, int64_t n) {
    const auto larger_or_nan = [](T a, T b) { return b > a || b != b ? b : a; };
    T top = z[0];
    each(n, [&](At at) { top = larger_or_nan(top, at(z)); });
    for (int mask = kWarp / 2; mask > 0; mask /= 2) {
      // A NaN stays, on whichever side it is.
      const T other = __shfl_xor_sync(kAllLanes, top, mask);
      top = top != top ? top : larger_or_nan(top, other);
    }
    return top;
  }

  template <class Fn>
  static __device__ void once(const Fn& fn) {
    __syncwarp();
    if (lane() == 0) fn();
    __syncwarp();
  }
};

}  // namespace moe_ext::cuda::kernels
