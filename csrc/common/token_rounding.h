// How many tokens an expert may take: the capacity, and token rounding. For the host and for nvcc.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/host_device.h"

namespace moe_ext {

// ceil(factor * choices / E), at least `least`, at most every token.
static MOE_HOST_DEVICE int64_t
capacity_of(double factor, int64_t choices, int64_t tokens, int64_t E, int64_t least) {
  const double capacity = ceil(factor * static_cast<double>(choices) / static_cast<double>(E));
  if (!(capacity < static_cast<double>(tokens))) return tokens;  // NaN and infinity: no limit
  const int64_t rounded = static_cast<int64_t>(capacity);
  const int64_t bounded = rounded > least ? rounded : least;
  return bounded < tokens ? bounded : tokens;
}

enum class Rounding { kNearest, kUp, kDown, kStochastic, kBalanced };

// Multiples c [E] of M near the counts f [E], none above `most` rounded down to M:
//   nearest     ties down
//   up, down
//   stochastic  up with the probability of the remainder over M: where noise [E], uniform in
//               [0, 1), is below it
//   balanced    down, then up where the remainder is largest (ties: the lower id), so often that
//               the sum of c comes nearest to the sum of f
static MOE_HOST_DEVICE void round_counts(
    const int64_t* f, int64_t E, int64_t M, int64_t most, Rounding rounding, const double* noise,
    int64_t* c) {
  const int64_t limit = most / M * M;
  int64_t remainders = 0;
  for (int64_t e = 0; e < E; ++e) {
    const int64_t remainder = f[e] % M;
    remainders += remainder;
    bool up = false;
    if (rounding == Rounding::kNearest) up = 2 * remainder > M;
    if (rounding == Rounding::kUp) up = remainder > 0;
    if (rounding == Rounding::kStochastic) up = noise[e] * static_cast<double>(M) < remainder;
    c[e] = f[e] - remainder + (up ? M : 0);
    if (c[e] > limit) c[e] = limit;
  }
  if (rounding != Rounding::kBalanced) return;
  // The nearest multiple, ties down.
  for (int64_t ups = (remainders + (M - 1) / 2) / M; ups > 0; --ups) {
    int64_t best = -1;
    for (int64_t e = 0; e < E; ++e) {
      const bool is_free = f[e] - f[e] % M == c[e] && f[e] % M > 0 && c[e] + M <= limit;
      if (is_free && (best < 0 || f[e] % M > f[best] % M)) best = e;
    }
    if (best < 0) return;
    c[best] += M;
  }
}

}  // namespace moe_ext
