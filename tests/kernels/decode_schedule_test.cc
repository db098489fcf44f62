// SPDX-License-Identifier: MIT
// The arithmetic of the decode's schedule, on a CPU: blocks of keys, spans, shapes.
#include "kernels/cuda/decode_schedule.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <random>
#include <string>

namespace parallax::tests {
namespace {

TEST(DecodeSchedule, SpansCutALineIntoEqualPieces) {
  std::mt19937 generator(1);
  for (int repeat = 0; repeat < 300; ++repeat) {
    const int max_spans = 1 + static_cast<int>(generator() % 300);
    const int items = 1 + static_cast<int>(generator() % 40);
    const int total = items + static_cast<int>(generator() % 3000);
    const DecodeCut cut = decode_spans(items, max_spans).cut(total, 1, total + 1);
    const std::string name = std::to_string(total) + " in " + std::to_string(max_spans);
    EXPECT_EQ(cut.begin(0), 0) << name;
    EXPECT_EQ(cut.begin(max_spans), total) << name;
    const int longest = (total + max_spans - 1) / max_spans;
    for (int span = 0; span < max_spans; ++span) {
      const int size = cut.begin(span + 1) - cut.begin(span);
      EXPECT_LE(size, longest) << name;
      if (longest > 8) {
        EXPECT_GE(size, total / max_spans) << name;
      }
      for (int x = cut.begin(span); x < cut.begin(span + 1); ++x) {
        ASSERT_EQ(cut.span_of(x), span) << name;
      }
    }
  }
}

TEST(DecodeSchedule, SpansOfALongLine) {
  constexpr int kTotal = 2147483647;
  for (int max_spans : {1, 2, 33, 264, 1000}) {
    const DecodeCut cut = decode_spans(1, max_spans).cut(kTotal, kTotal, kTotal);
    EXPECT_EQ(cut.begin(max_spans), kTotal);
    for (int span = 0; span < max_spans; ++span) {
      const int begin = cut.begin(span);
      ASSERT_LT(begin, kTotal);
      EXPECT_EQ(cut.span_of(begin), span);
      if (span > 0) {
        EXPECT_EQ(cut.span_of(begin - 1), span - 1);
      }
    }
    EXPECT_EQ(cut.span_of(kTotal - 1), max_spans - 1);
  }
}

TEST(DecodeSchedule, EqualItemsStayWholeWhereThatTakesAQuarterLessSpansOrFewer) {
  struct Row {
    int items, max_spans, whole;
  };
  for (const Row& row :
       {Row{32, 33, 1}, Row{128, 33, 4}, Row{33, 33, 1}, Row{25, 33, 1}, Row{24, 33, 0},
        Row{1, 33, 0}, Row{8, 33, 0}, Row{40, 33, 0}, Row{66, 33, 2}, Row{130, 33, 5},
        Row{264, 264, 1}, Row{197, 264, 0}, Row{198, 264, 1}, Row{1, 1, 1}, Row{7, 1, 7}}) {
    const DecodeSpans spans = decode_spans(row.items, row.max_spans);
    const std::string name = std::to_string(row.items) + " in " + std::to_string(row.max_spans);
    EXPECT_EQ(spans.whole, row.whole) << name;
    const int total = 64 * row.items;
    if (row.whole > 0) {
      EXPECT_EQ(spans.cut(total, 64, 64).length, 64 * row.whole) << name;
      EXPECT_EQ(spans.cut(total, 64, 64).begin(row.max_spans), total) << name;
    }
    // Items of other lengths are cut anywhere, short ones into no more spans than needed.
    EXPECT_EQ(spans.cut(total, 63, 65).begin(1), (total - 1) / row.max_spans + 1) << name;
    EXPECT_EQ(spans.cut(total, 63, 65).begin(row.max_spans), total) << name;
  }
}

TEST(DecodeSchedule, OfShortSpansThereAreNoMoreThanKeepAllAsShort) {
  const DecodeCut cut = decode_spans(1, 33).cut(64, 64, 64);
  EXPECT_EQ(cut.begin(1), 2);
  EXPECT_EQ(cut.begin(31), 62);
  EXPECT_EQ(cut.begin(32), 64);
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
      for (bool portable : {false, true}) {
        const int least_team = decode_least_team(head_dim, portable);
        for (int rows : {1, 8, 9, 16, 17, 32}) {
          const DecodeShape shape = decode_shape(head_dim, cache_bytes, rows, portable);
          EXPECT_GE(shape.rows(), rows);
          EXPECT_GE(shape.team, least_team);
          EXPECT_EQ(kDecodeWarps % shape.team, 0);
        }
        EXPECT_EQ(decode_shape(head_dim, cache_bytes, 8, portable).rows(), 8 * least_team);
      }
    }
  }
}

// Every GPU's multiprocessors hold the portable kernels, and as many CTAs as their shared memory.
TEST(DecodeSchedule, CtasFitSharedMemory) {
  constexpr int kKiB = 1024;
  struct Row {
    int sm_shared_bytes;  // of compute capability 8.6, 8.9 and 12.0; 8.0; 9.0 and 10.0
    int ctas[3];          // of head_dim 64, 128, 256
  };
  for (const Row& row :
       {Row{100 * kKiB, {2, 1, 1}}, {164 * kKiB, {2, 2, 2}}, {228 * kKiB, {2, 2, 2}}}) {
    int n = 0;
    for (int head_dim : {64, 128, 256}) {
      const int ctas = decode_ctas_per_sm(head_dim, true, row.sm_shared_bytes);
      EXPECT_EQ(ctas, row.ctas[n++]) << head_dim << " in " << row.sm_shared_bytes;
      EXPECT_LE(ctas * (decode_shared_bytes(head_dim, true) + kKiB), row.sm_shared_bytes);
      if (row.sm_shared_bytes < 228 * kKiB) continue;
      EXPECT_EQ(decode_ctas_per_sm(head_dim, false, row.sm_shared_bytes), head_dim > 128 ? 1 : 2);
    }
  }
}

}  // namespace
}  // namespace parallax::tests
