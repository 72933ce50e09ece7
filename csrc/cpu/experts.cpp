#include "cpu/experts.h"

#include <algorithm>

#include "cpu/grouped_gemm.h"
#include "cpu/operands.h"

namespace moe_ext::cpu {
namespace {

// The experts' weights as the kernels read them: a copy only of what has no dense dimension.
struct ExpertOperands {
  at::Tensor gate_up_proj, down_proj, gate_up_bias, down_bias;
  int64_t E, H, I, width;
  bool gated;
  bool packed = false;

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

  ExpertOperands(const PackedExpertWeights& experts, int64_t H, bool gated)
      : gate_up_proj(experts.gate_up.contiguous()),
        down_proj(experts.down.contiguous()),
        gate_up_bias(experts.gate_up_bias ? experts.gate_up_bias->contiguous() : at::Tensor()),
        down_bias(experts.down_bias ? experts.down_bias->contiguous() : at::Tensor()),
        E(gate_up_proj.size(0)),
        H(H),
        I(experts.intermediate_size.expect_int()),
        width(gated ? 2 * I : I),
        gated(gated),
        packed(true) {}

  int64_t weights_per_expert() const { return (width + I) * H; }

  // The kernels for tokens of `dtype`; of packed weights, up and product only.
  const kernels::TypeKernels& kernels(at::ScalarType dtype) const {
    return packed ? packed_kernels_for(dtype) : kernels_for(dtype);
  }
  kernels::Weights down_weights() const {
    return packed ? packed_weights_of(down_proj) : weights_of(down_proj);
  }

  // Arguments of the pass from tokens to the pre-activation and, if defined, the activation.
  kernels::UpArgs up_args(
      Activation activation, const kernels::Rows& tokens, const at::Tensor& hidden,
      const at::Tensor& activated, int64_t rows_per_expert) const {
    const int64_t up_at = gated ? I : 0;
    const int64_t element = gate_up_proj.element_size();
    const auto advance = [&](const void* data, int64_t elements) -> const void* {
      return data ? static_cast<const char*>(data) + elements * element : nullptr;
    };
    const kernels::Weights gate =
        packed ? packed_weights_of(gate_up_proj) : weights_of(gate_up_proj);
    kernels::Weights up = gate;
    if (!packed) up.data = advance(gate.data, up_at * gate.n_stride);
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
        mutable_data_or_null(activated),
        blocks_per_task(gate, width, element, rows_per_expert, kernels::kForwardNBlocks)};
  }
};

int64_t count_active(const std::vector<int64_t>& offsets) {
  int64_t active = 0;
  for (size_t e = 0; e + 1 < offsets.size(); ++e) active += offsets[e + 1] > offsets[e];
  return active;
}

}  // namespace

RoutedRows routed_rows(
    Plan&& plan, const at::Tensor& pair_tokens, const at::Tensor& weights_,
    at::ScalarType compute) {
  const int64_t* token_of_pair = data_or_null<int64_t>(pair_tokens);
  const int64_t K = pair_tokens.defined() ? 1 : plan.row_map.size(1);
  RoutedRows rows;
  rows.offsets = offsets_of(plan.expert_offsets);
  rows.slot = std::move(plan.slot_of_row);
  rows.token.resize(rows.size());
  for (int64_t r = 0; r < rows.size(); ++r) {
    const int64_t slot = rows.slot[r];
    rows.token[r] = static_cast<int32_t>(token_of_pair ? token_of_pair[slot] : slot / K);
  }
  const at::Tensor weights = contiguous_in(weights_, compute);
  rows.weight = empty_result({rows.size()}, weights.options());
  MOE_DISPATCH_COMPUTE(compute, "routed_rows", [&] {
    const scalar_t* from = weights.const_data_ptr<scalar_t>();
    scalar_t* to = rows.weight.mutable_data_ptr<scalar_t>();
    for (int64_t r = 0; r < rows.size(); ++r) to[r] = from[rows.slot[r]];
  });
  return rows;
}

