// The activations of the experts and their derivatives, for the host and for nvcc.
//
// To add one: a struct here (value and slope of a function of one variable, or, where gate and up
// do not factor, value and grad as in Gated), its name in ops/activation.h, and one line in
// moe_ext/reference.py.
//
// Comparisons are written so that NaN comes out as NaN.
#pragma once

#include <cmath>

#include "common/host_device.h"

namespace moe_ext {

struct Silu {
  template <class T>
  static MOE_HOST_DEVICE T value(T x) {
    return x / (T(1) + std::exp(-x));
  }
  template <class T>
  static MOE_HOST_DEVICE T slope(T x) {
    const T s = T(1) / (T(1) + std::exp(-x));
    return s * (T(1) + x * (T(1) - s));
  }
};

// x Phi(x), Phi the normal distribution's integral.
struct Gelu {
  template <class T>
  static MOE_HOST_DEVICE T value(T x) {
    return T(0.5) * x * (T(1) + std::erf(x * T(0.70710678118654752440)));
  }
  template <class T>
  static MOE_HOST_DEVICE T slope(T x) {
    const T cdf = T(0.5) * (T(1) + std::erf(x * T(0.70710678118654752440)));
    const T pdf = T(0.39894228040143267794) * std::exp(T(-0.5) * x * x);
    return cdf + x * pdf;
  }
};

// The tanh approximation of Gelu (Hendrycks and Gimpel, arXiv 1606.08415).
struct GeluTanh {
  template <class T>
  static MOE_HOST_DEVICE T value(T x) {
    return T(0.5) * x * (T(1) + std::tanh(inner(x)));
  }
  template <class T>
  static MOE_HOST_DEVICE T slope(T x) {
    const T t = std::tanh(inner(x));
    const T inner_slope = T(0.79788456080286535588) * (T(1) + T(3 * 0.044715) * x * x);
    return T(0.5) * (T(1) + t) + T(0.5) * x * (T(1) - t * t) * inner_slope;
  }

 private:
  template <class T>
  static MOE_HOST_DEVICE T inner(T x) {
    return T(0.79788456080286535588) * (x + T(0.044715) * x * x * x);
  }
};

struct Relu {
  template <class T>
  static MOE_HOST_DEVICE T value(T x) {
    return x < T(0) ? T(0) : x;
  }
  template <class T>
  static MOE_HOST_DEVICE T slope(T x) {
    return x > T(0) ? T(1) : T(0);
  }
};

// Relu squared (So et al., arXiv 2109.08668).
struct Relu2 {
  template <class T>
  static MOE_HOST_DEVICE T value(T x) {
    return x < T(0) ? T(0) : x * x;
  }
  template <class T>
  static MOE_HOST_DEVICE T slope(T x) {
    return x > T(0) ? T(2) * x : T(0);
  }
};

struct Identity {
  template <class T>
  static MOE_HOST_DEVICE T value(T x) {
    return x;
  }
  template <class T>
  static MOE_HOST_DEVICE T slope(T) {
    return T(1);
  }
};

// a = f(gate) * up. `grad` takes d, the gradient of a.
template <class F>
struct Gated {
  static constexpr bool kGated = true;
  template <class T>
  static MOE_HOST_DEVICE T value(T gate, T up) {
    return F::value(gate) * up;
  }
  template <class T>
  static MOE_HOST_DEVICE void grad(T gate, T up, T d, T* dgate, T* dup) {
    *dgate = d * up * F::slope(gate);
    *dup = d * F::value(gate);
  }
};

// a = f(gate); there is no up projection, and `up` and `dup` are not touched.
template <class F>
struct Ungated {
  static constexpr bool kGated = false;
  template <class T>
  static MOE_HOST_DEVICE T value(T gate, T) {
    return F::value(gate);
  }
  template <class T>
  static MOE_HOST_DEVICE void grad(T gate, T, T d, T* dgate, T*) {
    *dgate = d * F::slope(gate);
  }
};

// GPT-OSS: a = (clamp(up, -7, 7) + 1) * g * sigmoid(1.702 g) with g = min(gate, 7). At a limit the
// derivative is the inner one, as torch.clamp has it.
struct SwigluClamped {
  static constexpr bool kGated = true;
  template <class T>
  static MOE_HOST_DEVICE T value(T gate, T up) {
    const T g = clamp_gate(gate);
    return (clamp_up(up) + T(1)) * g / (T(1) + std::exp(T(-kAlpha) * g));
  }
  template <class T>
  static MOE_HOST_DEVICE void grad(T gate, T up, T d, T* dgate, T* dup) {
    const T g = clamp_gate(gate);
    const T s = T(1) / (T(1) + std::exp(T(-kAlpha) * g));
    const T slope = s + T(kAlpha) * g * s * (T(1) - s);
    *dgate = gate > T(kLimit) ? T(0) : d * (clamp_up(up) + T(1)) * slope;
    *dup = (up > T(kLimit) || up < T(-kLimit)) ? T(0) : d * g * s;
  }

 private:
  static constexpr double kAlpha = 1.702;
  static constexpr double kLimit = 7.0;
  template <class T>
  static MOE_HOST_DEVICE T clamp_gate(T gate) {
    return gate > T(kLimit) ? T(kLimit) : gate;
  }
  template <class T>
  static MOE_HOST_DEVICE T clamp_up(T up) {
    return up > T(kLimit) ? T(kLimit) : (up < T(-kLimit) ? T(-kLimit) : up);
  }
};

}  // namespace moe_ext
