// SPDX-License-Identifier: MIT
#include "lm/safetensors.h"

#include <gmock/gmock.h>
#include <torch/torch.h>

#include <random>

#include "lm/checksum.h"
#include "lm/tensor_file.h"
#include "tests/lm/temporary_folder.h"

namespace parallax::lm {
namespace {

using testing::AllOf;
using testing::HasSubstr;

std::string file_of(const std::string& header, std::size_t data_bytes = 0) {
  std::string length(8, '\0');
  for (std::size_t i = 0; i < 8; ++i) length[i] = static_cast<char>(header.size() >> (8 * i) & 255);
  return length + header + std::string(data_bytes, 'd');
}

SafetensorsHeader parse(const std::string& file) {
  return parse_safetensors(std::as_bytes(std::span(file.data(), file.size())), "some.safetensors");
}

std::string refusal(const std::string& file) {
  return error_of([&] { parse(file); });
}

TEST(Safetensors, HeaderRoundTrip) {
  std::vector<TensorEntry> written = {{"b", "F32", {2, 3}, 0, 0},
                                      {"scalar", "I64", {}, 0, 0},
                                      {"empty", "BF16", {4, 0}, 0, 0},
                                      {"a \"quoted\" name", "U8", {5}, 0, 0}};
  const std::string header = safetensors_header(written, {{"format", "pt"}});
  EXPECT_EQ(header.size() % 64, 0u);
  const SafetensorsHeader read = parse(header + std::string(24 + 8 + 5, 'd'));
  EXPECT_EQ(read.data_offset, header.size());
  EXPECT_EQ(read.metadata, (std::map<std::string, std::string>{{"format", "pt"}}));
  ASSERT_EQ(read.tensors.size(), 4u);
  EXPECT_EQ(read.tensors[0].name, "b");
  EXPECT_EQ(read.tensors[0].shape, (std::vector<std::int64_t>{2, 3}));
  EXPECT_EQ(read.tensors.back().name, "a \"quoted\" name");
  EXPECT_EQ(read.tensors.back().begin, 32u);
  EXPECT_EQ(read.tensors.back().end, 37u);
}

TEST(Safetensors, WhatIsAllowed) {
  EXPECT_TRUE(parse(file_of("{}")).tensors.empty());
  EXPECT_TRUE(parse(file_of("{}   ")).tensors.empty());
  EXPECT_EQ(parse(file_of(R"({"a":{"shape":[],"data_offsets":[0,4],"dtype":"F32"}})", 4))
                .tensors[0]
                .shape.size(),
            0u);
  EXPECT_EQ(parse(file_of(R"({"__metadata__":{}})")).metadata.size(), 0u);
}

// Header, bytes of data, and a part of the one-line refusal.
struct Hostile {
  std::string header;
  std::size_t data;
  std::string says;
};

TEST(Safetensors, HostileHeadersAreRefusedByName) {
  const std::vector<Hostile> cases = {
      {"", 0, "does not begin"},
      {"[]", 0, "does not begin"},
      {"{", 0, "bad JSON"},
      {"{}x", 0, "bad JSON"},
      {R"({"a":1})", 0, "a number"},
      {R"({"a":[[[[1]]]]})", 0, "an array"},
      {R"({"a":{"b":{"c":{}}}})", 0, "unknown key 'b'"},
      {R"({"a":{"dtype":"F32","shape":[1]}})", 4, "lacks"},
      {R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4],"x":1}})", 4, "unknown key 'x'"},
      {R"({"a":{"dtype":"F32","dtype":"F32","shape":[1],"data_offsets":[0,4]}})", 4, "twice"},
      {R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},
           "a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}})",
       8, "'a' appears twice"},
      {R"({"a":{"dtype":"F33","shape":[1],"data_offsets":[0,4]}})", 4, "unknown dtype 'F33'"},
      {R"({"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}})", 4, "a negative number"},
      {R"({"a":{"dtype":"F32","shape":[1.5],"data_offsets":[0,4]}})", 4, "a fraction"},
      {R"({"a":{"dtype":"F32","shape":[99999999999999999999],"data_offsets":[0,4]}})", 4,
       "a fraction"},
      {R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[0]}})", 4, "without two numbers"},
      {R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4,8]}})", 4, "more than two"},
      {R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}})", 8, "hole"},
      {R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[4,0]}})", 4, "hole"},
      {R"({"a":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}})", 4, "do not fit"},
      {R"({"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}})", 4, "truncated"},
      {R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}})", 5, "1 bytes after"},
      {R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},
           "b":{"dtype":"F32","shape":[1],"data_offsets":[2,6]}})",
       6, "overlaps"},
      {R"({"a":{"dtype":"F32","shape":[4611686018427387904,4],"data_offsets":[0,4]}})", 4,
       "too large a shape"},
      {R"({"a":{"dtype":"F64","shape":[4294967296,4294967296],"data_offsets":[0,0]}})", 0,
       "too large a shape"},
      {R"({"__metadata__":{"a":1}})", 0, "a number"},
      {R"({"__metadata__":{"a":"1","a":"2"}})", 0, "twice"},
  };
  for (const Hostile& hostile : cases) {
    EXPECT_THAT(refusal(file_of(hostile.header, hostile.data)),
                AllOf(HasSubstr("some.safetensors: "), HasSubstr(hostile.says)))
        << hostile.header;
  }
}

