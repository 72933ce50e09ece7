#include "cuda/kernels/device.cuh"

namespace moe_ext::cuda::kernels {
namespace {

// One warp for each row. Columns go by packs of kPack.
template <class T, int kPack>
__global__ void gather_rows_kernel(
    const T* tokens, const int32_t* slot_of_row, const int32_t* num_used, int64_t N, int64_t K,
    int64_t H, T* permuted) {
  using P = Pack<T, kPack>;
  const int64_t row = int64_t(blockIdx.x) * kRowsPerBlock + threadIdx.x / kWarp;
  if (row >= N) return;
  const bool is_used = row < *num_used;
  const T* from = is_used ? tokens + slot_of_row[row] / K * H : nullptr;
  T* to = permuted + row * H;
  for (int64_t h = lane() * kPack; h < H; h += kWarp * kPack) {
    P pack = {};
    if (is_used) pack = *reinterpret_cast<const P*>(from + h);
    *reinterpret_cast<P*>(to + h) = pack;
  }
}

}  // namespace

void gather_rows(
    Type type, const void* tokens, const int32_t* slot_of_row, const int32_t* num_used, int64_t N,
    int64_t K, int64_t H, void* permuted, cudaStream_t stream) {
  if (N == 0 || H == 0) return;
  dispatch(type, [&](auto element) {
    using T = decltype(element);
    dispatch_pack<T>(
        H,
        [&](auto pack) {
          launch(
              gather_rows_kernel<T, pack()>, blocks_for(N), kThreads, 0, stream,
              static_cast<const T*>(tokens), slot_of_row, num_used, N, K, H,
              static_cast<T*>(permuted));
        },
        static_cast<const T*>(tokens), static_cast<const T*>(permuted));
  });
}

}  // namespace moe_ext::cuda::kernels
