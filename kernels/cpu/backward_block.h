// SPDX-License-Identifier: MIT
// Backward of one block of query rows against a run of key tiles: eight products for each tile
// (docs/math.md), each of them computed once.
//
//   s, t = K [q r]   G = V dO^T                  queries along the lanes, as in the forward
//   e = p (G - Gbar)   u = 1 + t_bar - t   A = p u   dS = u e - (Delta - Gbar) p   dT = -e
//   dv += A^T dO   dk += dS^T q scale + e^T (-r)   dq += dS K   dr += e K
//
// The middle line is written transposed, [key, query], and the register-blocked product reads it
// either way, so no tile is ever transposed. dq and dr stay in the block's sums, dk and dv are
// added to float rows of the whole sequence; a block's first tile is its last, so that the order of
// every sum is the same however blocks and tiles are shared out among tasks.
//
// The row sums of dS and e are zero in exact arithmetic. Rounding (of v_bar above all, which bf16
// callers save in bf16) leaves a rest that meets the mean of the keys: dq and dr are therefore
// taken against keys centred at the mean k0 of the block's lowest tile, afterwards and for free, as
// dq - (sum dS) k0 and dr - (sum e) k0.
//
// Scratch, in floats: q, -r, dO rows 3 x 96 x stride; panels [q r] and dO 3 x 96 x stride; K and V
// tiles 2 x 96 x stride; A, dS, e 3 x 96 x 96; s, t, G of one pair of panels 3 x 96 x kPanel.
#pragma once

#include "cpu/forward_block.h"

namespace parallax::cpu::PARALLAX_TARGET {

// Constants of the rows of a block, one lane each.
struct RowTerms {
  float lse[kBlockRows];        // base 2
  float u0[kBlockRows];         // 1 + t_bar
  float gbar[kBlockRows];       // dO.v_bar
  float minus_gap[kBlockRows];  // Gbar - Delta = dO.(v_bar - o)
};

template <int kStride>
struct Backward {
  static constexpr int kQueries = kPanel;  // of one pair of panels: the columns of one G product
  static constexpr int kPanelFloats = kPanel * kStride;

  struct Scratch {
    float *q, *minus_r, *d_o;  // [kBlockRows, kStride]
    float *qr, *d_o_panels;    // panels of kLanes and of kQueries queries
    float *k, *v;              // [kBlockKeys, kStride]
    float *a, *d_s, *e;        // [kBlockKeys, kBlockRows]
    float *scores, *g;         // [2][kBlockKeys, kPanel] and [kBlockKeys, kQueries]

    explicit Scratch(float* at) {
      const auto take = [&at](int floats) {
        float* begin = at;
        at += floats;
        return begin;
      };
      q = take(kBlockRows * kStride);
      minus_r = take(kBlockRows * kStride);
      d_o = take(kBlockRows * kStride);
      qr = take(2 * kBlockRows * kStride);
      d_o_panels = take(kBlockRows * kStride);
      k = take(kBlockKeys * kStride);
      v = take(kBlockKeys * kStride);
      a = take(kBlockKeys * kBlockRows);
      d_s = take(kBlockKeys * kBlockRows);
      e = take(kBlockKeys * kBlockRows);
      scores = take(2 * kBlockKeys * kPanel);
      g = take(kBlockKeys * kQueries);
    }
  };

  PARALLAX_INLINE float sum_of_products(const float* x, const float* y, int head_dim) {
    Vec total = zero();
    for (int d = 0; d < head_dim; d += kLanes) total = fma(load(x + d), load(y + d), total);
    alignas(64) float lanes[kLanes];
    store(lanes, total);
    float sum = 0.0f;
    for (int i = 0; i < kLanes; ++i) sum += lanes[i];
    return sum;
  }

