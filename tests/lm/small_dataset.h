// SPDX-License-Identifier: MIT
// A dataset and a model small enough to train for many steps within a test.
#pragma once

#include <filesystem>
#include <random>
#include <string>

#include "lm/config.h"
#include "lm/corpus.h"
#include "tests/lm/temporary_folder.h"

namespace parallax::lm {

// `documents` texts of about `bytes` bytes, tokenized as bytes into `out`.
inline void make_small_dataset(const std::filesystem::path& out, int documents = 20,
                               std::size_t bytes = 600) {
  const TemporaryFolder text;
  std::mt19937 random(11);
  for (int i = 0; i < documents; ++i) {
    std::string content;
    while (content.size() < bytes) content += "word" + std::to_string(random() % 50) + ' ';
    write_text(text / (std::to_string(i) + ".txt"), content);
  }
  CorpusOptions options;
  options.paths = {text.path()};
  options.tokenizer = bytes_tokenizer();
  options.val_fraction = 0.1;
  tokenize_corpus(options, out, {});
}

inline Config small_config(const std::filesystem::path& dataset) {
  Config config;
  config.model.hidden_size = 16;
  config.model.num_layers = 1;
  config.model.num_q_heads = 2;
  config.model.num_kv_heads = 1;
  config.model.head_dim = 8;
  config.model.ffn_size = 32;
  config.data.path = dataset.string();
  config.data.seq_len = 16;
  config.train.steps = 12;
  config.train.batch_size = 2;
  config.train.accumulate = 2;
  config.train.device = "cpu";
  config.train.eval_every = 5;
  config.train.eval_batches = 2;
  config.train.checkpoint_every = 4;
  config.train.keep_last = 3;
  config.train.log_every = 3;
  return config;
}

}  // namespace parallax::lm
