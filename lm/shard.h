// SPDX-License-Identifier: MIT
// Token shards, little-endian:
//   0   "PLXTOKEN"
//   8   u32 version (1)
//   12  u32 bytes a token (2 or 4)
//   16  u64 count of tokens
//   24  u32 bytes a block (1 MiB)
//   28  u32 CRC-32C of bytes 0-27
//   32  the tokens, unsigned
//   ..  u32 CRC-32C of each block of token bytes; the last block may be shorter
// The size of a file follows from its header and must fit. Blocks are verified when first read.
#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <span>
#include <string>

namespace parallax::lm {

inline constexpr std::int64_t kMaxShardTokens = std::int64_t{1} << 30;

class ShardWriter {
 public:
  // Throws Error where the file cannot be made.
  ShardWriter(const std::filesystem::path& path, int token_bytes);
  ~ShardWriter();  // a shard that was not finished is not valid

  void append(std::span<const std::int32_t> tokens);  // at most kMaxShardTokens in all
  std::int64_t size() const;
  // Writes checksums and header and syncs. Returns the CRC-32C of the whole table of block
  // checksums, which stands for the content.
  std::uint32_t finish();

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

// A shard mapped into memory. Reading from several threads at once is safe.
class Shard {
 public:
  // Throws Error naming the file where it cannot be read, is no shard, or has another size than its
  // header says.
  explicit Shard(const std::filesystem::path& path);
  // The same over bytes in memory, which have to outlive the shard; `name` is for messages.
  Shard(std::span<const std::byte> bytes, std::string name);
  ~Shard();

  std::int64_t size() const;
  std::uint32_t content_crc32c() const;  // as ShardWriter::finish()

  // Tokens [begin, begin + count), widened. Throws Error where a block is damaged, or a token is
  // not below vocab_size.
  void read(std::int64_t begin, std::int64_t count, std::int64_t vocab_size,
            std::int64_t* out) const;

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace parallax::lm
