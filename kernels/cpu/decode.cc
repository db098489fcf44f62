// SPDX-License-Identifier: MIT
#include "cpu/decode.h"

#include <algorithm>

#include "cpu/element.h"
#include "cpu/layout.h"
#include "parallax/mask.h"
#include "parallax/state.h"

namespace parallax::cpu {
namespace {

constexpr int kMaxHeadDim = 256;
// Elements of a token's heads that one task streams: 4 KiB of floats, whole pages of memory.
constexpr std::int64_t kTaskWidth = 1024;
// Keys of a split, in elements of one task: 2 MiB of float keys and as much of values. Its state is
// under 2 % of that for groups up to 8, and a cache of 4,096 tokens makes 8 splits.
constexpr std::int64_t kSplitElements = 1 << 19;

// How a problem falls into tasks (sequence, block of heads, split), and what the workspace holds:
// for each split the states of all rows, then each worker's scratch.
struct Shape {
  explicit Shape(const AttentionProblem& problem)
      : group(problem.num_q_heads / problem.num_kv_heads),
        rows_of_head(group * problem.q_len),
        rows(problem.num_q_heads * problem.q_len),
        stride(decode_stride(problem.head_dim)),
        heads_of_block(
            std::clamp<std::int64_t>(kTaskWidth / problem.head_dim, 1, problem.num_kv_heads)),
        num_blocks((problem.num_kv_heads + heads_of_block - 1) / heads_of_block) {
    const std::int64_t tokens = kSplitElements / (heads_of_block * problem.head_dim);
    split_len = std::max<std::int64_t>(tokens / kDecodeTokens, 8) * kDecodeTokens;
    num_splits = std::max<std::int64_t>((problem.kv_len + split_len - 1) / split_len, 1);
  }

  std::int64_t state_floats() const { return rows * (2 * stride + 4); }
  std::int64_t scratch_floats(const AttentionProblem& problem) const {
    // The visible range of each query is kept in front.
    const std::int64_t ranges = (2 * problem.q_len + 15) / 16 * 16;
    const std::int64_t floats =
        static_cast<std::int64_t>(decode_scratch(problem.head_dim, heads_of_block * rows_of_head));
    return ranges + (floats + 15) / 16 * 16;
  }

  std::int64_t group, rows_of_head, rows, stride, heads_of_block, num_blocks, split_len, num_splits;
};

// The states of all rows of one sequence and one split; row h_kv * rows_of_head + f.
struct SplitState {
  SplitState(const Shape& shape, float* memory)
      : o(memory),
        m(o + 2 * shape.rows * shape.stride),
        d1(m + shape.rows),
        d2(d1 + shape.rows),
        c(d2 + shape.rows) {}
  float *o, *m, *d1, *d2, *c;
};

class Decoder {
 public:
  Decoder(const DecodePlan& plan, const DecodeArgs& args, void* workspace, const Target& target)
      : problem_(plan.problem),
        args_(args),
        target_(target),
        shape_(plan.problem),
        states_(static_cast<float*>(workspace)),
        scratch_(states_ +
                 (problem_.batch * shape_.num_splits * shape_.state_floats() + 15) / 16 * 16) {}

  std::int64_t num_tasks() const { return problem_.batch * shape_.num_blocks * shape_.num_splits; }

  void run_task(std::int64_t task, int worker) const {
    const std::int64_t split = task % shape_.num_splits;
    const std::int64_t head_block = task / shape_.num_splits % shape_.num_blocks;
    const std::int64_t b = task / shape_.num_splits / shape_.num_blocks;
    float* scratch = scratch_ + worker * shape_.scratch_floats(problem_);
    const std::int64_t first_head = head_block * shape_.heads_of_block;
    DecodeBlock block;
    block.num_kv_heads =
        static_cast<int>(std::min(shape_.heads_of_block, problem_.num_kv_heads - first_head));
    const Sequence sequence = sequence_at(problem_, args_.sequences, b);
    if (sequence.mask.q_len > 0) {
      fill_keys(sequence, split, reinterpret_cast<std::int32_t*>(scratch), &block);
      fill_rows(sequence, first_head, state(b, split), &block);
      target_.decode(block, scratch + (2 * problem_.q_len + 15) / 16 * 16);
    }
    if (shape_.num_splits > 1) return;
    const std::int64_t first = first_head * shape_.group;
    for (std::int64_t h = first; h < first + block.num_kv_heads * shape_.group; ++h) {
      finish_head(b, h);
    }
  }

