#include "cuda/kernels/gemm/epilogue.cuh"
#include "cuda/kernels/gemm/mainloop.cuh"
#include "cuda/kernels/gemm/schedule.cuh"

namespace moe_ext::cuda::kernels {
namespace {

template <class Engine, class Weights, bool kKDense>
using ProductLoop = Mainloop<Engine, Dense<typename Engine::Number>, true, Weights, kKDense>;

// One block for each tile of the result. Weights: their format.
template <class Engine, class Weights, bool kKDense>
__global__ void __launch_bounds__(kThreads)
    product_kernel(ProductArgs args, bool rows_packed, bool weights_packed, bool out_packed) {
  using T = typename Engine::Number;
  using Stored = typename Weights::Stored;
  const int64_t tiles_n = ceil_div(args.N, Engine::kTileN);
  const RowTile tile = find_tile<Engine::kTileM>(args.groups, blockIdx.x / tiles_n);
  if (tile.expert < 0) return;
  const int64_t n = blockIdx.x % tiles_n * Engine::kTileN;
  const int64_t rows = tile.end - tile.begin, columns = args.N - n;
  const Stored* weights = static_cast<const Stored*>(args.weights) +
                          tile.expert * args.expert_stride + n * args.n_stride;
  Engine engine;
  ProductLoop<Engine, Weights, kKDense>::multiply(
      engine,
      {static_cast<const T*>(args.rows) + tile.begin * args.row_stride, rows, args.row_stride,
       rows_packed},
      {weights, columns, kKDense ? args.n_stride : args.k_stride, weights_packed}, args.K,
      dynamic_shared());
  write_tile(
      engine, dynamic_shared(), static_cast<T*>(args.out) + tile.begin * args.N + n, rows, columns,
      args.N, out_packed);
}

}  // namespace

void grouped_product(const ProductArgs& args, cudaStream_t stream) {
  if (args.groups.num_rows == 0 || args.N == 0) return;
  const int64_t size = size_of(args.groups.type);
  const bool rows_packed = is_aligned(args.rows, args.row_stride, size);
  const bool weights_packed = are_weights_aligned(args);
  const bool out_packed = is_aligned(args.out, args.N, size);
  dispatch_engine(args.groups.type, args.tf32, [&](auto tag) {
    using Engine = typename decltype(tag)::type;
    using Weights = Dense<typename Engine::Number>;
    const auto run = [&](auto k_dense) {
      launch(
          product_kernel<Engine, Weights, k_dense()>, product_blocks<Engine>(args.groups, args.N),
          kThreads, ProductLoop<Engine, Weights, k_dense()>::kBytes, stream, args, rows_packed,
          weights_packed, out_packed);
    };
    if (args.k_stride == 1) {
      run(std::true_type{});
    } else {
      run(std::false_type{});
    }
  });
}

}  // namespace moe_ext::cuda::kernels
