// SPDX-License-Identifier: MIT
#include "cpu/reference.h"

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "cpu/element.h"
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
template <class Real>
Real dot(const Real* a, const Real* b, std::int64_t n) {
  Real sums[8] = {};
  for (std::int64_t i = 0; i < n; i += 8) {
    for (int lane = 0; lane < 8; ++lane) sums[lane] += a[i + lane] * b[i + lane];
  }
  Real sum = 0;
  for (Real lane : sums) sum += lane;
  return sum;
}

// y += a x
template <class Real>
void add_scaled(Real a, const Real* x, std::int64_t n, Real* y) {
  for (std::int64_t i = 0; i < n; ++i) y[i] += a * x[i];
}

// One head of k or v of one sequence.
template <class T>
class KvHead {
 public:
  KvHead(const ConstView& view, const PageTable& pages, const Sequence& sequence, std::int64_t head,
         std::int64_t head_dim)
      : base_(static_cast<const T*>(view.data) + head * view.head_stride),
        rows_(kv_rows(view.batch_stride, view.len_stride, pages, sequence)),
        head_dim_(head_dim) {}

  const RealOf<T>* load(int j, RealOf<T>* buffer) const {
    return load_row(base_ + rows_.offset(j), head_dim_, buffer);
  }

 private:
  const T* base_;
  KvRows rows_;
  std::int64_t head_dim_;
};

template <class T, class Void>
auto* row_of(const BasicView<Void>& view, const Sequence& sequence, std::int64_t head, int i) {
  using Element = std::conditional_t<std::is_const_v<Void>, const T, T>;
  return static_cast<Element*>(view.data) + head * view.head_stride +
         sequence.q_row(view.batch_stride, view.len_stride, i);
}

template <class T>
T* kv_row_of(const View& view, const Sequence& sequence, std::int64_t head, int j) {
  return static_cast<T*>(view.data) + head * view.head_stride +
         sequence.kv_row(view.batch_stride, view.len_stride, j);
}

template <class Real>
struct ForwardRow {
  RowState<Real> state;
  Real centre = 0;
  Real o1[kMaxHeadDim];
  Real o2[kMaxHeadDim];
};

// The online pass over the keys of one row (docs/math.md sections 3 and 4).
template <class T, class Real = RealOf<T>>
void forward_row(const Real* q, const Real* r, const KvHead<T>& k, const KvHead<T>& v, Range keys,
                 Real scale, std::int64_t head_dim, ForwardRow<Real>* row) {
  row->state = {};
  row->centre = 0;
  std::fill_n(row->o1, head_dim, Real(0));
  std::fill_n(row->o2, head_dim, Real(0));
  Real buffer[kMaxHeadDim];
  Real s[kBlock], t[kBlock];
  for (int begin = keys.begin; begin < keys.end; begin += kBlock) {
    const int size = std::min(kBlock, keys.end - begin);
    for (int j = 0; j < size; ++j) {
      const Real* key = k.load(begin + j, buffer);
      s[j] = scale * dot(q, key, head_dim);
      t[j] = dot(r, key, head_dim);
    }
    if (begin == keys.begin) {
      Real sum = 0;
      for (int j = 0; j < size; ++j) sum += t[j];
      row->centre = sum / Real(size);
    }
    const Real factor = row->state.raise(*std::max_element(s, s + size));
    for (std::int64_t d = 0; d < head_dim; ++d) {
      row->o1[d] *= factor;
      row->o2[d] *= factor;
    }
    for (int j = 0; j < size; ++j) {
      const Real p = std::exp(s[j] - row->state.m);
      const Real w = p * (t[j] - row->centre);
      const Real* value = v.load(begin + j, buffer);
      row->state.add(p, w);
      add_scaled(p, value, head_dim, row->o1);
      add_scaled(w, value, head_dim, row->o2);
    }
  }
}

// Calls body(sequence, head, worker) for every head of every sequence, in parallel.
template <class Body>
void for_each_head(const AttentionProblem& problem, const Sequences& sequences,
                   std::int64_t num_heads, const ParallelFor& parallel_for, const Body& body) {
  const std::int64_t num_tasks = problem.batch * num_heads;
  if (num_tasks == 0) return;
  parallel_for(num_tasks, [&](std::int64_t task, int) {
    body(sequence_at(problem, sequences, task / num_heads), task % num_heads);
  });
}

