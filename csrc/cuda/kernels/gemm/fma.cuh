// The engine of fused multiply-adds, for fp32 and fp64.
#pragma once

#include "cuda/kernels/gemm/loader.cuh"

namespace moe_ext::cuda::kernels {

// 16 x 16 threads, each with kThreadM x kThreadN of the tile: its rows and its columns lie in two
// panels of the tile, a pack in each. Operands are read as [k][m].
template <class T>
struct FmaEngine {
  using Number = T;
  using Sum = T;
  static constexpr int kTileM = kFmaTile<T>, kTileN = kFmaTile<T>;
  static constexpr int kBlockK = kFmaBlockK;
  static constexpr int kVectorN = kPackOf<T>;
  static constexpr bool kWantsKOuter = true;
  static constexpr size_t kScratchBytes = 0;

  template <bool, bool>
  __device__ void multiply(const T* a, const T* b) {
#pragma unroll
    for (int k = 0; k < kBlockK; ++k) {
      P x[kPanels], y[kPanels];
#pragma unroll
      for (int panel = 0; panel < kPanels; ++panel) {
        x[panel] = *reinterpret_cast<const P*>(a + k * padded<T>(kTileM) + row(panel));
        y[panel] = *reinterpret_cast<const P*>(b + k * padded<T>(kTileN) + column(panel));
      }
#pragma unroll
      for (int i = 0; i < kThreadM; ++i) {
#pragma unroll
        for (int j = 0; j < kThreadN; ++j) {
          sum[i][j] += x[i / kPack].values[i % kPack] * y[j / kPack].values[j % kPack];
        }
      }
    }
  }

  // fn(m, n, values): kVectorN neighbours of a row.
  template <class Fn>
  __device__ void each_vector(char*, const Fn& fn) const {
#pragma unroll
    for (int i = 0; i < kThreadM; ++i) {
#pragma unroll
      for (int panel = 0; panel < kPanels; ++panel) {
        fn(row(i / kPack) + i % kPack, column(panel), &sum[i][panel * kPack]);
      }
    }
  }

 private:
  static constexpr int kPack = kPackOf<T>;
  static constexpr int kPanels = 2;
  static constexpr int kThreadM = kTileM / 16, kThreadN = kTileN / 16;
  using P = Pack<T, kPack>;
  static_assert(kThreadM == kPanels * kPack && kThreadN == kPanels * kPack, "a pack a panel");
  static __device__ int row(int panel) {
    return panel * kTileM / kPanels + threadIdx.x / 16 * kPack;
  }
  static __device__ int column(int panel) {
    return panel * kTileN / kPanels + threadIdx.x % 16 * kPack;
  }

  T sum[kThreadM][kThreadN] = {};
};

}  // namespace moe_ext::cuda::kernels
