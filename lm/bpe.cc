// SPDX-License-Identifier: MIT
#include "lm/bpe.h"

#include <algorithm>
#include <array>
#include <limits>
#include <nlohmann/json.hpp>
#include <optional>
#include <queue>
#include <unordered_map>

#include "lm/error.h"
#include "lm/text_split.h"

namespace parallax::lm {
namespace {

using Json = nlohmann::json;

constexpr std::int64_t kMaxTokens = 1 << 22;
constexpr const char* kGpt2Pattern =
    "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+";
// Names that model families give to the token between documents, in order of preference.
constexpr const char* kEndNames[] = {"<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>",
                                     "<|eos|>"};

// Byte-level BPE writes a byte as a printable character: itself where it is one in Latin-1, else
// the next free character from U+0100 on (https://github.com/openai/gpt-2).
std::array<char32_t, 256> printable_alphabet() {
  std::array<char32_t, 256> alphabet{};
  char32_t next = 0x100;
  for (char32_t byte = 0; byte < 256; ++byte) {
    const bool printable = (byte >= 0x21 && byte <= 0x7e) || (byte >= 0xa1 && byte != 0xad);
    alphabet[byte] = printable ? byte : next++;
  }
  return alphabet;
}

// The bytes that a vocabulary entry stands for; an entry with any other character is taken as it
// is.
std::string bytes_of_entry(const std::string& entry) {
  static const std::unordered_map<char32_t, char> kByteOf = [] {
    std::unordered_map<char32_t, char> map;
    const auto alphabet = printable_alphabet();
    for (std::size_t byte = 0; byte < 256; ++byte) map[alphabet[byte]] = static_cast<char>(byte);
    return map;
  }();
  std::string bytes;
  for (std::size_t i = 0; i < entry.size();) {
    const auto lead = static_cast<unsigned char>(entry[i]);
    char32_t character = lead;
    std::size_t size = 1;
    if (lead >= 0xc0 && lead < 0xe0 && i + 1 < entry.size()) {  // the alphabet ends below U+0800
      character = (lead & 0x1fu) << 6 | (static_cast<unsigned char>(entry[i + 1]) & 0x3fu);
      size = 2;
    }
    const auto found = kByteOf.find(character);
    if (found == kByteOf.end()) return entry;
    bytes += found->second;
    i += size;
  }
  return bytes;
}

struct Merge {
  std::int32_t rank;
  std::int32_t result;
};
using MergeTable = std::unordered_map<std::uint64_t, Merge>;

std::uint64_t pair_key(std::int32_t left, std::int32_t right) {
  return static_cast<std::uint64_t>(left) << 32 | static_cast<std::uint32_t>(right);
}

// Applies merges to a word of one token a byte: always the lowest rank, the leftmost of equals. A
// heap of candidate pairs over a linked list keeps long words at n log n.
void merge_word(std::vector<std::int32_t>& tokens, const MergeTable& merges) {
  struct Candidate {
    std::int32_t rank;
    std::size_t left;
    std::int32_t left_token, right_token, result;
    bool operator>(const Candidate& other) const {
      return rank != other.rank ? rank > other.rank : left > other.left;
    }
  };
  constexpr std::int32_t kGone = -1;
  const std::size_t size = tokens.size();
  std::vector<std::size_t> next(size), previous(size);
  for (std::size_t i = 0; i < size; ++i) next[i] = i + 1, previous[i] = i - 1;

  std::priority_queue<Candidate, std::vector<Candidate>, std::greater<>> queue;
  const auto consider = [&](std::size_t left) {
    const std::size_t right = next[left];
    if (right >= size) return;
    const auto found = merges.find(pair_key(tokens[left], tokens[right]));
    if (found == merges.end()) return;
    queue.push({found->second.rank, left, tokens[left], tokens[right], found->second.result});
  };
  for (std::size_t i = 0; i + 1 < size; ++i) consider(i);
  while (!queue.empty()) {
    const Candidate best = queue.top();
    queue.pop();
    const std::size_t right = next[best.left];
    if (tokens[best.left] != best.left_token || right >= size ||
        tokens[right] != best.right_token) {
      continue;  // one of the two has been merged meanwhile
    }
    tokens[best.left] = best.result;
    tokens[right] = kGone;
    next[best.left] = next[right];
    if (next[right] < size) previous[next[right]] = best.left;
    consider(best.left);
    if (best.left > 0) consider(previous[best.left]);
  }
  tokens.erase(std::remove(tokens.begin(), tokens.end(), kGone), tokens.end());
}

class BpeTokenizer : public Tokenizer {
 public:
  explicit BpeTokenizer(std::string definition) : definition_(std::move(definition)) {}