template <class T>
void forward(const AttentionProblem& problem, const ForwardArgs& args,
             const ParallelFor& parallel_for) {
  using Real = RealOf<T>;
  const std::int64_t head_dim = problem.head_dim;
  const std::int64_t group = problem.num_q_heads / problem.num_kv_heads;
  auto* lse = static_cast<Real*>(args.lse);
  auto* t_bar = static_cast<Real*>(args.t_bar);
  const auto head_task = [&](const Sequence& sequence, std::int64_t h) {
    const KvHead<T> k(args.k, args.pages, sequence, h / group, head_dim);
    const KvHead<T> v(args.v, args.pages, sequence, h / group, head_dim);
    Real q_buffer[kMaxHeadDim], r_buffer[kMaxHeadDim];
    ForwardRow<Real> row;
    for (int i = 0; i < sequence.mask.q_len; ++i) {
      const Real* q = load_row(row_of<T>(args.q, sequence, h, i), head_dim, q_buffer);
      const Real* r = load_row(row_of<T>(args.r, sequence, h, i), head_dim, r_buffer);
      forward_row(q, r, k, v, sequence.mask.keys(i), Real(problem.scale), head_dim, &row);
      const Finalized<Real> result = finalize(row.state, row.centre);
      T* o = row_of<T>(args.o, sequence, h, i);
      for (std::int64_t d = 0; d < head_dim; ++d) store(result.o(row.o1[d], row.o2[d]), o + d);
      if (args.v_bar.data) {
        T* v_bar = row_of<T>(args.v_bar, sequence, h, i);
        for (std::int64_t d = 0; d < head_dim; ++d) store(result.v_bar(row.o1[d]), v_bar + d);
      }
      const std::int64_t index = row_index(problem, sequence, h, i);
      if (lse) lse[index] = result.lse;
      if (t_bar) t_bar[index] = result.t_bar;
    }
  };
  for_each_head(problem, args.sequences, problem.num_q_heads, parallel_for, head_task);
}

