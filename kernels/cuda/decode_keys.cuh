// SPDX-License-Identifier: MIT
// The decode, first half: a warp streams its keys and gathers the states of its rows.
//
// In a 16-row tensor-core tile, row g is a query's q and row g + 8 its r (g < 8), so that one
// product with K^T leaves a query's logits s and probes t in the same thread; p = exp(s - m) and
// w = p (t - c) are made in place, are the operand of the product with V, and its sums hold o1 in
// row g and o2 in row g + 8.
//
// Rows of K and V are copied one by one, at an address of their own: contiguous and paged caches
// are the same to this kernel, and what no query sees is never read but zero.
#pragma once

#include <cassert>
#include <type_traits>

#include "cuda/decode_state.cuh"
#include "cuda/early_launch.cuh"
#include "cuda/mma.cuh"
#include "cuda/wgmma.cuh"

namespace parallax {

template <class T, class Cache, int kHeadDim, int kRowTiles, bool kPortable>
struct DecodeKeys {
  using Shared = DecodeShared<T, Cache, kHeadDim, kRowTiles, kPortable>;
  static constexpr bool kIsFp8 = Shared::kIsFp8;
  // What the tensor cores multiply: fp16 holds every e4m3 number.
  using Operand = std::conditional_t<kIsFp8, fp16, T>;
  static constexpr bool kIsWarpgroup = Shared::kIsWarpgroup;
  static constexpr int kTiles = Shared::kTiles;
  static constexpr int kKeys = decode_slice_keys(sizeof(Cache));  // that a warp copies at a time
  static constexpr int kStepKeys = kIsWarpgroup ? Shared::kSliceKeys : 16;  // of a product
  static constexpr int kRowBytes = Shared::kRowBytes;
  // Rows of a warpgroup's operands lie in panels of 64 columns.
  static constexpr int kPitch = kIsWarpgroup ? 128 : kRowBytes;  // from row to row
  static constexpr int kPanelBytes = Shared::kSliceKeys * 128;
  static constexpr int kStages = Shared::kStages;
  static constexpr int kChunks = kRowBytes / 16;        // of a row, one a copy
  static constexpr int kRowsPerCopy = 32 / kChunks;     // by one instruction of the warp
  static constexpr int kCopies = kKeys / kRowsPerCopy;  // instructions for K, and for V
  static constexpr int kUnroll = kTiles * kHeadDim <= 128 ? kCopies : 1;  // registers
  // How far (in powers of two) a row may outgrow its m before o is rescaled, as in the forward.
  static constexpr float kSlack = std::is_same_v<Operand, bf16> ? 8.0f : 3.0f;

  const DecodeParams& params;
  Shared& shared;
  int warp;
  int lane;
  int member;  // which of the team's row tiles are this warp's
  int way;     // which keys are the team's

  std::uint32_t a[kTiles][kIsWarpgroup ? 1 : kHeadDim / 16][4];  // q and r
  float o[kTiles][kHeadDim / 2];                                 // o1 and o2
  DecodeRow row[kTiles];
  float k_scale;  // of an FP8 cache
  int next_page;

  __device__ __forceinline__ void sync_team() const {
    if (params.team == 1) {
      __syncwarp();
    } else {
      ptx::named_sync(1 + way, 32 * params.team);
    }
  }

  // -- copies

  // Chunk `chunk` of row `row` of a slice lies at chunk ^ swizzle(row): eight rows' chunks of one
  // place lie in different banks. Rows may be split into sums of different powers of two.
  static __device__ __forceinline__ constexpr int swizzle(int row) {
    constexpr int kRowsPerLine = kRowBytes < 128 ? 128 / kRowBytes : 1;  // of all banks
    return row / kRowsPerLine & (kChunks < 8 ? kChunks - 1 : 7);
  }

  // Where that is, from the slice's (or the rows') beginning.
  static __device__ __forceinline__ int place_of_chunk(int row, int chunk) {
    const int panel = kIsWarpgroup ? chunk / 8 : 0;
    return panel * kPanelBytes + row * kPitch + (((chunk - 8 * panel) ^ swizzle(row)) << 4);
  }

  __device__ __forceinline__ std::uint32_t slice_address(int stage) const {
    return ptx::shared_address(shared.ring[(warp - member) / Shared::kLeastTeam]) +
           stage * (2 * Shared::kSliceBytes);
  }

