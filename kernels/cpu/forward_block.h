// SPDX-License-Identifier: MIT
// Forward of one block of query rows: the online softmax over key tiles (docs/math.md sections 3,
// 4, 6).
//
// Queries lie along the vector lanes. A panel holds kLanes queries as packed virtual rows: row d of
// [head_dim, kPanel] is q_0[d] ... q_L[d] r_0[d] ... r_L[d], so one product K [q r] gives s in the
// first half of each row and t in the second half, lane by lane. Softmax then runs down the rows
// without a shuffle, p and w overwrite s and t, and one product with V accumulates o1 and o2.
//
// Scratch, in words: panels 2 x 96 x stride, o1 and o2 2 x 96 x stride, K and V tiles and V folded
// 96 x stride each, s and t of one panel 96 x kPanel.
#pragma once

#include <math.h>

#include "cpu/rows.h"

namespace parallax::cpu::PARALLAX_TARGET {

constexpr float kLog2e = 1.44269504088896341f;
constexpr double kLn2 = 0.693147180559945309;

// The online state of one panel: m in base-2 units, t centred.
struct PanelState {
  float m[kLanes], d1[kLanes], d2[kLanes], centre[kLanes];
};

// Keys of a tile that concern a panel: rows [begin, end) of the tile, both multiples of kFold;
// `edge`: some lane does not see all of them.
struct TileRange {
  int begin, end;
  bool edge;
};

template <int kFold>
PARALLAX_INLINE TileRange tile_range(const std::int32_t* lo, const std::int32_t* hi, int lanes,
                                     std::int64_t first_key) {
  std::int64_t min_lo = INT32_MAX, max_lo = 0, min_hi = INT32_MAX, max_hi = 0;
  for (int i = 0; i < lanes; ++i) {
    if (lo[i] < hi[i] && lo[i] < min_lo) min_lo = lo[i];
    if (lo[i] > max_lo) max_lo = lo[i];
    if (hi[i] < min_hi) min_hi = hi[i];
    if (hi[i] > max_hi) max_hi = hi[i];
  }
  std::int64_t begin = min_lo < first_key ? 0 : min_lo - first_key;
  std::int64_t end = max_hi - first_key < kBlockKeys ? max_hi - first_key : kBlockKeys;
  if (begin >= end) return {0, 0, false};
  begin = begin / kFold * kFold;
  end = (end + kFold - 1) / kFold * kFold;
  const bool edge = max_lo > first_key + begin || min_hi < first_key + end;
  return {static_cast<int>(begin), static_cast<int>(end), edge};
}

template <class Words, int kStride>
struct Forward {
  static constexpr int kFold = Words::kFold;

  // s (in base-2 units) and t of the keys [begin, end) of a tile, begin a multiple of kMr: scores
  // [key, kPanel]. Returns the largest s of each lane.
  PARALLAX_INLINE Vec multiply_scores(const float* k, const float* panel, int head_dim, Vec scale,
                                      int begin, int end, float* scores) {
    Vec largest = broadcast(-INFINITY);
    for (int j = begin; j < end; j += kMr) {
      Vec acc[kMr][2];
      clear(acc);
      multiply<Words, kStride, 1, kPanel>(acc, k + j * kStride, panel, head_dim / kFold);
#pragma GCC unroll 16
      for (int i = 0; i < kMr; ++i) {
        acc[i][0] = acc[i][0] * scale;
        largest = max(largest, acc[i][0]);
      }
      store_block(acc, scores + j * kPanel, kPanel);
    }
    return largest;
  }

  // Invisible keys: s = -inf, t = 0. Returns the largest s left.
  PARALLAX_INLINE Vec apply_mask(const std::int32_t* lo, const std::int32_t* hi,
                                 std::int64_t first_key, int begin, int end, float* scores) {
    const IntVec low = load_int(lo), high = load_int(hi);
    const Vec never = broadcast(-INFINITY);
    Vec largest = never;
    for (int j = begin; j < end; ++j) {
      float* s = scores + j * kPanel;
      const Mask visible = within(low, high, static_cast<std::int32_t>(first_key + j));
      const Vec masked = select(visible, load(s), never);
      largest = max(largest, masked);
      store(s, masked);
      store(s + kLanes, select(visible, load(s + kLanes), zero()));
    }
    return largest;
  }

