// SPDX-License-Identifier: MIT
#include "lm/data.h"

#include <gmock/gmock.h>

#include <set>

#include "tests/lm/small_dataset.h"

namespace parallax::lm {
namespace {

using testing::HasSubstr;

TEST(PermutedIndex, IsABijectionThatDependsOnTheSeed) {
  for (const std::int64_t count : {1, 2, 3, 7, 64, 65, 1000, 4097}) {
    std::set<std::int64_t> seen;
    std::int64_t moved = 0, differs = 0;
    for (std::int64_t i = 0; i < count; ++i) {
      const std::int64_t index = permuted_index(i, count, 5);
      ASSERT_GE(index, 0);
      ASSERT_LT(index, count);
      seen.insert(index);
      moved += index != i;
      differs += index != permuted_index(i, count, 6);
    }
    EXPECT_EQ(static_cast<std::int64_t>(seen.size()), count);
    if (count >= 1000) {
      EXPECT_GT(moved, count * 9 / 10);
      EXPECT_GT(differs, count * 9 / 10);
    }
  }
}

TEST(PermutedIndex, NeighboursAreSpread) {
  // A shuffled order has neighbours a third of the length apart, on average.
  constexpr std::int64_t kCount = 10000;
  double distance = 0;
  for (std::int64_t i = 1; i < kCount; ++i) {
    distance += static_cast<double>(
        std::abs(permuted_index(i, kCount, 1) - permuted_index(i - 1, kCount, 1)));
  }
  EXPECT_NEAR(distance / kCount / kCount, 1.0 / 3, 0.02);
}

class SamplerTest : public testing::Test {
 protected:
  SamplerTest() {
    make_small_dataset(folder_ / "data");
    dataset_ = Dataset::open(folder_ / "data");
  }
  TemporaryFolder folder_;
  std::shared_ptr<const Dataset> dataset_;
};

TEST_F(SamplerTest, AnEpochHoldsEverySequenceOnceAndTargetsFollowTokens) {
  constexpr std::int64_t kLen = 32;
  BatchSampler sampler(dataset_, kLen, 3);
  const std::int64_t sequences = sampler.sequences_per_epoch();
  ASSERT_EQ(sequences, (dataset_->train.size() - 1) / kLen);
  std::vector<std::int64_t> all(static_cast<std::size_t>(dataset_->train.size()));
  dataset_->train.read(0, dataset_->train.size(), all.data());

  for (int epoch = 0; epoch < 2; ++epoch) {
    std::multiset<std::vector<std::int64_t>> served, expected;
    std::int64_t bytes = 0, ends = 0;
    for (std::int64_t i = 0; i < sequences; ++i) {
      const Batch batch = sampler.next(1);
      const auto* tokens = batch.tokens.const_data_ptr<std::int64_t>();
      const auto* targets = batch.targets.const_data_ptr<std::int64_t>();
      std::vector<std::int64_t> row(tokens, tokens + kLen);
      ASSERT_TRUE(std::equal(row.begin() + 1, row.end(), targets));
      row.push_back(targets[kLen - 1]);
      served.insert(row);
      bytes += batch.bytes;
      ends += (batch.targets == 256).sum().item<std::int64_t>();
      const auto* chunk = all.data() + i * kLen;
      expected.insert({chunk, chunk + kLen + 1});
    }
    EXPECT_EQ(served, expected);
    EXPECT_EQ(bytes + ends, sequences * kLen);  // a byte a token, but for ends of documents
  }
}

TEST_F(SamplerTest, EpochsDifferSeedsDifferBatchSizesDoNot) {
  const auto first_row = [&](std::uint64_t seed, std::int64_t cursor, std::int64_t batch_size) {
    BatchSampler sampler(dataset_, 32, seed);
    sampler.seek(cursor);
    return sampler.next(batch_size).tokens[0];
  };
  const std::int64_t epoch = BatchSampler(dataset_, 32, 0).sequences_per_epoch();
  EXPECT_TRUE(at::equal(first_row(1, 5, 1), first_row(1, 5, 4)));
  EXPECT_FALSE(at::equal(first_row(1, 5, 1), first_row(2, 5, 1)));
  EXPECT_FALSE(at::equal(first_row(1, 5, 1), first_row(1, 5 + epoch, 1)));
}

TEST_F(SamplerTest, GoesOnFromItsCursor) {
  BatchSampler straight(dataset_, 16, 9);
  for (int i = 0; i < 50; ++i) straight.next(3);
  BatchSampler resumed(dataset_, 16, 9);
  resumed.seek(straight.cursor());
  EXPECT_EQ(straight.cursor(), 150);
  for (int i = 0; i < 50; ++i) {
    const Batch a = straight.next(3), b = resumed.next(3);
    ASSERT_TRUE(at::equal(a.tokens, b.tokens));
    ASSERT_TRUE(at::equal(a.targets, b.targets));
  }
}

TEST_F(SamplerTest, TooLittleTextIsRefused) {
  EXPECT_THAT(error_of([&] { BatchSampler(dataset_, dataset_->train.size(), 0); }),
              HasSubstr("data.seq_len"));
  BatchSampler longest(dataset_, dataset_->train.size() - 1, 0);
  EXPECT_EQ(longest.sequences_per_epoch(), 1);
}

TEST_F(SamplerTest, ValidationBatchesAreFixedAndSpread) {
  const auto all = validation_batches(*dataset_, 16, 4, 0);
  std::int64_t rows = 0;
  for (const Batch& batch : all) rows += batch.tokens.size(0);
  EXPECT_EQ(rows, (dataset_->val.size() - 1) / 16);

  const auto some = validation_batches(*dataset_, 16, 4, 2);
  const auto again = validation_batches(*dataset_, 16, 4, 2);
  ASSERT_EQ(some.size(), 2u);
  std::set<std::vector<std::int64_t>> different;
  for (std::size_t i = 0; i < some.size(); ++i) {
    EXPECT_TRUE(at::equal(some[i].tokens, again[i].tokens));
    for (std::int64_t row = 0; row < some[i].tokens.size(0); ++row) {
      const auto* tokens = some[i].tokens[row].const_data_ptr<std::int64_t>();
      different.insert({tokens, tokens + 16});
    }
  }
  EXPECT_EQ(different.size(), 8u);

  const auto shorter = validation_batches(*dataset_, 1 << 20, 4, 2);
  ASSERT_EQ(shorter.size(), 1u);
  EXPECT_EQ(shorter[0].tokens.size(1), dataset_->val.size() - 1);
}

}  // namespace
}  // namespace parallax::lm
