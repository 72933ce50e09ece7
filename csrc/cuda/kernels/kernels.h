// The CUDA kernels as the operators call them: pointers, sizes and a stream, no torch, no
// synchronisation. Nothing is launched for empty work. Sums have a fixed order: no atomics on
// floating-point numbers.
#pragma once

#include <cstddef>
#include <cstdint>

#include "common/score_function.h"
#ifndef MOE_EXT_CUDA_EMULATION
#include <cuda_runtime_api.h>
#endif

namespace moe_ext::cuda {

enum class Type { kF64, kF32, kBf16, kF16 };
enum class IdType { kI32, kI64 };

// Where every slot goes: a stable sort by expert. Slots whose id is no expert get row -1.
//   ids [N]   row_map [N]   expert_offsets [E + 1]   slot_of_row [N]: the inverse of row_map, the
//   skipped slots at its end
// workspace: plan_workspace bytes.
size_t plan_workspace(int64_t N, int64_t E);
void make_plan(
    IdType type, const void* ids, int64_t N, int64_t E, int32_t* row_map, int32_t* expert_offsets,
    int32_t* slot_of_row, void* workspace, cudaStream_t stream);

// permuted[r] = tokens[slot_of_row[r] / K] for the rows before expert_offsets[E], zeros after.
void gather_rows(
    Type type, const void* tokens, const int32_t* slot_of_row, const int32_t* num_used, int64_t N,
    int64_t K, int64_t H, void* permuted, cudaStream_t stream);

// out[t] = sum over k of weights[t, k] * rows[row_map[t, k]], k ascending, -1 skipped; weights in
// the compute type, or null: 1.
void unpermute(
    Type type, const void* rows, const int32_t* row_map, const void* weights, int64_t T, int64_t K,
    int64_t H, void* out, cudaStream_t stream);

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

// ids [T, K], best first, by routing.md's order: larger keys, then lower ids; NaN last. bias [E] is
// added to the keys, or null.
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

}  // namespace moe_ext::cuda
