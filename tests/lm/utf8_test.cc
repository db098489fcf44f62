// SPDX-License-Identifier: MIT
#include "lm/utf8.h"

#include <gtest/gtest.h>

#include <random>
#include <string>

namespace parallax::lm {
namespace {

const std::string kText = "a\u00e9\u20ac\U0001F600z";  // characters of 1, 2, 3, 4 and 1 bytes

TEST(Utf8Stream, HandsOnWholeCharactersByteByByte) {
  Utf8Stream stream;
  std::vector<std::string> pieces;
  for (char byte : kText) {
    const std::string piece = stream.push(std::string_view(&byte, 1));
    if (!piece.empty()) pieces.push_back(piece);
  }
  EXPECT_EQ(pieces, (std::vector<std::string>{"a", "\u00e9", "\u20ac", "\U0001F600", "z"}));
  EXPECT_EQ(stream.finish(), "");
}

TEST(Utf8Stream, ReplacesWhatCanBeNoCharacter) {
  EXPECT_EQ(to_utf8("a\xFFz"), "a\uFFFDz");
  EXPECT_EQ(to_utf8("\xC3("), "\uFFFD(");
  EXPECT_EQ(to_utf8("\xED\xA0\x80"), "\uFFFD\uFFFD\uFFFD");  // a surrogate
  EXPECT_EQ(to_utf8("\xE2\x82"), "\uFFFD\uFFFD");            // cut short
}

TEST(Utf8Stream, SaysAtOnceThatALoneContinuationIsWrong) {
  Utf8Stream stream;
  EXPECT_EQ(stream.push("\x80"), "\uFFFD");
  EXPECT_EQ(stream.push("\xE2"), "");
  EXPECT_EQ(stream.push("x"), "\uFFFDx");
}

TEST(Utf8Stream, AnyCutOfRandomBytesGivesTheSameValidText) {
  std::mt19937 random(1);
  for (int round = 0; round < 200; ++round) {
    std::string bytes = kText;
    for (int i = 0; i < 20; ++i) bytes.push_back(static_cast<char>(random()));
    Utf8Stream stream;
    std::string text;
    for (std::size_t at = 0; at < bytes.size();) {
      const std::size_t size = std::min<std::size_t>(1 + random() % 4, bytes.size() - at);
      text += stream.push(std::string_view(bytes).substr(at, size));
      at += size;
    }
    text += stream.finish();
    EXPECT_EQ(text, to_utf8(bytes));
    for (std::size_t at = 0; at < text.size(); at += utf8_length(text, at)) {
      ASSERT_GT(utf8_length(text, at), 0u);
    }
  }
}

}  // namespace
}  // namespace parallax::lm
