// What this machine can do at most: multiply-adds per second, and bytes read per second from
// memory that no cache holds. Built and called by ceilings.py.
#include <chrono>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif
#ifdef _OPENMP
#include <omp.h>
#endif

namespace {

double now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

volatile float sink;

// `count` rounds of 12 independent sums, so that the units and not the latency are the limit.
// Each returns the operations of a round.
#define MOE_PROBE(NAME, TARGET, REG, ZERO, MULTIPLY_ADD, FLOPS) \
  __attribute__((target(TARGET))) double NAME(int64_t count) {  \
    REG sum[12];                                                \
    for (auto& s : sum) s = ZERO;                               \
    for (int64_t i = 0; i < count; ++i) {                       \
      _Pragma("GCC unroll 12") for (auto& s : sum) {            \
        MULTIPLY_ADD;                                           \
        asm volatile("" : "+v"(s));                             \
      }                                                         \
    }                                                           \
    float first;                                                \
    std::memcpy(&first, sum, sizeof(first));                    \
    sink = first;                                               \
    return 12.0 * FLOPS;                                        \
  }

#if defined(__x86_64__)
MOE_PROBE(fma512, "avx512f", __m512, _mm512_setzero_ps(), s = _mm512_fmadd_ps(s, s, s), 32)
MOE_PROBE(fma256, "avx2,fma", __m256, _mm256_setzero_ps(), s = _mm256_fmadd_ps(s, s, s), 16)
MOE_PROBE(
    dot512, "avx512f,avx512bf16", __m512, _mm512_setzero_ps(),
    s = _mm512_dpbf16_ps(s, (__m512bh)_mm512_setzero_si512(), (__m512bh)_mm512_setzero_si512()), 64)
#endif
typedef float Four __attribute__((vector_size(16)));
double fma128(int64_t count) {
  Four sum[12] = {};
  for (int64_t i = 0; i < count; ++i) {
#pragma GCC unroll 12
    for (auto& s : sum) s = s * s + s;
  }
  sink = sum[0][0] + sum[11][3];
  return 12.0 * 8;
}

using Probe = double (*)(int64_t);

Probe find_probe(bool bf16) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (bf16 && __builtin_cpu_supports("avx512bf16")) return dot512;
  if (__builtin_cpu_supports("avx512f")) return fma512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return fma256;
#endif
  return fma128;
}

}  // namespace

extern "C" {

// Operations per second of all threads together, in products of fp32 (or bf16, summed in fp32).
double moe_flops(int bf16, int threads) {
  constexpr int64_t kRounds = 1000000;
  const Probe probe = find_probe(bf16);
  double flops = 0;
  const double start = now();
#pragma omp parallel num_threads(threads) reduction(+ : flops)
  flops += probe(kRounds) * kRounds;
  return flops / (now() - start);
}

// Bytes per second of all threads together, read once from `data`.
double moe_read(const char* data, int64_t bytes, int threads) {
  const double start = now();
  int64_t total = 0;
#pragma omp parallel for num_threads(threads) schedule(static) reduction(+ : total)
  for (int64_t block = 0; block < bytes / 65536; ++block) {
    typedef int64_t Two __attribute__((vector_size(16)));
    const Two* from = reinterpret_cast<const Two*>(data + block * 65536);
    Two sum[4] = {};
    for (int64_t i = 0; i < 4096; i += 4) {
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) sum[j] ^= from[i + j];
    }
    total += (sum[0] ^ sum[1] ^ sum[2] ^ sum[3])[0];
  }
  sink = static_cast<float>(total);
  return static_cast<double>(bytes / 65536 * 65536) / (now() - start);
}
}
