// SPDX-License-Identifier: MIT
// The commands on a small run that they made themselves, and on input that is wrong.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <filesystem>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>

#include "tests/cli/process.h"

namespace parallax::cli {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;
using testing::AllOf;
using testing::HasSubstr;
using testing::Not;

// Failure with one line on stderr that names what was wrong.
void expect_failure(const std::vector<std::string>& arguments,
                    const testing::Matcher<const std::string&>& message) {
  const Outcome outcome = run_parallax(arguments);
  EXPECT_EQ(outcome.exit_code, 1);
  EXPECT_EQ(outcome.out, "");
  const std::size_t start = outcome.err.rfind("parallax: ");
  ASSERT_NE(start, std::string::npos) << outcome.err;
  EXPECT_EQ(outcome.err.find('\n', start), outcome.err.size() - 1) << outcome.err;
  EXPECT_THAT(outcome.err.substr(start), message);
}

json json_of(const std::vector<std::string>& arguments) {
  const Outcome outcome = run_parallax(arguments);
  EXPECT_EQ(outcome.exit_code, 0) << outcome.err;
  return json::parse(outcome.out);
}

constexpr char kSmall[] = R"(
[model]
hidden_size = 32
num_layers = 2
num_q_heads = 2
num_kv_heads = 1
head_dim = 16
ffn_size = 48
[data]
seq_len = 32
[train]
steps = 12
batch_size = 4
eval_every = 6
log_every = 3
device = "cpu"
)";

class Run : public testing::Test {
 protected:
  static void SetUpTestSuite() {
    folder_ = std::make_unique<TemporaryFolder>();
    std::string text;
    for (int i = 0; i < 900; ++i) text += "line " + std::to_string(i * i % 97) + " of some text\n";
    text += "not UTF-8: \xff\xfe\xc3\n";
    write_text(*folder_ / "text.txt", text);
    write_text(*folder_ / "small.toml", kSmall);
    const Outcome tokenized =
        run_parallax({"tokenize", *folder_ / "text.txt", "--out", *folder_ / "data"});
    ASSERT_EQ(tokenized.exit_code, 0) << tokenized.err;
    for (const std::string mixer : {"parallax", "softmax"}) {
      const Outcome trained = run_parallax(train_words(*folder_ / mixer, "model.mixer=" + mixer));
      ASSERT_EQ(trained.exit_code, 0) << trained.err;
    }
  }
  static void TearDownTestSuite() { folder_.reset(); }

  static std::vector<std::string> train_words(const std::string& out,
                                              const std::string& override_text = "") {
    std::vector<std::string> words = {
        "train", "--config", *folder_ / "small.toml",           "--out",
        out,     "--set",    "data.path=" + (*folder_ / "data")};
    if (!override_text.empty()) words.insert(words.end(), {"--set", override_text});
    return words;
  }

  static std::string at(const std::string& name) { return *folder_ / name; }

  static std::unique_ptr<TemporaryFolder> folder_;
};

std::unique_ptr<TemporaryFolder> Run::folder_;

TEST_F(Run, EvalAgreesWithItself) {
  const json result = json_of({"eval", at("parallax"), "--json"});
  EXPECT_EQ(result["step"], 12);
  const double loss = result["loss"];
  EXPECT_GT(loss, 0.5);
  EXPECT_LT(loss, 6.0);
  EXPECT_NEAR(result["perplexity"], std::exp(loss), 1e-9 * std::exp(loss));
  EXPECT_NEAR(result["bits_per_byte"],
              loss * result["tokens"].get<double>() / std::log(2.0) / result["bytes"].get<double>(),
              1e-9);
  const json again = json_of({"eval", at("parallax"), "--json", "--batch-size", "3"});
  EXPECT_EQ(again["tokens"], result["tokens"]);
  EXPECT_NEAR(again["loss"], loss, 1e-5);
  EXPECT_NE(json_of({"eval", at("parallax"), "--json", "--split", "train"})["tokens"],
            result["tokens"]);
  EXPECT_THAT(run_parallax({"eval", at("softmax")}).out, HasSubstr("bits per byte"));
}

TEST_F(Run, GenerateStreamsWhatItsJsonSays) {
  for (const std::string mixer : {"parallax", "softmax"}) {
    const std::vector<std::string> words = {"generate",         at(mixer), "--prompt", "line 1",
                                            "--max-new-tokens", "40",      "--seed",   "3"};
    const Outcome plain = run_parallax(words);
    EXPECT_EQ(plain.exit_code, 0);
    std::vector<std::string> with_json = words;
    with_json.push_back("--json");
    const json result = json_of(with_json);
    EXPECT_EQ(plain.out, "line 1" + result["text"].get<std::string>() + "\n");
    EXPECT_EQ(json_of(with_json)["tokens"], result["tokens"]);
    with_json[7] = "4";
    EXPECT_NE(json_of(with_json)["tokens"], result["tokens"]);
  }
}

