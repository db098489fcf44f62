// SPDX-License-Identifier: MIT
#include "lm/corpus.h"

#include <gmock/gmock.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <csignal>
#include <random>

#include "lm/dataset.h"
#include "lm/files.h"
#include "tests/lm/temporary_folder.h"

namespace parallax::lm {
namespace {

using testing::AllOf;
using testing::HasSubstr;

std::string random_text(std::mt19937& random, std::size_t size) {
  std::string text(size, ' ');
  for (char& c : text) c = random() % 30 == 0 ? '\n' : static_cast<char>('a' + random() % 26);
  return text;
}

void write_documents(const std::filesystem::path& folder, int count, std::size_t bytes) {
  std::mt19937 random(3);
  for (int i = 0; i < count; ++i) {
    write_text(folder / ("part" + std::to_string(i % 3)) / (std::to_string(i) + ".txt"),
               random_text(random, bytes / 2 + random() % bytes));
  }
}

CorpusResult tokenize(const std::filesystem::path& text, const std::filesystem::path& out,
                      const std::function<void(CorpusOptions&)>& change = {}) {
  CorpusOptions options;
  options.paths = {text};
  options.tokenizer = bytes_tokenizer();
  if (change) change(options);
  return tokenize_corpus(options, out, {});
}

std::string text_of(const Dataset& dataset, const TokenStream& stream) {
  std::vector<std::int64_t> tokens(static_cast<std::size_t>(stream.size()));
  stream.read(0, stream.size(), tokens.data());
  std::string text;
  for (const std::int64_t token : tokens) {
    text += token == dataset.tokenizer->end_of_document() ? '\0' : static_cast<char>(token);
  }
  return text;
}

TEST(Corpus, EveryDocumentIsThereOnce) {
  const TemporaryFolder folder;
  write_documents(folder / "text", 60, 2000);
  const CorpusResult result = tokenize(folder / "text", folder / "data");
  const auto dataset = Dataset::open(folder / "data");
  const std::string all = text_of(*dataset, dataset->train) + text_of(*dataset, dataset->val);

  std::int64_t bytes = 0;
  for (const auto& entry : fs::recursive_directory_iterator(folder / "text")) {
    if (!entry.is_regular_file()) continue;
    const std::string text = read_text(entry.path());
    bytes += static_cast<std::int64_t>(text.size());
    const std::size_t at = all.find(text + '\0');
    ASSERT_NE(at, std::string::npos);
    ASSERT_TRUE(at == 0 || all[at - 1] == '\0');
  }
  EXPECT_EQ(dataset->train.bytes() + dataset->val.bytes(), bytes);
  EXPECT_EQ(dataset->train.documents() + dataset->val.documents(), 60);
  EXPECT_EQ(static_cast<std::int64_t>(all.size()), bytes + 60);
  EXPECT_NEAR(static_cast<double>(dataset->val.bytes()) / static_cast<double>(bytes), 0.05, 0.025);
  EXPECT_FALSE(result.tail_held_out);
}

TEST(Corpus, SameTextSameDatasetWhereverItLies) {
  const TemporaryFolder folder;
  write_documents(folder / "text", 30, 500);
  fs::copy(folder / "text", folder / "elsewhere", fs::copy_options::recursive);
  tokenize(folder / "text", folder / "a");
  tokenize(folder / "elsewhere", folder / "b");
  tokenize(folder / "text", folder / "c", [](CorpusOptions& options) { options.seed = 1; });
  const auto a = Dataset::open(folder / "a");
  EXPECT_EQ(a->fingerprint, Dataset::open(folder / "b")->fingerprint);
  EXPECT_NE(a->fingerprint, Dataset::open(folder / "c")->fingerprint);
  for (const char* file : {"dataset.json", "train-00000.tokens", "val-00000.tokens"}) {
    EXPECT_EQ(read_text(folder / "a" / file), read_text(folder / "b" / file)) << file;
  }
}

TEST(Corpus, CopiesOfADocumentNeverLandOnBothSides) {
  const TemporaryFolder folder;
  write_documents(folder / "text", 20, 400);
  fs::copy(folder / "text" / "part0", folder / "text" / "copy", fs::copy_options::recursive);
  for (int seed = 0; seed < 10; ++seed) {
    const auto out = folder / ("data" + std::to_string(seed));
    tokenize(folder / "text", out, [&](CorpusOptions& options) {
      options.seed = seed;
      options.val_fraction = 0.3;
    });
    const auto dataset = Dataset::open(out);
    const std::string val = text_of(*dataset, dataset->val);
    const std::string train = text_of(*dataset, dataset->train);
    for (std::size_t begin = 0; begin < val.size();) {
      const std::size_t end = val.find('\0', begin);
      ASSERT_EQ(train.find(val.substr(begin, end - begin)), std::string::npos);
      begin = end + 1;
    }
  }
}

TEST(Corpus, OneDocumentGivesItsTailCutAtALine) {
  const TemporaryFolder folder;
  std::mt19937 random(5);
  const std::string text = random_text(random, 100000);
  write_text(folder / "one.txt", text);
  EXPECT_TRUE(tokenize(folder / "one.txt", folder / "data").tail_held_out);
  const auto dataset = Dataset::open(folder / "data");
  EXPECT_NEAR(static_cast<double>(dataset->val.bytes()), 5000, 500);
  std::string train = text_of(*dataset, dataset->train);
  train.pop_back();
  EXPECT_EQ(train.back(), '\n');
  std::string val = text_of(*dataset, dataset->val);
  val.pop_back();
  EXPECT_EQ(train + val, text);
}

TEST(Corpus, LeavesOutWhatIsNoTextAndCountsIt) {
  const TemporaryFolder folder;
  write_documents(folder / "text", 20, 300);
  write_text(folder / "text" / "binary.txt", std::string("a\0b", 3));
  write_text(folder / "text" / "empty.txt", "");
  write_text(folder / "text" / "other.md", "left out by its extension");
  fs::create_directory_symlink(folder / "text", folder / "text" / "loop");
  const CorpusResult result =
      tokenize(folder / "text", folder / "data",
               [](CorpusOptions& options) { options.extensions = {"txt"}; });
  EXPECT_EQ(result.manifest.train.documents + result.manifest.val.documents, 20);
  EXPECT_EQ(result.binary, 1);
  EXPECT_EQ(result.empty, 1);
}

TEST(Corpus, MissingAndEmptyTextAreErrorsThatLeaveNothing) {
  const TemporaryFolder folder;
  fs::create_directory(folder / "nothing");
  EXPECT_THAT(error_of([&] { tokenize(folder / "missing", folder / "data"); }),
              HasSubstr("no file or folder '" + (folder / "missing").string()));
  EXPECT_THAT(error_of([&] { tokenize(folder / "nothing", folder / "data"); }),
              HasSubstr("no text in '" + (folder / "nothing").string()));
  write_text(folder / "text.txt", "some text");
  write_text(folder / "taken" / "file", "x");
  EXPECT_THAT(error_of([&] { tokenize(folder / "text.txt", folder / "taken"); }),
              HasSubstr("exists already"));
  EXPECT_FALSE(fs::exists(folder / "data"));
  EXPECT_EQ(read_text(folder / "taken" / "file"), "x");
}

TEST(Corpus, AFullDiskIsAnErrorThatLeavesNothing) {
  const TemporaryFolder folder;
  write_documents(folder / "text", 20, 20000);
  const pid_t child = ::fork();
  if (child == 0) {
    std::signal(SIGXFSZ, SIG_IGN);
    const rlimit limit = {100000, 100000};
    ::setrlimit(RLIMIT_FSIZE, &limit);
    const std::string message = error_of([&] { tokenize(folder / "text", folder / "data"); });
    const bool clear = message.find("train-00000.tokens: File too large") != std::string::npos;
    ::_exit(clear ? 0 : 1);
  }
  int status = -1;
  ::waitpid(child, &status, 0);
  EXPECT_EQ(status, 0);
  EXPECT_EQ(std::distance(fs::directory_iterator(folder.path()), {}), 1);  // the text
}

TEST(Dataset, DamageAtAnyByteOfAnyFileIsFound) {
  const TemporaryFolder folder;
  write_documents(folder / "text", 8, 60);
  tokenize(folder / "text", folder / "data", [](CorpusOptions& o) { o.val_fraction = 0.3; });
  const auto read_all = [&] {
    const auto dataset = Dataset::open(folder / "data");
    text_of(*dataset, dataset->train);
    text_of(*dataset, dataset->val);
  };
  EXPECT_EQ(error_of(read_all), "");
  for (const char* file : {"dataset.json", "train-00000.tokens", "val-00000.tokens"}) {
    const auto path = folder / "data" / file;
    const std::string good = read_text(path);
    for (std::size_t i = 0; i < good.size(); ++i) {
      std::string bad = good;
      bad[i] = static_cast<char>(bad[i] ^ 1);
      write_text(path, bad);
      ASSERT_THAT(error_of(read_all), HasSubstr(path.string())) << "byte " << i;
      write_text(path, good.substr(0, i));
      ASSERT_THAT(error_of(read_all), HasSubstr(path.string())) << "truncated to " << i;
    }
    write_text(path, good + "x");
    ASSERT_THAT(error_of(read_all), HasSubstr(path.string()));
    write_text(path, good);
  }
  fs::remove(folder / "data" / "val-00000.tokens");
  EXPECT_THAT(error_of(read_all), HasSubstr("val-00000.tokens"));
  fs::remove(folder / "data" / "dataset.json");
  EXPECT_THAT(error_of(read_all), HasSubstr("parallax tokenize"));
}

TEST(Shard, BlocksOfSeveralMebibytesAndBothWidths) {
  const TemporaryFolder folder;
  for (const int width : {2, 4}) {
    const auto path = folder / std::to_string(width);
    ShardWriter writer(path, width);
    std::vector<std::int32_t> tokens(3'000'000);
    for (std::size_t i = 0; i < tokens.size(); ++i) {
      tokens[i] = static_cast<std::int32_t>((i * 2654435761u) % (width == 2 ? 65536 : 200000));
    }
    writer.append(std::span(tokens).first(1'234'567));
    writer.append(std::span(tokens).subspan(1'234'567));
    const std::uint32_t crc = writer.finish();
    const Shard shard(path);
    EXPECT_EQ(shard.size(), 3'000'000);
    EXPECT_EQ(shard.content_crc32c(), crc);
    std::vector<std::int64_t> read(1'500'000);
    shard.read(1'000'000, 1'500'000, 200000, read.data());
    EXPECT_TRUE(std::equal(read.begin(), read.end(), tokens.begin() + 1'000'000));
    EXPECT_THAT(error_of([&] { shard.read(0, 1000, 10, read.data()); }),
                HasSubstr("the vocabulary has 10"));
    // Damage in one block leaves the others readable.
    std::string bytes = read_text(path);
    bytes[32 + 5] = static_cast<char>(bytes[32 + 5] ^ 1);
    write_text(path, bytes);
    const Shard damaged(path);
    EXPECT_THAT(error_of([&] { damaged.read(0, 1, 200000, read.data()); }),
                AllOf(HasSubstr(path.string()), HasSubstr("between bytes 32 and 1048608")));
    EXPECT_EQ(error_of([&] { damaged.read(1'000'000, 10, 200000, read.data()); }), "");
  }
}

}  // namespace
}  // namespace parallax::lm
