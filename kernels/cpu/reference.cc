// SPDX-License-Identifier: MIT
#include "cpu/reference.h"

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "parallax/mask.h"
#include "parallax/paged_kv.h"
#include "parallax/state.h"

namespace parallax::cpu {
namespace {

constexpr int kMaxHeadDim = 256;
// Keys of a row are taken in blocks: one rescale a block, and the first block's mean of t is the
// row's centre.
constexpr int kBlock = 64;

// Eight independent sums, which a compiler may keep in one register. n is a multiple of 8.
double dot(const double* a, const double* b, std::int64_t n) {
  double sums[8] = {};
  for (std::int64_t i = 0; i < n; i += 8) {
    for (int lane = 0; lane < 8; ++lane) sums[lane] += a[i + lane] * b[i + lane];
  }
  double sum = 0;
  for (double lane : sums) sum += lane;
  return sum;
}

// y += a x
void add_scaled(double a, const double* x, std::int64_t n, double* y) {
  for (std::int64_t i = 0; i < n; ++i) y[i] += a * x[i];
}

// One head of k or v of one sequence.
class KvHead {
 public:
  KvHead(const ConstView& view, const PageTable& pages, const Sequence& sequence, std::int64_t head)
      : base_(static_cast<const double*>(view.data) + head * view.head_stride),
        rows_(kv_rows(view.batch_stride, view.len_stride, pages, sequence)) {}

  const double* row(int j) const { return base_ + rows_.offset(j); }

