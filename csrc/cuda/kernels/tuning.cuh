// The numbers that several kernels share, each with its reason; a number that one file uses stands
// there. In brackets: a row of benchmarks/bench_moe_cuda.py that a change of it would show in, by
// kind and model.
#pragma once

#include <cstddef>
#include <cstdint>

namespace moe_ext::cuda::kernels {

constexpr int kWarp = 32;  // lanes: the same on every GPU

// Threads of a block: 8 warps. A kernel with up to 32 registers a thread fills an SM's 65,536 with
// 8 such blocks. A tile of a product takes 100 to 194 registers a thread: one or two blocks an SM,
// in which fewer warps would hide less of the waiting for memory, and 16 warps would have to do
// with 128 registers. [forward, Qwen3-30B-A3B]
constexpr int kThreads = 256;

// Kernels that go row by row: a warp for each row, since its lanes need no barrier to add up what
// they found. A warp reads 512 bytes at a time: a row of 2048 bf16 numbers in 8 steps.
// [forward, OLMoE]
constexpr int kRowsPerBlock = kThreads / kWarp;

// What a thread reads or writes at once: the widest access there is, a whole 128-byte line for
// every 8 lanes. [decode, DeepSeek-V3]
constexpr int kPackBytes = 16;

// Packs of a row that go to one warp: 4 for each lane, 2 KiB in all. Enough to keep loads in
// flight, and few enough that a few long rows make many warps. [decode, Mixtral]
constexpr int64_t kSegmentPacks = 4 * kWarp;

// Shared memory that every GPU gives a block without being asked.
constexpr size_t kSharedBytes = 48 << 10;

// Products (gemm/). A block makes a tile of the result; every thread keeps its sums in registers.

// Fused multiply-adds. fp32: 128 x 128 are 64 sums a thread, and for every k a thread reads 16
// numbers for 64 multiply-adds. fp64: as many sums would be 128 registers, and the operands 65 KiB
// of shared memory, so 64 x 64. Along k: 16, that is 33 KiB for both stages of fp32.
// (No row: the benchmark runs in bf16.)
template <class T>
constexpr int kFmaTile = sizeof(T) == 8 ? 64 : 128;
constexpr int kFmaBlockK = 16;

// Tensor cores. 8 warps in 2 x 4 make 64 x 32 each: 64 sums a thread, beside 100 more registers for
// fragments and what is on its way from memory. A larger tile would spill; a smaller one reads its
// operands more often. Along k: 64 bytes, that is 2 packs a thread of either operand, and 40 KiB
// for both stages. [train, DeepSeek-V3, before Hopper: there torch's product serves bf16]
constexpr int kMmaTile = 128;
constexpr int kMmaBlockKBytes = 64;

// Blocks of operands along k in shared memory: one that is multiplied, one that is written. More
// would pass 48 KiB.
constexpr int kStages = 2;

}  // namespace moe_ext::cuda::kernels