  // Rows, panels and row terms. Rows that see no key are all zero. Of rows that see one key the dO
  // panel and the terms made of it are zero: then e = dS = 0 and dq = dr = 0, exactly.
  PARALLAX_INLINE void pack_rows(const BackwardBlock& block, const std::int32_t* lo,
                                 const std::int32_t* hi, int num_rows, const Scratch& to,
                                 RowTerms* terms) {
    const int head_dim = block.head_dim;
    float* o = to.k;  // the tiles' places serve for rows that are needed once
    float* panel_rows = to.v;
    with_element(block.dtype, [&](auto element) {
      for (int i = 0; i < num_rows; ++i) {
        float *q = to.q + i * kStride, *minus_r = to.minus_r + i * kStride,
              *d_o = to.d_o + i * kStride, *d_o_row = panel_rows + i * kStride;
        terms->lse[i] = terms->u0[i] = terms->gbar[i] = terms->minus_gap[i] = 0.0f;
        clear_row(d_o_row, head_dim);
        if (lo[i] >= hi[i]) {
          clear_row(q, head_dim);
          clear_row(minus_r, head_dim);
          clear_row(d_o, head_dim);
          continue;
        }
        read_row(element, block.q[i], head_dim, block.scale, q);
        read_row(element, block.r[i], head_dim, -1.0f, minus_r);
        read_row(element, block.d_o[i], head_dim, 1.0f, d_o);
        terms->lse[i] = block.lse[i] * kLog2e;
        terms->u0[i] = 1.0f + block.t_bar[i];
        if (hi[i] - lo[i] == 1) continue;
        float *o_row = o, *v_bar = o + kStride;
        read_row(element, block.o[i], head_dim, 1.0f, o_row);
        read_row(element, block.v_bar[i], head_dim, 1.0f, v_bar);
        for (int d = 0; d < head_dim; d += kLanes) {
          store(o_row + d, load(v_bar + d) - load(o_row + d));
          store(d_o_row + d, load(d_o + d));
        }
        terms->gbar[i] = sum_of_products(d_o, v_bar, head_dim);
        terms->minus_gap[i] = sum_of_products(d_o, o_row, head_dim);
      }
    });
    for (int i = 0; i < num_rows; i += kLanes) {
      const int half = i / kLanes % 2 * kLanes;
      transpose_into_panel<kStride>(panel_rows + i * kStride, head_dim,
                                    to.d_o_panels + i / kQueries * kPanelFloats + half);
    }
    for (int i = 0; i < num_rows; i += kLanes) {
      float* panel = to.qr + i / kLanes * kPanelFloats;
      for (int row = 0; row < kLanes; ++row) {
        for (int d = 0; d < head_dim; d += kLanes) {
          const int at = (i + row) * kStride + d;
          store(panel_rows + row * kStride + d, load(to.q + at) * broadcast(kLog2e));
          store(o + row * kStride + d, zero() - load(to.minus_r + at));
        }
      }
      transpose_into_panel<kStride>(panel_rows, head_dim, panel);
      transpose_into_panel<kStride>(o, head_dim, panel + kLanes);
    }
  }

  // to [key, kPanel] = rows [key, stride] panel, for keys [begin, end), begin a multiple of kMr.
  PARALLAX_INLINE void multiply_panel(const float* rows, const float* panel, int head_dim,
                                      int begin, int end, float* to) {
    for (int j = begin; j < end; j += kMr) {
      Vec acc[kMr][2];
      clear(acc);
      multiply<kStride, 1, kPanel>(acc, rows + j * kStride, panel, head_dim);
      store_block(acc, to + j * kPanel, kPanel);
    }
  }

  // A, dS and e of kLanes queries from `first_query` on, for keys [begin, end) of the tile.
  template <bool kEdge>
  PARALLAX_INLINE void differentiate(const Scratch& at, const RowTerms& terms, int first_query,
                                     const std::int32_t* lo, const std::int32_t* hi,
                                     std::int64_t first_key, int begin, int end,
                                     const BackwardSums& sums) {
    const int i = first_query;
    const int half = i / kLanes % 2;
    const float* s = at.scores + half * kBlockKeys * kPanel + begin * kPanel;
    const float* g = at.g + begin * kQueries + half * kLanes;
    const Vec lse = load(terms.lse + i), u0 = load(terms.u0 + i), gbar = load(terms.gbar + i),
              minus_gap = load(terms.minus_gap + i);
    const IntVec low = load_int(lo + i), high = load_int(hi + i);
    Vec sum_ds = load(sums.sum_ds + i), sum_e = load(sums.sum_e + i);
    for (int j = begin; j < end; ++j, s += kPanel, g += kQueries) {
      Vec p = exp2(load(s) - lse);
      Vec t = load(s + kLanes), grad = load(g);
      if constexpr (kEdge) {
        const Mask visible = within(low, high, static_cast<std::int32_t>(first_key + j));
        p = select(visible, p, zero());
        t = select(visible, t, zero());
        grad = select(visible, grad, zero());
      }
      const Vec e = p * (grad - gbar);
      const Vec u = u0 - t;
      const Vec d_s = fma(u, e, p * minus_gap);
      store(at.a + j * kBlockRows + i, p * u);
      store(at.d_s + j * kBlockRows + i, d_s);
      store(at.e + j * kBlockRows + i, e);
      sum_ds = sum_ds + d_s;
      sum_e = sum_e + e;
    }
    store(sums.sum_ds + i, sum_ds);
    store(sums.sum_e + i, sum_e);
  }

  PARALLAX_INLINE void clear_queries(const Scratch& at, int first_query, int begin, int end) {
    for (int j = begin; j < end; ++j) {
      for (int i = first_query; i < first_query + kQueries; i += kLanes) {
        store(at.a + j * kBlockRows + i, zero());
        store(at.d_s + j * kBlockRows + i, zero());
        store(at.e + j * kBlockRows + i, zero());
      }
    }
  }

