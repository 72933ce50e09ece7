// How far the memory of the process has risen. Without torch.
#pragma once

#include <chrono>
#include <cstdint>

namespace moe_ext::cpu::memory {

// Blocks that are merely held count for nothing. It sees what others allocate too, by looking at
// the process (Linux; elsewhere it knows the blocks alone).
class ProcessPeak {
 public:
  // What happens to blocks: `held` bytes are held before it.
  void map(int64_t bytes);
  void reuse(int64_t bytes) { rise(bytes); }
  void free(int64_t bytes, int64_t held);

  // Bytes that can be held without a higher peak.
  int64_t room(int64_t held);

 private:
  void rise(int64_t bytes);
  void look(int64_t held);

  int64_t needed_ = 0;     // by the process now, without what is held
  int64_t peak_ = 0;       // of needed_
  int64_t unwritten_ = 0;  // mapped, and not yet part of what the system counts
  int64_t spike_ = 0;      // the highest rise of others' memory that was gone at the next look
  int64_t seen_ = 0, highest_seen_ = 0, most_held_ = 0;  // at, until and since the last look
  std::chrono::steady_clock::time_point next_look_;
};

}  // namespace moe_ext::cpu::memory
