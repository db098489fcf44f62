// SPDX-License-Identifier: MIT
// A dataset folder, as `parallax tokenize` writes it: dataset.json (a manifest under a checksum of
// its own), token shards (shard.h) of a training and a validation split, and tokenizer.json where
// the tokenizer is BPE. No torch in here.
#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "lm/shard.h"
#include "lm/tokenizer.h"

namespace parallax::lm {

struct ShardRecord {
  std::string file;  // name inside the folder
  std::int64_t tokens = 0;
  std::uint32_t crc32c = 0;  // Shard::content_crc32c()
};

struct SplitRecord {
  std::int64_t tokens = 0;
  std::int64_t documents = 0;
  std::int64_t bytes = 0;  // of text
  std::vector<ShardRecord> shards;
};

// dataset.json
struct DatasetManifest {
  std::string tokenizer;  // Tokenizer::fingerprint()
  std::int64_t vocab_size = 0;
  std::int64_t seed = 0;  // of the choice of held-out documents
  double val_fraction = 0;
  SplitRecord train;
  SplitRecord val;

  // Of tokenizer and tokens: equal means the same data.
  std::string fingerprint() const;
};

std::string to_json(const DatasetManifest& manifest);

// Throws Error naming `name` where the text is damaged or contradicts itself.
DatasetManifest parse_dataset_manifest(std::string_view text, const std::string& name);

// The tokens of a split as one long stream over its shards; documents end with end_of_document().
// A copy shares the mapped files.
class TokenStream {
 public:
  TokenStream() = default;
  TokenStream(const std::filesystem::path& folder, const SplitRecord& record,
              std::int64_t vocab_size);

  std::int64_t size() const { return ends_.empty() ? 0 : ends_.back(); }  // tokens
  std::int64_t documents() const { return documents_; }
  std::int64_t bytes() const { return bytes_; }  // of text

  // Tokens [begin, begin + count) into `out`. Throws Error where a shard turns out to be damaged.
  void read(std::int64_t begin, std::int64_t count, std::int64_t* out) const;

 private:
  std::vector<std::shared_ptr<const Shard>> shards_;
  std::vector<std::int64_t> ends_;  // of each shard in the stream
  std::int64_t vocab_size_ = 0;
  std::int64_t documents_ = 0;
  std::int64_t bytes_ = 0;
};

struct Dataset {
  std::filesystem::path path;
  std::shared_ptr<const Tokenizer> tokenizer;
  TokenStream train;
  TokenStream val;
  std::string fingerprint;

  // Throws Error naming the file that is missing, damaged or does not fit the others.
  static std::shared_ptr<const Dataset> open(const std::filesystem::path& path);
};

}  // namespace parallax::lm
