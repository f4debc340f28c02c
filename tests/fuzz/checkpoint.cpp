// SPDX-License-Identifier: Apache-2.0
// torch
//
// One byte: what the rest is. A whole file of torch.save or safetensors, a pickle in a sound archive (so that the
// fuzzer need not find checksums), JSON, or the .metadata of a folder. Whatever it is, it is read or refused, in little
// memory and time.
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "fabric/checkpoint/distributed_metadata.hpp"
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

/// Each tensor's parts are all of it, inside it, and in files of the folder.
void require_whole(const std::vector<fabric::detail::StoredEntry>& entries) {
  for (const auto& entry : entries) {
    std::int64_t elements = 0;
    for (const auto& item : entry.items) {
      elements += item.box.numel();
      fuzz::require(item.file.find('/') == std::string::npos && item.box.sizes.size() == entry.sizes.size());
      for (std::size_t i = 0; i < entry.sizes.size(); ++i) {
        fuzz::require(item.box.offsets[i] >= 0 && item.box.offsets[i] + item.box.sizes[i] <= entry.sizes[i]);
      }
    }
    fuzz::require(!entry.path.empty());
    if (entry.is_tensor()) fuzz::require(elements == entry.numel());
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
    switch (input.byte() % 5) {
      case 0: walk(TorchFile::read(copy_of(input.rest), "input").state); break;
      case 1: walk(SafetensorsFile::read(copy_of(input.rest), "input").state); break;
      case 2: walk(TorchFile::read(copy_of(archive_of(input.rest)), "input").state); break;
      case 4: require_whole(fabric::detail::DistributedMetadataReader::read(input.rest, "input")); break;
      default: walk(fabric::detail::JsonReader::read(input.rest, "input")); break;
    }
  } catch (const DamagedCheckpoint&) {
  }
  return 0;
}
