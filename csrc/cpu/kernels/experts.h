// The passes of an expert layer, forward and backward, of one instruction set.
#pragma once

#include "cpu/kernels/gemm/formats/dense.h"
#include "cpu/kernels/gemm/formats/packed.h"
#include "cpu/kernels/gemm/grad_weights.h"
#include "cpu/kernels/gemm/product.h"
#include "cpu/kernels/simd/math.h"

namespace moe_ext::cpu::kernels {
namespace {

// S: what tokens are stored as; W: the format of the weights.
template <class S, class W = Dense<S>>
struct Experts {
  using P = Product<Dense<S>, W>;
  using Columns = typename W::Columns;
  using C = typename P::C;
  using V = typename P::V;
  static constexpr int64_t kLanes = P::kLanes;
  static constexpr int64_t kBlockM = P::kBlockM;

  static const S* row_of(const Rows& rows, int64_t r) {
    return static_cast<const S*>(rows.data) + (rows.index ? rows.index[r] : r) * rows.stride;
  }
  static const S* of_expert(const Bias& bias, int64_t expert) {
    return bias.data ? static_cast<const S*>(bias.data) + expert * bias.expert_stride : nullptr;
  }

  // bias[0, count) as `width` compute numbers; zeros where there is none.
  static void read_bias(const S* bias, int64_t count, int64_t width, C* out) {
    for (int64_t i = 0; i < width; i += kLanes) {
      store(out + i, bias ? load<V>(bias + i, count - i) : V(0.0));
    }
  }

  // Epilogues write and read a few lines of rows that lie far apart: fetched so many rows before
  // they are due, time for a line to come from memory.
  static constexpr int64_t kRowsAhead = 8;
  template <bool kWrite>
  static MOE_INLINE void fetch_lines(const S* p, int64_t count) {
    for (int64_t byte = 0; byte < count * static_cast<int64_t>(sizeof(S)); byte += 64) {
      __builtin_prefetch(reinterpret_cast<const char*>(p) + byte, kWrite);
    }
  }

  // The columns of up's block `col`: of gate and up, or neighbours.
  static Columns up_columns(const UpArgs& args, int64_t expert, int64_t col) {
    if (!args.gated) return W::columns(args.gate, expert, col * kBlockN, args.I);
    return W::pair_columns(args.gate, args.up, expert, col * kSplitN, args.I);
  }

  static void up(const UpArgs& args, const RowBlock& block, int64_t col, bool next, void* scratch) {
    const int64_t rows = block.end - block.begin;
    const S* row[kBlockM];
    for (int64_t r = 0; r < rows; ++r) row[r] = row_of(args.tokens, block.begin + r);
    // A block has so many columns of gate, and as many of up.
    const int64_t width = args.gated ? kSplitN : kBlockN;
    const int64_t first_block = col * args.n_blocks;
    const int64_t n_blocks = smaller(args.n_blocks, ceil_div(args.I, width) - first_block);
    const S* gate_bias = of_expert(args.gate_bias, block.expert);
    const S* up_bias = of_expert(args.up_bias, block.expert);
    Columns w[kMaxNBlocks], after[kMaxNBlocks];
    alignas(64) C bias[kMaxNBlocks * kBlockN];
    for (int64_t b = 0; b < n_blocks; ++b) {
      const int64_t n = (first_block + b) * width, count = smaller(args.I - n, width);
      w[b] = up_columns(args, block.expert, first_block + b);
      after[b] = up_columns(args, block.expert, first_block + n_blocks + b);
      read_bias(gate_bias ? gate_bias + n : nullptr, count, width, bias + b * kBlockN);
      if (args.gated) {
        read_bias(up_bias ? up_bias + n : nullptr, count, width, bias + b * kBlockN + kSplitN);
      }
    }
    const auto epilogue = [&](const C* c, int64_t first, int64_t tile_rows, int64_t n_block) {
      const int64_t n = (first_block + n_block) * width;
      write_up(
          args, block.begin + first, tile_rows, n, smaller(args.I - n, width),
          bias + n_block * kBlockN, c);
    };
    P::run(
        row, rows, block.expert_rows, args.H, w, n_blocks, next ? after : nullptr, scratch,
        Epilogue<C>(epilogue));
  }

