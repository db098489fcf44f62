// SPDX-License-Identifier: MIT
// Text to tokens and back. Two kinds: `bytes` (a token a byte, 256 ends a document) and byte-level
// BPE read from a Hugging Face tokenizer.json. Both take any bytes, UTF-8 or not, and give them
// back (BPE after the file's own NFC normalization, where it asks for one). No torch in here.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace parallax::lm {

class Tokenizer {
 public:
  virtual ~Tokenizer() = default;

  // No token is added at either end; BPE reads special tokens out of the text, as Hugging Face
  // does.
  virtual std::vector<std::int32_t> encode(std::string_view text) const = 0;

  // The bytes of a token; the end of a document has none. Throws Error for an id that is none.
  virtual std::string_view token_bytes(std::int32_t token) const = 0;

  virtual std::int32_t vocab_size() const = 0;           // one more than the largest id
  virtual bool has_token(std::int32_t token) const = 0;  // ids may have gaps
  virtual std::int32_t end_of_document() const = 0;

  // "bytes", or "bpe" with the text of its tokenizer.json as definition(); bytes has none.
  virtual const std::string& kind() const = 0;
  virtual const std::string& definition() const = 0;

  // decode(a + b) = decode(a) + decode(b): a stream may print each token as it comes, though a
  // character can be spread over several.
  std::string decode(std::span<const std::int32_t> tokens) const;

  // Two tokenizers with the same fingerprint give the same tokens: "bytes", "bpe-0123456789abcdef".
  std::string fingerprint() const;
};

std::shared_ptr<const Tokenizer> bytes_tokenizer();

// From the text of a tokenizer.json; `name` stands for it in messages. Throws Error naming the
// first part that is not byte-level BPE or not supported.
std::shared_ptr<const Tokenizer> parse_tokenizer(std::string definition, const std::string& name);

// "bytes", or the path of a tokenizer.json (or of a folder that holds one).
std::shared_ptr<const Tokenizer> load_tokenizer(const std::string& bytes_or_path);

}  // namespace parallax::lm
