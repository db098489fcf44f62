// SPDX-License-Identifier: MIT
#include "lm/data.h"

#include <algorithm>
#include <bit>

#include "lm/checksum.h"
#include "lm/error.h"

namespace parallax::lm {
namespace {

std::vector<std::int64_t> bytes_of_tokens(const Tokenizer& tokenizer) {
  std::vector<std::int64_t> bytes(static_cast<std::size_t>(tokenizer.vocab_size()));
  for (std::size_t token = 0; token < bytes.size(); ++token) {
    if (tokenizer.has_token(static_cast<std::int32_t>(token))) {
      bytes[token] =
          static_cast<std::int64_t>(tokenizer.token_bytes(static_cast<std::int32_t>(token)).size());
    }
  }
  return bytes;
}

// One row for each begin: seq_len tokens from there on, and the token after each.
Batch make_batch(const TokenStream& stream, const std::vector<std::int64_t>& begins,
                 std::int64_t seq_len, const std::vector<std::int64_t>& token_bytes) {
  const auto rows = static_cast<std::int64_t>(begins.size());
  Batch batch{at::empty({rows, seq_len}, at::kLong), at::empty({rows, seq_len}, at::kLong), 0};
  std::vector<std::int64_t> row(static_cast<std::size_t>(seq_len) + 1);
  auto* tokens = batch.tokens.mutable_data_ptr<std::int64_t>();
  auto* targets = batch.targets.mutable_data_ptr<std::int64_t>();
  for (const std::int64_t begin : begins) {
    stream.read(begin, seq_len + 1, row.data());
    tokens = std::copy(row.begin(), row.end() - 1, tokens);
    targets = std::copy(row.begin() + 1, row.end(), targets);
    for (auto target = row.begin() + 1; target != row.end(); ++target) {
      batch.bytes += token_bytes[static_cast<std::size_t>(*target)];
    }
  }
  return batch;
}

}  // namespace

std::int64_t permuted_index(std::int64_t i, std::int64_t count, std::uint64_t seed) {
  // Two halves of as few bits as hold count; a walk leaves the square at most 4 times on average.
  const int half_bits = (std::bit_width(static_cast<std::uint64_t>(count - 1)) + 1) / 2;
  const std::uint64_t mask = (std::uint64_t{1} << half_bits) - 1;
  auto index = static_cast<std::uint64_t>(i);
  do {
    std::uint64_t left = index >> half_bits, right = index & mask;
    for (std::uint64_t round = 0; round < 4; ++round) {
      const std::uint64_t mixed = left ^ (mix64(mix64(seed + round) ^ right) & mask);
      left = right;
      right = mixed;
    }
    index = left << half_bits | right;
  } while (index >= static_cast<std::uint64_t>(count));
  return static_cast<std::int64_t>(index);
}

BatchSampler::BatchSampler(std::shared_ptr<const Dataset> dataset, std::int64_t seq_len,
                           std::uint64_t seed)
    : dataset_(std::move(dataset)),
      seq_len_(seq_len),
      seed_(seed),
      sequences_((dataset_->train.size() - 1) / seq_len),
      token_bytes_(bytes_of_tokens(*dataset_->tokenizer)) {
  if (sequences_ < 1) {
    throw Error("'" + dataset_->path.string() + "' has " + std::to_string(dataset_->train.size()) +
                " training tokens, fewer than data.seq_len + 1 = " + std::to_string(seq_len + 1) +
                ": add text or lower data.seq_len");
  }
}

Batch BatchSampler::next(std::int64_t batch_size) {
  std::vector<std::int64_t> begins;
  for (std::int64_t row = 0; row < batch_size; ++row, ++cursor_) {
    const std::int64_t epoch = cursor_ / sequences_;
    const std::uint64_t epoch_seed = mix64(seed_ + mix64(static_cast<std::uint64_t>(epoch) + 1));
    begins.push_back(permuted_index(cursor_ % sequences_, sequences_, epoch_seed) * seq_len_);
  }
  return make_batch(dataset_->train, begins, seq_len_, token_bytes_);
}

std::vector<Batch> validation_batches(const Dataset& dataset, std::int64_t seq_len,
                                      std::int64_t batch_size, std::int64_t num_batches) {
  const TokenStream& stream = dataset.val;
  if (stream.size() < 2) {
    throw Error(
        "'" + dataset.path.string() +
        "' has no validation tokens: make it again with `parallax tokenize --val-fraction`");
  }
  seq_len = std::min(seq_len, stream.size() - 1);
  const std::int64_t available = (stream.size() - 1) / seq_len;
  const std::int64_t wanted =
      num_batches == 0 ? available : std::min(available, num_batches * batch_size);
  const std::vector<std::int64_t> token_bytes = bytes_of_tokens(*dataset.tokenizer);
  std::vector<Batch> batches;
  for (std::int64_t first = 0; first < wanted; first += batch_size) {
    std::vector<std::int64_t> begins;
    for (std::int64_t i = first; i < std::min(first + batch_size, wanted); ++i) {
      begins.push_back(i * available / wanted * seq_len);
    }
    batches.push_back(make_batch(stream, begins, seq_len, token_bytes));
  }
  return batches;
}

}  // namespace parallax::lm
