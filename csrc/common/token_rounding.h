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
  const int64_t bounded =
      capacity > static_cast<double>(least) ? static_cast<int64_t>(capacity) : least;
  return bounded < tokens ? bounded : tokens;
}

enum class Rounding { kNearest, kUp, kDown, kStochastic, kBalanced };

// The multiple of M near f[e], of counts f [E], none above `most` rounded down to M:
//   nearest     ties down
//   up, down
//   stochastic  up with the probability of the remainder over M: where noise [E], uniform in
//               [0, 1), is below it
//   balanced    down, then up where the remainder is largest (ties: the lower id), so often that
//               the sum comes nearest to the sum of f
static MOE_HOST_DEVICE int64_t round_count(
    const int64_t* f, int64_t e, int64_t E, int64_t M, int64_t most, Rounding rounding,
    const double* noise) {
  const int64_t limit = most / M * M;
  const int64_t remainder = f[e] % M, down = f[e] - remainder;
  bool up = false;
  if (rounding == Rounding::kNearest) up = 2 * remainder > M;
  if (rounding == Rounding::kUp) up = remainder > 0;
  if (rounding == Rounding::kStochastic) {
    up = remainder > 0 && noise[e] * static_cast<double>(M) < remainder;
  }
  if (rounding == Rounding::kBalanced && remainder > 0) {
    // Before e come the experts that can go up and have a larger remainder.
    int64_t remainders = 0, before = 0;
    for (int64_t i = 0; i < E; ++i) {
      const int64_t other = f[i] % M;
      remainders += other;
      if (other == 0 || f[i] - other + M > limit) continue;
      before += other > remainder || (other == remainder && i < e);
    }
    up = before < (remainders + (M - 1) / 2) / M;  // the nearest multiple, ties down
  }
  const int64_t rounded = up ? down + M : down;
  return rounded < limit ? rounded : limit;
}

}  // namespace moe_ext
