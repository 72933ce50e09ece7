// The CUDA kernels as the operators call them: pointers, sizes and a stream, no torch, no
// synchronisation. Nothing is launched for empty work. Sums have a fixed order: no atomics on
// floating-point numbers.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "common/activation.h"
#include "common/score_function.h"
#include "common/token_rounding.h"
#include "common/types.h"

namespace moe_ext::cuda::kernels {

enum class IdType { kI32, kI64 };

// Where every slot goes: a stable sort by expert of the slots in `order` (or null: as they come; -1
// in it is no slot). Slots whose id is no expert get row -1.
//   ids [N]   order [N]   row_map [N] or null   expert_offsets [E + 1]   slot_of_row [N]: the
//   inverse of row_map, the skipped slots at its end
// workspace: plan_workspace bytes.
size_t plan_workspace(int64_t N, int64_t E);
void make_plan(
    IdType type, const void* ids, const int32_t* order, int64_t N, int64_t E, int32_t* row_map,
    int32_t* expert_offsets, int32_t* slot_of_row, void* workspace, cudaStream_t stream);

// slot_of_row [N] of row_map [N]; its end, of rows that no slot has, is not touched.
void invert_row_map(const int32_t* row_map, int64_t N, int32_t* slot_of_row, cudaStream_t stream);

// permuted[r] = tokens[slot_of_row[r] / K] for the rows before expert_offsets[E], zeros after.
void gather_rows(
    Type type, const void* tokens, const int32_t* slot_of_row, const int32_t* num_used, int64_t N,
    int64_t K, int64_t H, void* permuted, cudaStream_t stream);

// The slots of token t: t K + k for all k; or order[i] for offsets[t] <= i < offsets[t + 1].
struct TokenSlots {
  int64_t K;
  const int32_t* offsets;  // [T + 1], or null
  const int32_t* order;
};

// A bias [E, H] of rows grouped by expert; without one, data is null.
struct RowBias {
  const void* data;
  int64_t E;
  const int32_t* offsets;  // [E + 1]
};

// out[t] = sum over the token's slots of weights[slot] * (rows[row] + the row's bias) with
// row = row_map[slot], in their order, -1 skipped; weights in the compute type, or null: 1.
void unpermute(
    Type type, const void* rows, const int32_t* row_map, const void* weights, int64_t T,
    const TokenSlots& slots, const RowBias& bias, int64_t H, void* out, cudaStream_t stream);

// For every slot: grad_rows[row] = weight * grad_out[t], grad_weights[slot] = <grad_out[t],
// rows[row]> (0 if skipped). Rows that no slot has are not touched. Either result may be null.
void unpermute_backward(
    Type type, const void* grad_out, const void* rows, const int32_t* row_map, const void* weights,
    int64_t T, int64_t K, int64_t H, void* grad_rows, void* grad_weights, cudaStream_t stream);

// counts[e] = how many of ids [N] are e.
void count_experts(
    IdType type, const void* ids, int64_t N, int64_t E, int64_t* counts, cudaStream_t stream);

// Choosing experts and weighing them: common/score_function.h. type is kF64 or kF32, for the
// logits, the bias, weights and probabilities alike. A token's logits and choices fit into shared
// memory: router_fits.
struct RouterArgs {
  Type type;
  int64_t T, E, K;
  ScoreFunction score_function;
  bool renormalize;
  double scaling_factor;
  const void* logits;  // [T, E]
};
bool router_fits(Type type, int64_t E, int64_t K);

// ids [T, K], best first: larger keys, then lower ids; NaN last. bias [E] is added to the keys, or
// null.
void choose_experts(
    const RouterArgs& args, const void* bias, int64_t num_groups, int64_t topk_groups, int64_t* ids,
    cudaStream_t stream);

// weights [T, K] and probs [T, E] of choices that are given.
void router_weights(
    const RouterArgs& args, const int64_t* ids, void* weights, void* probs, cudaStream_t stream);

// grad_weights [T, K], grad_probs [T, E], one of which may be null, to grad_logits [T, E].
void router_weights_backward(
    const RouterArgs& args, const int64_t* ids, const void* grad_weights, const void* grad_probs,
    void* grad_logits, cudaStream_t stream);

// tokens[s] = how many of sequence s are not masked, T / num_sequences each; token_mask [T] may be
// null: none is.
void count_tokens(
    const bool* token_mask, int64_t T, int64_t num_sequences, unsigned long long* tokens,
    cudaStream_t stream);

// The losses, in the compute type (kF64 or kF32). token_mask [T] may be null: no token is masked.
// workspace: loss_workspace bytes.
struct LossArgs {
  Type type;
  int64_t T, E;
  const bool* token_mask;
  void* workspace;
};
size_t loss_workspace(int64_t num_sequences, int64_t E);

// ops/aux_loss.h: grad_row [S, E] and the loss of probs [T, E] and ids [T, K]. expert_share [E] (in
// double) replaces the counted f, or is null.
void load_balancing_loss(
    const LossArgs& args, const void* probs, IdType id_type, const void* ids, int64_t K,
    bool normalize_by_topk, int64_t num_sequences, const double* expert_share, void* grad_row,
    void* loss, cudaStream_t stream);
// grad_probs[t] = grad_loss * grad_row of t's sequence, zeros for masked tokens.
void load_balancing_loss_backward(
    const LossArgs& args, const void* grad_loss, const void* grad_row, int64_t num_sequences,
    void* grad_probs, cudaStream_t stream);
void router_z_loss(const LossArgs& args, const void* logits, void* loss, cudaStream_t stream);
void router_z_loss_backward(
    const LossArgs& args, const void* grad_loss, const void* logits, void* grad_logits,
    cudaStream_t stream);
void router_entropy(const LossArgs& args, const void* probs, void* entropy, cudaStream_t stream);

// Rows grouped by expert: those of expert e are [offsets[e], offsets[e + 1]), at most num_rows in
// all; rows at or past offsets[E] are neither read nor written unless it is said.
struct RowGroups {
  Type type;
  int64_t num_rows, E;
  const int32_t* offsets;  // [E + 1]
};

// out[r] = rows[r] weights[e]^T.
struct ProductArgs {
  RowGroups groups;
  int64_t N, K;
  const void* rows;  // [num_rows, K], columns dense
  int64_t row_stride;
  const void* weights;  // [E, N, K], n_stride or k_stride 1
  int64_t expert_stride, n_stride, k_stride;
  void* out;  // [num_rows, N]
  bool tf32;  // fp32 may be rounded to TF32 for the tensor cores
};
void grouped_product(const ProductArgs& args, cudaStream_t stream);
// The same for k_stride 1, faster while hardly any expert has more than a few rows.
void grouped_product_of_few_rows(const ProductArgs& args, cudaStream_t stream);

// grad[e] = the sum over e's rows of left[r]^T right[r]; zeros if it has none.
struct GradWeightsArgs {
  RowGroups groups;
  int64_t M, N;
  const void* left;   // [num_rows, M]
  const void* right;  // [num_rows, N]
  void* grad;         // [E, M, N]
  bool tf32;
};
void grouped_grad_weights(const GradWeightsArgs& args, cudaStream_t stream);
// grad[e] [M, N] = zeros for the experts without rows; the others are not touched.
void zero_idle_experts(const RowGroups& groups, int64_t size, void* grad, cudaStream_t stream);

// rows[r] = weights[r] * (rows[r] + bias[e]), zeros at or past offsets[E]. weights [num_rows] in
// the compute type and bias [E, N] may be null.
void weigh_rows(
    const RowGroups& groups, const void* bias, const void* weights, int64_t N, void* rows,
    cudaStream_t stream);
// sum[e] = the sum over e's rows of weight(r) * rows[r], rows [num_rows, N]. weight(r) is
// weights[slot_of_row[r]] in the compute type; slot_of_row may be null: r; weights too: 1.
void sum_rows(
    const RowGroups& groups, const void* rows, const void* weights, const int32_t* slot_of_row,
    int64_t N, void* sum, cudaStream_t stream);

// Pre-activations, hidden [num_rows, 2I] (gate, then up) or [num_rows, I] plus a bias [E, 2I] or
// [E, I] (or null), to activations [num_rows, I].
void activate(
    const RowGroups& groups, Activation activation, bool gated, const void* hidden,
    const void* bias, int64_t I, void* activated, cudaStream_t stream);

// From the gradient of the weighted activations back to the pre-activations.
struct GradHiddenArgs {
  RowGroups groups;
  Activation activation;
  bool gated;
  int64_t I, H;
  const void* hidden;  // and its bias: as for activate
  const void* bias;
  const void* grad;     // [num_rows, I]: <grad_out, column of down_proj>, without the weight
  const void* weights;  // by slot, as for sum_rows
  const int32_t* slot_of_row;
  const void* grad_out;   // [num_rows, H] by row, and down_bias [E, H]: read for grad_weights only,
  const void* down_bias;  // either both or none
  void* grad_hidden;      // like hidden, may be hidden itself, or null
  void* weighted;         // [num_rows, I]: weight * activation; may be grad itself, or null
  void* grad_weights;     // compute type, by slot: <grad_out, unweighted row>; or null
};
void grad_hidden(const GradHiddenArgs& args, cudaStream_t stream);

// Pairs (ops/pairs.h, ops/capacity.h). Keys are in the compute type (kF64 or kF32), larger first,
// NaN as -infinity, ties to the earlier one.
//
// kept_ids [T, K] of ids [T, K]: each expert keeps its capacity's best by weight, or, without
// weights, its earliest with all first choices before all second ones.
struct CapacityArgs {
  int64_t T, K, E;
  const int64_t* ids;
  const double* factor;  // null for round_tokens: no limit but the tokens
  int64_t least;
};
size_t capacity_workspace(Type type, const CapacityArgs& args);
void apply_capacity(
    Type type, const CapacityArgs& args, const void* weights, int64_t* kept_ids, void* workspace,
    cudaStream_t stream);

// `size` entries; tokens of those that are not used are -1. slots may be null.
struct PairList {
  int64_t size;
  const int64_t *tokens, *experts, *slots;
};
struct MutablePairList {
  int64_t size;
  int64_t *tokens, *experts, *slots;
};
struct RoundArgs {
  CapacityArgs capacity;
  int64_t tile_size;
  Rounding rounding;
  const double* noise;  // [E], for kStochastic
};
// workspace: capacity_workspace bytes.
void round_tokens(
    Type type, const RoundArgs& args, const void* probs, const void* weights,
    const MutablePairList& pairs, int64_t* kept_ids, void* workspace, cudaStream_t stream);

size_t expert_choice_workspace();
void expert_choice(
    Type type, const void* probs, const bool* token_mask, int64_t T, int64_t E, int64_t top_k,
    const MutablePairList& pairs, void* workspace, cudaStream_t stream);

// out [P]: ops/pairs.h. Backward writes the gradients of pairs that are used, and may leave out
// either.
void pair_weights(
    Type type, const void* topk_weights, const void* probs, const PairList& pairs, int64_t E,
    double scale, void* out, cudaStream_t stream);
void pair_weights_backward(
    Type type, const void* grad, const PairList& pairs, int64_t E, double scale, void* grad_weights,
    void* grad_probs, cudaStream_t stream);

}  // namespace moe_ext::cuda::kernels