RoutedRows plan_rows(
    const char* op, const at::Tensor& tokens, const at::Tensor& weights, const at::Tensor& ids,
    const std::optional<at::Tensor>& pair_tokens_, int64_t E, at::Tensor* row_map,
    at::Tensor* expert_offsets) {
  const int64_t T = tokens.size(0);
  const at::Tensor pair_tokens =
      pair_tokens_ ? read_pair_tokens(op, *pair_tokens_, T) : at::Tensor();
  Plan plan = pair_tokens_ ? make_pair_plan(op, ids, pair_tokens, T, E) : make_plan(op, ids, E);
  if (row_map) *row_map = plan.row_map;
  if (expert_offsets) *expert_offsets = plan.expert_offsets;
  return routed_rows(std::move(plan), pair_tokens, weights, compute_dtype(tokens.scalar_type()));
}

void check_tokens(const char* op, const RoutedRows& rows) {
  if (rows.token.empty()) return;
  for (const int32_t token : rows.token) {
    TORCH_CHECK_INDEX(
        token >= 0, op, ": pair_tokens must be >= 0 for a pair with a row, got ", token);
  }
  for (size_t e = 0; e + 1 < rows.offsets.size(); ++e) {
    TORCH_CHECK_INDEX(
        std::is_sorted(
            rows.token.begin() + rows.offsets[e], rows.token.begin() + rows.offsets[e + 1]),
        op, ": row_map must have the rows of an expert in the order of the tokens, got another ",
        "for expert ", e);
  }
}

namespace {

void run_experts(
    const at::Tensor& tokens_, const RoutedRows& rows, const ExpertOperands& experts,
    Activation activation, const at::Tensor& out, const at::Tensor& hidden) {
  const at::Tensor tokens = with_dense_rows(tokens_);
  const auto& kernels = experts.kernels(tokens.scalar_type());
  const at::Tensor activated = empty_result({rows.size(), experts.I}, tokens.options());
  const int64_t active = count_active(rows.offsets);
  const int64_t rows_per_expert = rows.size() / std::max<int64_t>(active, 1);
  const kernels::UpArgs up = experts.up_args(
      activation, rows_of(tokens, rows.token_data()), hidden, activated, rows_per_expert);
  const kernels::Weights down_weights = experts.down_weights();
  const kernels::ProductArgs down{
      experts.I,
      experts.H,
      rows_of(activated),
      down_weights,
      bias_of(experts.down_bias),
      rows.token_data(),
      any_data_or_null(rows.weight),
      out.mutable_data_ptr(),
      blocks_per_task(
          down_weights, experts.H, tokens.element_size(), rows_per_expert,
          kernels::kForwardNBlocks)};

  const auto by_expert = whole_experts(rows.offsets);
  const auto row_blocks = split_rows(by_expert, kernels.max_block_rows);
  const TokenBlocks token_blocks(
      by_expert, rows.token_data(), tokens.size(0), column_tasks(experts.H, down.n_blocks),
      kernels.max_block_rows);
  const int64_t scratch = std::max(
      kernels.scratch_bytes(largest_block(row_blocks), experts.H, up.n_blocks),
      product_scratch(kernels, token_blocks, down, tokens.scalar_type() == at::kDouble));
  const int64_t weights = experts.weights_per_expert();
  run_phases(
      {{up_job(kernels, up, row_blocks)}, {product_job(kernels, down, token_blocks)}}, scratch,
      estimate_nanoseconds(rows.size() * weights, active * weights * tokens.element_size()));
}

}  // namespace

void experts_forward(
    const at::Tensor& tokens, const RoutedRows& rows, const ExpertWeights& experts,
    Activation activation, bool gated, const at::Tensor& out, const at::Tensor& hidden) {
  run_experts(tokens, rows, ExpertOperands(experts, gated), activation, out, hidden);
}

void packed_experts_forward(
    const at::Tensor& tokens, const RoutedRows& rows, const PackedExpertWeights& experts,
    Activation activation, bool gated, const at::Tensor& out) {
  run_experts(tokens, rows, ExpertOperands(experts, tokens.size(1), gated), activation, out, {});
}

