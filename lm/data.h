// SPDX-License-Identifier: MIT
// Batches of a dataset. Order depends on data.seed and seq_len only: every model trained with the
// same ones sees the same tokens in the same order.
#pragma once

#include <torch/torch.h>

#include <cstdint>
#include <memory>
#include <vector>

#include "lm/dataset.h"

namespace parallax::lm {

struct Batch {
  at::Tensor tokens;       // int64 [batch, seq_len], on the CPU
  at::Tensor targets;      // int64 [batch, seq_len]: the token after each
  std::int64_t bytes = 0;  // of text in the targets; loss sum / ln 2 / bytes is bits per byte
};

// The i-th of `count` in an order drawn by `seed`: a bijection of [0, count), computed without a
// table (a Feistel network that walks until it lands inside).
std::int64_t permuted_index(std::int64_t i, std::int64_t count, std::uint64_t seed);

// Training sequences: the split cut into chunks of seq_len, each epoch in an order of its own.
class BatchSampler {
 public:
  // Throws Error where the split has fewer than seq_len + 1 tokens.
  BatchSampler(std::shared_ptr<const Dataset> dataset, std::int64_t seq_len, std::uint64_t seed);

  Batch next(std::int64_t batch_size);

  // Sequences served so far; a sampler set to it goes on as this one would.
  std::int64_t cursor() const { return cursor_; }
  void seek(std::int64_t cursor) { cursor_ = cursor; }
  std::int64_t sequences_per_epoch() const { return sequences_; }

 private:
  std::shared_ptr<const Dataset> dataset_;
  std::int64_t seq_len_;
  std::uint64_t seed_;
  std::int64_t sequences_;
  std::int64_t cursor_ = 0;
  std::vector<std::int64_t> token_bytes_;
};

// The same batches every time: chunks spread evenly over the validation split, at most num_batches
// (0: the whole split); the last may be smaller. A split shorter than seq_len + 1 gives one shorter
// sequence. Throws Error where the split has fewer than two tokens.
std::vector<Batch> validation_batches(const Dataset& dataset, std::int64_t seq_len,
                                      std::int64_t batch_size, std::int64_t num_batches);

}  // namespace parallax::lm
