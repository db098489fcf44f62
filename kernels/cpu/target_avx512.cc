// SPDX-License-Identifier: MIT
#define PARALLAX_TARGET avx512
#define PARALLAX_TARGET_TABLE kAvx512Target
#include "cpu/target_body.h"
