// The engine of the tensor cores, for bf16 and fp16, and for fp32 rounded to TF32.
#pragma once

#include <mma.h>

#include <type_traits>

#include "cuda/kernels/gemm/loader.cuh"

namespace moe_ext::cuda::kernels {

namespace wmma = nvcuda::wmma;

// 2 x 4 warps, each with kFragmentsM x kFragmentsN fragments of 16 x 16. T lies in shared memory,
// MmaType is what the tensor cores read.
template <class T, class MmaType>
struct MmaEngine {
  using Number = T;
  using Sum = float;
  static constexpr int kTileM = kMmaTile, kTileN = kMmaTile;
  static constexpr int kBlockK = kMmaBlockKBytes / sizeof(T);
  static constexpr int kVectorN = 8;
  static constexpr bool kWantsKOuter = false;
  static constexpr size_t kScratchBytes = kThreads / kWarp * 256 * sizeof(float);

  __device__ MmaEngine() {
#pragma unroll
    for (int i = 0; i < kFragmentsM; ++i) {
#pragma unroll
      for (int j = 0; j < kFragmentsN; ++j) wmma::fill_fragment(sum[i][j], 0.0f);
    }
  }

  template <bool kAKDense, bool kBKDense>
  __device__ void multiply(const T* a, const T* b) {
    using LayoutA = std::conditional_t<kAKDense, wmma::row_major, wmma::col_major>;
    using LayoutB = std::conditional_t<kBKDense, wmma::col_major, wmma::row_major>;
#pragma unroll
    for (int k = 0; k < kBlockK; k += kFragmentK) {
      wmma::fragment<wmma::matrix_a, 16, 16, kFragmentK, MmaType, LayoutA> x[kFragmentsM];
      wmma::fragment<wmma::matrix_b, 16, 16, kFragmentK, MmaType, LayoutB> y[kFragmentsN];
#pragma unroll
      for (int i = 0; i < kFragmentsM; ++i) load<kAKDense, kTileM>(x[i], a, row() + 16 * i, k);
#pragma unroll
      for (int j = 0; j < kFragmentsN; ++j) load<kBKDense, kTileN>(y[j], b, column() + 16 * j, k);
#pragma unroll
      for (int i = 0; i < kFragmentsM; ++i) {
#pragma unroll
        for (int j = 0; j < kFragmentsN; ++j) wmma::mma_sync(sum[i][j], x[i], y[j], sum[i][j]);
      }
    }
  }

  // fn(m, n, values): kVectorN neighbours of a row. A warp's scratch holds one fragment.
  template <class Fn>
  __device__ void each_vector(char* scratch, const Fn& fn) const {
    float* own = reinterpret_cast<float*>(scratch) + warp() * 256;
#pragma unroll
    for (int i = 0; i < kFragmentsM; ++i) {
#pragma unroll
      for (int j = 0; j < kFragmentsN; ++j) {
        wmma::store_matrix_sync(own, sum[i][j], 16, wmma::mem_row_major);
        __syncwarp();
        const int m = lane() / 2, n = lane() % 2 * kVectorN;
        fn(row() + 16 * i + m, column() + 16 * j + n, own + 16 * m + n);
        __syncwarp();
      }
    }
  }

 private:
  static constexpr int kWarpsM = 2, kWarpsN = 4;
  static constexpr int kFragmentsM = kTileM / 16 / kWarpsM, kFragmentsN = kTileN / 16 / kWarpsN;
  static constexpr int kFragmentK = sizeof(T) == 4 ? 8 : 16;
  static_assert(kWarpsM * kWarpsN * kWarp == kThreads, "every warp has its fragments");

  static __device__ int warp() { return threadIdx.x / kWarp; }
  // Where the warp's fragments begin.
  static __device__ int row() { return warp() % kWarpsM * (16 * kFragmentsM); }
  static __device__ int column() { return warp() / kWarpsM * (16 * kFragmentsN); }

  template <bool kKDense, int kTile, class Fragment>
  static __device__ void load(Fragment& fragment, const T* block, int i, int k) {
    constexpr int kStride = padded<T>(kKDense ? kBlockK : kTile);
    wmma::load_matrix_sync(
        fragment, block + (kKDense ? i * kStride + k : k * kStride + i), kStride);
    if constexpr (sizeof(T) == 4) {
#pragma unroll
      for (int x = 0; x < fragment.num_elements; ++x) {
        fragment.x[x] = wmma::__float_to_tf32(fragment.x[x]);
      }
    }
  }

  wmma::fragment<wmma::accumulator, 16, 16, kFragmentK, float> sum[kFragmentsM][kFragmentsN];
};

}  // namespace moe_ext::cuda::kernels
