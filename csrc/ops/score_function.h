// The score functions' names.
#pragma once

#include <c10/util/Exception.h>
#include <c10/util/string_view.h>

#include "common/score_function.h"

namespace moe_ext {

inline ScoreFunction parse_score_function(const char* op, c10::string_view name) {
  if (name == "softmax") return ScoreFunction::kSoftmax;
  TORCH_CHECK_VALUE(
      name == "sigmoid", op, ": score_function must be softmax or sigmoid, got ", name);
  return ScoreFunction::kSigmoid;
}

}  // namespace moe_ext