namespace {

// One backward: its buffers and arguments, to which the jobs refer.
class Backward {
 public:
  Backward(
      const at::Tensor& grad_out, const at::Tensor& tokens, const RoutedRows& rows,
      const at::Tensor& hidden, const ExpertWeights& experts, Activation activation, bool gated,
      const RowGrads& grads)
      : grad_out_(with_dense_rows(grad_out)),
        tokens_(with_dense_rows(tokens)),
        rows_(rows),
        experts_(experts, gated),
        activation_(activation),
        grads_(grads),
        kernels_(kernels_for(tokens.scalar_type())),
        whole_experts_(whole_experts(rows.offsets)),
        row_blocks_(split_rows(whole_experts_, kernels_.max_block_rows)),
        active_(count_active(rows.offsets)),
        rows_per_expert_(rows.size() / std::max<int64_t>(active_, 1)),
        scratch_(
            kernels_.scratch_bytes(largest_block(row_blocks_), experts_.H, kernels::kMaxNBlocks)) {
    make_buffers(hidden);
  }

  void run() {
    std::vector<Phase> phases;
    up_ = experts_.up_args(
        activation_, gathered(tokens_), recomputes_ ? hidden_ : at::Tensor(), {}, rows_per_expert_);
    if (recomputes_) phases.push_back({up_job(kernels_, up_, row_blocks_)});
    if (hidden_.defined()) {
      back_to_hidden_ = grad_hidden_args();
      phases.push_back({grad_hidden_job(kernels_, back_to_hidden_, row_blocks_)});
    }
    // All that follows depends on the phases above only.
    Phase last;
    add_grad_tokens(last);
    add_grad_weights(last);
    add_grad_biases(last);
    phases.push_back(last);

    // Writing zeros for an idle expert takes a third of the time of reading weights.
    const int64_t busy = active_ + (experts_.E - active_) / 3;
    const int64_t weights = experts_.weights_per_expert();
    run_phases(
        phases, scratch_,
        estimate_nanoseconds(2 * rows_.size() * weights, busy * weights * tokens_.element_size()));
    if (weight_sums_.defined()) sum_row_weights();
  }

 private:
  void make_buffers(const at::Tensor& hidden) {
    const int64_t N = rows_.size();
    const auto options = tokens_.options();
    if (grads_.tokens.defined() || grads_.gate_up_proj.defined() || grads_.gate_up_bias.defined()) {
      grad_hidden_ = empty_result({N, experts_.width}, options);
    }
    if (grads_.down_proj.defined()) weighted_ = empty_result({N, experts_.I}, options);
    if (grads_.row_weights.defined()) {
      weight_sums_ = empty_result({column_blocks(experts_.I), N}, grads_.row_weights.options());
    }
    if (!grad_hidden_.defined() && !weighted_.defined() && !weight_sums_.defined()) return;
    recomputes_ = !hidden.defined();
    hidden_ = recomputes_ ? empty_result({N, experts_.width}, options) : hidden.contiguous();
  }

  kernels::Rows gathered(const at::Tensor& tokens) const {
    return rows_of(tokens, rows_.token_data());
  }
  static kernels::Rows dense(const at::Tensor& rows) {
    return rows.defined() ? rows_of(rows) : kernels::Rows{};
  }

  kernels::GradHiddenArgs grad_hidden_args() const {
    const kernels::Weights down = transposed(weights_of(experts_.down_proj));
    return {
        experts_.H,
        experts_.I,
        rows_.size(),
        activation_,
        experts_.gated,
        gathered(grad_out_),
        down,
        bias_of(experts_.down_bias),
        any_data_or_null(hidden_),
        any_data_or_null(rows_.weight),
        mutable_data_or_null(grad_hidden_),
        mutable_data_or_null(weighted_),
        mutable_data_or_null(weight_sums_),
        blocks_per_task(
            down, experts_.I, tokens_.element_size(), rows_per_expert_, kernels::kMaxNBlocks)};
  }

  void add_grad_tokens(Phase& phase) {
    if (!grads_.tokens.defined()) return;
    const kernels::Weights gate_up = transposed(weights_of(experts_.gate_up_proj));
    back_to_tokens_ = {
        experts_.width,
        experts_.H,
        dense(grad_hidden_),
        gate_up,
        {nullptr, 0},
        rows_.token_data(),
        nullptr,
        mutable_data_or_null(grads_.tokens),
        blocks_per_task(
            gate_up, experts_.H, tokens_.element_size(), rows_per_expert_, kernels::kMaxNBlocks)};
    token_blocks_.emplace(
        whole_experts_, rows_.token_data(), tokens_.size(0),
        column_tasks(experts_.H, back_to_tokens_.n_blocks), kernels_.max_block_rows);
    phase.push_back(product_job(kernels_, back_to_tokens_, *token_blocks_));
    const bool wide = tokens_.scalar_type() == at::kDouble;
    scratch_ = std::max(scratch_, product_scratch(kernels_, *token_blocks_, back_to_tokens_, wide));
  }

