// SPDX-License-Identifier: MIT
// Backward of one block of query rows against a run of key tiles: eight products for each tile
// (docs/math.md section 7), each of them computed once.
//
//   s, t = K [q r]   G = V dO^T                  queries along the lanes, as in the forward
//   e = p (G - Gbar)   u = 1 + t_bar - t   A = p u   dS = u e - (Delta - Gbar) p   dT = -e
//   dv += A^T dO   dk += scale dS^T q + e^T (-r)   dq += scale dS K   dr += e K
//
// The middle line is written transposed, [key, query], dS with its scale, and the register-blocked
// product reads floats either way, so no tile is ever transposed; words of two bf16 are written
// along both axes. dq and dr stay in the block's sums, dk and dv are added to float rows of the
// whole sequence; a block meets its tiles from last to first, so that the order of every sum is the
// same however blocks and tiles are shared out among tasks.
//
// The row sums of dS and e are zero in exact arithmetic. Rounding (of v_bar above all, which bf16
// callers save in bf16) leaves a rest that meets the mean of the keys: dq and dr are therefore
// taken against keys centred at the mean k0 of the block's lowest tile, afterwards and for free, as
// dq - (sum dS) k0 and dr - (sum e) k0.
//
// Scratch, in words: q, -r, dO rows 3 x 96 x stride; panels [q r] and dO 3 x 96 x stride; K and V
// tiles 2 x 96 x stride; q, -r, dO and K folded 2 x 96 x stride; A, dS, e 3 x 96 x 96; s, t, G of
// one pair of panels 3 x 96 x kPanel.
#pragma once

#include "cpu/forward_block.h"

namespace parallax::cpu::PARALLAX_TARGET {

// Constants of the rows of a block, one lane each.
struct RowTerms {
  float lse[kBlockRows];                // base 2
  float u0[kBlockRows];                 // 1 + t_bar
  float g_bar[kBlockRows];              // dO.v_bar
  float g_bar_minus_delta[kBlockRows];  // Gbar - Delta = dO.(v_bar - o)
  bool finite;                          // q, r and dO of all rows
};

template <class Words, int kStride>
struct Backward {
  static constexpr int kFold = Words::kFold;
  static constexpr int kQueries = kPanel;  // of one pair of panels: the columns of one G product
  static constexpr int kPanelFloats = kPanel * kStride;
  static constexpr int kQueryWords = kBlockRows / kFold;

  struct Scratch {
    float *q, *minus_r, *d_o;  // rows of words along head_dim
    float *k, *v;
    float *q_folded, *minus_r_folded, *d_o_folded, *k_folded;  // words along the rows
    float *qr, *d_o_panels;       // panels of kLanes and of kQueries queries
    float *a, *ds, *e;            // [kBlockKeys, kQueryWords], words along the queries
    float *ds_folded, *e_folded;  // [kBlockKeys / kFold, kBlockRows], words along the keys
    float *scores, *g;            // [2][kBlockKeys, kPanel] and [kBlockKeys, kQueries]

    explicit Scratch(float* at) {
      const auto take = [&at](int words) {
        float* begin = at;
        at += words;
        return begin;
      };
      const auto take_folded = [&](float* rows) {
        return kFold == 1 ? rows : take(kBlockRows / kFold * kStride);
      };
      q = take(kBlockRows * kStride);
      minus_r = take(kBlockRows * kStride);
      d_o = take(kBlockRows * kStride);
      k = take(kBlockKeys * kStride);
      v = take(kBlockKeys * kStride);
      q_folded = take_folded(q);
      minus_r_folded = take_folded(minus_r);
      d_o_folded = take_folded(d_o);
      k_folded = take_folded(k);
      qr = take(2 * kBlockRows * kStride);
      d_o_panels = take(kBlockRows * kStride);
      a = take(kBlockKeys * kQueryWords);
      ds = take(kBlockKeys * kQueryWords);
      e = take(kBlockKeys * kQueryWords);
      ds_folded = kFold == 1 ? ds : take(kBlockKeys / kFold * kBlockRows);
      e_folded = kFold == 1 ? e : take(kBlockKeys / kFold * kBlockRows);
      scores = take(2 * kBlockKeys * kPanel);
      g = take(kBlockKeys * kQueries);
    }
  };

