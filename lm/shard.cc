// SPDX-License-Identifier: MIT
#include "lm/shard.h"

#include <algorithm>
#include <atomic>
#include <bit>
#include <cstring>
#include <optional>
#include <vector>

#include "lm/checksum.h"
#include "lm/error.h"
#include "lm/files.h"

namespace parallax::lm {
namespace {

static_assert(std::endian::native == std::endian::little, "shards are read as they lie");

constexpr char kMagic[8] = {'P', 'L', 'X', 'T', 'O', 'K', 'E', 'N'};
constexpr std::uint32_t kVersion = 1;
constexpr std::uint32_t kBlockBytes = 1 << 20;

struct Header {
  char magic[8];
  std::uint32_t version;
  std::uint32_t token_bytes;
  std::uint64_t tokens;
  std::uint32_t block_bytes;
  std::uint32_t crc;  // of the fields above
};
static_assert(sizeof(Header) == 32);

std::string_view as_text(const void* data, std::size_t size) {
  return {static_cast<const char*>(data), size};
}

std::uint32_t header_crc(const Header& header) {
  return crc32c(as_text(&header, offsetof(Header, crc)));
}

std::uint64_t block_count(std::uint64_t bytes) { return (bytes + kBlockBytes - 1) / kBlockBytes; }

}  // namespace

struct ShardWriter::Impl {
  explicit Impl(const std::filesystem::path& path) : file(path) {}

  void flush() {
    if (block.empty()) return;
    file.write(block);
    block_crcs.push_back(crc32c(block));
    block.clear();
  }

  OutputFile file;
  std::uint32_t token_bytes = 0;
  std::int64_t tokens = 0;
  std::string block;  // not written yet, at most kBlockBytes
  std::vector<std::uint32_t> block_crcs;
};

ShardWriter::ShardWriter(const std::filesystem::path& path, int token_bytes)
    : impl_(std::make_unique<Impl>(path)) {
  impl_->token_bytes = static_cast<std::uint32_t>(token_bytes);
  impl_->file.write(std::string(sizeof(Header), '\0'));  // finish() puts the header here
  impl_->block.reserve(kBlockBytes);
}

ShardWriter::~ShardWriter() = default;

void ShardWriter::append(std::span<const std::int32_t> tokens) {
  for (const std::int32_t token : tokens) {
    impl_->block.append(reinterpret_cast<const char*>(&token), impl_->token_bytes);
    if (impl_->block.size() == kBlockBytes) impl_->flush();
  }
  impl_->tokens += static_cast<std::int64_t>(tokens.size());
}

std::int64_t ShardWriter::size() const { return impl_->tokens; }

std::uint32_t ShardWriter::finish() {
  impl_->flush();
  const std::string_view table =
      as_text(impl_->block_crcs.data(), impl_->block_crcs.size() * sizeof(std::uint32_t));
  impl_->file.write(table);
  Header header = {.magic = {},
                   .version = kVersion,
                   .token_bytes = impl_->token_bytes,
                   .tokens = static_cast<std::uint64_t>(impl_->tokens),
                   .block_bytes = kBlockBytes,
                   .crc = 0};
  std::memcpy(header.magic, kMagic, sizeof kMagic);
  header.crc = header_crc(header);
  impl_->file.write_at(0, as_text(&header, sizeof header));
  impl_->file.finish();
  return crc32c(table);
}

struct Shard::Impl {
  Impl(std::span<const std::byte> whole, std::string file_name) : name(std::move(file_name)) {
    if (whole.size() < sizeof header) throw Error(name + ": too short for a token shard");
    std::memcpy(&header, whole.data(), sizeof header);
    check_header(whole.size());
    const std::uint64_t token_area = header.tokens * header.token_bytes;
    data = whole.subspan(sizeof header, token_area);
    block_crcs = whole.subspan(sizeof header + token_area);
    verified = std::make_unique<std::atomic<bool>[]>(block_count(token_area));
  }

  void check_header(std::uint64_t file_bytes) const {
    if (std::memcmp(header.magic, kMagic, sizeof kMagic) != 0) {
      throw Error(name + ": not a token shard (make one with `parallax tokenize`)");
    }
    if (header.crc != header_crc(header)) throw Error(name + ": damaged header" + fix());
    if (header.version != kVersion || header.block_bytes != kBlockBytes ||
        (header.token_bytes != 2 && header.token_bytes != 4) ||
        header.tokens > static_cast<std::uint64_t>(kMaxShardTokens)) {
      throw Error(name + ": a token shard of an unknown version" + fix());
    }
    const std::uint64_t token_area = header.tokens * header.token_bytes;
    const std::uint64_t expected =
        sizeof header + token_area + block_count(token_area) * sizeof(std::uint32_t);
    if (file_bytes != expected) {
      throw Error(name + ": " + std::to_string(file_bytes) + " bytes instead of " +
                  std::to_string(expected) + fix());
    }
  }

  // Two threads may verify a block at once; both come to the same answer.
  void verify(std::uint64_t block) const {
    if (verified[block].load(std::memory_order_acquire)) return;
    const std::uint64_t begin = block * kBlockBytes;
    const auto bytes =
        data.subspan(begin, std::min<std::uint64_t>(kBlockBytes, data.size() - begin));
    std::uint32_t expected;
    std::memcpy(&expected, block_crcs.data() + block * sizeof expected, sizeof expected);
    if (crc32c(bytes) != expected) {
      throw Error(name + ": damaged between bytes " + std::to_string(sizeof header + begin) +
                  " and " + std::to_string(sizeof header + begin + bytes.size()) + fix());
    }
    verified[block].store(true, std::memory_order_release);
  }

  static std::string fix() { return "; make the dataset again with `parallax tokenize`"; }

  std::optional<MappedFile> file;
  std::string name;
  Header header;
  std::span<const std::byte> data;        // the tokens
  std::span<const std::byte> block_crcs;  // u32 a block
  std::unique_ptr<std::atomic<bool>[]> verified;
};

Shard::Shard(const std::filesystem::path& path) {
  MappedFile file(path);
  impl_ = std::make_unique<Impl>(file.bytes(), path.string());
  impl_->file.emplace(std::move(file));
}

Shard::Shard(std::span<const std::byte> bytes, std::string name)
    : impl_(std::make_unique<Impl>(bytes, std::move(name))) {}

Shard::~Shard() = default;

std::int64_t Shard::size() const { return static_cast<std::int64_t>(impl_->header.tokens); }

std::uint32_t Shard::content_crc32c() const { return crc32c(impl_->block_crcs); }

void Shard::read(std::int64_t begin, std::int64_t count, std::int64_t vocab_size,
                 std::int64_t* out) const {
  if (count == 0) return;
  const std::uint64_t width = impl_->header.token_bytes;
  const std::uint64_t first = static_cast<std::uint64_t>(begin) * width;
  const std::uint64_t last = first + static_cast<std::uint64_t>(count) * width - 1;
  for (std::uint64_t block = first / kBlockBytes; block <= last / kBlockBytes; ++block) {
    impl_->verify(block);
  }
  const std::byte* bytes = impl_->data.data() + first;
  for (std::int64_t i = 0; i < count; ++i, bytes += width) {
    std::uint32_t token = 0;
    std::memcpy(&token, bytes, width);
    out[i] = token;
    if (out[i] >= vocab_size) {
      throw Error(impl_->name + ": token " + std::to_string(token) + " at position " +
                  std::to_string(begin + i) + ", but the vocabulary has " +
                  std::to_string(vocab_size) + Impl::fix());
    }
  }
}

}  // namespace parallax::lm