  // A, dS and e of kQueries queries over a whole tile, zeros where nothing is visible.
  PARALLAX_INLINE bool differentiate_pair(const BackwardBlock& block, const Scratch& at,
                                          const RowTerms& terms, int first_query,
                                          const std::int32_t* lo, const std::int32_t* hi,
                                          std::int64_t first_key) {
    const TileRange range = tile_range(lo + first_query, hi + first_query, kQueries, first_key);
    if (range.begin == range.end) {
      clear_queries(at, first_query, 0, kBlockKeys);
      return false;
    }
    const int begin = range.begin / kMr * kMr;
    for (int half = 0; half < 2; ++half) {
      const float* panel = at.qr + (first_query / kLanes + half) * kPanelFloats;
      multiply_panel(at.k, panel, block.head_dim, begin, range.end,
                     at.scores + half * kBlockKeys * kPanel);
    }
    multiply_panel(at.v, at.d_o_panels + first_query / kQueries * kPanelFloats, block.head_dim,
                   begin, range.end, at.g);
    for (int i = first_query; i < first_query + kQueries; i += kLanes) {
      if (range.edge) {
        differentiate<true>(at, terms, i, lo, hi, first_key, range.begin, range.end, block.sums);
      } else {
        differentiate<false>(at, terms, i, lo, hi, first_key, range.begin, range.end, block.sums);
      }
    }
    clear_queries(at, first_query, 0, range.begin);
    clear_queries(at, first_query, range.end, kBlockKeys);
    return true;
  }

  template <int kNv>
  PARALLAX_INLINE void add_to_keys(const Scratch& at, int j, int d, int begin, int end, float* dk,
                                   float* dv) {
    const int x = j * kBlockRows + begin, y = begin * kStride + d, depth = end - begin;
    Vec acc[kMr][kNv];
    load_block(acc, dv + d, kStride);
    multiply<kBlockRows, 1, kStride>(acc, at.a + x, at.d_o + y, depth);
    store_block(acc, dv + d, kStride);
    load_block(acc, dk + d, kStride);
    multiply<kBlockRows, 1, kStride>(acc, at.d_s + x, at.q + y, depth);
    multiply<kBlockRows, 1, kStride>(acc, at.e + x, at.minus_r + y, depth);
    store_block(acc, dk + d, kStride);
  }

  template <int kNv>
  PARALLAX_INLINE void add_to_queries(const Scratch& at, int i, int d, int begin, int end,
                                      float* dq, float* dr) {
    const int x = begin * kBlockRows + i, y = begin * kStride + d, depth = end - begin;
    Vec acc[kMr][kNv];
    load_block(acc, dq + d, kStride);
    multiply<1, kBlockRows, kStride>(acc, at.d_s + x, at.k + y, depth);
    store_block(acc, dq + d, kStride);
    load_block(acc, dr + d, kStride);
    multiply<1, kBlockRows, kStride>(acc, at.e + x, at.k + y, depth);
    store_block(acc, dr + d, kStride);
  }

  // The queries of [0, num_rows) that see some key of [begin, end), as far as zeros reach.
  PARALLAX_INLINE TileRange visible_queries(const std::int32_t* lo, const std::int32_t* hi,
                                            int num_rows, std::int64_t begin, std::int64_t end) {
    int first = 0, last = num_rows;
    while (first < last && !(lo[first] < hi[first] && hi[first] > begin && lo[first] < end))
      ++first;
    while (first < last &&
           !(lo[last - 1] < hi[last - 1] && hi[last - 1] > begin && lo[last - 1] < end)) {
      --last;
    }
    return {first, last, false};
  }

  PARALLAX_INLINE void multiply_tile(const BackwardBlock& block, const Scratch& at,
                                     const std::int32_t* lo, const std::int32_t* hi, int num_rows,
                                     std::int64_t tile) {
    const int head_dim = block.head_dim;
    const std::int64_t first_key = tile * kBlockKeys;
    TileRange queries[kBlockKeys / kMr], keys[kBlockRows / kMr];
    for (int j = 0; j < kBlockKeys; j += kMr) {
      queries[j / kMr] = visible_queries(lo, hi, num_rows, first_key + j, first_key + j + kMr);
    }
    for (int i = 0; i < num_rows; i += kMr) {
      keys[i / kMr] = tile_range(lo + i, hi + i, kMr, first_key);
    }
    float* dk = block.dk + first_key * kStride;
    float* dv = block.dv + first_key * kStride;
    for (int d = 0; d < head_dim; d += kPanel) {
      const bool whole = d + kLanes < head_dim;
      for (int j = 0; j < kBlockKeys; j += kMr) {
        const TileRange& range = queries[j / kMr];
        if (range.begin >= range.end) continue;
        if (whole) {
          add_to_keys<2>(at, j, d, range.begin, range.end, dk + j * kStride, dv + j * kStride);
        } else {
          add_to_keys<1>(at, j, d, range.begin, range.end, dk + j * kStride, dv + j * kStride);
        }
      }
      for (int i = 0; i < num_rows; i += kMr) {
        const TileRange& range = keys[i / kMr];
        if (range.begin >= range.end) continue;
        float *dq = block.sums.dq + i * kStride, *dr = block.sums.dr + i * kStride;
        if (whole) {
          add_to_queries<2>(at, i, d, range.begin, range.end, dq, dr);
        } else {
          add_to_queries<1>(at, i, d, range.begin, range.end, dq, dr);
        }
      }
    }
  }