TEST(Safetensors, HostileLengthsAreRefused) {
  EXPECT_THAT(refusal("1234567"), HasSubstr("too short"));
  std::string file = file_of("{}");
  file[3] = '\x7f';
  EXPECT_THAT(refusal(file), HasSubstr("the limit is 100000000"));
  file = file_of("{}");
  file[0] = 3;
  EXPECT_THAT(refusal(file), HasSubstr("truncated inside its header"));
}

TEST(TensorFile, RoundTripOfEveryDtypeStrideAndRank) {
  const TemporaryFolder folder;
  torch::manual_seed(1);
  NamedTensors written = {{"scalar", torch::tensor(2.5)},
                          {"empty", torch::empty({3, 0, 2})},
                          {"transposed", torch::randn({3, 5}).t()},
                          {"strided", torch::randn({8, 8}).slice(1, 1, 8, 3)},
                          {"bool", torch::tensor({true, false})}};
  for (const auto type : {at::kDouble, at::kFloat, at::kHalf, at::kBFloat16, at::kLong, at::kInt,
                          at::kShort, at::kChar, at::kByte}) {
    written.emplace_back(c10::toString(type), (torch::randn({3, 7}) * 50).to(type));
  }
  const FileSeal seal = save_tensors(folder / "t.safetensors", written);
  const std::string bytes = read_text(folder / "t.safetensors");
  EXPECT_EQ(seal.bytes, bytes.size());
  EXPECT_EQ(seal.crc32c, crc32c(bytes));

  const NamedTensors read = load_tensors(folder / "t.safetensors", &seal);
  std::map<std::string, at::Tensor> by_name(read.begin(), read.end());
  ASSERT_EQ(by_name.size(), written.size());
  for (const auto& [name, tensor] : written) {
    EXPECT_EQ(by_name.at(name).scalar_type(), tensor.scalar_type()) << name;
    EXPECT_TRUE(at::equal(by_name.at(name), tensor)) << name;
  }
}

TEST(TensorFile, DamageAnywhereIsFound) {
  const TemporaryFolder folder;
  const auto path = folder / "t.safetensors";
  const FileSeal seal = save_tensors(path, {{"a", torch::randn({2, 3})}, {"b", torch::randn({4})}});
  const std::string good = read_text(path);
  for (std::size_t i = 0; i < good.size(); ++i) {
    std::string bad = good;
    bad[i] = static_cast<char>(bad[i] ^ 0x20);
    write_text(path, bad);
    ASSERT_THAT(error_of([&] { load_tensors(path, &seal); }),
                AllOf(HasSubstr(path.string()), HasSubstr("damaged")))
        << i;
    // Without the seal, it may pass as other values, but never crash.
    error_of([&] { load_tensors(path); });
    write_text(path, good.substr(0, i));
    ASSERT_THAT(error_of([&] { load_tensors(path, &seal); }), HasSubstr(path.string())) << i;
    ASSERT_NE(error_of([&] { load_tensors(path); }), "") << i;
  }
}

TEST(TensorFile, UnwritableTensorsAreRefused) {
  const TemporaryFolder folder;
  EXPECT_THAT(error_of([&] {
                save_tensors(folder / "t", {{"c", torch::zeros(1, at::kComplexFloat)}});
              }),
              HasSubstr("'c'"));
  EXPECT_THAT(error_of([&] {
                save_tensors(folder / "t", {{"a", torch::zeros(1)}, {"a", torch::zeros(1)}});
              }),
              HasSubstr("'a'"));
}

}  // namespace
}  // namespace parallax::lm