  // The page of key `first + lane % 16` (contiguous caches: the sequence), negative where the key
  // is not to be read.
  __device__ __forceinline__ int page_of(const DecodeItem& item, int first) const {
    const int key = first + lane % kKeys;
    if (key < item.keys.begin || key >= item.keys.end) return -1;
    if (params.page_table == nullptr) return item.sequence;
    const int page =
        __ldg(params.page_table + item.sequence * params.max_pages + (key >> params.page_shift));
    const bool exists = page >= 0 && page < params.num_pages;
    assert(exists && "page_table: an entry of a visible token is no page");
    return exists ? page : -1;
  }

  // Lanes find the rows of one key each and pass on where they are; 16 bytes of a row a copy.
  __device__ __forceinline__ void load_slice(const DecodeItem& item, int stage, int key,
                                             int next_key) {
    const std::int64_t page = next_page;
    next_page = page_of(item, next_key);
    const bool is_seen = page >= 0;
    const std::int64_t slot = (key + lane % kKeys) & params.page_mask;
    const std::int64_t k_row =
        is_seen ? page * params.k.batch_stride + slot * params.k.len_stride : 0;
    const std::int64_t v_row =
        is_seen ? page * params.v.batch_stride + slot * params.v.len_stride : 0;
    constexpr int kElements = 16 / sizeof(Cache);  // of a copy
    const int chunk = lane % kChunks;
    const int lane_row = lane / kChunks;
    const int head_dim = static_cast<int>(params.problem.head_dim);
    const int left = head_dim - chunk * kElements;
    // Where there is nothing to copy, an address is needed all the same.
    const int column = left > 0 ? chunk * kElements : 0;
    unsigned seen = __ballot_sync(0xffffffffu, is_seen) >> lane_row;
    if (left <= 0) seen = 0;
    const auto* k =
        static_cast<const Cache*>(params.k.data) + item.kv_head * params.k.head_stride + column;
    const auto* v =
        static_cast<const Cache*>(params.v.data) + item.kv_head * params.v.head_stride + column;
    const int first_row = kIsWarpgroup ? kKeys * warp : 0;  // of the slice's that are the warp's
    const std::uint32_t base =
        slice_address(stage) + first_row * kPitch + place_of_chunk(lane_row, chunk);
#pragma unroll kUnroll
    for (int i = 0; i < kCopies; ++i) {
      const int first = i * kRowsPerCopy;
      const std::int64_t k_offset = __shfl_sync(0xffffffffu, k_row, first + lane_row);
      const std::int64_t v_offset = __shfl_sync(0xffffffffu, v_row, first + lane_row);
      if (!kIsWarpgroup && (i & (params.team - 1)) != member) continue;
      const bool there = (seen >> first) & 1;
      const std::uint32_t to = (base + first * kPitch) ^ (swizzle(first) << 4);
      if (kIsFp8 && head_dim % kElements != 0) {
        const int bytes = there ? min(left, kElements) * static_cast<int>(sizeof(Cache)) : 0;
        mma::copy_async(to, k + k_offset, bytes);
        mma::copy_async(to + Shared::kSliceBytes, v + v_offset, bytes);
      } else {
        mma::copy_if(to, k + k_offset, there);
        mma::copy_if(to + Shared::kSliceBytes, v + v_offset, there);
      }
    }
  }

  // -- rows

  __device__ __forceinline__ int row_of(int tile) const {
    return (member * kTiles + tile) * 8 + lane / 4;
  }

  // NaN stays NaN.
  static __device__ __forceinline__ float bounded(float x) {
    constexpr float kLargest = 65504.0f;
    return x > kLargest ? kLargest : x < -kLargest ? -kLargest : x;
  }

  // A word of q or r as an operand.
  static __device__ __forceinline__ std::uint32_t operand(std::uint32_t word) {
    if constexpr (std::is_same_v<Operand, T>) {
      return word;
    } else {
      const float2 x = ptx::unpack<T>(word);
      return ptx::pack<Operand>(bounded(x.x), bounded(x.y));
    }
  }