  // Merges the splits of one query head and writes what was asked for.
  void finish_head(std::int64_t b, std::int64_t h) const {
    const Sequence sequence = sequence_at(problem_, args_.sequences, b);
    for (int i = 0; i < sequence.mask.q_len; ++i) finish_row(sequence, h, i);
  }

 private:
  SplitState state(std::int64_t b, std::int64_t split) const {
    return {shape_, states_ + (b * shape_.num_splits + split) * shape_.state_floats()};
  }

  void fill_keys(const Sequence& sequence, std::int64_t split, std::int32_t* ranges,
                 DecodeBlock* block) const {
    const std::int64_t q_len = problem_.q_len;
    const Range all = sequence.mask.keys({0, sequence.mask.q_len});
    block->begin =
        static_cast<std::int32_t>(std::max<std::int64_t>(all.begin, split * shape_.split_len));
    block->end =
        static_cast<std::int32_t>(std::min<std::int64_t>(all.end, (split + 1) * shape_.split_len));
    for (int i = 0; i < q_len; ++i) {
      const Range keys = sequence.mask.keys(i);
      ranges[i] = keys.begin;
      ranges[q_len + i] = keys.end;
    }
    block->lo = ranges;
    block->hi = ranges + q_len;
  }

  void fill_rows(const Sequence& sequence, std::int64_t first_head, SplitState state,
                 DecodeBlock* block) const {
    const std::size_t kv_element = element_bytes(cache_dtype(problem_));
    const auto bytes = static_cast<std::int64_t>(element_bytes(problem_.dtype));
    const auto kv_bytes = static_cast<std::int64_t>(kv_element);
    const HeadRows rows{sequence, first_head, shape_.group};
    block->dtype = problem_.dtype;
    block->kv_dtype = cache_dtype(problem_);
    block->head_dim = static_cast<int>(problem_.head_dim);
    block->scale = static_cast<float>(problem_.scale);
    block->group = static_cast<int>(shape_.group);
    block->q_len = static_cast<int>(problem_.q_len);
    block->q = static_cast<const char*>(query_row(args_.q, element_bytes(problem_.dtype), rows, 0));
    block->r = static_cast<const char*>(query_row(args_.r, element_bytes(problem_.dtype), rows, 0));
    block->q_row_bytes = args_.q.len_stride * bytes;
    block->q_head_bytes = args_.q.head_stride * bytes;
    block->r_row_bytes = args_.r.len_stride * bytes;
    block->r_head_bytes = args_.r.head_stride * bytes;
    block->k = token_rows(args_.k_cache, kv_element, args_.pages, rows);
    block->v = token_rows(args_.v_cache, kv_element, args_.pages, rows);
    block->k_head_bytes = args_.k_cache.head_stride * kv_bytes;
    block->v_head_bytes = args_.v_cache.head_stride * kv_bytes;
    if (args_.k_scale) block->k_scale = args_.k_scale + first_head;
    if (args_.v_scale) block->v_scale = args_.v_scale + first_head;
    const std::int64_t first_row = first_head * shape_.rows_of_head;
    block->m = state.m + first_row;
    block->d1 = state.d1 + first_row;
    block->d2 = state.d2 + first_row;
    block->c = state.c + first_row;
    block->o = state.o + first_row * 2 * shape_.stride;
  }

