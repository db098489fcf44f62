// SPDX-License-Identifier: MIT
// Decode on the CPU beside the memory that bounds it.
#pragma once

#include <functional>
#include <string>

#include "parallax/types.h"

namespace parallax::bench {

// Prints a table of decodes with one query token, each with the bytes of keys and values that it
// reads a second and their share of the best of several read loops on the same threads, all
// interleaved; adds the figures to the report. One thread is timed by its CPU time, several by the
// wall clock.
void show_decode(const ParallelFor& parallel_for, int num_threads, double budget_s,
                 const std::function<void(const std::string&, double)>& report);

}  // namespace parallax::bench
