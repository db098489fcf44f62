// SPDX-License-Identifier: MIT
// The oracle: the definition of Parallax attention (docs/math.md section 1) and its chain rule,
// spelled out with full q_len x kv_len matrices. It shares no code and no formula with the kernels:
// masks come from attention.h's words, gradients from differentiating the definition step by step.
#pragma once

#include "tests/kernels/cases.h"

namespace parallax::tests {

// In logical order; lse, t_bar: [batch, num_q_heads, q_len], packed [num_q_heads, tokens].
struct Results {
  Values o, v_bar, lse, t_bar, dq, dr, dk, dv;
};

// Whether query i of sequence b sees key j, both counted from the sequence's start.
bool visible(const Case& c, std::int64_t b, std::int64_t i, std::int64_t j);

// The number of queries of sequence b, and of keys that its tensors hold.
std::int64_t q_len_of(const Case& c, std::int64_t b);
std::int64_t kv_len_of(const Case& c, std::int64_t b);

// Everything, exactly (float64), or as an eager implementation in `arithmetic` gets it: every
// operation's result rounded, sums inside an operation not. Gradients only if inputs.d_o is there.
Results oracle(const Case& c, DType arithmetic = DType::kFloat64);

// max |a - b|; NaN against a number counts as infinitely far, equal infinities as equal.
double distance(const Values& a, const Values& b);
double largest(const Values& values);

// The Frobenius norm of ours - exact, over that of exact; infinite where exact is 0 and ours not.
double relative_error(const Values& ours, const Values& exact);
// The same, but the norm of ours where exact is 0: of kernels that round what cancels on paper.
double relative_or_absolute_error(const Values& ours, const Values& exact);

// The error rule: for o and each gradient, max|ours - exact| <= 2 max|eager - exact| + slack, with
// slack 1e-5 max(1, max|dO| max|v| max|k|). Returns "" or what broke it.
struct Expected {
  explicit Expected(const Case& c) : exact(oracle(c)), eager(oracle(c, c.problem.dtype)) {}
  Results exact, eager;
};
std::string error_rule(const Case& c, const Results& ours, const Expected& expected);
inline std::string error_rule(const Case& c, const Results& ours) {
  return error_rule(c, ours, Expected(c));
}

}  // namespace parallax::tests
