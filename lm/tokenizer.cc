// SPDX-License-Identifier: MIT
#include "lm/tokenizer.h"

#include <array>
#include <filesystem>

#include "lm/bpe.h"
#include "lm/checksum.h"
#include "lm/error.h"
#include "lm/files.h"

namespace parallax::lm {
namespace {

constexpr std::uint64_t kMaxDefinitionBytes = 256 << 20;

class BytesTokenizer : public Tokenizer {
 public:
  BytesTokenizer() {
    for (std::size_t i = 0; i < bytes_.size(); ++i) bytes_[i] = static_cast<char>(i);
  }

  std::vector<std::int32_t> encode(std::string_view text) const override {
    std::vector<std::int32_t> tokens(text.size());
    for (std::size_t i = 0; i < text.size(); ++i) tokens[i] = static_cast<unsigned char>(text[i]);
    return tokens;
  }

  std::string_view token_bytes(std::int32_t token) const override {
    if (token == kEndOfDocument) return {};
    if (!has_token(token)) {
      throw Error("token " + std::to_string(token) + " is none of the bytes tokenizer (0 to 256)");
    }
    return {bytes_.data() + token, 1};
  }

  std::int32_t vocab_size() const override { return kEndOfDocument + 1; }
  bool has_token(std::int32_t token) const override { return token >= 0 && token < vocab_size(); }
  std::int32_t end_of_document() const override { return kEndOfDocument; }
  const std::string& kind() const override { return kind_; }
  const std::string& definition() const override { return definition_; }

 private:
  static constexpr std::int32_t kEndOfDocument = 256;

  std::array<char, 256> bytes_;
  std::string kind_ = "bytes";
  std::string definition_;
};

}  // namespace

std::string Tokenizer::decode(std::span<const std::int32_t> tokens) const {
  std::string text;
  for (const std::int32_t token : tokens) text += token_bytes(token);
  return text;
}

std::string Tokenizer::fingerprint() const {
  return definition().empty() ? kind() : kind() + "-" + hex(hash64(definition()), 16);
}

std::shared_ptr<const Tokenizer> bytes_tokenizer() { return std::make_shared<BytesTokenizer>(); }

std::shared_ptr<const Tokenizer> parse_tokenizer(std::string definition, const std::string& name) {
  return parse_bpe_tokenizer(std::move(definition), name);
}

std::shared_ptr<const Tokenizer> load_tokenizer(const std::string& bytes_or_path) {
  if (bytes_or_path == "bytes") return bytes_tokenizer();
  std::filesystem::path path = bytes_or_path;
  if (std::filesystem::is_directory(path)) path /= "tokenizer.json";
  return parse_tokenizer(read_file(path, kMaxDefinitionBytes), path.string());
}

}  // namespace parallax::lm
