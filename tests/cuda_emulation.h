// Runs CUDA kernels on the host: every thread of a block is a fiber, one block after the other.
//
// A kernel's source is included after this header and compiled by the host's compiler, so that its
// indices, barriers and shuffles can be tested, under sanitizers too, on a machine without a GPU.
// It knows what the kernels here use and no more: one-dimensional blocks, shared memory,
// __syncthreads, the warp's shuffles and votes with a full mask. A thread that leaves counts as
// arrived.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __restrict__
#define __launch_bounds__(...)
#define __shared__ static
#define MOE_EXT_CUDA_EMULATION

using cudaStream_t = void*;

namespace emulation {

constexpr int kWarp = 32;
constexpr size_t kStack = 128 << 10;

struct Fiber {
  ucontext_t context;  // to begin with; then the two jump, since swapcontext calls the system
  jmp_buf place;
  bool started = false;
  bool done = false;
};

// A meeting of `size` threads. Values are kept for two meetings, since a thread may come to the
// next one before another has read what was said in this one.
struct Meeting {
  int size = 0, arrived = 0;
  uint64_t generation = 0;
  std::vector<uint64_t> said[2];
};

struct Block {
  std::vector<Fiber> fibers;
  std::vector<Meeting> warps;
  Meeting all;
  jmp_buf scheduler;
  int current = 0;
  std::function<void()> body;
};

inline Block* block = nullptr;

inline void yield() {
  if (_setjmp(block->fibers[block->current].place) == 0) _longjmp(block->scheduler, 1);
}

inline void release_if_complete(Meeting& meeting) {
  if (meeting.size > 0 && meeting.arrived == meeting.size) {
    meeting.arrived = 0;
    ++meeting.generation;
  }
}

// Waits for everybody; the values of this meeting, by place.
inline const std::vector<uint64_t>& meet(Meeting& meeting, int place, uint64_t value) {
  const uint64_t mine = meeting.generation;
  std::vector<uint64_t>& said = meeting.said[mine % 2];
  said[place] = value;
  ++meeting.arrived;
  release_if_complete(meeting);
  while (meeting.generation == mine) yield();
  return said;
}

inline int lane() { return block->current % kWarp; }
inline Meeting& warp() { return block->warps[block->current / kWarp]; }

template <class T>
T exchange(T value, int from) {
  static_assert(sizeof(T) <= 8, "one register");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  const auto& said = meet(warp(), lane(), bits);
  T result;
  std::memcpy(&result, &said[from], sizeof(T));
  return result;
}

inline void enter() {
  Block& b = *block;
  b.body();
  Fiber& fiber = b.fibers[b.current];
  fiber.done = true;
  Meeting& mine = warp();
  --mine.size;
  release_if_complete(mine);
  --b.all.size;
  release_if_complete(b.all);
  _longjmp(b.scheduler, 1);
}

inline std::vector<std::unique_ptr<char[]>> stacks;  // of all blocks, one after the other

inline void run_block(int count, const std::function<void()>& body) {
  Block b;
  b.fibers = std::vector<Fiber>(count);
  b.warps = std::vector<Meeting>((count + kWarp - 1) / kWarp);
  for (int i = 0; i < count; ++i) ++b.warps[i / kWarp].size;
  for (Meeting& warp : b.warps) {
    for (auto& said : warp.said) said.resize(kWarp);
  }
  b.all.size = count;
  for (auto& said : b.all.said) said.resize(count);
  b.body = body;
  block = &b;
  for (int i = 0; i < count; ++i) {
    Fiber& fiber = b.fibers[i];
    if (static_cast<int>(stacks.size()) <= i) stacks.emplace_back(new char[kStack]);
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = stacks[i].get();
    fiber.context.uc_stack.ss_size = kStack;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, enter, 0);
  }
  for (int left = count; left > 0;) {
    for (b.current = 0; b.current < count; ++b.current) {
      Fiber& fiber = b.fibers[b.current];
      if (fiber.done) continue;
      if (_setjmp(b.scheduler) == 0) {
        if (fiber.started) _longjmp(fiber.place, 1);
        fiber.started = true;
        setcontext(&fiber.context);
      }
      left -= b.fibers[b.current].done;
    }
  }
  block = nullptr;
}

