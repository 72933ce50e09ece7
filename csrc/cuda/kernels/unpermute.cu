#include "cuda/kernels/device.cuh"

namespace moe_ext::cuda::kernels {
namespace {

// One warp for each token.
template <class T, int kPack>
__global__ void unpermute_kernel(
    const T* rows, const int32_t* row_map, const Compute<T>* weights, int64_t num_tokens,
    TokenSlots slots, RowBias bias, int64_t H, T* out) {
  using P = Pack<T, kPack>;
  const int64_t t = int64_t(blockIdx.x) * kRowsPerBlock + threadIdx.x / kWarp;
  if (t >= num_tokens) return;
  const int64_t begin = slots.offsets ? slots.offsets[t] : t * slots.K;
  const int64_t end = slots.offsets ? slots.offsets[t + 1] : begin + slots.K;
  for (int64_t h = lane() * kPack; h < H; h += kWarp * kPack) {
    Compute<T> sum[kPack] = {};
    for (int64_t i = begin; i < end; ++i) {
      const int64_t slot = slots.order ? slots.order[i] : i;
      const int64_t row = row_map[slot];
      if (row < 0) continue;
      const Compute<T> weight = weights ? weights[slot] : Compute<T>(1);
      const P pack = *reinterpret_cast<const P*>(rows + row * H + h);
      Compute<T> x[kPack];
      for (int i = 0; i < kPack; ++i) x[i] = widen(pack.values[i]);
      if (bias.data) {
        const int64_t e = expert_of_row(bias.offsets, bias.E, row);
        const P more = *reinterpret_cast<const P*>(static_cast<const T*>(bias.data) + e * H + h);
        for (int i = 0; i < kPack; ++i) x[i] += widen(more.values[i]);
      }
      for (int i = 0; i < kPack; ++i) sum[i] += weight * x[i];
    }
    P pack;
    for (int i = 0; i < kPack; ++i) pack.values[i] = narrow<T>(sum[i]);
    *reinterpret_cast<P*>(out + t * H + h) = pack;
  }
}

// One warp for each slot.
template <class T, int kPack>
__global__ void unpermute_backward_kernel(
    const T* grad_out, const T* rows, const int32_t* row_map, const Compute<T>* weights,
    int64_t num_slots, int64_t K, int64_t H, T* grad_rows, Compute<T>* grad_weights) {
  using P = Pack<T, kPack>;
  const int64_t slot = int64_t(blockIdx.x) * kRowsPerBlock + threadIdx.x / kWarp;
  if (slot >= num_slots) return;
  const int64_t row = row_map[slot];
  const T* grad = grad_out + slot / K * H;
  const Compute<T> weight = weights ? weights[slot] : Compute<T>(1);
  Compute<T> dot = 0;
  if (row >= 0) {
    for (int64_t h = lane() * kPack; h < H; h += kWarp * kPack) {
      const P g = *reinterpret_cast<const P*>(grad + h);
      if (grad_weights) {
        const P x = *reinterpret_cast<const P*>(rows + row * H + h);
        for (int i = 0; i < kPack; ++i) dot += widen(g.values[i]) * widen(x.values[i]);
      }
      if (grad_rows) {
        P pack;
        for (int i = 0; i < kPack; ++i) pack.values[i] = narrow<T>(weight * widen(g.values[i]));
        *reinterpret_cast<P*>(grad_rows + row * H + h) = pack;
      }
    }
  }
  if (!grad_weights) return;
  dot = warp_sum(dot);
  if (lane() == 0) grad_weights[slot] = dot;
}

}  // namespace

void unpermute(
    Type type, const void* rows, const int32_t* row_map, const void* weights, int64_t T_,
    const TokenSlots& slots, const RowBias& bias, int64_t H, void* out, cudaStream_t stream) {
  if (T_ == 0 || H == 0) return;
  dispatch(type, [&](auto element) {
    using T = decltype(element);
    dispatch_pack<T>(
        H,
        [&](auto pack) {
          launch(
              unpermute_kernel<T, pack()>, blocks_for(T_), kThreads, 0, stream,
              static_cast<const T*>(rows), row_map, static_cast<const Compute<T>*>(weights), T_,
              slots, bias, H, static_cast<T*>(out));
        },
        static_cast<const T*>(rows), static_cast<const T*>(bias.data), static_cast<const T*>(out));
  });
}

void unpermute_backward(
    Type type, const void* grad_out, const void* rows, const int32_t* row_map, const void* weights,
    int64_t T_, int64_t K, int64_t H, void* grad_rows, void* grad_weights, cudaStream_t stream) {
  if (T_ * K == 0) return;
  dispatch(type, [&](auto element) {
    using T = decltype(element);
    dispatch_pack<T>(
        H,
        [&](auto pack) {
          launch(
              unpermute_backward_kernel<T, pack()>, blocks_for(T_ * K), kThreads, 0, stream,
              static_cast<const T*>(grad_out), static_cast<const T*>(rows), row_map,
              static_cast<const Compute<T>*>(weights), T_ * K, K, H, static_cast<T*>(grad_rows),
              static_cast<Compute<T>*>(grad_weights));
        },
        static_cast<const T*>(grad_out), static_cast<const T*>(rows),
        static_cast<const T*>(grad_rows));
  });
}

}  // namespace moe_ext::cuda::kernels
