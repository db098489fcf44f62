// SPDX-License-Identifier: MIT
// The Hopper forward: packed virtual rows (docs/kernels.md has the why and the numbers).
//
// A consumer warpgroup's 64-row tensor-core tile holds 32 queries: in every 16-row slab, row g is
// query g's q and row g + 8 its r. One product with K^T therefore leaves a query's logits s and
// probes t in the same thread, column by column; p = exp(s - m) and w = p (t - c) are made in place
// and are already the register operand of the product with V, whose sums hold o1 in row g and o2 in
// row g + 8. Every thread owns one query; a row's sums cross four lanes.
//
//   scheduler (a thread)  tickets -> TileInfo: which queries, which key tiles
//   producer (a warp)     the q and r tile, K and V tiles into rings of two stages
//   consumer warpgroups   S/T of key tile j while o += {p, w} V of tile j + 1; from the last key
//                         tile to the first
#pragma once

#include "cuda/forward.h"
#include "cuda/launch.h"
#include "cuda/ptx.cuh"
#include "cuda/schedule.h"
#include "cuda/wgmma.cuh"
#include "parallax/state.h"

namespace parallax {

// The next query tile's ticket is drawn when so many key tiles are left to load: late enough that
// no CTA runs dry beside one with a tile in store, early enough to hide the way to the first load.
constexpr int kTicketLead = 4;

constexpr int kMaxWarpgroups = 3;

// What the scheduler tells of a query tile. Rows are rows of the tensors' len axis.
struct TileInfo {
  int q_begin;  // the tile's first query in its sequence; negative: no more tiles
  int q_len;
  RowMask mask;
  KeyTiles tiles;
  int keep_from;   // V rows below this and
  int clear_from;  // from this on may hold anything: cleared before use
  int head;
  int kv_head;
  int batch_idx;
  int q_offset;
  int kv_offset;
  Range interior[kMaxWarpgroups];  // of each warpgroup's queries
};
// The scheduler may be at tile n + 1 while consumers finish n - 1.
constexpr int kTileInfos = 4;

template <int kHeadDim>
struct alignas(1024) ForwardShared {
  static constexpr ForwardTile kTile = forward_tile(kHeadDim);
  static constexpr int kPanels = kHeadDim / 64;                     // of 64 columns, 128 bytes
  static constexpr int kPackedPanel = kTile.warpgroups * 64 * 128;  // bytes
  static constexpr int kKeyPanel = kTile.keys * 128;
  static constexpr int kPackedBytes = kPanels * kPackedPanel;
  static constexpr int kKeyBytes = kPanels * kKeyPanel;

  std::uint8_t packed[kPackedBytes];  // a panel: for each warpgroup, 8 rows of q, 8 of r, ...
  std::uint8_t k[kTile.stages][kKeyBytes];
  std::uint8_t v[kTile.stages][kKeyBytes];
  std::uint64_t packed_full, packed_empty;
  std::uint64_t k_full[kTile.stages], k_empty[kTile.stages];
  std::uint64_t v_full[kTile.stages], v_empty[kTile.stages];
  std::uint64_t info_full, info_wanted;
  TileInfo info[kTileInfos];
};

// ---- scheduler (one thread): tickets -> TileInfo

template <int kHeadDim>
struct ForwardScheduler {
  static constexpr ForwardTile kTile = forward_tile(kHeadDim);

  const ForwardParams& params;
  ForwardShared<kHeadDim>& shared;

  // The ticket's sequence, head and query tile, the latter as info.q_begin. This warp has few
  // registers: what is known goes to shared memory at once, and comes back where it is needed.
  __device__ __forceinline__ int locate(int ticket, TileInfo& info) const {
    const int heads = params.num_heads;
    if (params.first_ticket == nullptr) {
      const TilePlace place =
          place_tile(ticket, params.num_q_tiles, params.num_pairs, params.section);
      const int index = place.pair / heads;
      info.head = place.pair - index * heads;
      info.q_begin = place.q_tile * kTile.queries();
      return index;
    }
    int low = 0;
    int high = params.num_sequences;
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      const bool above = params.first_ticket[middle] <= ticket;
      low = above ? middle : low;
      high = above ? high : middle;
    }
    const int index = params.sequence_order[low];
    const Sequence sequence = sequence_at(params.problem, params.sequences, index);
    const int section = section_pairs(params.section_keys, sequence.kv_len, params.group, heads);
    const TilePlace place =
        place_tile(ticket - params.first_ticket[low],
                   ceil_div(sequence.mask.q_len, kTile.queries()), heads, section);
    info.head = place.pair;
    info.q_begin = place.q_tile * kTile.queries();
    return index;
  }

