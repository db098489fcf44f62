// SPDX-License-Identifier: MIT
#include "lm/metrics.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <cmath>
#include <limits>
#include <nlohmann/json.hpp>

#include "lm/error.h"
#include "lm/files.h"
#include "lm/tensorboard.h"

namespace parallax::lm {
namespace {

using Json = nlohmann::ordered_json;

constexpr const char* kJsonLines = "metrics.jsonl";
constexpr const char* kEventPrefix = "events.out.tfevents.";
constexpr std::uint64_t kMaxMetricsBytes = std::uint64_t{4} << 30;

bool is_train(const MetricsRecord& record) { return record.kind == "train"; }

std::string to_line(const MetricsRecord& record) {
  Json json = {{"step", record.step},
               {"kind", record.kind},
               {"loss", record.loss},
               {"bits_per_byte", record.bits_per_byte}};
  if (is_train(record)) {
    json["lr"] = record.lr;
    json["grad_norm"] = record.grad_norm;
  }
  json["tokens"] = record.tokens;
  if (is_train(record)) json["skipped"] = record.skipped;
  json["tokens_per_s"] = record.tokens_per_s;
  json["time"] = record.time;
  return json.dump() + "\n";
}

// A number, or NaN where JSON, which cannot write NaN, has null.
double number(const nlohmann::json& json, const char* key) {
  const auto found = json.find(key);
  const bool present = found != json.end() && found->is_number();
  return present ? found->get<double>() : std::numeric_limits<double>::quiet_NaN();
}

MetricsRecord parse_line(std::string_view line, const std::string& where) {
  const nlohmann::json json = nlohmann::json::parse(line, nullptr, false);
  const auto has_integer = [&](const char* key) {
    return json.contains(key) && json[key].is_number_integer();
  };
  if (!json.is_object() || !has_integer("step") || !has_integer("tokens") ||
      !json.contains("kind") || !json["kind"].is_string()) {
    throw Error(where + ": no line of metrics");
  }
  MetricsRecord record;
  record.step = json["step"].get<std::int64_t>();
  record.kind = json["kind"].get<std::string>();
  record.loss = number(json, "loss");
  record.bits_per_byte = number(json, "bits_per_byte");
  record.tokens = json["tokens"].get<std::int64_t>();
  record.tokens_per_s = number(json, "tokens_per_s");
  record.time = number(json, "time");
  if (is_train(record)) {
    record.lr = number(json, "lr");
    record.grad_norm = number(json, "grad_norm");
    if (has_integer("skipped")) record.skipped = json["skipped"].get<std::int64_t>();
  }
  return record;
}

void append_events(const MetricsRecord& record, std::string& events) {
  const auto put = [&](const std::string& tag, double value) {
    append_scalar_event(record.time, record.step, tag, static_cast<float>(value), events);
  };
  put(record.kind + "/loss", record.loss);
  put(record.kind + "/bits_per_byte", record.bits_per_byte);
  if (!is_train(record)) return;
  put("train/lr", record.lr);
  put("train/grad_norm", record.grad_norm);
  put("train/tokens_per_s", record.tokens_per_s);
}

// A file that grows by whole records. Each goes to the system in one call, so that a killed process
// leaves at most one part of a record, at the end.
class AppendedFile {
 public:
  explicit AppendedFile(const fs::path& path) : path_(path) {
    fd_ = ::open(path.c_str(), O_WRONLY | O_APPEND | O_CLOEXEC);
    if (fd_ < 0) throw_file_error("open", path, errno);
  }
  ~AppendedFile() { ::close(fd_); }
  AppendedFile(const AppendedFile&) = delete;
  AppendedFile& operator=(const AppendedFile&) = delete;

  void append(std::string_view record) {
    check_linked();
    const ssize_t written = ::write(fd_, record.data(), record.size());
    if (written < 0) throw_file_error("write", path_, errno);
    if (static_cast<std::size_t>(written) != record.size()) {
      throw_file_error("write", path_, ENOSPC);
    }
  }

  void sync() {
    if (::fsync(fd_) != 0) throw_file_error("sync", path_, errno);
  }

 private:
  // Writing to a deleted file succeeds, to nobody's use.
  void check_linked() const {
    struct stat info;
    if (::fstat(fd_, &info) == 0 && info.st_nlink > 0) return;
    throw Error(path_.string() + " was removed while the run was going on: start it again");
  }

  fs::path path_;
  int fd_ = -1;
};

// One event file a run; TensorBoard knows it by "tfevents" in its name.
fs::path event_path(const fs::path& run) {
  for (const auto& entry : fs::directory_iterator(run)) {
    if (entry.path().filename().string().starts_with(kEventPrefix)) return entry.path();
  }
  const auto now = std::chrono::system_clock::now().time_since_epoch();
  const auto seconds = std::chrono::duration_cast<std::chrono::seconds>(now).count();
  return run / (kEventPrefix + std::to_string(seconds) + ".parallax");
}

}  // namespace

std::vector<MetricsRecord> read_metrics(const std::filesystem::path& run) {
  const fs::path path = run / kJsonLines;
  const std::string text = read_file(path, kMaxMetricsBytes);
  std::vector<MetricsRecord> records;
  for (std::size_t begin = 0, line = 1;; ++line) {
    const std::size_t end = text.find('\n', begin);
    if (end == std::string::npos) return records;
    records.push_back(parse_line(std::string_view(text).substr(begin, end - begin),
                                 path.string() + ":" + std::to_string(line)));
    begin = end + 1;
  }
}

struct MetricsWriter::Impl {
  Impl(const fs::path& lines_path, const fs::path& events_path)
      : lines(lines_path), events(events_path) {}
  AppendedFile lines;
  AppendedFile events;
};

MetricsWriter::MetricsWriter(const std::filesystem::path& run, std::int64_t resume_step) {
  std::string lines;
  std::string events = event_file_header();
  if (resume_step > 0 && fs::exists(run / kJsonLines)) {
    for (const MetricsRecord& record : read_metrics(run)) {
      if (record.step > resume_step) continue;
      lines += to_line(record);
      append_events(record, events);
    }
  }
  const fs::path events_path = event_path(run);
  write_file(run / kJsonLines, lines);
  write_file(events_path, events);
  impl_ = std::make_unique<Impl>(run / kJsonLines, events_path);
}

MetricsWriter::~MetricsWriter() = default;

void MetricsWriter::write(const MetricsRecord& record) {
  std::string events;
  append_events(record, events);
  impl_->lines.append(to_line(record));
  impl_->events.append(events);
}

void MetricsWriter::sync() {
  impl_->lines.sync();
  impl_->events.sync();
}

}  // namespace parallax::lm
