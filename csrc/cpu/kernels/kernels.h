// The CPU kernels: one table of functions for each instruction set, without torch.
//
// Work is cut into tasks that depend on shapes and routing alone, each writing places of its own,
// so the bits of a result depend neither on the number of threads nor on who runs which task. Nor
// do those of a row depend on how its expert's rows are cut: RowBlock. Letters as everywhere: T
// tokens, H hidden, I intermediate, E experts, N routed rows.
#pragma once

#include <cstdint>

#include "common/activation.h"
#include "common/score_function.h"
#include "common/types.h"
#include "cpu/kernels/tuning.h"

namespace moe_ext::cpu::kernels {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

// Rows of a matrix, gathered: row r begins at data + (index ? index[r] : r) * stride elements and
// is contiguous.
struct Rows {
  const void* data;
  int64_t stride;
  const int32_t* index;
};

// One weight matrix per expert: element (n, k), output and input, of expert e lies at
// data + e * expert_stride + n * n_stride + k * k_stride. One of n_stride, k_stride is 1.
// Packed ones (gemm/formats/packed.h): n_stride is the elements of a block, k_stride unused.
struct Weights {
  const void* data;
  int64_t expert_stride;
  int64_t n_stride;
  int64_t k_stride;
};

// A vector per expert, contiguous; data may be null: zeros.
struct Bias {
  const void* data;
  int64_t expert_stride;
};

// Rows [begin, end) belong to the expert, which has `expert_rows` of them in all. These choose the
// order of a product's sums, so that a row has the same bits in a block of any size; kManyRows: the
// order of many rows, whatever their number.
constexpr int64_t kManyRows = INT64_MAX;
struct RowBlock {
  int64_t expert;
  int64_t begin;
  int64_t end;
  int64_t expert_rows;
};

// Pre-activations and activations of routed rows.
struct UpArgs {
  int64_t H, I;
  Activation activation;
  bool gated;
  Rows tokens;       // indexed by row
  Weights gate, up;  // [I, H]; up is not read if not gated
  Bias gate_bias, up_bias;
  void* hidden;      // [N, 2I] gate, then up, or [N, I]; may be null
  void* activated;   // [N, I]; may be null
  int64_t n_blocks;  // as in ProductArgs
};

// out[t] = sum over the rows r with token(r) == t of weight(r) * (rows[r] weights^T + bias).
struct ProductArgs {
  int64_t K, N;  // columns of rows and of out
  Rows rows;
  Weights weights;         // [N, K]
  Bias bias;               // [N]
  const int32_t* token;    // of a row, or null: the row itself
  const void* row_weight;  // compute type, or null: 1
  void* out;               // [T, N]
  int64_t n_blocks;  // side by side in one task: 1, or at most kMaxNBlocks where rows of weights^T
                     // are so far apart that reading few columns of each wastes memory's time
};

// Tokens [begin, end), whose rows are the blocks [first_block, last_block) of a list.
struct TokenBlock {
  int64_t begin, end;
  int64_t first_block, last_block;
};

// From the gradient of the experts' results back to the pre-activation.
struct GradHiddenArgs {
  int64_t H, I, num_rows;
  Activation activation;
  bool gated;
  Rows grad_out;           // indexed by row
  Weights down;            // n over I, k over H
  Bias down_bias;          // [H]; read for grad_weight only
  const void* hidden;      // [N, 2I] or [N, I]
  const void* row_weight;  // compute type, or null: 1
  void* grad_hidden;       // like hidden; may be null
  void* weighted;          // [N, I]: weight * activation; may be null
  // [ceil(I / kBlockN), num_rows] compute type: <grad_out, unweighted row>, a sum for each block of
  // columns; may be null.
  void* grad_weight_sums;
  int64_t n_blocks;  // as in ProductArgs
};

// grad[e, m, n] = sum over the rows r of expert e of left[r, m] * right[r, n].
struct GradWeightsArgs {
  int64_t M, N;
  Rows left, right;
  void* grad;  // element (m, n) of expert e at e * expert_stride + m * row_stride + n
  int64_t expert_stride, row_stride;
  bool stream;  // write past the caches: grad is larger than they are
  // Add to grad, which may be of the compute type instead of the tokens' (`wide`), and leave it
  // alone where the expert has no rows; never past the caches.
  bool add = false, wide = false;
};

// sum[e, m] = sum over the rows r of expert e of weight(r) * rows[r, m].
struct ColumnSumArgs {
  int64_t M;
  Rows rows;
  const void* row_weight;  // compute type, or null: 1
  void* sum;               // [E, M]
};

// out[t] = sum over k of weights[t, k] * rows[row_map[t, k]], k ascending; -1 is skipped.
struct UnpermuteArgs {
  int64_t K, H;
  const void* rows;        // [N, H]
  const int32_t* row_map;  // [T, K]
  const void* weights;     // [T, K] compute type, or null: 1
  void* out;               // [T, H]
};

// Of slot s = slot_of_row[r], token t = s / K: grad_rows[r] = weights[s] * grad_out[t] and
// grad_weights[s] = <grad_out[t], rows[r]>. A row without a slot (-1) gets zeros.
struct UnpermuteGradArgs {
  int64_t K, H;
  const void* grad_out;        // [T, H]
  const void* rows;            // [N, H]; read for grad_weights only
  const int32_t* slot_of_row;  // [N]
  const void* weights;         // [T, K] compute type, or null: 1
  void* grad_rows;             // [N, H]; may be null
  void* grad_weights;          // [T, K] compute type; may be null
};

// The functions for one storage type. `col` counts blocks of kBlockN output columns; `next` says
// that the caller will run the next col after this one: its weights are fetched ahead.
struct TypeKernels {
  int64_t max_block_rows;  // of a RowBlock
  // Bytes of scratch that n_blocks blocks of at most `rows` rows need, for products over at most
  // `k` terms; product also needs kBlockN compute numbers per block of columns for every token of
  // its block and one more.
  int64_t (*scratch_bytes)(int64_t rows, int64_t k, int64_t n_blocks);
  int64_t (*grad_scratch_bytes)(int64_t rows);
  void (*up)(const UpArgs&, const RowBlock&, int64_t col, bool next, void* scratch);
  void (*product)(
      const ProductArgs&, const RowBlock* blocks, const TokenBlock&, int64_t col, bool next,
      void* scratch);
  void (*grad_hidden)(
      const GradHiddenArgs&, const RowBlock&, int64_t col, bool next, void* scratch);
  void (*grad_weights)(
      const GradWeightsArgs&, const RowBlock&, int64_t m_block, int64_t n_block, void* scratch);
  void (*column_sum)(const ColumnSumArgs&, const RowBlock&, int64_t col);
  void (*unpermute)(const UnpermuteArgs&, int64_t first_token, int64_t last_token);
  void (*unpermute_backward)(const UnpermuteGradArgs&, int64_t first_row, int64_t last_row);
};

// How experts are chosen and weighed: common/score_function.h. Everything is of one compute type.
struct RouterArgs {
  int64_t E, K;
  ScoreFunction score_function;
  bool renormalize;
  double scaling_factor;
  const void* logits;  // [T, E]
};
struct ChoiceArgs {
  const void* bias;  // [E] added to the keys, or null
  int64_t num_groups, topk_groups;
};

// The functions for one compute type, on the tokens [begin, end); token_mask [T] may be null.
struct RouterKernels {
  int64_t (*scratch_bytes)(int64_t E, int64_t K);
  // ids [T, K], best first: larger keys, then lower ids; NaN last.
  void (*choose)(
      const RouterArgs&, const ChoiceArgs&, int64_t begin, int64_t end, int64_t* ids,
      void* scratch);
  void (*weights)(
      const RouterArgs&, const int64_t* ids, int64_t begin, int64_t end, void* weights,
      void* probs);
  // grad_weights [T, K], grad_probs [T, E], one of which may be null, to grad_logits [T, E].
  void (*backward)(
      const RouterArgs&, const int64_t* ids, const void* grad_weights, const void* grad_probs,
      int64_t begin, int64_t end, void* grad_logits, void* scratch);
  // The sum over the unmasked tokens of <row, rows[t]>, row [E].
  double (*sum_dots)(
      const void* rows, const void* row, int64_t E, const bool* token_mask, int64_t begin,
      int64_t end);
  // The sum over the unmasked tokens of log(sum_e exp(logits[t, e]))^2, and scale times its
  // gradient; zeros for masked tokens.
  double (*z_loss)(
      const void* logits, int64_t E, const bool* token_mask, int64_t begin, int64_t end,
      void* scratch);
  void (*z_loss_backward)(
      const void* logits, int64_t E, const bool* token_mask, double scale, int64_t begin,
      int64_t end, void* grad_logits);
};

struct Kernels {
  const char* isa;
  TypeKernels type[4];      // by Type
  TypeKernels packed[4];    // by Type, of packed weights: up and product only
  RouterKernels router[2];  // kF64, kF32
};

// The table in use: of the best instruction set that this machine, its operating system and the
// cap allow.
const Kernels& current();

// Caps the instruction set (generic, avx2, avx512, avx512_bf16). False, and nothing changes, if
// the name is unknown or the machine has no such instructions.
bool set_isa(const char* name);

extern const Kernels kGenericKernels;
#if defined(__x86_64__)
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;
extern const Kernels kAvx512Bf16Kernels;
#endif

}  // namespace moe_ext::cpu::kernels