  // Centres t of the lanes that start in this tile at the mean of their visible t.
  PARALLAX_INLINE void set_centre(const std::int32_t* lo, const std::int32_t* hi,
                                  std::int64_t first_key, TileRange range, const float* scores,
                                  PanelState* state) {
    const std::int64_t end = first_key + range.end;
    bool any = false;
    for (int i = 0; i < kLanes; ++i) any |= lo[i] >= first_key && lo[i] < end;
    if (!any) return;
    alignas(64) float sum[kLanes];
    Vec total = zero();
    for (int j = range.begin; j < range.end; ++j)
      total = total + load(scores + j * kPanel + kLanes);
    store(sum, total);
    for (int i = 0; i < kLanes; ++i) {
      if (lo[i] < first_key || lo[i] >= end || lo[i] >= hi[i]) continue;
      const std::int64_t last = hi[i] < end ? hi[i] : end;
      state->centre[i] = sum[i] / static_cast<float>(last - lo[i]);
    }
  }

  // s, t become p, w as words along the keys: row begin / kFold on. The state moves on. Returns
  // the factors that o1 and o2 shrink by.
  PARALLAX_INLINE Vec softmax(TileRange range, Vec largest, float* scores, PanelState* state) {
    const Vec m = load(state->m);
    const Vec m_next = max(m, largest);
    const Vec reference = select(equal(m_next, broadcast(-INFINITY)), zero(), m_next);
    const Vec shrink = exp2(m - reference);
    const Vec centre = load(state->centre);
    Vec d1 = load(state->d1) * shrink, d2 = load(state->d2) * shrink;
    for (int j = range.begin; j < range.end; j += kFold) {
      Vec p[kFold], w[kFold];
      for (int f = 0; f < kFold; ++f) {
        const float* s = scores + (j + f) * kPanel;
        p[f] = exp2(load(s) - reference);
        w[f] = p[f] * (load(s + kLanes) - centre);
        d1 = d1 + p[f];
        d2 = d2 + w[f];
      }
      float* to = scores + j / kFold * kPanel;
      store(to, Words::pack(p));
      store(to + kLanes, Words::pack(w));
    }
    store(state->m, m_next);
    store(state->d1, d1);
    store(state->d2, d2);
    return shrink;
  }

  PARALLAX_INLINE void rescale(Vec shrink, int head_dim, float* o) {
    if (all(equal(shrink, broadcast(1.0f)))) return;
    alignas(64) float factors[kLanes];
    store(factors, shrink);
    for (int i = 0; i < kPanel; ++i) {
      const Vec factor = broadcast(factors[i % kLanes]);
      float* row = o + i * kStride;
      for (int d = 0; d < head_dim; d += kLanes) store(row + d, load(row + d) * factor);
    }
  }

  template <int kRows, int kNv>
  PARALLAX_INLINE void add_values(const float* p, const float* v, int depth, bool fresh, float* o) {
    Vec acc[kRows][kNv];
    if (fresh) {
      clear(acc);
    } else {
      load_block(acc, o, kStride);
    }
    multiply<Words, 1, kPanel, kStride>(acc, p, v, depth);
    store_block(acc, o, kStride);
  }

  // o1, o2 [kPanel, stride] += [p, w]^T V over the keys of the range.
  PARALLAX_INLINE void multiply_values(TileRange range, const float* scores, const float* v,
                                       int head_dim, bool fresh, float* o) {
    const float* p = scores + range.begin / kFold * kPanel;
    const float* rows = v + range.begin / kFold * kStride;
    const int depth = (range.end - range.begin) / kFold;
    for (int d = 0; d < head_dim; d += kPanel) {
      const bool whole = d + kLanes < head_dim;
      int i = 0;
      for (; i + kMr <= kPanel; i += kMr) {
        float* to = o + i * kStride + d;
        if (whole) {
          add_values<kMr, 2>(p + i, rows + d, depth, fresh, to);
        } else {
          add_values<kMr, 1>(p + i, rows + d, depth, fresh, to);
        }
      }
      float* to = o + i * kStride + d;
      if (whole) {
        add_values<kMrTail, 2>(p + i, rows + d, depth, fresh, to);
      } else {
        add_values<kMrTail, 1>(p + i, rows + d, depth, fresh, to);
      }
    }
  }

