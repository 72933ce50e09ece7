#include "cpu/memory/process_peak.h"

#include <algorithm>

#include "cpu/memory/system.h"

namespace moe_ext::cpu::memory {

void ProcessPeak::map(int64_t bytes) {
  unwritten_ += bytes;
  rise(bytes);
}

void ProcessPeak::rise(int64_t bytes) {
  needed_ += bytes;
  if (seen_ == 0) peak_ = std::max(peak_, needed_);
}

void ProcessPeak::free(int64_t bytes, int64_t held) {
  unwritten_ = 0;  // whoever frees a block is done with what it asked for together with it
  look(held);
  needed_ -= bytes;
  most_held_ = std::max(most_held_, held + bytes);
}

int64_t ProcessPeak::room(int64_t held) {
  look(held);
  return peak_ - needed_ - spike_;
}

void ProcessPeak::look(int64_t held) {
  // A look takes 25 us.
  constexpr std::chrono::milliseconds kBetween{2};
  const auto time = std::chrono::steady_clock::now();
  int64_t now, highest;
  if (time < next_look_ || !read_process_memory(&now, &highest)) return;
  next_look_ = time + kBetween;
  needed_ = now - held + unwritten_;
  peak_ = std::max(peak_, now - held);
  if (highest > highest_seen_) {
    peak_ = std::max(peak_, highest - most_held_);
    if (seen_ > 0) spike_ = std::max(spike_, highest - std::max(seen_, now));
  }
  seen_ = now;
  highest_seen_ = highest;
  most_held_ = held;
}

}  // namespace moe_ext::cpu::memory
