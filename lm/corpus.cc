// SPDX-License-Identifier: MIT
#include "lm/corpus.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <map>
#include <optional>

#include "lm/checksum.h"
#include "lm/error.h"
#include "lm/files.h"

namespace parallax::lm {
namespace {

constexpr std::size_t kBinaryProbeBytes = 8 << 10;
constexpr std::int64_t kShardTokens = std::int64_t{1} << 28;
// Text is encoded in parts of about this size, cut behind a line's end, so that memory stays small.
constexpr std::size_t kPartBytes = 8 << 20;
constexpr double kOvershoot = 1.5;

struct Document {
  fs::path path;
  std::int64_t bytes = 0;
  std::uint64_t hash = 0;
  std::int64_t train_bytes = 0;  // the rest is held out
};

class FileList {
 public:
  explicit FileList(const CorpusOptions& options) : options_(options) {
    for (const fs::path& path : options.paths) add(path);
  }

  std::vector<fs::path> files;
  std::int64_t unreadable = 0;

 private:
  void add(const fs::path& path) {
    std::error_code error;
    const fs::file_status status = fs::status(path, error);
    if (status.type() == fs::file_type::not_found) {
      throw Error("no file or folder '" + path.string() + "': name text that exists");
    }
    if (fs::is_directory(status)) {
      add_folder(path);
    } else if (fs::is_regular_file(status)) {
      files.push_back(path);
    } else {
      throw Error("'" + path.string() + "' is neither a file nor a folder: name text");
    }
  }

  void add_folder(const fs::path& folder) {
    std::error_code error;
    std::vector<fs::directory_entry> entries;
    for (fs::directory_iterator it(folder, error), end; !error && it != end; it.increment(error)) {
      entries.push_back(*it);
    }
    if (error) ++unreadable;
    std::sort(entries.begin(), entries.end(),
              [](const auto& a, const auto& b) { return a.path().native() < b.path().native(); });
    for (const fs::directory_entry& entry : entries) {
      if (entry.is_directory(error) && !entry.is_symlink(error)) {
        add_folder(entry.path());
      } else if (entry.is_regular_file(error) && wanted(entry.path())) {
        files.push_back(entry.path());
      }
    }
  }

  bool wanted(const fs::path& path) const {
    const auto& extensions = options_.extensions;
    const std::string extension = path.extension().string();
    return extensions.empty() ||
           std::any_of(extensions.begin(), extensions.end(), [&](const std::string& e) {
             return extension == (e.starts_with('.') ? e : "." + e);
           });
  }

  const CorpusOptions& options_;
};

// Looks at every file once: what is text, how long, which hash.
std::vector<Document> find_documents(const CorpusOptions& options, CorpusResult& result) {
  FileList list(options);
  result.unreadable = list.unreadable;
  std::vector<Document> documents;
  for (const fs::path& path : list.files) {
    try {
      const MappedFile file(path);
      const std::string_view text = file.text();
      if (text.empty()) {
        ++result.empty;
      } else if (text.substr(0, kBinaryProbeBytes).find('\0') != std::string_view::npos) {
        ++result.binary;
      } else {
        const auto bytes = static_cast<std::int64_t>(text.size());
        const auto seed = static_cast<std::uint64_t>(options.seed);
        documents.push_back({path, bytes, hash64(text, seed), bytes});
      }
    } catch (const Error&) {
      ++result.unreadable;
    }
  }
  if (documents.empty()) {
    throw Error("no text in '" + options.paths.front().string() + "' (" +
                std::to_string(result.binary) + " binary, " + std::to_string(result.unreadable) +
                " unreadable, " + std::to_string(result.empty) +
                " empty files left out): name a file or folder of text");
  }
  return documents;
}

std::size_t cut_at_line(std::string_view text, std::size_t wanted) {
  const std::size_t newline = text.rfind('\n', wanted == 0 ? 0 : wanted - 1);
  return newline == std::string_view::npos || newline == 0 ? wanted : newline + 1;
}

// Sets train_bytes of each document. Returns whether only a tail could be held out.
bool hold_out(std::vector<Document>& documents, double fraction) {
  double total = 0;
  for (const Document& document : documents) total += static_cast<double>(document.bytes);
  const double target = total * fraction;
  if (target < 1) return false;

  std::map<std::uint64_t, std::vector<Document*>> by_hash;
  for (Document& document : documents) by_hash[document.hash].push_back(&document);
  double held = 0;
  for (const auto& [hash, copies] : by_hash) {
    const double bytes =
        static_cast<double>(copies.front()->bytes) * static_cast<double>(copies.size());
    if (held + bytes > kOvershoot * target) continue;
    for (Document* copy : copies) copy->train_bytes = 0;
    held += bytes;
    if (held >= target) return false;
  }
  if (held >= target / 2) return false;

  // Too few documents: every one that was left is larger than what is to be held out.
  for (const auto& [hash, copies] : by_hash) {
    Document& document = *copies.front();
    if (copies.size() > 1 || document.train_bytes == 0) continue;
    const MappedFile file(document.path);
    const auto keep =
        static_cast<std::size_t>(static_cast<double>(document.bytes) - (target - held));
    document.train_bytes =
        static_cast<std::int64_t>(cut_at_line(file.text(), std::min(keep, file.text().size())));
    return true;
  }
  return false;
}

// One split: shards that are opened as they are needed.
class SplitWriter {
 public:
  SplitWriter(const fs::path& folder, std::string name, const Tokenizer& tokenizer)
      : folder_(folder), name_(std::move(name)), tokenizer_(tokenizer) {}

