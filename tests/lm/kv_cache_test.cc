// SPDX-License-Identifier: MIT
#include "lm/kv_cache.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <map>
#include <random>
#include <set>

#include "lm/error.h"
#include "ops/parallax_ops.h"

namespace parallax::lm {
namespace {

using testing::HasSubstr;
using testing::ThrowsMessage;

constexpr std::int64_t kLayers = 2;

ModelConfig small_config() {
  ModelConfig config;
  config.num_layers = kLayers;
  config.num_kv_heads = 2;
  config.head_dim = 8;
  return config;
}

// Keys of a token are its number, values minus that, plus a hundredth of the layer.
at::Tensor keys_of(const std::vector<float>& tokens, std::int64_t layer) {
  return (at::tensor(tokens) + 0.01 * static_cast<double>(layer))
      .view({1, -1, 1, 1})
      .expand({1, static_cast<std::int64_t>(tokens.size()), 2, 8})
      .contiguous();
}

// A cache, and beside it plain vectors that hold what it should.
class Twin {
 public:
  explicit Twin(const KvCacheShape& shape)
      : cache(small_config(), shape), rows(shape.batch), shape_(shape) {
    for (std::int64_t layer = 0; layer < kLayers; ++layer) {
      cache.k(layer).fill_(std::nan(""));
      cache.v(layer).fill_(std::nan(""));
    }
    addresses_ = addresses();
  }

  // New tokens for each of the rows, as a mixer would bring them.
  void append(RowRange range, std::int64_t count) {
    cache.append(range, count);
    std::vector<at::Tensor> k[kLayers], v[kLayers];
    for (std::int64_t row = range.first; row < range.first + range.count; ++row) {
      std::vector<float> tokens;
      for (std::int64_t i = 0; i < count; ++i) tokens.push_back(static_cast<float>(++newest_));
      rows[row].insert(rows[row].end(), tokens.begin(), tokens.end());
      for (std::int64_t layer = 0; layer < kLayers; ++layer) {
        k[layer].push_back(keys_of(tokens, layer));
        v[layer].push_back(-k[layer].back());
      }
    }
    for (std::int64_t layer = 0; layer < kLayers; ++layer) {
      ops::append_kv(at::cat(k[layer]), at::cat(v[layer]), cache.k(layer), cache.v(layer),
                     cache.positions(range), cache.page_table(range));
    }
  }

  void fork(std::int64_t from, std::int64_t to) {
    cache.fork(from, to);
    rows[to] = rows[from];
  }

  void fork(std::int64_t from, std::int64_t to, std::int64_t len) {
    cache.fork(from, to, len);
    rows[to].assign(rows[from].begin(), rows[from].begin() + len);
  }

  void release(std::int64_t row) {
    cache.release(row);
    rows[row].clear();
  }

  // Pages that `count` more tokens of the row ask of the pool, by counting holders.
  std::int64_t pages_needed(std::int64_t row, std::int64_t count) const {
    const auto len = static_cast<std::int64_t>(rows[row].size());
    const auto& pages = cache.pages(row);
    const std::int64_t wanted = (len + count + shape_.page_size - 1) / shape_.page_size;
    std::int64_t needed = std::max<std::int64_t>(wanted - std::ssize(pages), 0);
    if (len % shape_.page_size != 0 && holders().at(pages[len / shape_.page_size]) > 1) ++needed;
    return needed;
  }

  void check() const {
    for (std::int64_t row = 0; row < shape_.batch; ++row) check_row(row);
    EXPECT_EQ(cache.num_free_pages(), cache.num_pages() - std::ssize(holders()));
    EXPECT_EQ(addresses(), addresses_);
  }

  KvCache cache;
  std::vector<std::vector<float>> rows;

 private:
  std::map<std::int32_t, int> holders() const {
    std::map<std::int32_t, int> result;
    for (std::int64_t row = 0; row < shape_.batch; ++row) {
      for (const std::int32_t page : cache.pages(row)) ++result[page];
    }
    return result;
  }