 private:
  const double* base_;
  KvRows rows_;
};

template <class Void>
auto* row_of(const BasicView<Void>& view, const Sequence& sequence, std::int64_t head, int i) {
  using Element = std::conditional_t<std::is_const_v<Void>, const double, double>;
  return static_cast<Element*>(view.data) + head * view.head_stride +
         sequence.q_row(view.batch_stride, view.len_stride, i);
}

double* kv_row_of(const View& view, const Sequence& sequence, std::int64_t head, int j) {
  return static_cast<double*>(view.data) + head * view.head_stride +
         sequence.kv_row(view.batch_stride, view.len_stride, j);
}

struct ForwardRow {
  RowState<double> state;
  double centre = 0;
  double o1[kMaxHeadDim];
  double o2[kMaxHeadDim];
};

// The online pass over the keys of one row (docs/math.md sections 3 and 4).
void forward_row(const double* q, const double* r, const KvHead& k, const KvHead& v, Range keys,
                 double scale, std::int64_t head_dim, ForwardRow* row) {
  row->state = {};
  row->centre = 0;
  std::fill_n(row->o1, head_dim, 0.0);
  std::fill_n(row->o2, head_dim, 0.0);
  double s[kBlock], t[kBlock];
  for (int begin = keys.begin; begin < keys.end; begin += kBlock) {
    const int size = std::min(kBlock, keys.end - begin);
    for (int j = 0; j < size; ++j) {
      const double* key = k.row(begin + j);
      s[j] = scale * dot(q, key, head_dim);
      t[j] = dot(r, key, head_dim);
    }
    if (begin == keys.begin) {
      double sum = 0;
      for (int j = 0; j < size; ++j) sum += t[j];
      row->centre = sum / size;
    }
    const double factor = row->state.raise(*std::max_element(s, s + size));
    for (std::int64_t d = 0; d < head_dim; ++d) {
      row->o1[d] *= factor;
      row->o2[d] *= factor;
    }
    for (int j = 0; j < size; ++j) {
      const double p = std::exp(s[j] - row->state.m);
      const double w = p * (t[j] - row->centre);
      const double* value = v.row(begin + j);
      row->state.add(p, w);
      add_scaled(p, value, head_dim, row->o1);
      add_scaled(w, value, head_dim, row->o2);
    }
  }
}

// Calls body(sequence, head) for every head of every sequence, in parallel.
template <class Body>
void for_each_head(const AttentionProblem& problem, const Sequences& sequences,
                   std::int64_t num_heads, const ParallelFor& parallel_for, const Body& body) {
  const std::int64_t num_tasks = problem.batch * num_heads;
  if (num_tasks == 0) return;
  parallel_for(num_tasks, [&](std::int64_t task, int) {
    body(sequence_at(problem, sequences, task / num_heads), task % num_heads);
  });
}

// Writes a row's state in the exported form: float, uncentred (docs/math.md section 4).
void export_state(const AttentionProblem& problem, ForwardRow& row, std::int64_t index,
                  std::int64_t vector_index, const StateView& out) {
  row.state.uncentre(row.centre);
  out.m[index] = static_cast<float>(row.state.m);
  out.d1[index] = static_cast<float>(row.state.d1);
  out.d2[index] = static_cast<float>(row.state.d2);
  float* o1 = out.o1 + vector_index * problem.head_dim;
  float* o2 = out.o2 + vector_index * problem.head_dim;
  for (std::int64_t d = 0; d < problem.head_dim; ++d) {
    o1[d] = static_cast<float>(row.o1[d]);
    o2[d] = static_cast<float>(row.o2[d] + row.centre * row.o1[d]);
  }
}

// The statistics of a row that the backward needs (docs/math.md section 7.1).
struct RowStatistics {
  double lse = 0;
  double t_bar = 0;
  double g_bar = 0;              // dO . v_bar
  double delta_minus_g_bar = 0;  // dO . o - dO . v_bar
};

// What one (row, key) pair contributes (docs/math.md section 7.2).
struct Pair {
  double a;   // A = p u
  double ds;  // gradient of the scaled logit
  double dt;  // gradient of t
};

Pair pair_of(const RowStatistics& row, double s, double t, double g) {
  const double p = std::exp(s - row.lse);
  const double u = 1 + (row.t_bar - t);
  const double e = p * (g - row.g_bar);
  return {p * u, u * e - row.delta_minus_g_bar * p, -e};
}

// k0, the reference key of a row: the mean of the first block of its keys.
void reference_key(const KvHead& k, Range keys, std::int64_t head_dim, double* k0) {
  const int size = std::min(kBlock, keys.size());
  std::fill_n(k0, head_dim, 0.0);
  for (int j = 0; j < size; ++j) {
    add_scaled(1.0 / size, k.row(keys.begin + j), head_dim, k0);
  }
}

class Backward {
 public:
  Backward(const AttentionProblem& problem, const BackwardArgs& args, void* workspace)
      : problem_(problem),
        args_(args),
        head_dim_(problem.head_dim),
        group_(problem.num_q_heads / problem.num_kv_heads),
        scale_(problem.scale),
        g_bar_(static_cast<double*>(workspace)),
        delta_minus_g_bar_(g_bar_ + num_rows(problem)) {}

  static std::int64_t num_rows(const AttentionProblem& problem) {
    return (problem.packed ? 1 : problem.batch) * problem.num_q_heads * problem.q_len;
  }

  // dq and dr of one query head; leaves the rows' refined statistics in the workspace.
  void query_gradients(const Sequence& sequence, std::int64_t h) const {
    const KvHead k(args_.k, {}, sequence, h / group_);
    const KvHead v(args_.v, {}, sequence, h / group_);
    double k0[kMaxHeadDim], dq[kMaxHeadDim], dr[kMaxHeadDim];
    for (int i = 0; i < sequence.mask.q_len; ++i) {
      const Range keys = sequence.mask.keys(i);
      std::fill_n(dq, head_dim_, 0.0);
      std::fill_n(dr, head_dim_, 0.0);
      if (!keys.empty()) {
        const double* q = row_of(args_.q, sequence, h, i);
        const double* r = row_of(args_.r, sequence, h, i);
        const double* d_o = row_of(args_.d_o, sequence, h, i);
        RowStatistics row = saved_statistics(sequence, h, i, d_o);
        double ds_sum = 0, dt_sum = 0, e_a_sum = 0;
        for (int j = keys.begin; j < keys.end; ++j) {
          const double g = dot(d_o, v.row(j), head_dim_);
          const double* key = k.row(j);
          const auto pair =
              pair_of(row, scale_ * dot(q, key, head_dim_), dot(r, key, head_dim_), g);
          add_scaled(pair.ds, key, head_dim_, dq);
          add_scaled(pair.dt, key, head_dim_, dr);
          ds_sum += pair.ds;
          dt_sum += pair.dt;
          e_a_sum += pair.a * (g - row.g_bar);
        }
        reference_key(k, keys, head_dim_, k0);
        add_scaled(-ds_sum, k0, head_dim_, dq);
        add_scaled(-dt_sum, k0, head_dim_, dr);
        const std::int64_t index = row_index(problem_, sequence, h, i);
        g_bar_[index] = row.g_bar - dt_sum;
        delta_minus_g_bar_[index] = e_a_sum + dt_sum;
      }
      double* dq_out = row_of(args_.dq, sequence, h, i);
      double* dr_out = row_of(args_.dr, sequence, h, i);
      for (std::int64_t d = 0; d < head_dim_; ++d) {
        dq_out[d] = scale_ * dq[d];
        dr_out[d] = dr[d];
      }
    }
  }

