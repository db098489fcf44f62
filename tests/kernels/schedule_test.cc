// SPDX-License-Identifier: MIT
// The CUDA forward's arithmetic, against counting on fingers.
#include "kernels/cuda/schedule.h"

#include <gtest/gtest.h>

#include <set>
#include <vector>

namespace parallax::tests {
namespace {

TEST(Schedule, EveryTicketIsADifferentTile) {
  for (auto [q_tiles, pairs, section] :
       {std::tuple{1, 1, 1}, {5, 7, 3}, {5, 7, 7}, {1, 9, 4}, {16, 6, 2}, {3, 8, 1}}) {
    std::set<std::pair<int, int>> seen;
    for (int ticket = 0; ticket < q_tiles * pairs; ++ticket) {
      const TilePlace place = place_tile(ticket, q_tiles, pairs, section);
      EXPECT_GE(place.pair, 0);
      EXPECT_LT(place.pair, pairs);
      EXPECT_GE(place.q_tile, 0);
      EXPECT_LT(place.q_tile, q_tiles);
      EXPECT_TRUE(seen.emplace(place.pair, place.q_tile).second);
    }
  }
}

TEST(Schedule, LongTilesComeFirstWithinASection) {
  int last = 4;
  for (int ticket = 0; ticket < 5 * 3; ++ticket) {
    const TilePlace place = place_tile(ticket, 5, 7, 3);
    EXPECT_LT(place.pair, 3);
    EXPECT_LE(place.q_tile, last);
    last = place.q_tile;
  }
}

TEST(Schedule, ASectionHoldsWholeGroups) {
  const int keys = section_keys(128);
  EXPECT_EQ(keys, 32768);
  EXPECT_EQ(section_pairs(keys, 8192, 1, 32), 4);
  EXPECT_EQ(section_pairs(keys, 8192, 4, 64), 16);
  EXPECT_EQ(section_pairs(keys, 8192, 4, 16), 16);
  EXPECT_EQ(section_pairs(keys, 1 << 20, 3, 6), 3);
  EXPECT_EQ(section_pairs(keys, 0, 1, 6), 6);
}

// All masks of small sequences, all query ranges of up to 32.
template <class F>
void for_each_mask(const F& f) {
  for (int q_len : {1, 31, 40}) {
    for (auto [kv_begin, kv_end] :
         {std::pair{0, 0}, {0, 1}, {0, 40}, {3, 41}, {0, 64}, {9, 100}, {0, 200}}) {
      for (int window : {-1, 0, 1, 5, 33, 120}) {
        const Mask mask{q_len, kv_begin, kv_end, window >= 0, window > 0 ? window : 0};
        for (int first = 0; first < q_len; first += 7) {
          f(mask, Range{first, first + 32 < q_len ? first + 32 : q_len});
        }
      }
    }
  }
}

bool sees(const Mask& mask, int query, int key) {
  const Range keys = mask.keys(query);
  return key >= keys.begin && key < keys.end;
}

TEST(Schedule, RowMaskIsTheMask) {
  for_each_mask([](const Mask& mask, Range) {
    for (int i = 0; i < mask.q_len; ++i) {
      const Range rows = row_mask(mask).keys(i);
      const Range keys = mask.keys(i);
      EXPECT_EQ(rows.empty(), keys.empty());
      if (keys.empty()) continue;
      EXPECT_EQ(rows.begin, keys.begin);
      EXPECT_EQ(rows.end, keys.end);
    }
  });
}

TEST(Schedule, KeyTilesHoldEveryVisibleKeyAndNoTileTooMany) {
  for_each_mask([](const Mask& mask, Range queries) {
    for (int width : {16, 20}) {
      const KeyTiles tiles = key_tiles(row_mask(mask), queries, width);
      int lowest = 1 << 30;
      int highest = -1;
      for (int i = queries.begin; i < queries.end; ++i) {
        for (int j = 0; j < 240; ++j) {
          if (!sees(mask, i, j)) continue;
          lowest = std::min(lowest, j);
          highest = std::max(highest, j);
        }
      }
      if (highest < 0) {
        EXPECT_EQ(tiles.count, 0);
        continue;
      }
      EXPECT_EQ(tiles.first, lowest / width);
      EXPECT_EQ(tiles.first + tiles.count - 1, highest / width);
    }
  });
}

TEST(Schedule, InteriorTilesNeedNoMaskAndComeAfterEnoughKeys) {
  int interiors = 0;
  for_each_mask([&](const Mask& mask, Range queries) {
    for (int width : {4, 16}) {
      const Range interior = interior_tiles(row_mask(mask), queries, width);
      const KeyTiles visited = key_tiles(row_mask(mask), queries, width);
      for (int tile = visited.first; tile < visited.first + visited.count; ++tile) {
        bool whole = true;
        for (int i = queries.begin; i < queries.end; ++i) {
          for (int j = tile * width; j < (tile + 1) * width; ++j) whole &= sees(mask, i, j);
          int met = 0;
          for (int j = (tile + 1) * width; j < 240; ++j) met += sees(mask, i, j);
          whole &= met >= (i + 1 == queries.end ? kSettledKeys : 1);
        }
        EXPECT_EQ(tile >= interior.begin && tile < interior.end, whole)
            << "tile " << tile << " of width " << width;
        interiors += whole;
      }
    }
  });
  EXPECT_GT(interiors, 100);
}

TEST(Schedule, VisibleColumnsAreThoseInTheRange) {
  for (int keys : {64, 80, 128, 192}) {
    for (int begin = -3; begin < keys + 3; begin += 5) {
      for (int end = begin; end < keys + 20; end += 3) {
        for (int quad_lane = 0; quad_lane < 4; ++quad_lane) {
          const auto mask = visible_columns<std::uint64_t>(begin, end, quad_lane, keys / 4);
          for (int n = 0; n < keys / 4; ++n) {
            const int column = 8 * (n / 2) + 2 * quad_lane + n % 2;
            ASSERT_EQ((mask >> n) & 1, column >= begin && column < end ? 1u : 0u)
                << keys << " keys, [" << begin << ", " << end << "), column " << column;
          }
        }
      }
    }
  }
}

}  // namespace
}  // namespace parallax::tests
