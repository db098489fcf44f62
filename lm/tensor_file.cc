// SPDX-License-Identifier: MIT
#include "lm/tensor_file.h"

#include <cstring>

#include "lm/checksum.h"
#include "lm/error.h"
#include "lm/files.h"
#include "lm/safetensors.h"

namespace parallax::lm {
namespace {

const std::map<std::string, at::ScalarType>& scalar_types() {
  static const std::map<std::string, at::ScalarType> kTypes = {{"F64", at::kDouble},
                                                               {"F32", at::kFloat},
                                                               {"F16", at::kHalf},
                                                               {"BF16", at::kBFloat16},
                                                               {"I64", at::kLong},
                                                               {"I32", at::kInt},
                                                               {"I16", at::kShort},
                                                               {"I8", at::kChar},
                                                               {"U8", at::kByte},
                                                               {"BOOL", at::kBool},
                                                               {"U16", at::kUInt16},
                                                               {"U32", at::kUInt32},
                                                               {"U64", at::kUInt64},
                                                               {"F8_E4M3", at::kFloat8_e4m3fn},
                                                               {"F8_E5M2", at::kFloat8_e5m2}};
  return kTypes;
}

std::string dtype_name(const std::string& tensor, at::ScalarType type) {
  for (const auto& [name, scalar_type] : scalar_types()) {
    if (scalar_type == type) return name;
  }
  throw Error("tensor '" + tensor + "': safetensors has no name for " + c10::toString(type));
}

}  // namespace

FileSeal save_tensors(const std::filesystem::path& path, const NamedTensors& tensors,
                      const std::map<std::string, std::string>& metadata) {
  std::vector<TensorEntry> entries;
  for (const auto& [name, tensor] : tensors) {
    entries.push_back({name, dtype_name(name, tensor.scalar_type()), tensor.sizes().vec(), 0, 0});
  }
  OutputFile file(path);
  file.write(safetensors_header(entries, metadata));
  for (const auto& [name, tensor] : tensors) {
    const at::Tensor bytes = tensor.detach().to(at::kCPU).contiguous();
    file.write(std::span(static_cast<const std::byte*>(bytes.const_data_ptr()), bytes.nbytes()));
  }
  file.finish();
  return {file.size(), file.crc32c()};
}

NamedTensors load_tensors(const std::filesystem::path& path, const FileSeal* seal) {
  const MappedFile file(path);
  const std::string name = path.string();
  if (seal && file.bytes().size() != seal->bytes) {
    throw Error(name + ": " + std::to_string(file.bytes().size()) + " bytes instead of " +
                std::to_string(seal->bytes));
  }
  if (seal && crc32c(file.bytes()) != seal->crc32c) {
    throw Error(name + ": damaged (its checksum does not fit)");
  }
  const SafetensorsHeader header = parse_safetensors(file.bytes(), name);
  const auto data = file.bytes().subspan(header.data_offset);
  NamedTensors tensors;
  for (const TensorEntry& entry : header.tensors) {
    at::Tensor tensor = at::empty(entry.shape, scalar_types().at(entry.dtype));
    if (entry.end > entry.begin) {
      std::memcpy(tensor.mutable_data_ptr(), data.data() + entry.begin, entry.end - entry.begin);
    }
    tensors.emplace_back(entry.name, tensor);
  }
  return tensors;
}

}  // namespace parallax::lm