  void check_row(std::int64_t row) const {
    const auto len = static_cast<std::int64_t>(rows[row].size());
    ASSERT_EQ(cache.len(row), len);
    EXPECT_EQ(cache.kv_lens({row, 1}).item<int>(), len);
    const auto& pages = cache.pages(row);
    EXPECT_EQ(std::set<std::int32_t>(pages.begin(), pages.end()).size(), pages.size());
    if (len == 0) return;
    for (std::int64_t layer = 0; layer < kLayers; ++layer) {
      const at::Tensor expected = keys_of(rows[row], layer);
      auto& mutable_cache = const_cast<KvCache&>(cache);
      EXPECT_TRUE(at::equal(cache.row_of(mutable_cache.k(layer), row), expected)) << "row " << row;
      EXPECT_TRUE(at::equal(cache.row_of(mutable_cache.v(layer), row), -expected)) << "row " << row;
    }
  }

  std::vector<const void*> addresses() const {
    const RowRange all{0, shape_.batch};
    return {cache.positions(all).const_data_ptr(), cache.kv_lens(all).const_data_ptr(),
            cache.page_table(all).const_data_ptr()};
  }

  KvCacheShape shape_;
  std::vector<const void*> addresses_;
  int newest_ = 0;
};

class Operations : public testing::TestWithParam<std::int64_t> {};
INSTANTIATE_TEST_SUITE_P(PageSizes, Operations, testing::Values(1, 2, 4, 16));

TEST_P(Operations, InAnyOrderHoldWhatPlainVectorsHold) {
  constexpr std::int64_t kRows = 6, kMaxLen = 40;
  const std::int64_t page_size = GetParam();
  // Room for two full rows and a half, so that the pool runs dry now and then.
  const KvCacheShape shape{kRows, kMaxLen, page_size, 100 / page_size};
  int full = 0, copies = 0;
  for (std::uint32_t seed = 0; seed < 12; ++seed) {
    Twin twin(shape);
    std::mt19937 random(seed);
    const auto below = [&](std::int64_t bound) {
      return static_cast<std::int64_t>(random() % static_cast<std::uint32_t>(bound));
    };
    for (int operation = 0; operation < 300; ++operation) {
      const std::int64_t row = below(kRows), other = below(kRows), count = 1 + below(9);
      switch (below(6)) {
        case 0:
        case 1:
        case 2: {
          if (std::ssize(twin.rows[row]) + count > kMaxLen) break;
          const std::int64_t free = twin.cache.num_free_pages();
          const std::int64_t needed = twin.pages_needed(row, count);
          const auto pages = twin.cache.pages(row);
          if (below(4) == 0 && needed <= free) twin.cache.reserve(row, count);
          if (needed <= free) {
            twin.append({row, 1}, count);
            EXPECT_EQ(twin.cache.num_free_pages(), free - needed);
            copies += !std::equal(pages.begin(), pages.end(), twin.cache.pages(row).begin());
          } else {
            EXPECT_THROW(twin.append({row, 1}, count), Error);
            EXPECT_EQ(twin.cache.pages(row), pages);
            ++full;
          }
          break;
        }
        case 3:
          if (row == other || !twin.rows[other].empty() || !twin.cache.pages(other).empty()) {
            EXPECT_THROW(twin.cache.fork(row, other), Error);
          } else if (below(2) == 0) {
            twin.fork(row, other);
          } else {
            twin.fork(row, other, below(std::ssize(twin.rows[row]) + 1));
          }
          break;
        case 4:
          twin.release(row);
          break;
        case 5: {  // a token for each of several, sharing pages or not
          const RowRange range{std::min(row, other), std::abs(row - other) + 1};
          try {
            twin.append(range, 1);
          } catch (const Error&) {
            ++full;
          }
          break;
        }
      }
      twin.check();
      if (HasFatalFailure()) return;
    }
    for (std::int64_t row = 0; row < kRows; ++row) twin.release(row);
    EXPECT_EQ(twin.cache.num_free_pages(), twin.cache.num_pages());
  }
  EXPECT_GT(full, 5);
  if (page_size > 1) {
    EXPECT_GT(copies, 5);
  }
}

TEST(KvCache, AReservationHoldsWhileOthersTakeTheRest) {
  Twin twin({.batch = 2, .max_len = 64, .page_size = 4, .num_pages = 10});
  twin.append({0, 1}, 6);
  twin.cache.reserve(0, 20);  // 7 pages in all
  EXPECT_EQ(twin.cache.num_free_pages(), 3);
  twin.append({1, 1}, 12);
  EXPECT_THROW(twin.append({1, 1}, 1), Error);
  for (int i = 0; i < 20; ++i) twin.append({0, 1}, 1);
  twin.check();
}

TEST(KvCache, AForkSharesPagesUntilItWrites) {
  Twin twin({.batch = 3, .max_len = 64, .page_size = 8, .num_pages = 20});
  twin.append({0, 1}, 20);  // 2 pages and a half
  twin.fork(0, 1);
  twin.fork(0, 2);
  EXPECT_EQ(twin.cache.num_free_pages(), 17);
  twin.append({0, 3}, 1);  // two copy the half page, the third keeps it
  EXPECT_EQ(twin.cache.num_free_pages(), 15);
  EXPECT_EQ(twin.cache.pages(0)[1], twin.cache.pages(2)[1]);
  EXPECT_NE(twin.cache.pages(0)[2], twin.cache.pages(2)[2]);
  twin.check();
  twin.release(0);
  EXPECT_EQ(twin.cache.num_free_pages(), 16);
  twin.check();
}

TEST(KvCache, ABeginningIsSharedUntilItGoesOnOtherwise) {
  Twin twin({.batch = 3, .max_len = 64, .page_size = 8, .num_pages = 20});
  twin.append({0, 1}, 30);
  twin.fork(0, 1, 16);
  twin.fork(0, 2, 12);
  EXPECT_EQ(twin.cache.num_free_pages(), 16);
  twin.append({1, 1}, 1);  // begins a page
  EXPECT_EQ(twin.cache.num_free_pages(), 15);
  twin.append({2, 1}, 1);  // in the middle of one that others see whole
  EXPECT_EQ(twin.cache.num_free_pages(), 14);
  twin.append({0, 1}, 1);  // in one that it does not share
  EXPECT_EQ(twin.cache.num_free_pages(), 14);
  twin.check();
  twin.release(0);
  EXPECT_EQ(twin.cache.num_free_pages(), 16);
  twin.check();
}

TEST(KvCache, AFullPageIsNeverCopied) {
  Twin twin({.batch = 2, .max_len = 64, .page_size = 8, .num_pages = 4});
  twin.append({0, 1}, 16);
  twin.fork(0, 1);
  twin.append({0, 2}, 8);
  EXPECT_EQ(twin.cache.num_free_pages(), 0);
  twin.check();
}

TEST(KvCache, WhatIdleRowsWriteNobodySees) {
  Twin twin({.batch = 4, .max_len = 8, .page_size = 2});
  twin.append({0, 1}, 3);
  twin.append({2, 1}, 1);
  twin.cache.append({0, 1}, 1);
  twin.rows[0].push_back(100);
  twin.cache.append({2, 1}, 1);
  twin.rows[2].push_back(102);
  const at::Tensor tokens = at::tensor({100.f, 101.f, 102.f, 103.f}).view({4, 1, 1, 1});
  for (std::int64_t layer = 0; layer < kLayers; ++layer) {
    const at::Tensor k = (tokens + 0.01 * static_cast<double>(layer)).expand({4, 1, 2, 8});
    ops::append_kv(k.contiguous(), -k, twin.cache.k(layer), twin.cache.v(layer),
                   twin.cache.positions({0, 4}), twin.cache.page_table({0, 4}));
  }
  twin.check();
}

TEST(KvCache, HandsOnTheNewestTokens) {
  KvCache cache(small_config(), {.batch = 4, .max_len = 3, .page_size = 2});
  cache.append(1, {7, 8});
  EXPECT_TRUE(at::equal(cache.newest({0, 4}), at::tensor({0, 7, 8, 0}, at::kInt).unsqueeze(1)));
  EXPECT_EQ(cache.len(0), 0);
  EXPECT_EQ(cache.len(1), 1);
  EXPECT_EQ(cache.len(2), 1);
  cache.append({2, 1}, 2);
  EXPECT_THROW(cache.append(0, {1, 2, 3}), Error);  // row 2 is full
  EXPECT_TRUE(at::equal(cache.newest({0, 4}), at::tensor({0, 7, 8, 0}, at::kInt).unsqueeze(1)));
  EXPECT_EQ(cache.len(0), 0);
}

// Counts are then where an append would have put them; nothing that the device knows is
// overwritten.
TEST(KvCache, CountsWhatTheDeviceHasCounted) {
  KvCache cache(small_config(), {.batch = 2, .max_len = 9, .page_size = 2});
  cache.append(0, {7, 8});
  const RowRange rows{0, 2};
  const auto refused =
      ThrowsMessage<Error>(HasSubstr("the device has not counted a token more in rows 0 to 1"));
  EXPECT_THAT([&] { cache.append_counted(rows); }, refused);
  for (std::int64_t len = 2; len <= 9; ++len) {
    cache.let_device_count(rows);
    EXPECT_THAT(
        [&] {
          cache.append_counted({0, 1});
        },
        ThrowsMessage<Error>(HasSubstr("rows 0 to 0")));
    cache.append_counted(rows);
    EXPECT_EQ(cache.len(1), len);
    EXPECT_EQ(std::ssize(cache.pages(1)), (len + 1) / 2);
  }
  EXPECT_THAT([&] { cache.append_counted(rows); }, ThrowsMessage<Error>(HasSubstr("room for 9")));
  cache.release(1);
  EXPECT_THAT([&] { cache.append_counted(rows); }, refused);
}

TEST(KvCache, SaysWhyItCannot) {
  const ModelConfig config = small_config();
  const auto message_of = [&](const KvCacheShape& shape) {
    try {
      KvCache cache(config, shape);
    } catch (const Error& error) {
      return std::string(error.what());
    }
    return std::string();
  };
  EXPECT_THAT(message_of({.batch = 0, .max_len = 8}), HasSubstr("batch"));
  EXPECT_THAT(message_of({.batch = 1, .max_len = 0}), HasSubstr("max_len"));
  EXPECT_THAT(message_of({.batch = 1, .max_len = 8, .page_size = 48}), HasSubstr("got 48"));
  EXPECT_THAT(message_of({.batch = 1, .max_len = 8, .page_size = 512}), HasSubstr("got 512"));
  EXPECT_THAT(message_of({.batch = 1, .max_len = 8, .num_pages = -1}), HasSubstr("num_pages"));

  KvCache cache(config, {.batch = 2, .max_len = 20, .page_size = 4, .num_pages = 6});
  cache.append({0, 1}, 17);
  EXPECT_THAT(
      [&] {
        cache.append({1, 1}, 9);
      },
      ThrowsMessage<Error>(HasSubstr("3 more pages of 4 tokens needed, 1 of 6 are free")));
  EXPECT_THAT(
      [&] {
        cache.append({0, 1}, 4);
      },
      ThrowsMessage<Error>(HasSubstr("room for 20 tokens, 21 needed")));
  EXPECT_THAT([&] { cache.release(2); }, ThrowsMessage<Error>(HasSubstr("no row 2")));
  EXPECT_THAT([&] { cache.fork(1, 0); }, ThrowsMessage<Error>(HasSubstr("release it")));
  for (const std::int64_t len : {-1, 18}) {
    EXPECT_THAT([&] { cache.fork(0, 1, len); },
                ThrowsMessage<Error>(HasSubstr("row 0 holds 17 tokens")));
  }
  EXPECT_EQ(cache.len(1), 0);
}

}  // namespace
}  // namespace parallax::lm
