// A block of kThreads makes a tile of C = A B^T, A [m, k] and B [n, k], in blocks along k: loaders
// bring them to shared memory, and an engine multiplies them. An engine has
//   Number, Sum                  what it multiplies, and what it adds up in
//   kTileM, kTileN, kBlockK      the tile, and the block along k
//   kWantsKOuter                 operands are to lie as [k][m] and [k][n], whichever is dense
//   multiply<...>(a, b)          adds a block's products to its sums
//   kVectorN, each_vector(...)   hands out its sums, kVectorN at a time
//   kScratchBytes                shared memory that each_vector needs
#pragma once

#include "cuda/kernels/gemm/fma.cuh"
#include "cuda/kernels/gemm/mma.cuh"

namespace moe_ext::cuda::kernels {

template <class Engine, class FormatA, bool kAKDense, class FormatB, bool kBKDense>
struct Mainloop {
  static_assert(kStages == 2, "one is multiplied, one is written");
  using Number = typename Engine::Number;
  using LoaderA = Loader<FormatA, Engine::kTileM, Engine::kBlockK, kAKDense, Engine::kWantsKOuter>;
  using LoaderB = Loader<FormatB, Engine::kTileN, Engine::kBlockK, kBKDense, Engine::kWantsKOuter>;

  static constexpr size_t kOperandBytes =
      kStages * (LoaderA::kElements + LoaderB::kElements) * sizeof(Number);
  // What `multiply` needs, and the engine's scratch after it.
  static constexpr size_t kBytes =
      kOperandBytes > Engine::kScratchBytes ? kOperandBytes : Engine::kScratchBytes;
  static_assert(kBytes <= kSharedBytes, "a block gets more only where it is asked for");

  // The engine's sums += A B^T, k below K. While a block is multiplied the next one is on its way.
  static __device__ void multiply(
      Engine& engine, const Operand<FormatA>& a, const Operand<FormatB>& b, int64_t K,
      char* shared) {
    Number* blocks_a = reinterpret_cast<Number*>(shared);
    Number* blocks_b = blocks_a + kStages * LoaderA::kElements;
    LoaderA next_a;
    LoaderB next_b;
    next_a.load(a, 0, K);
    next_b.load(b, 0, K);
    for (int64_t k = 0, stage = 0; k < K; k += Engine::kBlockK, stage ^= 1) {
      Number* block_a = blocks_a + stage * LoaderA::kElements;
      Number* block_b = blocks_b + stage * LoaderB::kElements;
      next_a.store(block_a);
      next_b.store(block_b);
      __syncthreads();
      if (k + Engine::kBlockK < K) {
        next_a.load(a, k + Engine::kBlockK, K);
        next_b.load(b, k + Engine::kBlockK, K);
      }
      engine.template multiply<kAKDense, kBKDense>(block_a, block_b);
    }
    __syncthreads();  // the scratch lies where the operands do
  }
};

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
      if (tf32) return fn(Tag<MmaEngine<float, wmma::precision::tf32>>{});
      return fn(Tag<FmaEngine<float>>{});
    case Type::kBf16:
      return fn(Tag<MmaEngine<BFloat16, BFloat16>>{});
    case Type::kF16:
      return fn(Tag<MmaEngine<Half, Half>>{});
  }
}

}  // namespace moe_ext::cuda::kernels
