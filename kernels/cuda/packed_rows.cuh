// SPDX-License-Identifier: MIT
// Packed virtual rows in registers: what a thread does with the logits, probes and sums of a query
// whose q is row g and whose r is row g + 8 of a 16-row slab (docs/kernels.md). Of a key tile the
// thread holds, for every 8 keys, two logits s[4 i], s[4 i + 1] and the two probes of the same
// keys, s[4 i + 2], s[4 i + 3]; o holds o1 and o2 in the same way. Four neighbouring lanes share a
// query.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cuda/element.h"
#include "cuda/ptx.cuh"
#include "cuda/quad.cuh"
#include "cuda/schedule.h"
#include "parallax/state.h"

namespace parallax {

// A query's state. m is in units of log2, relative to scaled logits; d1 and d2 are this thread's
// parts of the sums; c is the row's centre of t.
template <class T, int kKeys>
struct PackedRow {
  // How far (in powers of two) a row may outgrow its m before o is rescaled. p then reaches 2^8;
  // in fp16 2^3, so that w = p (t - c) has room for probes of 8000.
  static constexpr float kSlack = std::is_same_v<T, bf16> ? 8.0f : 3.0f;
  // How much the p of a thread's keys may sum to in weigh(): nothing overflows below it, w in fp16
  // with probes of 1000.
  static constexpr float kRoom = std::is_same_v<T, bf16> ? 0x1p40f : 64.0f;
  static constexpr int kWidth = kKeys / 4;  // keys of a tile that a thread holds
  using Scores = float[kKeys / 2];

  float m = -INFINITY;
  float d1 = 0.0f;
  float d2 = 0.0f;
  float c = 0.0f;

  // What the sums over earlier tiles need: o *= factor, then o2 -= shift o1.
  struct Change {
    float factor;
    float shift;
  };

  // Of a tile that every row of the warp sees whole, once m and c are set: raise(), exponentiate(),
  // weigh_probes(), in this order. m is raised lazily: by the warp, if some row has outgrown it by
  // kSlack. Returns whether o must be scaled by *factor.
  __device__ __forceinline__ bool raise(const Scores& s, float scale_log2, float* factor) {
    const float top = tile_max(s, scale_log2);
    const bool grown = __any_sync(0xffffffffu, top > m + kSlack);
    if (grown) *factor = raise_to(top);
    return grown;
  }

  // Makes m at least `top`; returns what o must be scaled by.
  __device__ __forceinline__ float raise_to(float top) {
    const float raised = fmaxf(m, top);
    const float factor = ptx::exp2(m - raised);
    m = raised;
    d1 *= factor;
    d2 *= factor;
    return factor;
  }

  // Of a tile that every row of the warp sees whole, once m and c are set: s becomes p, t becomes
  // w, by whatever m is; returns this thread's parts of their sums. If fits() says so, add() them;
  // if not, m was too small, and the tile must be weighed again from its logits and probes, raised
  // to their maximum.
  struct Sums {
    float p;
    float w;
  };
  __device__ __forceinline__ Sums weigh(Scores& s, float scale_log2) const {
    const float p = exponentials(s, scale_log2, m);
    return {p, weighted_probes(s)};
  }
  static __device__ __forceinline__ bool fits(const Sums& sums) {
    return __all_sync(0xffffffffu, sums.p <= kRoom);
  }
  __device__ __forceinline__ void add(const Sums& sums) {
    d1 += sums.p;
    d2 += sums.w;
  }

  // s becomes p; d1.
  __device__ __forceinline__ void exponentiate(Scores& s, float scale_log2) {
    d1 += exponentials(s, scale_log2, m);
  }

  // t becomes w = p (t - c); d2.
  __device__ __forceinline__ void weigh_probes(Scores& s) { d2 += weighted_probes(s); }

