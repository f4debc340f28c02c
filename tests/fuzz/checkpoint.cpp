// SPDX-License-Identifier: Apache-2.0
// torch
//
// One byte: what the rest is. A whole file of torch.save or safetensors, a pickle in a sound archive (so that the
// fuzzer need not find checksums), or JSON. Whatever it is, it is read or refused, in little memory and time.
#include <memory>
#include <string>

#include "fabric/checkpoint/safetensors_file.hpp"
#include "fabric/checkpoint/torch_file.hpp"

#include "fuzz/input.hpp"

using namespace fabric;

namespace {

fabric::detail::Bytes copy_of(std::string_view text) {
  auto owner = std::make_shared<std::string>(text);
  return {owner, owner->data(), owner->size()};
}

/// Looks at every element, so that a tensor outside its storage is noticed.
void walk(const Value& value) {
  if (const auto* tensor = std::get_if<at::Tensor>(&value.data())) {
    fuzz::require(tensor->defined());
    if (tensor->numel() > 0 && tensor->numel() < 100000) (void)tensor->contiguous();
  } else if (const auto* list = std::get_if<List>(&value.data())) {
    for (const Value& item : list->items) walk(item);
  } else if (const auto* dict = std::get_if<Dict>(&value.data())) {
    for (const auto& [key, inner] : *dict) {
      fuzz::require(dict->find(key) == &inner);
      walk(inner);
    }
  }
}

std::string archive_of(std::string_view pickle) {
  constexpr char storage[64] = {1, 2, 3};
  fabric::detail::MemoryFile file;
  fabric::detail::ZipWriter zip(file);
  zip.add("archive/data.pkl", pickle.data(), pickle.size());
  zip.add("archive/data/0", storage, sizeof storage);
  zip.finish();
  return file.bytes;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  fuzz::Input input(data, size);
  try {
    switch (input.byte() % 4) {
      case 0: walk(TorchFile::read(copy_of(input.rest), "input").state); break;
      case 1: walk(SafetensorsFile::read(copy_of(input.rest), "input").state); break;
      case 2: walk(TorchFile::read(copy_of(archive_of(input.rest)), "input").state); break;
      default: walk(fabric::detail::JsonReader::read(input.rest, "input")); break;
    }
  } catch (const DamagedCheckpoint&) {
  }
  return 0;
}
