// Vectors of the unit's width: arithmetic by the compiler's vector extension. Everything below has
// internal linkage: a function compiled for one instruction set must never be picked by the linker
// for another unit.
//
// The vector extension serves every instruction set and type from one source, and intrinsics stand
// only where it has no word (convert.h, shuffle.h, gemm/operands.h). Highway would do the same as a
// dependency that takes longer to compile than all of this; at::vec brings torch's headers, which
// the kernels do without, and has no product of bf16 pairs; oneDNN's microkernels are not exported
// by torch's library, and neither gather rows nor leave the sums in registers for an epilogue.
//
// A unit says what it may use by MOE_AVX2, MOE_AVX512, MOE_AVX512_BF16: g++ before 13 does not
// define its own macros after a target pragma.
#pragma once

#include <cstdint>
#include <utility>

#include "cpu/kernels/kernels.h"

#if defined(MOE_AVX512)
#define MOE_VECTOR_BYTES 64
#elif defined(MOE_AVX2)
#define MOE_VECTOR_BYTES 32
#else
#define MOE_VECTOR_BYTES 16
#endif
#if defined(MOE_AVX2)
// GCC 12 warns of its own header's deliberately undefined registers.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif

#include <cmath>

#define MOE_INLINE inline __attribute__((always_inline))
#define MOE_NOINLINE __attribute__((noinline))

namespace moe_ext::cpu::kernels {
namespace {

MOE_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
MOE_INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

template <class T>
struct Lanes;
template <>
struct Lanes<float> {
  using Int = int32_t;
};
template <>
struct Lanes<double> {
  using Int = int64_t;
};

template <class T>
struct Vec {
  static constexpr int kLanes = MOE_VECTOR_BYTES / sizeof(T);
  using Scalar = T;
  using Int = typename Lanes<T>::Int;
  typedef T Reg __attribute__((vector_size(MOE_VECTOR_BYTES)));
  typedef Int IntReg __attribute__((vector_size(MOE_VECTOR_BYTES)));

  Reg v;

