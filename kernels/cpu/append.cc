// SPDX-License-Identifier: MIT
// append_kv(): new keys and values into a contiguous or paged cache, as they are or in FP8, and the
// norm and rotation of q, r and k before it. The order of every sum is that of cuda/append.cu.
#include <algorithm>
#include <cmath>

#include "cpu/checks.h"
#include "cpu/element.h"
#include "parallax/attention.h"
#include "parallax/paged_kv.h"

namespace parallax {
namespace {

constexpr std::int64_t kMaxHeadDim = 256;
constexpr std::int64_t kLaneElements = 8;
constexpr std::int64_t kMaxLanes = kMaxHeadDim / kLaneElements;

// Eight squares a lane (a lane holds both halves of four pairs where the head is rotated), then the
// lanes in halves.
template <class Real>
Real sum_of_squares(const Real* x, std::int64_t head_dim, bool rotate) {
  Real sums[kMaxLanes] = {};
  for (std::int64_t lane = 0; lane < head_dim / kLaneElements; ++lane) {
    const Real* first = x + lane * (rotate ? 4 : 8);
    const Real* second = rotate ? first + head_dim / 2 : first + 4;
    for (int i = 0; i < 4; ++i) sums[lane] += first[i] * first[i];
    for (int i = 0; i < 4; ++i) sums[lane] += second[i] * second[i];
  }
  for (std::int64_t step = kMaxLanes / 2; step > 0; step /= 2) {
    for (std::int64_t lane = 0; lane < step; ++lane) sums[lane] += sums[lane + step];
  }
  return sums[0];
}

template <class Real>
void normalise(const float* gain, double eps, std::int64_t head_dim, bool rotate, Real* x) {
  const Real mean = sum_of_squares(x, head_dim, rotate) / static_cast<Real>(head_dim);
  const Real factor = Real(1) / std::sqrt(mean + static_cast<Real>(eps));
  for (std::int64_t d = 0; d < head_dim; ++d) x[d] = x[d] * factor * static_cast<Real>(gain[d]);
}

template <class Real>
void rotate(const float* cos, const float* sin, std::int64_t head_dim, Real* x) {
  const std::int64_t half = head_dim / 2;
  for (std::int64_t d = 0; d < half; ++d) {
    const Real c = static_cast<Real>(cos[d]), s = static_cast<Real>(sin[d]);
    const Real first = x[d], second = x[d + half];
    x[d] = first * c - second * s;
    x[d + half] = second * c + first * s;
  }
}

// One of k, v, q and r: where its rows come from and go to, and what happens to them on the way.
struct Rows {
  ConstView from;
  View to;
  std::int64_t num_heads;
  HeadPrologue head;
  const float* scale = nullptr;  // of an FP8 cache
};

class Appender {
 public:
  Appender(const AttentionProblem& problem, const AppendArgs& args)
      : problem_(problem), args_(args) {}

  void append_sequence(std::int64_t b) const {
    const AppendPrologue& prologue = args_.prologue;
    const Rows k{args_.k, args_.k_cache, problem_.num_kv_heads, prologue.k, args_.k_scale};
    const Rows v{args_.v, args_.v_cache, problem_.num_kv_heads, {}, args_.v_scale};
    const Rows q{prologue.q.in, prologue.q.out, problem_.num_q_heads, prologue.q.head};
    const Rows r{prologue.r.in, prologue.r.out, problem_.num_q_heads, prologue.r.head};
    Sequence sequence;
    sequence.batch_idx = b;
    for (const Rows& rows : {k, v}) {
      const KvRows places =
          kv_rows(rows.to.batch_stride, rows.to.len_stride, args_.pages, sequence);
      for (std::int64_t i = 0; i < problem_.q_len; ++i) {
        move_token(rows, b, i, places.offset(args_.positions[b] + i));
      }
    }
    for (const Rows& rows : {q, r}) {
      for (std::int64_t i = 0; i < problem_.q_len && rows.from.data; ++i) {
        move_token(rows, b, i, b * rows.to.batch_stride + i * rows.to.len_stride);
      }
    }
  }

 private:
  // Token i of sequence b, all heads, to element `to` of where it goes.
  void move_token(const Rows& rows, std::int64_t b, std::int64_t i, std::int64_t to) const {
    const std::int64_t from = b * rows.from.batch_stride + i * rows.from.len_stride;
    cpu::with_element_type(problem_.dtype, [&](auto element) {
      using T = decltype(element);
      for (std::int64_t h = 0; h < rows.num_heads; ++h) {
        const T* source = static_cast<const T*>(rows.from.data) + from + h * rows.from.head_stride;
        const std::int64_t target = to + h * rows.to.head_stride;
        if (rows.scale) {
          move_head(rows, source, b, i, rows.scale[h],
                    static_cast<cpu::Float8E4M3*>(rows.to.data) + target);
        } else if (rows.head.gain || rows.head.rotate) {
          move_head(rows, source, b, i, 1.0f, static_cast<T*>(rows.to.data) + target);
        } else {
          std::copy_n(source, problem_.head_dim, static_cast<T*>(rows.to.data) + target);
        }
      }
    });
  }

  template <class From, class To>
  void move_head(const Rows& rows, const From* from, std::int64_t b, std::int64_t i, float scale,
                 To* to) const {
    using Real = cpu::RealOf<From>;
    const std::int64_t head_dim = problem_.head_dim;
    const AppendPrologue& prologue = args_.prologue;
    Real x[kMaxHeadDim];
    for (std::int64_t d = 0; d < head_dim; ++d) x[d] = cpu::load(from[d]);
    if (rows.head.gain) {
      normalise(rows.head.gain, prologue.eps, head_dim, rows.head.rotate, x);
    }
    if (rows.head.rotate) {
      const std::int64_t angle = (prologue.angles ? prologue.angles : args_.positions)[b] + i;
      const std::int64_t row = angle * head_dim / 2;
      rotate(prologue.cos + row, prologue.sin + row, head_dim, x);
    }
    for (std::int64_t d = 0; d < head_dim; ++d) {
      cpu::store(static_cast<cpu::RealOf<To>>(x[d] / static_cast<Real>(scale)), to + d);
    }
  }

  const AttentionProblem& problem_;
  const AppendArgs& args_;
};

}  // namespace

Status append_kv(const AttentionProblem& problem, const AppendArgs& args,
                 const ParallelFor& parallel_for) {
  const AttentionProblem shape = cpu::append_problem(problem, args);
  if (Status status = cpu::check_decode_problem(shape, {}); !status.ok()) return status;
  if (Status status = cpu::check_arguments(shape, args); !status.ok()) return status;
  if (shape.batch == 0) return {};
  const Appender appender(shape, args);
  parallel_for(shape.batch, [&](std::int64_t b, int) { appender.append_sequence(b); });
  return {};
}

}  // namespace parallax
