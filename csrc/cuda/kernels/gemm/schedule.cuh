// Which tile of the result a block makes. The offsets stay on the device: as many blocks are
// launched as any routing could need, and those without a tile leave.
#pragma once

#include "cuda/kernels/device.cuh"

namespace moe_ext::cuda::kernels {

// The rows of each expert in tiles of kTileM: tile number `index` of all. expert is -1 past the
// last. A warp computes it together.
struct RowTile {
  int64_t expert, begin, end;
};
template <int kTileM>
__device__ RowTile find_tile(const RowGroups& groups, int64_t index) {
  const int32_t* offsets = groups.offsets;
  const Owner owner = find_owner(
      groups.E, index, [&](int64_t e) { return ceil_div(offsets[e + 1] - offsets[e], kTileM); });
  if (owner.i < 0) return {-1, 0, 0};
  return {
      owner.i, offsets[owner.i] + (index - owner.before) * kTileM, int64_t(offsets[owner.i + 1])};
}

// The tiles of find_tile, at most: the last one of each expert with rows may be short.
inline int64_t most_row_tiles(const RowGroups& groups, int tile_m) {
  return groups.num_rows / tile_m + (groups.E < groups.num_rows ? groups.E : groups.num_rows);
}

// Products of rows: blocks that share rows follow one another, so that the rows are read from
// memory once and from the L2 cache after that.
template <class Engine>
int64_t product_blocks(const RowGroups& groups, int64_t N) {
  return most_row_tiles(groups, Engine::kTileM) * ceil_div(N, Engine::kTileN);
}

// Gradients of weights: the blocks of an expert follow one another, and among them those that share
// columns of the left operand.
struct GradTile {
  int64_t expert, m, n;
};
template <class Engine>
int64_t grad_blocks(int64_t E, int64_t M, int64_t N) {
  return E * ceil_div(M, Engine::kTileM) * ceil_div(N, Engine::kTileN);
}
template <class Engine>
__device__ GradTile find_grad_tile(int64_t M, int64_t N, unsigned index) {
  const int64_t tiles_m = ceil_div(M, Engine::kTileM), tiles_n = ceil_div(N, Engine::kTileN);
  return {
      index / tiles_n / tiles_m, index / tiles_n % tiles_m * Engine::kTileM,
      index % tiles_n * Engine::kTileN};
}

}  // namespace moe_ext::cuda::kernels