  // Gbar and Gbar - Delta of one row, as lanes still to be summed.
  template <class E>
  PARALLAX_INLINE void reduce_row(E element, const BackwardBlock& block, int i, Vec* g_bar,
                                  Vec* g_bar_minus_delta) {
    alignas(64) float d_o[kStride], v_bar[kStride], o[kStride];
    read_row(element, block.d_o[i], block.head_dim, d_o);
    read_row(element, block.v_bar[i], block.head_dim, v_bar);
    read_row(element, block.o[i], block.head_dim, o);
    for (int d = 0; d < block.head_dim; d += kLanes) {
      *g_bar = fma(load(d_o + d), load(v_bar + d), *g_bar);
      *g_bar_minus_delta = fma(load(d_o + d), load(v_bar + d) - load(o + d), *g_bar_minus_delta);
    }
  }

  // Lane i of the result is the sum of rows[i].
  PARALLAX_INLINE Vec sum_rows(Vec (&rows)[kLanes]) {
    transpose(rows);
    Vec total = rows[0];
    for (int i = 1; i < kLanes; ++i) total = total + rows[i];
    return total;
  }

  // Row i as words. A row that sees no key is all zero. Of a row that sees one key, what Gbar and
  // G are made of is zero: then e = dS = 0 and dq = dr = 0, exactly.
  template <class E>
  PARALLAX_INLINE void read_query(E element, const BackwardBlock& block, int i, int num_keys,
                                  const Scratch& to, float* panel_rows, Vec* g_bar,
                                  Vec* g_bar_minus_delta) {
    const int at = i * kStride, words = block.head_dim / kFold;
    *g_bar = *g_bar_minus_delta = zero();
    if (num_keys < 2) clear_row(panel_rows + at, words);
    if (num_keys < 1) {
      clear_row(to.q + at, words);
      clear_row(to.minus_r + at, words);
      clear_row(to.d_o + at, words);
      return;
    }
    read_words<Words>(element, block.q[i], block.head_dim, to.q + at);
    read_words<Words>(element, block.r[i], block.head_dim, to.minus_r + at);
    read_words<Words>(element, block.d_o[i], block.head_dim, to.d_o + at);
    if (num_keys < 2) return;
    read_words<Words>(element, block.d_o[i], block.head_dim, panel_rows + at);
    reduce_row(element, block, i, g_bar, g_bar_minus_delta);
  }

  PARALLAX_INLINE void read_queries(const BackwardBlock& block, const std::int32_t* lo,
                                    const std::int32_t* hi, int num_rows, const Scratch& to,
                                    float* panel_rows, RowTerms* terms) {
    with_element(block.dtype, [&](auto element) {
      for (int first = 0; first < num_rows; first += kLanes) {
        Vec g_bar[kLanes], g_bar_minus_delta[kLanes];
        for (int lane = 0; lane < kLanes; ++lane) {
          const int i = first + lane, num_keys = hi[i] - lo[i];
          read_query(element, block, i, num_keys, to, panel_rows, &g_bar[lane],
                     &g_bar_minus_delta[lane]);
          terms->lse[i] = num_keys > 0 ? block.lse[i] * kLog2e : 0.0f;
          terms->u0[i] = num_keys > 0 ? 1.0f + block.t_bar[i] : 0.0f;
        }
        store(terms->g_bar + first, sum_rows(g_bar));
        store(terms->g_bar_minus_delta + first, sum_rows(g_bar_minus_delta));
      }
    });
  }

