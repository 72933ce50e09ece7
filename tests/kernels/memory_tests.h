// The tests of the cache of large blocks: what it reports, threads, fork.
#pragma once

#include <cstring>
#include <new>
#include <thread>

#ifdef __linux__
#include <sys/wait.h>
#include <unistd.h>
#endif

#include "cpu/memory/block_cache.h"
#include "harness.h"

namespace memory_tests {

using harness::expect;
using moe_ext::cpu::memory::BlockCache;

constexpr int64_t kMiB = 1 << 20;

// Blocks of `thread`, whose bytes nobody else may write, allocated and freed at random.
inline void use_blocks(int thread, int rounds) {
  BlockCache& cache = BlockCache::instance();
  std::mt19937 random(thread);
  struct Block {
    char* at;
    int64_t bytes;
    char mark;
  };
  std::vector<Block> blocks;
  const auto free_one = [&] {
    const Block block = blocks.back();
    blocks.pop_back();
    for (const int64_t place : {int64_t{0}, block.bytes / 2, block.bytes - 1}) {
      expect(block.at[place] == block.mark, "memory: a block in use was given to another");
    }
    cache.free(block.at);
  };
  for (int round = 0; round < rounds; ++round) {
    if (blocks.size() == 4) free_one();
    const int64_t bytes = kMiB + static_cast<int64_t>(random() % (4 * kMiB));
    Block block{static_cast<char*>(cache.allocate(bytes)), bytes, static_cast<char>(random())};
    expect(reinterpret_cast<uintptr_t>(block.at) % 4096 == 0, "memory: alignment");
    for (const int64_t place : {int64_t{0}, bytes / 2, bytes - 1}) block.at[place] = block.mark;
    blocks.push_back(block);
    if (random() % 16 == 0) cache.empty();
    if (random() % 16 == 0) cache.set_limit(random() % 2 ? 3 * kMiB : INT64_MAX);
    if (random() % 2) std::swap(blocks.front(), blocks.back());
    if (random() % 3 == 0) free_one();
  }
  while (!blocks.empty()) free_one();
}

inline void test_threads(int threads) {
  std::vector<std::thread> team;
  for (int i = 0; i < threads; ++i) team.emplace_back(use_blocks, i, 300);
#ifdef __linux__
  for (int i = 0; i < 10; ++i) {  // while the others hold the lock every now and then
    const pid_t child = fork();
    if (child == 0) {
      use_blocks(100, 20);
      _exit(harness::failures != 0);
    }
    int status = 0;
    waitpid(child, &status, 0);
    expect(WIFEXITED(status) && WEXITSTATUS(status) == 0, "memory: a forked child failed");
  }
#endif
  for (std::thread& thread : team) thread.join();
  BlockCache& cache = BlockCache::instance();
  cache.set_limit(INT64_MAX);
  expect(cache.stats().bytes_in_use == 0, "memory: bytes in use after all were freed");
  cache.empty();
  expect(cache.stats().bytes_held == 0, "memory: bytes held after empty");
}

inline void test_reuse() {
  BlockCache& cache = BlockCache::instance();
  // A peak of the process below which all that follows can be held.
  char* peak = static_cast<char*>(cache.allocate(256 * kMiB));
  std::memset(peak, 1, 256 * kMiB);
  cache.free(peak);
  cache.empty();

  const BlockCache::Stats before = cache.stats();
  void* first = cache.allocate(20 * kMiB);
  void* second = cache.allocate(8 * kMiB + 1);
  expect(cache.size_of(second) == 8 * kMiB + 4096, "memory: size of a block");
  BlockCache::Stats stats = cache.stats();
  expect(stats.bytes_in_use == 28 * kMiB + 4096, "memory: bytes in use");
  expect(stats.misses == before.misses + 2 && stats.hits == before.hits, "memory: misses");
  std::memset(first, 2, 20 * kMiB);
  cache.free(first);
  stats = cache.stats();
  expect(stats.bytes_in_use == 8 * kMiB + 4096, "memory: bytes in use after a free");
  expect(stats.bytes_held == 20 * kMiB, "memory: bytes held");
  expect(cache.allocate(19 * kMiB) == first, "memory: a little less is served by the same block");
  expect(cache.stats().hits == before.hits + 1, "memory: hits");
  cache.free(first);
  void* other = cache.allocate(10 * kMiB);
  expect(other != first, "memory: half of a block would waste the other half");
  cache.free(other);

  cache.set_limit(12 * kMiB);
  expect(cache.stats().bytes_held <= 12 * kMiB, "memory: more held than the limit");
  cache.set_limit(0);
  expect(cache.stats().bytes_held == 0, "memory: held with a limit of 0");
  cache.free(second);
  expect(cache.stats().bytes_held == 0, "memory: held after a free with a limit of 0");
  cache.set_limit(INT64_MAX);

  // Nobody asks for the large one any more.
  cache.free(cache.allocate(64 * kMiB));
  expect(cache.stats().bytes_held == 64 * kMiB, "memory: the large block is held at first");
  for (int i = 0; i < 200; ++i) cache.free(cache.allocate(2 * kMiB));
  expect(cache.stats().bytes_held <= 2 * kMiB, "memory: a stale block is still held");
  cache.empty();

  bool refused = false;
  try {
    cache.allocate(size_t{1} << 61);
  } catch (const std::bad_alloc&) {
    refused = true;
  }
  expect(refused, "memory: an impossible size was not refused");
}

// What is held stays below the peak that the process has without it.
inline void test_peak() {
  BlockCache& cache = BlockCache::instance();
  moe_ext::cpu::memory::ProcessPeak peak;
  peak.map(100);
  peak.free(100, 0);
  expect(peak.room(100) >= 100, "memory: what was needed once can be held");
  cache.empty();
}

inline void test_all(int threads) {
  test_peak();
  test_reuse();
  test_threads(threads);
}

}  // namespace memory_tests
