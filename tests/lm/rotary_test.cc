// SPDX-License-Identifier: MIT
// ops::append_kv_rotary is what a model's attention does to q, r and k before it attends.
#include <gtest/gtest.h>

#include "lm/layers.h"
#include "ops/parallax_ops.h"

namespace parallax::lm {
namespace {

using at::Tensor;

TEST(Rotary, TheFusedAppendEqualsNormThenRope) {
  torch::manual_seed(1);
  constexpr std::int64_t kLen = 5, kPast = 9, kHeadDim = 32;
  constexpr double kEps = 1e-6;
  const Tensor q = at::randn({2, kLen, 6, kHeadDim}), r = at::randn({2, kLen, 6, kHeadDim});
  const Tensor k = at::randn({2, kLen, 2, kHeadDim}), v = at::randn({2, kLen, 2, kHeadDim});
  const Rope table = make_rope(at::arange(20), kHeadDim, 1e4, at::kFloat);
  const Rope rope = make_rope(at::arange(kPast, kPast + kLen), kHeadDim, 1e4, at::kFloat);
  ops::RotaryOptions options;
  options.q_gain = at::rand({kHeadDim}) + 0.5;
  options.k_gain = at::rand({kHeadDim}) + 0.5;
  options.eps = kEps;
  options.rotate_r = false;
  Tensor k_cache = at::zeros({2, 20, 2, kHeadDim}), v_cache = at::zeros_like(k_cache);
  const Tensor positions = at::full({2}, kPast, at::kInt);
  const auto [new_q, new_r] = ops::append_kv_rotary(
      q, r, k, v, k_cache, v_cache, positions, table.cos.squeeze(1), table.sin.squeeze(1), options);
  const auto written = [](const Tensor& cache) { return cache.narrow(1, kPast, kLen); };
  EXPECT_TRUE(at::allclose(new_q, rotate(rms_norm(q, *options.q_gain, kEps), rope), 1e-5, 1e-6));
  EXPECT_TRUE(at::equal(new_r, r));
  EXPECT_TRUE(
      at::allclose(written(k_cache), rotate(rms_norm(k, *options.k_gain, kEps), rope), 1e-5, 1e-6));
  EXPECT_TRUE(at::equal(written(v_cache), v));
}

}  // namespace
}  // namespace parallax::lm
