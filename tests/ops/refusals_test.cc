// SPDX-License-Identifier: MIT
// What the operators refuse, and that each refusal names the argument, what was expected and what
// came.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <functional>
#include <string>

#include "tests/ops/formula.h"

namespace parallax::ops {
namespace {

using at::Tensor;
using testing::HasSubstr;

std::string message_of(const std::function<void()>& call) {
  try {
    call();
  } catch (const c10::Error& error) {
    return error.what_without_backtrace();
  }
  return "nothing was refused";
}

// A call that is right but for what a test changes.
struct AttentionCall {
  Tensor q = at::randn({2, 3, 6, 16}), r = at::randn({2, 3, 6, 16});
  Tensor k = at::randn({2, 5, 2, 16}), v = at::randn({2, 5, 2, 16});
  AttentionOptions options;
};

void expect_attention(const std::function<void(AttentionCall&)>& change, const char* message) {
  AttentionCall call;
  change(call);
  EXPECT_THAT(message_of([&] { attention(call.q, call.r, call.k, call.v, call.options); }),
              HasSubstr(std::string("parallax::attention: ") + message));
}

TEST(Refusals, AttentionNamesTensorsAndShapes) {
  using Call = AttentionCall;
  expect_attention(
      [](Call& c) { c.q = c.q[0]; },
      "q: expected [batch, q_len, num_q_heads, head_dim], got 3 dimensions, [3, 6, 16]");
  expect_attention([](Call& c) { c.q = c.r = c.q.to(at::kLong); },
                   "q: expected bfloat16, float16, float32 or float64, got int64");
  expect_attention(
      [](Call& c) {
        c.q = c.r = at::randn({2, 3, 6, 12});
      },
      "q: expected head_dim (last axis) a multiple of 8, from 8 to 256, got 12");
  expect_attention(
      [](Call& c) {
        c.q = c.r = at::randn({2, 3, 6, 264});
      },
      "q: expected head_dim (last axis) a multiple of 8, from 8 to 256, got 264");
  expect_attention(
      [](Call& c) {
        c.r = at::randn({2, 3, 2, 16});
      },
      "r: expected [2, 3, 6, 16] (the shape of q), got [2, 3, 2, 16]");
  expect_attention([](Call& c) { c.r = c.r.to(at::kBFloat16); },
                   "r: expected float32 like q, got bfloat16");
  expect_attention([](Call& c) { c.k = c.k.to(at::kHalf); },
                   "k: expected float32 like q, got float16");
  expect_attention(
      [](Call& c) {
        c.k = c.v = at::randn({1, 5, 2, 16});
      },
      "k: expected size 2 in axis 0 (the batch of q), got [1, 5, 2, 16]");
  expect_attention(
      [](Call& c) {
        c.k = c.v = at::randn({2, 5, 2, 24});
      },
      "k: expected size 16 in axis -1 (the head_dim of q), got [2, 5, 2, 24]");
  expect_attention(
      [](Call& c) {
        c.v = at::randn({2, 4, 2, 16});
      },
      "v: expected [2, 5, 2, 16] (the shape of the keys), got [2, 4, 2, 16]");
  expect_attention(
      [](Call& c) {
        c.k = c.v = at::randn({2, 5, 4, 16});
      },
      "q: expected a number of heads that is a multiple of the 4 heads of k, got 6");
  expect_attention([](Call& c) { c.k = c.k.to(at::kMeta); },
                   "k: expected device cpu like q, got meta");
}

TEST(Refusals, AttentionNeverCopiesStridesSilently) {
  expect_attention(
      [](AttentionCall& c) {
        c.q = at::randn({2, 3, 16, 6}).transpose(2, 3);
      },
      "q: expected a contiguous last axis (stride 1), got strides [288, 96, 1, 6]; pass "
      "q.contiguous()");
  expect_attention(
      [](AttentionCall& c) {
        c.v = at::randn({2, 5, 2, 32}).slice(3, 0, 32, 2);
      },
      "v: expected a contiguous last axis");
}

TEST(Refusals, AttentionNamesOptions) {
  using Call = AttentionCall;
  expect_attention([](Call& c) { c.options.window = 0; },
                   "window: expected at least 1 (the query's own key), got 0");
  expect_attention(
      [](Call& c) {
        c.options.window = 2;
        c.options.causal = false;
      },
      "window: expected causal=True with a window, got causal=False");
  expect_attention([](Call& c) { c.options.scale = std::nan(""); }, "scale: expected a finite");
  expect_attention(
      [](Call& c) {
        c.options.kv_lens = torch::tensor({5, 5}, at::kLong);
      },
      "kv_lens: expected int32, got int64");
  expect_attention([](Call& c) { c.options.kv_lens = int_tensor({5}); },
                   "kv_lens: expected [2] ([batch]), got [1]");
  expect_attention(
      [](Call& c) {
        c.options.kv_start = int_tensor({0, 0}).to(at::kMeta);
      },
      "kv_start: expected device cpu like q, got meta");
  expect_attention(
      [](Call& c) {
        c.options.kv_lens = int_tensor({5, 0, 5, 0}).slice(0, 0, 4, 2);
      },
      "kv_lens: expected a contiguous tensor, got strides [2]");
}

void make_packed(AttentionCall& c) {
  c.q = at::randn({6, 6, 16});
  c.r = at::randn({6, 6, 16});
  c.k = at::randn({10, 2, 16});
  c.v = at::randn({10, 2, 16});
  c.options.cu_seqlens_q = int_tensor({0, 2, 6});
  c.options.cu_seqlens_k = int_tensor({0, 4, 10});
}

void expect_packed(const std::function<void(AttentionCall&)>& change, const char* message) {
  expect_attention(
      [&](AttentionCall& c) {
        make_packed(c);
        change(c);
      },
      message);
}

TEST(Refusals, PackedRules) {
  using Call = AttentionCall;
  AttentionCall right;
  make_packed(right);
  attention(right.q, right.r, right.k, right.v, right.options);
  expect_packed([](Call& c) { c.options.cu_seqlens_k.reset(); },
                "cu_seqlens_k: expected together with cu_seqlens_q, got None");
  expect_packed([](Call& c) { c.options.cu_seqlens_q.reset(); },
                "cu_seqlens_q: expected together with cu_seqlens_k, got None");
  expect_packed(
      [](Call& c) {
        c.options.kv_lens = int_tensor({4, 6});
      },
      "kv_lens: expected None in the packed layout (cu_seqlens), got a tensor");
  expect_packed(
      [](Call& c) {
        c.q = at::randn({1, 6, 6, 16});
      },
      "q: expected packed [tokens, num_q_heads, head_dim] with cu_seqlens, got 4");
  expect_packed(
      [](Call& c) {
        c.options.cu_seqlens_k = int_tensor({0, 10});
      },
      "cu_seqlens_k: expected [3] ([batch + 1] like cu_seqlens_q), got [2]");
  expect_packed(
      [](Call& c) {
        c.options.cu_seqlens_q = int_tensor({0, 2, 7});
      },
      "cu_seqlens_q[2]: expected 6");
  expect_packed(
      [](Call& c) {
        c.options.cu_seqlens_q = int_tensor({1, 2, 6});
      },
      "cu_seqlens_q[0]: expected 0");
  expect_packed(
      [](Call& c) {
        c.options.cu_seqlens_k = int_tensor({0, 12, 10});
      },
      "cu_seqlens_k[2]");
}

TEST(Refusals, PagesServeForwardOnly) {
  AttentionCall c;
  c.k = at::randn({4, 4, 2, 16});
  c.v = at::randn({4, 4, 2, 16});
  c.options.page_table = int_tensor({0, 1, 2, 3}).view({2, 2});
  attention(c.q, c.r, c.k, c.v, c.options);
  c.q.requires_grad_();
  EXPECT_THAT(message_of([&] { attention(c.q, c.r, c.k, c.v, c.options); }),
              HasSubstr("page_table: expected None where q, r, k or v requires grad"));
}

struct DecodeCall {
  Tensor q = at::randn({2, 1, 6, 16}), r = at::randn({2, 1, 6, 16});
  Tensor k_cache = at::randn({2, 8, 2, 16}), v_cache = at::randn({2, 8, 2, 16});
  Tensor kv_lens = int_tensor({8, 3});
  DecodeOptions options;
};

void expect_decode(const std::function<void(DecodeCall&)>& change, const char* message) {
  DecodeCall c;
  change(c);
  EXPECT_THAT(message_of([&] { decode(c.q, c.r, c.k_cache, c.v_cache, c.kv_lens, c.options); }),
              HasSubstr(std::string("parallax::decode: ") + message));
}

TEST(Refusals, DecodeNamesItsArguments) {
  using Call = DecodeCall;
  const auto paged = [](Call& c) {
    c.k_cache = at::randn({4, 4, 2, 16});
    c.v_cache = at::randn({4, 4, 2, 16});
    c.options.page_table = int_tensor({0, 1, 2, 3}).view({2, 2});
  };
  expect_decode([](Call& c) { c.k_cache = c.k_cache.to(at::kHalf); },
                "k_cache: expected float32 like q, got float16");
  expect_decode(
      [](Call& c) {
        c.v_cache = at::randn({2, 9, 2, 16});
      },
      "v_cache: expected [2, 8, 2, 16] (the shape of the keys), got [2, 9, 2, 16]");
  expect_decode([](Call& c) { c.kv_lens = c.kv_lens.to(at::kLong); },
                "kv_lens: expected int32, got int64");
  expect_decode([](Call& c) { c.options.window = -1; }, "window: expected at least 1");
  expect_decode([](Call& c) { c.q.requires_grad_(); },
                "q: expected a tensor without grad (the operator is not differentiable)");
  expect_decode(
      [&](Call& c) {
        paged(c);
        c.options.page_table = int_tensor({0, 1, 2, 3}).view({1, 4});
      },
      "page_table: expected size 2 in axis 0 (the batch of q), got [1, 4]");
  expect_decode(
      [&](Call& c) {
        paged(c);
        c.k_cache = c.v_cache = at::randn({4, 3, 2, 16});
      },
      "k_cache: expected page_size (axis 1) a power of two from 1 to 256 with a page_table, got 3");
  expect_decode(
      [&](Call& c) {
        paged(c);
        c.options.page_table = int_tensor({0, 1, 2, 4}).view({2, 2});
        c.kv_lens = int_tensor({8, 8});
      },
      "page_table[1, 1]: expected a page from 0 to 3, got 4");
}

TEST(Refusals, AppendWritesNothingThatDoesNotFit) {
  const Tensor k = at::ones({2, 3, 2, 16});
  Tensor k_cache = at::zeros({2, 8, 2, 16}), v_cache = k_cache.clone();
  EXPECT_THAT(message_of([&] {
                append_kv(k, k, k_cache, v_cache, int_tensor({0, 6}));
              }),
              HasSubstr("parallax::append_kv: positions[1]: expected 0 to 5"));
  EXPECT_EQ(k_cache.sum().item<float>(), 0);
  EXPECT_THAT(message_of([&] { append_kv(k, k, k_cache, v_cache, int_tensor({0})); }),
              HasSubstr("positions: expected [2] ([batch]), got [1]"));
  Tensor narrow = at::zeros({2, 8, 1, 16});
  EXPECT_THAT(message_of([&] {
                append_kv(k, k, narrow, narrow, int_tensor({0, 0}));
              }),
              HasSubstr("k_cache: expected size 2 in axis -2 (the num_kv_heads of k)"));
  Tensor shared = at::zeros({1, 8, 2, 16}).expand({2, 8, 2, 16});
  EXPECT_THAT(message_of([&] {
                append_kv(k, k, k_cache, shared, int_tensor({0, 0}));
              }),
              HasSubstr("v_cache: expected memory of its own for every element, got strides [0, "));
}

TEST(Refusals, StatesMustFit) {
  DecodeCall c;
  const DecodeState state = decode_state(c.q, c.r, c.k_cache, c.v_cache, c.kv_lens);
  EXPECT_THAT(message_of([] { merge({}); }), HasSubstr("states: expected at least one, got none"));
  DecodeState narrow = state;
  narrow.o2 = at::zeros({2, 1, 6, 8});
  EXPECT_THAT(message_of([&] {
                merge({state, narrow});
              }),
              HasSubstr("parallax::merge: o2: expected [2, 1, 6, 16]"));
  DecodeState rounded = state;
  rounded.m = state.m.to(at::kBFloat16);
  EXPECT_THAT(
      message_of([&] { finalize(rounded); }),
      HasSubstr("parallax::finalize: m: expected float32 (a state is float), got bfloat16"));
  EXPECT_THAT(message_of([&] { finalize(state, at::kInt); }),
              HasSubstr("dtype: expected bfloat16, float16, float32 or float64, got int32"));
}

}  // namespace
}  // namespace parallax::ops
