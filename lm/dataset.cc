// SPDX-License-Identifier: MIT
#include "lm/dataset.h"

#include <algorithm>

#include "lm/checksum.h"
#include "lm/error.h"
#include "lm/files.h"
#include "lm/sealed_json.h"

namespace parallax::lm {
namespace {

constexpr const char* kFormat = "parallax-dataset";
constexpr std::int64_t kVersion = 1;
constexpr std::uint64_t kMaxManifestBytes = 16 << 20;

nlohmann::ordered_json split_json(const SplitRecord& split) {
  nlohmann::ordered_json json = {
      {"tokens", split.tokens}, {"documents", split.documents}, {"bytes", split.bytes}};
  json["shards"] = nlohmann::ordered_json::array();
  for (const ShardRecord& shard : split.shards) {
    json["shards"].push_back(
        {{"file", shard.file}, {"tokens", shard.tokens}, {"crc32c", shard.crc32c}});
  }
  return json;
}

SplitRecord parse_split(const nlohmann::json& json, const std::string& name) {
  SplitRecord split;
  split.tokens = get_count(json, "tokens", name);
  split.documents = get_count(json, "documents", name);
  split.bytes = get_count(json, "bytes", name);
  const auto shards = json.find("shards");
  if (shards == json.end() || !shards->is_array()) throw Error(name + ": no list of \"shards\"");
  std::int64_t rest = split.tokens;
  for (const auto& shard : *shards) {
    ShardRecord record{get_string(shard, "file", name), get_count(shard, "tokens", name),
                       static_cast<std::uint32_t>(get_count(shard, "crc32c", name))};
    if (record.file.empty() || record.file.find('/') != std::string::npos) {
      throw Error(name + ": shard '" + record.file + "' is no name of a file beside it");
    }
    if (record.tokens > rest) throw Error(name + ": the shards hold more tokens than their split");
    rest -= record.tokens;
    split.shards.push_back(std::move(record));
  }
  if (rest != 0) throw Error(name + ": the shards hold fewer tokens than their split");
  return split;
}

std::shared_ptr<const Tokenizer> open_tokenizer(const std::filesystem::path& folder,
                                                const DatasetManifest& manifest) {
  const auto tokenizer =
      manifest.tokenizer == "bytes" ? bytes_tokenizer() : load_tokenizer(folder.string());
  if (tokenizer->fingerprint() != manifest.tokenizer ||
      tokenizer->vocab_size() != manifest.vocab_size) {
    throw Error((folder / "tokenizer.json").string() + " is not the tokenizer of this dataset (" +
                manifest.tokenizer + "): make the dataset again with `parallax tokenize`");
  }
  return tokenizer;
}

}  // namespace

std::string DatasetManifest::fingerprint() const {
  std::string content = tokenizer;
  for (const SplitRecord* split : {&train, &val}) {
    content += " " + std::to_string(split->tokens);
    for (const ShardRecord& shard : split->shards) content += " " + hex(shard.crc32c, 8);
  }
  return hex(hash64(content), 16);
}

std::string to_json(const DatasetManifest& manifest) {
  return seal_json({{"format", kFormat},
                    {"version", kVersion},
                    {"fingerprint", manifest.fingerprint()},
                    {"tokenizer", manifest.tokenizer},
                    {"vocab_size", manifest.vocab_size},
                    {"seed", manifest.seed},
                    {"val_fraction", manifest.val_fraction},
                    {"train", split_json(manifest.train)},
                    {"val", split_json(manifest.val)}});
}

DatasetManifest parse_dataset_manifest(std::string_view text, const std::string& name) {
  const nlohmann::json json = open_sealed_json(text, name);
  if (get_string(json, "format", name) != kFormat || get_count(json, "version", name) != kVersion) {
    throw Error(name + ": not a dataset of version " + std::to_string(kVersion) +
                " (make one with `parallax tokenize`)");
  }
  DatasetManifest manifest;
  manifest.tokenizer = get_string(json, "tokenizer", name);
  manifest.vocab_size = get_count(json, "vocab_size", name);
  manifest.seed = get_count(json, "seed", name);
  manifest.val_fraction = get_number(json, "val_fraction", name);
  manifest.train = parse_split(get_object(json, "train", name), name);
  manifest.val = parse_split(get_object(json, "val", name), name);
  return manifest;
}

TokenStream::TokenStream(const std::filesystem::path& folder, const SplitRecord& record,
                         std::int64_t vocab_size)
    : vocab_size_(vocab_size), documents_(record.documents), bytes_(record.bytes) {
  for (const ShardRecord& shard : record.shards) {
    const std::filesystem::path path = folder / shard.file;
    shards_.push_back(std::make_unique<Shard>(path));
    if (shards_.back()->size() != shard.tokens ||
        shards_.back()->content_crc32c() != shard.crc32c) {
      throw Error(
          path.string() +
          " is damaged or of another dataset; make the dataset again with `parallax tokenize`");
    }
    ends_.push_back(size() + shard.tokens);
  }
}

void TokenStream::read(std::int64_t begin, std::int64_t count, std::int64_t* out) const {
  while (count > 0) {
    const auto shard = static_cast<std::size_t>(
        std::upper_bound(ends_.begin(), ends_.end(), begin) - ends_.begin());
    const std::int64_t shard_begin = ends_[shard] - shards_[shard]->size();
    const std::int64_t part = std::min(count, ends_[shard] - begin);
    shards_[shard]->read(begin - shard_begin, part, vocab_size_, out);
    begin += part;
    out += part;
    count -= part;
  }
}

std::shared_ptr<const Dataset> Dataset::open(const std::filesystem::path& path) {
  const std::filesystem::path manifest_path = path / "dataset.json";
  if (!std::filesystem::exists(manifest_path)) {
    throw Error("no dataset in '" + path.string() +
                "': make one with `parallax tokenize TEXT... --out " +
                (path.empty() ? "DIR" : path.string()) + "` and name it in data.path");
  }
  const DatasetManifest manifest =
      parse_dataset_manifest(read_file(manifest_path, kMaxManifestBytes), manifest_path.string());
  auto dataset = std::make_shared<Dataset>();
  dataset->path = path;
  dataset->tokenizer = open_tokenizer(path, manifest);
  dataset->train = TokenStream(path, manifest.train, manifest.vocab_size);
  dataset->val = TokenStream(path, manifest.val, manifest.vocab_size);
  dataset->fingerprint = manifest.fingerprint();
  return dataset;
}

}  // namespace parallax::lm
