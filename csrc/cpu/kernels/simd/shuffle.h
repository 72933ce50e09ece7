// Lanes exchanged within and between vectors.
#pragma once

#include <utility>

#include "cpu/kernels/simd/vec.h"

namespace moe_ext::cpu::kernels {
namespace {

// One exchange of blocks of Step lanes between a and b. Of the result, every other block of Step
// lanes comes from b, and kHigh says whether from the blocks of a and b that are even or odd.
template <int Step, bool kHigh, class Reg, int... Lane>
MOE_INLINE Reg exchange(Reg a, Reg b, std::integer_sequence<int, Lane...>) {
  constexpr int kLanes = sizeof...(Lane);
  constexpr int kShift = kHigh ? Step : 0;
  return __builtin_shufflevector(a, b, ((Lane & Step ? kLanes + Lane - Step : Lane) + kShift)...);
}
template <int Step, class Reg, int kLanes>
MOE_INLINE void transpose_round(Reg (&rows)[kLanes]) {
  constexpr auto kLane = std::make_integer_sequence<int, kLanes>();
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    if (i & Step) continue;
    const Reg low = exchange<Step, false>(rows[i], rows[i + Step], kLane);
    rows[i + Step] = exchange<Step, true>(rows[i], rows[i + Step], kLane);
    rows[i] = low;
  }
  if constexpr (Step * 2 < kLanes) transpose_round<Step * 2>(rows);
}
// Transposes a square of kLanes vectors in place: rounds of exchanges, each of twice the lanes.
template <class Reg, int kLanes>
MOE_INLINE void transpose(Reg (&rows)[kLanes]) {
  transpose_round<1>(rows);
}

template <class Few, class Reg>
MOE_INLINE Few first_lanes(Reg x) {
  Few few;
  __builtin_memcpy(&few, &x, sizeof(few));
  return few;
}

// Lane 0 of fn over all lanes, pair by pair.
template <int Step = 1, class T, class Fn>
MOE_INLINE T fold(Vec<T> x, const Fn& fn) {
  constexpr auto kLane = std::make_integer_sequence<int, Vec<T>::kLanes>();
  const Vec<T> other(exchange<Step, true>(x.v, x.v, kLane));
  x = fn(Vec<T>(exchange<Step, false>(x.v, x.v, kLane)), other);
  if constexpr (Step * 2 < Vec<T>::kLanes) return fold<Step * 2>(x, fn);
  return x.v[0];
}

// Lane i is the sum of all lanes of x[i], for i < kCount, a power of two.
template <int Step = 1, class Reg, int kCount>
MOE_INLINE Reg lane_sums(const Reg (&x)[kCount]) {
  constexpr int kLanes = sizeof(Reg) / sizeof(x[0][0]);
  constexpr auto kLane = std::make_integer_sequence<int, kLanes>();
  if constexpr (Step == kLanes) {
    return x[0];
  } else {
    Reg sum[(kCount + 1) / 2];
#pragma GCC unroll 4
    for (int i = 0; i < kCount; i += 2) {
      const Reg& other = x[kCount > 1 ? i + 1 : i];
      sum[i / 2] =
          exchange<Step, false>(x[i], other, kLane) + exchange<Step, true>(x[i], other, kLane);
    }
    return lane_sums<Step * 2>(sum);
  }
}

#if defined(MOE_AVX512)
// 16 x 16: squares of 4 x 4 within the 128-bit lanes, then the lanes. Every shuffle here is one
// instruction; the general form above needs index registers.
template <class Reg>
MOE_INLINE void transpose(Reg (&rows)[16]) {
  __m512i r[16];
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    const auto row = [&](int j) { return reinterpret_cast<__m512i>(rows[i + j]); };
    const __m512i a = _mm512_unpacklo_epi32(row(0), row(1));
    const __m512i b = _mm512_unpackhi_epi32(row(0), row(1));
    const __m512i c = _mm512_unpacklo_epi32(row(2), row(3));
    const __m512i d = _mm512_unpackhi_epi32(row(2), row(3));
    r[i] = _mm512_unpacklo_epi64(a, c);
    r[i + 1] = _mm512_unpackhi_epi64(a, c);
    r[i + 2] = _mm512_unpacklo_epi64(b, d);
    r[i + 3] = _mm512_unpackhi_epi64(b, d);
  }
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const __m512i a = _mm512_shuffle_i32x4(r[j], r[4 + j], 0x88);
    const __m512i b = _mm512_shuffle_i32x4(r[j], r[4 + j], 0xdd);
    const __m512i c = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0x88);
    const __m512i d = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0xdd);
    rows[j] = reinterpret_cast<Reg>(_mm512_shuffle_i32x4(a, c, 0x88));
    rows[4 + j] = reinterpret_cast<Reg>(_mm512_shuffle_i32x4(b, d, 0x88));
    rows[8 + j] = reinterpret_cast<Reg>(_mm512_shuffle_i32x4(a, c, 0xdd));
    rows[12 + j] = reinterpret_cast<Reg>(_mm512_shuffle_i32x4(b, d, 0xdd));
  }
}
#endif

}  // namespace
}  // namespace moe_ext::cpu::kernels