  __device__ __forceinline__ int num_tickets() const {
    return params.first_ticket == nullptr ? params.num_tickets
                                          : params.first_ticket[params.num_sequences];
  }

  __device__ __forceinline__ void run() {
#pragma unroll 1
    for (unsigned n = 0;; ++n) {
      // Asked for when a few key tiles of the last are left to load (kTicketLead).
      if (n > 0) ptx::barrier_wait(&shared.info_wanted, (n - 1) & 1);
      TileInfo& info = shared.info[n % kTileInfos];
      const int ticket = atomicAdd(params.next_ticket, 1);
      if (ticket >= num_tickets()) {
        info.q_begin = -1;
        ptx::barrier_arrive(&shared.info_full);
        return;
      }
      const int index = locate(ticket, info);
      asm volatile("" ::: "memory");
      const Sequence sequence = sequence_at(params.problem, params.sequences, index);
      info.batch_idx = static_cast<int>(sequence.batch_idx);
      info.q_offset = static_cast<int>(sequence.q_offset);
      info.kv_offset = static_cast<int>(sequence.kv_offset);
      info.q_len = sequence.mask.q_len;
      info.mask = row_mask(sequence.mask);
      // Beyond the end of a batched tensor the copy engine itself writes zeros.
      const bool ends_tensor =
          params.first_ticket == nullptr && sequence.mask.kv_end == sequence.kv_len;
      info.clear_from = ends_tensor ? 0x7fffffff : sequence.mask.kv_end;
      asm volatile("" ::: "memory");
      info.keep_from = info.mask.keys(0).begin;
      info.kv_head = info.head / params.group;
      const int q_end = min(info.q_begin + kTile.queries(), info.q_len);
      info.tiles = key_tiles(info.mask, {info.q_begin, q_end}, kTile.keys);
#pragma unroll 1
      for (int i = 0; i < kTile.warpgroups; ++i) {
        const int begin = min(info.q_begin + 32 * i, info.q_len - 1);
        const int end = min(info.q_begin + 32 * i + 32, info.q_len);
        info.interior[i] = interior_tiles(info.mask, {begin, end}, kTile.keys);
      }
      ptx::barrier_arrive(&shared.info_full);
    }
  }
};

// ---- producer (one warp): TileInfo -> q and r tile, K and V tiles

template <int kHeadDim>
struct ForwardProducer {
  using Shared = ForwardShared<kHeadDim>;
  static constexpr ForwardTile kTile = Shared::kTile;

  const ForwardMaps& maps;
  const ForwardParams& params;
  Shared& shared;
  int lane;

  // One lane waits, the others follow it: a lane that fell behind could find the phase it waits for
  // gone by, and the next not to come without it.
  __device__ __forceinline__ void wait(std::uint64_t* barrier, unsigned parity) const {
    if (lane == 0) ptx::barrier_wait(barrier, parity);
    __syncwarp();
  }