  PARALLAX_INLINE void pack(const BackwardBlock& block, const std::int32_t* lo,
                            const std::int32_t* hi, int num_rows, const Scratch& to,
                            RowTerms* terms) {
    const int words = block.head_dim / kFold;
    float* panel_rows = to.v;  // no tile is there yet
    read_queries(block, lo, hi, num_rows, to, panel_rows, terms);
    for (int i = 0; i < num_rows; i += kLanes) {
      float* panel = to.qr + i / kLanes * kPanelFloats;
      transpose_into_panel<kStride>(to.q + i * kStride, words, panel);
      transpose_into_panel<kStride>(to.minus_r + i * kStride, words, panel + kLanes);
      const int half = i / kLanes % 2 * kLanes;
      transpose_into_panel<kStride>(panel_rows + i * kStride, words,
                                    to.d_o_panels + i / kQueries * kPanelFloats + half);
    }
    // Until here the place of -r holds r.
    for (int i = 0; i < num_rows; ++i) {
      float* row = to.minus_r + i * kStride;
      for (int d = 0; d < words; d += kLanes) store(row + d, Words::negate(load(row + d)));
    }
    terms->finite = all_finite<kFold>(to.q, num_rows, kStride, words) &&
                    all_finite<kFold>(to.minus_r, num_rows, kStride, words) &&
                    all_finite<kFold>(to.d_o, num_rows, kStride, words);
    fold_rows<Words, kStride>(to.q, num_rows, block.head_dim, to.q_folded);
    fold_rows<Words, kStride>(to.minus_r, num_rows, block.head_dim, to.minus_r_folded);
    fold_rows<Words, kStride>(to.d_o, num_rows, block.head_dim, to.d_o_folded);
  }

  // to [key, kPanel] = rows [key, stride] panel, for keys [begin, end), begin a multiple of kMr.
  PARALLAX_INLINE void multiply_panel(const float* rows, const float* panel, int head_dim,
                                      int begin, int end, float* to) {
    for (int j = begin; j < end; j += kMr) {
      Vec acc[kMr][2];
      clear(acc);
      multiply<Words, kStride, 1, kPanel>(acc, rows + j * kStride, panel, head_dim / kFold);
      store_block(acc, to + j * kPanel, kPanel);
    }
  }

  // A, dS and e of kLanes queries from `first_query` on, for keys [begin, end) of the tile.
  template <bool kEdge>
  PARALLAX_INLINE void differentiate(const Scratch& at, const RowTerms& terms, float scale_of_s,
                                     int first_query, const std::int32_t* lo,
                                     const std::int32_t* hi, std::int64_t first_key, int begin,
                                     int end, const BackwardSums& sums) {
    const int i = first_query;
    const int half = i / kLanes % 2;
    const float* s = at.scores + half * kBlockKeys * kPanel + begin * kPanel;
    const float* g = at.g + begin * kQueries + half * kLanes;
    const Vec scale = broadcast(scale_of_s), log2_scale = broadcast(scale_of_s * kLog2e);
    const Vec minus_lse = zero() - load(terms.lse + i), u0 = load(terms.u0 + i),
              g_bar = load(terms.g_bar + i),
              g_bar_minus_delta = load(terms.g_bar_minus_delta + i) * scale;
    const IntVec low = load_int(lo + i), high = load_int(hi + i);
    Vec sum_ds = load(sums.sum_ds + i), sum_e = load(sums.sum_e + i);
    for (int j = begin; j < end; j += kFold) {
      Vec ds[kFold], e[kFold];
      for (int f = 0; f < kFold; ++f, s += kPanel, g += kQueries) {
        const Vec p = exp2(fma(load(s), log2_scale, minus_lse));
        const Vec u = u0 - load(s + kLanes);
        e[f] = p * (load(g) - g_bar);
        ds[f] = fma(u * scale, e[f], p * g_bar_minus_delta);
        Vec a = p * u;
        if constexpr (kEdge) {
          // Last, because a hidden pair may hold anything: its key's, or its query's.
          const Mask visible = within(low, high, static_cast<std::int32_t>(first_key + j + f));
          a = select(visible, a, zero());
          e[f] = select(visible, e[f], zero());
          ds[f] = select(visible, ds[f], zero());
        }
        const int to = (j + f) * kQueryWords + i / kFold;
        Words::store_steps(at.a + to, a);
        Words::store_steps(at.ds + to, ds[f]);
        Words::store_steps(at.e + to, e[f]);
        sum_ds = sum_ds + Words::round(ds[f]);
        sum_e = sum_e + Words::round(e[f]);
      }
      if constexpr (kFold > 1) {
        store(at.ds_folded + j / kFold * kBlockRows + i, Words::pack(ds));
        store(at.e_folded + j / kFold * kBlockRows + i, Words::pack(e));
      }
    }
    store(sums.sum_ds + i, sum_ds);
    store(sums.sum_e + i, sum_e);
  }

