// SPDX-License-Identifier: MIT
// Pictures of attention weights as PNG images inside a page. Weights of Parallax attention may lie
// below zero and above one, so the colour says the sign and whether one is passed: blue below zero,
// orange from zero to one, magenta above one. Strength is opacity: zero is fully transparent, which
// reads on a light page and on a dark one alike.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>

namespace parallax::lm {

// The colour index (0..255) of a weight, monotonic in it: 128 is zero; square-root spaced up to
// magnitude one (indices 32 and 224), logarithmic from there to magnitude 16. NaN reads as zero.
std::uint8_t weight_color(double weight);

// Row-major weights [rows, columns] -> "data:image/png;base64,...", one pixel a weight.
// REQUIRES: weights.size() == rows * columns, both at least 1.
std::string heat_map_png(std::span<const float> weights, std::int64_t rows, std::int64_t columns);

// All 256 colours in one row of pixels, for a legend.
std::string color_bar_png();

}  // namespace parallax::lm
