// Large blocks of memory, kept for reuse after they are freed. Without torch.
//
// Memory that is fresh from the system is mapped and cleared, page by page, while it is first
// written. For the weights' gradients of many experts that takes as long as computing them, in
// every step. So blocks lie on huge pages, where the system gives them on request, and freed ones
// are held for whoever asks next for about as much.
//
// What is held never raises the peak of the process's memory: it fits below the peak that the
// process has had without it (ProcessPeak).
#pragma once

#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <map>
#include <mutex>
#include <unordered_map>

#include "cpu/memory/process_peak.h"

namespace moe_ext::cpu::memory {

class BlockCache {
 public:
  // Smaller ones are left to the usual allocator, which reuses them well enough.
  static constexpr size_t kLeastBytes = 1 << 20;

  struct Stats {
    int64_t bytes_in_use, bytes_held, hits, misses;
  };

  // The one of the process, which is never destroyed: tensors may outlive everything else.
  static BlockCache& instance();
  BlockCache(const BlockCache&) = delete;

  // Throws std::bad_alloc. The contents are undefined.
  void* allocate(size_t bytes);
  // block: from allocate. size_of gives the bytes it has.
  int64_t size_of(void* block);
  void free(void* block);
  // Gives back what is held.
  void empty();
  // The most that is held.
  void set_limit(int64_t bytes);
  Stats stats();

  // Gives back what nobody asked for in a while; costs next to nothing if nothing is held.
  void give_back_stale() {
    if (holds_.load(std::memory_order_relaxed)) give_back_stale_held();
  }

 private:
  using Clock = std::chrono::steady_clock;
  struct Held {
    void* block;
    int64_t resident;  // bytes at its begin that were not given back
    int64_t freed_at;  // bytes_asked_ then
    Clock::time_point since;
  };
  using HeldBySize = std::multimap<int64_t, Held>;

  BlockCache();
  void give_back_stale_held();
  void drop_stale();
  void drop(HeldBySize::iterator held);
  void shrink_to(int64_t bytes);

  std::mutex mutex_;
  std::unordered_map<void*, int64_t> in_use_;
  HeldBySize held_;
  Stats stats_{};
  int64_t limit_ = INT64_MAX;
  int64_t bytes_asked_ = 0;
  ProcessPeak peak_;
  std::atomic<bool> holds_{false};
};

}  // namespace moe_ext::cpu::memory
