#include "cuda/kernels/tile.cuh"

namespace moe_ext::cuda {
namespace {

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
