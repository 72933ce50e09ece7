#include "common/activation.h"
#include "cuda/kernels/row_walk.cuh"

namespace moe_ext::cuda::kernels {
namespace {

// Where a row's gate and up lie, and their biases (or null).
template <class F, class T>
struct HiddenRow {
  const T* data;
  const T* bias;
  int64_t I;

  __device__ HiddenRow(
      const RowGroups& groups, const void* hidden, const void* biases, int64_t I, int64_t row)
      : data(static_cast<const T*>(hidden) + row * width(I)),
        bias(bias_of(groups, static_cast<const T*>(biases), width(I), row)),
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
    RowGroups groups, const T* hidden, const T* bias, int64_t I, T* activated) {
  using P = Pack<T, kPack>;
  each_segment<kPack>(groups.num_rows, I, [&](int64_t row, int64_t first, int64_t last) {
    if (row >= groups.offsets[groups.E]) return;
    const HiddenRow<F, T> hidden_row(groups, hidden, bias, I, row);
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
  const RowGroups& groups = args.groups;
  const int64_t row = int64_t(blockIdx.x) * kRowsPerBlock + threadIdx.x / kWarp;
  if (row >= groups.num_rows || row >= groups.offsets[groups.E]) return;
  const int64_t I = args.I, width = HiddenRow<F, T>::width(I);
  const Number weight = weight_of(static_cast<const Number*>(args.weights), args.slot_of_row, row);
  const HiddenRow<F, T> hidden_row(groups, args.hidden, args.bias, I, row);
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
    const int64_t e = expert_of_row(groups.offsets, groups.E, row);
    const T* grad_out = static_cast<const T*>(args.grad_out) + row * args.H;
    const T* bias = static_cast<const T*>(args.down_bias) + e * args.H;
    for (int64_t h = lane(); h < args.H; h += kWarp) dot += widen(grad_out[h]) * widen(bias[h]);
  }
  dot = warp_sum(dot);
  const int64_t slot = args.slot_of_row ? args.slot_of_row[row] : row;
  if (lane() == 0) static_cast<Number*>(args.grad_weights)[slot] = dot;
}

}  // namespace

void activate(
    const RowGroups& groups, Activation activation, bool gated, const void* hidden,
    const void* bias, int64_t I, void* activated, cudaStream_t stream) {
  if (groups.num_rows == 0 || I == 0) return;
  dispatch(groups.type, [&](auto element) {
    using T = decltype(element);
    const T* from = static_cast<const T*>(hidden);
    const T* bias_data = static_cast<const T*>(bias);
    T* to = static_cast<T*>(activated);
    dispatch_activation(activation, gated, [&](auto f) {
      dispatch_pack<T>(
          I,
          [&](auto pack) {
            launch(
                activate_kernel<decltype(f), T, pack()>, segment_blocks(groups.num_rows, I, pack()),
                kThreads, 0, stream, groups, from, bias_data, I, to);
          },
          from, bias_data, to);
    });
  });
}

void grad_hidden(const GradHiddenArgs& args, cudaStream_t stream) {
  if (args.groups.num_rows == 0) return;
  dispatch(args.groups.type, [&](auto element) {
    using T = decltype(element);
    const auto data = [](const void* from) { return static_cast<const T*>(from); };
    dispatch_activation(args.activation, args.gated, [&](auto f) {
      dispatch_pack<T>(
          args.I,
          [&](auto pack) {
            launch(
                grad_hidden_kernel<decltype(f), T, pack()>, blocks_for(args.groups.num_rows),
                kThreads, 0, stream, args);
          },
          data(args.hidden), data(args.bias), data(args.grad), data(args.grad_hidden),
          data(args.weighted));
    });
  });
}

}  // namespace moe_ext::cuda::kernels