  // All of it, of any tile: hides what the row does not see (visible counts from the tile's first
  // key), and moves the centre of a row that has met few keys to their mean.
  __device__ __forceinline__ Change add_edge(Scores& s, float scale_log2, Range visible) {
    scale_and_hide(s, scale_log2, visible);
    const float top = tile_max(s, 1.0f);
    const float raised = fmaxf(m, top);
    Change change;
    change.factor = m == -INFINITY ? 1.0f : ptx::exp2(m - raised);
    m = raised;
    d1 *= change.factor;
    d2 *= change.factor;
    const float sum = exponentials(s, 1.0f, m == -INFINITY ? 0.0f : m);
    float even = 0.0f;
    float odd = 0.0f;
#pragma unroll
    for (int i = 0; i < kKeys / 8; ++i) {
      even = fmaf(s[4 * i], s[4 * i + 2], even);
      odd = fmaf(s[4 * i + 1], s[4 * i + 3], odd);
    }
    const float total = quad_sum(d1 + sum);
    const float offset = quad_sum(d2 + (even + odd) - c * sum);
    const bool settled = visible.end - kKeys >= kSettledKeys;
    change.shift = settled || total == 0.0f ? 0.0f : __fdividef(offset, total);
    c += change.shift;
    d2 -= change.shift * d1;
    d1 += sum;
    weigh_probes(s);
    return change;
  }

  // A row's first tile: m, d1, d2 and c follow from it alone. Blocks of keys that no row of the
  // warp sees cost nothing, those that every row sees whole are not compared.
  __device__ __forceinline__ void add_first(Scores& s, float scale_log2, Range visible) {
    constexpr int kBlock = kKeys % 32 == 0 ? 32 : 16;
    const int reach = __shfl_sync(0xffffffffu, visible.end, 31);
    const int whole_end = __shfl_sync(0xffffffffu, visible.end, 0);
    const int whole_begin = __shfl_sync(0xffffffffu, visible.begin, 31);
    const int column = 2 * (ptx::thread_index() & 3);
    const Range own = {visible.begin - column, visible.end - column};
    float top[4] = {-INFINITY, -INFINITY, -INFINITY, -INFINITY};
#pragma unroll
    for (int block = 0; block < kKeys; block += kBlock) {
      if (block >= reach) continue;
#pragma unroll
      for (int i = block / 2; i < (block + kBlock) / 2; i += 4) {
        s[i] *= scale_log2;
        s[i + 1] *= scale_log2;
      }
      if (block < whole_begin || block + kBlock > whole_end) {
#pragma unroll
        for (int n = block; n < block + kBlock; n += 8) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const bool seen = n + e >= own.begin && n + e < own.end;
            s[n / 2 + e] = seen ? s[n / 2 + e] : -INFINITY;
            s[n / 2 + 2 + e] = seen ? s[n / 2 + 2 + e] : 0.0f;
          }
        }
      }
#pragma unroll
      for (int i = block / 2; i < (block + kBlock) / 2; i += 4) {
        float* part = &top[i / 2 & 2];
        part[0] = fmaxf(part[0], s[i]);
        part[1] = fmaxf(part[1], s[i + 1]);
      }
    }
    m = quad_max(fmaxf(fmaxf(top[0], top[1]), fmaxf(top[2], top[3])));
    const float shift = m == -INFINITY ? 0.0f : m;
    float sum[2] = {0.0f, 0.0f};
    float probes[2] = {0.0f, 0.0f};
#pragma unroll
    for (int block = 0; block < kKeys; block += kBlock) {
#pragma unroll
      for (int i = block / 2; i < (block + kBlock) / 2; i += 4) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          if (block < reach) {
            s[i + e] = ptx::exp2(s[i + e] - shift);
            sum[e] += s[i + e];
            probes[e] = fmaf(s[i + e], s[i + 2 + e], probes[e]);
          } else {
            s[i + e] = s[i + 2 + e] = 0.0f;
          }
        }
      }
    }
    d1 = sum[0] + sum[1];
    const float total = quad_sum(d1);
    const float offset = quad_sum(probes[0] + probes[1]);
    c = total == 0.0f ? 0.0f : __fdividef(offset, total);
    float weighted[2] = {0.0f, 0.0f};
