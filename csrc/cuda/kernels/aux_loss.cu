#include "cuda/kernels/warp_row.cuh"

namespace moe_ext::cuda::kernels {
namespace {

// Blocks that add up the tokens, at most: about 4 for each SM, which fill it, and so few that one
// thread may add what they found. (No row; --profile has the losses.)
constexpr int64_t kMostBlocks = 512;

// Sums over tokens: a warp adds those of its tokens, a block its warps', the last kernel
// the blocks', each in order. In double: that costs nothing beside the reads.
struct Partial {
  double sum;
  int64_t tokens;  // unmasked
};

struct LossWorkspace {
  Partial* partials;           // [kMostBlocks]
  unsigned long long* counts;  // [S, E]
  unsigned long long* tokens;  // [S]

  size_t bytes;

  // Without data: only the sizes.
  LossWorkspace(void* data, int64_t S, int64_t E) {
    Arena arena(data);
    partials = arena.take<Partial>(kMostBlocks);
    counts = arena.take<unsigned long long>(S * E);
    tokens = arena.take<unsigned long long>(S);
    bytes = arena.bytes();
  }
};

// partials[block] = the sum of of_token(t), which a warp computes together, over unmasked tokens.
template <class Fn>
__device__ void sum_tokens(
    const bool* mask, int64_t num_tokens, Partial* partials, const Fn& of_token) {
  __shared__ Partial own[kRowsPerBlock];
  const int warp = threadIdx.x / kWarp;
  Partial mine{0, 0};
  for (int64_t t = int64_t(blockIdx.x) * kRowsPerBlock + warp; t < num_tokens;
       t += int64_t(gridDim.x) * kRowsPerBlock) {
    if (mask && !mask[t]) continue;
    mine.sum += of_token(t);
    ++mine.tokens;
  }
  if (lane() == 0) own[warp] = mine;
  __syncthreads();
  if (threadIdx.x != 0) return;
  Partial total{0, 0};
  for (int w = 0; w < kRowsPerBlock; ++w) {
    total.sum += own[w].sum;
    total.tokens += own[w].tokens;
  }
  partials[blockIdx.x] = total;
}

// out = the sum of the partials, or their mean over the tokens; 0 of none.
template <class T>
__global__ void finish_kernel(const Partial* partials, int64_t blocks, bool mean, T* out) {
  Partial total{0, 0};
  for (int64_t b = 0; b < blocks; ++b) {
    total.sum += partials[b].sum;
    total.tokens += partials[b].tokens;
  }
  if (mean && total.tokens > 0) total.sum /= static_cast<double>(total.tokens);
  *out = static_cast<T>(total.tokens > 0 ? total.sum : 0.0);
}

template <class T>
__global__ void dot_kernel(
    const T* probs, const T* grad_row, const bool* mask, int64_t num_tokens, int64_t length,
    int64_t E, Partial* partials) {
  sum_tokens(mask, num_tokens, partials, [&](int64_t t) {
    const T* p = probs + t * E;
    const T* row = grad_row + t / length * E;
    return static_cast<double>(WarpRow<T>::sum(E, [&](auto at) { return at(p) * at(row); }));
  });
}

template <class T>
__device__ T row_log_sum_exp(const T* z, int64_t E, T top) {
  const T sum = WarpRow<T>::sum(E, [&](auto at) { return exp(at(z) - top); });
  return log_sum_exp<WarpRow<T>>(ExpSum<T>{top, sum});
}

template <class T>
__global__ void z_loss_kernel(
    const T* logits, const bool* mask, int64_t num_tokens, int64_t E, Partial* partials) {
  sum_tokens(mask, num_tokens, partials, [&](int64_t t) {
    const T* z = logits + t * E;
    const double lse = row_log_sum_exp(z, E, WarpRow<T>::max_or_nan(z, E));
    return lse * lse;
  });
}

template <class T>
__global__ void entropy_kernel(
    const T* probs, const bool* mask, int64_t num_tokens, int64_t E, Partial* partials) {
  sum_tokens(mask, num_tokens, partials, [&](int64_t t) {
    const T* p = probs + t * E;
    return static_cast<double>(WarpRow<T>::sum(E, [&](auto at) {
      const T x = at(p);
      return x > T(0) ? -x * static_cast<T>(::log(static_cast<double>(x))) : T(0);
    }));
  });
}

__global__ void count_tokens_kernel(
    const bool* mask, int64_t num_tokens, int64_t length, unsigned long long* tokens) {
  const int64_t t = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (t < num_tokens && (!mask || mask[t])) atomicAdd(&tokens[t / length], 1ull);
}

// Integers only, so that the order of the additions does not matter.
template <class Id>
__global__ void count_experts_kernel(
    const Id* ids, int64_t N, int64_t E, unsigned long long* counts) {
  const int64_t slot = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (slot < N && is_valid(ids[slot], E)) atomicAdd(&counts[ids[slot]], 1ull);
}

// The same by sequence, of unmasked tokens.
template <class Id>
__global__ void count_choices_kernel(
    const Id* ids, const bool* mask, int64_t num_tokens, int64_t length, int64_t K, int64_t E,
    unsigned long long* counts) {
  const int64_t slot = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (slot >= num_tokens * K) return;
  const int64_t t = slot / K;
  if ((mask && !mask[t]) || !is_valid(ids[slot], E)) return;
  atomicAdd(&counts[t / length * E + ids[slot]], 1ull);
}

// One thread for each of [S, E].
template <class T>
__global__ void grad_row_kernel(
    const unsigned long long* counts, const unsigned long long* tokens, const double* share,
    int64_t S, int64_t E, int64_t K, bool normalize_by_topk, T* grad_row) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= S * E) return;
  int64_t used = 0;
  for (int64_t s = 0; s < S; ++s) used += tokens[s] > 0;
  const auto num_tokens = static_cast<double>(tokens[i / E]);
  double value = 0;
  if (num_tokens > 0) {
    const double f = share ? share[i % E] * (normalize_by_topk ? 1 : K)
                           : counts[i] / (num_tokens * (normalize_by_topk ? K : 1));
    value = static_cast<double>(E) * f / num_tokens / static_cast<double>(used);
  }
  grad_row[i] = static_cast<T>(value);
}

