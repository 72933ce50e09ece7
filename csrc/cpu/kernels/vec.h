// Vectors of the unit's width: arithmetic by the compiler's vector extension, conversions by
// intrinsics where the instruction set has them. Everything has internal linkage: a function
// compiled for one instruction set must never be picked by the linker for another unit.
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

namespace moe_ext::kernels {
namespace {

MOE_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
MOE_INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// Hands out parts of a buffer, each aligned to a cache line.
class Scratch {
 public:
  explicit Scratch(void* buffer) : at_(static_cast<char*>(buffer)) {}
  template <class T>
  T* take(int64_t count) {
    T* part = reinterpret_cast<T*>(at_);
    at_ += bytes<T>(count);
    return part;
  }
  template <class T>
  static constexpr int64_t bytes(int64_t count) {
    return (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
  }

 private:
  char* at_;
};

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

// a * b + c; the compiler contracts it where the machine can.
template <class T>
MOE_INLINE Vec<T> multiply_add(Vec<T> a, Vec<T> b, Vec<T> c) {
  return Vec<T>(a.v * b.v + c.v);
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

// Element functions. Those of double are the library's: exact matters there, speed does not.

template <class Fn>
MOE_INLINE Vec<double> each_lane(Vec<double> x, Fn fn) {
  for (int i = 0; i < Vec<double>::kLanes; ++i) x.v[i] = fn(x.v[i]);
  return x;
}
MOE_INLINE Vec<double> exp(Vec<double> x) {
  return each_lane(x, [](double lane) { return ::exp(lane); });
}
MOE_INLINE Vec<double> erfc(Vec<double> x) {
  return each_lane(x, [](double lane) { return ::erfc(lane); });
}

// e^x = 2^n e^r, n the nearest integer to x / ln 2, |r| <= ln 2 / 2. Relative error about 1e-7;
// NaN, infinities, overflow to infinity and gradual underflow as in the library.
MOE_INLINE Vec<float> exp(Vec<float> x) {
  using V = Vec<float>;
  x = select(x > V(89.0), V(89.0), x);
  x = select(x < V(-105.0), V(-105.0), x);
  // Adding 1.5 * 2^23 rounds to an integer and leaves it in the low bits.
  const V magic(12582912.0);
  const V shifted = multiply_add(x, V(1.44269504088896341), magic);
  const V n = shifted - magic;
  V r = multiply_add(n, V(-0.693359375), x);
  r = multiply_add(n, V(2.12194440054690583e-4), r);
  V p(1.0 / 5040);
  p = multiply_add(p, r, V(1.0 / 720));
  p = multiply_add(p, r, V(1.0 / 120));
  p = multiply_add(p, r, V(1.0 / 24));
  p = multiply_add(p, r, V(1.0 / 6));
  p = multiply_add(p, r, V(0.5));
  p = multiply_add(p, r, V(1.0));
  p = multiply_add(p, r, V(1.0));
  // 2^n in two factors: n reaches from -152 to 129.
  const V::IntReg power = shifted.bits() - magic.bits();
  const V::IntReg half = power >> 1;
  const V low = V::from_bits((half + 127) << 23);
  const V high = V::from_bits((power - half + 127) << 23);
  return p * low * high;
}

// erfc(z) = t exp(-z^2 + P(t)), t = 2 / (2 + z), for z >= 0; P is a Chebyshev fit of degree 9,
// relative error about 2e-7 (where z^2 is large, that of z^2 is added). erfc(-z) = 2 - erfc(z).
MOE_INLINE Vec<float> erfc(Vec<float> x) {
  using V = Vec<float>;
  const V z = select(x < V(0.0), -x, x);
  const V t = V(2.0) / (V(2.0) + z);
  constexpr double kP[] = {0.152279484,   -0.720417711, 1.24870899,  -0.816819128, 0.0176640586,
                           -0.0496802677, 0.051508147,  0.383202548, 0.999020346,  -1.26546641};
  V p(kP[0]);
  for (unsigned i = 1; i < sizeof(kP) / sizeof(kP[0]); ++i) p = multiply_add(p, t, V(kP[i]));
  const V tail = t * exp(multiply_add(-z, z, p));
  return select(x < V(0.0), V(2.0) - tail, tail);
}

// Memory. load and store convert between the stored type and the compute type, rounding to nearest
// even; packed is the register that store writes.

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

// Transposes a square of kLanes vectors in place: rounds that exchange blocks of Step lanes.
// Lane i of the result of one exchange: every other block of Step lanes comes from b, and `high`
// says whether from the blocks of a and b that are even or odd.
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
}  // namespace moe_ext::kernels
