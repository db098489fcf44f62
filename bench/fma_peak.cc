// SPDX-License-Identifier: MIT
#include "bench/fma_peak.h"

#include <time.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace parallax::bench {
namespace {

constexpr long kIterations = 4'000'000;

// Each loop's body is its FMAs, a decrement and a branch: its disassembly has no load or store.
#if defined(__x86_64__)
constexpr int kAccumulators512 = 16, kAccumulators256 = 12;

__attribute__((target("avx512f"), optimize("O3"), noinline)) float loop_avx512(float factor) {
  const __m512 a = _mm512_set1_ps(factor), b = _mm512_set1_ps(1.0f - factor);
  __m512 x[kAccumulators512];
  for (int i = 0; i < kAccumulators512; ++i) x[i] = _mm512_set1_ps(static_cast<float>(i));
  for (long n = 0; n < kIterations; ++n) {
#pragma GCC unroll 16
    for (int i = 0; i < kAccumulators512; ++i) x[i] = _mm512_fmadd_ps(x[i], a, b);
  }
  for (int i = 1; i < kAccumulators512; ++i) x[0] = _mm512_add_ps(x[0], x[i]);
  return _mm512_cvtss_f32(x[0]);
}

__attribute__((target("avx2,fma"), optimize("O3"), noinline)) float loop_avx2(float factor) {
  const __m256 a = _mm256_set1_ps(factor), b = _mm256_set1_ps(1.0f - factor);
  __m256 x[kAccumulators256];
  for (int i = 0; i < kAccumulators256; ++i) x[i] = _mm256_set1_ps(static_cast<float>(i));
  for (long n = 0; n < kIterations; ++n) {
#pragma GCC unroll 12
    for (int i = 0; i < kAccumulators256; ++i) x[i] = _mm256_fmadd_ps(x[i], a, b);
  }
  for (int i = 1; i < kAccumulators256; ++i) x[0] = _mm256_add_ps(x[0], x[i]);
  return _mm256_cvtss_f32(x[0]);
}
#endif

using Vec4 = float __attribute__((vector_size(16)));
constexpr int kAccumulators128 = 12;

__attribute__((optimize("O3"), noinline)) float loop_plain(float factor) {
  const Vec4 a = {factor, factor, factor, factor}, b = 1.0f - a;
  Vec4 x[kAccumulators128];
  for (int i = 0; i < kAccumulators128; ++i) x[i] = a * static_cast<float>(i);
  for (long n = 0; n < kIterations; ++n) {
#pragma GCC unroll 12
    for (int i = 0; i < kAccumulators128; ++i) x[i] = x[i] * a + b;
  }
  for (int i = 1; i < kAccumulators128; ++i) x[0] += x[i];
  return x[0][0];
}

struct Loop {
  float (*run)(float);
  int lanes, accumulators;
};

Loop widest_loop() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f")) return {loop_avx512, 16, kAccumulators512};
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    return {loop_avx2, 8, kAccumulators256};
  }
#endif
  return {loop_plain, 4, kAccumulators128};
}

}  // namespace

double thread_seconds() {
  timespec time;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &time);
  return static_cast<double>(time.tv_sec) + 1e-9 * static_cast<double>(time.tv_nsec);
}

double fma_gflops() {
  const Loop loop = widest_loop();
  volatile float factor = 0.5f;
  const double start = thread_seconds();
  volatile float result = loop.run(factor);
  const double seconds = thread_seconds() - start;
  (void)result;
  return 2e-9 * loop.lanes * loop.accumulators * static_cast<double>(kIterations) / seconds;
}

int fma_lanes() { return widest_loop().lanes; }

}  // namespace parallax::bench