  // Bias, the pre-activation and the activation of some rows of a block: columns [n, n + count),
  // in c at 0 and, if gated, at kSplitN.
  static void write_up(
      const UpArgs& args, int64_t begin, int64_t rows, int64_t n, int64_t count, const C* bias,
      const C* c) {
    const int64_t width = args.gated ? 2 * args.I : args.I;
    const auto biased = [&](int64_t r, int64_t i) {
      return load<V>(c + r * kBlockN + i) + load<V>(bias + i);
    };
    if (args.hidden) {
      S* hidden = static_cast<S*>(args.hidden) + begin * width + n;
      for (int64_t r = 0; r < rows; ++r, hidden += width) {
        fetch_lines<true>(hidden + kRowsAhead * width, count);
        if (args.gated) fetch_lines<true>(hidden + kRowsAhead * width + args.I, count);
        for (int64_t i = 0; i < count; i += kLanes) {
          store(hidden + i, biased(r, i), count - i);
          if (args.gated) store(hidden + args.I + i, biased(r, kSplitN + i), count - i);
        }
      }
    }
    if (!args.activated) return;
    dispatch_activation(args.activation, args.gated, [&](auto act) {
      using Act = decltype(act);
      S* out = static_cast<S*>(args.activated) + begin * args.I + n;
      for (int64_t r = 0; r < rows; ++r, out += args.I) {
        fetch_lines<true>(out + kRowsAhead * args.I, count);
        for (int64_t i = 0; i < count; i += kLanes) {
          const V gate = biased(r, i);
          const V up = Act::kGated ? biased(r, kSplitN + i) : gate;
          store(out + i, Act::value(gate, up), count - i);
        }
      }
    });
  }

  static void product(
      const ProductArgs& args, const RowBlock* blocks, const TokenBlock& tokens, int64_t col,
      bool next, void* scratch_buffer) {
    const int64_t pitch = args.n_blocks * kBlockN;
    const int64_t n = col * pitch;
    const int64_t count = smaller(args.N - n, pitch);
    const int64_t n_blocks = ceil_div(count, kBlockN);
    const int64_t num_tokens = tokens.end - tokens.begin;
    Scratch scratch(scratch_buffer);
    C* sums = scratch.take<C>(num_tokens * pitch);
    C* bias = scratch.take<C>(pitch);
    void* rest = scratch.take<C>(0);
    __builtin_memset(sums, 0, num_tokens * pitch * sizeof(C));
    const C* row_weight = static_cast<const C*>(args.row_weight);
    const S* row[kBlockM];
    for (int64_t i = tokens.first_block; i < tokens.last_block; ++i) {
      const RowBlock& block = blocks[i];
      const int64_t rows = block.end - block.begin;
      for (int64_t r = 0; r < rows; ++r) row[r] = row_of(args.rows, block.begin + r);
      const S* expert_bias = of_expert(args.bias, block.expert);
      read_bias(expert_bias ? expert_bias + n : nullptr, count, pitch, bias);
      const bool more = i + 1 < tokens.last_block;
      const int64_t next_expert = blocks[more ? i + 1 : tokens.first_block].expert;
      const int64_t next_n = more || !next ? n : n + pitch;
      Columns w[kMaxNBlocks], after[kMaxNBlocks];
      for (int64_t b = 0; b < n_blocks; ++b) {
        w[b] = W::columns(args.weights, block.expert, n + b * kBlockN, args.N);
        after[b] = W::columns(args.weights, next_expert, next_n + b * kBlockN, args.N);
      }
      const auto add_rows = [&](const C* c, int64_t first, int64_t tile_rows, int64_t n_block) {
        for (int64_t r = block.begin + first; tile_rows > 0; --tile_rows, ++r, c += kBlockN) {
          const int64_t token = (args.token ? args.token[r] : r) - tokens.begin;
          C* to = sums + token * pitch + n_block * kBlockN;
          const C* add = bias + n_block * kBlockN;
          const V weight(row_weight ? row_weight[r] : C(1));
          for (int64_t j = 0; j < smaller(count - n_block * kBlockN, kBlockN); j += kLanes) {
            store(to + j, multiply_add(weight, load<V>(c + j) + load<V>(add + j), load<V>(to + j)));
          }
        }
      };
      P::run(
          row, rows, block.expert_rows, args.K, w, n_blocks, more || next ? after : nullptr, rest,
          Epilogue<C>(add_rows));
    }
    S* out = static_cast<S*>(args.out) + tokens.begin * args.N + n;
    for (int64_t t = tokens.begin; t < tokens.end; ++t, out += args.N, sums += pitch) {
      fetch_lines<true>(out + kRowsAhead * args.N, count);
      for (int64_t j = 0; j < count; j += kLanes) store(out + j, load<V>(sums + j), count - j);
    }
  }

