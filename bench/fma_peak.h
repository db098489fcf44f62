// SPDX-License-Identifier: MIT
// The fused multiply-adds that one core can do: what shares of the peak are shares of.
#pragma once

namespace parallax::bench {

// CPU time of the calling thread: other programs on the machine do not lengthen it.
double thread_seconds();

// GFLOP/s of a short loop on 16 independent register accumulators, enough to cover the latency of
// every pipe, in the widest vectors of this processor.
double fma_gflops();

int fma_lanes();

}  // namespace parallax::bench
