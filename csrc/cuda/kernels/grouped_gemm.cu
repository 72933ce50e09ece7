#ifndef MOE_EXT_CUDA_EMULATION
#include <mma.h>
#endif

#include "cuda/kernels/device.cuh"

namespace moe_ext::cuda {
namespace {

namespace wmma = nvcuda::wmma;

// A block of kThreads makes a tile of C = A B^T, A [m, k] and B [n, k], in steps of kDepth along k.
// What multiplies is an engine; its operands lie in shared memory, rows kPackOf longer than they
// are wide, for the banks' sake.

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

// The rows of each expert in tiles of kRows: tile number `index` of all. expert is -1 past the
// last.
struct RowTile {
  int64_t expert, begin, end;
};
template <int kRows>
__device__ RowTile find_tile(const ExpertRows& experts, int64_t index) {
  const int32_t* offsets = experts.offsets;
  const Owner owner = find_owner(
      experts.E, index, [&](int64_t e) { return ceil_div(offsets[e + 1] - offsets[e], kRows); });
  if (owner.i < 0) return {-1, 0, 0};
  return {
      owner.i, offsets[owner.i] + (index - owner.before) * kRows, int64_t(offsets[owner.i + 1])};
}

// One block for each tile of the result.
template <class Engine, bool kBKDense>
__global__ void __launch_bounds__(kThreads)
    product_kernel(ProductArgs args, bool rows_packed, bool weights_packed, bool out_packed) {
  using T = typename Engine::Operand;
  const int64_t tiles_n = ceil_div(args.N, Engine::kTile);
  const RowTile tile = find_tile<Engine::kTile>(args.experts, blockIdx.x / tiles_n);
  if (tile.expert < 0) return;
  const int64_t n = blockIdx.x % tiles_n * Engine::kTile;
  const int64_t rows = tile.end - tile.begin, columns = args.N - n;
  const T* weights =
      static_cast<const T*>(args.weights) + tile.expert * args.expert_stride + n * args.n_stride;
  Engine engine;
  multiply<true, kBKDense>(
      engine,
      Operand<T>{
          static_cast<const T*>(args.rows) + tile.begin * args.row_stride, rows, args.row_stride,
          rows_packed},
      Operand<T>{weights, columns, kBKDense ? args.n_stride : args.k_stride, weights_packed},
      args.K, dynamic_shared());
  write_tile(
      engine, dynamic_shared(), static_cast<T*>(args.out) + tile.begin * args.N + n, rows, columns,
      args.N, out_packed);
}

// One block for each tile of the result. An expert without rows gets zeros.
template <class Engine>
__global__ void __launch_bounds__(kThreads) grad_weights_kernel(
    GradWeightsArgs args, bool left_packed, bool right_packed, bool grad_packed) {
  using T = typename Engine::Operand;
  const int64_t tiles_m = ceil_div(args.M, Engine::kTile);
  const int64_t tiles_n = ceil_div(args.N, Engine::kTile);
  const int64_t n = blockIdx.x % tiles_n * Engine::kTile;
  const int64_t m = blockIdx.x / tiles_n % tiles_m * Engine::kTile;
  const int64_t e = blockIdx.x / tiles_n / tiles_m;
  const int64_t begin = args.experts.offsets[e], end = args.experts.offsets[e + 1];
  Engine engine;
  multiply<false, false>(
      engine,
      Operand<T>{
          static_cast<const T*>(args.left) + begin * args.M + m, args.M - m, args.M, left_packed},
      Operand<T>{
          static_cast<const T*>(args.right) + begin * args.N + n, args.N - n, args.N, right_packed},
      end - begin, dynamic_shared());
  write_tile(
      engine, dynamic_shared(), static_cast<T*>(args.grad) + (e * args.M + m) * args.N + n,
      args.M - m, args.N - n, args.N, grad_packed);
}

// The weights of an expert are read once for every kFewRows of its rows. One warp makes kFewColumns
// columns of them; a lane goes along k in packs.
constexpr int kFewRows = 8, kFewColumns = 2;

template <class T, int kPack>
__global__ void __launch_bounds__(kThreads) few_rows_kernel(ProductArgs args) {
  using P = Pack<T, kPack>;
  using Sum = Compute<T>;
  constexpr int kColumnsPerBlock = kThreads / kWarp * kFewColumns;
  const int64_t blocks_n = ceil_div(args.N, kColumnsPerBlock);
  const int64_t row = blockIdx.x / blocks_n;
  const int64_t expert = expert_of_row(args.experts.offsets, args.experts.E, row);
  if (expert < 0 || (row - args.experts.offsets[expert]) % kFewRows != 0) return;
  const int64_t left = args.experts.offsets[expert + 1] - row;
  const int count = left < kFewRows ? static_cast<int>(left) : kFewRows;
  const int64_t n = blockIdx.x % blocks_n * kColumnsPerBlock + threadIdx.x / kWarp * kFewColumns;
  if (n >= args.N) return;
  const int columns = args.N - n < kFewColumns ? static_cast<int>(args.N - n) : kFewColumns;
  const T* rows = static_cast<const T*>(args.rows) + row * args.row_stride;
  const T* weights =
      static_cast<const T*>(args.weights) + expert * args.expert_stride + n * args.n_stride;
  Sum sum[kFewRows][kFewColumns] = {};
#pragma unroll 2
  for (int64_t k = lane() * kPack; k < args.K; k += kWarp * kPack) {
    P w[kFewColumns] = {};
#pragma unroll
    for (int c = 0; c < kFewColumns; ++c) {
      if (c < columns) w[c] = *reinterpret_cast<const P*>(weights + c * args.n_stride + k);
    }
#pragma unroll
    for (int i = 0; i < kFewRows; ++i) {
      if (i >= count) break;
      const P x = *reinterpret_cast<const P*>(rows + i * args.row_stride + k);
#pragma unroll
      for (int c = 0; c < kFewColumns; ++c) {
#pragma unroll
        for (int j = 0; j < kPack; ++j) sum[i][c] += widen(x.values[j]) * widen(w[c].values[j]);
      }
    }
  }
  T* out = static_cast<T*>(args.out) + row * args.N + n;
#pragma unroll
  for (int i = 0; i < kFewRows; ++i) {
    if (i >= count) break;
#pragma unroll
    for (int c = 0; c < kFewColumns; ++c) {
      const Sum total = warp_sum(sum[i][c]);
      if (c < columns && lane() == 0) out[i * args.N + c] = narrow<T>(total);
    }
  }
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

int64_t size_of(Type type) { return type == Type::kF64 ? 8 : type == Type::kF32 ? 4 : 2; }

bool weights_aligned(const ProductArgs& args) {
  const int64_t size = size_of(args.experts.type);
  const int64_t stride = args.k_stride == 1 ? args.n_stride : args.k_stride;
  return is_aligned(args.weights, stride, size) &&
         is_aligned(args.weights, args.expert_stride, size);
}

}  // namespace

void grouped_product(const ProductArgs& args, cudaStream_t stream) {
  if (args.experts.num_rows == 0 || args.N == 0) return;
  const int64_t size = size_of(args.experts.type);
  const bool rows_packed = is_aligned(args.rows, args.row_stride, size);
  const bool weights_packed = weights_aligned(args);
  const bool out_packed = is_aligned(args.out, args.N, size);
  dispatch_engine(args.experts.type, args.tf32, [&](auto tag) {
    using Engine = typename decltype(tag)::type;
    // No expert can have more tiles than this, whatever the routing.
    const int64_t tiles =
        args.experts.num_rows / Engine::kTile +
        (args.experts.E < args.experts.num_rows ? args.experts.E : args.experts.num_rows);
    const int64_t blocks = tiles * ceil_div(args.N, Engine::kTile);
    const auto run = [&](auto k_dense) {
      launch(
          product_kernel<Engine, k_dense()>, blocks, kThreads,
          shared_bytes<Engine, true, k_dense()>(), stream, args, rows_packed, weights_packed,
          out_packed);
    };
    if (args.k_stride == 1) {
      run(std::true_type{});
    } else {
      run(std::false_type{});
    }
  });
}

void grouped_product_of_few_rows(const ProductArgs& args, cudaStream_t stream) {
  if (args.experts.num_rows == 0 || args.N == 0) return;
  const int64_t blocks = args.experts.num_rows * ceil_div(args.N, kThreads / kWarp * kFewColumns);
  dispatch(args.experts.type, [&](auto element) {
    using T = decltype(element);
    const bool is_packed = weights_aligned(args) &&
                           is_aligned(args.rows, args.row_stride, sizeof(T)) &&
                           args.K % kPackOf<T> == 0;
    const auto run = [&](auto pack) {
      launch(few_rows_kernel<T, pack()>, blocks, kThreads, 0, stream, args);
    };
    if (is_packed) {
      run(std::integral_constant<int, kPackOf<T>>{});
    } else {
      run(std::integral_constant<int, 1>{});
    }
  });
}

void grouped_grad_weights(const GradWeightsArgs& args, cudaStream_t stream) {
  if (args.M == 0 || args.N == 0) return;
  const int64_t size = size_of(args.experts.type);
  const bool left_packed = is_aligned(args.left, args.M, size);
  const bool right_packed = is_aligned(args.right, args.N, size);
  const bool grad_packed = is_aligned(args.grad, args.N, size);
  dispatch_engine(args.experts.type, args.tf32, [&](auto tag) {
    using Engine = typename decltype(tag)::type;
    launch(
        grad_weights_kernel<Engine>,
        args.experts.E * ceil_div(args.M, Engine::kTile) * ceil_div(args.N, Engine::kTile),
        kThreads, shared_bytes<Engine, false, false>(), stream, args, left_packed, right_packed,
        grad_packed);
  });
}

}  // namespace moe_ext::cuda
