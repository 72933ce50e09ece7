#include "cuda/kernels/row_walk.cuh"

namespace moe_ext::cuda::kernels {
namespace {

template <class T, int kPack>
__global__ void weigh_rows_kernel(
    RowGroups groups, const T* bias, const Compute<T>* weights, int64_t N, T* rows) {
  using P = Pack<T, kPack>;
  each_segment<kPack>(groups.num_rows, N, [&](int64_t row, int64_t first, int64_t last) {
    const bool is_used = row < groups.offsets[groups.E];
    if (is_used && !weights && !bias) return;
    const Compute<T> weight = is_used && weights ? weights[row] : Compute<T>(1);
    const T* row_bias = is_used ? bias_of(groups, bias, N, row) : nullptr;
    for (int64_t n = first + lane() * kPack; n < last; n += kWarp * kPack) {
      T* at = rows + row * N + n;
      P out = {};
      if (is_used) {
        const Sums<kPack, T> x(at, row_bias ? row_bias + n : nullptr);
        for (int i = 0; i < kPack; ++i) out.values[i] = narrow<T>(weight * x.values[i]);
      }
      *reinterpret_cast<P*>(at) = out;
    }
  });
}

// Blocks that look after one expert, at most: enough that a single idle expert is cleared by half
// of a GPU, and few enough that 256 experts, hardly ever idle, cost 16,384 blocks that read two
// offsets and leave. [backward, DeepSeek-V3]
constexpr int64_t kMostIdleBlocks = 64;

// blocks_each blocks for each expert; most have nothing to do.
template <class T>
__global__ void zero_idle_kernel(RowGroups groups, int64_t blocks_each, int64_t size, T* grad) {
  const int64_t e = blockIdx.x / blocks_each;
  if (groups.offsets[e] != groups.offsets[e + 1]) return;
  const T zero = narrow<T>(0);
  for (int64_t i = blockIdx.x % blocks_each * kThreads + threadIdx.x; i < size;
       i += blocks_each * kThreads) {
    grad[e * size + i] = zero;
  }
}

// One block for 32 columns of one expert: its warps share the rows, and the first adds their sums.
template <class T>
__global__ void sum_rows_kernel(
    RowGroups groups, const T* rows, const Compute<T>* weights, const int32_t* slot_of_row,
    int64_t N, T* sum) {
  __shared__ Compute<T> of_warp[kRowsPerBlock][kWarp];
  const int64_t columns = ceil_div(N, kWarp);
  const int64_t e = blockIdx.x / columns, n = blockIdx.x % columns * kWarp + lane();
  const int warp = threadIdx.x / kWarp;
  Compute<T> total = 0;
  if (n < N) {
    const int64_t end = groups.offsets[e + 1];
#pragma unroll 4
    for (int64_t row = groups.offsets[e] + warp; row < end; row += kRowsPerBlock) {
      total += weight_of(weights, slot_of_row, row) * widen(rows[row * N + n]);
    }
  }
  of_warp[warp][lane()] = total;
  __syncthreads();
  if (warp != 0 || n >= N) return;
  for (int w = 1; w < kRowsPerBlock; ++w) total += of_warp[w][lane()];
  sum[e * N + n] = narrow<T>(total);
}

}  // namespace

void weigh_rows(
    const RowGroups& groups, const void* bias, const void* weights, int64_t N, void* rows,
    cudaStream_t stream) {
  if (groups.num_rows == 0 || N == 0) return;
  dispatch(groups.type, [&](auto element) {
    using T = decltype(element);
    const T* bias_data = static_cast<const T*>(bias);
    T* data = static_cast<T*>(rows);
    dispatch_pack<T>(
        N,
        [&](auto pack) {
          launch(
              weigh_rows_kernel<T, pack()>, segment_blocks(groups.num_rows, N, pack()), kThreads, 0,
              stream, groups, bias_data, static_cast<const Compute<T>*>(weights), N, data);
        },
        bias_data, data);
  });
}

void zero_idle_experts(const RowGroups& groups, int64_t size, void* grad, cudaStream_t stream) {
  if (size == 0) return;
  const int64_t needed = ceil_div(size, kThreads);
  const int64_t blocks_each = needed < kMostIdleBlocks ? needed : kMostIdleBlocks;
  dispatch(groups.type, [&](auto element) {
    using T = decltype(element);
    launch(
        zero_idle_kernel<T>, groups.E * blocks_each, kThreads, 0, stream, groups, blocks_each, size,
        static_cast<T*>(grad));
  });
}

void sum_rows(
    const RowGroups& groups, const void* rows, const void* weights, const int32_t* slot_of_row,
    int64_t N, void* sum, cudaStream_t stream) {
  if (N == 0) return;
  dispatch(groups.type, [&](auto element) {
    using T = decltype(element);
    launch(
        sum_rows_kernel<T>, groups.E * ceil_div(N, kWarp), kThreads, 0, stream, groups,
        static_cast<const T*>(rows), static_cast<const Compute<T>*>(weights), slot_of_row, N,
        static_cast<T*>(sum));
  });
}

}  // namespace moe_ext::cuda::kernels
