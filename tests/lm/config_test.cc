// SPDX-License-Identifier: MIT
#include "lm/config.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>

#include "lm/error.h"
#include "lm/match.h"

namespace parallax::lm {
namespace {

using testing::HasSubstr;

std::string error_of(const std::string& text, const std::vector<std::string>& overrides = {}) {
  try {
    parse_config(text, "run.toml", overrides);
  } catch (const Error& error) {
    EXPECT_EQ(std::string(error.what()).find('\n'), std::string::npos);
    return error.what();
  }
  return "no error";
}

TEST(Config, ReadsEveryTypeAndKeepsDefaults) {
  const Config config = parse_config(R"(
    [model]
    mixer = "softmax"
    num_layers = 3
    tie_embeddings = false
    rope_theta = 1000000
    [optimizer]
    ns_coefficients = [3, -4.5, 2.0]
    [train]
    trunk_steps = [100, 200]
  )",
                                     "run.toml");
  EXPECT_EQ(config.model.mixer, "softmax");
  EXPECT_EQ(config.model.num_layers, 3);
  EXPECT_FALSE(config.model.tie_embeddings);
  EXPECT_EQ(config.model.rope_theta, 1e6);
  EXPECT_EQ(config.model.hidden_size, ModelConfig{}.hidden_size);
  EXPECT_THAT(config.optimizer.ns_coefficients, testing::ElementsAre(3, -4.5, 2));
  EXPECT_THAT(config.train.trunk_steps, testing::ElementsAre(100, 200));
}

TEST(Config, OverridesComeLast) {
  const Config config =
      parse_config("[data]\npath = \"a\"\n", "run.toml",
                   {"data.path=some folder/b", "optimizer.lr=1e-4", "train.trunk_steps=[5]",
                    "optimizer.nesterov=false", "model.mixer=\"softmax\""});
  EXPECT_EQ(config.data.path, "some folder/b");
  EXPECT_EQ(config.optimizer.lr, 1e-4);
  EXPECT_THAT(config.train.trunk_steps, testing::ElementsAre(5));
  EXPECT_FALSE(config.optimizer.nesterov);
  EXPECT_EQ(config.model.mixer, "softmax");
}

TEST(Config, WritesWhatItReadsBack) {
  Config config;
  config.data.path = "quote \" backslash \\ tab \t";
  config.optimizer.lr = 0.1 + 0.2;
  config.optimizer.eps = 1e-15;
  config.model.rope_theta = 1e6;
  config.train.trunk_steps = {7, 8};
  const std::string text = to_toml(config);
  const Config back = parse_config(text, "saved.toml");
  EXPECT_EQ(to_toml(back), text);
  EXPECT_EQ(back.data.path, config.data.path);
  EXPECT_EQ(back.optimizer.lr, config.optimizer.lr);
  EXPECT_EQ(back.optimizer.eps, config.optimizer.eps);
}

TEST(Config, ListsEveryFieldWithHelp) {
  const std::vector<FieldHelp> fields = config_fields();
  EXPECT_GT(fields.size(), 50u);
  for (const FieldHelp& field : fields) EXPECT_FALSE(field.help.empty()) << field.key;
}

TEST(Config, NamesTheNearestKnownKey) {
  EXPECT_EQ(error_of("[model]\nhead_dims = 32\n"),
            "run.toml: unknown key model.head_dims, did you mean model.head_dim?");
  EXPECT_EQ(error_of("[modle]\nhead_dim = 32\n"),
            "run.toml: unknown key modle.head_dim, did you mean model.head_dim?");
  EXPECT_EQ(error_of("[model]\nweight_decay = 0.1\n"),
            "run.toml: unknown key model.weight_decay, did you mean optimizer.weight_decay?");
  EXPECT_EQ(error_of("seq_len = 256\n"),
            "run.toml: unknown key seq_len, did you mean data.seq_len?");
  EXPECT_EQ(error_of("", {"train.step=3"}),
            "override train.step=3: unknown key train.step, did you mean train.steps?");
  EXPECT_EQ(error_of("[model]\nfrobnicate = 1\n"),
            "run.toml: unknown key model.frobnicate; `parallax model --fields` lists all keys");
  EXPECT_THAT(error_of("[nothing]\n"), HasSubstr("unknown section [nothing]"));
}

TEST(Config, NamesWrongTypes) {
  EXPECT_EQ(error_of("[model]\nhead_dim = \"wide\"\n"),
            "run.toml: model.head_dim: expected an integer, got \"wide\"");
  EXPECT_EQ(error_of("[model]\nhead_dim = 32.5\n"),
            "run.toml: model.head_dim: expected an integer, got 32.5");
  EXPECT_EQ(error_of("[optimizer]\nlr = true\n"),
            "run.toml: optimizer.lr: expected a number, got true");
  EXPECT_EQ(error_of("[optimizer]\nns_coefficients = [1, \"x\"]\n"),
            "run.toml: optimizer.ns_coefficients: expected a list of numbers, got [ 1, 'x' ]");
  EXPECT_EQ(error_of("[data.path]\nx = 1\n"),
            "run.toml: data.path: expected a string, got a table");
  EXPECT_EQ(error_of("", {"train.steps=many"}),
            "override train.steps=many: train.steps: expected an integer, got many");
  EXPECT_EQ(error_of("", {"train.steps"}), "override train.steps: expected section.key=value");
}

TEST(Config, NamesImpossibleValuesAndShapes) {
  EXPECT_EQ(error_of("[model]\nnum_q_heads = 5\nnum_kv_heads = 2\n"),
            "run.toml: model.num_q_heads: expected a multiple of num_kv_heads = 2, got 5");
  for (const char* head_dim : {"36", "264"}) {
    EXPECT_EQ(error_of(std::string("[model]\nhead_dim = ") + head_dim + "\n"),
              std::string("run.toml: model.head_dim: expected a multiple of 8, at most 256, got ") +
                  head_dim);
  }
  EXPECT_EQ(error_of("[model]\nmixer = \"linear\"\n"),
            "run.toml: model.mixer: expected \"parallax\" or \"softmax\", got \"linear\"");
  EXPECT_EQ(error_of("[train]\nsteps = 0\n"), "run.toml: train.steps: expected at least 1, got 0");
  EXPECT_EQ(error_of("[optimizer]\nlr = nan\n"),
            "run.toml: optimizer.lr: expected at least 0, got nan");
  EXPECT_EQ(error_of("[schedule]\ndecay_fraction = 1.5\n"),
            "run.toml: schedule.decay_fraction: expected a value from 0 to 1, got 1.5");
  EXPECT_EQ(error_of("[optimizer]\nns_coefficients = [1.0, 2.0]\n"),
            "run.toml: optimizer.ns_coefficients: expected 3 numbers, or 3 for each of the 5 "
            "ns_steps, got 2");
  EXPECT_THAT(error_of("[model]\nmatch_to = \"a.toml\"\n"), HasSubstr("belong together"));
}

// Found by fuzzing: toml++ takes such characters for impossible.
TEST(Config, NamesWhatStandsWhereAKeyBelongs) {
  for (const std::string text : {"\u047eW", "[\u00e9]", "seed = \u00e9", "\u00a1 = 1", "[=]"}) {
    EXPECT_NE(error_of(text), "no error") << text;
  }
}

// Found by fuzzing: a suggestion took time with the square of the key's length.
TEST(Config, SuggestsNothingForKeysBeyondAnyTypingSlip) {
  const std::string key(1 << 20, 'k');
  EXPECT_EQ(error_of("[model]\n" + key + " = 1"),
            "run.toml: unknown key " + ("model." + key).substr(0, 64) +
                "...; `parallax model --fields` lists all keys");
}

TEST(Config, NamesTheLineOfBadToml) {
  EXPECT_THAT(error_of("[model]\nhead_dim = \n"), HasSubstr("run.toml: line 2: "));
  EXPECT_THAT(error_of("[model]\nhead_dim = 8\nhead_dim = 8\n"), HasSubstr("run.toml: line 3: "));
}

TEST(Config, NamesAFileItCannotRead) {
  for (const char* path : {"no/such.toml", "configs"}) {
    try {
      load_config(path);
      FAIL() << path;
    } catch (const Error& error) {
      EXPECT_EQ(std::string(error.what()),
                std::string(path) + ": cannot read this config: no such file, or not readable");
    }
  }
}

TEST(Config, ResolvesMatchToAgainstItsFile) {
  const Config config = parse_config(
      "[model]\nmixer = \"softmax\"\nmatch_to = \"../b.toml\"\nmatch = \"parameters\"\n",
      "configs/small/a.toml");
  EXPECT_EQ(config.model.match_to, "configs/b.toml");
}

// The arms of a comparison differ in their model and in nothing else.
TEST(Config, ShippedTwinsShareEverythingButTheModel) {
  for (const std::string size : {"tiny", "0.6b", "1.7b"}) {
    Config base = load_config("configs/" + size + ".toml");
    EXPECT_EQ(base.model.mixer, "parallax");
    std::vector<std::string> twins = {"-softmax", "-softmax-matched"};
    if (size != "tiny") twins.push_back("-compute-matched");
    for (const std::string& twin : twins) {
      Config other = resolve_match(load_config("configs/" + size + twin + ".toml")).config;
      other.model = base.model;
      EXPECT_EQ(to_toml(other), to_toml(base)) << size << twin;
    }
  }
}

}  // namespace
}  // namespace parallax::lm
