// SPDX-License-Identifier: MIT
#include "lm/files.h"

#include <fcntl.h>
#include <linux/fs.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstring>
#include <utility>

#include "lm/checksum.h"
#include "lm/error.h"

namespace parallax::lm {
namespace {

constexpr const char* kStagedPrefix = ".staged-";

// Closes a descriptor on every way out of a scope.
struct Descriptor {
  int fd;
  ~Descriptor() {
    if (fd >= 0) ::close(fd);
  }
};

std::string advice(int error) {
  switch (error) {
    case ENOSPC:
    case EDQUOT:
      return " (free some space, then go on)";
    case EFBIG:
      return " (raise the file size limit, see ulimit -f)";
    case EACCES:
    case EPERM:
    case EROFS:
      return " (choose a folder that you may write to)";
    default:
      return "";
  }
}

void write_all(int fd, const std::byte* data, std::size_t size, const fs::path& path) {
  while (size > 0) {
    const ssize_t written = ::write(fd, data, size);
    if (written < 0 && errno == EINTR) continue;
    if (written < 0) throw_file_error("write", path, errno);
    data += written;
    size -= static_cast<std::size_t>(written);
  }
}

fs::path parent_of(const fs::path& path) {
  const fs::path parent = path.parent_path();
  return parent.empty() ? fs::path(".") : parent;
}

void sync_folder(const fs::path& path) {
  const Descriptor folder{::open(path.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC)};
  if (folder.fd < 0) throw_file_error("open folder", path, errno);
  // Some file systems cannot sync a folder (EINVAL); they order renames themselves.
  if (::fsync(folder.fd) != 0 && errno != EINVAL) throw_file_error("sync", path, errno);
}

fs::path staged_name(const fs::path& path) {
  return parent_of(path) /
         (kStagedPrefix + std::to_string(::getpid()) + "-" + path.filename().string());
}

fs::path without_trailing_slash(const fs::path& path) {
  return path.has_filename() ? path : path.parent_path();
}

}  // namespace

void throw_file_error(const std::string& action, const fs::path& path, int error) {
  throw Error("cannot " + action + " " + path.string() + ": " + std::strerror(error) +
              advice(error));
}

OutputFile::OutputFile(const fs::path& path) : path_(path) {
  fd_ = ::open(path.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
  if (fd_ < 0) throw_file_error("create", path, errno);
}

OutputFile::~OutputFile() {
  if (fd_ >= 0) ::close(fd_);
}

void OutputFile::write(std::span<const std::byte> bytes) {
  write_all(fd_, bytes.data(), bytes.size(), path_);
  size_ += bytes.size();
  crc_ = lm::crc32c(bytes, crc_);
}

void OutputFile::write(std::string_view bytes) {
  write(std::as_bytes(std::span(bytes.data(), bytes.size())));
}

void OutputFile::write_at(std::uint64_t offset, std::string_view bytes) {
  while (!bytes.empty()) {
    const ssize_t written = ::pwrite(fd_, bytes.data(), bytes.size(), static_cast<off_t>(offset));
    if (written < 0 && errno == EINTR) continue;
    if (written < 0) throw_file_error("write", path_, errno);
    bytes.remove_prefix(static_cast<std::size_t>(written));
    offset += static_cast<std::uint64_t>(written);
  }
}

void OutputFile::finish() {
  if (::fsync(fd_) != 0) throw_file_error("sync", path_, errno);
  if (::close(std::exchange(fd_, -1)) != 0) throw_file_error("close", path_, errno);
}

MappedFile::MappedFile(const fs::path& path) {
  const Descriptor file{::open(path.c_str(), O_RDONLY | O_CLOEXEC)};
  if (file.fd < 0) throw_file_error("open", path, errno);
  struct stat info;
  if (::fstat(file.fd, &info) != 0) throw_file_error("read", path, errno);
  if (!S_ISREG(info.st_mode)) throw Error("cannot read " + path.string() + ": not a file");
  if (info.st_size == 0) return;
  const auto size = static_cast<std::size_t>(info.st_size);
  void* data = ::mmap(nullptr, size, PROT_READ, MAP_PRIVATE, file.fd, 0);
  if (data == MAP_FAILED) throw_file_error("map", path, errno);
  bytes_ = {static_cast<const std::byte*>(data), size};
}

MappedFile::~MappedFile() {
  if (!bytes_.empty()) ::munmap(const_cast<std::byte*>(bytes_.data()), bytes_.size());
}

MappedFile::MappedFile(MappedFile&& other) noexcept : bytes_(std::exchange(other.bytes_, {})) {}

std::string read_file(const fs::path& path, std::uint64_t max_bytes) {
  const Descriptor file{::open(path.c_str(), O_RDONLY | O_CLOEXEC)};
  if (file.fd < 0) throw_file_error("open", path, errno);
  std::string content;
  char buffer[1 << 16];
  while (true) {
    const ssize_t got = ::read(file.fd, buffer, sizeof buffer);
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) throw_file_error("read", path, errno);
    if (got == 0) return content;
    content.append(buffer, static_cast<std::size_t>(got));
    if (content.size() > max_bytes) {
      throw Error(path.string() + " is larger than " + std::to_string(max_bytes) +
                  " bytes, the limit for such a file");
    }
  }
}

void write_file(const fs::path& path, std::string_view content) {
  const fs::path staged = staged_name(path);
  try {
    OutputFile file(staged);
    file.write(content);
    file.finish();
    if (::rename(staged.c_str(), path.c_str()) != 0) throw_file_error("write", path, errno);
  } catch (...) {
    ::unlink(staged.c_str());
    throw;
  }
  sync_folder(parent_of(path));
}

StagedFolder::StagedFolder(const fs::path& final_path)
    : final_path_(without_trailing_slash(final_path)), path_(staged_name(final_path_)) {
  std::error_code ignored;
  fs::remove_all(path_, ignored);
  if (::mkdir(path_.c_str(), 0755) != 0) throw_file_error("create", path_, errno);
}

StagedFolder::~StagedFolder() {
  std::error_code ignored;
  if (!committed_) fs::remove_all(path_, ignored);
}

void StagedFolder::commit() {
  sync_folder(path_);
  const bool replaces = fs::exists(final_path_);
  if (::renameat2(AT_FDCWD, path_.c_str(), AT_FDCWD, final_path_.c_str(),
                  replaces ? RENAME_EXCHANGE : 0) != 0) {
    throw_file_error("rename " + path_.string() + " to", final_path_, errno);
  }
  committed_ = true;
  sync_folder(parent_of(final_path_));
  if (replaces) {
    std::error_code ignored;
    fs::remove_all(path_, ignored);
  }
}

void remove_folder(const fs::path& path) {
  const fs::path going = staged_name(path);
  if (::rename(path.c_str(), going.c_str()) != 0) throw_file_error("delete", path, errno);
  std::error_code error;
  fs::remove_all(going, error);
  if (error) throw_file_error("delete", going, error.value());
}

void remove_leftovers(const fs::path& parent) {
  std::error_code ignored;
  for (const auto& entry : fs::directory_iterator(parent, ignored)) {
    if (entry.path().filename().string().starts_with(kStagedPrefix)) {
      fs::remove_all(entry.path(), ignored);
    }
  }
}

void make_folder(const fs::path& path) {
  std::error_code error;
  const fs::path clean = without_trailing_slash(path);
  const bool created = fs::create_directories(clean, error);
  if (error) throw_file_error("create folder", clean, error.value());
  if (created) sync_folder(parent_of(clean));
}

FolderLock::FolderLock(const fs::path& folder) {
  const fs::path path = folder / ".lock";
  fd_ = ::open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0644);
  if (fd_ < 0) throw_file_error("create", path, errno);
  if (::flock(fd_, LOCK_EX | LOCK_NB) == 0) {
    // The owner's id is for the other's message; the lock itself is the kernel's, gone with us.
    const std::string owner = std::to_string(::getpid()) + "\n";
    if (::ftruncate(fd_, 0) == 0 && ::pwrite(fd_, owner.data(), owner.size(), 0) > 0) return;
    const int error = errno;
    ::close(std::exchange(fd_, -1));
    throw_file_error("write", path, error);
  }
  const int error = errno;
  char owner[32] = {};
  const bool known = ::pread(fd_, owner, sizeof owner - 1, 0) > 0;
  ::close(std::exchange(fd_, -1));
  if (error != EWOULDBLOCK) throw_file_error("lock", path, error);
  owner[std::strcspn(owner, "\n")] = 0;
  throw Error(folder.string() + " is in use by " +
              (known ? "process " + std::string(owner) : "another process") +
              ": wait for it to end, or choose another folder");
}

FolderLock::~FolderLock() {
  if (fd_ >= 0) ::close(fd_);
}

}  // namespace parallax::lm