  PARALLAX_INLINE void clear_queries(const Scratch& at, int first_query, int begin, int end) {
    for (int j = begin; j < end; ++j) {
      const int to = j * kQueryWords + first_query / kFold;
      for (int i = 0; i < kQueries / kFold; i += kLanes) {
        store(at.a + to + i, zero());
        store(at.ds + to + i, zero());
        store(at.e + to + i, zero());
      }
    }
    if constexpr (kFold > 1) {
      for (int j = begin / kFold; j < end / kFold; ++j) {
        for (int i = first_query; i < first_query + kQueries; i += kLanes) {
          store(at.ds_folded + j * kBlockRows + i, zero());
          store(at.e_folded + j * kBlockRows + i, zero());
        }
      }
    }
  }

  // A, dS and e of kQueries queries over a whole tile, zeros where nothing is visible.
  PARALLAX_INLINE void differentiate_pair(const BackwardBlock& block, const Scratch& at,
                                          const RowTerms& terms, int first_query,
                                          const std::int32_t* lo, const std::int32_t* hi,
                                          std::int64_t first_key) {
    const TileRange range =
        tile_range<kFold>(lo + first_query, hi + first_query, kQueries, first_key);
    if (range.begin == range.end) {
      clear_queries(at, first_query, 0, kBlockKeys);
      return;
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
        differentiate<true>(at, terms, block.scale, i, lo, hi, first_key, range.begin, range.end,
                            block.sums);
      } else {
        differentiate<false>(at, terms, block.scale, i, lo, hi, first_key, range.begin, range.end,
                             block.sums);
      }
    }
    clear_queries(at, first_query, 0, range.begin);
    clear_queries(at, first_query, range.end, kBlockKeys);
  }

  template <int kNv>
  PARALLAX_INLINE void add_to_keys(const Scratch& at, int j, int d, int begin, int end, float* dk,
                                   float* dv) {
    const int x = j * kQueryWords + begin / kFold, y = begin / kFold * kStride + d;
    const int depth = (end - begin) / kFold;
    Vec acc[kMr][kNv];
    load_block(acc, dv + d, kStride);
    multiply<Words, kQueryWords, 1, kStride>(acc, at.a + x, at.d_o_folded + y, depth);
    store_block(acc, dv + d, kStride);
    load_block(acc, dk + d, kStride);
    multiply<Words, kQueryWords, 1, kStride>(acc, at.ds + x, at.q_folded + y, depth);
    multiply<Words, kQueryWords, 1, kStride>(acc, at.e + x, at.minus_r_folded + y, depth);
    store_block(acc, dk + d, kStride);
  }

  template <int kRows, int kNv>
  PARALLAX_INLINE void add_to_queries(const Scratch& at, int i, int d, int begin, int end,
                                      float* dq, float* dr) {
    const int x = begin / kFold * kBlockRows + i, y = begin / kFold * kStride + d;
    const int depth = (end - begin) / kFold;
    Vec acc[kRows][kNv];
    load_block(acc, dq + d, kStride);
    multiply<Words, 1, kBlockRows, kStride>(acc, at.ds_folded + x, at.k_folded + y, depth);
    store_block(acc, dq + d, kStride);
    load_block(acc, dr + d, kStride);
    multiply<Words, 1, kBlockRows, kStride>(acc, at.e_folded + x, at.k_folded + y, depth);
    store_block(acc, dr + d, kStride);
  }

