// SPDX-License-Identifier: MIT
// Parity with Hugging Face's tokenizers is tested in tests/python/test_tokenize.py.
#include "lm/tokenizer.h"

#include <gmock/gmock.h>

#include <nlohmann/json.hpp>
#include <random>

#include "lm/text_split.h"
#include "tests/lm/temporary_folder.h"

namespace parallax::lm {
namespace {

using nlohmann::json;
using testing::AllOf;
using testing::ElementsAre;
using testing::HasSubstr;

// UTF-8 of the character that stands for a byte in tokenizer.json.
std::string printable(int byte) {
  int character = byte;
  if (!((byte >= 0x21 && byte <= 0x7e) || (byte >= 0xa1 && byte != 0xad))) {
    character = 0x100;
    for (int b = 0; b < byte; ++b) {
      character += !((b >= 0x21 && b <= 0x7e) || (b >= 0xa1 && b != 0xad));
    }
  }
  if (character < 0x80) return {static_cast<char>(character)};
  return {static_cast<char>(0xc0 | character >> 6), static_cast<char>(0x80 | (character & 0x3f))};
}

// 256 bytes, "ab" = 256, "abc" = 257, " a" = 258, <|endoftext|> = 259.
json small_definition() {
  json vocab;
  for (int byte = 0; byte < 256; ++byte) vocab[printable(byte)] = byte;
  vocab["ab"] = 256;
  vocab["abc"] = 257;
  vocab[printable(' ') + "a"] = 258;
  return {
      {"normalizer", nullptr},
      {"pre_tokenizer", {{"type", "ByteLevel"}, {"add_prefix_space", false}, {"use_regex", true}}},
      {"model",
       {{"type", "BPE"}, {"vocab", vocab}, {"merges", {"a b", "ab c", printable(' ') + " a"}}}},
      {"added_tokens",
       {{{"id", 259}, {"content", "<|endoftext|>"}, {"special", true}, {"normalized", false}}}}};
}

std::string random_bytes(std::mt19937& random, std::size_t size) {
  std::string text(size, '\0');
  for (char& c : text) c = static_cast<char>(random());
  return text;
}

TEST(BytesTokenizer, GivesBackAnyBytes) {
  const auto tokenizer = bytes_tokenizer();
  std::string text;
  for (int byte = 0; byte < 256; ++byte) text += static_cast<char>(byte);
  const auto tokens = tokenizer->encode(text);
  EXPECT_EQ(tokens.size(), 256u);
  EXPECT_EQ(tokens[255], 255);
  EXPECT_EQ(tokenizer->decode(tokens), text);
  EXPECT_EQ(tokenizer->vocab_size(), 257);
  EXPECT_EQ(tokenizer->end_of_document(), 256);
  EXPECT_EQ(tokenizer->token_bytes(256), "");
  EXPECT_EQ(tokenizer->fingerprint(), "bytes");
  for (const int none : {-1, 257}) {
    EXPECT_THAT(error_of([&] { tokenizer->token_bytes(none); }), HasSubstr(std::to_string(none)));
  }
}

TEST(BpeTokenizer, MergesByRank) {
  const auto tokenizer = parse_tokenizer(small_definition().dump(), "small");
  EXPECT_THAT(tokenizer->encode("abc"), ElementsAre(257));
  EXPECT_THAT(tokenizer->encode("abab"), ElementsAre(256, 256));
  EXPECT_THAT(tokenizer->encode("b abc"), ElementsAre('b', ' ', 257));  // "ab" has the lower rank
  EXPECT_THAT(tokenizer->encode("b a"), ElementsAre('b', 258));
  EXPECT_THAT(tokenizer->encode("ab<|endoftext|>ab"), ElementsAre(256, 259, 256));
  EXPECT_EQ(tokenizer->end_of_document(), 259);
  EXPECT_EQ(tokenizer->vocab_size(), 260);
  EXPECT_EQ(tokenizer->decode(std::vector<std::int32_t>{257, 259, 258}), "abc a");
}

TEST(BpeTokenizer, GivesBackAnyBytes) {
  const auto tokenizer = parse_tokenizer(small_definition().dump(), "small");
  std::mt19937 random(7);
  for (int round = 0; round < 200; ++round) {
    const std::string text = random_bytes(random, random() % 300);
    ASSERT_EQ(tokenizer->decode(tokenizer->encode(text)), text);
  }
  const std::string mixed = "caf\xc3\xa9 ab\xff\xfe abc\xe2\x82 \xf0\x9f\x98\x80\r\n\t  x";
  EXPECT_EQ(tokenizer->decode(tokenizer->encode(mixed)), mixed);
}

TEST(BpeTokenizer, LongWordsTakeNoQuadraticTime) {
  const auto tokenizer = parse_tokenizer(small_definition().dump(), "small");
  const std::string word(4 << 20, 'a');
  EXPECT_EQ(tokenizer->encode(word + "b").size(), word.size());
}

TEST(BpeTokenizer, FingerprintFollowsTheDefinition) {
  json other = small_definition();
  other["model"]["merges"] = {"a b", "ab c"};
  const auto a = parse_tokenizer(small_definition().dump(), "a");
  EXPECT_EQ(a->fingerprint(), parse_tokenizer(small_definition().dump(), "b")->fingerprint());
  EXPECT_NE(a->fingerprint(), parse_tokenizer(other.dump(), "c")->fingerprint());
}

TEST(BpeTokenizer, WhatIsNotSupportedIsRefusedByName) {
  const auto refusal = [](const std::function<void(json&)>& change) {
    json definition = small_definition();
    change(definition);
    return error_of([&] { parse_tokenizer(definition.dump(), "some.json"); });
  };
  EXPECT_EQ(refusal([](json&) {}), "");
  const std::vector<std::pair<std::function<void(json&)>, std::string>> cases = {
      {[](json& d) {
         d["normalizer"] = {{"type", "Lowercase"}};
       },
       "normalizer Lowercase"},
      {[](json& d) {
         d["pre_tokenizer"] = {{"type", "Whitespace"}};
       },
       "pre_tokenizer Whitespace"},
      {[](json& d) { d["pre_tokenizer"] = nullptr; }, "\"type\""},
      {[](json& d) { d["pre_tokenizer"]["add_prefix_space"] = true; }, "add_prefix_space"},
      {[](json& d) { d["model"]["type"] = "Unigram"; }, "model Unigram"},
      {[](json& d) { d["model"]["dropout"] = 0.1; }, "dropout"},
      {[](json& d) { d["model"]["byte_fallback"] = true; }, "byte_fallback"},
      {[](json& d) { d["model"]["vocab"].erase("ab"); }, "merge of 'ab'"},
      {[](json& d) { d["model"]["vocab"].erase("z"); }, "no token for byte 122"},
      {[](json& d) { d["model"]["vocab"]["a"] = -1; }, "token id"},
      {[](json& d) { d["model"]["vocab"]["a"] = 1 << 30; }, "token id"},
      {[](json& d) { d["model"]["merges"].push_back("q q"); }, "merge of 'qq'"},
      {[](json& d) { d["model"]["merges"].push_back("qq"); }, "without a space"},
      {[](json& d) { d["model"]["merges"].push_back(3); }, "not a pair"},
      {[](json& d) { d["added_tokens"][0]["lstrip"] = true; }, "lstrip"},
      {[](json& d) { d["added_tokens"][0]["content"] = "<pad>"; }, "end of a document"},
      {[](json& d) { d["model"].erase("vocab"); }, "model.vocab"},
      {[](json& d) { d = json::array(); }, "no JSON object"},
  };
  for (const auto& [change, says] : cases) {
    EXPECT_THAT(refusal(change), AllOf(HasSubstr("some.json: "), HasSubstr(says)));
  }
  json bad_pattern = small_definition();
  bad_pattern["pre_tokenizer"] = {
      {"type", "Split"}, {"behavior", "Isolated"}, {"pattern", {{"Regex", "(a"}}}};
  EXPECT_THAT(error_of([&] { parse_tokenizer(bad_pattern.dump(), "some.json"); }),
              HasSubstr("bad regular expression"));
}

TEST(LoadTokenizer, TakesBytesFileOrFolder) {
  const TemporaryFolder folder;
  write_text(folder / "tokenizer.json", small_definition().dump());
  EXPECT_EQ(load_tokenizer("bytes")->kind(), "bytes");
  EXPECT_EQ(load_tokenizer(folder.path().string())->kind(), "bpe");
  EXPECT_EQ(load_tokenizer((folder / "tokenizer.json").string())->kind(), "bpe");
  EXPECT_THAT(error_of([] { load_tokenizer("/nowhere/tokenizer.json"); }), HasSubstr("/nowhere"));
}

TEST(TextSplit, NfcOfWhatIsValid) {
  EXPECT_EQ(normalize_nfc("e\xcc\x81"), "\xc3\xa9");
  EXPECT_EQ(normalize_nfc("\xff"
                          "e\xcc\x81\xc3"),
            "\xff\xc3\xa9\xc3");
  EXPECT_EQ(normalize_nfc(std::string_view("a\0b", 3)), std::string("a\0b", 3));
}

TEST(TextSplit, PiecesAreTheText) {
  const RegexSplitter splitter("\\p{L}+|\\s+", "test");
  std::vector<std::string_view> pieces;
  splitter.split("ab  12\xff\xffzz", pieces);
  EXPECT_THAT(pieces, ElementsAre("ab", "  ", "12\xff\xff", "zz"));
  const RegexSplitter empty_matches("x*", "test");
  pieces.clear();
  empty_matches.split("axxb", pieces);
  EXPECT_THAT(pieces, ElementsAre("a", "xx", "b"));
}

TEST(TextSplit, RunawayPatternsEndInAnError) {
  const RegexSplitter splitter("(a+)+$", "some.json");
  std::vector<std::string_view> pieces;
  EXPECT_THAT(error_of([&] { splitter.split(std::string(60, 'a') + "b", pieces); }),
              HasSubstr("some.json"));
}

}  // namespace
}  // namespace parallax::lm