  void add_part(std::string_view text) { append(tokenizer_.encode(text)); }

  void end_document(std::int64_t bytes) {
    append({tokenizer_.end_of_document()});
    record_.bytes += bytes;
    ++record_.documents;
  }

  SplitRecord finish() {
    close_shard();
    return std::move(record_);
  }

 private:
  void append(const std::vector<std::int32_t>& tokens) {
    std::span<const std::int32_t> rest = tokens;
    while (!rest.empty()) {
      if (!writer_) open_shard();
      const auto room = static_cast<std::size_t>(kShardTokens - writer_->size());
      writer_->append(rest.first(std::min(room, rest.size())));
      rest = rest.subspan(std::min(room, rest.size()));
      if (writer_->size() == kShardTokens) close_shard();
    }
  }

  void open_shard() {
    std::string number = std::to_string(record_.shards.size());
    number.insert(0, 5 - std::min<std::size_t>(5, number.size()), '0');
    record_.shards.push_back({name_ + "-" + number + ".tokens", 0, 0});
    const int width = tokenizer_.vocab_size() <= 1 << 16 ? 2 : 4;
    writer_.emplace(folder_ / record_.shards.back().file, width);
  }

  void close_shard() {
    if (!writer_) return;
    record_.shards.back().tokens = writer_->size();
    record_.shards.back().crc32c = writer_->finish();
    record_.tokens += writer_->size();
    writer_.reset();
  }

  const fs::path& folder_;
  std::string name_;
  const Tokenizer& tokenizer_;
  SplitRecord record_;
  std::optional<ShardWriter> writer_;
};

// Encodes the documents in order, reporting after every part.
class Writer {
 public:
  Writer(const fs::path& folder, const Tokenizer& tokenizer,
         const std::function<void(const CorpusProgress&)>& on_progress)
      : train_(folder, "train", tokenizer),
        val_(folder, "val", tokenizer),
        on_progress_(on_progress) {}

  void write(const std::vector<Document>& documents, std::int64_t seed) {
    for (const Document& document : documents) progress_.total_bytes += document.bytes;
    for (const Document& document : documents) {
      const MappedFile file(document.path);
      if (hash64(file.text(), static_cast<std::uint64_t>(seed)) != document.hash) {
        throw Error(document.path.string() + " changed while it was being read: try again");
      }
      const auto cut = static_cast<std::size_t>(document.train_bytes);
      add(train_, file.text().substr(0, cut));
      add(val_, file.text().substr(cut));
      ++progress_.documents;
    }
    report();
  }

  SplitRecord finish_train() { return train_.finish(); }
  SplitRecord finish_val() { return val_.finish(); }

 private:
  void add(SplitWriter& split, std::string_view text) {
    if (text.empty()) return;
    const auto bytes = static_cast<std::int64_t>(text.size());
    while (!text.empty()) {
      const std::size_t size =
          text.size() <= kPartBytes ? text.size() : cut_at_line(text, kPartBytes);
      split.add_part(text.substr(0, size));
      text.remove_prefix(size);
      progress_.bytes += static_cast<std::int64_t>(size);
      report();
    }
    split.end_document(bytes);
  }

  void report() {
    if (!on_progress_) return;
    progress_.seconds =
        std::chrono::duration<double>(std::chrono::steady_clock::now() - start_).count();
    on_progress_(progress_);
  }

  SplitWriter train_;
  SplitWriter val_;
  const std::function<void(const CorpusProgress&)>& on_progress_;
  CorpusProgress progress_;
  std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now();
};

void check_options(const CorpusOptions& options, const fs::path& out) {
  if (!(options.val_fraction >= 0 && options.val_fraction <= 0.5)) {
    throw Error("val_fraction is " + std::to_string(options.val_fraction) +
                ": choose from 0 to 0.5");
  }
  if (options.seed < 0) throw Error("seed is negative: choose 0 or more");
  std::error_code ignored;
  if (fs::exists(out) && !(fs::is_directory(out) && fs::is_empty(out, ignored))) {
    throw Error("'" + out.string() + "' exists already: remove it or choose another folder");
  }
}

}  // namespace

CorpusResult tokenize_corpus(const CorpusOptions& options, const std::filesystem::path& out,
                             const std::function<void(const CorpusProgress&)>& on_progress) {
  check_options(options, out);
  CorpusResult result;
  std::vector<Document> documents = find_documents(options, result);
  result.tail_held_out = hold_out(documents, options.val_fraction);

  make_folder(fs::absolute(out).parent_path());
  StagedFolder staged(out);
  Writer writer(staged.path(), *options.tokenizer, on_progress);
  writer.write(documents, options.seed);
  DatasetManifest& manifest = result.manifest;
  manifest.tokenizer = options.tokenizer->fingerprint();
  manifest.vocab_size = options.tokenizer->vocab_size();
  manifest.seed = options.seed;
  manifest.val_fraction = options.val_fraction;
  manifest.train = writer.finish_train();
  manifest.val = writer.finish_val();
  if (!options.tokenizer->definition().empty()) {
    write_file(staged.path() / "tokenizer.json", options.tokenizer->definition());
  }
  write_file(staged.path() / "dataset.json", to_json(manifest));
  staged.commit();
  return result;
}

}  // namespace parallax::lm