  std::vector<std::int32_t> encode(std::string_view text) const override {
    std::vector<std::int32_t> tokens;
    for_each_stretch(raw_added_, text, tokens, [&](std::string_view stretch) {
      const std::string normalized = nfc_ ? normalize_nfc(stretch) : std::string(stretch);
      for_each_stretch(normalized_added_, normalized, tokens,
                       [&](std::string_view plain) { encode_plain(plain, tokens); });
    });
    return tokens;
  }

  std::string_view token_bytes(std::int32_t token) const override {
    if (token == end_of_document_) return {};
    if (!has_token(token)) {
      throw Error("token " + std::to_string(token) + " is not in the tokenizer's vocabulary");
    }
    return *bytes_[static_cast<std::size_t>(token)];
  }

  std::int32_t vocab_size() const override { return static_cast<std::int32_t>(bytes_.size()); }
  bool has_token(std::int32_t token) const override {
    return token >= 0 && token < vocab_size() && bytes_[static_cast<std::size_t>(token)];
  }
  std::int32_t end_of_document() const override { return end_of_document_; }
  const std::string& kind() const override { return kind_; }
  const std::string& definition() const override { return definition_; }

 private:
  friend class DefinitionReader;

  // Calls plain(stretch) for what lies between added tokens and appends those.
  template <typename Plain>
  static void for_each_stretch(const LiteralFinder& added, std::string_view text,
                               std::vector<std::int32_t>& tokens, Plain plain) {
    std::size_t begin = 0;
    while (!added.empty()) {
      const LiteralFinder::Match match = added.find(text, begin);
      if (match.begin == std::string_view::npos) break;
      if (match.begin > begin) plain(text.substr(begin, match.begin - begin));
      tokens.push_back(match.id);
      begin = match.begin + match.size;
    }
    if (begin < text.size()) plain(text.substr(begin));
  }

  void encode_plain(std::string_view text, std::vector<std::int32_t>& tokens) const {
    std::vector<std::string_view> pieces = {text};
    for (const RegexSplitter& splitter : splitters_) {
      std::vector<std::string_view> finer;
      for (const std::string_view piece : pieces) splitter.split(piece, finer);
      pieces = std::move(finer);
    }
    std::unordered_map<std::string_view, std::vector<std::int32_t>> known;  // words come again
    for (const std::string_view piece : pieces) {
      auto [word, is_new] = known.try_emplace(piece);
      if (is_new) word->second = encode_word(piece);
      tokens.insert(tokens.end(), word->second.begin(), word->second.end());
    }
  }

  std::vector<std::int32_t> encode_word(std::string_view word) const {
    if (ignore_merges_) {
      const auto whole = whole_words_.find(std::string(word));
      if (whole != whole_words_.end()) return {whole->second};
    }
    std::vector<std::int32_t> tokens;
    for (const char c : word) tokens.push_back(byte_tokens_[static_cast<unsigned char>(c)]);
    merge_word(tokens, merges_);
    return tokens;
  }

  std::string kind_ = "bpe";
  std::string definition_;
  std::vector<std::optional<std::string>> bytes_;  // by id
  std::array<std::int32_t, 256> byte_tokens_{};
  MergeTable merges_;
  bool ignore_merges_ = false;
  std::unordered_map<std::string, std::int32_t> whole_words_;  // only where ignore_merges_
  bool nfc_ = false;
  LiteralFinder raw_added_;         // found in the text as it is
  LiteralFinder normalized_added_;  // found after normalization
  std::vector<RegexSplitter> splitters_;
  std::int32_t end_of_document_ = -1;
};

// Builds a tokenizer from tokenizer.json and refuses by name what it does not know.
class DefinitionReader {
 public:
  DefinitionReader(BpeTokenizer& out, const std::string& name) : out_(out), name_(name) {}