  Vec() = default;
  MOE_INLINE Vec(Reg v) : v(v) {}
  MOE_INLINE explicit Vec(double x) : v(broadcast(static_cast<T>(x))) {}
  // Subtracting zero changes no number, so it compiles to a bare broadcast (adding it would not).
  static MOE_INLINE Reg broadcast(T x) { return x - Reg{}; }
  MOE_INLINE IntReg bits() const { return reinterpret_cast<IntReg>(v); }
  static MOE_INLINE Vec from_bits(IntReg bits) { return reinterpret_cast<Reg>(bits); }
};

template <class T>
struct Mask {
  typename Vec<T>::IntReg v;
};

#define MOE_VEC_OPERATOR(op)                                      \
  template <class T>                                              \
  MOE_INLINE Vec<T> operator op(Vec<T> a, Vec<T> b) {             \
    return Vec<T>(static_cast<typename Vec<T>::Reg>(a.v op b.v)); \
  }
MOE_VEC_OPERATOR(+)
MOE_VEC_OPERATOR(-)
MOE_VEC_OPERATOR(*)
MOE_VEC_OPERATOR(/)
#undef MOE_VEC_OPERATOR
template <class T>
MOE_INLINE Vec<T> operator-(Vec<T> a) {
  return Vec<T>(-a.v);
}
template <class T>
MOE_INLINE Mask<T> operator<(Vec<T> a, Vec<T> b) {
  return {a.v < b.v};
}
template <class T>
MOE_INLINE Mask<T> operator>(Vec<T> a, Vec<T> b) {
  return {a.v > b.v};
}
template <class T>
MOE_INLINE Mask<T> is_nan(Vec<T> a) {
  return {a.v != a.v};
}
template <class T>
MOE_INLINE Mask<T> operator|(Mask<T> a, Mask<T> b) {
  return {a.v | b.v};
}
template <class T>
MOE_INLINE Mask<T> operator&(Mask<T> a, Mask<T> b) {
  return {a.v & b.v};
}
template <class T>
MOE_INLINE Mask<T> operator~(Mask<T> a) {
  return {~a.v};
}
// Lanes 0 to n - 1.
template <class T, int... Lane>
MOE_INLINE Mask<T> lanes_below(int64_t n, std::integer_sequence<int, Lane...>) {
  const typename Vec<T>::IntReg lane = {Lane...};
  return {lane < static_cast<typename Vec<T>::Int>(n)};
}
template <class T>
MOE_INLINE Mask<T> lanes_below(int64_t n) {
  return lanes_below<T>(n, std::make_integer_sequence<int, Vec<T>::kLanes>());
}
// Bit i is set where lane i is.
template <class T>
MOE_INLINE uint64_t lane_bits(Mask<T> mask) {
#if defined(MOE_AVX512)
  if constexpr (sizeof(T) == 4) return _mm512_movepi32_mask(reinterpret_cast<__m512i>(mask.v));
  if constexpr (sizeof(T) == 8) return _mm512_movepi64_mask(reinterpret_cast<__m512i>(mask.v));
#elif defined(MOE_AVX2)
  if constexpr (sizeof(T) == 4) return _mm256_movemask_ps(reinterpret_cast<__m256>(mask.v));
  if constexpr (sizeof(T) == 8) return _mm256_movemask_pd(reinterpret_cast<__m256d>(mask.v));
#else
  uint64_t bits = 0;
  for (int i = 0; i < Vec<T>::kLanes; ++i) bits |= static_cast<uint64_t>(mask.v[i] & 1) << i;
  return bits;
#endif
}
template <class T>
MOE_INLINE Vec<T> select(Mask<T> mask, Vec<T> a, Vec<T> b) {
  return Vec<T>(mask.v ? a.v : b.v);
}

// a * b + c, rounded once where the machine can. Left to itself, the compiler contracts some copies
// of a loop's body and not others, and the rows that they serve differ in their bits.
template <class Reg>
MOE_INLINE Reg fused_multiply_add(Reg a, Reg b, Reg c) {
#if defined(MOE_AVX512)
  if constexpr (sizeof(a[0]) == 8) {
    return reinterpret_cast<Reg>(_mm512_fmadd_pd(
        reinterpret_cast<__m512d>(a), reinterpret_cast<__m512d>(b), reinterpret_cast<__m512d>(c)));
  } else {
    return reinterpret_cast<Reg>(_mm512_fmadd_ps(
        reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b), reinterpret_cast<__m512>(c)));
  }
#elif defined(MOE_AVX2)
  if constexpr (sizeof(a[0]) == 8) {
    return reinterpret_cast<Reg>(_mm256_fmadd_pd(
        reinterpret_cast<__m256d>(a), reinterpret_cast<__m256d>(b), reinterpret_cast<__m256d>(c)));
  } else {
    return reinterpret_cast<Reg>(_mm256_fmadd_ps(
        reinterpret_cast<__m256>(a), reinterpret_cast<__m256>(b), reinterpret_cast<__m256>(c)));
  }
#else
  return a * b + c;
#endif
}
template <class T>
MOE_INLINE Vec<T> multiply_add(Vec<T> a, Vec<T> b, Vec<T> c) {
  return Vec<T>(fused_multiply_add(a.v, b.v, c.v));
}

template <class T>
MOE_INLINE T sum(Vec<T> x) {
#if defined(MOE_AVX512)
  if constexpr (sizeof(T) == 4) return _mm512_reduce_add_ps(x.v);
  if constexpr (sizeof(T) == 8) return _mm512_reduce_add_pd(x.v);
#endif
  T lane[Vec<T>::kLanes];
  __builtin_memcpy(lane, &x.v, sizeof(lane));
  for (int half = Vec<T>::kLanes / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) lane[i] += lane[i + half];
  }
  return lane[0];
}

}  // namespace
}  // namespace moe_ext::cpu::kernels
