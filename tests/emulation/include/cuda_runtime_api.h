// CUDA's runtime for kernels that run on the host: one block after the other, each thread a fiber.
//
// The folder of this header comes first on the include path, so that the kernels' sources are
// compiled by the host's compiler as they are, and their indices, barriers and shuffles can be
// tested, under sanitizers too, on a machine without a GPU. It knows what the kernels here use and
// no more: one-dimensional blocks, shared memory, __syncthreads, the warp's shuffles and votes with
// a full mask, the tensor cores' fragments. A thread that leaves counts as arrived.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "emulation/machine.h"

#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)
#define __shared__ static

using cudaStream_t = void*;

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

inline void cudaMemsetAsync(void* data, int value, size_t bytes, cudaStream_t) {
  std::memset(data, value, bytes);
}

// As which GPU the emulation goes: its compute capability's major number.
enum { cudaDevAttrComputeCapabilityMajor };
inline int cudaDeviceGetAttribute(int* value, int, int) {
  const char* major = std::getenv("MOE_EXT_EMULATED_MAJOR");
  *value = major ? std::atoi(major) : 8;
  return 0;
}