  void read(const Json& root) {
    read_normalizer(member(root, "normalizer"));
    read_pre_tokenizer(member(root, "pre_tokenizer"));
    if (!byte_level_) refuse("pre_tokenizer without ByteLevel");
    read_model(member(root, "model"));
    read_added_tokens(member(root, "added_tokens"));
    find_end_of_document();
  }

 private:
  [[noreturn]] void refuse(const std::string& what) const {
    throw Error(name_ + ": " + what +
                " (only byte-level BPE in Hugging Face's format is supported)");
  }

  static const Json& member(const Json& object, const char* key) {
    static const Json kNull;
    if (!object.is_object()) return kNull;
    const auto found = object.find(key);
    return found == object.end() ? kNull : *found;
  }

  std::string text(const Json& object, const char* key) const {
    const Json& value = member(object, key);
    if (!value.is_string()) refuse(std::string("no \"") + key + "\" where a string belongs");
    return value.get<std::string>();
  }

  static bool is_true(const Json& value) { return value.is_boolean() && value.get<bool>(); }

  std::int32_t token_id(const Json& value) const {
    if (!value.is_number_unsigned() || value.get<std::uint64_t>() >= kMaxTokens) {
      refuse("a token id that is not an integer from 0 to " + std::to_string(kMaxTokens - 1));
    }
    return value.get<std::int32_t>();
  }

  void read_normalizer(const Json& normalizer) {
    if (normalizer.is_null()) return;
    const std::string type = text(normalizer, "type");
    if (type == "NFC") {
      out_.nfc_ = true;
    } else if (type == "Sequence") {
      for (const Json& part : member(normalizer, "normalizers")) {
        if (text(part, "type") == "Sequence") refuse("a normalizer Sequence in a Sequence");
        read_normalizer(part);
      }
    } else {
      refuse("normalizer " + type);
    }
  }

  void read_pre_tokenizer(const Json& pre_tokenizer) {
    const std::string type = text(pre_tokenizer, "type");
    if (byte_level_) refuse("a pre_tokenizer after ByteLevel");
    if (type == "Sequence") {
      for (const Json& part : member(pre_tokenizer, "pretokenizers")) {
        if (text(part, "type") == "Sequence") refuse("a pre_tokenizer Sequence in a Sequence");
        read_pre_tokenizer(part);
      }
    } else if (type == "Split") {
      read_split(pre_tokenizer);
    } else if (type == "ByteLevel") {
      if (is_true(member(pre_tokenizer, "add_prefix_space"))) refuse("ByteLevel add_prefix_space");
      const Json& use_regex = member(pre_tokenizer, "use_regex");
      if (use_regex.is_null() || is_true(use_regex))
        out_.splitters_.emplace_back(kGpt2Pattern, name_);
      byte_level_ = true;
    } else {
      refuse("pre_tokenizer " + type);
    }
  }

  void read_split(const Json& split) {
    if (text(split, "behavior") != "Isolated" || is_true(member(split, "invert"))) {
      refuse("Split that is not Isolated, or is inverted");
    }
    const Json& pattern = member(split, "pattern");
    if (member(pattern, "Regex").is_string()) {
      out_.splitters_.emplace_back(text(pattern, "Regex"), name_);
    } else {
      out_.splitters_.emplace_back(quoted(text(pattern, "String")), name_);
    }
  }

  // A pattern that matches the text itself.
  static std::string quoted(const std::string& literal) {
    std::string pattern;
    for (const char c : literal) {
      if (static_cast<unsigned char>(c) < 0x80 && !std::isalnum(static_cast<unsigned char>(c))) {
        pattern += '\\';
      }
      pattern += c;
    }
    return pattern;
  }

  void read_model(const Json& model) {
    const Json& type = member(model, "type");
    if (!type.is_null() && text(model, "type") != "BPE") refuse("model " + text(model, "type"));
    for (const char* key : {"dropout", "continuing_subword_prefix", "end_of_word_suffix"}) {
      const Json& value = member(model, key);
      if (!value.is_null() && value != "" && value != 0.0) refuse(std::string("model ") + key);
    }
    if (is_true(member(model, "byte_fallback"))) refuse("model byte_fallback");
    out_.ignore_merges_ = is_true(member(model, "ignore_merges"));
    read_vocab(member(model, "vocab"));
    read_merges(member(model, "merges"));
  }

