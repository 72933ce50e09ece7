#include "cpu/expert_ffn.h"

#include <ATen/ops/empty.h>

#include <algorithm>
#include <cstring>

#include "cpu/grouped_gemm.h"
#include "cpu/huge_pages.h"
#include "cpu/operands.h"
#include "cpu/plan.h"
#include "cpu/register.h"

namespace moe_ext::cpu {
namespace {

// The experts' weights as the kernels read them: a copy only of what has no dense dimension.
struct ExpertOperands {
  at::Tensor gate_up_proj, down_proj, gate_up_bias, down_bias;
  int64_t E, H, I, width;
  bool gated;

  ExpertOperands(const ExpertWeights& experts, bool gated)
      : gate_up_proj(with_dense_weights(experts.gate_up_proj)),
        down_proj(with_dense_weights(experts.down_proj)),
        gate_up_bias(experts.gate_up_bias ? experts.gate_up_bias->contiguous() : at::Tensor()),
        down_bias(experts.down_bias ? experts.down_bias->contiguous() : at::Tensor()),
        E(gate_up_proj.size(0)),
        H(gate_up_proj.size(2)),
        I(down_proj.size(2)),
        width(gate_up_proj.size(1)),
        gated(gated) {}

  // Arguments of the pass from tokens to the pre-activation and, if defined, the activation.
  kernels::UpArgs up_args(
      Activation activation, const kernels::Rows& tokens, const at::Tensor& hidden,
      const at::Tensor& activated) const {
    const int64_t up_at = gated ? I : 0;
    const int64_t element = gate_up_proj.element_size();
    const auto advance = [&](const void* data, int64_t elements) -> const void* {
      return data ? static_cast<const char*>(data) + elements * element : nullptr;
    };
    const kernels::Weights gate = weights_of(gate_up_proj);
    kernels::Weights up = gate;
    up.data = advance(gate.data, up_at * gate.n_stride);
    const kernels::Bias gate_bias = bias_of(gate_up_bias);
    return {
        H,
        I,
        activation,
        gated,
        tokens,
        gate,
        up,
        gate_bias,
        {advance(gate_bias.data, up_at), gate_bias.expert_stride},
        mutable_data_or_null(hidden),
        mutable_data_or_null(activated)};
  }
};

int64_t count_active(const std::vector<int64_t>& offsets) {
  int64_t active = 0;
  for (size_t e = 0; e + 1 < offsets.size(); ++e) active += offsets[e + 1] > offsets[e];
  return active;
}

}  // namespace

ExpertRows moe_rows(
    const char* op, const at::Tensor& row_map, const at::Tensor& pair_tokens,
    const at::Tensor& expert_offsets, const at::Tensor& weights_, at::ScalarType compute) {
  const int64_t* token_of_pair = data_or_null<int64_t>(pair_tokens);
  const int64_t K = pair_tokens.defined() ? 1 : row_map.size(1);
  ExpertRows rows;
  rows.offsets = read_offsets(op, expert_offsets, row_map.numel());
  rows.slot = invert_row_map(op, row_map, row_map.numel());
  rows.slot.resize(rows.size());
  rows.token.resize(rows.size());
  for (int64_t r = 0; r < rows.size(); ++r) {
    TORCH_CHECK_INDEX(
        rows.slot[r] >= 0, op,
        ": row_map must name every row before expert_offsets[E]=", rows.size(),
        ", got none for row ", r);
    const int64_t slot = rows.slot[r];
    rows.token[r] = static_cast<int32_t>(token_of_pair ? token_of_pair[slot] : slot / K);
    TORCH_CHECK_INDEX(
        rows.token[r] >= 0, op, ": pair_tokens must be >= 0 for a pair with a row, got ",
        rows.token[r]);
  }
  for (size_t e = 0; e + 1 < rows.offsets.size(); ++e) {
    TORCH_CHECK_INDEX(
        std::is_sorted(
            rows.token.begin() + rows.offsets[e], rows.token.begin() + rows.offsets[e + 1]),
        op, ": row_map must have the rows of an expert in the order of the tokens, got another ",
        "for expert ", e);
  }
  const at::Tensor weights = contiguous_in(weights_, compute);
  rows.weight = at::empty({rows.size()}, weights.options());
  MOE_DISPATCH_COMPUTE(compute, "moe_rows", [&] {
    const scalar_t* from = weights.const_data_ptr<scalar_t>();
    scalar_t* to = rows.weight.mutable_data_ptr<scalar_t>();
    for (int64_t r = 0; r < rows.size(); ++r) to[r] = from[rows.slot[r]];
  });
  return rows;
}

void expert_ffn_forward(
    const at::Tensor& tokens_, const ExpertRows& rows, const ExpertWeights& experts_,
    Activation activation, bool gated, const at::Tensor& out, const at::Tensor& hidden) {
  const ExpertOperands experts(experts_, gated);
  const at::Tensor tokens = with_dense_rows(tokens_);
  const auto& kernels = kernels_for(tokens.scalar_type());
  const at::Tensor activated = at::empty({rows.size(), experts.I}, tokens.options());
  const kernels::UpArgs up =
      experts.up_args(activation, rows_of(tokens, rows.token_data()), hidden, activated);
  const kernels::CombineArgs down{
      experts.I,
      experts.H,
      rows_of(activated),
      weights_of(experts.down_proj),
      bias_of(experts.down_bias),
      rows.token_data(),
      any_data_or_null(rows.weight),
      out.mutable_data_ptr(),
      1};

  const auto chunks = row_chunks(rows.offsets, kernels.max_chunk_rows);
  const TokenBlocks blocks(
      rows.offsets, rows.token_data(), tokens.size(0), part_pieces(experts.H, down.parts),
      kernels.max_chunk_rows);
  const int64_t scratch = std::max(
      kernels.scratch_bytes(largest_chunk(chunks), experts.H, 1),
      combine_scratch(kernels, blocks, down, tokens.scalar_type() == at::kDouble));
  const int64_t weights = (experts.width + experts.I) * experts.H;
  run_phases(
      {{up_job(kernels, up, chunks)}, {combine_job(kernels, down, blocks)}}, scratch,
      estimate_nanoseconds(
          rows.size() * weights, count_active(rows.offsets) * weights * tokens.element_size()));
}

void expert_ffn_backward(
    const at::Tensor& grad_out_, const at::Tensor& tokens_, const ExpertRows& rows,
    const at::Tensor& hidden_, const ExpertWeights& experts_, Activation activation, bool gated,
    const RowGrads& grads) {
  const ExpertOperands experts(experts_, gated);
  const at::Tensor tokens = with_dense_rows(tokens_);
  const at::Tensor grad_out = with_dense_rows(grad_out_);
  const auto options = tokens.options();
  const auto& kernels = kernels_for(tokens.scalar_type());
  const bool wide = tokens.scalar_type() == at::kDouble;
  const int64_t N = rows.size();
  const auto chunks = row_chunks(rows.offsets, kernels.max_chunk_rows);
  const auto whole_experts = expert_chunks(rows.offsets);
  const int64_t rows_per_expert = N / std::max<int64_t>(count_active(rows.offsets), 1);
  int64_t scratch = kernels.scratch_bytes(largest_chunk(chunks), experts.H, kernels::kMaxParts);

  const bool wants_grad_hidden =
      grads.tokens.defined() || grads.gate_up_proj.defined() || grads.gate_up_bias.defined();
  at::Tensor grad_hidden, weighted, parts;
  if (wants_grad_hidden) grad_hidden = at::empty({N, experts.width}, options);
  if (grads.down_proj.defined()) weighted = at::empty({N, experts.I}, options);
  if (grads.row_weights.defined()) {
    parts = at::empty({piece_cols(experts.I), N}, grads.row_weights.options());
  }
  const bool wants_hidden = wants_grad_hidden || weighted.defined() || parts.defined();

  std::vector<Phase> phases;
  at::Tensor hidden = hidden_.defined() ? hidden_.contiguous() : at::Tensor();
  const bool recompute = wants_hidden && !hidden.defined();
  if (recompute) hidden = at::empty({N, experts.width}, options);
  const kernels::UpArgs up = experts.up_args(
      activation, rows_of(tokens, rows.token_data()), recompute ? hidden : at::Tensor(), {});
  if (recompute) phases.push_back({up_job(kernels, up, chunks)});

  const kernels::Weights back_to_hidden = transposed(weights_of(experts.down_proj));
  const kernels::GradHiddenArgs back{
      experts.H,
      experts.I,
      N,
      activation,
      gated,
      rows_of(grad_out, rows.token_data()),
      back_to_hidden,
      bias_of(experts.down_bias),
      any_data_or_null(hidden),
      any_data_or_null(rows.weight),
      mutable_data_or_null(grad_hidden),
      mutable_data_or_null(weighted),
      mutable_data_or_null(parts),
      count_parts(back_to_hidden, experts.I, tokens.element_size(), rows_per_expert)};
  if (wants_hidden) phases.push_back({grad_hidden_job(kernels, back, chunks)});

  // All that follows depends on the phases above only.
  Phase last;
  const kernels::Weights back_to_tokens = transposed(weights_of(experts.gate_up_proj));
  const kernels::CombineArgs to_tokens{
      experts.width,
      experts.H,
      wants_grad_hidden ? rows_of(grad_hidden) : kernels::Rows{},
      back_to_tokens,
      {nullptr, 0},
      rows.token_data(),
      nullptr,
      mutable_data_or_null(grads.tokens),
      count_parts(back_to_tokens, experts.H, tokens.element_size(), rows_per_expert)};
  const TokenBlocks blocks(
      rows.offsets, rows.token_data(), tokens.size(0), part_pieces(experts.H, to_tokens.parts),
      kernels.max_chunk_rows);
  if (grads.tokens.defined()) {
    last.push_back(combine_job(kernels, to_tokens, blocks));
    scratch = std::max(scratch, combine_scratch(kernels, blocks, to_tokens, wide));
  }
  const int64_t weights = (experts.width + experts.I) * experts.H;
  const bool stream = streams(experts.E * weights * tokens.element_size());
  const kernels::GradWeightsArgs gate_up{
      experts.width,
      experts.H,
      wants_grad_hidden ? rows_of(grad_hidden) : kernels::Rows{},
      rows_of(tokens, rows.token_data()),
      mutable_data_or_null(grads.gate_up_proj),
      stream};
  const kernels::GradWeightsArgs down{
      experts.H,
      experts.I,
      rows_of(grad_out, rows.token_data()),
      weighted.defined() ? rows_of(weighted) : kernels::Rows{},
      mutable_data_or_null(grads.down_proj),
      stream};
  if (grads.gate_up_proj.defined())
    last.push_back(grad_weights_job(kernels, gate_up, whole_experts));
  if (grads.down_proj.defined()) last.push_back(grad_weights_job(kernels, down, whole_experts));
  if (grads.gate_up_proj.defined() || grads.down_proj.defined()) {
    scratch = std::max(scratch, kernels.grad_scratch_bytes(largest_chunk(whole_experts)));
  }
  const kernels::ColumnSumArgs gate_up_bias{
      experts.width, wants_grad_hidden ? rows_of(grad_hidden) : kernels::Rows{}, nullptr,
      mutable_data_or_null(grads.gate_up_bias)};
  const kernels::ColumnSumArgs down_bias{
      experts.H, rows_of(grad_out, rows.token_data()), any_data_or_null(rows.weight),
      mutable_data_or_null(grads.down_bias)};
  if (grads.gate_up_bias.defined())
    last.push_back(column_sum_job(kernels, gate_up_bias, whole_experts));
  if (grads.down_bias.defined()) last.push_back(column_sum_job(kernels, down_bias, whole_experts));
  phases.push_back(last);

  // Writing zeros for an idle expert takes a third of the time of reading weights.
  const int64_t active = count_active(rows.offsets);
  const int64_t busy = active + (experts.E - active) / 3;
  run_phases(
      phases, scratch,
      estimate_nanoseconds(2 * N * weights, busy * weights * tokens.element_size()));

  if (parts.defined()) {
    MOE_DISPATCH_COMPUTE(parts.scalar_type(), "expert_ffn_backward", [&] {
      const scalar_t* part = parts.const_data_ptr<scalar_t>();
      scalar_t* total = grads.row_weights.mutable_data_ptr<scalar_t>();
      std::fill_n(total, N, scalar_t(0));
      for (int64_t col = 0; col < parts.size(0); ++col, part += N) {
        for (int64_t r = 0; r < N; ++r) total[r] += part[r];
      }
    });
  }
}

namespace {

// operators

std::tuple<at::Tensor, at::Tensor> expert_ffn_forward_op(
    const at::Tensor& rows_, const at::Tensor& expert_offsets, const at::Tensor& gate_up_proj,
    const at::Tensor& down_proj, const std::optional<at::Tensor>& gate_up_bias,
    const std::optional<at::Tensor>& down_bias, const std::optional<at::Tensor>& row_weights,
    c10::string_view activation, bool gated, bool save_hidden) {
  const ExpertWeights experts{gate_up_proj, down_proj, gate_up_bias, down_bias};
  const Activation parsed =
      check_expert_ffn(rows_, expert_offsets, experts, row_weights, activation, gated);
  const ExpertRows rows{
      read_offsets("expert_ffn", expert_offsets, rows_.size(0)),
      {},
      {},
      contiguous_in(row_weights, compute_dtype(rows_.scalar_type()))};
  const at::Tensor out = at::empty(rows_.sizes(), rows_.options());
  const at::Tensor hidden = empty_hidden(rows_, rows_.size(0), gate_up_proj, save_hidden);
  expert_ffn_forward(rows_, rows, experts, parsed, gated, out, save_hidden ? hidden : at::Tensor());
  return {out, hidden};
}

at::Tensor expert_ffn(
    const at::Tensor& rows, const at::Tensor& expert_offsets, const at::Tensor& gate_up_proj,
    const at::Tensor& down_proj, const std::optional<at::Tensor>& gate_up_bias,
    const std::optional<at::Tensor>& down_bias, const std::optional<at::Tensor>& row_weights,
    c10::string_view activation, bool gated, c10::string_view recompute) {
  parse_recompute("expert_ffn", recompute);
  return std::get<0>(expert_ffn_forward_op(
      rows, expert_offsets, gate_up_proj, down_proj, gate_up_bias, down_bias, row_weights,
      activation, gated, false));
}

ExpertFfnGrads expert_ffn_backward_op(
    const at::Tensor& grad_out, const at::Tensor& tokens, const std::optional<at::Tensor>& weights,
    const std::optional<at::Tensor>& row_map, const std::optional<at::Tensor>& pair_tokens_,
    const at::Tensor& expert_offsets, const std::optional<at::Tensor>& hidden,
    const at::Tensor& gate_up_proj, const at::Tensor& down_proj,
    const std::optional<at::Tensor>& gate_up_bias, const std::optional<at::Tensor>& down_bias,
    c10::string_view activation, bool gated, std::array<bool, 6> output_mask) {
  constexpr const char* op = "_expert_ffn_backward";
  const ExpertWeights experts{gate_up_proj, down_proj, gate_up_bias, down_bias};
  const Activation parsed = check_expert_ffn_backward(
      grad_out, tokens, weights, row_map, pair_tokens_, expert_offsets, hidden, experts, activation,
      gated);
  const at::ScalarType compute = compute_dtype(tokens.scalar_type());
  const at::Tensor pair_tokens =
      pair_tokens_ ? read_pair_tokens(op, *pair_tokens_, tokens.size(0)) : at::Tensor();
  const ExpertRows rows =
      row_map ? moe_rows(op, *row_map, pair_tokens, expert_offsets, *weights, compute)
              : ExpertRows{
                    read_offsets(op, expert_offsets, tokens.size(0)),
                    {},
                    {},
                    contiguous_in(weights, compute)};

  ExpertFfnGrads outputs = empty_expert_ffn_grads(tokens, weights, experts, output_mask);
  auto& [grad_tokens, grad_weights, grad_gate_up, grad_down, grad_gate_up_bias, grad_down_bias] =
      outputs;
  advise_huge_pages(grad_gate_up);
  advise_huge_pages(grad_down);
  RowGrads grads{grad_tokens, {}, grad_gate_up, grad_down, grad_gate_up_bias, grad_down_bias};
  if (grad_weights.defined()) {
    grads.row_weights = at::empty({rows.size()}, tokens.options().dtype(compute));
  }
  expert_ffn_backward(
      grad_out, tokens, rows, hidden.value_or(at::Tensor()), experts, parsed, gated, grads);

  if (grad_weights.defined()) {
    grad_weights.zero_();
    const at::Tensor by_row = grads.row_weights.to(grad_weights.scalar_type());
    const char* from = static_cast<const char*>(by_row.const_data_ptr());
    char* to = static_cast<char*>(grad_weights.mutable_data_ptr());
    const int64_t bytes = by_row.element_size();
    for (int64_t r = 0; r < rows.size(); ++r) {
      const int64_t slot = rows.slot.empty() ? r : rows.slot[r];
      std::memcpy(to + slot * bytes, from + r * bytes, bytes);
    }
  }
  return outputs;
}

}  // namespace

TORCH_LIBRARY_IMPL(moe_ext, CPU, m) {
  impl<expert_ffn>(m, "expert_ffn");
  impl<expert_ffn_forward_op>(m, "_expert_ffn_forward");
  impl<expert_ffn_backward_op>(m, "_expert_ffn_backward");
}

}  // namespace moe_ext::cpu
