#include "cpu/parallel.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <atomic>

namespace moe_ext::cpu {
namespace {

// Waking and joining threads costs a few microseconds.
constexpr double kNanosecondsPerThread = 15000;

// Taken at once. Threads that stay close to each other share the weights and rows in the cache.
constexpr int64_t kMostPieces = 8;

int64_t count_pieces(const Phase& phase) {
  int64_t pieces = 0;
  for (const Job& job : phase) pieces += job.pieces;
  return pieces;
}

void run_pieces(const Phase& phase, int64_t begin, int64_t end, void* scratch) {
  for (const Job& job : phase) {
    const int64_t last = std::min(end, job.pieces);
    for (; begin < last; ++begin) job.run(begin, begin + 1 < last, scratch);
    begin -= job.pieces;
    end -= job.pieces;
    if (end <= 0) return;
  }
}

}  // namespace

void run_phases(const std::vector<Phase>& phases, int64_t scratch_bytes, double nanoseconds) {
  std::vector<int64_t> pieces;
  for (const Phase& phase : phases) pieces.push_back(count_pieces(phase));
  int64_t threads = 1;
#ifdef _OPENMP
  if (!at::in_parallel_region() && !pieces.empty()) {
    threads = std::min<int64_t>(
        {at::get_num_threads(), *std::max_element(pieces.begin(), pieces.end()),
         1 + static_cast<int64_t>(nanoseconds / kNanosecondsPerThread)});
    threads = std::max<int64_t>(threads, 1);
  }
#endif
  constexpr int64_t kLine = 64;
  const int64_t stride = (scratch_bytes + 2 * kLine - 1) / kLine * kLine;
  const at::Tensor buffer = at::empty({threads * stride + kLine}, at::kByte);
  char* scratch = static_cast<char*>(buffer.mutable_data_ptr());
  scratch += (kLine - reinterpret_cast<uintptr_t>(scratch) % kLine) % kLine;

  if (threads == 1) {
    for (size_t p = 0; p < phases.size(); ++p) {
      run_pieces(phases[p], 0, pieces[p], scratch);
    }
    return;
  }
#ifdef _OPENMP
  std::vector<std::atomic<int64_t>> next(phases.size());
  std::atomic<int64_t> arrived{0};
#pragma omp parallel num_threads(static_cast<int>(threads))
  {
    // The team may be smaller than asked for, never larger.
    void* own = scratch + arrived.fetch_add(1) * stride;
    for (size_t p = 0; p < phases.size(); ++p) {
      for (int64_t i = 0; i < pieces[p];) {
        // Neighbours at once, ever fewer, so that at the end nobody waits long for anybody.
        i = next[p].load();
        int64_t end;
        do {
          end = i + std::clamp<int64_t>((pieces[p] - i) / (4 * threads), 1, kMostPieces);
        } while (i < pieces[p] && !next[p].compare_exchange_weak(i, end));
        if (i < pieces[p]) run_pieces(phases[p], i, end, own);
      }
#pragma omp barrier
    }
  }
#endif
}

}  // namespace moe_ext::cpu