  void set_bytes(std::int32_t id, std::string bytes) {
    const auto index = static_cast<std::size_t>(id);
    if (index >= out_.bytes_.size()) out_.bytes_.resize(index + 1);
    out_.bytes_[index] = std::move(bytes);
  }

  void read_vocab(const Json& vocab) {
    if (!vocab.is_object()) refuse("no model.vocab");
    out_.byte_tokens_.fill(-1);
    for (const auto& [entry, value] : vocab.items()) {
      const std::int32_t id = token_id(value);
      const std::string bytes = bytes_of_entry(entry);
      if (bytes.size() == 1) out_.byte_tokens_[static_cast<unsigned char>(bytes[0])] = id;
      if (out_.ignore_merges_) out_.whole_words_[bytes] = id;
      ids_[entry] = id;
      set_bytes(id, bytes);
    }
    for (std::size_t byte = 0; byte < 256; ++byte) {
      if (out_.byte_tokens_[byte] < 0) {
        refuse("no token for byte " + std::to_string(byte) +
               ": train it with the whole byte alphabet");
      }
    }
  }

  void read_merges(const Json& merges) {
    if (!merges.is_array()) refuse("no model.merges");
    std::int32_t rank = 0;
    for (const Json& merge : merges) {
      std::string left, right;
      if (merge.is_array() && merge.size() == 2 && merge[0].is_string() && merge[1].is_string()) {
        left = merge[0].get<std::string>();
        right = merge[1].get<std::string>();
      } else if (merge.is_string()) {
        const std::string both = merge.get<std::string>();
        const std::size_t space = both.find(' ');
        if (space == std::string::npos) refuse("merge '" + both + "' without a space");
        left = both.substr(0, space);
        right = both.substr(space + 1);
      } else {
        refuse("a merge that is not a pair");
      }
      const auto key = pair_key(id_of(left), id_of(right));
      out_.merges_.try_emplace(key, Merge{rank++, id_of(left + right)});
    }
  }

  std::int32_t id_of(const std::string& entry) const {
    const auto found = ids_.find(entry);
    if (found == ids_.end()) refuse("merge of '" + entry + "', which is not in the vocabulary");
    return found->second;
  }

  void read_added_tokens(const Json& added_tokens) {
    if (!added_tokens.is_null() && !added_tokens.is_array())
      refuse("added_tokens that are no list");
    for (const Json& added : added_tokens) {
      const std::string content = text(added, "content");
      for (const char* flag : {"single_word", "lstrip", "rstrip"}) {
        if (is_true(member(added, flag))) refuse("added token '" + content + "' with " + flag);
      }
      if (content.empty()) refuse("an empty added token");
      const std::int32_t id = token_id(member(added, "id"));
      const bool normalized = is_true(member(added, "normalized"));
      (normalized ? out_.normalized_added_ : out_.raw_added_)
          .add(normalized && out_.nfc_ ? normalize_nfc(content) : content, id);
      set_bytes(id, content);
      added_[content] = id;
    }
  }

  void find_end_of_document() {
    for (const char* end : kEndNames) {
      const auto found = added_.find(end);
      if (found == added_.end()) continue;
      out_.end_of_document_ = found->second;
      return;
    }
    refuse("no token for the end of a document: add <|endoftext|> as a special token");
  }

  BpeTokenizer& out_;
  const std::string& name_;
  bool byte_level_ = false;
  std::unordered_map<std::string, std::int32_t> ids_;
  std::unordered_map<std::string, std::int32_t> added_;
};

}  // namespace

std::shared_ptr<const Tokenizer> parse_bpe_tokenizer(std::string definition,
                                                     const std::string& name) {
  const Json root = Json::parse(definition, nullptr, false);
  if (!root.is_object()) throw Error(name + ": not a tokenizer.json (it is no JSON object)");
  auto tokenizer = std::make_shared<BpeTokenizer>(std::move(definition));
  DefinitionReader(*tokenizer, name).read(root);
  return tokenizer;
}

}  // namespace parallax::lm