  // dk and dv of one key/value head: the sums over the rows of its whole group that see each key.
  void key_gradients(const Sequence& sequence, std::int64_t kv_head) const {
    const KvHead k(args_.k, {}, sequence, kv_head);
    const KvHead v(args_.v, {}, sequence, kv_head);
    double dk[kMaxHeadDim], dv[kMaxHeadDim];
    for (int j = 0; j < sequence.kv_len; ++j) {
      std::fill_n(dk, head_dim_, 0.0);
      std::fill_n(dv, head_dim_, 0.0);
      const Range rows = sequence.mask.queries({j, j + 1});
      if (!rows.empty()) {
        const double* key = k.row(j);
        const double* value = v.row(j);
        for (std::int64_t h = kv_head * group_; h < (kv_head + 1) * group_; ++h) {
          for (int i = rows.begin; i < rows.end; ++i) {
            const double* q = row_of(args_.q, sequence, h, i);
            const double* r = row_of(args_.r, sequence, h, i);
            const double* d_o = row_of(args_.d_o, sequence, h, i);
            const auto pair =
                pair_of(refined_statistics(sequence, h, i), scale_ * dot(q, key, head_dim_),
                        dot(r, key, head_dim_), dot(d_o, value, head_dim_));
            add_scaled(scale_ * pair.ds, q, head_dim_, dk);
            add_scaled(pair.dt, r, head_dim_, dk);
            add_scaled(pair.a, d_o, head_dim_, dv);
          }
        }
      }
      double* dk_out = kv_row_of(args_.dk, sequence, kv_head, j);
      double* dv_out = kv_row_of(args_.dv, sequence, kv_head, j);
      for (std::int64_t d = 0; d < head_dim_; ++d) {
        dk_out[d] = dk[d];
        dv_out[d] = dv[d];
      }
    }
  }

 private:
  RowStatistics saved_statistics(const Sequence& sequence, std::int64_t h, int i,
                                 const double* d_o) const {
    const std::int64_t index = row_index(problem_, sequence, h, i);
    RowStatistics row;
    row.lse = static_cast<const double*>(args_.lse)[index];
    row.t_bar = static_cast<const double*>(args_.t_bar)[index];
    row.g_bar = dot(d_o, row_of(args_.v_bar, sequence, h, i), head_dim_);
    row.delta_minus_g_bar = dot(d_o, row_of(args_.o, sequence, h, i), head_dim_) - row.g_bar;
    return row;
  }

  // As query_gradients() left them (docs/math.md section 7.4).
  RowStatistics refined_statistics(const Sequence& sequence, std::int64_t h, int i) const {
    const std::int64_t index = row_index(problem_, sequence, h, i);
    RowStatistics row;
    row.lse = static_cast<const double*>(args_.lse)[index];
    row.t_bar = static_cast<const double*>(args_.t_bar)[index];
    row.g_bar = g_bar_[index];
    row.delta_minus_g_bar = delta_minus_g_bar_[index];
    return row;
  }