  // The same where a value that some lane does not see may be anything (0 * NaN is NaN): each lane
  // meets the tile of what it sees, through the place of the whole tile, which must be read again.
  PARALLAX_INLINE void multiply_values_apart(const ForwardBlock& block, const std::int32_t* lo,
                                             const std::int32_t* hi, std::int64_t first_key,
                                             TileRange range, const float* scores, bool fresh,
                                             float* v, float* folded, float* o) {
    const float* p = scores + range.begin / kFold * kPanel;
    const int depth = (range.end - range.begin) / kFold;
    for (int i = 0; i < kPanel; ++i) {
      read_tile<Words, kStride>(block.dtype, block.v, block.head_dim, first_key, lo[i % kLanes],
                                hi[i % kLanes], v);
      const float* values = fold_rows<Words, kStride>(v, kBlockKeys, block.head_dim, folded);
      const float* rows = values + range.begin / kFold * kStride;
      for (int d = 0; d < block.head_dim; d += kLanes) {
        add_values<1, 1>(p + i, rows + d, depth, fresh, o + i * kStride + d);
      }
    }
  }

  PARALLAX_INLINE void pack_panel(const ForwardBlock& block, int first_row, float* rows,
                                  float* panel) {
    with_element(block.dtype, [&](auto element) {
      for (int half = 0; half < 2; ++half) {
        const void* const* from = half == 0 ? block.q : block.r;
        for (int i = 0; i < kLanes; ++i) {
          // Lanes beyond the block repeat its last row; nothing of them is written.
          const int row = first_row + i < block.rows ? first_row + i : block.rows - 1;
          read_words<Words>(element, from[row], block.head_dim, rows + i * kStride);
        }
        transpose_into_panel<kStride>(rows, block.head_dim / kFold, panel + half * kLanes);
      }
    });
  }

  // o = (1 + d2/d1) o1/d1 - o2/d1 and the statistics of each row of a panel. o1 becomes v_bar.
  PARALLAX_INLINE void finish_panel(const ForwardBlock& block, int first_row,
                                    const PanelState& state, float* o) {
    for (int i = 0; i < kLanes && first_row + i < block.rows; ++i) {
      const int row = first_row + i;
      const bool empty = !(block.lo[row] < block.hi[row]);
      const float inverse = empty ? 0.0f : 1.0f / state.d1[i];
      const float mean_t = empty ? 0.0f : state.d2[i] * inverse;
      float* o1 = o + i * kStride;
      float* o2 = o + (i + kLanes) * kStride;
      if (empty) {
        clear_row(o1, block.head_dim);
        clear_row(o2, block.head_dim);
      }
      const Vec scale = broadcast(inverse), factor = broadcast(1.0f + mean_t);
      for (int d = 0; d < block.head_dim; d += kLanes) {
        const Vec v_bar = load(o1 + d) * scale;
        store(o1 + d, v_bar);
        store(o2 + d, factor * v_bar - load(o2 + d) * scale);
      }
      with_element(block.dtype, [&](auto element) {
        write_row(element, o2, block.head_dim, block.o[row]);
        if (block.v_bar[0] != nullptr) write_row(element, o1, block.head_dim, block.v_bar[row]);
      });
      if (block.lse[0] != nullptr) {
        *block.lse[row] =
            empty ? -INFINITY : static_cast<float>(state.m[i] * kLn2 + ::log(state.d1[i]));
      }
      if (block.t_bar[0] != nullptr) *block.t_bar[row] = empty ? 0.0f : state.centre[i] + mean_t;
    }
  }

