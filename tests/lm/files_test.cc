// SPDX-License-Identifier: MIT
#include "lm/files.h"

#include <gmock/gmock.h>
#include <sys/wait.h>
#include <unistd.h>

#include <random>

#include "lm/checksum.h"
#include "tests/lm/temporary_folder.h"

namespace parallax::lm {
namespace {

using testing::AllOf;
using testing::HasSubstr;

// The law, a bit at a time.
std::uint32_t slow_crc32c(std::string_view bytes) {
  std::uint32_t crc = 0xffffffff;
  for (const unsigned char byte : bytes) {
    crc ^= byte;
    for (int bit = 0; bit < 8; ++bit) crc = (crc >> 1) ^ (crc & 1 ? 0x82f63b78u : 0u);
  }
  return ~crc;
}

TEST(Checksum, CrcIsThePublishedOne) {
  EXPECT_EQ(crc32c("123456789"), 0xe3069283u);  // the check value of CRC-32C
  EXPECT_EQ(crc32c(""), 0u);
}

TEST(Checksum, CrcAgreesWithTheLawAtAnyLengthAndInAnyParts) {
  std::mt19937 random(1);
  std::string bytes;
  for (int size = 0; size < 200; ++size, bytes += static_cast<char>(random())) {
    ASSERT_EQ(crc32c(bytes), slow_crc32c(bytes)) << size;
    const std::string_view text = bytes;
    const std::size_t cut = random() % (bytes.size() + 1);
    ASSERT_EQ(crc32c(text.substr(cut), crc32c(text.substr(0, cut))), crc32c(text));
  }
}

TEST(Checksum, HashTellsEveryBitAndSeedApart) {
  const std::string text = "to be, or not to be";
  EXPECT_NE(hash64(text, 1), hash64(text, 2));
  for (std::size_t bit = 0; bit < 8 * text.size(); ++bit) {
    std::string other = text;
    other[bit / 8] = static_cast<char>(other[bit / 8] ^ (1 << bit % 8));
    EXPECT_NE(hash64(other), hash64(text));
  }
  EXPECT_NE(hash64(std::string(1, '\0')), hash64(std::string(2, '\0')));
}

TEST(Files, WriteErrorsNameTheFileAndTheReason) {
  const std::string full = error_of([] {
    OutputFile file("/dev/full");
    file.write("text");
  });
  EXPECT_THAT(full, AllOf(HasSubstr("/dev/full"), HasSubstr("No space left"), HasSubstr("free")));
  EXPECT_THAT(error_of([] { OutputFile file("/nowhere/file"); }),
              AllOf(HasSubstr("/nowhere/file"), HasSubstr("No such file")));
  EXPECT_THAT(error_of([] { MappedFile file("/nowhere/file"); }), HasSubstr("/nowhere/file"));
}

TEST(Files, WriteFileReplacesAndLeavesNothingElse) {
  const TemporaryFolder folder;
  write_file(folder / "a", "one");
  write_file(folder / "a", "two");
  EXPECT_EQ(read_text(folder / "a"), "two");
  EXPECT_EQ(std::distance(fs::directory_iterator(folder.path()), {}), 1);
}

TEST(Files, ReadFileRefusesMoreThanItsLimit) {
  const TemporaryFolder folder;
  write_file(folder / "a", std::string(100000, 'x'));
  EXPECT_EQ(read_file(folder / "a", 100000).size(), 100000u);
  EXPECT_THAT(error_of([&] { read_file(folder / "a", 99999); }), HasSubstr("larger than 99999"));
}

TEST(Files, StagedFolderAppearsWholeOrNotAtAll) {
  const TemporaryFolder folder;
  {
    StagedFolder staged(folder / "data");
    write_text(staged.path() / "file", "dropped");
    EXPECT_FALSE(fs::exists(folder / "data"));
  }
  EXPECT_TRUE(fs::is_empty(folder.path()));
  for (const std::string text : {"first", "second"}) {  // the second replaces the first
    StagedFolder staged(folder / "data/");
    write_text(staged.path() / "file", text);
    staged.commit();
    EXPECT_EQ(read_text(folder / "data" / "file"), text);
  }
  EXPECT_EQ(std::distance(fs::directory_iterator(folder.path()), {}), 1);
}

TEST(Files, LeftoversOfKilledProcessesGo) {
  const TemporaryFolder folder;
  const pid_t child = ::fork();
  if (child == 0) {
    StagedFolder staged(folder / "data");
    ::_exit(0);  // as if killed: no destructor
  }
  ::waitpid(child, nullptr, 0);
  EXPECT_FALSE(fs::is_empty(folder.path()));
  remove_leftovers(folder.path());
  EXPECT_TRUE(fs::is_empty(folder.path()));
}

TEST(Files, LockKeepsOthersOutUntilItGoes) {
  const TemporaryFolder folder;
  {
    const FolderLock lock(folder.path());
    EXPECT_THAT(error_of([&] { FolderLock second(folder.path()); }),
                AllOf(HasSubstr(folder.path().string()),
                      HasSubstr("in use by process " + std::to_string(::getpid()))));
  }
  EXPECT_EQ(error_of([&] { FolderLock again(folder.path()); }), "");
}

}  // namespace
}  // namespace parallax::lm
