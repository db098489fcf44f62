// SPDX-License-Identifier: MIT
// The arithmetic of the Hopper decode's schedule, on a CPU: blocks of keys, spans, shapes.
#include "kernels/cuda/decode_schedule.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <random>

namespace parallax::tests {
namespace {

TEST(DecodeSchedule, SpansCutALineIntoEqualPieces) {
  std::mt19937 generator(1);
  for (int repeat = 0; repeat < 300; ++repeat) {
    const int spans = 1 + static_cast<int>(generator() % 300);
    const std::int64_t total = spans + static_cast<int>(generator() % 3000);
    EXPECT_EQ(decode_span_begin(total, spans, 0), 0);
    EXPECT_EQ(decode_span_begin(total, spans, spans), total);
    for (int span = 0; span < spans; ++span) {
      const std::int64_t begin = decode_span_begin(total, spans, span);
      const std::int64_t end = decode_span_begin(total, spans, span + 1);
      EXPECT_GE(end - begin, total / spans);
      EXPECT_LE(end - begin, total / spans + 1);
      for (std::int64_t x = begin; x < end; ++x) {
        ASSERT_EQ(decode_span_of(total, spans, x), span) << total << " in " << spans;
      }
    }
  }
}

TEST(DecodeSchedule, SpansOfALongLine) {
  constexpr std::int64_t kTotal = 2147483647;
  for (int span = 0; span < 1000; ++span) {
    const std::int64_t begin = decode_span_begin(kTotal, 1000, span);
    EXPECT_EQ(decode_span_of(kTotal, 1000, begin), span);
    if (span > 0) {
      EXPECT_EQ(decode_span_of(kTotal, 1000, begin - 1), span - 1);
    }
  }
}

// Every key that some query sees lies in a block; the first and last block hold one.
TEST(DecodeSchedule, BlocksHoldWhatQueriesSee) {
  std::mt19937 generator(2);
  for (int repeat = 0; repeat < 2000; ++repeat) {
    const auto below = [&](unsigned limit) { return static_cast<int>(generator() % limit); };
    Mask mask;
    mask.q_len = 1 + below(6);
    mask.kv_end = below(400);
    mask.kv_begin = below(3) == 0 ? below(400) : 0;
    mask.causal = below(4) != 0;
    mask.window = mask.causal && below(2) ? 1 + below(200) : 0;
    const int block_keys = below(2) ? 64 : 128;
    const DecodeBlocks blocks = decode_blocks(row_mask(mask), mask.q_len, block_keys);
    int first = 1 << 30;
    int last = -1;
    for (int query = 0; query < mask.q_len; ++query) {
      const Range keys = mask.keys(query);
      if (keys.empty()) continue;
      first = std::min(first, keys.begin);
      last = std::max(last, keys.end - 1);
    }
    if (last < 0) {
      EXPECT_TRUE(blocks.keys.empty());
      EXPECT_EQ(blocks.count, 1);
      continue;
    }
    EXPECT_LE(blocks.keys.begin, first);
    EXPECT_EQ(blocks.keys.end, last + 1);
    EXPECT_EQ(blocks.first, blocks.keys.begin / block_keys);
    EXPECT_EQ(blocks.first + blocks.count - 1, last / block_keys);
  }
}

TEST(DecodeSchedule, ACtaHoldsTheRowsOfSpeculationWithGroups) {
  for (int head_dim : {64, 128, 256}) {
    for (int cache_bytes : {1, 2}) {
      for (int rows : {1, 8, 9, 16, 17, 32}) {
        const DecodeShape shape = decode_shape(head_dim, cache_bytes, rows);
        EXPECT_GE(shape.rows(), rows);
        EXPECT_EQ(kDecodeWarps % shape.team, 0);
      }
      EXPECT_EQ(decode_shape(head_dim, cache_bytes, 8).rows(), 8);
    }
  }
}

}  // namespace
}  // namespace parallax::tests
