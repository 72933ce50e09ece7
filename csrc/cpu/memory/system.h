// What the cache of blocks asks of the operating system. Without torch.
#pragma once

#include <cstdint>

namespace moe_ext::cpu::memory {

constexpr int64_t kPage = 4096, kHugePage = 2 << 20;

inline int64_t round_up(int64_t bytes, int64_t multiple) {
  return (bytes + multiple - 1) / multiple * multiple;
}

// Whole pages, aligned to huge ones and on them where the system allows it; null if there is no
// memory.
void* map_block(int64_t bytes);
void unmap_block(void* block, int64_t bytes);

// Whole huge pages of a block go back to the system; what they hold is undefined after that.
void discard(void* begin, int64_t bytes);

// What the system counts as this process's memory, now and at its highest. False if it cannot tell.
bool read_process_memory(int64_t* now, int64_t* highest);

}  // namespace moe_ext::cpu::memory
