// Runs CUDA kernels on the host: every thread of a block is a fiber, one block after the other.
//
// A kernel's source is included after this header and compiled by the host's compiler, so that its
// indices, barriers and shuffles can be tested, under sanitizers too, on a machine without a GPU.
// It knows what the kernels here use and no more: one-dimensional blocks, shared memory,
// __syncthreads, the warp's shuffles and votes with a full mask, the tensor cores' fragments. A
// thread that leaves counts as arrived.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <type_traits>
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

inline int __ffs(int bits) { return __builtin_ffs(bits); }
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }

template <class T>
T atomicAdd(T* at, T value) {
  const T before = *at;
  *at += value;
  return before;
}

struct __nv_bfloat16 {
  uint16_t bits;
};
struct __half {
  _Float16 value;
};
inline float __bfloat162float(__nv_bfloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float result;
  std::memcpy(&result, &bits, 4);
  return result;
}
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if (x != x) return {0x7fff};
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
inline float __half2float(__half x) { return static_cast<float>(x.value); }
inline __half __float2half_rn(float x) { return {static_cast<_Float16>(x)}; }

inline void cudaMemsetAsync(void* data, int value, size_t bytes, cudaStream_t) {
  std::memset(data, value, bytes);
}

// Lane 0 holds the whole of a fragment and does all its work.
namespace nvcuda::wmma {

struct matrix_a {};
struct matrix_b {};
struct accumulator {};
struct row_major {};
struct col_major {};
enum layout_t { mem_row_major };
namespace precision {
struct tf32 {};
}  // namespace precision

inline float number(float x) { return x; }
inline float number(__nv_bfloat16 x) { return __bfloat162float(x); }
inline float number(__half x) { return __half2float(x); }

// Rounded to 10 bits, ties away from zero.
inline float __float_to_tf32(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  bits = (bits + 0x1000) & ~uint32_t(0x1fff);
  std::memcpy(&x, &bits, 4);
  return x;
}

// x[i * K + k] of either operand, x[i * 16 + j] of a sum.
template <class Use, int M, int N, int K, class Number, class Layout = void>
struct fragment {
  static constexpr int num_elements = std::is_same_v<Use, accumulator> ? M * N : M * K;
  static_assert(M == 16 && N == 16);
  float x[num_elements];
};

template <class Fragment>
void fill_fragment(Fragment& fragment, float value) {
  std::fill_n(fragment.x, Fragment::num_elements, value);
}

template <class Use, int K, class Number, class Layout, class T>
void load_matrix_sync(fragment<Use, 16, 16, K, Number, Layout>& to, const T* from, unsigned ld) {
  if (reinterpret_cast<uintptr_t>(from) % 32 != 0 || ld * sizeof(T) % 16 != 0) std::abort();
  if (emulation::lane() != 0) return;
  const bool k_dense = std::is_same_v<Use, matrix_a> == std::is_same_v<Layout, row_major>;
  for (int i = 0; i < 16; ++i) {
    for (int k = 0; k < K; ++k) to.x[i * K + k] = number(from[k_dense ? i * ld + k : k * ld + i]);
  }
}

template <int K, class Number, class A, class B>
void mma_sync(
    fragment<accumulator, 16, 16, K, float>& d, const fragment<matrix_a, 16, 16, K, Number, A>& a,
    const fragment<matrix_b, 16, 16, K, Number, B>& b,
    const fragment<accumulator, 16, 16, K, float>& c) {
  if (emulation::lane() != 0) return;
  for (int i = 0; i < 16; ++i) {
    for (int j = 0; j < 16; ++j) {
      float sum = c.x[i * 16 + j];
      for (int k = 0; k < K; ++k) sum += a.x[i * K + k] * b.x[j * K + k];
      d.x[i * 16 + j] = sum;
    }
  }
}

template <int K>
void store_matrix_sync(
    float* to, const fragment<accumulator, 16, 16, K, float>& from, unsigned ld, layout_t) {
  if (reinterpret_cast<uintptr_t>(to) % 32 != 0 || ld % 4 != 0) std::abort();
  __syncwarp();
  if (emulation::lane() != 0) return;
  for (int i = 0; i < 256; ++i) to[i / 16 * ld + i % 16] = from.x[i];
}

}  // namespace nvcuda::wmma

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
    const uint64_t bits = end_bit < 64 ? (uint64_t(1) << end_bit) - 1 : ~uint64_t(0);
    const auto key = [&](int i) { return keys[i] & bits; };
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
    // NaN, not zeros.
    emulation::shared_memory.assign(shared + emulation::kSharedAlignment, static_cast<char>(0xff));
    emulation::run_block(threads, [&] { kernel(args...); });
  }
}

inline char* dynamic_shared() {
  const auto at = reinterpret_cast<uintptr_t>(emulation::shared_memory.data());
  constexpr uintptr_t kAlignment = emulation::kSharedAlignment;
  return reinterpret_cast<char*>((at + kAlignment - 1) / kAlignment * kAlignment);
}

}  // namespace moe_ext::cuda