template <class T>
__global__ void spread_kernel(
    const T* grad_loss, const T* grad_row, const bool* mask, int64_t num_tokens, int64_t length,
    int64_t E, T* grad_probs) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= num_tokens * E) return;
  const int64_t t = i / E;
  grad_probs[i] = !mask || mask[t] ? *grad_loss * grad_row[t / length * E + i % E] : T(0);
}

// d lse^2 / dz = 2 lse softmax(z).
template <class T>
__global__ void z_loss_backward_kernel(
    const T* grad_loss, const T* logits, const bool* mask, const unsigned long long* tokens,
    int64_t num_tokens, int64_t E, T* grad_logits) {
  using R = WarpRow<T>;
  const int64_t t = int64_t(blockIdx.x) * kRowsPerBlock + threadIdx.x / kWarp;
  if (t >= num_tokens) return;
  const T* z = logits + t * E;
  T* dz = grad_logits + t * E;
  if (mask && !mask[t]) return R::each(E, [&](auto at) { at.set(dz, T(0)); });
  const double scale = static_cast<double>(*grad_loss) / static_cast<double>(*tokens);
  const ExpSum<T> row = exp_row<R>(z, E, dz);
  const T factor = static_cast<T>(
      2 * scale * static_cast<double>(log_sum_exp<R>(row)) / static_cast<double>(row.sum));
  R::each(E, [&](auto at) { at.set(dz, at(dz) * factor); });
}

int64_t sum_blocks(int64_t num_tokens) {
  const int64_t blocks = ceil_div(num_tokens, kRowsPerBlock);
  return blocks < kMostBlocks ? blocks : kMostBlocks;
}

// run(blocks) fills the partials; their sum or mean goes to out.
template <class T, class Fn>
void reduce(
    const LossArgs& args, const LossWorkspace& workspace, bool mean, T* out, cudaStream_t stream,
    const Fn& run) {
  const int64_t blocks = sum_blocks(args.T);
  if (blocks > 0) run(blocks);
  launch(
      finish_kernel<T>, 1, 1, 0, stream, static_cast<const Partial*>(workspace.partials), blocks,
      mean, out);
}

}  // namespace

void count_tokens(
    const bool* token_mask, int64_t T, int64_t num_sequences, unsigned long long* tokens,
    cudaStream_t stream) {
  cudaMemsetAsync(tokens, 0, num_sequences * sizeof(*tokens), stream);
  if (T == 0) return;
  launch(
      count_tokens_kernel, ceil_div(T, kThreads), kThreads, 0, stream, token_mask, T,
      T / num_sequences, tokens);
}

size_t loss_workspace(int64_t num_sequences, int64_t E) {
  return LossWorkspace(nullptr, num_sequences, E).bytes;
}

