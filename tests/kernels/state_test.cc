// SPDX-License-Identifier: MIT
// The law of the online state: any way of cutting, ordering and merging the keys of a row gives the
// same row (docs/math.md sections 3 to 6).
#include "parallax/state.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <random>
#include <vector>

#include "tests/kernels/cases.h"

namespace parallax::tests {
namespace {

// One key as a row of one-dimensional values sees it.
struct Key {
  double s, t, v;
};

template <class Real>
struct Row {
  RowState<Real> state;
  Real o1 = 0, o2 = 0;
};

template <class Real>
void update(const Key& key, Real centre, Row<Real>* row) {
  const Real factor = row->state.raise(static_cast<Real>(key.s));
  const Real p = std::exp(static_cast<Real>(key.s) - row->state.m);
  const Real w = p * (static_cast<Real>(key.t) - centre);
  row->state.add(p, w);
  row->o1 = row->o1 * factor + p * static_cast<Real>(key.v);
  row->o2 = row->o2 * factor + w * static_cast<Real>(key.v);
}

template <class Real>
Row<Real> row_of(const std::vector<Key>& keys, std::size_t begin, std::size_t end) {
  Row<Real> row;
  for (std::size_t j = begin; j < end; ++j) update(keys[j], Real(0), &row);
  return row;
}

template <class Real>
Row<Real> merge_rows(const Row<Real>& a, const Row<Real>& b) {
  const Merged<Real> merged = merge(a.state, b.state);
  return {merged.state, merged.left * a.o1 + merged.right * b.o1,
          merged.left * a.o2 + merged.right * b.o2};
}

// The row by the definition, and sum p |t v|, |t_bar v_bar| and the like: what its rounding errors
// are measured against.
struct Exact {
  double o = 0, lse = 0, t_bar = 0, magnitude = 0;
};

Exact definition(const std::vector<Key>& keys) {
  long double high = -INFINITY, sum = 0, t_bar = 0, v_bar = 0, tv = 0, t_magnitude = 0;
  for (const Key& key : keys) high = std::max(high, static_cast<long double>(key.s));
  for (const Key& key : keys) sum += std::exp(key.s - high);
  Exact exact;
  exact.magnitude = 1;
  for (const Key& key : keys) {
    const long double p = std::exp(key.s - high) / sum;
    t_bar += p * key.t;
    v_bar += p * key.v;
    tv += p * key.t * key.v;
    t_magnitude += p * std::abs(key.t);
    exact.magnitude += static_cast<double>(p * std::abs(key.v) * (1 + std::abs(key.t)));
  }
  exact.magnitude += static_cast<double>(t_magnitude * std::abs(v_bar));
  exact.o = static_cast<double>((1 + t_bar) * v_bar - tv);
  exact.lse = static_cast<double>(high + std::log(sum));
  exact.t_bar = static_cast<double>(t_bar);
  return exact;
}

template <class Real>
void expect_row(const Row<Real>& row, const Exact& exact, double tolerance) {
  const Finalized<Real> result = finalize(row.state);
  EXPECT_NEAR(result.o(row.o1, row.o2), exact.o, tolerance * exact.magnitude);
  EXPECT_NEAR(result.lse, exact.lse, tolerance * std::max(1.0, std::abs(exact.lse)));
  EXPECT_NEAR(result.t_bar, exact.t_bar, tolerance * exact.magnitude);
}

std::vector<Key> random_keys(std::mt19937& generator, std::size_t count, double spread) {
  std::normal_distribution<double> normal;
  std::vector<Key> keys(count);
  // Floats, so that both precisions start from the same numbers.
  for (Key& key : keys) {
    key = {static_cast<float>(spread * normal(generator)),
           static_cast<float>(3 * normal(generator) + 1),
           static_cast<float>(normal(generator) + 1)};
  }
  return keys;
}

template <class Real>
class State : public testing::Test {
 protected:
  static constexpr double kTolerance = sizeof(Real) == 8 ? 1e-13 : 2e-5;
};
using Reals = testing::Types<float, double>;
TYPED_TEST_SUITE(State, Reals);

TYPED_TEST(State, AnyOrderOfUpdatesGivesTheRow) {
  std::mt19937 generator(1);
  for (double spread : {0.1, 1.0, 30.0, 1e3}) {
    for (std::size_t count : {1u, 2u, 17u, 100u}) {
      std::vector<Key> keys = random_keys(generator, count, spread);
      const Exact exact = definition(keys);
      std::shuffle(keys.begin(), keys.end(), generator);
      expect_row(row_of<TypeParam>(keys, 0, count), exact, this->kTolerance);
    }
  }
}

TYPED_TEST(State, AnySplitAndAnyTreeOfMergesGivesTheRow) {
  std::mt19937 generator(2);
  for (int repeat = 0; repeat < 200; ++repeat) {
    const std::size_t count = 1 + generator() % 64;
    const std::vector<Key> keys = random_keys(generator, count, repeat % 2 == 0 ? 1.0 : 50.0);
    std::vector<Row<TypeParam>> parts;
    for (std::size_t begin = 0; begin < count;) {
      const std::size_t end = std::min<std::size_t>(count, begin + generator() % 9);  // some empty
      parts.push_back(row_of<TypeParam>(keys, begin, end));
      begin = end;
    }
    while (parts.size() > 1) {
      std::shuffle(parts.begin(), parts.end(), generator);
      const Row<TypeParam> last = parts.back();
      parts.pop_back();
      parts.back() = merge_rows(parts.back(), last);
    }
    expect_row(parts[0], definition(keys), this->kTolerance);
  }
}

TYPED_TEST(State, MergeIsAssociativeAndCommutative) {
  std::mt19937 generator(3);
  for (int repeat = 0; repeat < 100; ++repeat) {
    const std::vector<Key> keys = random_keys(generator, 30, 10.0);
    const auto a = row_of<TypeParam>(keys, 0, 7), b = row_of<TypeParam>(keys, 7, 19),
               c = row_of<TypeParam>(keys, 19, 30);
    const Exact exact = definition(keys);
    expect_row(merge_rows(merge_rows(a, b), c), exact, this->kTolerance);
    expect_row(merge_rows(a, merge_rows(b, c)), exact, this->kTolerance);
    const auto ab = merge_rows(a, b), ba = merge_rows(b, a);
    EXPECT_EQ(ab.state.m, ba.state.m);
    EXPECT_EQ(ab.state.d1, ba.state.d1);
    EXPECT_EQ(ab.o2, ba.o2);
  }
}

TYPED_TEST(State, TheEmptyStateIsTheIdentity) {
  std::mt19937 generator(4);
  const std::vector<Key> keys = random_keys(generator, 20, 5.0);
  const auto row = row_of<TypeParam>(keys, 0, 20);
  const Row<TypeParam> empty;
  for (const auto& merged : {merge_rows(row, empty), merge_rows(empty, row)}) {
    EXPECT_EQ(merged.state.m, row.state.m);
    EXPECT_EQ(merged.state.d1, row.state.d1);
    EXPECT_EQ(merged.state.d2, row.state.d2);
    EXPECT_EQ(merged.o1, row.o1);
    EXPECT_EQ(merged.o2, row.o2);
  }
  const auto nothing = merge_rows(empty, empty);
  const auto result = finalize(nothing.state);
  EXPECT_EQ(result.lse, -std::numeric_limits<TypeParam>::infinity());
  EXPECT_EQ(result.t_bar, 0);
  EXPECT_EQ(result.o(nothing.o1, nothing.o2), 0);
}

TYPED_TEST(State, LargeLogitsNeitherOverflowNorVanish) {
  for (double high : {1e4, -1e4}) {
    const std::vector<Key> keys = {{high, 2, 3}, {high - 1, -1, 5}, {-high, 4, 7}};
    const Exact exact = definition(keys);
    const auto whole = row_of<TypeParam>(keys, 0, 3);
    const auto parts =
        merge_rows(row_of<TypeParam>(keys, 0, 1),
                   merge_rows(row_of<TypeParam>(keys, 1, 2), row_of<TypeParam>(keys, 2, 3)));
    expect_row(whole, exact, this->kTolerance);
    expect_row(parts, exact, this->kTolerance);
  }
}

TYPED_TEST(State, MNeedNotBeTheMaximum) {
  std::mt19937 generator(5);
  const std::vector<Key> keys = random_keys(generator, 40, 3.0);
  Row<TypeParam> raised, low = row_of<TypeParam>(keys, 20, 40);
  raised.state.raise(TypeParam(20));  // above every logit
  for (std::size_t j = 0; j < 20; ++j) update(keys[j], TypeParam(0), &raised);
  expect_row(merge_rows(raised, low), definition(keys), this->kTolerance);
}

TYPED_TEST(State, UncentringBringsTheCentreBack) {
  std::mt19937 generator(6);
  const std::vector<Key> keys = random_keys(generator, 25, 2.0);
  const TypeParam centre = TypeParam(1.25);
  Row<TypeParam> row;
  for (const Key& key : keys) update(key, centre, &row);
  const Exact exact = definition(keys);
  const Finalized<TypeParam> centred = finalize(row.state, centre);
  EXPECT_NEAR(centred.o(row.o1, row.o2), exact.o, this->kTolerance * exact.magnitude);
  EXPECT_NEAR(centred.t_bar, exact.t_bar, this->kTolerance * exact.magnitude);
  row.state.uncentre(centre);
  row.o2 += centre * row.o1;
  expect_row(row, exact, this->kTolerance);
}

TYPED_TEST(State, OneKeyGivesItsValueExactly) {
  for (TypeParam t : {TypeParam(0.3), TypeParam(-77.7), TypeParam(1e5)}) {
    const Key key = {12.345, static_cast<double>(t), 0.1};
    Row<TypeParam> row;
    update(key, t, &row);  // centred at its only probe, as the kernels do
    const Finalized<TypeParam> result = finalize(row.state, t);
    EXPECT_EQ(result.o(row.o1, row.o2), static_cast<TypeParam>(0.1));
    EXPECT_EQ(result.t_bar, t);
    EXPECT_EQ(result.lse, static_cast<TypeParam>(12.345));
  }
}

// The tensor forms of the same law.
TEST(MergeStates, FoldsInOrderAndMayAliasTheFirst) {
  const AttentionProblem problem = problem_of(DType::kFloat32, 2, 3, 1, 4, 2, 8);
  constexpr std::size_t kRows = 24, kElements = kRows * 8;
  std::mt19937 generator(7);
  const auto random = [&](std::size_t size, float low, float high) {
    std::vector<float> values(size);
    std::uniform_real_distribution<float> uniform(low, high);
    for (float& value : values) value = uniform(generator);
    return values;
  };
  std::vector<std::vector<float>> memory;
  std::vector<StateView> states;
  for (int i = 0; i < 3; ++i) {
    std::vector<float> parts[] = {random(kRows, -5, 5), random(kRows, 1, 9), random(kRows, -3, 3),
                                  random(kElements, -2, 2), random(kElements, -2, 2)};
    for (auto& part : parts) memory.push_back(std::move(part));
  }
  for (std::size_t i = 0; i < 15; i += 5) {
    states.push_back({memory[i].data(), memory[i + 1].data(), memory[i + 2].data(),
                      memory[i + 3].data(), memory[i + 4].data()});
  }
  const std::vector<std::vector<float>> before = memory;
  ASSERT_TRUE(merge_states(problem, states.data(), 3, states[0], parallel_for(3)).ok());
  for (std::size_t b = 0; b < 2; ++b) {
    for (std::size_t h = 0; h < 4; ++h) {
      for (std::size_t i = 0; i < 3; ++i) {
        const std::size_t row = (b * 4 + h) * 3 + i, vector = ((b * 3 + i) * 4 + h) * 8;
        Row<float> folded;
        for (std::size_t part = 0; part < 15; part += 5) {
          folded =
              merge_rows(folded, {{before[part][row], before[part + 1][row], before[part + 2][row]},
                                  before[part + 3][vector],
                                  before[part + 4][vector]});
        }
        EXPECT_EQ(memory[0][row], folded.state.m);
        EXPECT_FLOAT_EQ(memory[1][row], folded.state.d1);
        EXPECT_NEAR(memory[2][row], folded.state.d2, 1e-5);
        EXPECT_NEAR(memory[3][vector], folded.o1, 1e-5);
        EXPECT_NEAR(memory[4][vector], folded.o2, 1e-5);
      }
    }
  }
}

TEST(MergeStates, OfNothingIsTheIdentity) {
  const AttentionProblem problem = problem_of(DType::kFloat32, 1, 1, 1, 1, 1, 8);
  float m = 1, d1 = 1, d2 = 1, o1[8], o2[8];
  std::fill_n(o1, 8, 1.0f);
  std::fill_n(o2, 8, 1.0f);
  ASSERT_TRUE(merge_states(problem, nullptr, 0, {&m, &d1, &d2, o1, o2}, parallel_for(1)).ok());
  EXPECT_EQ(m, -std::numeric_limits<float>::infinity());
  EXPECT_EQ(d1, 0);
  EXPECT_EQ(d2, 0);
  EXPECT_EQ(o1[7], 0);
  EXPECT_EQ(o2[7], 0);
}

}  // namespace
}  // namespace parallax::tests
