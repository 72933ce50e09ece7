#include "cpu/memory/block_cache.h"

#include <algorithm>
#include <iterator>
#include <new>

#include "cpu/memory/system.h"

#ifdef __linux__
#include <pthread.h>
#endif

namespace moe_ext::cpu::memory {
namespace {

// A step of training asks once for about as much as there is, so this is a few steps; slow steps,
// of which one takes longer than the seconds, do not notice what fresh memory costs.
constexpr int64_t kStaleRounds = 4;
constexpr std::chrono::seconds kStaleSeconds{10};

// A held block may be larger than what it is taken for by an eighth.
constexpr int64_t kSlack = 8;

}  // namespace

BlockCache& BlockCache::instance() {
  static BlockCache* const cache = new BlockCache;
  return *cache;
}

BlockCache::BlockCache() {
#ifdef __linux__
  // A child has one thread, the one that forked: no other may leave the cache locked there.
  pthread_atfork(
      [] { instance().mutex_.lock(); }, [] { instance().mutex_.unlock(); },
      [] { instance().mutex_.unlock(); });
#endif
}

void* BlockCache::allocate(size_t bytes_) {
  if (bytes_ > static_cast<size_t>(INT64_MAX / 2)) throw std::bad_alloc();
  const int64_t bytes = round_up(std::max<int64_t>(bytes_, 1), kPage);
  const std::lock_guard<std::mutex> lock(mutex_);
  bytes_asked_ += bytes;
  drop_stale();
  auto found = held_.lower_bound(bytes);
  if (found != held_.end() && found->first - bytes <= bytes / kSlack) {
    // Of equal ones that which was used last.
    found = std::prev(held_.upper_bound(found->first));
    const auto [size, held] = *found;
    in_use_.emplace(held.block, size);
    held_.erase(found);
    ++stats_.hits;
    stats_.bytes_held -= held.resident;
    stats_.bytes_in_use += size;
    peak_.reuse(held.resident);
    if (held.resident < size) peak_.map(size - held.resident);
    holds_ = !held_.empty();
    return held.block;
  }
  ++stats_.misses;
  shrink_to(peak_.room(stats_.bytes_held) - bytes);
  void* block = map_block(bytes);
  if (!block) {
    shrink_to(0);
    block = map_block(bytes);
    if (!block) throw std::bad_alloc();
  }
  in_use_.emplace(block, bytes);
  stats_.bytes_in_use += bytes;
  peak_.map(bytes);
  return block;
}

int64_t BlockCache::size_of(void* block) {
  const std::lock_guard<std::mutex> lock(mutex_);
  return in_use_.at(block);
}

void BlockCache::free(void* block) {
  const std::lock_guard<std::mutex> lock(mutex_);
  const auto found = in_use_.find(block);
  const int64_t bytes = found->second;
  in_use_.erase(found);
  peak_.free(bytes, stats_.bytes_held);
  stats_.bytes_in_use -= bytes;
  stats_.bytes_held += bytes;
  held_.emplace(bytes, Held{block, bytes, bytes_asked_, Clock::now()});
  drop_stale();
  shrink_to(peak_.room(stats_.bytes_held));
}

void BlockCache::empty() {
  const std::lock_guard<std::mutex> lock(mutex_);
  shrink_to(0);
}

void BlockCache::set_limit(int64_t bytes) {
  const std::lock_guard<std::mutex> lock(mutex_);
  limit_ = bytes;
  shrink_to(limit_);
}

BlockCache::Stats BlockCache::stats() {
  const std::lock_guard<std::mutex> lock(mutex_);
  return stats_;
}

void BlockCache::give_back_stale_held() {
  const std::lock_guard<std::mutex> lock(mutex_);
  drop_stale();
}

void BlockCache::drop_stale() {
  if (held_.empty()) return;
  const auto time = Clock::now();
  const int64_t asked = kStaleRounds * (stats_.bytes_in_use + stats_.bytes_held);
  for (auto it = held_.begin(); it != held_.end();) {
    const auto next = std::next(it);
    const Held& held = it->second;
    if (bytes_asked_ - held.freed_at > asked || time - held.since > kStaleSeconds) drop(it);
    it = next;
  }
}

void BlockCache::drop(HeldBySize::iterator it) {
  stats_.bytes_held -= it->second.resident;
  unmap_block(it->second.block, it->first);
  held_.erase(it);
  holds_ = !held_.empty();
}

// The blocks that were freed first go first, of the last one only the end.
void BlockCache::shrink_to(int64_t bytes) {
  bytes = std::clamp<int64_t>(bytes, 0, limit_);
  while (stats_.bytes_held > bytes) {
    const auto oldest = std::min_element(held_.begin(), held_.end(), [](auto& a, auto& b) {
      return a.second.freed_at < b.second.freed_at;
    });
    Held& held = oldest->second;
    const int64_t excess = round_up(stats_.bytes_held - bytes, kHugePage);
    const int64_t kept = std::max<int64_t>(held.resident - excess, 0) / kHugePage * kHugePage;
    if (kept == 0) {
      drop(oldest);
      continue;
    }
    discard(static_cast<char*>(held.block) + kept, held.resident - kept);
    stats_.bytes_held -= held.resident - kept;
    held.resident = kept;
  }
  holds_ = !held_.empty();
}

}  // namespace moe_ext::cpu::memory
