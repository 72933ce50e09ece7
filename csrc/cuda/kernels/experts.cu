#include "common/activation.h"
#include "cuda/kernels/device.cuh"

namespace moe_ext::cuda {
namespace {

// What a warp does of a row at once, so that few long rows make many warps, too.
constexpr int64_t kSegment = 4 * kWarp;  // packs

template <class Number>
__device__ Number weight_of(const Number* weights, const int32_t* slot_of_row, int64_t row) {
  return weights ? weights[slot_of_row ? slot_of_row[row] : row] : Number(1);
}

// One warp for each segment of a row. fn(row, first, last): the columns from first to below last.
template <int kPack, class Fn>
__device__ void each_segment(int64_t rows, int64_t columns, const Fn& fn) {
  const int64_t segments = ceil_div(columns, kSegment * kPack);
  const int64_t index = int64_t(blockIdx.x) * kRowsPerBlock + threadIdx.x / kWarp;
  const int64_t row = index / segments;
  if (row >= rows) return;
  const int64_t first = index % segments * kSegment * kPack;
  const int64_t last = first + kSegment * kPack;
  fn(row, first, last < columns ? last : columns);
}

// The bias of an expert's rows, `columns` of it; null if there is none.
template <class T>
__device__ const T* bias_of(
    const ExpertRows& experts, const T* bias, int64_t columns, int64_t row) {
  return bias ? bias + expert_of_row(experts.offsets, experts.E, row) * columns : nullptr;
}

// kPack numbers of data, plus those of the bias, if there is one.
template <int kPack, class T>
struct Sums {
  Compute<T> values[kPack];