TEST_F(Run, GenerateWritesManyTextsAsItWouldEachAlone) {
  const std::vector<std::string> prompts = {"line 1", "", "of some text, line 2"};
  write_text(at("prompts.txt"), "line 1\n\nof some text, line 2\n");
  const auto words = [](std::vector<std::string> more) {
    std::vector<std::string> words = {"generate", at("parallax"), "--max-new-tokens", "30"};
    words.insert(words.end(), more.begin(), more.end());
    return words;
  };
  const json all = json_of(words({"--json", "--prompts", at("prompts.txt"), "--samples", "2"}));
  ASSERT_EQ(all["texts"].size(), 6u);
  for (std::size_t i = 0; i < 6; ++i) {
    const json& text = all["texts"][i];
    EXPECT_EQ(text["prompt"], prompts[i / 2]);
    EXPECT_EQ(text["seed"], i);
    const json alone =
        json_of(words({"--json", "--prompt", prompts[i / 2], "--seed", std::to_string(i)}));
    EXPECT_EQ(text["tokens"], alone["tokens"]);
  }
  EXPECT_GT(all["tokens_per_s"], 0);
  EXPECT_GT(all["prefill_tokens_per_s"], 0);

  const Outcome plain = run_parallax(
      words({"--prompt", "line 1", "--prompt", "line 1", "--prompt", prompts[2], "--batch", "2"}));
  EXPECT_EQ(plain.exit_code, 0) << plain.err;
  EXPECT_THAT(plain.out, AllOf(testing::StartsWith("==> 1, seed 0 <==\nline 1"),
                               HasSubstr("\n\n==> 2, seed 1 <==\nline 1"),
                               HasSubstr("\n\n==> 3, seed 2 <==\n" + prompts[2])));
  EXPECT_THAT(plain.err, AllOf(HasSubstr("3 texts"), HasSubstr("tokens/s")));
}

TEST_F(Run, InspectHasAllHeads) {
  const json heads =
      json_of({"inspect", at("parallax"), "--text", "line 3 of some text", "--json"});
  ASSERT_EQ(heads.size(), 4u);
  EXPECT_GT(heads[3]["cor"], 0);
  EXPECT_THAT(run_parallax({"inspect", at("softmax"), "--text", "a text"}).out, HasSubstr("COR"));
}

TEST_F(Run, ReportWritesOnePageThatNeedsNothingElse) {
  const std::string page = at("report.html");
  const json result = json_of({"report", at("softmax"), at("parallax"), "--out", page, "--json",
                               "--prompt", "<b>", "--max-new-tokens", "20"});
  ASSERT_EQ(result["runs"].size(), 2u);
  EXPECT_EQ(result["remarks"], json::array());
  const json& run = result["runs"][1];
  EXPECT_EQ(run["name"], "parallax");
  EXPECT_EQ(run["validation"]["loss"], json_of({"eval", at("parallax"), "--json"})["loss"]);
  EXPECT_GT(run["parameters"], result["runs"][0]["parameters"]);
  EXPECT_GT(run["training_flops_per_token"], run["forward_flops_per_token"]);
  EXPECT_GT(run["tokens_per_s"], 0);
  EXPECT_EQ(result["attention"]["run"], "parallax");
  const std::string html = read_text(page);
  EXPECT_THAT(html, AllOf(HasSubstr("<svg"), HasSubstr("data:image/png;base64,"),
                          HasSubstr("&lt;b&gt;"), HasSubstr("num_layers = 2")));
  EXPECT_THAT(html, AllOf(Not(HasSubstr("<script")), Not(HasSubstr("http://")),
                          Not(HasSubstr("https://")), Not(HasSubstr("<b></b>"))));
}

TEST_F(Run, ReportTableAndRemarks) {
  const std::string other = at("other");
  ASSERT_EQ(run_parallax(train_words(other, "data.seed=5")).exit_code, 0);
  const Outcome outcome = run_parallax({"report", at("softmax"), other, "--out", at("two.html")});
  EXPECT_EQ(outcome.exit_code, 0) << outcome.err;
  EXPECT_THAT(outcome.out, AllOf(HasSubstr("bits per byte"), HasSubstr("note: other"),
                                 HasSubstr("same tokens"), HasSubstr("report: ")));
}

TEST_F(Run, ReportWithoutTheDataFallsBackOnTheLog) {
  const std::string moved = at("moved");
  fs::copy(at("data"), moved, fs::copy_options::recursive);
  std::vector<std::string> words = train_words(at("orphan"));
  words[6] = "data.path=" + moved;
  ASSERT_EQ(run_parallax(words).exit_code, 0);
  fs::remove_all(moved);
  const json result = json_of({"report", at("orphan"), "--out", at("orphan.html"), "--json"});
  EXPECT_TRUE(result["runs"][0]["validation"].is_null());
  EXPECT_GT(result["runs"][0]["validation_bits_per_byte"], 0);
  EXPECT_THAT(result["remarks"][0].get<std::string>(), HasSubstr("moved"));
}

