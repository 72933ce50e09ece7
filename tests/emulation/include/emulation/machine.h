// A block on the host: every thread is a fiber, and they go on one after the other until they wait.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

namespace emulation {

constexpr int kWarp = 32;
constexpr size_t kStack = 128 << 10;

// Fibers serve one block after the other. Its context is to begin with; then fiber and scheduler
// jump, since changing contexts calls the system.
struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStack]};
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
  std::vector<Meeting> warps;
  Meeting all;
  jmp_buf scheduler;
  int current = 0;
  std::function<void()> body;
};

inline Block* block = nullptr;
inline std::vector<std::unique_ptr<Fiber>> fibers;

inline void yield() {
  if (_setjmp(fibers[block->current]->place) == 0) _longjmp(block->scheduler, 1);
}

// Goes on with a fiber until it yields.
inline void resume(Fiber& fiber) {
  if (_setjmp(block->scheduler) != 0) return;
  if (fiber.started) _longjmp(fiber.place, 1);
  fiber.started = true;
  setcontext(&fiber.context);
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
  for (;;) {
    block->body();
    fibers[block->current]->done = true;
    for (Meeting* meeting : {&warp(), &block->all}) {
      --meeting->size;
      release_if_complete(*meeting);
    }
    yield();  // until the next block
  }
}

inline void run_block(int count, const std::function<void()>& body) {
  Block b;
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
    if (static_cast<int>(fibers.size()) <= i) {
      fibers.emplace_back(new Fiber);
      ucontext_t& context = fibers[i]->context;
      getcontext(&context);
      context.uc_stack.ss_sp = fibers[i]->stack.get();
      context.uc_stack.ss_size = kStack;
      context.uc_link = nullptr;
      makecontext(&context, enter, 0);
    }
    fibers[i]->done = false;
  }
  for (int left = count; left > 0;) {
    for (b.current = 0; b.current < count; ++b.current) {
      Fiber& fiber = *fibers[b.current];
      if (fiber.done) continue;
      resume(fiber);
      left -= fibers[b.current]->done;
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
constexpr size_t kSharedAlignment = 128;

}  // namespace emulation
