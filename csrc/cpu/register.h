// How operators of the CPU are registered: whatever goes wrong in one names it.
#pragma once

#include <c10/util/Exception.h>
#include <torch/library.h>

#include <new>
#include <stdexcept>
#include <string>
#include <string_view>

namespace moe_ext::cpu {

template <auto fn, class Signature = decltype(fn)>
struct Named;

// fn as the operator `name`. Errors of our checks begin with its name; those of torch (an
// allocation that is too large, say) and of the standard library get it here.
template <auto fn, class Result, class... Args>
struct Named<fn, Result (*)(Args...)> {
  // A constant at first: a string would be made empty again after it was registered.
  static inline const char* name = "";

  static Result call(Args... args) {
    try {
      return fn(std::forward<Args>(args)...);
    } catch (c10::Error& error) {
      // _moe_ffn_forward says moe_ffn or _moe_ffn_pairs.
      const bool named =
          std::string_view(error.msg()).substr(0, 60).find(stem()) != std::string_view::npos;
      if (!named) error.add_context(std::string("in ") + name);
      throw;
    } catch (const std::bad_alloc&) {
      too_large();
    } catch (const std::length_error&) {
      too_large();
    }
  }

 private:
  [[noreturn]] static void too_large() {
    TORCH_CHECK_WITH(
        OutOfMemoryError, false, name,
        ": sizes must be such that memory suffices, got larger ones");
  }

  static std::string stem() {
    std::string stem = name + (name[0] == '_');
    for (const std::string_view end : {"_forward", "_backward"}) {
      if (stem.size() > end.size() && stem.substr(stem.size() - end.size()) == end) {
        stem.resize(stem.size() - end.size());
      }
    }
    return stem;
  }
};

template <auto fn>
void impl(torch::Library& m, const char* name) {
  Named<fn>::name = name;
  m.impl(name, &Named<fn>::call);
}

}  // namespace moe_ext::cpu
