// SPDX-License-Identifier: MIT
#define PARALLAX_TARGET plain
#define PARALLAX_TARGET_TABLE kPlainTarget
#include "cpu/target_body.h"