  void add_grad_weights(Phase& phase) {
    const bool stream =
        streams(experts_.E * experts_.weights_per_expert() * tokens_.element_size());
    if (grads_.gate_up_proj.defined()) {
      gate_up_ =
          grad_weights_args(dense(grad_hidden_), gathered(tokens_), grads_.gate_up_proj, stream);
      set_add(gate_up_, grads_.gate_up_proj, grads_.adds_gate_up);
      phase.push_back(grad_weights_job(kernels_, gate_up_, whole_experts_));
    }
    if (grads_.down_proj.defined()) {
      down_ = grad_weights_args(gathered(grad_out_), dense(weighted_), grads_.down_proj, stream);
      set_add(down_, grads_.down_proj, grads_.adds_down);
      phase.push_back(grad_weights_job(kernels_, down_, whole_experts_));
    }
    if (grads_.gate_up_proj.defined() || grads_.down_proj.defined()) {
      scratch_ = std::max(scratch_, kernels_.grad_scratch_bytes(largest_block(whole_experts_)));
    }
  }

  void set_add(kernels::GradWeightsArgs& args, const at::Tensor& grad, bool add) const {
    args.add = add;
    args.wide = grad.scalar_type() != tokens_.scalar_type();
  }

  void add_grad_biases(Phase& phase) {
    if (grads_.gate_up_bias.defined()) {
      gate_up_bias_ = {
          experts_.width, dense(grad_hidden_), nullptr, mutable_data_or_null(grads_.gate_up_bias)};
      phase.push_back(column_sum_job(kernels_, gate_up_bias_, whole_experts_));
    }
    if (grads_.down_bias.defined()) {
      down_bias_ = {
          experts_.H, gathered(grad_out_), any_data_or_null(rows_.weight),
          mutable_data_or_null(grads_.down_bias)};
      phase.push_back(column_sum_job(kernels_, down_bias_, whole_experts_));
    }
  }

  void sum_row_weights() const {
    const int64_t N = rows_.size();
    MOE_DISPATCH_COMPUTE(weight_sums_.scalar_type(), "sum_row_weights", [&] {
      const scalar_t* sums = weight_sums_.const_data_ptr<scalar_t>();
      scalar_t* total = grads_.row_weights.mutable_data_ptr<scalar_t>();
      std::fill_n(total, N, scalar_t(0));
      for (int64_t col = 0; col < weight_sums_.size(0); ++col, sums += N) {
        for (int64_t r = 0; r < N; ++r) total[r] += sums[r];
      }
    });
  }

  const at::Tensor grad_out_, tokens_;
  const RoutedRows& rows_;
  const ExpertOperands experts_;
  const Activation activation_;
  const RowGrads& grads_;
  const kernels::TypeKernels& kernels_;
  const std::vector<kernels::RowBlock> whole_experts_, row_blocks_;
  const int64_t active_, rows_per_expert_;
  int64_t scratch_;

  at::Tensor hidden_, grad_hidden_, weighted_;
  at::Tensor weight_sums_;  // [blocks of I, N]: of the gradients of the rows' weights
  bool recomputes_ = false;

  kernels::UpArgs up_;
  kernels::GradHiddenArgs back_to_hidden_;
  kernels::ProductArgs back_to_tokens_;
  std::optional<TokenBlocks> token_blocks_;
  kernels::GradWeightsArgs gate_up_, down_;
  kernels::ColumnSumArgs gate_up_bias_, down_bias_;
};

}  // namespace

void experts_backward(
    const at::Tensor& grad_out, const at::Tensor& tokens, const RoutedRows& rows,
    const at::Tensor& hidden, const ExpertWeights& experts, Activation activation, bool gated,
    const RowGrads& grads) {
  Backward(grad_out, tokens, rows, hidden, experts, activation, gated, grads).run();
}

}  // namespace moe_ext::cpu