  const AttentionProblem& problem_;
  const BackwardArgs& args_;
  std::int64_t head_dim_;
  std::int64_t group_;
  double scale_;
  double* g_bar_;  // refined statistics, [rows] each
  double* delta_minus_g_bar_;
};

// Computes every row of a forward or decode over keys k and values v, writes its statistics, and
// hands it to write(sequence, head, query, row, result).
template <class Args, class Write>
void for_each_row(const AttentionProblem& problem, const Args& args, const ConstView& k,
                  const ConstView& v, const ParallelFor& parallel_for, const Write& write) {
  const std::int64_t group = problem.num_q_heads / problem.num_kv_heads;
  auto* lse = static_cast<double*>(args.lse);
  auto* t_bar = static_cast<double*>(args.t_bar);
  const auto head_task = [&](const Sequence& sequence, std::int64_t h) {
    const KvHead keys(k, args.pages, sequence, h / group);
    const KvHead values(v, args.pages, sequence, h / group);
    ForwardRow row;
    for (int i = 0; i < sequence.mask.q_len; ++i) {
      forward_row(row_of(args.q, sequence, h, i), row_of(args.r, sequence, h, i), keys, values,
                  sequence.mask.keys(i), problem.scale, problem.head_dim, &row);
      const Finalized<double> result = finalize(row.state, row.centre);
      const std::int64_t index = row_index(problem, sequence, h, i);
      if (lse) lse[index] = result.lse;
      if (t_bar) t_bar[index] = result.t_bar;
      write(sequence, h, i, row, result);
    }
  };
  for_each_head(problem, args.sequences, problem.num_q_heads, parallel_for, head_task);
}

}  // namespace

void reference_forward(const AttentionProblem& problem, const ForwardArgs& args,
                       const ParallelFor& parallel_for) {
  for_each_row(problem, args, args.k, args.v, parallel_for,
               [&](const Sequence& sequence, std::int64_t h, int i, ForwardRow& row,
                   const Finalized<double>& result) {
                 double* o = row_of(args.o, sequence, h, i);
                 for (std::int64_t d = 0; d < problem.head_dim; ++d) {
                   o[d] = result.o(row.o1[d], row.o2[d]);
                 }
                 if (!args.v_bar.data) return;
                 double* v_bar = row_of(args.v_bar, sequence, h, i);
                 for (std::int64_t d = 0; d < problem.head_dim; ++d) {
                   v_bar[d] = result.v_bar(row.o1[d]);
                 }
               });
}

void reference_decode(const AttentionProblem& problem, const DecodeArgs& args,
                      const ParallelFor& parallel_for) {
  for_each_row(problem, args, args.k_cache, args.v_cache, parallel_for,
               [&](const Sequence& sequence, std::int64_t h, int i, ForwardRow& row,
                   const Finalized<double>& result) {
                 if (args.o.data) {
                   double* o = row_of(args.o, sequence, h, i);
                   for (std::int64_t d = 0; d < problem.head_dim; ++d) {
                     o[d] = result.o(row.o1[d], row.o2[d]);
                   }
                 }
                 if (args.state.m) {
                   const std::int64_t token = sequence.batch_idx * problem.q_len + i;
                   export_state(problem, row, row_index(problem, sequence, h, i),
                                token * problem.num_q_heads + h, args.state);
                 }
               });
}

std::size_t reference_backward_workspace_bytes(const AttentionProblem& problem) {
  return 2 * static_cast<std::size_t>(Backward::num_rows(problem)) * sizeof(double);
}

void reference_backward(const AttentionProblem& problem, const BackwardArgs& args, void* workspace,
                        const ParallelFor& parallel_for) {
  const Backward backward(problem, args, workspace);
  for_each_head(
      problem, args.sequences, problem.num_q_heads, parallel_for,
      [&](const Sequence& sequence, std::int64_t h) { backward.query_gradients(sequence, h); });
  for_each_head(
      problem, args.sequences, problem.num_kv_heads, parallel_for,
      [&](const Sequence& sequence, std::int64_t h) { backward.key_gradients(sequence, h); });
}

}  // namespace parallax::cpu