// Writes a row's state in the exported form: float, uncentred (docs/math.md section 4).
template <class Real>
void export_state(const AttentionProblem& problem, ForwardRow<Real>& row, std::int64_t index,
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

template <class T>
void decode(const AttentionProblem& problem, const DecodeArgs& args,
            const ParallelFor& parallel_for) {
  using Real = RealOf<T>;
  const std::int64_t head_dim = problem.head_dim;
  const std::int64_t group = problem.num_q_heads / problem.num_kv_heads;
  auto* lse = static_cast<Real*>(args.lse);
  auto* t_bar = static_cast<Real*>(args.t_bar);
  const auto head_task = [&](const Sequence& sequence, std::int64_t h) {
    const KvHead<T> k(args.k_cache, args.pages, sequence, h / group, head_dim);
    const KvHead<T> v(args.v_cache, args.pages, sequence, h / group, head_dim);
    Real q_buffer[kMaxHeadDim], r_buffer[kMaxHeadDim];
    ForwardRow<Real> row;
    for (int i = 0; i < sequence.mask.q_len; ++i) {
      const Real* q = load_row(row_of<T>(args.q, sequence, h, i), head_dim, q_buffer);
      const Real* r = load_row(row_of<T>(args.r, sequence, h, i), head_dim, r_buffer);
      forward_row(q, r, k, v, sequence.mask.keys(i), Real(problem.scale), head_dim, &row);
      const std::int64_t index = row_index(problem, sequence, h, i);
      const Finalized<Real> result = finalize(row.state, row.centre);
      if (lse) lse[index] = result.lse;
      if (t_bar) t_bar[index] = result.t_bar;
      if (args.o.data) {
        T* o = row_of<T>(args.o, sequence, h, i);
        for (std::int64_t d = 0; d < head_dim; ++d) store(result.o(row.o1[d], row.o2[d]), o + d);
      }
      if (args.state.m) {
        const std::int64_t token = sequence.batch_idx * problem.q_len + i;
        export_state(problem, row, index, token * problem.num_q_heads + h, args.state);
      }
    }
  };
  for_each_head(problem, args.sequences, problem.num_q_heads, parallel_for, head_task);
}

// The statistics of a row that the backward needs (docs/math.md section 7.1).
template <class Real>
struct RowStatistics {
  Real lse = 0;
  Real t_bar = 0;
  Real g_bar = 0;              // dO . v_bar
  Real delta_minus_g_bar = 0;  // dO . o - dO . v_bar
};

// What one (row, key) pair contributes (docs/math.md section 7.2).
template <class Real>
struct Pair {
  Real a;   // A = p u
  Real ds;  // gradient of the scaled logit
  Real dt;  // gradient of t
};

template <class Real>
Pair<Real> pair_of(const RowStatistics<Real>& row, Real s, Real t, Real g) {
  const Real p = std::exp(s - row.lse);
  const Real u = Real(1) + (row.t_bar - t);
  const Real e = p * (g - row.g_bar);
  return {p * u, u * e - row.delta_minus_g_bar * p, -e};
}

// k0, the reference key of a row: the mean of the first block of its keys.
template <class T, class Real = RealOf<T>>
void reference_key(const KvHead<T>& k, Range keys, std::int64_t head_dim, Real* k0) {
  Real buffer[kMaxHeadDim];
  const int size = std::min(kBlock, keys.size());
  std::fill_n(k0, head_dim, Real(0));
  for (int j = 0; j < size; ++j) {
    add_scaled(Real(1) / Real(size), k.load(keys.begin + j, buffer), head_dim, k0);
  }
}

template <class T>
class Backward {
 public:
  using Real = RealOf<T>;

  Backward(const AttentionProblem& problem, const BackwardArgs& args, void* workspace)
      : problem_(problem),
        args_(args),
        head_dim_(problem.head_dim),
        group_(problem.num_q_heads / problem.num_kv_heads),
        scale_(static_cast<Real>(problem.scale)),
        g_bar_(static_cast<Real*>(workspace)),
        delta_minus_g_bar_(g_bar_ + num_rows(problem)) {}

  static std::int64_t num_rows(const AttentionProblem& problem) {
    return (problem.packed ? 1 : problem.batch) * problem.num_q_heads * problem.q_len;
  }

  // dq and dr of one query head; leaves the rows' refined statistics in the workspace.
  void query_gradients(const Sequence& sequence, std::int64_t h) const {
    const KvHead<T> k(args_.k, {}, sequence, h / group_, head_dim_);
    const KvHead<T> v(args_.v, {}, sequence, h / group_, head_dim_);
    Real buffers[4][kMaxHeadDim], k0[kMaxHeadDim], dq[kMaxHeadDim], dr[kMaxHeadDim];
    for (int i = 0; i < sequence.mask.q_len; ++i) {
      const Range keys = sequence.mask.keys(i);
      std::fill_n(dq, head_dim_, Real(0));
      std::fill_n(dr, head_dim_, Real(0));
      if (!keys.empty()) {
        const Real* q = query_row(args_.q, sequence, h, i, buffers[0]);
        const Real* r = query_row(args_.r, sequence, h, i, buffers[1]);
        const Real* d_o = query_row(args_.d_o, sequence, h, i, buffers[2]);
        RowStatistics<Real> row = saved_statistics(sequence, h, i, d_o);
        Real ds_sum = 0, dt_sum = 0, e_a_sum = 0;
        for (int j = keys.begin; j < keys.end; ++j) {
          const Real g = dot(d_o, v.load(j, buffers[3]), head_dim_);
          const Real* key = k.load(j, buffers[3]);
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
      T* dq_out = row_of<T>(args_.dq, sequence, h, i);
      T* dr_out = row_of<T>(args_.dr, sequence, h, i);
      for (std::int64_t d = 0; d < head_dim_; ++d) {
        store(scale_ * dq[d], dq_out + d);
        store(dr[d], dr_out + d);
      }
    }
  }

  // dk and dv of one key/value head: the sums over the rows of its whole group that see each key.
  void key_gradients(const Sequence& sequence, std::int64_t kv_head) const {
    const KvHead<T> k(args_.k, {}, sequence, kv_head, head_dim_);
    const KvHead<T> v(args_.v, {}, sequence, kv_head, head_dim_);
    Real buffers[5][kMaxHeadDim], dk[kMaxHeadDim], dv[kMaxHeadDim];
    for (int j = 0; j < sequence.kv_len; ++j) {
      std::fill_n(dk, head_dim_, Real(0));
      std::fill_n(dv, head_dim_, Real(0));
      const Range rows = sequence.mask.queries({j, j + 1});
      if (!rows.empty()) {
        const Real* key = k.load(j, buffers[0]);
        const Real* value = v.load(j, buffers[1]);
        for (std::int64_t h = kv_head * group_; h < (kv_head + 1) * group_; ++h) {
          for (int i = rows.begin; i < rows.end; ++i) {
            const Real* q = query_row(args_.q, sequence, h, i, buffers[2]);
            const Real* r = query_row(args_.r, sequence, h, i, buffers[3]);
            const Real* d_o = query_row(args_.d_o, sequence, h, i, buffers[4]);
            const auto pair =
                pair_of(refined_statistics(sequence, h, i), scale_ * dot(q, key, head_dim_),
                        dot(r, key, head_dim_), dot(d_o, value, head_dim_));
            add_scaled(scale_ * pair.ds, q, head_dim_, dk);
            add_scaled(pair.dt, r, head_dim_, dk);
            add_scaled(pair.a, d_o, head_dim_, dv);
          }
        }
      }
      T* dk_out = kv_row_of<T>(args_.dk, sequence, kv_head, j);
      T* dv_out = kv_row_of<T>(args_.dv, sequence, kv_head, j);
      for (std::int64_t d = 0; d < head_dim_; ++d) {
        store(dk[d], dk_out + d);
        store(dv[d], dv_out + d);
      }
    }
  }

 private:
  const Real* query_row(const ConstView& view, const Sequence& sequence, std::int64_t h, int i,
                        Real* buffer) const {
    return load_row(row_of<T>(view, sequence, h, i), head_dim_, buffer);
  }

  RowStatistics<Real> saved_statistics(const Sequence& sequence, std::int64_t h, int i,
                                       const Real* d_o) const {
    const std::int64_t index = row_index(problem_, sequence, h, i);
    Real buffer[kMaxHeadDim];
    RowStatistics<Real> row;
    row.lse = static_cast<const Real*>(args_.lse)[index];
    row.t_bar = static_cast<const Real*>(args_.t_bar)[index];
    row.g_bar = dot(d_o, query_row(args_.v_bar, sequence, h, i, buffer), head_dim_);
    row.delta_minus_g_bar =
        dot(d_o, query_row(args_.o, sequence, h, i, buffer), head_dim_) - row.g_bar;
    return row;
  }

  // As query_gradients() left them (docs/math.md section 7.4).
  RowStatistics<Real> refined_statistics(const Sequence& sequence, std::int64_t h, int i) const {
    const std::int64_t index = row_index(problem_, sequence, h, i);
    RowStatistics<Real> row;
    row.lse = static_cast<const Real*>(args_.lse)[index];
    row.t_bar = static_cast<const Real*>(args_.t_bar)[index];
    row.g_bar = g_bar_[index];
    row.delta_minus_g_bar = delta_minus_g_bar_[index];
    return row;
  }

  const AttentionProblem& problem_;
  const BackwardArgs& args_;
  std::int64_t head_dim_;
  std::int64_t group_;
  Real scale_;
  Real* g_bar_;  // refined statistics, [rows] each
  Real* delta_minus_g_bar_;
};

}  // namespace

void reference_forward(const AttentionProblem& problem, const ForwardArgs& args,
                       const ParallelFor& parallel_for) {
  with_element_type(problem.dtype,
                    [&](auto element) { forward<decltype(element)>(problem, args, parallel_for); });
}

void reference_decode(const AttentionProblem& problem, const DecodeArgs& args,
                      const ParallelFor& parallel_for) {
  with_element_type(problem.dtype,
                    [&](auto element) { decode<decltype(element)>(problem, args, parallel_for); });
}

std::size_t reference_backward_workspace_bytes(const AttentionProblem& problem) {
  const std::size_t real_bytes = problem.dtype == DType::kFloat64 ? sizeof(double) : sizeof(float);
  return 2 * static_cast<std::size_t>(Backward<float>::num_rows(problem)) * real_bytes;
}

void reference_backward(const AttentionProblem& problem, const BackwardArgs& args, void* workspace,
                        const ParallelFor& parallel_for) {
  with_element_type(problem.dtype, [&](auto element) {
    const Backward<decltype(element)> backward(problem, args, workspace);
    for_each_head(
        problem, args.sequences, problem.num_q_heads, parallel_for,
        [&](const Sequence& sequence, std::int64_t h) { backward.query_gradients(sequence, h); });
    for_each_head(problem, args.sequences, problem.num_kv_heads, parallel_for,
                  [&](const Sequence& sequence, std::int64_t kv_head) {
                    backward.key_gradients(sequence, kv_head);
                  });
  });
}

}  // namespace parallax::cpu
