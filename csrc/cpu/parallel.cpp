#include "cpu/parallel.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>

#include "ops/operands.h"

namespace moe_ext::cpu {
namespace {

// Waking and joining threads costs a few microseconds, a fraction of what each must have to do.
constexpr double kNanosecondsPerThread = 15000;

// Taken at once. Threads that stay close to each other share the weights and rows in the cache.
constexpr int64_t kMostTasks = 8;

int64_t count_tasks(const Phase& phase) {
  int64_t tasks = 0;
  for (const Job& job : phase) tasks += job.tasks;
  return tasks;
}

void run_tasks(const Phase& phase, int64_t begin, int64_t end, void* scratch) {
  for (const Job& job : phase) {
    const int64_t last = std::min(end, job.tasks);
    for (; begin < last; ++begin) job.run(begin, begin + 1 < last, scratch);
    begin -= job.tasks;
    end -= job.tasks;
    if (end <= 0) return;
  }
}

}  // namespace

void run_phases(const std::vector<Phase>& phases, int64_t scratch_bytes, double nanoseconds) {
  std::vector<int64_t> tasks;
  for (const Phase& phase : phases) tasks.push_back(count_tasks(phase));
  int64_t threads = 1;
#ifdef _OPENMP
  if (!at::in_parallel_region() && !tasks.empty()) {
    threads = std::min<int64_t>(
        {at::get_num_threads(), *std::max_element(tasks.begin(), tasks.end()),
         1 + static_cast<int64_t>(nanoseconds / kNanosecondsPerThread)});
    threads = std::max<int64_t>(threads, 1);
  }
#endif
  constexpr int64_t kLine = 64;
  const int64_t stride = (scratch_bytes + 2 * kLine - 1) / kLine * kLine;
  const at::Tensor buffer = empty_result({threads * stride + kLine}, at::kByte);
  char* scratch = static_cast<char*>(buffer.mutable_data_ptr());
  scratch += (kLine - reinterpret_cast<uintptr_t>(scratch) % kLine) % kLine;

  if (threads == 1) {
    for (size_t p = 0; p < phases.size(); ++p) {
      run_tasks(phases[p], 0, tasks[p], scratch);
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
      for (int64_t i = 0; i < tasks[p];) {
        // Neighbours at once, ever fewer, so that at the end nobody waits long for anybody.
        i = next[p].load();
        int64_t end;
        do {
          end = i + std::clamp<int64_t>((tasks[p] - i) / (4 * threads), 1, kMostTasks);
        } while (i < tasks[p] && !next[p].compare_exchange_weak(i, end));
        if (i < tasks[p]) run_tasks(phases[p], i, end, own);
      }
#pragma omp barrier
    }
  }
#endif
}

}  // namespace moe_ext::cpu
