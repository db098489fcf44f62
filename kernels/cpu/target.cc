// SPDX-License-Identifier: MIT
#include "cpu/target.h"

namespace parallax::cpu {

Targets supported_targets() {
  Targets targets = {};
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    if (__builtin_cpu_supports("avx512bf16")) targets.list[targets.size++] = &kAvx512Bf16Target;
    targets.list[targets.size++] = &kAvx512Target;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("f16c")) {
    targets.list[targets.size++] = &kAvx2Target;
  }
#endif
  targets.list[targets.size++] = &kPlainTarget;
  return targets;
}

}  // namespace parallax::cpu
