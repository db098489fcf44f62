// SPDX-License-Identifier: MIT
#define PARALLAX_TARGET avx2
#define PARALLAX_TARGET_TABLE kAvx2Target
#include "cpu/target_body.h"
