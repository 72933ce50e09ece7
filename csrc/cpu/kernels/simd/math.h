// Element functions of vectors. Those of double are the library's: exact matters there, speed does
// not.
#pragma once

#include <cmath>

#include "cpu/kernels/simd/vec.h"

namespace moe_ext::cpu::kernels {
namespace {

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

}  // namespace
}  // namespace moe_ext::cpu::kernels