void load_balancing_loss(
    const LossArgs& args, const void* probs, IdType id_type, const void* ids, int64_t K,
    bool normalize_by_topk, int64_t S, const double* expert_share, void* grad_row, void* loss,
    cudaStream_t stream) {
  const LossWorkspace workspace(args.workspace, S, args.E);
  const int64_t length = args.T / S;
  count_tokens(args.token_mask, args.T, S, workspace.tokens, stream);
  cudaMemsetAsync(workspace.counts, 0, S * args.E * sizeof(*workspace.counts), stream);
  if (args.T * K > 0) {
    dispatch_ids(id_type, ids, [&](const auto* typed) {
      launch(
          count_choices_kernel<std::decay_t<decltype(*typed)>>, ceil_div(args.T * K, kThreads),
          kThreads, 0, stream, typed, args.token_mask, args.T, length, K, args.E, workspace.counts);
    });
  }
  dispatch_compute(args.type, [&](auto number) {
    using T = decltype(number);
    launch(
        grad_row_kernel<T>, ceil_div(S * args.E, kThreads), kThreads, 0, stream,
        static_cast<const unsigned long long*>(workspace.counts),
        static_cast<const unsigned long long*>(workspace.tokens), expert_share, S, args.E, K,
        normalize_by_topk, static_cast<T*>(grad_row));
    reduce(args, workspace, false, static_cast<T*>(loss), stream, [&](int64_t blocks) {
      launch(
          dot_kernel<T>, blocks, kThreads, 0, stream, static_cast<const T*>(probs),
          static_cast<const T*>(grad_row), args.token_mask, args.T, length, args.E,
          workspace.partials);
    });
  });
}

void load_balancing_loss_backward(
    const LossArgs& args, const void* grad_loss, const void* grad_row, int64_t num_sequences,
    void* grad_probs, cudaStream_t stream) {
  if (args.T == 0) return;
  dispatch_compute(args.type, [&](auto number) {
    using T = decltype(number);
    launch(
        spread_kernel<T>, ceil_div(args.T * args.E, kThreads), kThreads, 0, stream,
        static_cast<const T*>(grad_loss), static_cast<const T*>(grad_row), args.token_mask, args.T,
        args.T / num_sequences, args.E, static_cast<T*>(grad_probs));
  });
}

void router_z_loss(const LossArgs& args, const void* logits, void* loss, cudaStream_t stream) {
  const LossWorkspace workspace(args.workspace, 1, args.E);
  dispatch_compute(args.type, [&](auto number) {
    using T = decltype(number);
    reduce(args, workspace, true, static_cast<T*>(loss), stream, [&](int64_t blocks) {
      launch(
          z_loss_kernel<T>, blocks, kThreads, 0, stream, static_cast<const T*>(logits),
          args.token_mask, args.T, args.E, workspace.partials);
    });
  });
}

void router_z_loss_backward(
    const LossArgs& args, const void* grad_loss, const void* logits, void* grad_logits,
    cudaStream_t stream) {
  if (args.T == 0) return;
  const LossWorkspace workspace(args.workspace, 1, args.E);
  count_tokens(args.token_mask, args.T, 1, workspace.tokens, stream);
  dispatch_compute(args.type, [&](auto number) {
    using T = decltype(number);
    launch(
        z_loss_backward_kernel<T>, ceil_div(args.T, kRowsPerBlock), kThreads, 0, stream,
        static_cast<const T*>(grad_loss), static_cast<const T*>(logits), args.token_mask,
        static_cast<const unsigned long long*>(workspace.tokens), args.T, args.E,
        static_cast<T*>(grad_logits));
  });
}

void router_entropy(const LossArgs& args, const void* probs, void* entropy, cudaStream_t stream) {
  const LossWorkspace workspace(args.workspace, 1, args.E);
  dispatch_compute(args.type, [&](auto number) {
    using T = decltype(number);
    reduce(args, workspace, true, static_cast<T*>(entropy), stream, [&](int64_t blocks) {
      launch(
          entropy_kernel<T>, blocks, kThreads, 0, stream, static_cast<const T*>(probs),
          args.token_mask, args.T, args.E, workspace.partials);
    });
  });
}

void count_experts(
    IdType type, const void* ids, int64_t N, int64_t E, int64_t* counts, cudaStream_t stream) {
  cudaMemsetAsync(counts, 0, E * sizeof(int64_t), stream);
  if (N == 0) return;
  dispatch_ids(type, ids, [&](const auto* typed) {
    launch(
        count_experts_kernel<std::decay_t<decltype(*typed)>>, ceil_div(N, kThreads), kThreads, 0,
        stream, typed, N, E, reinterpret_cast<unsigned long long*>(counts));
  });
}

}  // namespace moe_ext::cuda::kernels
