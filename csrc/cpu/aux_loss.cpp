#include "ops/aux_loss.h"

#include <ATen/Parallel.h>

#include <numeric>
#include <vector>

#include "common/types.h"
#include "cpu/kernels/aux_loss.h"
#include "cpu/operands.h"
#include "cpu/plan.h"
#include "cpu/register.h"

namespace moe_ext::cpu {
namespace {

// Sums over tokens run over blocks of this many, then over the blocks in order: the same bits for
// every number of threads. They are kept in double, which costs nothing beside the reads.
constexpr int64_t kTokensPerBlock = 256;

int64_t num_blocks(int64_t T) { return ceil_div(T, kTokensPerBlock); }

// The sum of fn(begin, end) over the blocks of tokens [first, last).
template <class Fn>
double sum_over_blocks(int64_t first, int64_t last, const Fn& fn) {
  const int64_t blocks = num_blocks(last - first);
  std::vector<double> partial(blocks, 0.0);
  at::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      const int64_t token = first + b * kTokensPerBlock;
      partial[b] = fn(token, std::min(last, token + kTokensPerBlock));
    }
  });
  return std::accumulate(partial.begin(), partial.end(), 0.0);
}

// out [] = sum / num_tokens, 0 without tokens. (Not fill_, which refuses a finite number that
// overflows to infinity in float32; a loss scaler must see that infinity.)
void write_mean(const at::Tensor& out, double sum, int64_t num_tokens) {
  const double mean = num_tokens > 0 ? sum / static_cast<double>(num_tokens) : 0.0;
  MOE_DISPATCH_COMPUTE(out.scalar_type(), "write_mean", [&] {
    *out.mutable_data_ptr<scalar_t>() = static_cast<scalar_t>(mean);
  });
}

std::vector<int64_t> count_experts(
    const char* op, const at::Tensor& topk_ids_, const bool* mask, int64_t begin, int64_t end,
    int64_t E) {
  const at::Tensor topk_ids = topk_ids_.contiguous();
  std::vector<int64_t> counts(E, 0);
  const int64_t K = topk_ids.size(1);
  const auto count = [&](const auto* ids) {
    const int64_t stopped = kernels::count_choices(ids, mask, begin, end, K, E, counts.data());
    if (stopped < end * K) check_id(op, "topk_ids", ids[stopped]);
  };
  if (topk_ids.scalar_type() == at::kLong) {
    count(topk_ids.const_data_ptr<int64_t>());
  } else {
    count(topk_ids.const_data_ptr<int32_t>());
  }
  return counts;
}

// operators

std::tuple<at::Tensor, at::Tensor> load_balancing_loss_forward(
    const at::Tensor& router_probs, const at::Tensor& topk_ids_,
    const std::optional<at::Tensor>& token_mask, bool normalize_by_topk, int64_t num_sequences,
    const std::optional<at::Tensor>& expert_share) {
  check_load_balancing_loss(router_probs, topk_ids_, token_mask, num_sequences, expert_share);
  const int64_t T = router_probs.size(0), E = router_probs.size(1), K = topk_ids_.size(1);
  const int64_t length = T / num_sequences;
  const at::Tensor topk_ids = topk_ids_.contiguous();
  const at::Tensor probs = contiguous_in(router_probs, compute_dtype(router_probs.scalar_type()));
  const at::Tensor share = contiguous_in(expert_share, at::kDouble);
  const at::Tensor mask_tensor = contiguous_in(token_mask, at::kBool);
  const bool* mask = data_or_null<bool>(mask_tensor);
  std::vector<int64_t> unmasked;  // tokens of each sequence
  for (int64_t s = 0; s < num_sequences; ++s) {
    unmasked.push_back(mask ? kernels::count_unmasked(mask + s * length, length) : length);
  }
  const auto used = static_cast<double>(
      std::count_if(unmasked.begin(), unmasked.end(), [](int64_t n) { return n > 0; }));
  auto outputs = empty_load_balancing_loss_outputs(router_probs, num_sequences);
  MOE_DISPATCH_COMPUTE(probs.scalar_type(), "load_balancing_loss", [&] {
    const scalar_t* p = probs.const_data_ptr<scalar_t>();
    scalar_t* grad_row = std::get<1>(outputs).mutable_data_ptr<scalar_t>();
    const auto& router = router_kernels_for(probs.scalar_type());
    double loss = 0;
    for (int64_t s = 0; s < num_sequences; ++s, grad_row += E) {
      const int64_t first = s * length, last = first + length;
      const auto num_tokens = static_cast<double>(unmasked[s]);
      const std::vector<int64_t> counts =
          share.defined() ? std::vector<int64_t>()
                          : count_experts("load_balancing_loss", topk_ids, mask, first, last, E);
      const double choices = num_tokens * (normalize_by_topk ? K : 1);
      const double share_scale = normalize_by_topk ? 1 : K;
      for (int64_t e = 0; e < E; ++e) {
        const double f =
            share.defined() ? share_scale * share.const_data_ptr<double>()[e] : counts[e] / choices;
        grad_row[e] = unmasked[s] > 0
                          ? static_cast<scalar_t>(static_cast<double>(E) * f / num_tokens / used)
                          : scalar_t(0);
      }
      // loss = sum_t <grad_row, probs[t]>
      loss += sum_over_blocks(first, last, [&](int64_t begin, int64_t end) {
        return router.sum_dots(p, grad_row, E, mask, begin, end);
      });
    }
    *std::get<0>(outputs).mutable_data_ptr<scalar_t>() = static_cast<scalar_t>(loss);
  });
  return outputs;
}

