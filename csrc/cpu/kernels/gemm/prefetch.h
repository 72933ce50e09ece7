// Fetching memory ahead of its use.
#pragma once

#include "cpu/kernels/simd/vec.h"

namespace moe_ext::cpu::kernels {
namespace {

// Lines of memory to fetch while a tile computes, one for each of its steps: first the rows of the
// next tile, then the next block of B. Both lie scattered, a few lines at each place, where the
// hardware's own prefetching does not help.
class Prefetcher {
 public:
  static constexpr int kLinesPerCall = 16;
  // kLinesPerCall lines, `step` bytes apart.
  struct Lines {
    const char* at;
    int64_t step;
  };
  // Such lines at every place of a nest of two loops.
  struct LineGrid {
    const char* at = nullptr;
    int64_t minor_count = 0, minor_stride = 0, major_count = 0, major_stride = 0, line_step = 0;
    int64_t count() const { return minor_count * major_count; }
  };

  explicit Prefetcher(const char* nothing) : nothing_(nothing) {}

  // The block is fetched by the last of `calls` calls that the rows leave free, or the cache would
  // lose it again before it is used.
  void set_block(const LineGrid (&block)[2], int64_t calls) {
    minor_ = 0;
    for (int split = 0; split < 2; ++split) {
      block_[split] = block[split];
      calls -= block[split].count();
    }
    wait_ = calls - calls / 8;
  }
  void set_rows(const char* const* rows, int64_t count, int64_t bytes) {
    row_ = rows;
    last_row_ = rows + count;
    row_bytes_ = bytes;
    byte_ = 0;
  }

  MOE_INLINE Lines next() {
    if (row_ < last_row_) {
      const char* at = *row_ + byte_;
      byte_ += kLinesPerCall * 64;
      if (byte_ >= row_bytes_) {
        byte_ = 0;
        ++row_;
      }
      return {at, 64};
    }
    if (--wait_ >= 0) return {nothing_, 0};
    for (LineGrid& grid : block_) {
      if (grid.count() == 0) continue;
      const char* at = grid.at + minor_ * grid.minor_stride;
      if (++minor_ == grid.minor_count) {
        minor_ = 0;
        grid.at += grid.major_stride;
        --grid.major_count;
      }
      return {at, grid.line_step};
    }
    return {nothing_, 0};
  }

 private:
  const char* nothing_;
  const char* const* row_ = nullptr;
  const char* const* last_row_ = nullptr;
  int64_t row_bytes_ = 0, byte_ = 0, minor_ = 0, wait_ = 0;
  LineGrid block_[2];
};

}  // namespace
}  // namespace moe_ext::cpu::kernels
