// SPDX-License-Identifier: MIT
// The device half of cpu/widen.h.
#pragma once

#include <cuda_runtime_api.h>

#include "parallax/attention.h"

namespace parallax {

// Enqueues the writing of k and v of widened_args() into `memory`. The arguments have been checked,
// but for what this kernel asks of its views; the current device is `device`.
Status launch_widen(const AttentionProblem& problem, const ForwardArgs& args, void* memory,
                    const Device& device, cudaStream_t stream);

}  // namespace parallax