at::Tensor load_balancing_loss_backward(
    const at::Tensor& grad_loss, const at::Tensor& grad_row_, const at::Tensor& topk_ids,
    const std::optional<at::Tensor>& token_mask) {
  check_load_balancing_loss_backward(grad_loss, grad_row_, topk_ids, token_mask);
  const at::Tensor grad_row = grad_row_.contiguous();
  const at::Tensor mask_tensor = contiguous_in(token_mask, at::kBool);
  const bool* mask = data_or_null<bool>(mask_tensor);
  const at::Tensor grad_probs = empty_grad_router_probs(grad_row, topk_ids);
  const int64_t E = grad_row.size(1);
  const int64_t length = topk_ids.size(0) / grad_row.size(0);
  MOE_DISPATCH_COMPUTE(grad_row.scalar_type(), "load_balancing_loss_backward", [&] {
    const scalar_t g = *grad_loss.const_data_ptr<scalar_t>();
    const scalar_t* row = grad_row.const_data_ptr<scalar_t>();
    scalar_t* out = grad_probs.mutable_data_ptr<scalar_t>();
    at::parallel_for(0, topk_ids.size(0), kTokensPerBlock, [&](int64_t begin, int64_t end) {
      kernels::spread_grad_row(g, row, mask, length, E, begin, end, out);
    });
  });
  return grad_probs;
}

at::Tensor router_z_loss(
    const at::Tensor& router_logits, const std::optional<at::Tensor>& token_mask) {
  check_router_z_loss(router_logits, token_mask);
  const int64_t T = router_logits.size(0), E = router_logits.size(1);
  const at::Tensor logits =
      contiguous_in(router_logits, compute_dtype(router_logits.scalar_type()));
  const at::Tensor mask_tensor = contiguous_in(token_mask, at::kBool);
  const bool* mask = data_or_null<bool>(mask_tensor);
  const at::Tensor out = empty_mean(router_logits);
  const auto& router = router_kernels_for(logits.scalar_type());
  const void* z = logits.const_data_ptr();
  const double sum = sum_over_blocks(0, T, [&](int64_t begin, int64_t end) {
    std::vector<char> scratch(router.scratch_bytes(E, 0));
    return router.z_loss(z, E, mask, begin, end, scratch.data());
  });
  write_mean(out, sum, kernels::count_unmasked(mask, T));
  return out;
}

at::Tensor router_z_loss_backward(
    const at::Tensor& grad_loss, const at::Tensor& router_logits,
    const std::optional<at::Tensor>& token_mask) {
  check_router_z_loss_backward(grad_loss, router_logits, token_mask);
  const at::ScalarType dtype = compute_dtype(router_logits.scalar_type());
  const at::Tensor logits = contiguous_in(router_logits, dtype);
  const at::Tensor mask_tensor = contiguous_in(token_mask, at::kBool);
  const bool* mask = data_or_null<bool>(mask_tensor);
  const int64_t num_tokens = kernels::count_unmasked(mask, logits.size(0));
  const at::Tensor grad_logits = empty_like_contiguous(logits);
  const auto& router = router_kernels_for(dtype);
  const double scale =
      num_tokens > 0 ? grad_loss.item<double>() / static_cast<double>(num_tokens) : 0.0;
  const void* z = logits.const_data_ptr();
  void* dz = grad_logits.mutable_data_ptr();
  const int64_t E = logits.size(1);
  at::parallel_for(0, logits.size(0), kTokensPerBlock, [&](int64_t begin, int64_t end) {
    router.z_loss_backward(z, E, mask, scale, begin, end, dz);
  });
  return grad_logits.to(router_logits.scalar_type());
}

at::Tensor tokens_per_expert(const at::Tensor& topk_ids, int64_t num_experts) {
  check_tokens_per_expert(topk_ids, num_experts);
  const at::Tensor out = empty_tokens_per_expert(topk_ids, num_experts);
  const std::vector<int64_t> counts =
      count_experts("_tokens_per_expert", topk_ids, nullptr, 0, topk_ids.size(0), num_experts);
  std::copy(counts.begin(), counts.end(), out.mutable_data_ptr<int64_t>());
  return out;
}

at::Tensor router_entropy(
    const at::Tensor& router_probs, const std::optional<at::Tensor>& token_mask) {
  check_router_entropy(router_probs, token_mask);
  const int64_t T = router_probs.size(0), E = router_probs.size(1);
  const at::Tensor probs = contiguous_in(router_probs, compute_dtype(router_probs.scalar_type()));
  const at::Tensor mask_tensor = contiguous_in(token_mask, at::kBool);
  const bool* mask = data_or_null<bool>(mask_tensor);
  const at::Tensor out = empty_mean(router_probs);
  MOE_DISPATCH_COMPUTE(probs.scalar_type(), "router_entropy", [&] {
    const scalar_t* p = probs.const_data_ptr<scalar_t>();
    const double sum = sum_over_blocks(0, T, [&](int64_t begin, int64_t end) {
      return kernels::sum_entropies(p, E, mask, begin, end);
    });
    write_mean(out, sum, kernels::count_unmasked(mask, T));
  });
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(moe_ext, CPU, m) {
  impl<load_balancing_loss_forward>(m, "_load_balancing_loss_forward");
  impl<load_balancing_loss_backward>(m, "_load_balancing_loss_backward");
  impl<router_z_loss>(m, "router_z_loss");
  impl<router_z_loss_backward>(m, "_router_z_loss_backward");
  impl<tokens_per_expert>(m, "_tokens_per_expert");
  impl<router_entropy>(m, "_router_entropy");
}

}  // namespace moe_ext::cpu
