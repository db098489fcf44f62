// SPDX-License-Identifier: MIT
// The online state of a row (m, d1, d2, o1, o2) and its law: update, merge, finalize (docs/math.md
// sections 3 to 6). The scalar half lives here; the vector half (o1, o2) is whatever the caller
// holds, an array or an accumulator fragment, and gets the same factors. One law for the CPU
// kernels, the CUDA kernels, the combination of splits and the tests.
//
// Over the keys that a row has met, with logits s, probes t and a row constant c (the centre):
//   d1 = sum exp(s - m),  d2 = sum exp(s - m) (t - c),  o1 = sum exp(s - m) v,
//   o2 = sum exp(s - m) (t - c) v.
// m need not be the true maximum, only large enough that exp(s - m) stays finite. The state of no
// keys is m = -inf and zeros: the identity of the merge.
#pragma once

#include <cmath>
#include <limits>

#include "parallax/types.h"

namespace parallax {

// Factor that turns sums taken relative to `from` into sums relative to `to` >= from.
template <class Real>
PARALLAX_HOST_DEVICE inline Real rescale(Real from, Real to) {
  return from == -std::numeric_limits<Real>::infinity() ? Real(0) : std::exp(from - to);
}

template <class Real>
struct RowState {
  Real m = -std::numeric_limits<Real>::infinity();
  Real d1 = 0;
  Real d2 = 0;

  // Makes m at least s_max; the caller multiplies its o1 and o2 by the factor returned.
  PARALLAX_HOST_DEVICE Real raise(Real s_max) {
    if (!(s_max > m)) return Real(1);
    const Real factor = rescale(m, s_max);
    m = s_max;
    d1 *= factor;
    d2 *= factor;
    return factor;
  }

  // One key: p = exp(s - m) and w = p (t - c). The caller adds p v to o1 and w v to o2.
  PARALLAX_HOST_DEVICE void add(Real p, Real w) {
    d1 += p;
    d2 += w;
  }

  // Moves the centre down by `by`; uncentre(c) makes plain sums of sums centred at c. The caller
  // adds by * o1 to o2.
  PARALLAX_HOST_DEVICE void uncentre(Real by) { d2 += by * d1; }
};

// A merged state and what its vector half is made of: o = left * o_left + right * o_right, for o1
// and o2 alike. Both sides must have the same centre (exported states: none).
template <class Real>
struct Merged {
  RowState<Real> state;
  Real left = 0;
  Real right = 0;
};

template <class Real>
PARALLAX_HOST_DEVICE inline Merged<Real> merge(const RowState<Real>& a, const RowState<Real>& b) {
  Merged<Real> merged;
  const Real m = a.m > b.m ? a.m : b.m;
  merged.left = rescale(a.m, m);
  merged.right = rescale(b.m, m);
  merged.state.m = m;
  merged.state.d1 = merged.left * a.d1 + merged.right * b.d1;
  merged.state.d2 = merged.left * a.d2 + merged.right * b.d2;
  return merged;
}

// What a row yields in the end. A row of no keys yields o = v_bar = 0, lse = -inf, t_bar = 0.
template <class Real>
struct Finalized {
  Real lse = -std::numeric_limits<Real>::infinity();
  Real t_bar = 0;
  Real inverse_d1 = 0;
  Real centred_t_bar = 0;  // d2 / d1

  PARALLAX_HOST_DEVICE Real v_bar(Real o1) const { return o1 * inverse_d1; }
  // The correction stands apart, so that o is exactly v_bar where it vanishes: one key, or r = 0.
  PARALLAX_HOST_DEVICE Real o(Real o1, Real o2) const {
    return v_bar(o1) + (centred_t_bar * o1 - o2) * inverse_d1;
  }
};

template <class Real>
PARALLAX_HOST_DEVICE inline Finalized<Real> finalize(const RowState<Real>& state, Real c = 0) {
  Finalized<Real> result;
  if (state.d1 == 0) return result;  // and NaN stays NaN
  result.lse = state.m + std::log(state.d1);
  result.inverse_d1 = Real(1) / state.d1;
  result.centred_t_bar = state.d2 * result.inverse_d1;
  result.t_bar = c + result.centred_t_bar;
  return result;
}

}  // namespace parallax
