// Loads and stores that convert between the stored type and the compute type, rounding to nearest
// even; packed is the register that store writes.
#pragma once

#include "cpu/kernels/simd/vec.h"

namespace moe_ext::cpu::kernels {
namespace {

template <class T>
MOE_INLINE T read_as(const void* p) {
  T value;
  __builtin_memcpy(&value, p, sizeof(T));
  return value;
}

template <class V>
MOE_INLINE V load(const typename V::Scalar* p) {
  return V(read_as<typename V::Reg>(p));
}
template <class S, class T>
MOE_INLINE typename Vec<T>::Reg packed(Vec<T> x, S*) {
  return x.v;
}

typedef uint16_t HalfReg __attribute__((vector_size(MOE_VECTOR_BYTES / 2)));
typedef uint32_t UintReg __attribute__((vector_size(MOE_VECTOR_BYTES)));

MOE_INLINE UintReg widen(HalfReg x) { return __builtin_convertvector(x, UintReg); }
MOE_INLINE HalfReg narrow(UintReg x) { return __builtin_convertvector(x, HalfReg); }

template <class V>
MOE_INLINE V load(const bf16* p) {
  return V(reinterpret_cast<typename V::Reg>(widen(read_as<HalfReg>(p)) << 16));
}
MOE_INLINE HalfReg packed(Vec<float> x, bf16*) {
#if defined(MOE_AVX512_BF16)
  return reinterpret_cast<HalfReg>(_mm512_cvtneps_pbh(x.v));
#else
  const UintReg bits = reinterpret_cast<UintReg>(x.v);
  const UintReg rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return narrow(x.v == x.v ? rounded : (bits >> 16) | 0x40);
#endif
}

template <class V>
MOE_INLINE V load(const f16* p) {
#if defined(MOE_AVX512)
  return V(_mm512_cvtph_ps(read_as<__m256i>(p)));
#elif defined(MOE_AVX2)
  return V(_mm256_cvtph_ps(read_as<__m128i>(p)));
#else
  // The bits of a half, moved to a float's place, are the value times 2^-112: exact for
  // subnormals too. Infinity and NaN need the float's exponent.
  const UintReg half = widen(read_as<HalfReg>(p));
  const UintReg magnitude = (half & 0x7fff) << 13;
  const UintReg scaled = reinterpret_cast<UintReg>(
      reinterpret_cast<typename V::Reg>(magnitude) * 5192296858534827628530496329220096.0f);
  const UintReg value = magnitude >= (0x7c00u << 13) ? magnitude | 0x7f800000u : scaled;
  return V(reinterpret_cast<typename V::Reg>(value | ((half & 0x8000) << 16)));
#endif
}
MOE_INLINE HalfReg packed(Vec<float> x, f16*) {
#if defined(MOE_AVX512)
  constexpr int kRounding = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return reinterpret_cast<HalfReg>(_mm512_cvtps_ph(x.v, kRounding));
#elif defined(MOE_AVX2)
  constexpr int kRounding = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return reinterpret_cast<HalfReg>(_mm256_cvtps_ph(x.v, kRounding));
#else
  const UintReg bits = reinterpret_cast<UintReg>(x.v);
  const UintReg magnitude = bits & 0x7fffffff;
  // Normal: drop 13 bits to nearest even and rebias; a carry runs into the exponent, up to
  // infinity. Subnormal: adding 0.5 lets the addition round at the right place.
  const UintReg normal = (magnitude - (112u << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  const UintReg subnormal =
      reinterpret_cast<UintReg>(reinterpret_cast<Vec<float>::Reg>(magnitude) + 0.5f) - 0x3f000000u;
  UintReg result = magnitude < (113u << 23) ? subnormal : normal;
  result = magnitude >= (143u << 23) ? UintReg{} + 0x7c00 : result;
  result = magnitude > 0x7f800000u ? UintReg{} + 0x7e00 : result;
  return narrow(result | ((bits >> 16) & 0x8000));
#endif
}

template <class S, class T>
MOE_INLINE void store(S* p, Vec<T> x) {
  const auto reg = packed(x, p);
  __builtin_memcpy(p, &reg, sizeof(reg));
}

// Past the caches where the machine can: for whole lines that nobody reads soon. p is aligned to
// what is written.
template <class S, class T>
MOE_INLINE void stream(S* p, Vec<T> x) {
#if defined(MOE_AVX512)
  const auto reg = packed(x, p);
  if constexpr (sizeof(reg) == 64) {
    _mm512_stream_si512(reinterpret_cast<__m512i*>(p), reinterpret_cast<__m512i>(reg));
  } else {
    _mm256_stream_si256(reinterpret_cast<__m256i*>(p), reinterpret_cast<__m256i>(reg));
  }
#else
  store(p, x);
#endif
}

// After streaming, before anybody else reads what was streamed: such stores are not ordered with
// those that tell of them.
MOE_INLINE void finish_streams() {
#if defined(MOE_AVX512)
  _mm_sfence();
#endif
}

// The first n of a vector's lanes, none if n < 0; the others read as zeros and stay as they are in
// memory.
#if defined(MOE_AVX512)
MOE_INLINE uint32_t lane_mask(int64_t n) { return n > 0 ? (1u << n) - 1 : 0; }
MOE_INLINE __m512 read_lanes(const float* p, int64_t n) {
  return _mm512_maskz_loadu_ps(lane_mask(n), p);
}
MOE_INLINE __m512d read_lanes(const double* p, int64_t n) {
  return _mm512_maskz_loadu_pd(lane_mask(n), p);
}
template <class S>
MOE_INLINE __m256i read_lanes(const S* p, int64_t n) {
  static_assert(sizeof(S) == 2);
  return _mm256_maskz_loadu_epi16(lane_mask(n), p);
}
MOE_INLINE void write_lanes(float* p, __m512 x, int64_t n) {
  _mm512_mask_storeu_ps(p, lane_mask(n), x);
}
MOE_INLINE void write_lanes(double* p, __m512d x, int64_t n) {
  _mm512_mask_storeu_pd(p, lane_mask(n), x);
}
template <class S>
MOE_INLINE void write_lanes(S* p, HalfReg x, int64_t n) {
  static_assert(sizeof(S) == 2);
  _mm256_mask_storeu_epi16(p, lane_mask(n), reinterpret_cast<__m256i>(x));
}
#endif
template <class V, class S>
MOE_INLINE V load(const S* p, int64_t n) {
  if (n >= V::kLanes) return load<V>(p);
  S lane[V::kLanes] = {};
#if defined(MOE_AVX512)
  const auto lanes = read_lanes(p, n);
  __builtin_memcpy(lane, &lanes, sizeof(lane));
#else
  for (int64_t i = 0; i < n; ++i) lane[i] = p[i];
#endif
  return load<V>(lane);
}
template <class S, class T>
MOE_INLINE void store(S* p, Vec<T> x, int64_t n) {
  if (n >= Vec<T>::kLanes) return store(p, x);
#if defined(MOE_AVX512)
  write_lanes(p, packed(x, p), n);
#else
  S lane[Vec<T>::kLanes];
  store(lane, x);
  for (int64_t i = 0; i < n; ++i) p[i] = lane[i];
#endif
}

}  // namespace
}  // namespace moe_ext::cpu::kernels