TEST_F(Run, ConfigMistakesAreNamed) {
  const auto expect_bad = [](const std::string& override_text,
                             const testing::Matcher<const std::string&>& message) {
    expect_failure(train_words(at("bad"), override_text), message);
    EXPECT_FALSE(fs::exists(at("bad"))) << override_text;
  };
  expect_bad("model.hiden_size=32", AllOf(HasSubstr("hiden_size"), HasSubstr("hidden_size")));
  expect_bad("modle.head_dim=16", HasSubstr("modle"));
  expect_bad("model.num_layers=many", AllOf(HasSubstr("num_layers"), HasSubstr("many")));
  expect_bad("model.num_layers=1.5", HasSubstr("num_layers"));
  expect_bad("model.num_layers=0", HasSubstr("num_layers"));
  expect_bad("model.num_kv_heads=4", AllOf(HasSubstr("num_q_heads"), HasSubstr("num_kv_heads")));
  expect_bad("model.head_dim=12", HasSubstr("head_dim"));
  expect_bad("model.mixer=mamba", AllOf(HasSubstr("mamba"), HasSubstr("softmax")));
  expect_bad("optimizer.name=lion", AllOf(HasSubstr("lion"), HasSubstr("muon")));
  expect_bad("train.device=tpu", HasSubstr("tpu"));
}

TEST_F(Run, MissingAndDamagedFilesAreNamed) {
  expect_failure({"train", "--config", at("none.toml"), "--out", at("bad")},
                 HasSubstr("none.toml"));
  std::vector<std::string> words = train_words(at("bad"));
  words[6] = "data.path=" + at("nowhere");
  expect_failure(words, HasSubstr("nowhere"));
  write_text(at("broken.toml"), "[model\nmixer = 1");
  expect_failure({"train", "--config", at("broken.toml"), "--out", at("bad")},
                 HasSubstr("broken.toml"));
  EXPECT_FALSE(fs::exists(at("bad")));

  expect_failure({"tokenize", at("nothing.txt"), "--out", at("d1")}, HasSubstr("nothing.txt"));
  write_text(at("empty.txt"), "");
  expect_failure({"tokenize", at("empty.txt"), "--out", at("d1")}, HasSubstr("empty"));
  EXPECT_FALSE(fs::exists(at("d1")));
  expect_failure({"tokenize", at("text.txt"), "--out", at("data")}, HasSubstr("data"));

  expect_failure({"eval", at("nowhere")}, HasSubstr("nowhere"));
  expect_failure({"generate", at("data"), "--prompt", "a"}, HasSubstr("data"));
  expect_failure({"generate", at("parallax"), "--prompts", at("none.txt")}, HasSubstr("none.txt"));
  expect_failure({"generate", at("parallax"), "--prompts", at("data")}, HasSubstr("data"));
  expect_failure({"generate", at("parallax"), "--prompts", at("empty.txt")},
                 HasSubstr("no prompts"));
  expect_failure({"report", at("data")}, HasSubstr("data"));
  expect_failure({"eval", at("parallax"), "--data", at("nowhere")}, HasSubstr("nowhere"));
  expect_failure({"eval", at("parallax"), "--device", "tpu"}, HasSubstr("tpu"));
  expect_failure({"inspect", at("parallax"), "--text", "a"}, HasSubstr("tokens"));
  expect_failure({"report", at("parallax"), "--out", at("no/such/folder.html"), "--batches", "1"},
                 HasSubstr("no/such"));
}

TEST_F(Run, ACheckpointThatDoesNotFitIsRefused) {
  std::vector<std::string> words = train_words(at("parallax"), "model.ffn_size=64");
  words.push_back("--resume");
  expect_failure(words, testing::AnyOf(HasSubstr("ffn_size"), HasSubstr("mlp")));
  const std::string damaged = at("damaged");
  fs::copy(at("parallax"), damaged, fs::copy_options::recursive);
  for (const auto& entry : fs::recursive_directory_iterator(damaged)) {
    if (entry.path().filename() == "model.safetensors") {
      fs::resize_file(entry.path(), fs::file_size(entry.path()) - 5);
    }
  }
  expect_failure({"eval", damaged}, HasSubstr("model.safetensors"));
}

TEST_F(Run, AFolderThatHoldsARunIsNotOverwritten) {
  const std::string before = read_text(fs::path(at("parallax")) / "metrics.jsonl");
  expect_failure(train_words(at("parallax")), HasSubstr("--resume"));
  EXPECT_EQ(read_text(fs::path(at("parallax")) / "metrics.jsonl"), before);
}

TEST_F(Run, AFolderThatCannotBeWrittenIsNamed) {
  expect_failure(train_words("/proc/parallax-run"), HasSubstr("/proc/parallax-run"));
  expect_failure({"tokenize", at("text.txt"), "--out", "/proc/parallax-data"},
                 HasSubstr("parallax-data"));
  expect_failure(train_words(at("text.txt") + "/run"), HasSubstr("text.txt"));
}

}  // namespace
}  // namespace parallax::cli
