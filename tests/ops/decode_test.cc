// SPDX-License-Identifier: MIT
// torch.ops.parallax.{decode, append_kv, merge, finalize} from C++.
#include <ATen/autocast_mode.h>
#include <gtest/gtest.h>

#include <limits>

#include "tests/ops/formula.h"

namespace parallax::ops {
namespace {

using at::Tensor;

const double kNaN = std::numeric_limits<double>::quiet_NaN();

// A cache of `capacity` places, the keys of each sequence at its front, NaN beyond.
Tensor poisoned(const Tensor& keys, const Tensor& kv_lens, std::int64_t capacity) {
  Tensor cache =
      at::full({keys.size(0), capacity, keys.size(2), keys.size(3)}, kNaN, keys.options());
  for (std::int64_t b = 0; b < keys.size(0); ++b) {
    const std::int64_t len = kv_lens[b].item<std::int32_t>();
    cache[b].slice(0, 0, len).copy_(keys[b].slice(0, 0, len));
  }
  return cache;
}

TEST(Decode, EqualsAttentionOverTheVisibleKeysOnly) {
  torch::manual_seed(1);
  for (const std::int64_t q_len : {1, 3}) {
    for (const bool windowed : {false, true}) {
      const Inputs inputs = random_inputs({3, q_len, 9, 6, 2, 16});
      const Tensor kv_lens = int_tensor({9, 4, 6});
      const Tensor k_cache = poisoned(inputs.k, kv_lens, 12);
      const Tensor v_cache = poisoned(inputs.v, kv_lens, 12);
      AttentionOptions options;
      DecodeOptions decode_options;
      options.kv_lens = kv_lens;
      options.kv_start = decode_options.kv_start = int_tensor({0, 1, 5});
      options.scale = decode_options.scale = 0.3;
      if (windowed) options.window = decode_options.window = 2;
      const auto [expected_o, expected_lse, expected_t_bar] = formula(inputs, options);
      const auto [o, lse, t_bar] =
          decode_with_stats(inputs.q, inputs.r, k_cache, v_cache, kv_lens, decode_options);
      EXPECT_LT(max_difference(o, expected_o), 1e-12);
      EXPECT_LT(max_difference(lse, expected_lse), 1e-12);
      EXPECT_LT(max_difference(t_bar, expected_t_bar), 1e-12);
      EXPECT_TRUE(
          at::equal(o, decode(inputs.q, inputs.r, k_cache, v_cache, kv_lens, decode_options)));
    }
  }
}

TEST(Decode, AfterAppendsEqualsCausalAttention) {
  torch::manual_seed(2);
  const Inputs inputs = random_inputs({2, 7, 7, 4, 2, 16});
  Tensor k_cache = at::full({2, 9, 2, 16}, kNaN, at::kDouble);
  Tensor v_cache = k_cache.clone();
  std::vector<Tensor> outputs;
  for (std::int64_t begin = 0; begin < 7; begin += 2) {  // steps of 2, 2, 2, 1 tokens
    const std::int64_t end = std::min<std::int64_t>(begin + 2, 7);
    const auto step = [&](const Tensor& x) { return x.slice(1, begin, end); };
    const auto at_place = [](std::int64_t place) {
      return int_tensor({static_cast<std::int32_t>(place), static_cast<std::int32_t>(place)});
    };
    append_kv(step(inputs.k), step(inputs.v), k_cache, v_cache, at_place(begin));
    outputs.push_back(decode(step(inputs.q), step(inputs.r), k_cache, v_cache, at_place(end)));
  }
  EXPECT_LT(max_difference(at::cat(outputs, 1), std::get<0>(formula(inputs, {}))), 1e-12);
  EXPECT_TRUE(k_cache.slice(1, 7, 9).isnan().all().item<bool>());
}

TEST(Decode, PagesEqualAContiguousCache) {
  torch::manual_seed(3);
  const Inputs inputs = random_inputs({2, 2, 8, 6, 2, 16}).to(at::kFloat);
  const Tensor kv_lens = int_tensor({8, 5});
  const Tensor expected = decode(inputs.q, inputs.r, inputs.k, inputs.v, kv_lens);
  for (const std::int64_t page_size : {1, 2, 4}) {
    const std::int64_t max_pages = 8 / page_size;
    const Tensor table = at::randperm(2 * max_pages).to(at::kInt).view({2, max_pages});
    Tensor k_pages = at::full({2 * max_pages, page_size, 2, 16}, kNaN, at::kFloat);
    Tensor v_pages = k_pages.clone();
    append_kv(inputs.k.slice(1, 0, 3), inputs.v.slice(1, 0, 3), k_pages, v_pages,
              int_tensor({0, 0}), table);
    append_kv(inputs.k.slice(1, 3, 5), inputs.v.slice(1, 3, 5), k_pages, v_pages,
              int_tensor({3, 3}), table);
    append_kv(inputs.k.slice(0, 0, 1).slice(1, 5, 8), inputs.v.slice(0, 0, 1).slice(1, 5, 8),
              k_pages, v_pages, int_tensor({5}), table.slice(0, 0, 1));
    DecodeOptions options;
    options.page_table = table.clone();
    // Entries that no visible key needs may hold anything.
    if (page_size <= 2) (*options.page_table)[1][max_pages - 1] = 1 << 30;
    EXPECT_TRUE(
        at::equal(expected, decode(inputs.q, inputs.r, k_pages, v_pages, kv_lens, options)));
  }
}

TEST(Decode, StatesOfAnySplitMergeToTheWhole) {
  torch::manual_seed(4);
  const Inputs inputs = random_inputs({2, 1, 10, 6, 2, 16}).to(at::kFloat);
  const Tensor kv_lens = int_tensor({10, 7});
  const auto [o, lse, t_bar] = decode_with_stats(inputs.q, inputs.r, inputs.k, inputs.v, kv_lens);
  for (const std::vector<std::int32_t>& cuts :
       {std::vector<std::int32_t>{0, 4, 10}, {0, 1, 2, 8, 10}, {0, 9, 9, 10}, {0, 10}}) {
    std::vector<DecodeState> states;
    for (std::size_t i = 0; i + 1 < cuts.size(); ++i) {
      DecodeOptions part;
      part.kv_start = int_tensor({cuts[i], cuts[i]});
      states.push_back(decode_state(inputs.q, inputs.r, inputs.k, inputs.v,
                                    kv_lens.clamp_max(cuts[i + 1]), part));
    }
    const DecodeState merged = merge(states);
    const auto [merged_o, merged_lse, merged_t_bar] = finalize(merged);
    EXPECT_LT(max_difference(merged_o, o), 2e-5);
    EXPECT_LT(max_difference(merged_lse, lse), 1e-5);
    EXPECT_LT(max_difference(merged_t_bar, t_bar), 1e-5);
    EXPECT_EQ(std::get<0>(finalize(merged, at::kBFloat16)).scalar_type(), at::kBFloat16);
  }
}

TEST(Decode, ReadsAnFp8Cache) {
  torch::manual_seed(6);
  const Inputs inputs = random_inputs({2, 1, 8, 6, 2, 16}).to(at::kBFloat16);
  const Tensor kv_lens = int_tensor({8, 5}), positions = int_tensor({0, 0});
  Tensor k_cache = at::zeros({2, 8, 2, 16}, at::kFloat8_e4m3fn), v_cache = k_cache.clone();
  DecodeOptions options;
  options.k_scale = at::tensor({0.01, 0.02}, at::kFloat);
  options.v_scale = at::tensor({0.03, 0.0078125}, at::kFloat);
  append_kv(inputs.k, inputs.v, k_cache, v_cache, positions, {}, options.k_scale, options.v_scale);
  const auto held = [](const Tensor& cache, const Tensor& scale) {
    return cache.to(at::kDouble) * scale.view({2, 1});
  };
  Inputs exact = inputs.to(at::kDouble);
  exact.k = held(k_cache, *options.k_scale);
  exact.v = held(v_cache, *options.v_scale);
  EXPECT_LT(max_difference(exact.k, inputs.k.to(at::kDouble)), 0.3);
  AttentionOptions visible;
  visible.kv_lens = kv_lens;
  const auto [expected, lse, t_bar] = formula(exact, visible);
  options.schedule = decode_schedule(inputs.q, k_cache, kv_lens, options);
  const Tensor o = decode(inputs.q, inputs.r, k_cache, v_cache, kv_lens, options);
  EXPECT_LT(max_difference(o.to(at::kDouble), expected), 0.02);
}

// Norm and RoPE composed of LibTorch's operations, as a model does them.
Tensor normed_and_turned(const Tensor& x, const Tensor& gain, const Tensor& cos,
                         const Tensor& sin) {
  const Tensor y = x * (x.square().mean(-1, true) + 1e-6).rsqrt() * gain;
  const std::vector<Tensor> halves = y.chunk(2, -1);
  return at::cat({halves[0] * cos - halves[1] * sin, halves[1] * cos + halves[0] * sin}, -1);
}

TEST(Decode, AppendsAfterNormAndRope) {
  torch::manual_seed(7);
  const Inputs inputs = random_inputs({2, 3, 3, 6, 2, 16});
  const Tensor angle = at::outer(at::arange(9, at::kFloat), at::rand({8}));
  const Tensor cos = angle.cos(), sin = angle.sin();
  RotaryOptions options;
  options.q_gain = at::rand({16}) + 0.5;
  options.r_gain = at::rand({16}) + 0.5;
  options.k_gain = at::rand({16}) + 0.5;
  Tensor k_cache = at::full({2, 9, 2, 16}, kNaN, at::kDouble), v_cache = k_cache.clone();
  const auto [q, r] = append_kv_rotary(inputs.q, inputs.r, inputs.k, inputs.v, k_cache, v_cache,
                                       int_tensor({4, 4}), cos, sin, options);
  const auto expected = [&](const Tensor& x, const Tensor& gain) {
    const auto rows = [](const Tensor& table) { return table.slice(0, 4, 7).unsqueeze(1); };
    return normed_and_turned(x, gain, rows(cos), rows(sin));
  };
  EXPECT_LT(max_difference(q, expected(inputs.q, *options.q_gain)), 1e-12);
  EXPECT_LT(max_difference(r, expected(inputs.r, *options.r_gain)), 1e-12);
  EXPECT_LT(max_difference(k_cache.slice(1, 4, 7), expected(inputs.k, *options.k_gain)), 1e-12);
  EXPECT_TRUE(at::equal(v_cache.slice(1, 4, 7), inputs.v));
  EXPECT_TRUE(k_cache.slice(1, 0, 4).isnan().all().item<bool>());
  EXPECT_TRUE(k_cache.slice(1, 7, 9).isnan().all().item<bool>());
}

TEST(Decode, AppendTellsAutogradThatTheCacheChanged) {
  Tensor cache = at::zeros({1, 4, 1, 8}), other = at::zeros({1, 4, 1, 8});
  const auto before = cache._version();
  append_kv(at::ones({1, 1, 1, 8}), at::ones({1, 1, 1, 8}), cache, other, int_tensor({2}));
  EXPECT_GT(cache._version(), before);
  EXPECT_EQ(cache.sum().item<float>(), 8);
}

TEST(Decode, AutocastCastsNewTokensAndLeavesCachesAlone) {
  torch::manual_seed(5);
  const Inputs inputs = random_inputs({1, 1, 4, 2, 1, 16}).to(at::kFloat);
  Tensor k_cache = at::zeros({1, 4, 1, 16}, at::kBFloat16), v_cache = k_cache.clone();
  const Tensor kv_lens = int_tensor({4});
  at::autocast::set_autocast_enabled(at::kCPU, true);
  at::autocast::set_autocast_dtype(at::kCPU, at::kBFloat16);
  append_kv(inputs.k, inputs.v, k_cache, v_cache, int_tensor({0}));
  const Tensor o = decode(inputs.q, inputs.r, k_cache, v_cache, kv_lens);
  at::autocast::clear_cache();
  at::autocast::set_autocast_enabled(at::kCPU, false);
  EXPECT_TRUE(at::equal(k_cache, inputs.k.to(at::kBFloat16)));
  const Inputs low = inputs.to(at::kBFloat16);
  EXPECT_TRUE(at::equal(o, decode(low.q, low.r, low.k, low.v, kv_lens)));
}

TEST(Decode, RunsInInferenceMode) {
  c10::InferenceMode guard;
  const Inputs inputs = random_inputs({1, 1, 4, 2, 1, 16});
  Tensor k_cache = at::zeros({1, 4, 1, 16}, at::kDouble), v_cache = k_cache.clone();
  append_kv(inputs.k, inputs.v, k_cache, v_cache, int_tensor({0}));
  const Tensor o = decode(inputs.q, inputs.r, k_cache, v_cache, int_tensor({4}));
  EXPECT_LT(max_difference(o, std::get<0>(formula(inputs, {}))), 1e-12);
}

}  // namespace
}  // namespace parallax::ops
