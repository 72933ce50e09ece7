#include "cuda/kernels/gemm/epilogue.cuh"
#include "cuda/kernels/gemm/mainloop.cuh"
#include "cuda/kernels/gemm/schedule.cuh"

namespace moe_ext::cuda::kernels {
namespace {

template <class Engine, class Format = Dense<typename Engine::Number>>
using GradLoop = Mainloop<Engine, Format, false, Format, false>;

// One block for each tile of the result. An expert without rows gets zeros.
template <class Engine>
__global__ void __launch_bounds__(kThreads) grad_weights_kernel(
    GradWeightsArgs args, bool left_packed, bool right_packed, bool grad_packed) {
  using T = typename Engine::Number;
  const GradTile tile = find_grad_tile<Engine>(args.M, args.N, blockIdx.x);
  const int64_t e = tile.expert, m = tile.m, n = tile.n;
  const int64_t begin = args.groups.offsets[e], end = args.groups.offsets[e + 1];
  Engine engine;
  GradLoop<Engine>::multiply(
      engine,
      {static_cast<const T*>(args.left) + begin * args.M + m, args.M - m, args.M, left_packed},
      {static_cast<const T*>(args.right) + begin * args.N + n, args.N - n, args.N, right_packed},
      end - begin, dynamic_shared());
  write_tile(
      engine, dynamic_shared(), static_cast<T*>(args.grad) + (e * args.M + m) * args.N + n,
      args.M - m, args.N - n, args.N, grad_packed);
}

}  // namespace

void grouped_grad_weights(const GradWeightsArgs& args, cudaStream_t stream) {
  if (args.M == 0 || args.N == 0) return;
  const int64_t size = size_of(args.groups.type);
  const bool left_packed = is_aligned(args.left, args.M, size);
  const bool right_packed = is_aligned(args.right, args.N, size);
  const bool grad_packed = is_aligned(args.grad, args.N, size);
  dispatch_engine(args.groups.type, args.tf32, [&](auto tag) {
    using Engine = typename decltype(tag)::type;
    launch(
        grad_weights_kernel<Engine>, grad_blocks<Engine>(args.groups.E, args.M, args.N), kThreads,
        GradLoop<Engine>::kBytes, stream, args, left_packed, right_packed, grad_packed);
  });
}

}  // namespace moe_ext::cuda::kernels