  // The queries of [0, num_rows) that see some key of [begin, end), in whole words.
  PARALLAX_INLINE TileRange visible_queries(const std::int32_t* lo, const std::int32_t* hi,
                                            int num_rows, std::int64_t begin, std::int64_t end) {
    int first = 0, last = num_rows;
    while (first < last && !(lo[first] < hi[first] && hi[first] > begin && lo[first] < end))
      ++first;
    while (first < last &&
           !(lo[last - 1] < hi[last - 1] && hi[last - 1] > begin && lo[last - 1] < end)) {
      --last;
    }
    return {first / kFold * kFold, (last + kFold - 1) / kFold * kFold, false};
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
      keys[i / kMr] = tile_range<kFold>(lo + i, hi + i, kMr, first_key);
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
          add_to_queries<kMr, 2>(at, i, d, range.begin, range.end, dq, dr);
        } else {
          add_to_queries<kMr, 1>(at, i, d, range.begin, range.end, dq, dr);
        }
      }
    }
  }

  // Rows [0, n) of `from`, zero where the row does not see a key, folded. Through the place of the
  // K and V tiles.
  PARALLAX_INLINE float* seen_rows(const Scratch& at, const float* from, const std::int32_t* lo,
                                   const std::int32_t* hi, int n, std::int64_t key, int head_dim) {
    for (int i = 0; i < n; ++i) {
      float* row = at.v + i * kStride;
      if (lo[i] <= key && key < hi[i]) {
        std::memcpy(row, from + i * kStride, head_dim / kFold * sizeof(float));
      } else {
        clear_row(row, head_dim / kFold);
      }
    }
    return fold_rows<Words, kStride>(at.v, n, head_dim, at.k);
  }

  // multiply_tile where some key, or some query's q, r or dO, is not finite: 0 * NaN is NaN, so
  // each query meets a tile of the keys that it sees, and each key the queries that see it. The K
  // and V tiles are written over.
  PARALLAX_INLINE void multiply_tile_apart(const BackwardBlock& block, const Scratch& at,
                                           const std::int32_t* lo, const std::int32_t* hi,
                                           int num_rows, std::int64_t tile) {
    const int head_dim = block.head_dim;
    const std::int64_t first_key = tile * kBlockKeys;
    for (int i = 0; i < block.rows; ++i) {
      const TileRange range = tile_range<kFold>(lo + i, hi + i, 1, first_key);
      if (range.begin >= range.end) continue;
      read_tile<Words, kStride>(block.dtype, block.k, head_dim, first_key, lo[i], hi[i], at.k);
      fold_rows<Words, kStride>(at.k, kBlockKeys, head_dim, at.k_folded);
      for (int d = 0; d < head_dim; d += kLanes) {
        add_to_queries<1, 1>(at, i, d, range.begin, range.end, block.sums.dq + i * kStride,
                             block.sums.dr + i * kStride);
      }
    }
    for (int j = 0; j < kBlockKeys; ++j) {
      const std::int64_t key = first_key + j;
      const TileRange range = visible_queries(lo, hi, num_rows, key, key + 1);
      if (range.begin >= range.end) continue;
      const auto add = [&](const float* weights, const float* rows, float* sum) {
        const float* a = weights + j * kQueryWords + range.begin / kFold;
        const float* b =
            seen_rows(at, rows, lo, hi, num_rows, key, head_dim) + range.begin / kFold * kStride;
        for (int d = 0; d < head_dim; d += kLanes) {
          Vec acc[1][1];
          load_block(acc, sum + d, kStride);
          multiply<Words, kQueryWords, 1, kStride>(acc, a, b + d,
                                                   (range.end - range.begin) / kFold);
          store_block(acc, sum + d, kStride);
        }
      };
      add(at.a, at.d_o, block.dv + key * kStride);
      add(at.ds, at.q, block.dk + key * kStride);
      add(at.e, at.minus_r, block.dk + key * kStride);
    }
  }

  // The mean of keys [begin, end), where they are finite: not every row sees all of them.
  PARALLAX_INLINE void mean_key(const BackwardBlock& block, std::int64_t begin, std::int64_t end,
                                float* mean) {
    alignas(64) float row[kStride];
    clear_row(mean, block.head_dim);
    if (begin >= end) return;
    const Vec share = broadcast(1.0f / static_cast<float>(end - begin));
    with_element(block.dtype, [&](auto element) {
      for (std::int64_t j = begin; j < end; ++j) {
        read_row(element, block.k.row(j), block.head_dim, row);
        for (int d = 0; d < block.head_dim; d += kLanes) {
          const Vec x = load(row + d);
          const Mask finite = equal(x * zero(), zero());
          store(mean + d, fma(select(finite, x, zero()), share, load(mean + d)));
        }
      }
    });
  }

  // dq = sum dS k - (sum dS) k0, dr = -(sum e k - (sum e) k0).
  PARALLAX_INLINE void finish(const BackwardBlock& block, const float* k0) {
    with_element(block.dtype, [&](auto element) {
      for (int i = 0; i < block.rows; ++i) {
        float *dq = block.sums.dq + i * kStride, *dr = block.sums.dr + i * kStride;
        const Vec sum_ds = broadcast(block.sums.sum_ds[i]), sum_e = broadcast(block.sums.sum_e[i]);
        for (int d = 0; d < block.head_dim; d += kLanes) {
          store(dq + d, load(dq + d) - sum_ds * load(k0 + d));
          store(dr + d, sum_e * load(k0 + d) - load(dr + d));
        }
        write_row(element, dq, block.head_dim, block.dq[i]);
        write_row(element, dr, block.head_dim, block.dr[i]);
      }
    });
  }

  PARALLAX_INLINE bool all_see(const std::int32_t* lo, const std::int32_t* hi, int rows,
                               std::int64_t begin, std::int64_t end) {
    bool all = true;
    for (int i = 0; i < rows; ++i) all &= lo[i] <= begin && end <= hi[i];
    return all;
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
    pack(block, lo, hi, num_rows, at, &terms);
    if (block.first) clear_sums(block.sums);
    for (std::int64_t tile = block.tile_end - 1; tile >= block.tile_begin; --tile) {
      const std::int64_t key = tile * kBlockKeys;
      if (key >= last || key + kBlockKeys <= first) continue;
      read_tile<Words, kStride>(block.dtype, block.k, block.head_dim, key, first, last, at.k);
      read_tile<Words, kStride>(block.dtype, block.v, block.head_dim, key, first, last, at.v);
      fold_rows<Words, kStride>(at.k, kBlockKeys, block.head_dim, at.k_folded);
      for (int i = 0; i < num_rows; i += kQueries) {
        differentiate_pair(block, at, terms, i, lo, hi, key);
      }
      const bool whole = all_see(lo, hi, block.rows, key, key + kBlockKeys);
      if (whole ||
          (terms.finite && all_finite<kFold>(at.k, kBlockKeys, kStride, block.head_dim / kFold))) {
        multiply_tile(block, at, lo, hi, num_rows, tile);
      } else {
        multiply_tile_apart(block, at, lo, hi, num_rows, tile);
      }
    }
    if (block.last) {
      alignas(64) float k0[kStride];
      const std::int64_t tile_end = (first / kBlockKeys + 1) * kBlockKeys;
      mean_key(block, first, last < tile_end ? last : tile_end, k0);
      finish(block, k0);
    }
  }
};

template <class Words>
static void backward_block(const BackwardBlock& block, float* scratch) {
  switch (row_stride(block.head_dim)) {
    case row_stride(32):
      return Backward<Words, row_stride(32)>::run(block, scratch);
    case row_stride(64):
      return Backward<Words, row_stride(64)>::run(block, scratch);
    case row_stride(128):
      return Backward<Words, row_stride(128)>::run(block, scratch);
    default:
      return Backward<Words, row_stride(256)>::run(block, scratch);
  }
}

}  // namespace parallax::cpu::PARALLAX_TARGET
