#include "cpu/expert_ffn.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/mv.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "cpu/combine.h"
#include "cpu/plan.h"

namespace moe_ext::cpu {
namespace {

// kernels

// a [m, I] from h [m, W]; W is 2I (gate, then up) or I.
template <class Act, class T>
void activation_kernel(const T* h, int64_t m, int64_t I, T* a) {
  const int64_t W = Act::kGated ? 2 * I : I;
  for (int64_t r = 0; r < m; ++r) {
    const T* gate = h + r * W;
    const T* up = gate + (W - I);
    for (int64_t i = 0; i < I; ++i) a[r * I + i] = Act::value(gate[i], up[i]);
  }
}

// From h [m, W], g [m, I] (the gradient of the row's unweighted activation) and the rows' weights
// s [m] (or null):  dh [m, W];  sa [m, I] = s a;  ds [m] = <g, a>.
template <class Act, class T>
void activation_backward_kernel(
    const T* h, const T* g, const T* s, int64_t m, int64_t I, T* dh, T* sa, T* ds) {
  const int64_t W = Act::kGated ? 2 * I : I;
  for (int64_t r = 0; r < m; ++r) {
    const T* gate = h + r * W;
    const T* up = gate + (W - I);
    T* dgate = dh + r * W;
    T* dup = dgate + (W - I);
    const T weight = s ? s[r] : T(1);
    T dot = 0;
    for (int64_t i = 0; i < I; ++i) {
      const T a = Act::value(gate[i], up[i]);
      dot += g[r * I + i] * a;
      sa[r * I + i] = weight * a;
      Act::grad(gate[i], up[i], weight * g[r * I + i], dgate + i, dup + i);
    }
    ds[r] = dot;
  }
}

// helpers

at::Tensor apply_activation(const at::Tensor& h, Activation activation, bool gated) {
  const int64_t I = gated ? h.size(1) / 2 : h.size(1);
  const at::Tensor a = at::empty({h.size(0), I}, h.options());
  MOE_DISPATCH_COMPUTE(h.scalar_type(), "activation", [&] {
    dispatch_activation(activation, gated, [&](auto act) {
      activation_kernel<decltype(act)>(
          h.const_data_ptr<scalar_t>(), h.size(0), I, a.mutable_data_ptr<scalar_t>());
    });
  });
  return a;
}

// x [m, H] -> the pre-activation [m, W].
at::Tensor project_up(const at::Tensor& x, const ExpertWeights& experts, int64_t expert) {
  at::Tensor h = at::mm(x, experts.gate_up_proj.select(0, expert).to(x.scalar_type()).t());
  if (experts.gate_up_bias) h.add_(experts.gate_up_bias->select(0, expert));
  return h;
}

}  // namespace

void expert_ffn_forward(
    const at::Tensor& tokens, const RowSource& source, const ExpertWeights& experts,
    Activation activation, bool gated, const at::Tensor& out, const at::Tensor& hidden) {
  const at::ScalarType dtype = compute_dtype(tokens.scalar_type());
  const auto blocks = row_blocks(source.offsets);
  parallel_each(blocks.size(), [&](int64_t i) {
    const RowBlock& block = blocks[i];
    const at::Tensor h =
        project_up(read_block(tokens, source.token, block, dtype), experts, block.expert);
    if (hidden.defined()) write_block(hidden, block, h);
    const at::Tensor a = round_to(apply_activation(h, activation, gated), tokens.scalar_type());
    at::Tensor y = at::mm(a, experts.down_proj.select(0, block.expert).to(dtype).t());
    if (experts.down_bias) y.add_(experts.down_bias->select(0, block.expert));
    if (source.weight.defined()) {
      y.mul_(source.weight.narrow(0, block.begin, block.size()).unsqueeze(1));
    }
    write_block(out, block, y);
  });
}

void expert_ffn_backward(
    const at::Tensor& grad_out, const at::Tensor& tokens, const RowSource& source,
    const at::Tensor& hidden, const ExpertWeights& experts, Activation activation, bool gated,
    const RowGrads& grads) {
  const at::ScalarType dtype = compute_dtype(tokens.scalar_type());
  const auto blocks = row_blocks(source.offsets);
  const int64_t num_rows = source.offsets.back();
  const int64_t width = experts.gate_up_proj.size(1);
  const int64_t I = experts.down_proj.size(2);
  const bool wants_up = grads.gate_up_proj.defined() || grads.gate_up_bias.defined();
  const bool wants_activation_grad = wants_up || grads.rows.defined();

  // Operands of the weights' gradients, kept for the second pass.
  at::Tensor grad_hidden, weighted_activation;
  if (wants_up) grad_hidden = at::empty({num_rows, width}, tokens.options());
  if (grads.down_proj.defined()) weighted_activation = at::empty({num_rows, I}, tokens.options());

  if (wants_activation_grad || grads.down_proj.defined() || grads.weight.defined()) {
    parallel_each(blocks.size(), [&](int64_t i) {
      const RowBlock& block = blocks[i];
      const at::Tensor dy = read_block(grad_out, source.token, block, dtype);
      const at::Tensor g = at::mm(dy, experts.down_proj.select(0, block.expert).to(dtype));
      const at::Tensor h =
          hidden.defined()
              ? read_block(hidden, {}, block, dtype).contiguous()
              : project_up(read_block(tokens, source.token, block, dtype), experts, block.expert);
      const at::Tensor dh = at::empty({block.size(), width}, g.options());
      const at::Tensor sa = at::empty({block.size(), I}, g.options());
      at::Tensor ds = at::empty({block.size()}, g.options());
      MOE_DISPATCH_COMPUTE(dtype, "activation_backward", [&] {
        const scalar_t* weights = data_or_null<scalar_t>(source.weight);
        dispatch_activation(activation, gated, [&](auto act) {
          activation_backward_kernel<decltype(act)>(
              h.const_data_ptr<scalar_t>(), g.const_data_ptr<scalar_t>(),
              weights ? weights + block.begin : nullptr, block.size(), I,
              dh.mutable_data_ptr<scalar_t>(), sa.mutable_data_ptr<scalar_t>(),
              ds.mutable_data_ptr<scalar_t>());
        });
      });
      if (grads.weight.defined()) {
        if (experts.down_bias) {
          ds.add_(at::mv(dy, experts.down_bias->select(0, block.expert).to(dtype)));
        }
        write_block(grads.weight, block, ds);
      }
      if (weighted_activation.defined()) write_block(weighted_activation, block, sa);
      if (grad_hidden.defined()) write_block(grad_hidden, block, dh);
      if (grads.rows.defined()) {
        const at::Tensor w = experts.gate_up_proj.select(0, block.expert).to(dtype);
        write_block(grads.rows, block, at::mm(round_to(dh, tokens.scalar_type()), w));
      }
    });
  }

  // An idle expert's block is empty: its products and sums are zeros.
  const int64_t num_experts = experts.gate_up_proj.size(0);
  parallel_each(2 * num_experts, [&](int64_t i) {
    const int64_t e = i / 2;
    const RowBlock expert{e, source.offsets[e], source.offsets[e + 1]};
    if (i % 2 == 0) {
      if (grads.gate_up_proj.defined()) {
        const at::Tensor dh = read_block(grad_hidden, {}, expert, dtype);
        const at::Tensor x = read_block(tokens, source.token, expert, dtype);
        grads.gate_up_proj.select(0, e).copy_(at::mm(dh.t(), x));
      }
      if (grads.gate_up_bias.defined()) {
        grads.gate_up_bias.select(0, e).copy_(read_block(grad_hidden, {}, expert, dtype).sum(0));
      }
    } else if (grads.down_proj.defined() || grads.down_bias.defined()) {
      const at::Tensor dy = read_block(grad_out, source.token, expert, dtype);
      if (grads.down_proj.defined()) {
        const at::Tensor sa = read_block(weighted_activation, {}, expert, dtype);
        grads.down_proj.select(0, e).copy_(at::mm(dy.t(), sa));
      }
      if (grads.down_bias.defined()) {
        const at::Tensor sum =
            source.weight.defined()
                ? at::mv(dy.t(), source.weight.narrow(0, expert.begin, expert.size()))
                : dy.sum(0);
        grads.down_bias.select(0, e).copy_(sum);
      }
    }
  });
}

namespace {

// operators

std::tuple<at::Tensor, at::Tensor> expert_ffn_forward_op(
    const at::Tensor& rows, const at::Tensor& expert_offsets, const at::Tensor& gate_up_proj,
    const at::Tensor& down_proj, const std::optional<at::Tensor>& gate_up_bias,
    const std::optional<at::Tensor>& down_bias, const std::optional<at::Tensor>& row_weights,
    c10::string_view activation, bool gated, bool save_hidden) {
  const ExpertWeights experts{gate_up_proj, down_proj, gate_up_bias, down_bias};
  const Activation parsed =
      check_expert_ffn(rows, expert_offsets, experts, row_weights, activation, gated);
  const RowSource source{
      read_offsets("expert_ffn", expert_offsets, rows.size(0)),
      {},
      contiguous_in(row_weights, compute_dtype(rows.scalar_type()))};
  const at::Tensor out = at::empty(rows.sizes(), rows.options());
  const at::Tensor hidden =
      save_hidden ? empty_hidden(rows, rows.size(0), gate_up_proj) : at::Tensor();
  expert_ffn_forward(rows, source, experts, parsed, gated, out, hidden);
  zero_tail(out, source.offsets.back());
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
    const std::optional<at::Tensor>& row_map_, const at::Tensor& expert_offsets,
    const std::optional<at::Tensor>& hidden, const at::Tensor& gate_up_proj,
    const at::Tensor& down_proj, const std::optional<at::Tensor>& gate_up_bias,
    const std::optional<at::Tensor>& down_bias, c10::string_view activation, bool gated,
    std::array<bool, 6> output_mask) {
  constexpr const char* op = "_expert_ffn_backward";
  const ExpertWeights experts{gate_up_proj, down_proj, gate_up_bias, down_bias};
  const Activation parsed = check_expert_ffn_backward(
      grad_out, tokens, weights, row_map_, expert_offsets, hidden, experts, activation, gated);
  const at::Tensor row_map = row_map_ ? row_map_->contiguous() : at::Tensor();
  const int64_t num_rows = row_map.defined() ? row_map.numel() : tokens.size(0);
  RowSource source{
      read_offsets(op, expert_offsets, num_rows),
      {},
      contiguous_in(weights, compute_dtype(tokens.scalar_type()))};
  at::Tensor slot_of_row;
  if (row_map.defined()) {
    slot_of_row = invert_row_map(op, row_map, num_rows).narrow(0, 0, source.offsets.back());
    source.token = slot_of_row.div(row_map.size(1), "floor");
    source.weight = source.weight.view(-1).index_select(0, slot_of_row);
  }

  ExpertFfnGrads outputs = empty_expert_ffn_grads(tokens, weights, experts, output_mask);
  auto& [grad_tokens, grad_weights, grad_gate_up, grad_down, grad_gate_up_bias, grad_down_bias] =
      outputs;
  const auto options = tokens.options().dtype(compute_dtype(tokens.scalar_type()));
  RowGrads grads{{}, {}, grad_gate_up, grad_down, grad_gate_up_bias, grad_down_bias};
  if (grad_tokens.defined()) grads.rows = at::empty({num_rows, tokens.size(1)}, options);
  if (grad_weights.defined()) grads.weight = at::zeros({num_rows}, options);
  expert_ffn_backward(
      grad_out, tokens, source, hidden.value_or(at::Tensor()), experts, parsed, gated, grads);

  if (grad_tokens.defined()) {
    if (row_map.defined()) {
      combine(grads.rows, row_map, {}, grad_tokens);
    } else {
      zero_tail(grads.rows, source.offsets.back());
      grad_tokens.copy_(grads.rows);
    }
  }
  if (grad_weights.defined()) {
    if (row_map.defined()) {
      grad_weights.zero_();
      grad_weights.view(-1).index_copy_(
          0, slot_of_row.to(at::kLong),
          grads.weight.narrow(0, 0, source.offsets.back()).to(grad_weights.scalar_type()));
    } else {
      grad_weights.copy_(grads.weight);
    }
  }
  return outputs;
}

}  // namespace

TORCH_LIBRARY_IMPL(moe_ext, CPU, m) {
  m.impl("expert_ffn", expert_ffn);
  m.impl("_expert_ffn_forward", expert_ffn_forward_op);
  m.impl("_expert_ffn_backward", expert_ffn_backward_op);
}

}  // namespace moe_ext::cpu
