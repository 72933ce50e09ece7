// Sizes that several files share, with their reasons. Figures: one core with 32 KiB of nearest
// cache (L1) and 1 MiB of its own (L2), 24 GB/s from memory, and the rows of `make bench-cpu` that
// show a change. A size that one file uses stands there.
#pragma once

#include <cstdint>

namespace moe_ext::cpu::kernels {

// Rows of a tile, and vectors across it: its sums, a step of B and one number of A fill the
// registers without spilling. Six rows of four vectors take 24 + 4 + 1 of AVX-512's 32 registers
// and do 24 multiply-adds for 10 loads, so that two multiply-adds a cycle never wait for a load;
// AVX2 has 16 registers (12 + 2 + 1), as have machines without either (8 + 2 + 1). Alone, with its
// operands in L2, the widest tile reaches the machine's rate of multiply-adds. Rows: forward,
// train.
template <int kVectorBytes>
struct TileShape {
  static constexpr int kM = 4, kVecs = 2;
};
template <>
struct TileShape<32> {
  static constexpr int kM = 6, kVecs = 2;
};
template <>
struct TileShape<64> {
  static constexpr int kM = 6, kVecs = 4;
};

// Columns of a block of a product: the widest tile, four vectors of 16 floats. Two splits of it are
// gate and up, so a block holds whole pairs of them.
constexpr int64_t kBlockN = 64;
constexpr int64_t kSplitN = kBlockN / 2;

// Blocks side by side in one task where rows of the weights' transpose lie a page or more apart:
// together they read 512 bytes of a row at once instead of 128. More would push the sums out of L2.
// Rows: train at E = 64 and 128.
constexpr int64_t kMaxNBlocks = 4;
// The same of the forward, whose phases have few tasks: wider ones leave a thread idle at the end.
// Rows: transposed.
constexpr int64_t kForwardNBlocks = 2;

// Terms of a packed panel: 512 terms of 64 columns are 64 KiB of bf16 or 128 KiB of floats, which
// stay in L2 beside the rows; half as many when several blocks share it. Rows: forward.
constexpr int64_t kBlockK = 512;
constexpr int64_t kWideBlockK = 256;

// Rows of a block of A. Its sums (512 x 64 floats) and its copied rows (256 x 512 floats, of types
// that are widened) are the largest things beside the panel and stay in L2 with it.
constexpr int64_t kMaxBlockM = 512;
constexpr int64_t kMaxCopiedBlockM = 256;

// A block of a weights' gradient, [M, N] over K tokens: sums of 256 KiB and a packed left operand
// of as much stay in L2, and a token's row is read for 256 columns at once. Rows: train.
constexpr int64_t kGradBlockM = 256;
constexpr int64_t kGradBlockN = 256;
constexpr int64_t kGradBlockK = 256;

// Up to so many rows, or columns, weights are read where they lie: packing a column costs as much
// as about five rows of its product, and dot products reach 0.75 of the tiles' rate. Rows: decode.
constexpr int64_t kMaxDotM = 32;
constexpr int64_t kMaxDotN = 16;

}  // namespace moe_ext::cpu::kernels
