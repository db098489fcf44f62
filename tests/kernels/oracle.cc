// SPDX-License-Identifier: MIT
#include "tests/kernels/oracle.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <sstream>

namespace parallax::tests {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

std::size_t index_of(std::int64_t i) { return static_cast<std::size_t>(i); }

// A dense matrix.
struct Matrix {
  Matrix(std::int64_t rows, std::int64_t columns)
      : rows(rows), columns(columns), data(index_of(rows * columns), 0.0) {}
  double& operator()(std::int64_t i, std::int64_t j) { return data[index_of(i * columns + j)]; }
  double operator()(std::int64_t i, std::int64_t j) const {
    return data[index_of(i * columns + j)];
  }
  std::int64_t rows, columns;
  Values data;
};

// Matrix arithmetic whose every result is rounded to a dtype.
class Arithmetic {
 public:
  explicit Arithmetic(DType dtype) : dtype_(dtype) {}

  double round(double x) const { return dtype_ == DType::kFloat64 ? x : round_to(dtype_, x); }

  Matrix times(const Matrix& a, const Matrix& b) const {
    Matrix sums(a.rows, b.columns);
    for (std::int64_t i = 0; i < a.rows; ++i) {
      for (std::int64_t l = 0; l < a.columns; ++l) {
        for (std::int64_t j = 0; j < b.columns; ++j) sums(i, j) += a(i, l) * b(l, j);
      }
    }
    return map(sums, [&](auto i, auto j) { return sums(i, j); });
  }
  Matrix times_transposed(const Matrix& a, const Matrix& b) const {
    return times(a, transposed(b));
  }
  Matrix transposed_times(const Matrix& a, const Matrix& b) const {
    return times(transposed(a), b);
  }
  // f(i, j) for every element
  template <class F>
  Matrix map(const Matrix& like, const F& f) const {
    Matrix result(like.rows, like.columns);
    for (std::int64_t i = 0; i < like.rows; ++i) {
      for (std::int64_t j = 0; j < like.columns; ++j) result(i, j) = round(f(i, j));
    }
    return result;
  }
  Values row_sums(const Matrix& a) const {
    Values sums(index_of(a.rows), 0.0);
    for (std::int64_t i = 0; i < a.rows; ++i) {
      for (std::int64_t j = 0; j < a.columns; ++j) sums[index_of(i)] += a(i, j);
      sums[index_of(i)] = round(sums[index_of(i)]);
    }
    return sums;
  }

