// SPDX-License-Identifier: MIT
#include "lm/device.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "lm/error.h"

namespace parallax::lm {
namespace {

using testing::HasSubstr;
using testing::ThrowsMessage;

Config config_of(const std::string& mixer, const std::string& dtype) {
  Config config;
  config.model.mixer = mixer;
  config.train.dtype = dtype;
  return config;
}

TEST(ComputeDtype, FollowsTheDeviceUnlessTold) {
  const at::Device cpu(at::kCPU), gpu(at::kCUDA, 0);
  for (const std::string mixer : {"parallax", "softmax"}) {
    EXPECT_EQ(compute_dtype(config_of(mixer, "auto"), cpu), at::kFloat);
    EXPECT_EQ(compute_dtype(config_of(mixer, "auto"), gpu), at::kBFloat16);
    EXPECT_EQ(compute_dtype(config_of(mixer, "float32"), cpu), at::kFloat);
    EXPECT_EQ(compute_dtype(config_of(mixer, "bfloat16"), cpu), at::kBFloat16);
    EXPECT_EQ(compute_dtype(config_of(mixer, "bfloat16"), gpu), at::kBFloat16);
  }
  EXPECT_EQ(compute_dtype(config_of("softmax", "float32"), gpu), at::kFloat);
  EXPECT_THAT([&] { compute_dtype(config_of("parallax", "float32"), gpu); },
              ThrowsMessage<Error>(HasSubstr("train.dtype")));
}

TEST(PlaceModel, ComputesOnTheCpuAsItWasTrained) {
  TrainConfig train;
  for (const auto& [dtype, expected] :
       {std::pair{"float32", at::kFloat}, {"auto", at::kFloat}, {"bfloat16", at::kBFloat16}}) {
    CausalLm model(ModelConfig{}, 0);
    train.dtype = dtype;
    place_model(model, train, "cpu");
    const torch::NoGradGuard no_grad;
    EXPECT_EQ(model.hidden(at::zeros({1, 3}, at::kLong)).scalar_type(), expected);
    for (const auto& weight : model.parameters()) {
      EXPECT_FALSE(weight.requires_grad());
      if (weight.dim() == 2) {
        EXPECT_EQ(weight.scalar_type(), expected);
      }
    }
  }
}

TEST(ResolveDevice, RefusesWhatIsNotThere) {
  EXPECT_EQ(resolve_device("cpu"), at::Device(at::kCPU));
  EXPECT_THAT([] { resolve_device("tpu"); }, ThrowsMessage<Error>(HasSubstr("tpu")));
  EXPECT_THAT([] { resolve_device("cuda:99"); }, ThrowsMessage<Error>(HasSubstr("cuda:99")));
}

}  // namespace
}  // namespace parallax::lm
