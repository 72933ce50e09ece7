// Every operator of the library, on one screen. A leading underscore marks an operator that is
// callable but no part of the public API: backward operators, and the forward operators that also
// return what backward needs. A result that was not asked for (see output_mask) is None.
#include <torch/library.h>

TORCH_LIBRARY(moe_ext, m) {
  const std::vector<at::Tag> tags{at::Tag::pt2_compliant_tag};

  m.def("_router_logits(Tensor tokens, Tensor weight) -> Tensor", tags);
  m.def(
      "_router_logits_backward(Tensor grad_logits, Tensor tokens, Tensor weight, "
      "bool[2] output_mask) -> (Tensor grad_tokens, Tensor grad_weight)",
      tags);

  m.def(
      "topk_router(Tensor router_logits, SymInt top_k, *, str score_function=\"softmax\", "
      "bool renormalize=True, float scaling_factor=1.0, Tensor? expert_bias=None, "
      "int num_groups=1, int topk_groups=1) "
      "-> (Tensor topk_weights, Tensor topk_ids, Tensor router_probs)",
      tags);
  m.def(
      "_router_weights(Tensor router_logits, Tensor topk_ids, *, str score_function, "
      "bool renormalize, float scaling_factor) -> (Tensor topk_weights, Tensor router_probs)",
      tags);
  m.def(
      "_router_weights_backward(Tensor? grad_weights, Tensor? grad_probs, Tensor router_logits, "
      "Tensor topk_ids, *, str score_function, bool renormalize, float scaling_factor) -> Tensor",
      tags);

  m.def(
      "load_balancing_loss(Tensor router_probs, Tensor topk_ids, *, Tensor? token_mask=None, "
      "bool normalize_by_topk=True, SymInt num_sequences=1, Tensor? expert_share=None) -> Tensor",
      tags);
  m.def(
      "_load_balancing_loss_forward(Tensor router_probs, Tensor topk_ids, Tensor? token_mask, "
      "bool normalize_by_topk, SymInt num_sequences, Tensor? expert_share) "
      "-> (Tensor loss, Tensor grad_row)",
      tags);
  m.def(
      "_load_balancing_loss_backward(Tensor grad_loss, Tensor grad_row, Tensor topk_ids, "
      "Tensor? token_mask) -> Tensor",
      tags);
  m.def("router_z_loss(Tensor router_logits, *, Tensor? token_mask=None) -> Tensor", tags);
  m.def(
      "_router_z_loss_backward(Tensor grad_loss, Tensor router_logits, Tensor? token_mask) "
      "-> Tensor",
      tags);
  m.def("_tokens_per_expert(Tensor topk_ids, SymInt num_experts) -> Tensor", tags);
  m.def("_router_entropy(Tensor router_probs, Tensor? token_mask=None) -> Tensor", tags);
  m.def("_add_once(Tensor(a!) total, Tensor value) -> ()", tags);

  m.def(
      "_apply_capacity(Tensor topk_weights, Tensor topk_ids, Tensor capacity_factor, "
      "SymInt num_experts, *, SymInt min_capacity=1, str drop_policy=\"probs\") -> Tensor",
      tags);
  m.def(
      "_round_tokens(Tensor router_probs, Tensor topk_weights, Tensor topk_ids, *, "
      "SymInt tile_size, str rounding=\"nearest\", Tensor? capacity_factor=None, "
      "SymInt min_capacity=1, Tensor? noise=None) "
      "-> (Tensor pair_tokens, Tensor pair_experts, Tensor pair_slots, Tensor kept_ids)",
      tags);
  m.def(
      "_expert_choice(Tensor router_probs, Tensor? token_mask, SymInt top_k) "
      "-> (Tensor pair_tokens, Tensor pair_experts)",
      tags);
  m.def(
      "_pair_weights(Tensor topk_weights, Tensor router_probs, Tensor pair_tokens, "
      "Tensor pair_experts, Tensor? pair_slots, SymInt num_experts, float scaling_factor=1.0) "
      "-> Tensor",
      tags);
  m.def(
      "_pair_weights_backward(Tensor grad, Tensor topk_weights, Tensor pair_tokens, "
      "Tensor pair_experts, Tensor? pair_slots, SymInt num_experts, float scaling_factor, "
      "bool[2] output_mask) -> (Tensor grad_topk_weights, Tensor grad_router_probs)",
      tags);

  m.def(
      "permute(Tensor tokens, Tensor topk_ids, SymInt num_experts) "
      "-> (Tensor permuted_tokens, Tensor row_map, Tensor expert_offsets)",
      tags);
  m.def("_permute_backward(Tensor grad_permuted, Tensor row_map) -> Tensor", tags);
  m.def("unpermute(Tensor rows, Tensor row_map, Tensor? topk_weights=None) -> Tensor", tags);
  m.def(
      "_unpermute_backward(Tensor grad_out, Tensor rows, Tensor row_map, Tensor? topk_weights, "
      "bool[2] output_mask) -> (Tensor grad_rows, Tensor grad_topk_weights)",
      tags);

  m.def(
      "_grouped_linear(Tensor rows, Tensor expert_offsets, Tensor weight, Tensor? bias=None) "
      "-> Tensor",
      tags);
  m.def(
      "_grouped_linear_backward(Tensor grad_out, Tensor rows, Tensor expert_offsets, "
      "Tensor weight, bool[3] output_mask) "
      "-> (Tensor grad_rows, Tensor grad_weight, Tensor grad_bias)",
      tags);

  m.def(
      "expert_ffn(Tensor rows, Tensor expert_offsets, Tensor gate_up_proj, Tensor down_proj, *, "
      "Tensor? gate_up_bias=None, Tensor? down_bias=None, Tensor? row_weights=None, "
      "str activation=\"silu\", bool gated=True, str recompute=\"activation\") -> Tensor",
      tags);
  m.def(
      "_expert_ffn_forward(Tensor rows, Tensor expert_offsets, Tensor gate_up_proj, "
      "Tensor down_proj, Tensor? gate_up_bias, Tensor? down_bias, Tensor? row_weights, "
      "str activation, bool gated, bool save_hidden) -> (Tensor out, Tensor hidden)",
      tags);
  m.def(
      "moe_ffn(Tensor tokens, Tensor topk_weights, Tensor topk_ids, Tensor gate_up_proj, "
      "Tensor down_proj, *, Tensor? gate_up_bias=None, Tensor? down_bias=None, "
      "str activation=\"silu\", bool gated=True, str recompute=\"activation\", "
      "bool fuse_grad_accumulation=False) -> Tensor",
      tags);
  // moe_ffn for tokens with a varying number of experts: a list of pairs.
  m.def(
      "_moe_ffn_pairs(Tensor tokens, Tensor pair_weights, Tensor pair_experts, Tensor pair_tokens, "
      "Tensor gate_up_proj, Tensor down_proj, *, Tensor? gate_up_bias=None, "
      "Tensor? down_bias=None, str activation=\"silu\", bool gated=True, "
      "str recompute=\"activation\", bool fuse_grad_accumulation=False) -> Tensor",
      tags);
  // Of both: weights and ids [T, K], or [P] with pair_tokens [P].
  m.def(
      "_moe_ffn_forward(Tensor tokens, Tensor weights, Tensor ids, Tensor? pair_tokens, "
      "Tensor gate_up_proj, Tensor down_proj, Tensor? gate_up_bias, Tensor? down_bias, "
      "str activation, bool gated, bool save_hidden) "
      "-> (Tensor out, Tensor hidden, Tensor row_map, Tensor expert_offsets)",
      tags);
  // moe_ffn and _moe_ffn_pairs, without backward, on packed weights.
  m.def(
      "_moe_ffn_packed(Tensor tokens, Tensor weights, Tensor ids, Tensor? pair_tokens, "
      "Tensor gate_up_packed, Tensor down_packed, Tensor? gate_up_bias, Tensor? down_bias, "
      "SymInt intermediate_size, str activation, bool gated) -> Tensor",
      tags);
  m.def("_pack_weights(Tensor weight, bool gated) -> Tensor", tags);
  m.def("_unpack_weights(Tensor packed, SymInt N, SymInt K, bool gated) -> Tensor", tags);
  // Backward of all: with row_map of moe_ffn ([T, K], or [P] with pair_tokens [P]; tokens [T, H],
  // weights like row_map), without it of expert_ffn (tokens are the rows [N, H], weights [N] or
  // None).
  m.def(
      "_expert_ffn_backward(Tensor grad_out, Tensor tokens, Tensor? weights, Tensor? row_map, "
      "Tensor? pair_tokens, Tensor expert_offsets, Tensor? hidden, Tensor gate_up_proj, "
      "Tensor down_proj, Tensor? gate_up_bias, Tensor? down_bias, str activation, bool gated, "
      "bool[6] output_mask) -> (Tensor grad_tokens, Tensor grad_weights, "
      "Tensor grad_gate_up_proj, Tensor grad_down_proj, Tensor grad_gate_up_bias, "
      "Tensor grad_down_bias)",
      tags);
  // The same, but the gradients of the projections are added to tensors that are given, rounded
  // once, and are None among the results.
  m.def(
      "_expert_ffn_backward_into(Tensor grad_out, Tensor tokens, Tensor? weights, Tensor? row_map, "
      "Tensor? pair_tokens, Tensor expert_offsets, Tensor? hidden, Tensor gate_up_proj, "
      "Tensor down_proj, Tensor? gate_up_bias, Tensor? down_bias, str activation, bool gated, "
      "bool[6] output_mask, Tensor(a!)? into_gate_up_proj, Tensor(b!)? into_down_proj) "
      "-> (Tensor grad_tokens, Tensor grad_weights, Tensor grad_gate_up_proj, "
      "Tensor grad_down_proj, Tensor grad_gate_up_bias, Tensor grad_down_bias)",
      tags);
}