 private:
  static Matrix transposed(const Matrix& a) {
    Matrix result(a.columns, a.rows);
    for (std::int64_t i = 0; i < a.rows; ++i) {
      for (std::int64_t j = 0; j < a.columns; ++j) result(j, i) = a(i, j);
    }
    return result;
  }
  DType dtype_;
};

// Places of one head of one sequence in the logical arrays.
struct HeadPlace {
  std::int64_t first_token, len, heads, head, head_dim;
  std::size_t at(std::int64_t i, std::int64_t d) const {
    return index_of(((first_token + i) * heads + head) * head_dim + d);
  }
  Matrix read(const Values& values) const {
    Matrix matrix(len, head_dim);
    for (std::int64_t i = 0; i < len; ++i) {
      for (std::int64_t d = 0; d < head_dim; ++d) matrix(i, d) = values[at(i, d)];
    }
    return matrix;
  }
  // Adds a matrix; `round` rounds the sum.
  void add(const Matrix& matrix, const Arithmetic& arithmetic, Values* values) const {
    for (std::int64_t i = 0; i < len; ++i) {
      for (std::int64_t d = 0; d < head_dim; ++d) {
        double& to = (*values)[at(i, d)];
        to = arithmetic.round(to + matrix(i, d));
      }
    }
  }
};

HeadPlace q_place(const Case& c, std::int64_t b, std::int64_t h) {
  const AttentionProblem& p = c.problem;
  const std::int64_t first = p.packed ? c.lengths.cu_seqlens_q[index_of(b)] : b * p.q_len;
  return {first, q_len_of(c, b), p.num_q_heads, h, p.head_dim};
}

HeadPlace kv_place(const Case& c, std::int64_t b, std::int64_t kv_head) {
  const AttentionProblem& p = c.problem;
  const std::int64_t first = p.packed ? c.lengths.cu_seqlens_k[index_of(b)] : b * p.kv_len;
  return {first, kv_len_of(c, b), p.num_kv_heads, kv_head, p.head_dim};
}

std::size_t statistic_at(const Case& c, std::int64_t b, std::int64_t h, std::int64_t i) {
  const AttentionProblem& p = c.problem;
  if (p.packed) return index_of(h * p.q_len + c.lengths.cu_seqlens_q[index_of(b)] + i);
  return index_of((b * p.num_q_heads + h) * p.q_len + i);
}

// Softmax over the visible keys, and its log-sum-exp. Rows that see nothing stay 0 and -inf.
Matrix softmax(const Case& c, std::int64_t b, const Matrix& s, const Arithmetic& arithmetic,
               Values* lse) {
  Matrix p(s.rows, s.columns);
  for (std::int64_t i = 0; i < s.rows; ++i) {
    double high = -kInfinity, sum = 0;
    for (std::int64_t j = 0; j < s.columns; ++j) {
      if (visible(c, b, i, j)) high = std::max(high, s(i, j));
    }
    for (std::int64_t j = 0; j < s.columns; ++j) {
      if (visible(c, b, i, j)) sum += p(i, j) = std::exp(s(i, j) - high);
    }
    for (std::int64_t j = 0; j < s.columns && sum > 0; ++j) {
      p(i, j) = arithmetic.round(p(i, j) / sum);
    }
    (*lse)[index_of(i)] = high + std::log(sum);
  }
  return p;
}

// NaN in a key that no query sees must not spread through 0 * NaN in the full products.
Matrix without_unseen(const Case& c, std::int64_t b, Matrix rows) {
  for (std::int64_t j = 0; j < rows.rows; ++j) {
    bool seen = false;
    for (std::int64_t i = 0; i < q_len_of(c, b); ++i) seen = seen || visible(c, b, i, j);
    for (std::int64_t d = 0; d < rows.columns && !seen; ++d) rows(j, d) = 0;
  }
  return rows;
}

void one_head(const Case& c, std::int64_t b, std::int64_t h, const Arithmetic& arithmetic,
              Results* results) {
  const AttentionProblem& problem = c.problem;
  const std::int64_t kv_head = h / (problem.num_q_heads / problem.num_kv_heads);
  const HeadPlace q_at = q_place(c, b, h), kv_at = kv_place(c, b, kv_head);
  const Matrix q = q_at.read(c.inputs.q), r = q_at.read(c.inputs.r);
  const Matrix k = without_unseen(c, b, kv_at.read(c.inputs.k));
  const Matrix v = without_unseen(c, b, kv_at.read(c.inputs.v));
  const Arithmetic& on = arithmetic;

  const Matrix qk = on.times_transposed(q, k);
  const Matrix s = on.map(qk, [&](auto i, auto j) { return problem.scale * qk(i, j); });
  const Matrix t = on.times_transposed(r, k);
  Values lse(index_of(q.rows));
  const Matrix p = softmax(c, b, s, on, &lse);
  const Matrix pt = on.map(p, [&](auto i, auto j) { return p(i, j) * t(i, j); });
  const Values t_bar = on.row_sums(pt);
  const Matrix w =
      on.map(t, [&](auto i, auto j) { return on.round(1 + t_bar[index_of(i)]) - t(i, j); });
  const Matrix a = on.map(p, [&](auto i, auto j) { return p(i, j) * w(i, j); });
  q_at.add(on.times(a, v), on, &results->o);
  q_at.add(on.times(p, v), on, &results->v_bar);
  for (std::int64_t i = 0; i < q.rows; ++i) {
    results->lse[statistic_at(c, b, h, i)] = lse[index_of(i)];
    results->t_bar[statistic_at(c, b, h, i)] = t_bar[index_of(i)];
  }
  if (c.inputs.d_o.empty()) return;

  // Backwards through the lines above.
  const Matrix d_o = q_at.read(c.inputs.d_o);
  const Matrix da = on.times_transposed(d_o, v);
  kv_at.add(on.transposed_times(a, d_o), on, &results->dv);
  const Matrix dw = on.map(a, [&](auto i, auto j) { return da(i, j) * p(i, j); });
  const Values dt_bar = on.row_sums(dw);
  const Matrix dpt = on.map(p, [&](auto i, auto j) { return p(i, j) * dt_bar[index_of(i)]; });
  const Matrix dt = on.map(dw, [&](auto i, auto j) { return dpt(i, j) - dw(i, j); });
  const Matrix daw = on.map(a, [&](auto i, auto j) { return da(i, j) * w(i, j); });
  const Matrix dtt = on.map(t, [&](auto i, auto j) { return t(i, j) * dt_bar[index_of(i)]; });
  const Matrix dp = on.map(daw, [&](auto i, auto j) { return daw(i, j) + dtt(i, j); });
  Matrix ds(q.rows, k.rows);
  for (std::int64_t i = 0; i < q.rows; ++i) {
    double mean = 0;
    for (std::int64_t j = 0; j < k.rows; ++j) mean += p(i, j) * dp(i, j);
    for (std::int64_t j = 0; j < k.rows; ++j) ds(i, j) = on.round(p(i, j) * (dp(i, j) - mean));
  }
  const Matrix dqk = on.map(ds, [&](auto i, auto j) { return problem.scale * ds(i, j); });
  q_at.add(on.times(dqk, k), on, &results->dq);
  q_at.add(on.times(dt, k), on, &results->dr);
  kv_at.add(on.transposed_times(dqk, q), on, &results->dk);
  kv_at.add(on.transposed_times(dt, r), on, &results->dk);
}

double sum_of_squares(const Values& values) {
  double sum = 0;
  for (double value : values) sum += value * value;
  return sum;
}

}  // namespace

