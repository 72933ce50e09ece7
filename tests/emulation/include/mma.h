// The tensor cores' fragments: lane 0 holds the whole of one and does all its work.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <type_traits>

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