  // One box of 64 columns a panel where all rows of the tile exist, otherwise boxes of 8 rows,
  // which stop at the tensor's end.
  __device__ __forceinline__ void load_packed(const TileInfo& info) {
    const int row = info.q_offset + info.q_begin;
    if (params.interleaved && row + kTile.queries() <= params.problem.q_len) {
      if (lane == 0) {
        ptx::barrier_expect(&shared.packed_full, Shared::kPackedBytes);
#pragma unroll
        for (int panel = 0; panel < Shared::kPanels; ++panel) {
          ptx::copy_box(shared.packed + panel * Shared::kPackedPanel, &maps.q_and_r,
                        {info.head * params.head_columns + 64 * panel, row, 0, 0, info.batch_idx},
                        &shared.packed_full);
        }
      }
      return;
    }
    const int slabs = ceil_div(min(info.q_len - info.q_begin, kTile.queries()), 8);
    if (lane == 0) ptx::barrier_expect(&shared.packed_full, slabs * Shared::kPanels * 2048);
    __syncwarp();
#pragma unroll 1
    for (int i = lane; i < slabs * Shared::kPanels * 2; i += 32) {
      const bool is_r = i & 1;
      const int panel = (i >> 1) % Shared::kPanels;
      const int slab = (i >> 1) / Shared::kPanels;
      const int half = is_r != params.r_first ? 1 : 0;
      ptx::copy_box(shared.packed + panel * Shared::kPackedPanel + (2 * slab + half) * 1024,
                    is_r ? &maps.r : &maps.q,
                    {64 * panel, row + 8 * slab, info.head, info.batch_idx}, &shared.packed_full);
    }
  }

  __device__ __forceinline__ void load_stage(const CUtensorMap* map, std::uint8_t* memory,
                                             std::uint64_t* full, std::uint64_t* empty,
                                             unsigned fill, int row, const TileInfo& info) {
    const unsigned stage = fill % kTile.stages;
    if (fill >= kTile.stages) ptx::barrier_wait(empty + stage, (fill / kTile.stages - 1) & 1);
    ptx::barrier_expect(full + stage, Shared::kKeyBytes);
#pragma unroll
    for (int panel = 0; panel < Shared::kPanels; ++panel) {
      ptx::copy_box(memory + stage * Shared::kKeyBytes + panel * Shared::kKeyPanel, map,
                    {64 * panel, row, info.kv_head, info.batch_idx}, full + stage);
    }
  }

  __device__ __forceinline__ void run() {
    unsigned fill = 0;  // V tiles loaded so far; K runs one ahead, as the consumers do
#pragma unroll 1
    for (unsigned n = 0;; ++n) {
      wait(&shared.info_full, n & 1);
      const TileInfo& info = shared.info[n % kTileInfos];
      if (info.q_begin < 0) {
        // Not before the last tile has landed: a phase takes one arrival.
        if (n > 0) wait(&shared.packed_empty, (n - 1) & 1);
        if (lane == 0) ptx::barrier_arrive(&shared.packed_full);
        return;
      }
      int left = info.tiles.count;
      int row = info.kv_offset + (info.tiles.first + left - 1) * kTile.keys;
      auto load_k = [&](unsigned at, int from_row) {
        load_stage(&maps.k, shared.k[0], shared.k_full, shared.k_empty, at, from_row, info);
      };
      // The first K stage is free before the packed tile is where q and r stay in shared memory.
      if (lane == 0 && left > 0) load_k(fill, row);
      if (n > 0) wait(&shared.packed_empty, (n - 1) & 1);
      load_packed(info);
      if (lane == 0) {
        if (left < kTicketLead) ptx::barrier_arrive(&shared.info_wanted);
#pragma unroll 1
        for (; left > 0; --left, ++fill, row -= kTile.keys) {
          if (left == kTicketLead) ptx::barrier_arrive(&shared.info_wanted);
          if (left > 1) load_k(fill + 1, row - kTile.keys);
          load_stage(&maps.v, shared.v[0], shared.v_full, shared.v_empty, fill, row, info);
        }
      }
      __syncwarp();
    }
  }
};

// ---- consumers

template <class T, int kHeadDim>
struct ForwardConsumer {
  using Shared = ForwardShared<kHeadDim>;
  static constexpr ForwardTile kTile = Shared::kTile;
  static constexpr int kKeys = kTile.keys;
  static constexpr int kWidth = kKeys / 4;  // keys of a tile that a thread holds
  // How far (in powers of two) a row may outgrow its m before o is rescaled. p then reaches 2^8;
  // in fp16 2^3, so that w = p (t - c) has room for probes of 8000.
  static constexpr float kSlack = std::is_same_v<T, bf16> ? 8.0f : 3.0f;

  const ForwardParams& params;
  Shared& shared;
  int warpgroup;
  bool leads;         // one lane of the warp
  unsigned used = 0;  // K and V tiles consumed so far

