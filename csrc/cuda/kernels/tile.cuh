// A block of kThreads makes a tile of C = A B^T, A [m, k] and B [n, k], in steps of kDepth along k.
// What multiplies is an engine; its operands lie in shared memory, rows kPackOf longer than they
// are wide, for the banks' sake.
#pragma once

#ifndef MOE_EXT_CUDA_EMULATION
#include <mma.h>
#endif

#include <type_traits>

#include "cuda/kernels/device.cuh"

namespace moe_ext::cuda {

namespace wmma = nvcuda::wmma;

// Fused multiply-adds, each thread kEach x kEach of them for every k; operands as [k][m].
template <class T>
struct FmaEngine {
  using Operand = T;
  using Sum = T;
  static constexpr int kTile = sizeof(T) == 8 ? 64 : 128;
  static constexpr int kDepth = 16;
  static constexpr int kRun = kPackOf<T>;
  static constexpr bool kWantsKOuter = true;
  static constexpr size_t kScratch = 0;

  template <bool, bool>
  __device__ void multiply(const T* a, const T* b) {
#pragma unroll
    for (int k = 0; k < kDepth; ++k) {
      P x[2], y[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        x[half] = *reinterpret_cast<const P*>(a + k * kStride + place(threadIdx.x / 16, half));
        y[half] = *reinterpret_cast<const P*>(b + k * kStride + place(threadIdx.x % 16, half));
      }
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
#pragma unroll
        for (int j = 0; j < kEach; ++j) {
          sum[i][j] += x[i / kPack].values[i % kPack] * y[j / kPack].values[j % kPack];
        }
      }
    }
  }

  // fn(m, n, values): kRun neighbours of a row.
  template <class Fn>
  __device__ void each_run(char*, const Fn& fn) const {
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        fn(place(threadIdx.x / 16, i / kPack) + i % kPack, place(threadIdx.x % 16, half),
           &sum[i][half * kPack]);
      }
    }
  }

 private:
  static constexpr int kPack = kPackOf<T>;
  static constexpr int kEach = kTile / 16;
  static constexpr int kStride = kTile + kPack;
  using P = Pack<T, kPack>;
  static_assert(kEach == 2 * kPack, "two packs each");
  static __device__ int place(int thread, int half) { return half * kTile / 2 + thread * kPack; }

  T sum[kEach][kEach] = {};
};

// Tensor cores; Number is what they read, T what lies in memory.
template <class T, class Number>
struct TensorEngine {
  using Operand = T;
  using Sum = float;
  static constexpr int kTile = 128;
  static constexpr int kDepth = 64 / sizeof(T);
  static constexpr int kRun = 8;
  static constexpr bool kWantsKOuter = false;
  static constexpr size_t kScratch = kThreads / kWarp * 256 * sizeof(float);

  __device__ TensorEngine() {
#pragma unroll
    for (int i = 0; i < kDown; ++i) {
#pragma unroll
      for (int j = 0; j < kAcross; ++j) wmma::fill_fragment(sum[i][j], 0.0f);
    }
  }

  template <bool kAKDense, bool kBKDense>
  __device__ void multiply(const T* a, const T* b) {
    using LayoutA = std::conditional_t<kAKDense, wmma::row_major, wmma::col_major>;
    using LayoutB = std::conditional_t<kBKDense, wmma::col_major, wmma::row_major>;
    const int m0 = warp() % 2 * (16 * kDown), n0 = warp() / 2 * (16 * kAcross);
#pragma unroll
    for (int k = 0; k < kDepth; k += kStep) {
      wmma::fragment<wmma::matrix_a, 16, 16, kStep, Number, LayoutA> x[kDown];
      wmma::fragment<wmma::matrix_b, 16, 16, kStep, Number, LayoutB> y[kAcross];
#pragma unroll
      for (int i = 0; i < kDown; ++i) load<kAKDense>(x[i], a, m0 + 16 * i, k);
#pragma unroll
      for (int j = 0; j < kAcross; ++j) load<kBKDense>(y[j], b, n0 + 16 * j, k);
#pragma unroll
      for (int i = 0; i < kDown; ++i) {
#pragma unroll
        for (int j = 0; j < kAcross; ++j) wmma::mma_sync(sum[i][j], x[i], y[j], sum[i][j]);
      }
    }
  }