  __device__ Sums(const T* data, const T* bias) {
    using P = Pack<T, kPack>;
    const P pack = *reinterpret_cast<const P*>(data);
    for (int i = 0; i < kPack; ++i) values[i] = widen(pack.values[i]);
    if (!bias) return;
    const P more = *reinterpret_cast<const P*>(bias);
    for (int i = 0; i < kPack; ++i) values[i] += widen(more.values[i]);
  }
};

template <class T, int kPack>
__global__ void finish_rows_kernel(
    ExpertRows experts, const T* bias, const Compute<T>* weights, int64_t N, T* rows) {
  using P = Pack<T, kPack>;
  each_segment<kPack>(experts.num_rows, N, [&](int64_t row, int64_t first, int64_t last) {
    const bool is_used = row < experts.offsets[experts.E];
    if (is_used && !weights && !bias) return;
    const Compute<T> weight = is_used && weights ? weights[row] : Compute<T>(1);
    const T* row_bias = is_used ? bias_of(experts, bias, N, row) : nullptr;
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

// blocks_each blocks for each expert; most have nothing to do.
template <class T>
__global__ void zero_idle_kernel(ExpertRows experts, int64_t blocks_each, int64_t size, T* grad) {
  const int64_t e = blockIdx.x / blocks_each;
  if (experts.offsets[e] != experts.offsets[e + 1]) return;
  const T zero = narrow<T>(0);
  for (int64_t i = blockIdx.x % blocks_each * kThreads + threadIdx.x; i < size;
       i += blocks_each * kThreads) {
    grad[e * size + i] = zero;
  }
}

// One block for 32 columns of one expert: its warps share the rows, and the first adds their sums.
template <class T>
__global__ void sum_rows_kernel(
    ExpertRows experts, const T* rows, const Compute<T>* weights, const int32_t* slot_of_row,
    int64_t N, T* sum) {
  constexpr int kWarps = kThreads / kWarp;
  __shared__ Compute<T> parts[kWarps][kWarp];
  const int64_t columns = ceil_div(N, kWarp);
  const int64_t e = blockIdx.x / columns, n = blockIdx.x % columns * kWarp + lane();
  const int warp = threadIdx.x / kWarp;
  Compute<T> part = 0;
  if (n < N) {
    const int64_t end = experts.offsets[e + 1];
#pragma unroll 4
    for (int64_t row = experts.offsets[e] + warp; row < end; row += kWarps) {
      part += weight_of(weights, slot_of_row, row) * widen(rows[row * N + n]);
    }
  }
  parts[warp][lane()] = part;
  __syncthreads();
  if (warp != 0 || n >= N) return;
  for (int w = 1; w < kWarps; ++w) part += parts[w][lane()];
  sum[e * N + n] = narrow<T>(part);
}

// Where a row's gate and up lie, and their biases (or null).
template <class F, class T>
struct HiddenRow {
  const T* data;
  const T* bias;
  int64_t I;

  __device__ HiddenRow(
      const ExpertRows& experts, const void* hidden, const void* biases, int64_t I, int64_t row)
      : data(static_cast<const T*>(hidden) + row * width(I)),
        bias(bias_of(experts, static_cast<const T*>(biases), width(I), row)),
        I(I) {}
  static __device__ int64_t width(int64_t I) { return F::kGated ? 2 * I : I; }

  template <int kPack>
  __device__ Sums<kPack, T> gate(int64_t i) const {
    return Sums<kPack, T>(data + i, bias ? bias + i : nullptr);
  }
  template <int kPack>
  __device__ Sums<kPack, T> up(int64_t i) const {
    return gate<kPack>(F::kGated ? I + i : i);
  }
};

template <class F, class T, int kPack>
__global__ void activate_kernel(
    ExpertRows experts, const T* hidden, const T* bias, int64_t I, T* activated) {
  using P = Pack<T, kPack>;
  each_segment<kPack>(experts.num_rows, I, [&](int64_t row, int64_t first, int64_t last) {
    if (row >= experts.offsets[experts.E]) return;
    const HiddenRow<F, T> hidden_row(experts, hidden, bias, I, row);
    for (int64_t i = first + lane() * kPack; i < last; i += kWarp * kPack) {
      const auto gate = hidden_row.template gate<kPack>(i), up = hidden_row.template up<kPack>(i);
      P out;
      for (int j = 0; j < kPack; ++j) {
        out.values[j] = narrow<T>(F::value(gate.values[j], up.values[j]));
      }
      *reinterpret_cast<P*>(activated + row * I + i) = out;
    }
  });
}

// One warp for each row, since grad_weights is a sum over it. A lane reads all that it overwrites
// before it does so.
template <class F, class T, int kPack>
__global__ void grad_hidden_kernel(GradHiddenArgs args) {
  using P = Pack<T, kPack>;
  using Number = Compute<T>;
  const ExpertRows& experts = args.experts;
  const int64_t row = int64_t(blockIdx.x) * kRowsPerBlock + threadIdx.x / kWarp;
  if (row >= experts.num_rows || row >= experts.offsets[experts.E]) return;
  const int64_t I = args.I, width = HiddenRow<F, T>::width(I);
  const Number weight = weight_of(static_cast<const Number*>(args.weights), args.slot_of_row, row);
  const HiddenRow<F, T> hidden_row(experts, args.hidden, args.bias, I, row);
  const T* grads = static_cast<const T*>(args.grad) + row * I;
  T* grad_gates = args.grad_hidden ? static_cast<T*>(args.grad_hidden) + row * width : nullptr;
  T* weighted = args.weighted ? static_cast<T*>(args.weighted) + row * I : nullptr;
  Number dot = 0;
  for (int64_t i = lane() * kPack; i < I; i += kWarp * kPack) {
    const auto gate = hidden_row.template gate<kPack>(i), up = hidden_row.template up<kPack>(i);
    const P grad = *reinterpret_cast<const P*>(grads + i);
    P out, grad_gate, grad_up = {};
    for (int j = 0; j < kPack; ++j) {
      const Number g = gate.values[j], u = up.values[j], d = widen(grad.values[j]);
      const Number a = F::value(g, u);
      dot += a * d;
      out.values[j] = narrow<T>(weight * a);
      Number dg = 0, du = 0;
      F::grad(g, u, weight * d, &dg, &du);
      grad_gate.values[j] = narrow<T>(dg);
      grad_up.values[j] = narrow<T>(du);
    }
    if (grad_gates) {
      *reinterpret_cast<P*>(grad_gates + i) = grad_gate;
      if constexpr (F::kGated) *reinterpret_cast<P*>(grad_gates + I + i) = grad_up;
    }
    if (weighted) *reinterpret_cast<P*>(weighted + i) = out;
  }
  if (!args.grad_weights) return;
  if (args.down_bias) {
    const int64_t e = expert_of_row(experts.offsets, experts.E, row);
    const T* grad_out = static_cast<const T*>(args.grad_out) + row * args.H;
    const T* bias = static_cast<const T*>(args.down_bias) + e * args.H;
    for (int64_t h = lane(); h < args.H; h += kWarp) dot += widen(grad_out[h]) * widen(bias[h]);
  }
  dot = warp_sum(dot);
  const int64_t slot = args.slot_of_row ? args.slot_of_row[row] : row;
  if (lane() == 0) static_cast<Number*>(args.grad_weights)[slot] = dot;
}

// Blocks of each_segment.
int64_t segment_blocks(int64_t rows, int64_t columns, int pack) {
  return blocks_for(rows * ceil_div(columns, kSegment * pack));
}

}  // namespace

void finish_rows(
    const ExpertRows& experts, const void* bias, const void* weights, int64_t N, void* rows,
    cudaStream_t stream) {
  if (experts.num_rows == 0 || N == 0) return;
  dispatch(experts.type, [&](auto element) {
    using T = decltype(element);
    const T* bias_data = static_cast<const T*>(bias);
    T* data = static_cast<T*>(rows);
    dispatch_pack<T>(
        N,
        [&](auto pack) {
          launch(
              finish_rows_kernel<T, pack()>, segment_blocks(experts.num_rows, N, pack()), kThreads,
              0, stream, experts, bias_data, static_cast<const Compute<T>*>(weights), N, data);
        },
        bias_data, data);
  });
}

void zero_idle_experts(const ExpertRows& experts, int64_t size, void* grad, cudaStream_t stream) {
  if (size == 0) return;
  const int64_t most = 64, needed = ceil_div(size, kThreads);
  const int64_t blocks_each = needed < most ? needed : most;
  dispatch(experts.type, [&](auto element) {
    using T = decltype(element);
    launch(
        zero_idle_kernel<T>, experts.E * blocks_each, kThreads, 0, stream, experts, blocks_each,
        size, static_cast<T*>(grad));
  });
}

void sum_rows(
    const ExpertRows& experts, const void* rows, const void* weights, const int32_t* slot_of_row,
    int64_t N, void* sum, cudaStream_t stream) {
  if (N == 0) return;
  dispatch(experts.type, [&](auto element) {
    using T = decltype(element);
    launch(
        sum_rows_kernel<T>, experts.E * ceil_div(N, kWarp), kThreads, 0, stream, experts,
        static_cast<const T*>(rows), static_cast<const Compute<T>*>(weights), slot_of_row, N,
        static_cast<T*>(sum));
  });
}

void activate(
    const ExpertRows& experts, Activation activation, bool gated, const void* hidden,
    const void* bias, int64_t I, void* activated, cudaStream_t stream) {
  if (experts.num_rows == 0 || I == 0) return;
  dispatch(experts.type, [&](auto element) {
    using T = decltype(element);
    const T* from = static_cast<const T*>(hidden);
    const T* bias_data = static_cast<const T*>(bias);
    T* to = static_cast<T*>(activated);
    dispatch_activation(activation, gated, [&](auto f) {
      dispatch_pack<T>(
          I,
          [&](auto pack) {
            launch(
                activate_kernel<decltype(f), T, pack()>,
                segment_blocks(experts.num_rows, I, pack()), kThreads, 0, stream, experts, from,
                bias_data, I, to);
          },
          from, bias_data, to);
    });
  });
}

void grad_hidden(const GradHiddenArgs& args, cudaStream_t stream) {
  if (args.experts.num_rows == 0) return;
  dispatch(args.experts.type, [&](auto element) {
    using T = decltype(element);
    const auto data = [](const void* from) { return static_cast<const T*>(from); };
    dispatch_activation(args.activation, args.gated, [&](auto f) {
      dispatch_pack<T>(
          args.I,
          [&](auto pack) {
            launch(
                grad_hidden_kernel<decltype(f), T, pack()>, blocks_for(args.experts.num_rows),
                kThreads, 0, stream, args);
          },
          data(args.hidden), data(args.bias), data(args.grad), data(args.grad_hidden),
          data(args.weighted));
    });
  });
}

}  // namespace moe_ext::cuda