  float s[kKeys / 2];  // s[4 i + e]: logit, then p; s[4 i + 2 + e]: probe, then w
  std::uint32_t p[kKeys / 4];
  float o[kHeadDim / 2];
  std::uint32_t a[kTile.q_in_registers ? kHeadDim / 4 : 1];

  // The row this thread owns. m in units of log2, relative to scaled logits.
  float m, d1, d2, c;

  // -- turns: with ping-pong, a warpgroup's softmax runs under the other's products

  __device__ __forceinline__ int turn_barrier(int of) const { return 1 + of; }
  __device__ __forceinline__ void first_credit() const {
    if constexpr (kTile.ping_pong) {
      if (warpgroup == kTile.warpgroups - 1) ptx::named_arrive(turn_barrier(0), 256);
    }
  }
  __device__ __forceinline__ void take_turn() const {
    if constexpr (kTile.ping_pong) ptx::named_sync(turn_barrier(warpgroup), 256);
  }
  __device__ __forceinline__ void pass_turn() const {
    if constexpr (kTile.ping_pong) {
      const int next = warpgroup + 1 == kTile.warpgroups ? 0 : warpgroup + 1;
      ptx::named_arrive(turn_barrier(next), 256);
    }
  }
  __device__ __forceinline__ void last_credit() const {
    if constexpr (kTile.ping_pong) {
      if (warpgroup == 0) ptx::named_sync(turn_barrier(0), 256);
    }
  }

  __device__ __forceinline__ void release(std::uint64_t* barrier) const {
    if (leads) ptx::barrier_arrive(barrier);
  }

  // -- products

  __device__ __forceinline__ void load_operand() {
    const int thread = ptx::thread_index();
    const int lane = thread & 31;
    const int flip = params.r_first ? 8 : 0;
    const int row = (thread >> 1 & 48) + ((lane & 15) ^ flip);
    const std::uint32_t base = ptx::shared_address(shared.packed) + warpgroup * 8192 + row * 128;
#pragma unroll
    for (int k = 0; k < kHeadDim / 16; ++k) {
      const int chunk = (2 * (k & 3) + (lane >> 4)) ^ (row & 7);
      std::uint32_t fragment[4];
      ptx::load_matrices(fragment, base + (k >> 2) * Shared::kPackedPanel + chunk * 16);
#pragma unroll
      for (int i = 0; i < 4; ++i) a[4 * k + i] = fragment[i];
    }
  }

  __device__ __forceinline__ void multiply_keys(unsigned stage) {
    const std::uint32_t keys =
        wgmma::descriptor(ptx::shared_address(shared.k[0])) + stage * (Shared::kKeyBytes >> 4);
    const std::uint32_t rows =
        wgmma::descriptor(ptx::shared_address(shared.packed) + warpgroup * 8192);
#pragma unroll
    for (int k = 0; k < kHeadDim / 16; ++k) {
      const int key_step = ((k >> 2) * Shared::kKeyPanel + (k & 3) * 32) >> 4;
      const int row_step = ((k >> 2) * Shared::kPackedPanel + (k & 3) * 32) >> 4;
      if constexpr (kTile.q_in_registers) {
        wgmma::Products<T, kKeys>::register_a(s, a[4 * k], a[4 * k + 1], a[4 * k + 2], a[4 * k + 3],
                                              keys + key_step, k != 0);
      } else {
        wgmma::Products<T, kKeys>::shared_a(s, rows + row_step, keys + key_step, k != 0);
      }
    }
  }

  __device__ __forceinline__ void multiply_values(unsigned stage) {
    const std::uint32_t values =
        wgmma::descriptor(ptx::shared_address(shared.v[0]), Shared::kKeyPanel) +
        stage * (Shared::kKeyBytes >> 4);
#pragma unroll
    for (int k = 0; k < kKeys / 16; ++k) {
      wgmma::Products<T, kHeadDim>::template register_a<1>(o, p[4 * k], p[4 * k + 1], p[4 * k + 2],
                                                           p[4 * k + 3], values + k * 128, true);
    }
  }

  __device__ __forceinline__ void round_weights() {
#pragma unroll
    for (int i = 0; i < kKeys / 4; ++i) p[i] = ptx::pack<T>(s[2 * i], s[2 * i + 1]);
  }