  // q (place 0) or r (place 1) of this thread's row of a tile; null: zeros. The k-th 16 columns of
  // a product are any 16 of head_dim, as long as both operands agree: an FP8 cache's fragments hold
  // four neighbours where 16-bit ones hold two and two.
  __device__ __forceinline__ void load_row(const T* from, bool exists, int tile, int place) {
    constexpr int kNeighbours = kIsFp8 ? 4 : 2;
    const int head_dim = static_cast<int>(params.problem.head_dim);
    if constexpr (kIsWarpgroup) {
#pragma unroll
      for (int i = 0; i < kChunks / 4; ++i) {
        const int chunk = 4 * i + lane % 4;
        const bool there = exists && 8 * chunk < head_dim;
        const auto* at = reinterpret_cast<const uint4*>(from) + chunk;
        *reinterpret_cast<uint4*>(shared.rows +
                                  place_of_chunk(16 * warp + 8 * place + lane / 4, chunk)) =
            there ? __ldg(at) : make_uint4(0, 0, 0, 0);
      }
      return;
    }
    from += kNeighbours * (lane % 4);
#pragma unroll
    for (int i = 0; i < kHeadDim / (4 * kNeighbours); ++i) {
      const bool there = exists && kNeighbours * (4 * i + lane % 4) < head_dim;
      const T* at = from + 4 * kNeighbours * i;
      if constexpr (kIsFp8) {
        const uint2 words = there ? __ldg(reinterpret_cast<const uint2*>(at)) : make_uint2(0, 0);
        a[tile][i][place] = operand(words.x);
        a[tile][i][2 + place] = operand(words.y);
      } else {
        a[tile][i / 2][2 * (i % 2) + place] =
            there ? __ldg(reinterpret_cast<const unsigned*>(at)) : 0u;
      }
    }
  }

  __device__ __forceinline__ void load_rows(const DecodeItem& item) {
    if (params.settled) wait_for_last_kernel();
    if constexpr (kIsFp8) k_scale = __ldg(params.k_scale + item.kv_head);
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      const bool exists = row_of(tile) < item.rows;
      const int index = item.first_row + (exists ? row_of(tile) : 0);
      const DecodePlace place = place_of(params, index);
      const std::int64_t token = place.token;
      const std::int64_t head = item.kv_head * params.group + place.of_group;
      const auto row_in = [&](const ConstView& view) {
        return static_cast<const T*>(view.data) + item.sequence * view.batch_stride +
               token * view.len_stride + head * view.head_stride;
      };
      const T* q = row_in(params.q);
      const T* r = row_in(params.r);
      load_row(q, exists, tile, 0);
      load_row(r, exists, tile, 1);
      if (lane % 4 == 0) {
        shared.seen[warp][8 * tile + lane / 4] = exists ? item.mask.keys(place.token) : Range{0, 0};
      }
    }
  }