#pragma unroll
    for (int block = 0; block < kKeys; block += kBlock) {
      if (block >= reach) continue;
#pragma unroll
      for (int i = block / 2; i < (block + kBlock) / 2; i += 4) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          s[i + 2 + e] = s[i + e] * (s[i + 2 + e] - c);
          weighted[e] += s[i + 2 + e];
        }
      }
    }
    d2 = weighted[0] + weighted[1];
  }

  __device__ __forceinline__ Finalized<float> finish() const {
    RowState<float> row;
    row.m = m * 0.6931471805599453f;
    row.d1 = quad_sum(d1);
    row.d2 = quad_sum(d2);
    return finalize(row, c);
  }

  // The row's largest scaled logit, in units of log2.
  static __device__ __forceinline__ float tile_max(const Scores& s, float scale_log2) {
    float even = -INFINITY;
    float odd = -INFINITY;
#pragma unroll
    for (int i = 0; i < kKeys / 8; ++i) {
      even = fmaxf(even, s[4 * i] * scale_log2);
      odd = fmaxf(odd, s[4 * i + 1] * scale_log2);
    }
    return quad_max(fmaxf(even, odd));
  }

 private:
  // t becomes w; returns this thread's part of their sum.
  __device__ __forceinline__ float weighted_probes(Scores& s) const {
    float even = 0.0f;
    float odd = 0.0f;
#pragma unroll
    for (int i = 0; i < kKeys / 8; ++i) {
      s[4 * i + 2] = s[4 * i] * (s[4 * i + 2] - c);
      s[4 * i + 3] = s[4 * i + 1] * (s[4 * i + 3] - c);
      even += s[4 * i + 2];
      odd += s[4 * i + 3];
    }
    return even + odd;
  }

  static __device__ __forceinline__ void scale_and_hide(Scores& s, float scale_log2,
                                                        Range visible) {
    using Word = std::conditional_t<(kWidth > 32), std::uint64_t, std::uint32_t>;
    const Word mask =
        visible_columns<Word>(visible.begin, visible.end, ptx::thread_index() & 3, kWidth);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      float& logit = s[4 * (i >> 1) + (i & 1)];
      float& probe = s[4 * (i >> 1) + (i & 1) + 2];
      const bool seen = (mask >> i) & 1;
      logit = seen ? logit * scale_log2 : -INFINITY;
      probe = seen ? probe : 0.0f;
    }
  }

  // p from the logits; returns this thread's part of their sum.
  static __device__ __forceinline__ float exponentials(Scores& s, float scale_log2, float shift) {
    float even = 0.0f;
    float odd = 0.0f;
#pragma unroll
    for (int i = 0; i < kKeys / 8; ++i) {
      s[4 * i] = ptx::exp2(fmaf(s[4 * i], scale_log2, -shift));
      s[4 * i + 1] = ptx::exp2(fmaf(s[4 * i + 1], scale_log2, -shift));
      even += s[4 * i];
      odd += s[4 * i + 1];
    }
    return even + odd;
  }
};

template <int kCount>
__device__ __forceinline__ void scale_sums(float (&o)[kCount], float factor) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) o[i] *= factor;
}

// o2 of a centre that is `shift` higher.
template <int kCount>
__device__ __forceinline__ void shift_sums(float (&o)[kCount], float shift) {
#pragma unroll
  for (int i = 0; i < kCount; i += 4) {
    o[i + 2] = fmaf(-shift, o[i], o[i + 2]);
    o[i + 3] = fmaf(-shift, o[i + 1], o[i + 3]);
  }
}

// Writes element(o1, o2) of every column below head_dim, if the row is `valid`.
template <class T, int kCount, class Element>
__device__ __forceinline__ void store_row(const float (&o)[kCount], T* row, bool valid,
                                          int head_dim, const Element& element) {
  const int quad_lane = ptx::thread_index() & 3;
#pragma unroll
  for (int k = 0; k < kCount / 16; ++k) {
    std::uint32_t words[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int at = 4 * (4 * k + i);
      words[i] = ptx::pack<T>(element(o[at], o[at + 2]), element(o[at + 1], o[at + 3]));
    }
    const uint4 block = transpose_quad(words);
    const int column = 8 * (4 * k + quad_lane);
    if (valid && column < head_dim) *reinterpret_cast<uint4*>(row + column) = block;
  }
}

}  // namespace parallax
