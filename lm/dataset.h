// SPDX-License-Identifier: MIT
// A dataset folder, as `parallax tokenize` writes it: dataset.json, token shards (shard.h) of a
// training and a validation split, and tokenizer.json where the tokenizer is BPE. No torch in here.
#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <string>
#include <vector>

#include "lm/shard.h"
#include "lm/tokenizer.h"

namespace parallax::lm {

// The tokens of a split as one long stream over its shards; documents end with end_of_document().
class TokenStream {
 public:
  TokenStream() = default;
  TokenStream(std::vector<std::shared_ptr<const Shard>> shards, std::int64_t documents,
              std::int64_t bytes);

  std::int64_t size() const { return ends_.empty() ? 0 : ends_.back(); }  // tokens
  std::int64_t documents() const { return documents_; }
  std::int64_t bytes() const { return bytes_; }  // of text

  // Tokens [begin, begin + count) into `out`. Throws Error where a shard's checksum does not fit.
  void read(std::int64_t begin, std::int64_t count, std::int64_t* out) const;

 private:
  std::vector<std::shared_ptr<const Shard>> shards_;
  std::vector<std::int64_t> ends_;  // of each shard in the stream
  std::int64_t documents_ = 0;
  std::int64_t bytes_ = 0;
};

struct Dataset {
  std::filesystem::path path;
  std::shared_ptr<const Tokenizer> tokenizer;
  TokenStream train;
  TokenStream val;
  std::string fingerprint;  // of tokenizer and tokens: equal means the same data

  // Throws Error naming the file that is missing, damaged or does not fit the others.
  static std::shared_ptr<const Dataset> open(const std::filesystem::path& path);
};

}  // namespace parallax::lm
