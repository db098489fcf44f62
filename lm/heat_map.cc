// SPDX-License-Identifier: MIT
#include "lm/heat_map.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <numeric>
#include <string_view>
#include <vector>

namespace parallax::lm {
namespace {

constexpr int kZero = 128;            // colour index of weight 0
constexpr int kOne = 96;              // index distance of weight 1 from it
constexpr double kLargestLog2 = 4.0;  // weights saturate at 2^4

struct Rgba {
  std::uint8_t red, green, blue, alpha;
};

std::uint8_t mix(double from, double to, double fraction) {
  return static_cast<std::uint8_t>(std::lround(from + (to - from) * fraction));
}

Rgba palette_color(int index) {
  const int distance = std::abs(index - kZero);
  const double strength = std::min(1.0, static_cast<double>(distance) / kOne);
  const double beyond = std::clamp(static_cast<double>(distance - kOne) / (127 - kOne), 0.0, 1.0);
  const auto alpha = static_cast<std::uint8_t>(std::lround(255 * strength));
  if (index < kZero)
    return {mix(38, 92, beyond), mix(120, 60, beyond), mix(230, 255, beyond), alpha};
  if (distance <= kOne) return {240, mix(160, 110, strength), mix(60, 20, strength), alpha};
  return {mix(225, 200, beyond), mix(40, 30, beyond), mix(110, 230, beyond), alpha};
}

void append_u32(std::string& out, std::uint32_t value) {
  for (int shift = 24; shift >= 0; shift -= 8) out.push_back(static_cast<char>(value >> shift));
}

std::uint32_t crc32(std::string_view bytes) {
  std::uint32_t crc = 0xFFFFFFFFu;
  for (unsigned char byte : bytes) {
    crc ^= byte;
    for (int bit = 0; bit < 8; ++bit) crc = (crc >> 1) ^ (crc & 1 ? 0xEDB88320u : 0u);
  }
  return ~crc;
}

std::uint32_t adler32(std::string_view bytes) {
  std::uint32_t a = 1, b = 0;
  for (unsigned char byte : bytes) {
    a = (a + byte) % 65521;
    b = (b + a) % 65521;
  }
  return b << 16 | a;
}

// A zlib stream of stored (uncompressed) blocks: RFC 1950 and RFC 1951, section 3.2.4.
std::string zlib_stored(std::string_view bytes) {
  constexpr std::size_t kBlock = 65535;
  std::string out = "\x78\x01";
  for (std::size_t begin = 0; begin < bytes.size(); begin += kBlock) {
    const std::size_t size = std::min(kBlock, bytes.size() - begin);
    out.push_back(begin + size == bytes.size());
    for (std::size_t field : {size, ~size}) {
      out.push_back(static_cast<char>(field));
      out.push_back(static_cast<char>(field >> 8));
    }
    out.append(bytes.substr(begin, size));
  }
  append_u32(out, adler32(bytes));
  return out;
}

std::string png_chunk(std::string_view type, std::string_view data) {
  std::string out;
  append_u32(out, static_cast<std::uint32_t>(data.size()));
  const std::string body = std::string(type).append(data);
  out += body;
  append_u32(out, crc32(body));
  return out;
}

std::string base64(std::string_view bytes) {
  static constexpr char kDigits[] =
      "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
  std::string out;
  for (std::size_t i = 0; i < bytes.size(); i += 3) {
    const std::size_t count = std::min<std::size_t>(3, bytes.size() - i);
    std::uint32_t group = 0;
    for (std::size_t j = 0; j < 3; ++j) {
      group = group << 8 | (j < count ? static_cast<unsigned char>(bytes[i + j]) : 0u);
    }
    for (std::size_t j = 0; j < 4; ++j) {
      out.push_back(j <= count ? kDigits[group >> (18 - 6 * j) & 63] : '=');
    }
  }
  return out;
}

// An 8-bit PNG over the palette above, with its opacities.
std::string indexed_png(std::span<const std::uint8_t> indices, std::int64_t rows,
                        std::int64_t columns) {
  std::string header, colors, opacities, pixels;
  append_u32(header, static_cast<std::uint32_t>(columns));
  append_u32(header, static_cast<std::uint32_t>(rows));
  header += std::string("\x08\x03\x00\x00\x00", 5);  // 8 bits, palette, no filter, no interlace
  for (int index = 0; index < 256; ++index) {
    const Rgba color = palette_color(index);
    for (std::uint8_t channel : {color.red, color.green, color.blue}) {
      colors.push_back(static_cast<char>(channel));
    }
    opacities.push_back(static_cast<char>(color.alpha));
  }
  for (std::int64_t row = 0; row < rows; ++row) {
    pixels.push_back('\0');  // filter: none
    for (std::uint8_t index : indices.subspan(row * columns, columns)) {
      pixels.push_back(static_cast<char>(index));
    }
  }
  return "\x89PNG\r\n\x1a\n" + png_chunk("IHDR", header) + png_chunk("PLTE", colors) +
         png_chunk("tRNS", opacities) + png_chunk("IDAT", zlib_stored(pixels)) +
         png_chunk("IEND", "");
}

std::string data_uri(const std::string& png) { return "data:image/png;base64," + base64(png); }

}  // namespace

std::uint8_t weight_color(double weight) {
  const double magnitude = std::abs(weight);
  if (!(magnitude > 0)) return kZero;
  const double distance =
      magnitude <= 1 ? kOne * std::sqrt(magnitude)
                     : kOne + (127 - kOne) * std::min(1.0, std::log2(magnitude) / kLargestLog2);
  return static_cast<std::uint8_t>(kZero + std::lround(std::copysign(distance, weight)));
}

std::string heat_map_png(std::span<const float> weights, std::int64_t rows, std::int64_t columns) {
  std::vector<std::uint8_t> indices(weights.size());
  std::transform(weights.begin(), weights.end(), indices.begin(), weight_color);
  return data_uri(indexed_png(indices, rows, columns));
}

std::string color_bar_png() {
  std::array<std::uint8_t, 256> indices;
  std::iota(indices.begin(), indices.end(), std::uint8_t{0});
  return data_uri(indexed_png(indices, 1, 256));
}

}  // namespace parallax::lm
