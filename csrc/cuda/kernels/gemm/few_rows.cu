#include "cuda/kernels/gemm/loader.cuh"

namespace moe_ext::cuda::kernels {
namespace {

// The weights of an expert are read once for every kFewRows of its rows. One warp makes kFewColumns
// columns of them; a lane goes along k in packs.
//
// 8 rows: where this kernel serves, hardly an expert has more. 2 columns: each pack of a row is
// used twice, and 16 sums beside two steps of packs stay below 80 registers, so that 3 blocks an SM
// have loads of weights in flight, whose reading is all of the time. [decode, Qwen3-30B-A3B]
constexpr int kFewRows = 8, kFewColumns = 2;
constexpr int kColumnsPerBlock = kThreads / kWarp * kFewColumns;

template <class T, int kPack>
__global__ void __launch_bounds__(kThreads) few_rows_kernel(ProductArgs args) {
  using P = Pack<T, kPack>;
  using Sum = Compute<T>;
  const int64_t blocks_n = ceil_div(args.N, kColumnsPerBlock);
  const int64_t row = blockIdx.x / blocks_n;
  const int64_t expert = expert_of_row(args.groups.offsets, args.groups.E, row);
  if (expert < 0 || (row - args.groups.offsets[expert]) % kFewRows != 0) return;
  const int64_t left = args.groups.offsets[expert + 1] - row;
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

}  // namespace

void grouped_product_of_few_rows(const ProductArgs& args, cudaStream_t stream) {
  if (args.groups.num_rows == 0 || args.N == 0) return;
  const int64_t blocks = args.groups.num_rows * ceil_div(args.N, kColumnsPerBlock);
  dispatch(args.groups.type, [&](auto element) {
    using T = decltype(element);
    const bool is_packed = are_weights_aligned(args) &&
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

}  // namespace moe_ext::cuda::kernels
