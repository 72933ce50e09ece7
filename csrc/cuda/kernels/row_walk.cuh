// Rows grouped by expert, walked by warps: segments of them, their weights and biases.
#pragma once

#include "cuda/kernels/device.cuh"

namespace moe_ext::cuda::kernels {

template <class Number>
__device__ Number weight_of(const Number* weights, const int32_t* slot_of_row, int64_t row) {
  return weights ? weights[slot_of_row ? slot_of_row[row] : row] : Number(1);
}

// One warp for each segment of a row. fn(row, first, last): the columns from first to below last.
template <int kPack, class Fn>
__device__ void each_segment(int64_t rows, int64_t columns, const Fn& fn) {
  const int64_t segments = ceil_div(columns, kSegmentPacks * kPack);
  const int64_t index = int64_t(blockIdx.x) * kRowsPerBlock + threadIdx.x / kWarp;
  const int64_t row = index / segments;
  if (row >= rows) return;
  const int64_t first = index % segments * kSegmentPacks * kPack;
  const int64_t last = first + kSegmentPacks * kPack;
  fn(row, first, last < columns ? last : columns);
}

// Blocks of each_segment.
inline int64_t segment_blocks(int64_t rows, int64_t columns, int pack) {
  return blocks_for(rows * ceil_div(columns, kSegmentPacks * pack));
}

// The bias of an expert's rows, `columns` of it; null if there is none.
template <class T>
__device__ const T* bias_of(const RowGroups& groups, const T* bias, int64_t columns, int64_t row) {
  return bias ? bias + expert_of_row(groups.offsets, groups.E, row) * columns : nullptr;
}

// kPack numbers of data, plus those of the bias, if there is one.
template <int kPack, class T>
struct Sums {
  Compute<T> values[kPack];

  __device__ Sums(const T* data, const T* bias) {
    using P = Pack<T, kPack>;
    const P pack = *reinterpret_cast<const P*>(data);
    for (int i = 0; i < kPack; ++i) values[i] = widen(pack.values[i]);
    if (!bias) return;
    const P more = *reinterpret_cast<const P*>(bias);
    for (int i = 0; i < kPack; ++i) values[i] += widen(more.values[i]);
  }
};

}  // namespace moe_ext::cuda::kernels