struct Index {
  unsigned x;
};
inline Index grid_size, block_size, block_index;
inline Index thread_index() { return {static_cast<unsigned>(block->current)}; }
inline std::vector<char> shared_memory;

}  // namespace emulation

#define threadIdx (emulation::thread_index())
#define blockIdx (emulation::block_index)
#define blockDim (emulation::block_size)
#define gridDim (emulation::grid_size)

inline void __syncthreads() {
  emulation::meet(emulation::block->all, emulation::block->current, 0);
}
inline void __syncwarp(unsigned = ~0u) { emulation::exchange(0, 0); }

template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return emulation::exchange(value, emulation::lane() ^ mask);
}
template <class T>
T __shfl_sync(unsigned, T value, int from) {
  return emulation::exchange(value, from % emulation::kWarp);
}
template <class T>
T __shfl_up_sync(unsigned, T value, int by) {
  const int lane = emulation::lane();
  return emulation::exchange(value, lane >= by ? lane - by : lane);
}
template <class T>
T __shfl_down_sync(unsigned, T value, int by) {
  const int lane = emulation::lane();
  return emulation::exchange(value, lane + by < emulation::kWarp ? lane + by : lane);
}
inline unsigned __ballot_sync(unsigned, bool vote) {
  const auto& said = emulation::meet(emulation::warp(), emulation::lane(), vote);
  unsigned bits = 0;
  for (int i = 0; i < emulation::kWarp; ++i) bits |= static_cast<unsigned>(said[i]) << i;
  return bits;
}

template <class T>
T atomicAdd(T* at, T value) {
  const T before = *at;
  *at += value;
  return before;
}

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  _Float16 value;
};
inline float __bfloat162float(BFloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float result;
  std::memcpy(&result, &bits, 4);
  return result;
}
inline BFloat16 __float2bfloat16_rn(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if (x != x) return {0x7fff};
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
inline float __half2float(Half x) { return static_cast<float>(x.value); }
inline Half __float2half_rn(float x) { return {static_cast<_Float16>(x)}; }

inline void cudaMemsetAsync(void* data, int value, size_t bytes, cudaStream_t) {
  std::memset(data, value, bytes);
}

// What CUB does is taken for granted.
namespace cub {
struct DeviceRadixSort {
  template <class Key, class Value>
  static void SortPairs(
      void* workspace, size_t& bytes, const Key* keys, Key* sorted_keys, const Value* values,
      Value* sorted_values, int count, int, int end_bit, cudaStream_t = nullptr) {
    bytes = 1;
    if (!workspace) return;
    std::vector<int> order(count);
    for (int i = 0; i < count; ++i) order[i] = i;
    const auto key = [&](int i) { return keys[i] & ((uint64_t(1) << end_bit) - 1); };
    std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return key(a) < key(b); });
    for (int i = 0; i < count; ++i) {
      sorted_keys[i] = keys[order[i]];
      sorted_values[i] = values[order[i]];
    }
  }
};
}  // namespace cub

namespace moe_ext::cuda {

template <class... Params, class... Args>
void launch(
    void (*kernel)(Params...), int64_t blocks, int threads, size_t shared, cudaStream_t,
    Args... args) {
  emulation::grid_size = {static_cast<unsigned>(blocks)};
  emulation::block_size = {static_cast<unsigned>(threads)};
  for (int64_t i = 0; i < blocks; ++i) {
    emulation::block_index = {static_cast<unsigned>(i)};
    emulation::shared_memory.assign(shared, static_cast<char>(0xff));  // NaN, not zeros
    emulation::run_block(threads, [&] { kernel(args...); });
  }
}

inline char* dynamic_shared() { return emulation::shared_memory.data(); }

}  // namespace moe_ext::cuda
