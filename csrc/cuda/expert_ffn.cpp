#include "cuda/expert_ffn.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <array>
#include <utility>

#include "cuda/grouped_gemm.h"
#include "cuda/operands.h"
#include "cuda/unpermute.h"

namespace moe_ext::cuda {
namespace {

// The rows of matrix [T, H] of the routed rows, [N, H]; zeros at or past offsets[E].
at::Tensor gather(const at::Tensor& matrix_, const RoutedRows& routed) {
  const at::Tensor matrix = matrix_.contiguous();
  if (!routed.slot_of_row.defined()) return matrix;
  const at::Tensor rows = at::empty({routed.num_rows, matrix.size(1)}, matrix.options());
  const bool pairs = routed.token_of_row.defined();
  kernels::gather_rows(
      type_of(matrix), matrix.const_data_ptr(),
      (pairs ? routed.token_of_row : routed.slot_of_row).const_data_ptr<int32_t>(),
      routed.expert_offsets.const_data_ptr<int32_t>() + routed.expert_offsets.size(0) - 1,
      routed.num_rows, pairs ? 1 : routed.K, matrix.size(1), rows.mutable_data_ptr(),
      c10::cuda::getCurrentCUDAStream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return rows;
}

// Of tokens [T, H], [N, W].
at::Tensor hidden_of(
    const at::Tensor& tokens, const RoutedRows& routed, const ExpertWeights& experts) {
  return grouped_product(gather(tokens, routed), routed.expert_offsets, experts.gate_up_proj);
}

}  // namespace

RoutedRows routed_rows(const Plan& plan, const std::optional<at::Tensor>& pair_tokens) {
  return {
      plan.expert_offsets, plan.row_map.numel(), plan.slot_of_row,
      pair_tokens ? 1 : plan.row_map.size(1),
      pair_tokens ? token_of_row(*pair_tokens, plan.slot_of_row) : at::Tensor()};
}

std::tuple<at::Tensor, at::Tensor> expert_rows_forward(
    const at::Tensor& tokens, const RoutedRows& routed, const ExpertWeights& experts,
    Activation activation, bool gated, bool save_hidden) {
  at::Tensor hidden = hidden_of(tokens, routed, experts);
  const int64_t I = experts.down_proj.size(2);
  const at::Tensor activated = at::empty({routed.num_rows, I}, tokens.options());
  const at::Tensor bias = contiguous_in(experts.gate_up_bias, tokens.scalar_type());
  kernels::activate(
      row_groups(hidden, routed.expert_offsets), activation, gated, hidden.const_data_ptr(),
      any_data_or_null(bias), I, activated.mutable_data_ptr(), c10::cuda::getCurrentCUDAStream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  if (!save_hidden) hidden = empty_hidden(tokens, 0, experts.gate_up_proj, false);
  return {grouped_product(activated, routed.expert_offsets, experts.down_proj), hidden};
}

namespace {

// operators

std::tuple<at::Tensor, at::Tensor> expert_ffn_forward(
    const at::Tensor& rows, const at::Tensor& expert_offsets, const at::Tensor& gate_up_proj,
    const at::Tensor& down_proj, const std::optional<at::Tensor>& gate_up_bias,
    const std::optional<at::Tensor>& down_bias, const std::optional<at::Tensor>& row_weights,
    c10::string_view activation, bool gated, bool save_hidden) {
  const ExpertWeights experts{gate_up_proj, down_proj, gate_up_bias, down_bias};
  const Activation parsed =
      check_expert_ffn(rows, expert_offsets, experts, row_weights, activation, gated);
  const c10::cuda::CUDAGuard device_guard(rows.device());
  const at::Tensor weights = contiguous_in(row_weights, compute_dtype(rows.scalar_type()));
  const RoutedRows routed{expert_offsets.contiguous(), rows.size(0), {}, 1, {}};
  const auto outputs = expert_rows_forward(rows, routed, experts, parsed, gated, save_hidden);
  weigh_rows(
      std::get<0>(outputs), routed.expert_offsets, contiguous_in(down_bias, rows.scalar_type()),
      weights);
  return outputs;
}

ExpertFfnGrads expert_ffn_backward(
    const at::Tensor& grad_out, const at::Tensor& tokens, const std::optional<at::Tensor>& weights,
    const std::optional<at::Tensor>& row_map, const std::optional<at::Tensor>& pair_tokens,
    const at::Tensor& expert_offsets, const std::optional<at::Tensor>& saved_hidden,
    const at::Tensor& gate_up_proj, const at::Tensor& down_proj,
    const std::optional<at::Tensor>& gate_up_bias, const std::optional<at::Tensor>& down_bias,
    c10::string_view activation, bool gated, std::array<bool, 6> output_mask) {
  constexpr const char* op = "_expert_ffn_backward";
  const ExpertWeights experts{gate_up_proj, down_proj, gate_up_bias, down_bias};
  const Activation parsed = check_expert_ffn_backward(
      grad_out, tokens, weights, row_map, pair_tokens, expert_offsets, saved_hidden, experts,
      activation, gated);
  const c10::cuda::CUDAGuard device_guard(tokens.device());
  const auto
      [wants_tokens, wants_weights, wants_gate_up, wants_down, wants_gate_up_bias,
       wants_down_bias] = output_mask;
  const at::ScalarType compute = compute_dtype(tokens.scalar_type());
  const at::Tensor slot_weights = contiguous_in(weights, compute);
  const at::Tensor offsets = expert_offsets.contiguous();
  const RoutedRows routed = row_map ? routed_rows(read_plan(*row_map, offsets), pair_tokens)
                                    : RoutedRows{offsets, tokens.size(0), {}, 1, {}};

  ExpertFfnGrads outputs;
  auto& [grad_tokens, grad_weights, grad_gate_up, grad_down, grad_gate_up_bias, grad_down_bias] =
      outputs;
  // What is [N, .] is let go as soon as it can be.
  at::Tensor grad_rows = gather(grad_out, routed);
  if (wants_down_bias && down_bias) {
    grad_down_bias = grouped_sum(grad_rows, offsets, slot_weights, routed.slot_of_row);
  }
  at::Tensor grad_hidden_rows;
  const bool wants_slot_weights = wants_weights && weights;
  const bool wants_hidden = wants_tokens || wants_gate_up || (wants_gate_up_bias && gate_up_bias);
  if (wants_hidden || wants_down || wants_slot_weights) {
    at::Tensor hidden =
        saved_hidden ? saved_hidden->contiguous() : hidden_of(tokens, routed, experts);
    // <dO, columns of down_proj>, which the weighted activations then overwrite.
    const at::Tensor grad = grouped_product(grad_rows, offsets, down_proj.transpose(1, 2));
    if (wants_hidden) grad_hidden_rows = saved_hidden ? at::empty_like(hidden) : hidden;
    if (wants_slot_weights) {
      grad_weights = at::zeros(weights->sizes(), tokens.options().dtype(compute));
    }
    const at::Tensor hidden_bias = contiguous_in(gate_up_bias, tokens.scalar_type());
    const at::Tensor bias = contiguous_in(down_bias, tokens.scalar_type());
    kernels::grad_hidden(
        {row_groups(hidden, offsets), parsed, gated, down_proj.size(2), tokens.size(1),
         hidden.const_data_ptr(), any_data_or_null(hidden_bias), grad.const_data_ptr(),
         any_data_or_null(slot_weights), data_or_null<int32_t>(routed.slot_of_row),
         grad_rows.const_data_ptr(), any_data_or_null(bias), mutable_data_or_null(grad_hidden_rows),
         wants_down ? grad.mutable_data_ptr() : nullptr, mutable_data_or_null(grad_weights)},
        c10::cuda::getCurrentCUDAStream());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
    if (wants_down) {
      grad_down = grouped_grad_of_weight(grad_rows, grad, offsets, down_proj);
    }
  }
  grad_rows.reset();
  if (grad_weights.defined()) grad_weights = grad_weights.to(weights->scalar_type());
  if (wants_gate_up) {
    grad_gate_up =
        grouped_grad_of_weight(grad_hidden_rows, gather(tokens, routed), offsets, gate_up_proj);
  }
  if (wants_gate_up_bias && gate_up_bias) {
    grad_gate_up_bias = grouped_sum(grad_hidden_rows, offsets, {}, {});
  }
  if (wants_tokens) {
    grad_tokens = grouped_product(grad_hidden_rows, offsets, gate_up_proj.transpose(1, 2));
    if (row_map) {
      const int64_t T = tokens.size(0);
      grad_tokens = unpermute_rows(
          grad_tokens, *row_map, {}, T,
          pair_tokens ? order_by_token(op, *pair_tokens, T, routed.slot_of_row) : TokenOrder{});
    } else {
      weigh_rows(grad_tokens, offsets, {}, {});
    }
  }
  return outputs;
}

// Added in a pass of its own: the kernels write gradients, they do not read them.
ExpertFfnGrads expert_ffn_backward_into(
    const at::Tensor& grad_out, const at::Tensor& tokens, const std::optional<at::Tensor>& weights,
    const std::optional<at::Tensor>& row_map, const std::optional<at::Tensor>& pair_tokens,
    const at::Tensor& expert_offsets, const std::optional<at::Tensor>& hidden,
    const at::Tensor& gate_up_proj, const at::Tensor& down_proj,
    const std::optional<at::Tensor>& gate_up_bias, const std::optional<at::Tensor>& down_bias,
    c10::string_view activation, bool gated, std::array<bool, 6> output_mask,
    const std::optional<at::Tensor>& into_gate_up, const std::optional<at::Tensor>& into_down) {
  check_grad_target("into_gate_up_proj", into_gate_up, gate_up_proj);
  check_grad_target("into_down_proj", into_down, down_proj);
  output_mask[2] = output_mask[2] || into_gate_up;
  output_mask[3] = output_mask[3] || into_down;
  ExpertFfnGrads grads = expert_ffn_backward(
      grad_out, tokens, weights, row_map, pair_tokens, expert_offsets, hidden, gate_up_proj,
      down_proj, gate_up_bias, down_bias, activation, gated, output_mask);
  const WithoutAutogradAndAutocast plain;
  const c10::cuda::CUDAGuard device_guard(tokens.device());
  const auto add = [](const std::optional<at::Tensor>& into, at::Tensor& grad) {
    if (into) into->add_(std::exchange(grad, at::Tensor()));
  };
  add(into_gate_up, std::get<2>(grads));
  add(into_down, std::get<3>(grads));
  return grads;
}

}  // namespace

TORCH_LIBRARY_IMPL(moe_ext, CUDA, m) {
  m.impl("_expert_ffn_forward", expert_ffn_forward);
  m.impl("_expert_ffn_backward", expert_ffn_backward);
  m.impl("_expert_ffn_backward_into", expert_ffn_backward_into);
}

}  // namespace moe_ext::cuda
