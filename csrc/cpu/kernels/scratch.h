// Scratch memory of a thread, handed out in arrays.
#pragma once

#include <cstdint>

namespace moe_ext::cpu::kernels {
namespace {

// Each array is aligned to a cache line.
class Scratch {
 public:
  explicit Scratch(void* buffer) : at_(static_cast<char*>(buffer)) {}
  template <class T>
  T* take(int64_t count) {
    T* array = reinterpret_cast<T*>(at_);
    at_ += bytes<T>(count);
    return array;
  }
  template <class T>
  static constexpr int64_t bytes(int64_t count) {
    return (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
  }

 private:
  char* at_;
};

}  // namespace
}  // namespace moe_ext::cpu::kernels