std::int64_t q_len_of(const Case& c, std::int64_t b) {
  if (!c.problem.packed) return c.problem.q_len;
  return c.lengths.cu_seqlens_q[index_of(b + 1)] - c.lengths.cu_seqlens_q[index_of(b)];
}

std::int64_t kv_len_of(const Case& c, std::int64_t b) {
  if (!c.problem.packed) return c.problem.kv_len;
  return c.lengths.cu_seqlens_k[index_of(b + 1)] - c.lengths.cu_seqlens_k[index_of(b)];
}

bool visible(const Case& c, std::int64_t b, std::int64_t i, std::int64_t j) {
  const std::int64_t capacity = kv_len_of(c, b);
  std::int64_t start = 0, end = capacity;
  if (!c.lengths.kv_lens.empty()) {
    end = std::clamp<std::int64_t>(c.lengths.kv_lens[index_of(b)], 0, capacity);
  }
  if (!c.lengths.kv_start.empty()) {
    start = std::clamp<std::int64_t>(c.lengths.kv_start[index_of(b)], 0, capacity);
  }
  if (j < start || j >= end) return false;
  if (!c.problem.causal) return true;
  const std::int64_t own = end - q_len_of(c, b) + i;
  return j <= own && (c.problem.window == 0 || j > own - c.problem.window);
}

Results oracle(const Case& c, DType arithmetic) {
  const AttentionProblem& p = c.problem;
  const std::size_t rows = c.inputs.q.size() / index_of(p.head_dim);
  Results results;
  results.lse.assign(rows, -kInfinity);
  results.t_bar.assign(rows, 0.0);
  results.o.assign(c.inputs.q.size(), 0.0);
  results.v_bar = results.o;
  if (!c.inputs.d_o.empty()) {
    results.dq = results.dr = results.o;
    results.dk.assign(c.inputs.k.size(), 0.0);
    results.dv = results.dk;
  }
  for (std::int64_t b = 0; b < p.batch; ++b) {
    for (std::int64_t h = 0; h < p.num_q_heads; ++h) {
      one_head(c, b, h, Arithmetic(arithmetic), &results);
    }
  }
  return results;
}

double distance(const Values& a, const Values& b) {
  if (a.size() != b.size()) return kInfinity;
  double worst = 0;
  for (std::size_t i = 0; i < a.size(); ++i) {
    if (a[i] == b[i]) continue;
    const double apart = std::abs(a[i] - b[i]);
    worst = apart <= kInfinity ? std::max(worst, apart) : kInfinity;
  }
  return worst;
}

double relative_error(const Values& ours, const Values& exact) {
  if (ours.size() != exact.size()) return kInfinity;
  Values apart(exact.size());
  for (std::size_t i = 0; i < exact.size(); ++i) apart[i] = ours[i] - exact[i];
  const double squares = sum_of_squares(apart);
  return squares == 0 ? 0 : std::sqrt(squares / sum_of_squares(exact));
}

double relative_or_absolute_error(const Values& ours, const Values& exact) {
  if (ours.size() != exact.size()) return kInfinity;
  return largest(exact) == 0 ? std::sqrt(sum_of_squares(ours)) : relative_error(ours, exact);
}

double largest(const Values& values) {
  double result = 0;
  for (double value : values) result = std::max(result, std::abs(value));
  return result;
}

std::string error_rule(const Case& c, const Results& ours, const Expected& expected) {
  const Results &exact = expected.exact, &eager = expected.eager;
  const double slack =
      1e-5 * std::max(1.0, largest(c.inputs.d_o) * largest(c.inputs.v) * largest(c.inputs.k));
  std::ostringstream broken;
  const auto check = [&](const char* name, const Values Results::*member) {
    if ((ours.*member).empty()) return;
    const double our_error = distance(ours.*member, exact.*member);
    const double eager_error = distance(eager.*member, exact.*member);
    if (our_error <= 2 * eager_error + slack) return;
    broken << name << ": error " << our_error << ", eager's " << eager_error << ", slack " << slack
           << "\n";
  };
  check("o", &Results::o);
  check("dq", &Results::dq);
  check("dr", &Results::dr);
  check("dk", &Results::dk);
  check("dv", &Results::dv);
  return broken.str().empty() ? ""
                              : c.name + ", " + name_of(c.problem.dtype) + ":\n" + broken.str();
}

}  // namespace parallax::tests
