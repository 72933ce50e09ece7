// The activations of the experts and their derivatives, for the host and for nvcc.
//
// To add one: a struct here (value and slope of a function of one variable, or, where gate and up
// do not factor, value and grad as in Gated), an entry of Activation and a case of
// dispatch_activation; docs/developing.md lists the other files.
//
// Comparisons are written so that NaN comes out as NaN.
#pragma once

#include <cmath>

#include "common/host_device.h"

namespace moe_ext {

enum class Activation { kSilu, kGelu, kGeluTanh, kRelu, kRelu2, kIdentity, kSwigluClamped };

// T is float, double, or a vector type that brings its own exp, erfc and select.
using std::erfc;
using std::exp;

template <class T>
MOE_HOST_DEVICE T select(bool condition, T yes, T no) {
  return condition ? yes : no;
}

template <class T>
MOE_HOST_DEVICE T sigmoid(T x) {
  return T(1) / (T(1) + exp(-x));
}

struct Silu {
  template <class T>
  static MOE_HOST_DEVICE T value(T x) {
    return x / (T(1) + exp(-x));
  }
  template <class T>
  static MOE_HOST_DEVICE T slope(T x) {
    const T s = sigmoid(x);
    return s * (T(1) + x * (T(1) - s));
  }
};

// x Phi(x), Phi the normal distribution's integral.
struct Gelu {
  template <class T>
  static MOE_HOST_DEVICE T value(T x) {
    return x * cdf(x);
  }
  template <class T>
  static MOE_HOST_DEVICE T slope(T x) {
    const T pdf = T(0.39894228040143267794) * exp(T(-0.5) * x * x);
    return cdf(x) + x * pdf;
  }

 private:
  template <class T>
  static MOE_HOST_DEVICE T cdf(T x) {
    return T(0.5) * erfc(x * T(-0.70710678118654752440));
  }
};

// The tanh approximation of Gelu (Hendrycks and Gimpel, arXiv 1606.08415), by
// (1 + tanh(u)) / 2 = sigmoid(2 u), which loses no digits where tanh is near -1.
struct GeluTanh {
  template <class T>
  static MOE_HOST_DEVICE T value(T x) {
    return x * sigmoid(inner(x));
  }
  template <class T>
  static MOE_HOST_DEVICE T slope(T x) {
    const T s = sigmoid(inner(x));
    const T inner_slope = T(1.59576912160573071176) * (T(1) + T(3 * 0.044715) * x * x);
    return s + x * s * (T(1) - s) * inner_slope;
  }

 private:
  template <class T>
  static MOE_HOST_DEVICE T inner(T x) {
    return T(1.59576912160573071176) * (x + T(0.044715) * x * x * x);
  }
};

struct Relu {
  template <class T>
  static MOE_HOST_DEVICE T value(T x) {
    return select(x < T(0), T(0), x);
  }
  template <class T>
  static MOE_HOST_DEVICE T slope(T x) {
    return select(x > T(0), T(1), T(0));
  }
};

// Relu squared (So et al., arXiv 2109.08668).
struct Relu2 {
  template <class T>
  static MOE_HOST_DEVICE T value(T x) {
    return select(x < T(0), T(0), x * x);
  }
  template <class T>
  static MOE_HOST_DEVICE T slope(T x) {
    return select(x > T(0), T(2) * x, T(0));
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
    return (clamp_up(up) + T(1)) * g / (T(1) + exp(T(-kAlpha) * g));
  }
  template <class T>
  static MOE_HOST_DEVICE void grad(T gate, T up, T d, T* dgate, T* dup) {
    const T g = clamp_gate(gate);
    const T s = sigmoid(T(kAlpha) * g);
    const T slope = s + T(kAlpha) * g * s * (T(1) - s);
    *dgate = select(gate > T(kLimit), T(0), d * (clamp_up(up) + T(1)) * slope);
    *dup = select(up > T(kLimit), T(0), select(up < T(-kLimit), T(0), d * g * s));
  }

 private:
  static constexpr double kAlpha = 1.702;
  static constexpr double kLimit = 7.0;
  template <class T>
  static MOE_HOST_DEVICE T clamp_gate(T gate) {
    return select(gate > T(kLimit), T(kLimit), gate);
  }
  template <class T>
  static MOE_HOST_DEVICE T clamp_up(T up) {
    return select(up > T(kLimit), T(kLimit), select(up < T(-kLimit), T(-kLimit), up));
  }
};

// Calls fn with a value of the activation's type: Gated<F>, Ungated<F> or SwigluClamped.
template <class Fn>
void dispatch_activation(Activation activation, bool gated, const Fn& fn) {
  const auto with = [&](auto f) {
    using F = decltype(f);
    gated ? fn(Gated<F>{}) : fn(Ungated<F>{});
  };
  switch (activation) {
    case Activation::kSilu:
      return with(Silu{});
    case Activation::kGelu:
      return with(Gelu{});
    case Activation::kGeluTanh:
      return with(GeluTanh{});
    case Activation::kRelu:
      return with(Relu{});
    case Activation::kRelu2:
      return with(Relu2{});
    case Activation::kIdentity:
      return with(Identity{});
    case Activation::kSwigluClamped:
      return fn(SwigluClamped{});
  }
}

}  // namespace moe_ext