  // -- softmax

  static __device__ __forceinline__ float quad_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
    return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
  }
  static __device__ __forceinline__ float quad_sum(float x) {
    x += __shfl_xor_sync(0xffffffffu, x, 1);
    return x + __shfl_xor_sync(0xffffffffu, x, 2);
  }

  __device__ __forceinline__ float tile_max() const {
    float even = s[0];
    float odd = s[1];
#pragma unroll
    for (int i = 1; i < kKeys / 8; ++i) {
      even = fmaxf(even, s[4 * i]);
      odd = fmaxf(odd, s[4 * i + 1]);
    }
    return quad_max(fmaxf(even, odd));
  }

  // p from the logits; returns this thread's part of their sum.
  __device__ __forceinline__ float exponentials(float shift) {
    float even = 0.0f;
    float odd = 0.0f;
#pragma unroll
    for (int i = 0; i < kKeys / 8; ++i) {
      s[4 * i] = ptx::exp2(fmaf(s[4 * i], params.scale_log2, -shift));
      s[4 * i + 1] = ptx::exp2(fmaf(s[4 * i + 1], params.scale_log2, -shift));
      even += s[4 * i];
      odd += s[4 * i + 1];
    }
    return even + odd;
  }

  // w = p (t - c), and d2.
  __device__ __forceinline__ void weighted_probes() {
    float even = 0.0f;
    float odd = 0.0f;
#pragma unroll
    for (int i = 0; i < kKeys / 8; ++i) {
      s[4 * i + 2] = s[4 * i] * (s[4 * i + 2] - c);
      s[4 * i + 3] = s[4 * i + 1] * (s[4 * i + 3] - c);
      even += s[4 * i + 2];
      odd += s[4 * i + 3];
    }
    d2 += even + odd;
  }

  // A tile that every row sees whole, once m and c are set. m is raised lazily: by the warp, if
  // some row has outgrown it by kSlack. Returns whether o must be scaled by *factor.
  __device__ __forceinline__ bool softmax_interior(float* factor) {
    const float top = tile_max() * params.scale_log2;
    const bool grown = __any_sync(0xffffffffu, top > m + kSlack);
    if (grown) {
      const float raised = fmaxf(m, top);
      *factor = ptx::exp2(m - raised);
      m = raised;
      d1 *= *factor;
      d2 *= *factor;
    }
    d1 += exponentials(m);
    weighted_probes();
    return grown;
  }

  // Any tile: hides what the row does not see, and moves the centre c of a row that has met few
  // keys to their mean. The caller scales o by `factor`, then takes `shift` o1 from o2.
  struct Edge {
    float factor;
    float shift;
  };
  __device__ __forceinline__ Edge softmax_edge(Range visible) {
    using Word = std::conditional_t<(kWidth > 32), std::uint64_t, std::uint32_t>;
    const Word mask =
        visible_columns<Word>(visible.begin, visible.end, ptx::thread_index() & 3, kWidth);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      float& logit = s[4 * (i >> 1) + (i & 1)];
      float& probe = s[4 * (i >> 1) + (i & 1) + 2];
      const bool seen = (mask >> i) & 1;
      logit = seen ? logit : -INFINITY;
      probe = seen ? probe : 0.0f;
    }
    const float top = tile_max();
    const float raised = top == -INFINITY ? m : fmaxf(m, top * params.scale_log2);
    Edge edge;
    edge.factor = m == -INFINITY ? 1.0f : ptx::exp2(m - raised);
    m = raised;
    d1 *= edge.factor;
    d2 *= edge.factor;
    const float sum = exponentials(m == -INFINITY ? 0.0f : m);
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
    edge.shift = settled || total == 0.0f ? 0.0f : __fdividef(offset, total);
    c += edge.shift;
    d2 -= edge.shift * d1;
    d1 += sum;
    weighted_probes();
    return edge;
  }

  // -- one query tile

  __device__ __forceinline__ int query_of(const TileInfo& info) const {
    return info.q_begin + (ptx::thread_index() >> 2);
  }

  // What this thread's row sees, relative to the key tile. Rows beyond the sequence see what its
  // last row does; nothing of them is stored.
  __device__ __forceinline__ Range visible(const TileInfo& info, int tile) const {
    const Range keys = info.mask.keys(min(query_of(info), info.q_len - 1));
    return {keys.begin - tile * kKeys, keys.end - tile * kKeys};
  }

  // Clears the rows of a V stage that no query may see and that may hold anything: 0 * NaN is NaN.
  __device__ __forceinline__ void clear_values(const TileInfo& info, int tile) {
    const int tile_begin = tile * kKeys;
    const int keep_from = info.keep_from;
    const int clear_from = info.clear_from;
    if (tile_begin >= keep_from && tile_begin + kKeys <= clear_from) return;
    const unsigned stage = used % kTile.stages;
    ptx::barrier_wait(&shared.v_full[stage], (used / kTile.stages) & 1);
    for (int i = ptx::thread_index() & 127; i < kKeys * 8; i += 128) {
      const int row = tile_begin + i / 8;
      if (row >= keep_from && row < clear_from) continue;
#pragma unroll
      for (int panel = 0; panel < Shared::kPanels; ++panel) {
        *reinterpret_cast<uint4*>(shared.v[stage] + panel * Shared::kKeyPanel + i * 16) =
            make_uint4(0, 0, 0, 0);
      }
    }
    ptx::fence_async_proxy();
    ptx::named_sync(1 + kTile.warpgroups + warpgroup, 128);
  }

  __device__ __forceinline__ void scale_sums(float factor) {
#pragma unroll
    for (int i = 0; i < kHeadDim / 2; ++i) o[i] *= factor;
  }

  // o2 of a centre that is `shift` higher.
  __device__ __forceinline__ void shift_sums(float shift) {
#pragma unroll
    for (int i = 0; i < kHeadDim / 8; ++i) {
      o[4 * i + 2] = fmaf(-shift, o[4 * i], o[4 * i + 2]);
      o[4 * i + 3] = fmaf(-shift, o[4 * i + 1], o[4 * i + 3]);
    }
  }

  __device__ __forceinline__ void finish_values(unsigned stage) {
    wgmma::wait<0>();
    wgmma::settle(o);
    release(&shared.v_empty[stage]);
  }

  // The first key tile of a query tile: its logits and probes alone.
  __device__ __forceinline__ void first_step(const TileInfo& info, int tile) {
    const unsigned stage = used % kTile.stages;
    ptx::barrier_wait(&shared.k_full[stage], (used / kTile.stages) & 1);
    take_turn();
    wgmma::fence();
    multiply_keys(stage);
    wgmma::commit();
    pass_turn();
    wgmma::wait<0>();
    wgmma::settle(s);
    release(&shared.k_empty[stage]);
    softmax_edge(visible(info, tile));
    round_weights();
    clear_values(info, tile);
  }

  // Logits and probes of this key tile and the products of the last one's p and w with V, issued
  // together. The softmax runs under the other warpgroups' products: waiting for V first, before
  // the exponentials, gives p's registers back and is faster than holding them (docs/kernels.md).
  template <bool kEdge>
  __device__ __forceinline__ void step(const TileInfo& info, int tile) {
    const unsigned stage = used % kTile.stages;
    const unsigned last = (used - 1) % kTile.stages;
    ptx::barrier_wait(&shared.k_full[stage], (used / kTile.stages) & 1);
    take_turn();
    wgmma::fence();
    multiply_keys(stage);
    wgmma::commit();
    ptx::barrier_wait(&shared.v_full[last], ((used - 1) / kTile.stages) & 1);
    wgmma::fence();
    multiply_values(last);
    wgmma::commit();
    pass_turn();
    wgmma::wait<1>();
    wgmma::settle(s);
    release(&shared.k_empty[stage]);
    if constexpr (kEdge) {
      finish_values(last);
      const Edge edge = softmax_edge(visible(info, tile));
      scale_sums(edge.factor);
      shift_sums(edge.shift);
    } else {
      float factor = 1.0f;
      const bool grown = softmax_interior(&factor);
      finish_values(last);
      wgmma::settle(s);
      if (grown) scale_sums(factor);
    }
    round_weights();
    if constexpr (kEdge) clear_values(info, tile);
  }

  __device__ __forceinline__ void last_step() {
    const unsigned last = (used - 1) % kTile.stages;
    ptx::barrier_wait(&shared.v_full[last], ((used - 1) / kTile.stages) & 1);
    wgmma::fence();
    multiply_values(last);
    wgmma::commit();
    finish_values(last);
  }

  // Four 8-column blocks of a row spread over a quad, two columns a lane: afterwards each lane
  // holds the 16 bytes of one block.
  static __device__ __forceinline__ uint4 transpose_quad(std::uint32_t (&r)[4], int quad_lane) {
    const bool odd = quad_lane & 1;
    std::uint32_t x0 = odd ? r[0] : r[1];
    std::uint32_t x1 = odd ? r[2] : r[3];
    x0 = __shfl_xor_sync(0xffffffffu, x0, 1);
    x1 = __shfl_xor_sync(0xffffffffu, x1, 1);
    r[0] = odd ? x0 : r[0];
    r[2] = odd ? x1 : r[2];
    r[1] = odd ? r[1] : x0;
    r[3] = odd ? r[3] : x1;
    const bool high = quad_lane & 2;
    std::uint32_t y0 = high ? r[0] : r[2];
    std::uint32_t y1 = high ? r[1] : r[3];
    y0 = __shfl_xor_sync(0xffffffffu, y0, 2);
    y1 = __shfl_xor_sync(0xffffffffu, y1, 2);
    r[0] = high ? y0 : r[0];
    r[1] = high ? y1 : r[1];
    r[2] = high ? r[2] : y0;
    r[3] = high ? r[3] : y1;
    return make_uint4(r[0], r[1], r[2], r[3]);
  }

  template <class Element>
  __device__ __forceinline__ void store_row(T* row, bool valid, Element element) const {
    const int quad_lane = ptx::thread_index() & 3;
#pragma unroll
    for (int k = 0; k < kHeadDim / 32; ++k) {
      std::uint32_t words[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int at = 4 * (4 * k + i);
        words[i] = ptx::pack<T>(element(o[at], o[at + 2]), element(o[at + 1], o[at + 3]));
      }
      const uint4 block = transpose_quad(words, quad_lane);
      const int column = 8 * (4 * k + quad_lane);
      if (valid && column < params.problem.head_dim) {
        *reinterpret_cast<uint4*>(row + column) = block;
      }
    }
  }

  __device__ __forceinline__ void store(const TileInfo& info) const {
    const int query = query_of(info);
    RowState<float> row;
    row.m = m * 0.6931471805599453f;
    row.d1 = quad_sum(d1);
    row.d2 = quad_sum(d2);
    const Finalized<float> result = finalize(row, c);
    const bool valid = query < info.q_len;
    const std::int64_t batch_idx = info.batch_idx;
    const std::int64_t token = static_cast<std::int64_t>(info.q_offset) + query;
    const std::int64_t head = info.head;
    auto row_of = [&](const View& view) {
      return static_cast<T*>(view.data) + batch_idx * view.batch_stride + token * view.len_stride +
             head * view.head_stride;
    };
    store_row(row_of(params.o), valid, [&](float o1, float o2) { return result.o(o1, o2); });
    if (params.v_bar.data != nullptr) {
      store_row(row_of(params.v_bar), valid, [&](float o1, float) { return result.v_bar(o1); });
    }
    if (valid && (ptx::thread_index() & 3) == 0) {
      const std::int64_t index =
          (batch_idx * params.problem.num_q_heads + head) * params.problem.q_len + token;
      if (params.lse != nullptr) params.lse[index] = result.lse;
      if (params.t_bar != nullptr) params.t_bar[index] = result.t_bar;
    }
  }

  __device__ __forceinline__ void run() {
    first_credit();
#pragma unroll 1
    for (unsigned n = 0;; ++n) {
      ptx::barrier_wait(&shared.packed_full, n & 1);
      const TileInfo& info = shared.info[n % kTileInfos];
      const int q_begin = ptx::uniform(info.q_begin);
      if (q_begin < 0) break;
      if constexpr (kTile.q_in_registers) {
        load_operand();
        __syncwarp();
        release(&shared.packed_empty);
      }
      const int first_tile = ptx::uniform(info.tiles.first);
      const int interior_begin = ptx::uniform(info.interior[warpgroup].begin);
      const int interior_end = ptx::uniform(info.interior[warpgroup].end);
      int tile = first_tile + ptx::uniform(info.tiles.count) - 1;
      m = -INFINITY;
      d1 = d2 = c = 0.0f;
#pragma unroll
      for (int i = 0; i < kHeadDim / 2; ++i) o[i] = 0.0f;
      if (tile >= first_tile) {
        first_step(info, tile);
        ++used;
#pragma unroll 1
        for (--tile; tile >= first_tile; --tile, ++used) {
          if (tile >= interior_begin && tile < interior_end) {
            step<false>(info, tile);
          } else {
            step<true>(info, tile);
          }
        }
        last_step();
      }
      store(info);
      if constexpr (!kTile.q_in_registers) {
        __syncwarp();
        release(&shared.packed_empty);
      }
    }
    last_credit();
  }
};

