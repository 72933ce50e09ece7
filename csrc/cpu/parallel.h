// Work in phases: every task of a phase is done before the next phase begins.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

namespace moe_ext::cpu {

// run(task, next, scratch) for task in [0, tasks), each once, in any order, by any thread.
// `next`: the same thread will run task + 1 next. It must not throw.
struct Job {
  int64_t tasks;
  std::function<void(int64_t task, bool next, void* scratch)> run;
};
using Phase = std::vector<Job>;

// Runs the phases in one parallel region; threads take tasks from a queue, so it does not matter
// how they are shared out over experts. Each thread has scratch_bytes of its own, aligned to a
// cache line. `nanoseconds` estimates the whole on one core: small work takes fewer threads, and
// none but the caller's where waking them costs more than they save.
void run_phases(const std::vector<Phase>& phases, int64_t scratch_bytes, double nanoseconds);

// A rough time on one core: what is multiplied, and what is read or written once.
inline double estimate_nanoseconds(int64_t multiplications, int64_t bytes) {
  return 0.02 * static_cast<double>(multiplications) + 0.03 * static_cast<double>(bytes);
}

}  // namespace moe_ext::cpu
