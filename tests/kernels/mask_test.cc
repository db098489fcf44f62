// SPDX-License-Identifier: MIT
// Masks, exhaustively for short sequences, against the boolean matrix of attention.h's words.
#include "parallax/mask.h"

#include <gtest/gtest.h>

#include <limits>

#include "parallax/paged_kv.h"

namespace parallax::tests {
namespace {

constexpr int kMax = 9;

bool sees(const Mask& mask, int i, int j) {
  if (j < mask.kv_begin || j >= mask.kv_end) return false;
  if (!mask.causal) return true;
  const int own = mask.kv_end - mask.q_len + i;
  return j <= own && (mask.window == 0 || j > own - mask.window);
}

// f(mask) for every mask over at most kMax queries and keys.
template <class F>
void for_each_mask(const F& f) {
  for (int q_len = 1; q_len <= kMax; ++q_len) {
    for (int kv_begin = 0; kv_begin <= kMax; ++kv_begin) {
      for (int kv_end = 0; kv_end <= kMax; ++kv_end) {
        f(Mask{q_len, kv_begin, kv_end, false, 0});
        for (int window = 0; window <= kMax; ++window) {
          f(Mask{q_len, kv_begin, kv_end, true, window});
        }
      }
    }
  }
}

testing::Message operator_names(const Mask& mask) {
  return testing::Message() << "q_len " << mask.q_len << " keys [" << mask.kv_begin << ", "
                            << mask.kv_end << ") causal " << mask.causal << " window "
                            << mask.window;
}

TEST(Mask, KeysOfAQueryAreTheMatrixRow) {
  for_each_mask([](const Mask& mask) {
    for (int i = 0; i < mask.q_len; ++i) {
      const Range keys = mask.keys(i);
      ASSERT_LE(keys.begin, keys.end);
      for (int j = 0; j < kMax + 2; ++j) {
        ASSERT_EQ(keys.begin <= j && j < keys.end, sees(mask, i, j))
            << operator_names(mask) << " " << i << " " << j;
      }
    }
  });
}

TEST(Mask, QueriesOfAKeyAreTheMatrixColumn) {
  for_each_mask([](const Mask& mask) {
    for (int j = 0; j < kMax + 2; ++j) {
      const Range queries = mask.queries({j, j + 1});
      for (int i = 0; i < mask.q_len; ++i) {
        ASSERT_EQ(queries.begin <= i && i < queries.end, sees(mask, i, j))
            << operator_names(mask) << " " << i << " " << j;
      }
    }
  });
}

// For tiles: the bounds are tight, and covers() is exact.
TEST(Mask, TilesAreBoundedTightly) {
  for_each_mask([](const Mask& mask) {
    for (int begin = 0; begin < mask.q_len; ++begin) {
      for (int end = begin + 1; end <= mask.q_len; ++end) {
        Range expected{std::numeric_limits<int>::max(), 0};
        for (int i = begin; i < end; ++i) {
          for (int j = 0; j < kMax; ++j) {
            if (!sees(mask, i, j)) continue;
            expected.begin = std::min(expected.begin, j);
            expected.end = std::max(expected.end, j + 1);
          }
        }
        const Range keys = mask.keys({begin, end});
        ASSERT_EQ(keys.empty(), expected.empty()) << operator_names(mask);
        if (keys.empty()) continue;
        ASSERT_EQ(keys.begin, expected.begin) << operator_names(mask) << begin << " " << end;
        ASSERT_EQ(keys.end, expected.end) << operator_names(mask) << begin << " " << end;
        for (int first = 0; first < kMax; ++first) {
          for (int last = first + 1; last <= kMax; ++last) {
            bool all = true;
            for (int i = begin; i < end; ++i) {
              for (int j = first; j < last; ++j) all = all && sees(mask, i, j);
            }
            ASSERT_EQ(mask.covers({begin, end}, {first, last}), all) << operator_names(mask);
          }
        }
      }
    }
    for (int first = 0; first < kMax; ++first) {
      for (int last = first + 1; last <= kMax; ++last) {
        const Range queries = mask.queries({first, last});
        for (int i = 0; i < mask.q_len; ++i) {
          bool any = false;
          for (int j = first; j < last; ++j) any = any || sees(mask, i, j);
          ASSERT_EQ(queries.begin <= i && i < queries.end, any) << operator_names(mask);
        }
      }
    }
  });
}

TEST(Mask, TheLongestSequencesDoNotOverflow) {
  constexpr int kLongest = std::numeric_limits<int>::max();
  const Mask mask{kLongest, 0, 1, true, std::numeric_limits<std::int64_t>::max() / 2};
  EXPECT_TRUE(mask.keys(0).empty());
  EXPECT_EQ(mask.keys(kLongest - 1).end, 1);
  EXPECT_EQ(mask.queries({0, kLongest}).begin, kLongest - 1);
  const Mask wide{1, 0, kLongest, true, 5};
  EXPECT_EQ(wide.keys(0).begin, kLongest - 5);
  EXPECT_EQ(wide.keys(0).end, kLongest);
}

TEST(SequenceAt, ClampsLengthsToTheTensor) {
  AttentionProblem problem;
  problem.batch = 3;
  problem.q_len = 2;
  problem.kv_len = 10;
  const std::int32_t kv_lens[] = {7, 99, -4}, kv_start[] = {-1, 3, 12};
  Sequences sequences;
  sequences.kv_lens = kv_lens;
  sequences.kv_start = kv_start;
  const Mask a = sequence_at(problem, sequences, 0).mask;
  const Mask b = sequence_at(problem, sequences, 1).mask;
  const Mask c = sequence_at(problem, sequences, 2).mask;
  EXPECT_EQ(a.kv_begin, 0);
  EXPECT_EQ(a.kv_end, 7);
  EXPECT_EQ(b.kv_begin, 3);
  EXPECT_EQ(b.kv_end, 10);
  EXPECT_EQ(c.kv_begin, 10);
  EXPECT_EQ(c.kv_end, 0);
  EXPECT_TRUE(c.keys(1).empty());
}

TEST(KvRows, OffsetsAre64Bit) {
  const std::int32_t table[] = {5, 1 << 30, 0, 7};
  Sequence sequence;
  sequence.batch_idx = 1;
  const PageTable pages{table, 2, std::int64_t{1} << 31, 4};
  const KvRows paged = kv_rows(4096, 1024, pages, sequence);
  EXPECT_EQ(paged.offset(0), 0);
  EXPECT_EQ(paged.offset(5), 7 * 4096 + 1024);
  sequence.batch_idx = 0;
  EXPECT_EQ(kv_rows(4096, 1024, pages, sequence).offset(6), (std::int64_t{1} << 42) + 2048);
  sequence.batch_idx = 1 << 20;
  EXPECT_EQ(kv_rows(std::int64_t{1} << 20, 1 << 12, {}, sequence).offset(3),
            (std::int64_t{1} << 40) + 3 * 4096);
}

}  // namespace
}  // namespace parallax::tests
