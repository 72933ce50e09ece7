#include "cuda/kernels/warp_row.cuh"

namespace moe_ext::cuda::kernels {
namespace {

// Warps of a block, a token each: 4 tokens of 1024 experts, 2 E + K fp32 numbers each, just pass
// 32 KiB of shared memory, so
// that most routers still have several blocks an SM. Fewer where they would not fit.
// (No row: the benchmark's experts are given. Its --profile has the router.)
constexpr int kMostWarps = 4;

// The order of a choice: larger first, NaN last, ties to the lower id; an id of -1 is behind all.
template <class T>
struct Candidate {
  T key;
  int32_t id;

  __device__ bool is_before(const Candidate& other) const {
    if (id < 0 || other.id < 0) return id >= 0 && other.id < 0;
    const bool is_nan = key != key, other_is_nan = other.key != other.key;
    if (is_nan != other_is_nan) return other_is_nan;
    if (!is_nan && key != other.key) return key > other.key;
    return id < other.id;
  }
};

// The first of the candidates after `last` (-1: of all). allowed(id): whether it is one.
template <class T, class Allowed>
__device__ Candidate<T> next_candidate(
    const T* keys, int64_t n, const Candidate<T>& last, const Allowed& allowed) {
  Candidate<T> best{T(0), -1};
  for (int64_t i = lane(); i < n; i += kWarp) {
    const Candidate<T> candidate{keys[i], static_cast<int32_t>(i)};
    if (allowed(i) && (last.id < 0 || last.is_before(candidate)) && candidate.is_before(best)) {
      best = candidate;
    }
  }
  for (int mask = kWarp / 2; mask > 0; mask /= 2) {
    const Candidate<T> other{
        __shfl_xor_sync(kAllLanes, best.key, mask), __shfl_xor_sync(kAllLanes, best.id, mask)};
    if (other.is_before(best)) best = other;
  }
  return best;
}

// What a warp needs: a row of keys, one of the groups' scores, and K numbers.
__host__ __device__ int64_t row_numbers(int64_t E, int64_t K) { return 2 * E + K; }

template <class T>
__device__ T* own_row(int64_t numbers) {
  return reinterpret_cast<T*>(dynamic_shared()) + threadIdx.x / kWarp * numbers;
}

// One warp for each token.
template <class Score, class T>
__global__ void choose_kernel(
    const T* logits, const T* bias, int64_t num_tokens, int64_t E, int64_t K, int64_t num_groups,
    int64_t topk_groups, int64_t* ids) {
  using R = WarpRow<T>;
  const int64_t t = int64_t(blockIdx.x) * (blockDim.x / kWarp) + threadIdx.x / kWarp;
  if (t >= num_tokens) return;
  const T* z = logits + t * E;
  T* scores = own_row<T>(row_numbers(E, K));
  T* groups = scores + E;  // of a group: its score, then whether it is chosen
  const int64_t size = E / num_groups;
  const T* keys = z;
  if (bias || num_groups > 1) {
    Score::template keys<R>(z, E, scores);
    if (bias) R::each(E, [&](auto at) { at.set(scores, at(scores) + at(bias)); });
    keys = scores;
  }
  const bool by_group = topk_groups < num_groups;
  if (by_group) {
    __syncwarp();
    R::each(num_groups, [&](auto at) {
      at.set(groups, group_score<Score::kGroupTop>(scores + at.place * size, size));
    });
    __syncwarp();
    Candidate<T> last{T(0), -1};
    for (int64_t i = 0; i < topk_groups; ++i) {
      last = next_candidate(groups, num_groups, last, [](int64_t) { return true; });
    }
    // Chosen are the groups up to the last one.
    R::once([&] {
      for (int64_t g = 0; g < num_groups; ++g) {
        const Candidate<T> group{groups[g], static_cast<int32_t>(g)};
        groups[g] = last.is_before(group) ? T(0) : T(1);
      }
    });
  }
  Candidate<T> last{T(0), -1};
  for (int64_t k = 0; k < K; ++k) {
    last = next_candidate(
        keys, E, last, [&](int64_t e) { return !by_group || groups[e / size] != T(0); });
    if (lane() == 0) ids[t * K + k] = last.id;
  }
}

template <class Score, class T>
__global__ void weights_kernel(
    const T* logits, const int64_t* ids, int64_t num_tokens, int64_t E, int64_t K, bool renormalize,
    T scale, T* weights, T* probs) {
  using R = WarpRow<T>;
  const int64_t t = int64_t(blockIdx.x) * (blockDim.x / kWarp) + threadIdx.x / kWarp;
  if (t >= num_tokens) return;
  const T* z = logits + t * E;
  const int64_t* chosen = ids + t * K;
  T* w = weights + t * K;
  Score::template probs<R>(z, E, probs + t * E);
  Score::template weights<R>(z, probs + t * E, E, chosen, K, renormalize, scale, w);
  const T top = R::max_or_nan(z, E);
  if (top == top) return;
  R::each(K, [&](auto at) {
    if (is_valid(chosen[at.place], E)) at.set(w, top);
  });
}

template <class Score, class T>
__global__ void weights_backward_kernel(
    const T* logits, const int64_t* ids, const T* grad_weights, const T* grad_probs,
    int64_t num_tokens, int64_t E, int64_t K, bool renormalize, T scale, T* grad_logits) {
  const int64_t t = int64_t(blockIdx.x) * (blockDim.x / kWarp) + threadIdx.x / kWarp;
  if (t >= num_tokens) return;
  Score::template backward<WarpRow<T>>(
      logits + t * E, E, ids + t * K, K, renormalize, scale,
      grad_weights ? grad_weights + t * K : nullptr, grad_probs ? grad_probs + t * E : nullptr,
      grad_logits + t * E, own_row<T>(row_numbers(E, K)));
}

// fn(score, number, warps of a block, bytes of shared memory) in the compute type.
template <class Fn>
void dispatch_router(const RouterArgs& args, const Fn& fn) {
  if (args.T == 0) return;
  const auto run = [&](auto score, auto number) {
    const size_t bytes = row_numbers(args.E, args.K) * sizeof(number);
    int warps = kMostWarps;
    while (warps > 1 && warps * bytes > kSharedBytes) warps /= 2;
    fn(score, number, warps, warps * bytes);
  };
  dispatch_score_function(args.score_function, [&](auto score) {
    if (args.type == Type::kF64) {
      run(score, double{});
    } else {
      run(score, float{});
    }
  });
}

}  // namespace

bool router_fits(Type type, int64_t E, int64_t K) {
  const int64_t numbers = row_numbers(E, K);
  return numbers * (type == Type::kF64 ? 8 : 4) <= static_cast<int64_t>(kSharedBytes);
}

void choose_experts(
    const RouterArgs& args, const void* bias, int64_t num_groups, int64_t topk_groups, int64_t* ids,
    cudaStream_t stream) {
  dispatch_router(args, [&](auto score, auto number, int warps, size_t shared) {
    using T = decltype(number);
    launch(
        choose_kernel<decltype(score), T>, ceil_div(args.T, warps), warps * kWarp, shared, stream,
        static_cast<const T*>(args.logits), static_cast<const T*>(bias), args.T, args.E, args.K,
        num_groups, topk_groups, ids);
  });
}

void router_weights(
    const RouterArgs& args, const int64_t* ids, void* weights, void* probs, cudaStream_t stream) {
  dispatch_router(args, [&](auto score, auto number, int warps, size_t) {
    using T = decltype(number);
    launch(
        weights_kernel<decltype(score), T>, ceil_div(args.T, warps), warps * kWarp, 0, stream,
        static_cast<const T*>(args.logits), ids, args.T, args.E, args.K, args.renormalize,
        static_cast<T>(args.scaling_factor), static_cast<T*>(weights), static_cast<T*>(probs));
  });
}

void router_weights_backward(
    const RouterArgs& args, const int64_t* ids, const void* grad_weights, const void* grad_probs,
    void* grad_logits, cudaStream_t stream) {
  dispatch_router(args, [&](auto score, auto number, int warps, size_t shared) {
    using T = decltype(number);
    launch(
        weights_backward_kernel<decltype(score), T>, ceil_div(args.T, warps), warps * kWarp, shared,
        stream, static_cast<const T*>(args.logits), ids, static_cast<const T*>(grad_weights),
        static_cast<const T*>(grad_probs), args.T, args.E, args.K, args.renormalize,
        static_cast<T>(args.scaling_factor), static_cast<T*>(grad_logits));
  });
}

}  // namespace moe_ext::cuda::kernels