template <class T, int kHeadDim>
__global__ void __launch_bounds__(forward_tile(kHeadDim).threads(), 1)
    forward_kernel(const __grid_constant__ ForwardMaps maps,
                   const __grid_constant__ ForwardParams params) {
  constexpr ForwardTile kTile = forward_tile(kHeadDim);
  extern __shared__ __align__(1024) std::uint8_t shared_memory[];
  auto& shared = *reinterpret_cast<ForwardShared<kHeadDim>*>(shared_memory);
  const int warpgroup = ptx::uniform(threadIdx.x / 128);
  if (threadIdx.x == 0) {
    ptx::barrier_init(&shared.info_full, 1);
    ptx::barrier_init(&shared.info_wanted, 1);
    ptx::barrier_init(&shared.packed_full, 1);
    ptx::barrier_init(&shared.packed_empty, 4 * kTile.warpgroups);
    for (int i = 0; i < kTile.stages; ++i) {
      ptx::barrier_init(&shared.k_full[i], 1);
      ptx::barrier_init(&shared.v_full[i], 1);
      ptx::barrier_init(&shared.k_empty[i], 4 * kTile.warpgroups);
      ptx::barrier_init(&shared.v_empty[i], 4 * kTile.warpgroups);
    }
    ptx::fence_barrier_init();
  }
  __syncthreads();
  if (warpgroup == kTile.warpgroups) {
    ptx::keep_registers<kTile.producer_registers>();
    const int thread = ptx::thread_index() & 127;
    if (thread < 32) {
      ForwardProducer<kHeadDim>{maps, params, shared, thread}.run();
    } else if (thread == 32) {
      ForwardScheduler<kHeadDim>{params, shared}.run();
    }
  } else {
    ptx::take_registers<kTile.consumer_registers>();
    ForwardConsumer<T, kHeadDim> consumer{params, shared, warpgroup, threadIdx.x % 32 == 0};
    consumer.run();
  }
}

template <class T, int kHeadDim>
Status launch_forward(const ForwardMaps& maps, const ForwardParams& params, int blocks,
                      cudaStream_t stream) {
  constexpr ForwardTile kTile = forward_tile(kHeadDim);
  constexpr int kSharedBytes = sizeof(ForwardShared<kHeadDim>);
  static_assert(128 * (kTile.warpgroups * kTile.consumer_registers + kTile.producer_registers) <=
                65536);
  static_assert(kSharedBytes <= 227 * 1024);
  const auto kernel = forward_kernel<T, kHeadDim>;
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
  if (Status s = check_cuda(error, "forward: cudaFuncSetAttribute"); !s.ok()) return s;
  kernel<<<blocks, kTile.threads(), kSharedBytes, stream>>>(maps, params);
  return check_cuda(cudaGetLastError(), "forward: launch");
}

}  // namespace parallax

#define PARALLAX_INSTANCE(type, head_dim)                                                       \
  namespace parallax {                                                                          \
  template Status launch_forward<type, head_dim>(const ForwardMaps&, const ForwardParams&, int, \
                                                 cudaStream_t);                                 \
  }
