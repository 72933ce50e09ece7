// The operands of a product, block by block along k, from memory through registers to shared
// memory.
#pragma once

#include "cuda/kernels/device.cuh"

namespace moe_ext::cuda::kernels {

// How an operand is stored. A format has
//   Number    what is multiplied
//   Stored    an element in memory
//   decode    of a pack as it was read, the numbers
// Registers hold packs as they were read; they are decoded on their way to shared memory, so that
// reading waits for no arithmetic.
template <class T>
struct Dense {
  using Number = T;
  using Stored = T;
  template <int kCount>
  static __device__ Pack<T, kCount> decode(const Pack<T, kCount>& pack) {
    return pack;
  }
};

// An operand of a tile: element (i, k) is data[i * stride + k] if k is dense, else
// data[k * stride + i].
template <class Format>
struct Operand {
  const typename Format::Stored* data;
  int64_t rows;    // i is below it; others count as zeros
  int64_t stride;  // of the dimension that is not dense
  bool is_packed;  // a pack may be read at once
};

// Whether the weights of a product may be read by packs.
inline bool are_weights_aligned(const ProductArgs& args) {
  const int64_t size = size_of(args.groups.type);
  const int64_t stride = args.k_stride == 1 ? args.n_stride : args.k_stride;
  return is_aligned(args.weights, stride, size) &&
         is_aligned(args.weights, args.expert_stride, size);
}

// Rows in shared memory are a pack longer than they are wide, so that a column of them lies in
// different banks.
template <class T>
constexpr int padded(int width) {
  return width + kPackOf<T>;
}

// A block of kTile x kBlockK: from memory by `load`, to shared memory by `store`, there as [k][i]
// if k was not dense or the engine wants it (kWantsKOuter), else as [i][k].
template <class Format, int kTile, int kBlockK, bool kKDense, bool kWantsKOuter>
struct Loader {
  using Number = typename Format::Number;
  using Stored = typename Format::Stored;
  static constexpr int kPack = kPackOf<Number>;
  static constexpr int kInner = kKDense ? kBlockK : kTile;
  static constexpr int kOuter = kKDense ? kTile : kBlockK;
  static constexpr int kCount = kInner * kOuter / kPack / kThreads;
  static constexpr bool kTransposes = kKDense && kWantsKOuter;
  static constexpr int kStride = padded<Number>(kTransposes ? kOuter : kInner);
  static constexpr int kElements = (kTransposes ? kInner : kOuter) * kStride;
  static_assert(kCount * kPack * kThreads == kInner * kOuter, "every thread as many");

  Pack<Stored, kPack> packs[kCount];

  static __device__ int outer(int i) { return (i * kThreads + threadIdx.x) / (kInner / kPack); }
  static __device__ int inner(int i) {
    return (i * kThreads + threadIdx.x) % (kInner / kPack) * kPack;
  }

  // The block from k0 on; the operand ends at K.
  __device__ void load(const Operand<Format>& from, int64_t k0, int64_t K) {
    const int64_t rest = K - k0;
    const int64_t most_outer = kKDense ? from.rows : rest, most_inner = kKDense ? rest : from.rows;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      packs[i] = {};
      if (outer(i) >= most_outer) continue;
      const Stored* data = from.data +
                           (kKDense ? outer(i) * from.stride + k0 : (k0 + outer(i)) * from.stride) +
                           inner(i);
      if (from.is_packed && inner(i) + kPack <= most_inner) {
        packs[i] = *reinterpret_cast<const Pack<Stored, kPack>*>(data);
      } else {
#pragma unroll
        for (int j = 0; j < kPack; ++j) {
          if (inner(i) + j < most_inner) packs[i].values[j] = data[j];
        }
      }
    }
  }

  __device__ void store(Number* block) const {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const Pack<Number, kPack> numbers = Format::decode(packs[i]);
      if constexpr (kTransposes) {
#pragma unroll
        for (int j = 0; j < kPack; ++j) {
          block[(inner(i) + j) * kStride + outer(i)] = numbers.values[j];
        }
      } else {
        *reinterpret_cast<Pack<Number, kPack>*>(block + outer(i) * kStride + inner(i)) = numbers;
      }
    }
  }
};

}  // namespace moe_ext::cuda::kernels
