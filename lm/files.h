// SPDX-License-Identifier: MIT
// Files that survive what days bring: every write is checked, what has been finished is on the
// disk, folders appear whole or not at all. Every failure is an Error naming the path and the
// reason.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <span>
#include <string>
#include <string_view>

namespace parallax::lm {

namespace fs = std::filesystem;

// A new file (an old one is replaced), written front to back.
class OutputFile {
 public:
  explicit OutputFile(const fs::path& path);
  ~OutputFile();  // closes, finished or not
  OutputFile(const OutputFile&) = delete;
  OutputFile& operator=(const OutputFile&) = delete;

  void write(std::span<const std::byte> bytes);
  void write(std::string_view bytes);
  void write_at(std::uint64_t offset, std::string_view bytes);  // not part of size() and crc32c()
  void finish();  // returns when all of it is on the disk

  std::uint64_t size() const { return size_; }
  std::uint32_t crc32c() const { return crc_; }  // of what write() was given

 private:
  fs::path path_;
  int fd_ = -1;
  std::uint64_t size_ = 0;
  std::uint32_t crc_ = 0;
};

// A file's bytes, mapped for reading. Movable, not copyable.
class MappedFile {
 public:
  explicit MappedFile(const fs::path& path);
  ~MappedFile();
  MappedFile(MappedFile&& other) noexcept;
  MappedFile& operator=(MappedFile&&) = delete;

  std::span<const std::byte> bytes() const { return bytes_; }
  std::string_view text() const {
    return {reinterpret_cast<const char*>(bytes_.data()), bytes_.size()};
  }

 private:
  std::span<const std::byte> bytes_;
};

// The whole of a file that must not be larger than max_bytes.
std::string read_file(const fs::path& path, std::uint64_t max_bytes);

// Replaces a file in one rename.
void write_file(const fs::path& path, std::string_view content);

// A folder under a temporary name beside its final one. commit() syncs it and renames it; one that
// is there already is exchanged in the same instant and then deleted. Without commit() it goes.
class StagedFolder {
 public:
  explicit StagedFolder(const fs::path& final_path);
  ~StagedFolder();
  StagedFolder(const StagedFolder&) = delete;
  StagedFolder& operator=(const StagedFolder&) = delete;

  const fs::path& path() const { return path_; }
  void commit();

 private:
  fs::path final_path_;
  fs::path path_;
  bool committed_ = false;
};

// Deletes a folder so that a reader sees it whole or not at all.
void remove_folder(const fs::path& path);

// Deletes what processes that were killed have left of staged and removed folders in `parent`. Only
// while nobody else writes there.
void remove_leftovers(const fs::path& parent);

// Creates the folder and its parents where they are missing, and syncs the entry.
void make_folder(const fs::path& path);

// Holds FOLDER/.lock for this process. Throws Error where another process holds it.
class FolderLock {
 public:
  explicit FolderLock(const fs::path& folder);
  ~FolderLock();
  FolderLock(const FolderLock&) = delete;
  FolderLock& operator=(const FolderLock&) = delete;

 private:
  int fd_ = -1;
};

// Throws Error("cannot ACTION PATH: REASON"), the reason from errno, with what helps against it.
[[noreturn]] void throw_file_error(const std::string& action, const fs::path& path, int error);

}  // namespace parallax::lm
