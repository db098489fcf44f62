// SPDX-License-Identifier: MIT
// One token more for each of many sequences. On a GPU the whole step is a CUDA graph, captured once
// for each number of rows and replayed whatever the sequences' lengths are; on a CPU it runs as it
// is. There a step can also feed the next one: the host then learns of its tokens while that one is
// under way.
#pragma once

#include <torch/torch.h>

#include <cstdint>
#include <memory>
#include <vector>

#include "lm/model.h"

namespace parallax::lm {

class DecodeStep {
 public:
  // Rows that a cache needs for `count` sequences: a step works on a few numbers of rows only, with
  // idle ones in the places left over. On a CPU it takes eight at a time, always: a matrix product
  // of another height may round differently, and what a sequence gets must not depend on its
  // neighbours.
  static std::int64_t rows_for(std::int64_t count, at::Device device);

  // Keeps references. The cache has rows_for(...) rows. Ids from num_tokens on (0: none) are no
  // tokens and not to be taken for the likeliest.
  DecodeStep(CausalLm& model, KvCache& cache, std::int64_t num_tokens = 0);
  ~DecodeStep();

  // tokens[b], b = 0 .. count - 1, follows what row b holds, which then counts it; rows from
  // `count` on are idle. -> logits [count, vocab_size], float32 or wider, on the model's device,
  // good until the next call. Throws Error where the cache is full, before anything is changed.
  at::Tensor operator()(const std::vector<std::int32_t>& tokens);

  // The same without a graph.
  at::Tensor run_eager(const std::vector<std::int32_t>& tokens);

  // Where greedy() says so, on a GPU: the same steps for the likeliest tokens alone. start() does
  // not wait. start_next() appends what the last step to be started finds, in its rows; throws
  // Error as start() does, and where the cache has been changed in between. take() waits for the
  // oldest step that is not taken: its tokens [count], of equal logits the lower id, -1 where none
  // is finite. Two may be under way. Each step counts its input, which a caller can only take back
  // with the sequence (KvCache::release).
  bool greedy() const { return graphs_ != nullptr; }
  void start(const std::vector<std::int32_t>& tokens);
  void start_next();
  std::vector<std::int32_t> take();

 private:
  struct Graphs;

  // Counts the new tokens, for the device too. -> how many rows the step takes.
  std::int64_t begin(const std::vector<std::int32_t>& tokens);
  at::Tensor forward(RowRange rows);
  void replay_greedy(std::int64_t count);

  CausalLm& model_;
  KvCache& cache_;
  std::int64_t num_tokens_;
  std::unique_ptr<Graphs> graphs_;
};

}  // namespace parallax::lm