  static void run(const ForwardBlock& block, float* scratch) {
    constexpr int kPanels = kBlockRows / kLanes;
    constexpr int kPanelFloats = kPanel * kStride;
    float* panels = scratch;
    float* o = panels + kPanels * kPanelFloats;
    float* k = o + kPanels * kPanelFloats;
    float* v = k + kBlockKeys * kStride;
    float* folded = v + kBlockKeys * kStride;
    float* scores = folded + kBlockKeys * kStride;
    const Vec scale = broadcast(block.scale * kLog2e);
    PanelState state[kPanels];
    bool fresh[kPanels];
    std::int32_t lo[kBlockRows], hi[kBlockRows];

    const int num_panels = (block.rows + kLanes - 1) / kLanes;
    std::int64_t first = INT32_MAX, last = 0;
    for (int i = 0; i < num_panels * kLanes; ++i) {
      const int row = i < block.rows ? i : block.rows - 1;
      lo[i] = block.lo[row];
      hi[i] = block.hi[row];
      if (lo[i] >= hi[i]) continue;
      if (lo[i] < first) first = lo[i];
      if (hi[i] > last) last = hi[i];
    }
    for (int g = 0; g < num_panels; ++g) {
      // The K tile's place serves for the rows on their way into a panel.
      pack_panel(block, g * kLanes, k, panels + g * kPanelFloats);
      fresh[g] = true;
      for (int i = 0; i < kLanes; ++i) {
        state[g].m[i] = -INFINITY;
        state[g].d1[i] = state[g].d2[i] = state[g].centre[i] = 0.0f;
      }
    }
    for (std::int64_t key = first / kBlockKeys * kBlockKeys; key < last; key += kBlockKeys) {
      read_tile<Words, kStride>(block.dtype, block.k, block.head_dim, key, first, last, k);
      read_tile<Words, kStride>(block.dtype, block.v, block.head_dim, key, first, last, v);
      const float* values = fold_rows<Words, kStride>(v, kBlockKeys, block.head_dim, folded);
      int finite = -1;  // not known yet
      for (int g = 0; g < num_panels; ++g) {
        const std::int32_t* low = lo + g * kLanes;
        const std::int32_t* high = hi + g * kLanes;
        const TileRange range = tile_range<kFold>(low, high, kLanes, key);
        if (range.begin == range.end) continue;
        const int begin = range.begin / kMr * kMr;
        Vec largest = multiply_scores(k, panels + g * kPanelFloats, block.head_dim, scale, begin,
                                      range.end, scores);
        if (range.edge || begin != range.begin || range.end % kMr != 0) {
          largest = apply_mask(low, high, key, range.begin, range.end, scores);
        }
        set_centre(low, high, key, range, scores, &state[g]);
        const Vec shrink = softmax(range, largest, scores, &state[g]);
        float* sums = o + g * kPanelFloats;
        if (!fresh[g]) rescale(shrink, block.head_dim, sums);
        if (range.edge && finite < 0) {
          finite = all_finite<kFold>(v, kBlockKeys, kStride, block.head_dim / kFold);
        }
        if (range.edge && finite == 0) {
          multiply_values_apart(block, low, high, key, range, scores, fresh[g], v, folded, sums);
          read_tile<Words, kStride>(block.dtype, block.v, block.head_dim, key, first, last, v);
          fold_rows<Words, kStride>(v, kBlockKeys, block.head_dim, folded);
        } else {
          multiply_values(range, scores, values, block.head_dim, fresh[g], sums);
        }
        fresh[g] = false;
      }
    }
    for (int g = 0; g < num_panels; ++g) {
      finish_panel(block, g * kLanes, state[g], o + g * kPanelFloats);
    }
  }
};

template <class Words>
static void forward_block(const ForwardBlock& block, float* scratch) {
  switch (row_stride(block.head_dim)) {
    case row_stride(32):
      return Forward<Words, row_stride(32)>::run(block, scratch);
    case row_stride(64):
      return Forward<Words, row_stride(64)>::run(block, scratch);
    case row_stride(128):
      return Forward<Words, row_stride(128)>::run(block, scratch);
    default:
      return Forward<Words, row_stride(256)>::run(block, scratch);
  }
}

}  // namespace parallax::cpu::PARALLAX_TARGET
