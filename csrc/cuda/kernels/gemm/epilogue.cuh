// From an engine's sums to memory.
#pragma once

#include "cuda/kernels/device.cuh"

namespace moe_ext::cuda::kernels {

// A tile of the result: `rows` and `columns` of it, rows `stride` apart.
template <class Engine, class T = typename Engine::Number>
__device__ void write_tile(
    const Engine& engine, char* scratch, T* out, int64_t rows, int64_t columns, int64_t stride,
    bool is_packed) {
  using Sum = typename Engine::Sum;
  constexpr int kPack = kPackOf<T>;
  engine.each_vector(scratch, [&](int m, int n, const Sum* values) {
    if (m >= rows) return;
    Pack<T, kPack>* to = reinterpret_cast<Pack<T, kPack>*>(out + m * stride + n);
#pragma unroll
    for (int first = 0; first < Engine::kVectorN; first += kPack) {
      Pack<T, kPack> pack;
#pragma unroll
      for (int j = 0; j < kPack; ++j) {
        pack.values[j] = narrow<T>(values[first + j]);
      }
      if (is_packed && n + first + kPack <= columns) {
        to[first / kPack] = pack;
      } else {
#pragma unroll
        for (int j = 0; j < kPack; ++j) {
          if (n + first + j < columns) out[m * stride + n + first + j] = pack.values[j];
        }
      }
    }
  });
}

}  // namespace moe_ext::cuda::kernels
