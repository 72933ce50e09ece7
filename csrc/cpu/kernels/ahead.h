// Fetching memory ahead of its use.
#pragma once

#include "cpu/kernels/vec.h"

namespace moe_ext::kernels {
namespace {

// Lines of memory to fetch while a tile computes, one for each of its steps: first the rows of the
// next tile, then the next block of B. Both lie scattered in short runs, where the hardware's own
// prefetching does not help.
class Ahead {
 public:
  static constexpr int kRun = 16;  // lines between two calls of next
  struct Run {
    const char* at;
    int64_t step;
  };
  // Runs of kRun lines, line_step bytes apart, at every place of a nest of two loops.
  struct Runs {
    const char* at = nullptr;
    int64_t minor_count = 0, minor_stride = 0, major_count = 0, major_stride = 0, line_step = 0;
    int64_t count() const { return minor_count * major_count; }
  };

  explicit Ahead(const char* nothing) : nothing_(nothing) {}

  // The block is fetched by the last of `calls` calls that the rows leave free, or the cache would
  // lose it again before it is used.
  void set_block(const Runs (&block)[2], int64_t calls) {
    minor_ = 0;
    for (int half = 0; half < 2; ++half) {
      block_[half] = block[half];
      calls -= block[half].count();
    }
    wait_ = calls - calls / 8;
  }
  void set_rows(const char* const* rows, int64_t count, int64_t bytes) {
    row_ = rows;
    last_row_ = rows + count;
    row_bytes_ = bytes;
    byte_ = 0;
  }

  MOE_INLINE Run next() {
    if (row_ < last_row_) {
      const char* at = *row_ + byte_;
      byte_ += kRun * 64;
      if (byte_ >= row_bytes_) {
        byte_ = 0;
        ++row_;
      }
      return {at, 64};
    }
    if (--wait_ >= 0) return {nothing_, 0};
    for (Runs& runs : block_) {
      if (runs.count() == 0) continue;
      const char* at = runs.at + minor_ * runs.minor_stride;
      if (++minor_ == runs.minor_count) {
        minor_ = 0;
        runs.at += runs.major_stride;
        --runs.major_count;
      }
      return {at, runs.line_step};
    }
    return {nothing_, 0};
  }

 private:
  const char* nothing_;
  const char* const* row_ = nullptr;
  const char* const* last_row_ = nullptr;
  int64_t row_bytes_ = 0, byte_ = 0, minor_ = 0, wait_ = 0;
  Runs block_[2];
};

}  // namespace
}  // namespace moe_ext::kernels
