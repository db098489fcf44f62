// SPDX-License-Identifier: MIT
#include "lm/cost.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <filesystem>
#include <fstream>

#include "lm/error.h"
#include "lm/match.h"
#include "lm/model.h"

namespace parallax::lm {
namespace {

using testing::HasSubstr;

Config shipped(const std::string& name) { return load_config("configs/" + name + ".toml"); }

// Counted by hand from the published shapes (Qwen/Qwen3-0.6B and 1.7B), W_R and r-norm added.
TEST(Cost, ParametersOfTheQwen3Sizes) {
  EXPECT_EQ(parameter_count(shipped("0.6b-softmax").model), 596'049'920);
  EXPECT_EQ(parameter_count(shipped("0.6b").model), 654'773'760);
  EXPECT_EQ(parameter_count(shipped("1.7b-softmax").model), 1'720'574'976);
  EXPECT_EQ(parameter_count(shipped("1.7b").model), 1'838'019'072);
}

TEST(Cost, FlopsPerTokenAt4096) {
  const auto rounded = [](double flops) { return std::round(flops / 1e5) / 10; };
  EXPECT_EQ(rounded(forward_flops_per_token(shipped("0.6b-softmax").model, 4096)), 1661.7);
  EXPECT_EQ(rounded(forward_flops_per_token(shipped("0.6b").model, 4096)), 2248.9);
  EXPECT_EQ(rounded(training_flops_per_token(shipped("0.6b-softmax").model, 4096)), 5220.1);
  EXPECT_EQ(rounded(training_flops_per_token(shipped("0.6b").model, 4096)), 6746.8);
  EXPECT_NEAR(forward_flops_per_token(shipped("1.7b-softmax").model, 4096) / 1e6, 3911, 0.5);
  EXPECT_NEAR(training_flops_per_token(shipped("1.7b").model, 4096) / 1e6, 13846, 0.5);
}

TEST(Cost, ShapesAreThoseOfTheModel) {
  ModelConfig config;
  for (const bool variant : {false, true}) {
    config.mixer = variant ? "softmax" : "parallax";
    config.tie_embeddings = variant;
    const auto parameters = CausalLm(config, 0).named_parameters();
    const std::vector<TensorShape> shapes = parameter_shapes(config);
    ASSERT_EQ(parameters.size(), shapes.size());
    for (std::size_t i = 0; i < shapes.size(); ++i) {
      EXPECT_EQ(parameters[i].key(), shapes[i].name);
      EXPECT_EQ(parameters[i].value().sizes().vec(), shapes[i].shape);
    }
  }
}

TEST(Cost, MemoryCountsMuonOnceAndAdamWTwice) {
  Config config = shipped("0.6b-softmax");
  const TrainingMemory muon = training_memory(config);
  EXPECT_EQ(muon.parameters, 4 * 596'049'920LL);
  const std::int64_t hidden = 28 * (6'291'456LL + 9'437'184LL);
  EXPECT_EQ(muon.optimizer_state, 4 * (2 * 596'049'920LL - hidden));
  config.optimizer.name = "adamw";
  EXPECT_EQ(training_memory(config).optimizer_state, 2 * muon.parameters);
  config.train.batch_size *= 2;
  EXPECT_EQ(training_memory(config).activations, 2 * muon.activations);
}

TEST(Match, SoftmaxWithTheParametersOfParallax) {
  const Match small = resolve_match(shipped("0.6b-softmax-matched"));
  EXPECT_EQ(small.config.model.mixer, "softmax");
  EXPECT_EQ(small.config.model.num_q_heads, 24);
  EXPECT_EQ(small.config.model.ffn_size, 3072);
  EXPECT_EQ(parameter_count(small.config.model), 654'770'176);
  EXPECT_TRUE(small.config.model.match_to.empty());
  ASSERT_EQ(small.report.size(), 3u);
  EXPECT_THAT(small.report[0], HasSubstr("with softmax: num_q_heads 16 -> 24"));
  EXPECT_THAT(small.report[1], HasSubstr("parameters: 654,770,176 against 654,773,760 (-0.001 %)"));
  EXPECT_EQ(parameter_count(resolve_match(shipped("1.7b-softmax-matched")).config.model),
            1'838'015'488);
}

TEST(Match, ExtraQueryHeadsStayWholeGroups) {
  const ModelConfig target = shipped("tiny").model;
  const ModelConfig twin = resolve_match(shipped("tiny-softmax-matched")).config.model;
  EXPECT_EQ(twin.num_q_heads % twin.num_kv_heads, 0);
  EXPECT_GT(twin.num_q_heads, target.num_q_heads);
  const double gap = static_cast<double>(parameter_count(twin) - parameter_count(target));
  EXPECT_LT(std::abs(gap) / static_cast<double>(parameter_count(target)), 0.001);
}

class MatchFiles : public testing::Test {
 protected:
  MatchFiles() { std::filesystem::create_directories(folder_); }
  ~MatchFiles() override { std::filesystem::remove_all(folder_); }

  // A config file with a [model] section of these lines.
  std::string write(const std::string& name, const std::string& model) {
    const std::string path = folder_ + "/" + name;
    std::ofstream(path) << "[model]\n" << model;
    return path;
  }
  std::string error_of(const std::string& path) {
    try {
      resolve_match(load_config(path));
    } catch (const Error& error) {
      return error.what();
    }
    return "no error";
  }

  std::string folder_ = testing::TempDir() + "parallax_match_" + std::to_string(getpid());
};

// One key/value head a query head: a group is a head, W_R is half of what a head pair costs.
TEST_F(MatchFiles, FfnWidthTakesWhatHeadsCannot) {
  write("target.toml", "mixer = \"parallax\"\nnum_q_heads = 4\nnum_kv_heads = 4\n");
  const std::string twin = write(
      "twin.toml", "mixer = \"softmax\"\nmatch_to = \"target.toml\"\nmatch = \"parameters\"\n");
  const ModelConfig target = load_config(folder_ + "/target.toml").model;
  const ModelConfig model = resolve_match(load_config(twin)).config.model;
  EXPECT_EQ(model.num_q_heads, 4);
  EXPECT_GT(model.ffn_size, target.ffn_size);
  // Half a step of the FFN width is the most that can be left.
  EXPECT_LE(std::abs(parameter_count(model) - parameter_count(target)),
            4 * 3 * model.hidden_size * model.num_layers);
}

TEST_F(MatchFiles, ParallaxWithTheComputeOfSoftmax) {
  const Match match = resolve_match(shipped("0.6b-compute-matched"));
  const ModelConfig target = shipped("0.6b-softmax").model;
  const ModelConfig& twin = match.config.model;
  EXPECT_EQ(twin.mixer, "parallax");
  EXPECT_EQ(twin.head_dim, 64);
  EXPECT_EQ(twin.num_q_heads, 16);
  EXPECT_GT(twin.ffn_size, target.ffn_size);
  const double ratio =
      training_flops_per_token(twin, 4096) / training_flops_per_token(target, 4096);
  EXPECT_NEAR(ratio, 1, 1e-3);

  write("odd.toml", "mixer = \"softmax\"\nhead_dim = 24\nnum_q_heads = 6\nnum_kv_heads = 2\n");
  const std::string half =
      write("half.toml", "mixer = \"parallax\"\nmatch_to = \"odd.toml\"\nmatch = \"compute\"\n");
  const ModelConfig halved = resolve_match(load_config(half)).config.model;
  EXPECT_EQ(halved.head_dim, 24);
  EXPECT_EQ(halved.num_q_heads, 3);
  EXPECT_EQ(halved.num_kv_heads, 1);
}

TEST_F(MatchFiles, RefusesWhatItCannotMatch) {
  write("parallax.toml", "mixer = \"parallax\"\n");
  EXPECT_THAT(error_of(write("a.toml",
                             "mixer = \"parallax\"\nmatch_to = \"parallax.toml\"\n"
                             "match = \"parameters\"\n")),
              HasSubstr("expected a softmax model matched to a parallax one, got parallax to "
                        "parallax"));
  EXPECT_THAT(error_of(write("b.toml",
                             "mixer = \"softmax\"\nmatch_to = \"b.toml\"\n"
                             "match = \"parameters\"\n")),
              HasSubstr("got one that matches another"));
  EXPECT_THAT(error_of(write("c.toml",
                             "mixer = \"softmax\"\nmatch_to = \"none.toml\"\n"
                             "match = \"parameters\"\n")),
              HasSubstr("none.toml: cannot read"));
  write("thin.toml", "mixer = \"softmax\"\nhead_dim = 8\nnum_q_heads = 3\nnum_kv_heads = 3\n");
  EXPECT_THAT(error_of(write("d.toml",
                             "mixer = \"parallax\"\nmatch_to = \"thin.toml\"\n"
                             "match = \"compute\"\n")),
              HasSubstr("neither half of head_dim 8 nor half of num_q_heads 3"));
}

TEST(Match, AnUnresolvedConfigMakesNoModel) {
  EXPECT_THROW(CausalLm(shipped("tiny-softmax-matched").model, 0), Error);
}

}  // namespace
}  // namespace parallax::lm
