// SPDX-License-Identifier: MIT
// From files and folders of text to a dataset folder. A document is a file. Folders are walked in
// byte order of their paths, links to folders not followed; files that hold a zero byte in their
// first 8 KiB (binary), cannot be read, or are empty are left out and counted.
//
// Held out for validation are whole documents, in the order of a hash of seed and content (so that
// copies of one document never land on both sides), until they make up val_fraction of the bytes;
// one that would take more than half of that too much is passed over. Where nothing fits because
// there are too few documents, the tail of the first in that order is held out, cut at a line's
// end. No torch in here.
#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "lm/dataset.h"
#include "lm/tokenizer.h"

namespace parallax::lm {

struct CorpusOptions {
  std::vector<std::filesystem::path> paths;
  std::vector<std::string> extensions;  // "py", "md": only such files of folders; empty: all
  std::shared_ptr<const Tokenizer> tokenizer;
  double val_fraction = 0.05;  // of bytes, from 0 (none) to 0.5
  std::int64_t seed = 0;
};

struct CorpusProgress {
  std::int64_t bytes = 0;  // tokenized
  std::int64_t total_bytes = 0;
  std::int64_t documents = 0;
  double seconds = 0;
};

struct CorpusResult {
  DatasetManifest manifest;
  std::int64_t binary = 0;  // files left out
  std::int64_t unreadable = 0;
  std::int64_t empty = 0;
  bool tail_held_out = false;  // a part of one document instead of whole ones
};

// Writes the dataset to `out`, which must not exist (or be an empty folder); it appears whole or
// not at all. Throws Error: a path that does not exist, no text in any, a failed write.
CorpusResult tokenize_corpus(const CorpusOptions& options, const std::filesystem::path& out,
                             const std::function<void(const CorpusProgress&)>& on_progress);

}  // namespace parallax::lm