  static void grad_hidden(
      const GradHiddenArgs& args, const RowBlock& block, int64_t col, bool next, void* scratch) {
    const int64_t pitch = args.n_blocks * kBlockN;
    const int64_t n = col * pitch;
    const int64_t n_blocks = ceil_div(smaller(args.I - n, pitch), kBlockN);
    const int64_t rows = block.end - block.begin;
    const S* row[kBlockM];
    for (int64_t r = 0; r < rows; ++r) row[r] = row_of(args.grad_out, block.begin + r);
    Columns w[kMaxNBlocks], after[kMaxNBlocks];
    for (int64_t b = 0; b < n_blocks; ++b) {
      w[b] = W::columns(args.down, block.expert, n + b * kBlockN, args.I);
      after[b] = W::columns(args.down, block.expert, n + pitch + b * kBlockN, args.I);
    }
    const auto epilogue = [&](const C* c, int64_t first, int64_t tile_rows, int64_t n_block) {
      write_grad_hidden(args, block.begin + first, tile_rows, col * args.n_blocks + n_block, c);
    };
    P::run(
        row, rows, block.expert_rows, args.H, w, n_blocks, next ? after : nullptr, scratch,
        Epilogue<C>(epilogue));

    const S* bias = of_expert(args.down_bias, block.expert);
    if (!args.grad_weight_sums || !bias || col > 0) return;
    C* sums = static_cast<C*>(args.grad_weight_sums);
    for (int64_t r = 0; r < rows; ++r) {
      V dot(0.0);
      for (int64_t i = 0; i < args.H; i += kLanes) {
        dot = multiply_add(load<V>(row[r] + i, args.H - i), load<V>(bias + i, args.H - i), dot);
      }
      sums[block.begin + r] += sum(dot);
    }
  }

  static void write_grad_hidden(
      const GradHiddenArgs& args, int64_t begin, int64_t rows, int64_t col, const C* c) {
    const int64_t n = col * kBlockN;
    const int64_t count = smaller(args.I - n, kBlockN);
    const int64_t width = args.gated ? 2 * args.I : args.I;
    const int64_t up_at = args.gated ? args.I : 0;
    const C* row_weight = static_cast<const C*>(args.row_weight);
    C* sums = static_cast<C*>(args.grad_weight_sums);
    dispatch_activation(args.activation, args.gated, [&](auto act) {
      using Act = decltype(act);
      for (int64_t r = begin; r < begin + rows; ++r, c += kBlockN) {
        const S* hidden = static_cast<const S*>(args.hidden) + r * width + n;
        S* grad = args.grad_hidden ? static_cast<S*>(args.grad_hidden) + r * width + n : nullptr;
        S* weighted = args.weighted ? static_cast<S*>(args.weighted) + r * args.I + n : nullptr;
        fetch_lines<false>(hidden + kRowsAhead * width, count);
        if (Act::kGated) fetch_lines<false>(hidden + kRowsAhead * width + up_at, count);
        if (grad) fetch_lines<true>(grad + kRowsAhead * width, count);
        if (grad && Act::kGated) fetch_lines<true>(grad + kRowsAhead * width + up_at, count);
        if (weighted) fetch_lines<true>(weighted + kRowsAhead * args.I, count);
        const V weight(row_weight ? row_weight[r] : C(1));
        V dot(0.0);
        for (int64_t i = 0; i < count; i += kLanes) {
          const int64_t left = count - i;
          const V gate = load<V>(hidden + i, left);
          const V up = Act::kGated ? load<V>(hidden + up_at + i, left) : gate;
          const V g = load<V>(c + i, left);
          const V a = Act::value(gate, up);
          dot = multiply_add(g, a, dot);
          if (weighted) store(weighted + i, weight * a, left);
          if (grad) {
            V dgate, dup;
            Act::grad(gate, up, weight * g, &dgate, &dup);
            store(grad + i, dgate, left);
            if (Act::kGated) store(grad + up_at + i, dup, left);
          }
        }
        if (sums) sums[col * args.num_rows + r] = sum(dot);
      }
    });
  }