  void finish_row(const Sequence& sequence, std::int64_t h, int i) const {
    const std::int64_t head_dim = problem_.head_dim;
    const std::int64_t row =
        h / shape_.group * shape_.rows_of_head + i * shape_.group + h % shape_.group;
    RowState<float> merged;
    float centre = 0, o1[kMaxHeadDim] = {}, o2[kMaxHeadDim] = {};
    for (std::int64_t split = 0; split < shape_.num_splits; ++split) {
      const SplitState part = state(sequence.batch_idx, split);
      RowState<float> scalars{part.m[row], part.d1[row], part.d2[row]};
      if (scalars.d1 == 0) continue;  // saw nothing here
      // To the first split's centre, which is near: no digit of d2 and o2 is lost.
      if (merged.d1 == 0) centre = part.c[row];
      const float by = part.c[row] - centre;
      scalars.uncentre(by);
      const Merged<float> step = merge(merged, scalars);
      merged = step.state;
      const float* right1 = part.o + row * 2 * shape_.stride;
      const float* right2 = right1 + shape_.stride;
      for (std::int64_t d = 0; d < head_dim; ++d) {
        o1[d] = step.left * o1[d] + step.right * right1[d];
        o2[d] = step.left * o2[d] + step.right * (right2[d] + by * right1[d]);
      }
    }
    write_row(sequence, h, i, merged, centre, o1, o2);
  }

  void write_row(const Sequence& sequence, std::int64_t h, int i, RowState<float> merged,
                 float centre, float* o1, float* o2) const {
    const std::int64_t head_dim = problem_.head_dim;
    const std::int64_t index = row_index(problem_, sequence, h, i);
    const Finalized<float> result = finalize(merged, centre);
    if (args_.lse) static_cast<float*>(args_.lse)[index] = result.lse;
    if (args_.t_bar) static_cast<float*>(args_.t_bar)[index] = result.t_bar;
    if (args_.o.data) {
      float o[kMaxHeadDim];
      for (std::int64_t d = 0; d < head_dim; ++d) o[d] = result.o(o1[d], o2[d]);
      with_element_type(problem_.dtype, [&](auto element) {
        using T = decltype(element);
        T* to = static_cast<T*>(args_.o.data) + h * args_.o.head_stride +
                sequence.q_row(args_.o.batch_stride, args_.o.len_stride, i);
        for (std::int64_t d = 0; d < head_dim; ++d) store(RealOf<T>(o[d]), to + d);
      });
    }
    if (args_.state.m) {
      merged.uncentre(centre);
      args_.state.m[index] = merged.m;
      args_.state.d1[index] = merged.d1;
      args_.state.d2[index] = merged.d2;
      const std::int64_t token = sequence.batch_idx * problem_.q_len + i;
      float* to1 = args_.state.o1 + (token * problem_.num_q_heads + h) * head_dim;
      float* to2 = args_.state.o2 + (token * problem_.num_q_heads + h) * head_dim;
      for (std::int64_t d = 0; d < head_dim; ++d) {
        to1[d] = o1[d];
        to2[d] = o2[d] + centre * o1[d];
      }
    }
  }

  const AttentionProblem& problem_;
  const DecodeArgs& args_;
  const Target& target_;
  Shape shape_;
  float *states_, *scratch_;
};

}  // namespace

DecodePlan plan_decode(const AttentionProblem& problem, const Device& device) {
  const Shape shape(problem);
  const std::int64_t states =
      (problem.batch * shape.num_splits * shape.state_floats() + 15) / 16 * 16;
  const std::int64_t scratch = device.num_threads * shape.scratch_floats(problem);
  return {problem, device, shape.num_splits,
          static_cast<std::size_t>(states + scratch) * sizeof(float)};
}

void decode(const DecodePlan& plan, const DecodeArgs& args, void* workspace,
            const ParallelFor& parallel_for) {
  decode(plan, args, workspace, parallel_for, *supported_targets().list[0]);
}

void decode(const DecodePlan& plan, const DecodeArgs& args, void* workspace,
            const ParallelFor& parallel_for, const Target& target) {
  const Decoder decoder(plan, args, workspace, target);
  if (decoder.num_tasks() == 0) return;
  parallel_for(decoder.num_tasks(),
               [&](std::int64_t task, int worker) { decoder.run_task(task, worker); });
  if (plan.num_splits == 1) return;
  const std::int64_t heads = plan.problem.num_q_heads;
  parallel_for(plan.problem.batch * heads,
               [&](std::int64_t task, int) { decoder.finish_head(task / heads, task % heads); });
}

}  // namespace parallax::cpu