  // fn(m, n, values): kRun neighbours of a row.
  template <class Fn>
  __device__ void each_run(char* scratch, const Fn& fn) const {
    float* own = reinterpret_cast<float*>(scratch) + warp() * 256;
    const int m0 = warp() % 2 * (16 * kDown), n0 = warp() / 2 * (16 * kAcross);
#pragma unroll
    for (int i = 0; i < kDown; ++i) {
#pragma unroll
      for (int j = 0; j < kAcross; ++j) {
        wmma::store_matrix_sync(own, sum[i][j], 16, wmma::mem_row_major);
        __syncwarp();
        const int row = lane() / 2, column = lane() % 2 * kRun;
        fn(m0 + 16 * i + row, n0 + 16 * j + column, own + 16 * row + column);
        __syncwarp();
      }
    }
  }

 private:
  static constexpr int kStep = sizeof(T) == 4 ? 8 : 16;
  static constexpr int kDown = 4, kAcross = 2;  // fragments of a warp, of which there are 2 x 4
  static __device__ int warp() { return threadIdx.x / kWarp; }

  template <bool kKDense, class Fragment>
  static __device__ void load(Fragment& fragment, const T* tile, int i, int k) {
    constexpr int kStride = (kKDense ? kDepth : kTile) + kPackOf<T>;
    wmma::load_matrix_sync(fragment, tile + (kKDense ? i * kStride + k : k * kStride + i), kStride);
    if constexpr (sizeof(T) == 4) {
#pragma unroll
      for (int x = 0; x < fragment.num_elements; ++x) {
        fragment.x[x] = wmma::__float_to_tf32(fragment.x[x]);
      }
    }
  }

  wmma::fragment<wmma::accumulator, 16, 16, kStep, float> sum[kDown][kAcross];
};

// A tile's operand in memory; element (i, k) is data[i * stride + k] if k is dense, else
// data[k * stride + i].
template <class T>
struct Operand {
  const T* data;
  int64_t rows;    // i is below it; others count as zeros
  int64_t stride;  // of the dimension that is not dense
  bool is_packed;  // 16 bytes may be read at once
};

// From memory through registers to shared memory.
template <class Engine, bool kKDense>
struct Loader {
  using T = typename Engine::Operand;
  static constexpr int kPack = kPackOf<T>;
  static constexpr int kInner = kKDense ? Engine::kDepth : Engine::kTile;
  static constexpr int kOuter = kKDense ? Engine::kTile : Engine::kDepth;
  static constexpr int kCount = kInner * kOuter / kPack / kThreads;
  static constexpr bool kTurns = kKDense && Engine::kWantsKOuter;
  static constexpr int kStride = (kTurns ? kOuter : kInner) + kPack;
  static constexpr int kElements = (kTurns ? kInner : kOuter) * kStride;  // of a tile
  static_assert(kCount * kPack * kThreads == kInner * kOuter, "every thread as many");

  Pack<T, kPack> packs[kCount];

  static __device__ int outer(int i) { return (i * kThreads + threadIdx.x) / (kInner / kPack); }
  static __device__ int inner(int i) {
    return (i * kThreads + threadIdx.x) % (kInner / kPack) * kPack;
  }

  __device__ void load(const Operand<T>& from, int64_t k0, int64_t depth) {
    const int64_t rest = depth - k0;
    const int64_t most_outer = kKDense ? from.rows : rest, most_inner = kKDense ? rest : from.rows;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      packs[i] = {};
      if (outer(i) >= most_outer) continue;
      const T* data = from.data +
                      (kKDense ? outer(i) * from.stride + k0 : (k0 + outer(i)) * from.stride) +
                      inner(i);
      if (from.is_packed && inner(i) + kPack <= most_inner) {
        packs[i] = *reinterpret_cast<const Pack<T, kPack>*>(data);
      } else {
#pragma unroll
        for (int j = 0; j < kPack; ++j) {
          if (inner(i) + j < most_inner) packs[i].values[j] = data[j];
        }
      }
    }
  }

  __device__ void store(T* tile) const {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if constexpr (kTurns) {
#pragma unroll
        for (int j = 0; j < kPack; ++j) {
          tile[(inner(i) + j) * kStride + outer(i)] = packs[i].values[j];
        }
      } else {
        *reinterpret_cast<Pack<T, kPack>*>(tile + outer(i) * kStride + inner(i)) = packs[i];
      }
    }
  }
};