  static void grad_weights(
      const GradWeightsArgs& args, const RowBlock& block, int64_t m_block, int64_t n_block,
      void* scratch) {
    const int64_t m = m_block * kGradBlockM, n = n_block * kGradBlockN;
    const int64_t M = smaller(args.M - m, kGradBlockM), N = smaller(args.N - n, kGradBlockN);
    const int64_t pitch = args.row_stride;
    const int64_t at = block.expert * args.expert_stride + m * pitch + n;
    const auto run = [&](auto* grad, bool past) {
      using Out = DirectStore<std::remove_pointer_t<decltype(grad)>>;
      GradWeights<S>::run(
          args.left, m, M, args.right, n, N, block.begin, block.end, Out{grad, pitch, past},
          args.add, scratch);
    };
    S* grad = static_cast<S*>(args.grad) + at;
    if (args.add) {
      if (block.begin == block.end) return;
      args.wide ? run(static_cast<C*>(args.grad) + at, false) : run(grad, false);
      return;
    }
    if (block.begin == block.end) {
      for (int64_t i = 0; i < M; ++i) __builtin_memset(grad + i * pitch, 0, N * sizeof(S));
      return;
    }
    const bool past =
        args.stream && reinterpret_cast<uintptr_t>(grad) % 64 == 0 && pitch * sizeof(S) % 64 == 0;
    run(grad, past);
    if (past) finish_streams();
  }

  static void column_sum(const ColumnSumArgs& args, const RowBlock& block, int64_t col) {
    const int64_t m = col * kBlockN;
    const int64_t count = smaller(args.M - m, kBlockN);
    const C* row_weight = static_cast<const C*>(args.row_weight);
    alignas(64) C sums[kBlockN] = {};
    for (int64_t r = block.begin; r < block.end; ++r) {
      const S* row = row_of(args.rows, r) + m;
      const V weight(row_weight ? row_weight[r] : C(1));
      for (int64_t i = 0; i < count; i += kLanes) {
        store(sums + i, multiply_add(weight, load<V>(row + i, count - i), load<V>(sums + i)));
      }
    }
    S* out = static_cast<S*>(args.sum) + block.expert * args.M + m;
    for (int64_t i = 0; i < count; i += kLanes) store(out + i, load<V>(sums + i), count - i);
  }

  static void unpermute(const UnpermuteArgs& args, int64_t begin, int64_t end) {
    const S* rows = static_cast<const S*>(args.rows);
    const C* weights = static_cast<const C*>(args.weights);
    for (int64_t t = begin; t < end; ++t) {
      S* out = static_cast<S*>(args.out) + t * args.H;
      for (int64_t i = 0; i < args.H; i += kLanes) {
        V sum(0.0);
        for (int64_t slot = t * args.K; slot < (t + 1) * args.K; ++slot) {
          const int64_t row = args.row_map[slot];
          if (row < 0) continue;
          const V weight(weights ? weights[slot] : C(1));
          sum = multiply_add(weight, load<V>(rows + row * args.H + i, args.H - i), sum);
        }
        store(out + i, sum, args.H - i);
      }
    }
  }

  static void unpermute_backward(const UnpermuteGradArgs& args, int64_t begin, int64_t end) {
    const C* weights = static_cast<const C*>(args.weights);
    for (int64_t r = begin; r < end; ++r) {
      const int64_t slot = args.slot_of_row[r];
      S* grad = args.grad_rows ? static_cast<S*>(args.grad_rows) + r * args.H : nullptr;
      if (slot < 0) {
        if (grad) __builtin_memset(grad, 0, args.H * sizeof(S));
        continue;
      }
      const S* grad_out = static_cast<const S*>(args.grad_out) + slot / args.K * args.H;
      const S* row = static_cast<const S*>(args.rows) + r * args.H;
      const V weight(weights ? weights[slot] : C(1));
      V dot(0.0);
      for (int64_t i = 0; i < args.H; i += kLanes) {
        const V g = load<V>(grad_out + i, args.H - i);
        if (grad) store(grad + i, weight * g, args.H - i);
        if (args.grad_weights) dot = multiply_add(g, load<V>(row + i, args.H - i), dot);
      }
      if (args.grad_weights) static_cast<C*>(args.grad_weights)[slot] = sum(dot);
    }
  }

  static constexpr TypeKernels table() {
    TypeKernels kernels = forward_table();
    kernels.grad_scratch_bytes = GradWeights<S>::scratch_bytes;
    kernels.grad_hidden = grad_hidden;
    kernels.grad_weights = grad_weights;
    kernels.column_sum = column_sum;
    kernels.unpermute = unpermute;
    kernels.unpermute_backward = unpermute_backward;
    return kernels;
  }
  // Of formats that have no gradient.
  static constexpr TypeKernels forward_table() {
    TypeKernels kernels{};
    kernels.max_block_rows = kBlockM;
    kernels.scratch_bytes = P::scratch_bytes;
    kernels.up = up;
    kernels.product = product;
    return kernels;
  }
};

}  // namespace
}  // namespace moe_ext::cpu::kernels
