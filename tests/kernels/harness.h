// What the tests of the kernels share: buffers of every storage type, random numbers, comparing.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <random>
#include <string>
#include <type_traits>
#include <vector>

#include "common/types.h"

namespace harness {

using moe_ext::Type;

constexpr Type kTypes[] = {Type::kF64, Type::kF32, Type::kBf16, Type::kF16};
constexpr Type kComputeTypes[] = {Type::kF64, Type::kF32};

// What weights of slots, and sums, of a storage type have.
inline Type compute_of(Type type) { return type == Type::kF64 ? Type::kF64 : Type::kF32; }

inline int64_t size_of(Type type) { return type == Type::kF64 ? 8 : type == Type::kF32 ? 4 : 2; }

// "rows H 33 kind 2": what is tested, for messages.
inline std::string describe(const std::string& what) { return what; }
template <class Value, class... More>
std::string describe(
    const std::string& what, const char* name, const Value& value, const More&... more) {
  std::string text;
  if constexpr (std::is_same_v<Value, Type>) {
    text = std::to_string(static_cast<int>(value));
  } else {
    text = std::to_string(value);
  }
  return describe(what + " " + name + " " + text, more...);
}

inline int failures = 0;
inline std::string context;  // of the messages: the instruction set, say

inline void expect(bool holds, const std::string& what) {
  if (holds) return;
  std::printf("FAILED %s%s\n", context.c_str(), what.c_str());
  ++failures;
}

// Prints how many failed; the program's exit code.
inline int finish() {
  std::printf("%d failures\n", failures);
  return failures != 0;
}

// Numbers of a storage type, in exactly as many bytes as they need, `offset` elements behind the
// beginning of memory; `values` are the same numbers as doubles.
class Buffer {
 public:
  Buffer(Type type, int64_t count, int64_t offset = 0)
      : type_(type), offset_(offset), data_((count + offset) * size_of(type)), values(count) {}
  Buffer(Type type, int64_t count, std::mt19937& random, double scale = 1, int64_t offset = 0)
      : Buffer(type, count, offset) {
    std::normal_distribution<double> normal(0, scale);
    for (double& value : values) value = normal(random);
    write();
  }

  void* data() { return data_.data() + offset_ * size_of(type_); }
  const void* data() const { return data_.data() + offset_ * size_of(type_); }
  void* at(int64_t i) { return static_cast<char*>(data()) + i * size_of(type_); }
  int64_t count() const { return static_cast<int64_t>(values.size()); }
  Type type() const { return type_; }

  // From memory to values.
  const std::vector<double>& read() {
    for (size_t i = 0; i < values.size(); ++i) values[i] = get(i);
    return values;
  }
  // From values to memory, and back, as they are rounded.
  void write() {
    for (size_t i = 0; i < values.size(); ++i) put(i, values[i]);
    read();
  }
  Buffer& fill(double value) {
    std::fill(values.begin(), values.end(), value);
    write();
    return *this;
  }

 private:
  template <class Number>
  void copy_in(int64_t i, Number number) {
    std::memcpy(at(i), &number, sizeof(Number));
  }
  template <class Number>
  Number copy_out(int64_t i) const {
    Number number;
    std::memcpy(&number, static_cast<const char*>(data()) + i * sizeof(Number), sizeof(Number));
    return number;
  }

  void put(int64_t i, double x) {
    const float narrow = static_cast<float>(x);
    if (type_ == Type::kF64) return copy_in(i, x);
    if (type_ == Type::kF32) return copy_in(i, narrow);
    // Cut off: any number of the type will do.
    uint32_t bits;
    std::memcpy(&bits, &narrow, 4);
    const uint32_t half = type_ == Type::kBf16
                              ? bits >> 16
                              : (bits >> 16 & 0x8000) | ((bits & 0x7fffffff) - 0x38000000) >> 13;
    copy_in(i, static_cast<uint16_t>(std::fabs(x) < 1e-3 ? 0 : half));
  }
  double get(int64_t i) const {
    if (type_ == Type::kF64) return copy_out<double>(i);
    if (type_ == Type::kF32) return copy_out<float>(i);
    const uint16_t half = copy_out<uint16_t>(i);
    if (type_ == Type::kBf16) {
      const uint32_t bits = static_cast<uint32_t>(half) << 16;
      float x;
      std::memcpy(&x, &bits, 4);
      return x;
    }
    const int exponent = half >> 10 & 31;
    if (exponent == 31) return half & 1023 ? NAN : half & 0x8000 ? -INFINITY : INFINITY;
    const double mantissa = (half & 1023) + (exponent ? 1024 : 0);
    return std::ldexp(mantissa, std::max(exponent, 1) - 25) * (half & 0x8000 ? -1 : 1);
  }

  Type type_;
  int64_t offset_;
  std::vector<char> data_;

 public:
  std::vector<double> values;
};

// max|a - b| / max|b|, which is taken as `floor` at least; infinite where one is NaN and the other
// is not.
inline double error(
    const std::vector<double>& actual, const std::vector<double>& expected, double floor) {
  double difference = 0, largest = std::max(floor, 1e-30);
  for (size_t i = 0; i < expected.size(); ++i) {
    const double a = actual[i], b = expected[i];
    if ((a != a) != (b != b)) return INFINITY;
    if (a != a) continue;
    if (std::isinf(a) || std::isinf(b)) {
      if (a != b) return INFINITY;
      continue;
    }
    difference = std::max(difference, std::fabs(a - b));
    largest = std::max(largest, std::fabs(b));
  }
  return difference / largest;
}

// The error that a type may have.
struct Tolerance {
  double f64, f32, bf16, f16;
  double of(Type type) const {
    const double each[] = {f64, f32, bf16, f16};
    return each[static_cast<int>(type)];
  }
};

inline void check(
    const std::string& what, Buffer& actual, const std::vector<double>& expected, double tolerance,
    double floor = 0) {
  const double found = error(actual.read(), expected, floor);
  char text[32];
  std::snprintf(text, sizeof(text), ": error %g", found);
  expect(found <= tolerance, what + text);
}
inline void check(
    const std::string& what, Buffer& actual, const std::vector<double>& expected,
    const Tolerance& tolerance) {
  check(what, actual, expected, tolerance.of(actual.type()));
}

}  // namespace harness