template <class Engine, bool kAKDense, bool kBKDense>
constexpr size_t shared_bytes() {
  const size_t tiles = 2 *
                       (Loader<Engine, kAKDense>::kElements + Loader<Engine, kBKDense>::kElements) *
                       sizeof(typename Engine::Operand);
  return tiles > Engine::kScratch ? tiles : Engine::kScratch;
}

// The engine's sum += A B^T, k below depth. While a step is multiplied the next one is on its way.
template <bool kAKDense, bool kBKDense, class Engine, class T = typename Engine::Operand>
__device__ void multiply(
    Engine& engine, const Operand<T>& a, const Operand<T>& b, int64_t depth, char* shared) {
  using LoaderA = Loader<Engine, kAKDense>;
  using LoaderB = Loader<Engine, kBKDense>;
  T* tiles_a = reinterpret_cast<T*>(shared);
  T* tiles_b = tiles_a + 2 * LoaderA::kElements;
  LoaderA next_a;
  LoaderB next_b;
  next_a.load(a, 0, depth);
  next_b.load(b, 0, depth);
  for (int64_t k = 0, turn = 0; k < depth; k += Engine::kDepth, turn ^= 1) {
    T* tile_a = tiles_a + turn * LoaderA::kElements;
    T* tile_b = tiles_b + turn * LoaderB::kElements;
    next_a.store(tile_a);
    next_b.store(tile_b);
    __syncthreads();
    if (k + Engine::kDepth < depth) {
      next_a.load(a, k + Engine::kDepth, depth);
      next_b.load(b, k + Engine::kDepth, depth);
    }
    engine.template multiply<kAKDense, kBKDense>(tile_a, tile_b);
  }
  __syncthreads();  // the scratch lies where the tiles do
}

// C's tile to memory: `rows` and `columns` of it.
template <class Engine, class T = typename Engine::Operand>
__device__ void write_tile(
    const Engine& engine, char* scratch, T* out, int64_t rows, int64_t columns, int64_t stride,
    bool is_packed) {
  using Sum = typename Engine::Sum;
  constexpr int kPack = kPackOf<T>;
  engine.each_run(scratch, [&](int m, int n, const Sum* values) {
    if (m >= rows) return;
    Pack<T, kPack>* to = reinterpret_cast<Pack<T, kPack>*>(out + m * stride + n);
#pragma unroll
    for (int first = 0; first < Engine::kRun; first += kPack) {
      Pack<T, kPack> pack;
#pragma unroll
      for (int j = 0; j < kPack; ++j) {
        pack.values[j] = narrow<T>(values[first + j]);
      }
      if (is_packed && n + first + kPack <= columns) {
        to[first / kPack] = pack;
      } else {
#pragma unroll
        for (int j = 0; j < kPack; ++j) {
          if (n + first + j < columns) out[m * stride + n + first + j] = pack.values[j];
        }
      }
    }
  });
}

template <class T>
struct Tag {
  using type = T;
};

// Calls fn with a Tag of the engine.
template <class Fn>
void dispatch_engine(Type type, bool tf32, const Fn& fn) {
  switch (type) {
    case Type::kF64:
      return fn(Tag<FmaEngine<double>>{});
    case Type::kF32:
      if (tf32) return fn(Tag<TensorEngine<float, wmma::precision::tf32>>{});
      return fn(Tag<FmaEngine<float>>{});
    case Type::kBf16:
      return fn(Tag<TensorEngine<BFloat16, BFloat16>>{});
    case Type::kF16:
      return fn(Tag<TensorEngine<Half, Half>>{});
  }
}

}  // namespace moe_ext::cuda