  // dq = scale (sum dS k - (sum dS) k0), dr = -(sum e k - (sum e) k0), k0 the mean of the keys
  // [begin, end) of the tile at hand.
  PARALLAX_INLINE void finish(const BackwardBlock& block, const Scratch& at, int begin, int end) {
    float* k0 = at.v;
    const Vec share = broadcast(begin < end ? 1.0f / static_cast<float>(end - begin) : 0.0f);
    for (int d = 0; d < block.head_dim; d += kLanes) {
      Vec total = zero();
      for (int j = begin; j < end; ++j) total = total + load(at.k + j * kStride + d);
      store(k0 + d, total * share);
    }
    const Vec scale = broadcast(block.scale);
    with_element(block.dtype, [&](auto element) {
      for (int i = 0; i < block.rows; ++i) {
        float *dq = block.sums.dq + i * kStride, *dr = block.sums.dr + i * kStride;
        const Vec sum_ds = broadcast(block.sums.sum_ds[i]), sum_e = broadcast(block.sums.sum_e[i]);
        for (int d = 0; d < block.head_dim; d += kLanes) {
          store(dq + d, scale * (load(dq + d) - sum_ds * load(k0 + d)));
          store(dr + d, sum_e * load(k0 + d) - load(dr + d));
        }
        write_row(element, dq, block.head_dim, block.dq[i]);
        write_row(element, dr, block.head_dim, block.dr[i]);
      }
    });
  }

  PARALLAX_INLINE void clear_sums(const BackwardSums& sums) {
    for (int i = 0; i < kBlockRows * kStride; i += kLanes) {
      store(sums.dq + i, zero());
      store(sums.dr + i, zero());
    }
    for (int i = 0; i < kBlockRows; i += kLanes) {
      store(sums.sum_ds + i, zero());
      store(sums.sum_e + i, zero());
    }
  }

  static void run(const BackwardBlock& block, float* scratch) {
    const Scratch at(scratch);
    RowTerms terms;
    std::int32_t lo[kBlockRows] = {}, hi[kBlockRows] = {};
    std::int64_t first = INT32_MAX, last = 0;
    for (int i = 0; i < block.rows; ++i) {
      lo[i] = block.lo[i];
      hi[i] = block.hi[i];
      if (lo[i] >= hi[i]) continue;
      if (lo[i] < first) first = lo[i];
      if (hi[i] > last) last = hi[i];
    }
    const int num_rows = (block.rows + kQueries - 1) / kQueries * kQueries;
    pack_rows(block, lo, hi, num_rows, at, &terms);
    if (block.first) clear_sums(block.sums);
    int k0_begin = 0, k0_end = 0;
    for (std::int64_t tile = block.tile_end - 1; tile >= block.tile_begin; --tile) {
      const std::int64_t key = tile * kBlockKeys;
      if (key >= last || key + kBlockKeys <= first) continue;
      read_tile<kStride>(block.dtype, block.k, block.head_dim, key, first, last, at.k);
      read_tile<kStride>(block.dtype, block.v, block.head_dim, key, first, last, at.v);
      k0_begin = first > key ? static_cast<int>(first - key) : 0;
      k0_end = last - key < kBlockKeys ? static_cast<int>(last - key) : kBlockKeys;
      bool any = false;
      for (int i = 0; i < num_rows; i += kQueries) {
        any |= differentiate_pair(block, at, terms, i, lo, hi, key);
      }
      if (any) multiply_tile(block, at, lo, hi, num_rows, tile);
    }
    if (block.last) finish(block, at, k0_begin, k0_end);
  }
};

static void backward_block(const BackwardBlock& block, float* scratch) {
  switch (row_stride(block.head_dim)) {
    case row_stride(32):
      return Backward<row_stride(32)>::run(block, scratch);
    case row_stride(64):
      return Backward<row_stride(64)>::run(block, scratch);
    case row_stride(128):
      return Backward<row_stride(128)>::run(block, scratch);
    default:
      return Backward<row_stride(256)>::run(block, scratch);
  }
}

}  // namespace parallax::cpu::PARALLAX_TARGET