  // No keys yet. q and r come later (load_rows): that the last item's are not needed until then is
  // said here, or they would take registers all the way from there.
  __device__ __forceinline__ void clear_rows() {
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      row[tile] = DecodeRow{};
#pragma unroll
      for (float& x : o[tile]) x = 0.0f;
#pragma unroll
      for (auto& words : a[tile]) {
#pragma unroll
        for (std::uint32_t& word : words) asm volatile("" : "=r"(word));
      }
    }
    if constexpr (kIsFp8) asm volatile("" : "=f"(k_scale));
  }

  // -- one step: 16 keys of a warp, or a warpgroup's whole slice

  // Of keys 8 n + 2 t + e of the step the logits are in s[4 n + e], the probes in s[4 n + 2 + e],
  // and so are p and w, then, two a word.
  using Scores = float[kStepKeys / 2];
  using Weights = std::uint32_t[kStepKeys / 4];

  // A warpgroup's products with K and with V of a stage.
  __device__ __forceinline__ void multiply_keys_together(int stage, Scores& s) {
    const std::uint32_t rows = wgmma::descriptor(ptx::shared_address(shared.rows));
    const std::uint32_t keys = wgmma::descriptor(slice_address(stage));
    wgmma::forget(s);
    wgmma::fence();
#pragma unroll
    for (int k = 0; k < kHeadDim / 16; ++k) {
      const int step = ((k >> 2) * kPanelBytes + (k & 3) * 32) >> 4;
      wgmma::Products<T, kStepKeys>::shared_a(s, rows + step, keys + step, k != 0);
    }
    wgmma::commit();
    wgmma::wait<0>();
    wgmma::settle(s);
  }
  __device__ __forceinline__ void multiply_values_together(int stage, const Weights& p) {
    const std::uint32_t values =
        wgmma::descriptor(slice_address(stage) + Shared::kSliceBytes, kPanelBytes);
    wgmma::fence();
#pragma unroll
    for (int k = 0; k < kStepKeys / 16; ++k) {
      wgmma::Products<T, kHeadDim>::template register_a<1>(
          o[0], p[4 * k], p[4 * k + 1], p[4 * k + 2], p[4 * k + 3], values + k * 128, true);
    }
    wgmma::commit();
    wgmma::wait<0>();
    wgmma::settle(o[0]);
  }

  // `rows`: where the step's K rows begin.
  __device__ __forceinline__ void multiply_keys(std::uint32_t rows, Scores (&s)[kTiles]) {
    const int r = lane % 8;
    const std::uint32_t base =
        rows + ((lane >> 4) * 8 + r) * kRowBytes + (((lane >> 3 & 1) ^ swizzle(r)) << 4);
#pragma unroll
    for (int k = 0; k < kChunks / 2; ++k) {
      std::uint32_t b[4];
      ptx::load_matrices(b, base ^ (k << 5));
      if constexpr (kIsFp8) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const uint2 low = mma::widen(b[j]);
          const uint2 high = mma::widen(b[2 + j]);
#pragma unroll
          for (int tile = 0; tile < kTiles; ++tile) {
            mma::multiply<Operand>(s[tile], a[tile][2 * k + j], low.x, low.y);
            mma::multiply<Operand>(s[tile] + 4, a[tile][2 * k + j], high.x, high.y);
          }
        }
      } else {
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
          mma::multiply<Operand>(s[tile], a[tile][k], b[0], b[1]);
          mma::multiply<Operand>(s[tile] + 4, a[tile][k], b[2], b[3]);
        }
      }
    }
  }

  // `rows`: where the step's V rows begin. Of an FP8 cache a transposed word holds two neighbouring
  // columns of two keys; o[2 i] then has the even columns of the i-th 16, o[2 i + 1] the odd ones.
  __device__ __forceinline__ void multiply_values(std::uint32_t rows, const Weights (&p)[kTiles]) {
    const int r = lane % 8;
    const std::uint32_t base =
        rows + ((lane >> 3 & 1) * 8 + r) * kRowBytes + (((lane >> 4) ^ swizzle(r)) << 4);
#pragma unroll
    for (int n = 0; n < kChunks / 2; ++n) {
      std::uint32_t b[4];
      ptx::load_matrices_transposed(b, base ^ (n << 5));
      if constexpr (kIsFp8) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const uint2 low = mma::widen(__byte_perm(b[2 * j], 0, 0x3120));
          const uint2 high = mma::widen(__byte_perm(b[2 * j + 1], 0, 0x3120));
#pragma unroll
          for (int tile = 0; tile < kTiles; ++tile) {
            mma::multiply<Operand>(&o[tile][16 * n + 8 * j], p[tile], low.x, high.x);
            mma::multiply<Operand>(&o[tile][16 * n + 8 * j + 4], p[tile], low.y, high.y);
          }
        }
      } else {
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
          mma::multiply<Operand>(&o[tile][8 * n], p[tile], b[0], b[1]);
          mma::multiply<Operand>(&o[tile][8 * n + 4], p[tile], b[2], b[3]);
        }
      }
    }
  }

  // Raises m of the rows that outgrew it; sets the centre of a row that meets its first keys to
  // their mean. `top` is the thread's largest logit of the row.
  __device__ __forceinline__ void raise(int tile, float top, const Scores& s) {
    DecodeRow& state = row[tile];
    const float raised = fmaxf(state.m, quad_max(top));
    if (__any_sync(0xffffffffu, state.m == kNoMaximum)) {
      float sum = 0.0f;
      float count = 0.0f;
#pragma unroll
      for (int i = 0; i < kStepKeys / 4; ++i) {
        const int at = 4 * (i / 2) + i % 2;
        const bool is_seen = s[at] > kNoMaximum;
        sum += is_seen ? s[at + 2] : 0.0f;
        count += is_seen ? 1.0f : 0.0f;
      }
      sum = quad_sum(sum);
      count = quad_sum(count);
      // Of one key, exactly its t.
      if (state.m == kNoMaximum) state.c = count > 1.0f ? __fdividef(sum, count) : sum;
    }
    const float factor = ptx::exp2(state.m - raised);
    state.m = raised;
    state.d1 *= factor;
    state.d2 *= factor;
#pragma unroll
    for (int i = 0; i < kHeadDim / 2; ++i) o[tile][i] *= factor;
  }

  // Logits and probes of the keys outside of `seen`.
  __device__ __forceinline__ void hide(const Range& seen, int key, Scores& s) const {
    const Range range = seen;
#pragma unroll
    for (int i = 0; i < kStepKeys / 4; ++i) {
      const int at = key + 8 * (i / 2) + 2 * (lane % 4) + i % 2;
      const bool is_seen = at >= range.begin && at < range.end;
      float* x = s + 4 * (i / 2) + i % 2;
      x[0] = is_seen ? x[0] : -INFINITY;
      x[2] = is_seen ? x[2] : 0.0f;
    }
  }

  // From logits and probes of the keys from `key` on to weights.
  __device__ __forceinline__ void weigh(const DecodeItem& item, int tile, int key, Scores& s,
                                        Weights& p) {
    const bool interior = key >= item.interior.begin && key + kStepKeys <= item.interior.end;
    const float s_factor = kIsFp8 ? params.scale_log2 * k_scale : params.scale_log2;
    float top = kNoMaximum;
#pragma unroll
    for (int i = 0; i < kStepKeys / 4; ++i) {
      float* x = s + 4 * (i / 2) + i % 2;
      x[0] *= s_factor;
      if constexpr (kIsFp8) x[2] *= k_scale;
    }
    if (!interior) hide(shared.seen[warp][8 * tile + lane / 4], key, s);
#pragma unroll
    for (int i = 0; i < kStepKeys / 4; ++i) top = fmaxf(top, s[4 * (i / 2) + i % 2]);
    DecodeRow& state = row[tile];
    if (__any_sync(0xffffffffu, top > state.m + kSlack)) raise(tile, top, s);
#pragma unroll
    for (int n = 0; n < kStepKeys / 8; ++n) {
      float* x = s + 4 * n;
      x[0] = ptx::exp2(x[0] - state.m);
      x[1] = ptx::exp2(x[1] - state.m);
      x[2] = x[0] * (x[2] - state.c);
      x[3] = x[1] * (x[3] - state.c);
      state.d1 += x[0] + x[1];
      state.d2 += x[2] + x[3];
      p[2 * n] = ptx::pack<Operand>(x[0], x[1]);
      p[2 * n + 1] = ptx::pack<Operand>(x[2], x[3]);
    }
  }

  __device__ __forceinline__ void compute_slice(const DecodeItem& item, int stage, int key) {
    if constexpr (kIsWarpgroup) {
      Scores s;
      Weights p;
      multiply_keys_together(stage, s);
      weigh(item, 0, key, s, p);
      multiply_values_together(stage, p);
    } else {
#pragma unroll 1
      for (int step = 0; step < kKeys; step += kStepKeys) {
        const std::uint32_t rows = slice_address(stage) + step * kRowBytes;
        Scores s[kTiles] = {};
        Weights p[kTiles];
        multiply_keys(rows, s);
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) weigh(item, tile, key + step, s[tile], p[tile]);
        multiply_values(rows + Shared::kSliceBytes, p);
      }
    }
  }

  // -- the keys of an item

  // Calls `meanwhile` when the first keys have been asked for.
  template <class Meanwhile>
  __device__ __forceinline__ void stream(const DecodeItem& item, const Meanwhile& meanwhile) {
    const int step = kIsWarpgroup ? kStepKeys : params.ways * kKeys;
    const int count = kIsWarpgroup ? item.num_blocks : item.num_blocks * params.team;
    const int first_key = item.first_key + way * kKeys;  // that is computed, and copied
    const int key = kIsWarpgroup ? item.first_key + warp * kKeys : first_key;
    next_page = page_of(item, key);
    // The newest keys may still be on their way to the cache.
    const int first_loaded = key + (kStages - 2) * step + kKeys;
    if (params.settled && first_loaded > item.keys.end - static_cast<int>(params.problem.q_len)) {
      wait_for_last_kernel();
    }
    clear_rows();
    // q and r are asked for before the keys, in whose queue they would wait; behind the first keys
    // where those are asked for early, or are all. The compiler is not to know which: it would make
    // a loop for each.
    int rows_at = params.settled || count == 1 ? 0 : 1 - kStages;
    asm volatile("" : "+r"(rows_at));
    int to = 0;
    int from = 0;
    // kStages - 1 steps only load: one copy of the code, which starts out cold.
#pragma unroll 1
    for (int n = 1 - kStages; n < count; ++n) {
      if (n == 0) meanwhile();
      if (n == rows_at) load_rows(item);
      if (n >= 0) {
        mma::wait_copy_groups<kStages - 2>();
        if constexpr (kIsWarpgroup) ptx::fence_async_proxy();
        sync_team();
      }
      const int ahead = n + kStages - 1;
      if (ahead < count) load_slice(item, to, key + ahead * step, key + (ahead + 1) * step);
      mma::close_copy_group();
      to = to + 1 == kStages ? 0 : to + 1;
      if (n < 0) continue;
      compute_slice(item, from, first_key + n * step);
      from = from + 1 == kStages ? 0 : from + 1;
    }
    mma::wait_copy_groups<0>();
    __syncthreads();
  }

  // -- the end of an item: the warps' states meet

  // A row's part in every way, as one.
  __device__ __forceinline__ DecodeRow meet(int local) const {
    DecodeRow parts[kDecodeWarps];
    DecodeRow total;
#pragma unroll
    for (int i = kDecodeWarps - 1; i >= 0; --i) {
      if (i < params.ways) parts[i] = shared.meeting.parts[i * params.team + member][local];
      total.m = fmaxf(total.m, parts[i].m);
      total.c = parts[i].d1 != 0 ? parts[i].c : total.c;
    }
#pragma unroll
    for (int i = 0; i < kDecodeWarps; ++i) total.add(parts[i]);
    return total;
  }

  __device__ __forceinline__ void publish(const DecodeItem& item) {
    float v_factor = 1;
    if constexpr (kIsFp8) v_factor = __ldg(params.v_scale + item.kv_head);
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      row[tile].d1 = quad_sum(row[tile].d1);
      row[tile].d2 = quad_sum(row[tile].d2);
      if (lane % 4 == 0) shared.meeting.parts[warp][8 * tile + lane / 4] = row[tile];
    }
    __syncthreads();
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      const int local = 8 * tile + lane / 4;
      const DecodeRow total = meet(local);
      const float factor = v_factor * total.factor(row[tile]);
      const float shift = row[tile].c - total.c;
      if (way == 0 && lane % 4 == 0) shared.meeting.totals[row_of(tile)] = total;
      if (row_of(tile) >= item.rows) continue;
      const auto o1 = [&](int i, int e) { return factor * o[tile][4 * i + e]; };
      const auto o2 = [&](int i, int e) {
        return factor * (o[tile][4 * i + 2 + e] + shift * o[tile][4 * i + e]);
      };
      float* to1 = shared.meeting.o1[warp][local];
      float* to2 = shared.meeting.o2[warp][local];
      if constexpr (kIsFp8) {
#pragma unroll
        for (int i = 0; i < kHeadDim / 8; i += 2) {
          const int column = 8 * i + 4 * (lane % 4);
          *reinterpret_cast<float4*>(to1 + column) = {o1(i, 0), o1(i + 1, 0), o1(i, 1),
                                                      o1(i + 1, 1)};
          *reinterpret_cast<float4*>(to2 + column) = {o2(i, 0), o2(i + 1, 0), o2(i, 1),
                                                      o2(i + 1, 1)};
        }
      } else {
#pragma unroll
        for (int i = 0; i < kHeadDim / 8; ++i) {
          const int column = 8 * i + 2 * (lane % 4);
          *reinterpret_cast<float2*>(to1 + column) = {o1(i, 0), o1(i, 1)};
          *reinterpret_cast<float2*>(to2 + column) = {o2(i, 0), o2(i, 1)};
        }
      }
    }
    __syncthreads();
  }
};

}  // namespace parallax
