// SPDX-License-Identifier: Apache-2.0
// labels: checkpoint torch sharding
//
// The folders of torch.distributed.checkpoint, in one process: boxes, .metadata, the files of ranks that are made by
// hand, and whole states. tests/python/dcp.py has Python on the other side, tests/distributed/sharded_checkpoint.cpp
// real ranks.
#include <cstdint>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <map>
#include <memory>
#include <numeric>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include <torch/torch.h>

#include "fabric/checkpoint.hpp"
#include "fabric/fabric.hpp"
#include "support/catch.hpp"

namespace {

using fabric::Box;
using fabric::boxes_of_range;
using fabric::consolidate;
using fabric::Cpu;
using fabric::DamagedCheckpoint;
using fabric::Dict;
using fabric::DistributedCheckpoint;
using fabric::Error;
using fabric::F32;
using fabric::Fabric;
using fabric::List;
using fabric::overlap;
using fabric::part_of;
using fabric::SingleDevice;
using fabric::State;
using fabric::Value;
using fabric::detail::DistributedFile;
using fabric::detail::DistributedMetadataReader;
using fabric::detail::DistributedMetadataWriter;
using fabric::detail::DistributedReader;
using fabric::detail::StoredEntry;
using fabric::detail::StoredItem;
namespace fs = std::filesystem;

struct Folder {
  fs::path path;
  Folder() {
    std::string name = fs::temp_directory_path() / "fabric-dcp-XXXXXX";
    path = mkdtemp(name.data());
  }
  ~Folder() { fs::remove_all(path); }
  Folder(const Folder&) = delete;
  Folder& operator=(const Folder&) = delete;
  [[nodiscard]] std::string operator/(const std::string& name) const { return path / name; }
};

std::string bytes_of(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}
void write_bytes(const std::string& path, const std::string& bytes) {
  std::ofstream(path, std::ios::binary | std::ios::trunc) << bytes;
}

/// Writes a tensor as ranks do that hold parts of `part` elements of it.
void write_parts(const std::string& folder, const at::Tensor& tensor, std::int64_t part) {
  fs::create_directories(folder);
  std::vector<StoredEntry> entries;
  Dict files;
  for (std::int64_t begin = 0, rank = 0; begin < tensor.numel(); begin += part, ++rank) {
    DistributedFile file(folder, "__" + std::to_string(rank) + "_0.distcp");
    const std::int64_t end = std::min(begin + part, tensor.numel());
    for (const Box& box : boxes_of_range(tensor.sizes(), begin, end)) {
      file.add("net.w", {"net", "w"}, tensor.sizes(), box, part_of(tensor, Box::whole(tensor.sizes()), box));
    }
    if (rank == 0) file.add("step", {"step"}, Value(7));
    file.commit();
    files[file.name()] = file.facts();
    for (const StoredEntry& entry : file.entries()) {
      if (rank == 0) {
        entries.push_back(entry);
      } else {
        entries[0].items.insert(entries[0].items.end(), entry.items.begin(), entry.items.end());
      }
    }
  }
  fabric::detail::write_distributed_metadata(folder, entries, {{"format", 1}, {"files", std::move(files)}});
}

/// Reads the elements [begin, end) of it.
at::Tensor read_range(const DistributedReader& reader, std::int64_t begin, std::int64_t end) {
  const StoredEntry& entry = *reader.find("net.w");
  at::Tensor range = at::full({end - begin}, -1, *entry.dtype);
  std::int64_t done = 0;
  for (const Box& box : boxes_of_range(entry.sizes, begin, end)) {
    reader.check(entry, box);
    reader.read(entry, {box, range.narrow(0, done, box.numel()).view(box.sizes)});
    done += box.numel();
  }
  return range;
}

StoredEntry entry_of(const std::string& key, std::vector<std::int64_t> sizes, const std::vector<Box>& boxes) {
  StoredEntry entry{key, {key}, at::kFloat, std::move(sizes), {}};
  for (const Box& box : boxes) {
    entry.items.push_back({box, "__0_0.distcp", 100 * entry.items.size(), 4 * static_cast<std::uint64_t>(box.numel())});
  }
  return entry;
}
std::vector<StoredEntry> reread(const std::vector<StoredEntry>& entries) {
  return DistributedMetadataReader::read(DistributedMetadataWriter(entries).pickle(), ".metadata");
}

}  // namespace

TEST_CASE("[issue-8.7] a flat range of a tensor of N dimensions is at most 2N - 1 boxes, in its order") {
  const std::vector<std::vector<std::int64_t>> shapes{{},        {5},       {1},          {3, 4},          {1, 6},
                                                      {2, 3, 4}, {4, 1, 3}, {2, 3, 2, 3}, {2, 1, 3, 2, 2}, {0, 3}};
  for (const auto& shape : shapes) {
    const at::Tensor all = at::arange(c10::multiply_integers(shape)).view(shape);
    for (std::int64_t begin = 0; begin <= all.numel(); ++begin) {
      for (std::int64_t end = begin; end <= all.numel(); ++end) {
        const auto boxes = boxes_of_range(shape, begin, end);
        std::vector<std::int64_t> seen;
        for (const Box& box : boxes) {
          const at::Tensor part = part_of(all, Box::whole(shape), box).reshape({-1});
          REQUIRE(part.numel() == box.numel());
          for (std::int64_t i = 0; i < part.numel(); ++i) seen.push_back(part[i].item<std::int64_t>());
        }
        std::vector<std::int64_t> expected(static_cast<std::size_t>(end - begin));
        std::iota(expected.begin(), expected.end(), begin);
        REQUIRE(seen == expected);
        REQUIRE(boxes.size() <= std::max<std::size_t>(1, 2 * shape.size() - (shape.empty() ? 0 : 1)));
        REQUIRE_FALSE(overlap(boxes));
      }
    }
  }
  CHECK(boxes_of_range({3, 4, 5}, 7, 54).size() == 5);
  CHECK(overlap({{{0, 0}, {2, 2}}, {{2, 0}, {2, 2}}, {{1, 1}, {1, 1}}}));
  CHECK_FALSE(overlap({{{0, 0}, {2, 2}}, {{0, 2}, {2, 2}}, {{2, 0}, {1, 4}}}));
}

TEST_CASE("[issue-8.7] .metadata comes back as it was written") {
  StoredEntry value{"optimizer.param_groups.0.lr", {"optimizer", "param_groups", std::int64_t{0}, "lr"}, {}, {}, {}};
  value.items.push_back({{}, "__0_0.distcp", 5'000'000'000, 70000});
  const std::vector<StoredEntry> entries{entry_of("w", {4, 3}, {{{0, 0}, {2, 3}}, {{2, 0}, {2, 3}}}),
                                         entry_of("scalar", {}, {{{}, {}}}),
                                         entry_of("nothing", {0, 2}, {{{0, 0}, {0, 2}}}), value};
  const auto read = reread(entries);
  REQUIRE(read.size() == entries.size());
  for (std::size_t i = 0; i < read.size(); ++i) {
    CHECK(read[i].key == entries[i].key);
    CHECK((read[i].path == entries[i].path));
    CHECK(read[i].dtype == entries[i].dtype);
    CHECK(read[i].sizes == entries[i].sizes);
    REQUIRE(read[i].items.size() == entries[i].items.size());
    for (std::size_t k = 0; k < read[i].items.size(); ++k) {
      CHECK(read[i].items[k].box == entries[i].items[k].box);
      CHECK(read[i].items[k].file == entries[i].items[k].file);
      CHECK(read[i].items[k].offset == entries[i].items[k].offset);
      CHECK(read[i].items[k].length == entries[i].items[k].length);
    }
  }
}

TEST_CASE("[issue-8.7] a .metadata that contradicts itself is refused by the key") {
  const auto refusal = [](StoredEntry entry) -> std::string {
    try {
      (void)reread({std::move(entry)});
    } catch (const DamagedCheckpoint& error) {
      return error.what();
    }
    return "";
  };
  CHECK(refusal(entry_of("w", {4}, {{{0}, {2}}, {{2}, {2}}})).empty());
  CHECK_THAT(refusal(entry_of("w", {4}, {{{0}, {2}}})), ContainsSubstring("'w' overlap, or do not cover it"));
  CHECK_THAT(refusal(entry_of("w", {4}, {{{0}, {3}}, {{2}, {2}}})), ContainsSubstring("overlap, or do not cover"));
  CHECK_THAT(refusal(entry_of("w", {4}, {{{0}, {2}}, {{1}, {2}}})), ContainsSubstring("overlap, or do not cover"));
  CHECK_THAT(refusal(entry_of("w", {4}, {{{2}, {4}}})), ContainsSubstring("does not lie inside"));
  CHECK_THAT(refusal(entry_of("w", {4}, {{{-1}, {4}}})), ContainsSubstring("negative"));
  CHECK_THAT(refusal(entry_of("w", {4}, {{{0, 0}, {4, 1}}})), ContainsSubstring("does not lie inside"));
  CHECK_THAT(refusal(entry_of("w", {std::int64_t{1} << 40, std::int64_t{1} << 40}, {})),
             ContainsSubstring("more elements"));
  auto entry = entry_of("w", {4}, {{{0}, {4}}});
  entry.items[0].length = 15;
  CHECK_THAT(refusal(entry), ContainsSubstring("more elements than bytes"));
  for (const char* file : {"../x.distcp", "/etc/passwd", "a/b.distcp", "..", ""}) {
    entry.items[0].file = file;
    CHECK_THAT(refusal(entry),
               ContainsSubstring("which is no file of this folder") || ContainsSubstring("does not say"));
  }
}

TEST_CASE("[issue-8.7] an object of an unknown class in .metadata is refused by its name, and nothing is run") {
  // Python: pickle.dumps of an object whose __reduce__ is (os.system, ("true",)), protocol 2.
  const std::string pickle(
      "\x80\x02"
      "cposix\nsystem\nX\x04\x00\x00\x00true\x85R.",
      33 - 4);
  try {
    (void)DistributedMetadataReader::read(pickle, "the file");
    FAIL("it was read");
  } catch (const DamagedCheckpoint& error) {
    CHECK_THAT(error.what(), ContainsSubstring("posix.system") && ContainsSubstring("code in a file is never run"));
  }
}

TEST_CASE("[issue-8.7] parts of any ranks are read as parts of any others, and as a whole") {
  const Folder folder;
  const at::Tensor tensor = at::randn({5, 4, 3});
  for (const std::int64_t part : {60, 20, 7}) {
    const std::string name = folder / std::to_string(part);
    write_parts(name, tensor, part);
    const DistributedReader reader(name);
    CHECK(reader.value(*reader.find("step")).as<std::int64_t>("step") == 7);
    for (const std::int64_t other : {60, 30, 13, 1}) {
      for (std::int64_t begin = 0; begin < 60; begin += other) {
        const std::int64_t end = std::min<std::int64_t>(begin + other, 60);
        CHECK(read_range(reader, begin, end).equal(tensor.flatten().slice(0, begin, end)));
      }
    }
  }
}

TEST_CASE("[issue-8.7] a rank reads and verifies only what it needs of a large tensor") {
  const Folder folder;
  const at::Tensor tensor = at::arange(3 << 20, at::kFloat).view({3 << 10, 1 << 10});  // 12 MB, one part
  write_parts(folder / "c", tensor, tensor.numel());
  const std::string file = folder / "c/__0_0.distcp";
  std::string bytes = bytes_of(file);
  const std::size_t place = bytes.size() - (std::size_t{2} << 20);  // in the last third
  bytes[place] = static_cast<char>(bytes[place] ^ 1);
  write_bytes(file, bytes);
  const DistributedReader reader(folder / "c");
  CHECK(read_range(reader, 0, 1 << 20).equal(tensor.flatten().slice(0, 0, 1 << 20)));
  CHECK_THROWS_AS(read_range(reader, 2 << 20, 3 << 20), DamagedCheckpoint);
}

TEST_CASE("[issue-8.7] whatever byte is flipped or cut off, a damaged folder is refused or read as it was") {
  const Folder folder;
  const at::Tensor tensor = at::randn({6, 5});
  write_parts(folder / "c", tensor, 17);
  const auto read = [&] {
    const DistributedReader reader(folder / "c");
    const bool same = reader.value(*reader.find("step")).as<std::int64_t>("step") == 7;
    return same && read_range(reader, 0, 30).equal(tensor.flatten());
  };
  REQUIRE(read());
  int refused = 0;
  int harmless = 0;
  for (const std::string name : {".metadata", "fabric.json", "__0_0.distcp", "__1_0.distcp"}) {
    const std::string path = folder / ("c/" + name);
    const std::string bytes = bytes_of(path);
    for (std::size_t i = 0; i < bytes.size(); ++i) {
      for (const bool cut : {false, true}) {
        std::string damaged = cut ? bytes.substr(0, i) : bytes;
        if (!cut) damaged[i] = static_cast<char>(damaged[i] ^ (1 << (i % 8)));
        write_bytes(path, damaged);
        try {
          INFO(name << (cut ? " cut at " : " flipped at ") << i);
          // A trailer that is cut off leaves what Python would have written.
          const bool whole = read();
          CHECK(whole);
          ++harmless;
          if (name != "__0_0.distcp" && name != "__1_0.distcp") CHECK(cut);
        } catch (const DamagedCheckpoint&) {
          ++refused;
        }
      }
    }
    write_bytes(path, bytes);
  }
  REQUIRE(read());
  INFO(harmless);
  CHECK(refused > 4 * harmless);
  fs::remove(folder / "c/__1_0.distcp");
  CHECK_THROWS_WITH(DistributedReader(folder / "c"), ContainsSubstring("__1_0.distcp: No such file"));
}

TEST_CASE("[issue-8.7] a whole training state goes through a folder, and through the file that it is made into") {
  const Folder folder;
  Fabric<Cpu, SingleDevice, F32> fabric;
  torch::nn::Sequential net(torch::nn::Linear(3, 4), torch::nn::BatchNorm1d(4), torch::nn::Linear(4, 2));
  auto [model, optimizer] =
      fabric.setup(net, fabric::optim::AdamW(net->parameters(), torch::optim::AdamWOptions(0.01)));
  const auto step = [&, &model = model, &optimizer = optimizer] {
    optimizer.zero_grad();
    fabric.backward(model(torch::randn({5, 3})).pow(2).sum());
    optimizer.step();
  };
  fabric::RandomState random;
  int count = 3;
  std::map<int, double> by_number{{1, 2}, {7, 9}};
  std::map<std::string, int> none;
  at::Tensor tensor = torch::ones({2}, at::kBFloat16);
  at::Tensor undefined;
  std::tuple<int, std::string> pair{4, "four"};
  std::vector<at::Tensor> list{torch::zeros({2}), torch::ones({3})};
  const State state{
      {"model", model}, {"optimizer", optimizer}, {"random", random},       {"count", count}, {"numbers", by_number},
      {"none", none},   {"tensor", tensor},       {"undefined", undefined}, {"pair", pair},   {"list", list}};
  step();
  fabric.save<DistributedCheckpoint>(folder / "c", state);
  const auto weights = net->parameters()[0].clone();
  step();
  const auto after = net->parameters()[0].clone();
  const auto spoil = [&] {
    step();
    count = 0;
    by_number.clear();
    none = {{"x", 1}};
    tensor.zero_();
    undefined = torch::ones({1});
    pair = {};
    list.clear();
  };
  const auto check = [&] {
    CHECK(net->parameters()[0].equal(weights));
    CHECK(count == 3);
    CHECK(by_number == std::map<int, double>{{1, 2}, {7, 9}});
    CHECK(none.empty());
    CHECK(tensor.eq(1).all().item<bool>());
    CHECK_FALSE(undefined.defined());
    CHECK(pair == std::tuple<int, std::string>{4, "four"});
    CHECK((list.size() == 2 && list[1].equal(torch::ones({3}))));
    step();
    CHECK(net->parameters()[0].equal(after));  // the optimizer and the random numbers, too
  };
  spoil();
  const auto loaded = fabric.load<DistributedCheckpoint>(folder / "c", state);
  CHECK(loaded.manifest.at("world_size").as<std::int64_t>("") == 1);
  check();
  consolidate(folder / "c", folder / "c.pt");
  spoil();
  fabric.load(folder / "c.pt", state);
  check();
  // What does not fit changes nothing.
  torch::nn::Sequential wider(torch::nn::Linear(3, 5), torch::nn::BatchNorm1d(4), torch::nn::Linear(4, 2));
  const auto before = wider->parameters()[5].clone();
  CHECK_THROWS_WITH(fabric.load<DistributedCheckpoint>(folder / "c", {{"model", wider}}),
                    ContainsSubstring("'model.0.weight' is Float [4, 3] in it, and Float [5, 3] here") &&
                        ContainsSubstring("nothing was changed"));
  CHECK(wider->parameters()[5].equal(before));
  // A part of it, with what is left over but for tensors.
  const auto some = fabric.load<DistributedCheckpoint>(folder / "c", {{"model", net}});
  CHECK(some.rest.as<Dict>("").at("count").as<std::int64_t>("") == 3);
}

TEST_CASE("[issue-8.7] an optimizer finds the state of its parameters by their names, in whatever order and groups") {
  const Folder folder;
  Fabric<Cpu, SingleDevice, F32> fabric;
  const auto make = [&](bool swapped) {
    torch::nn::Linear net(3, 2);
    auto first = std::vector<at::Tensor>{swapped ? net->bias : net->weight};
    auto second = std::vector<at::Tensor>{swapped ? net->weight : net->bias};
    const auto options = [](double rate) { return std::make_unique<torch::optim::SGDOptions>(rate); };
    std::vector<torch::optim::OptimizerParamGroup> groups;
    groups.emplace_back(first, options(swapped ? 0.2 : 0.1));
    groups.emplace_back(second, options(swapped ? 0.1 : 0.2));
    for (auto& group : groups) static_cast<torch::optim::SGDOptions&>(group.options()).momentum(0.9);
    return std::pair(net, torch::optim::SGD(groups, torch::optim::SGDOptions(0.5).momentum(0.9)));
  };
  auto [net, made] = make(false);
  auto [model, optimizer] = fabric.setup(net, made);
  fabric.backward(model(torch::ones({1, 3})).sum());
  optimizer.step();
  fabric.save<DistributedCheckpoint>(folder / "c", {{"optimizer", optimizer}, {"model", model}});
  consolidate(folder / "c", folder / "c.pt");
  for (const bool swapped : {false, true}) {
    for (const bool one_file : {false, true}) {
      auto [other, other_made] = make(swapped);
      auto [other_model, other_optimizer] = fabric.setup(other, other_made);
      for (auto& group : other_optimizer->param_groups()) group.options().set_lr(7);
      const State state{{"model", other_model}, {"optimizer", other_optimizer}};
      one_file ? fabric.load(folder / "c.pt", state) : fabric.load<DistributedCheckpoint>(folder / "c", state);
      // In groups that are others than they were, the rates stay with the parameters.
      auto& kept = other_optimizer->state();
      const auto momentum = [&](const at::Tensor& parameter) {
        return static_cast<torch::optim::SGDParamState&>(*kept.at(parameter.unsafeGetTensorImpl())).momentum_buffer();
      };
      CHECK(momentum(other->weight).equal(torch::ones({2, 3})));
      CHECK(momentum(other->bias).equal(torch::ones({2})));
      for (auto& group : other_optimizer->param_groups()) {
        const bool of_weight = group.params().at(0).is_same(other->weight);
        CHECK(group.options().get_lr() == (of_weight ? 0.1 : 0.2));
      }
    }
  }
  // Without the model there are no names; the order must do.
  auto [other, other_made] = make(false);
  auto other_optimizer = fabric.setup(other_made);
  fabric.load<DistributedCheckpoint>(folder / "c", {{"optimizer", other_optimizer}});
  CHECK(other_optimizer->state().size() == 2);
}

TEST_CASE("[issue-8.7] a folder is replaced whole, and never one that holds something else") {
  const Folder folder;
  Fabric<Cpu, SingleDevice, F32> fabric;
  at::Tensor x = torch::ones({3});
  fabric.save<DistributedCheckpoint>(folder / "c", {{"x", x}});
  x.fill_(2);
  fabric.save<DistributedCheckpoint>(folder / "c/", {{"x", x}});
  x.zero_();
  fabric.load<DistributedCheckpoint>(folder / "c", {{"x", x}});
  CHECK(x.equal(torch::full({3}, 2.F)));
  CHECK(std::distance(fs::directory_iterator(folder.path), {}) == 1);  // nothing is left beside it
  // A save that fails leaves the old one.
  CHECK_THROWS_WITH(fabric.save<DistributedCheckpoint>(folder / "c", {{"x", torch::eye(2).to_sparse()}}),
                    ContainsSubstring("'x' is not a dense tensor"));
  fabric.load<DistributedCheckpoint>(folder / "c", {{"x", x}});
  CHECK(std::distance(fs::directory_iterator(folder.path), {}) == 1);
  // A job that was killed between the two renames of a file system that cannot exchange names.
  fs::rename(folder / "c", folder / ".c.old");
  x.zero_();
  fabric.load<DistributedCheckpoint>(folder / "c", {{"x", x}});
  CHECK(x.equal(torch::full({3}, 2.F)));
  fabric.save<DistributedCheckpoint>(folder / "c", {{"x", x}});
  CHECK(std::distance(fs::directory_iterator(folder.path), {}) == 1);
  write_bytes(folder / "c/notes.txt", "important");
  CHECK_THROWS_WITH(fabric.save<DistributedCheckpoint>(folder / "c", {{"x", x}}),
                    ContainsSubstring("it has notes.txt, which is no part of a checkpoint"));
  CHECK(fs::exists(folder / "c/notes.txt"));
  write_bytes(folder / "file", "x");
  CHECK_THROWS_WITH(fabric.save<DistributedCheckpoint>(folder / "file", {{"x", x}}),
                    ContainsSubstring("a file has that"));
}

TEST_CASE("[issue-8.7] the newest folders stay, with latest") {
  const Folder folder;
  Fabric<Cpu, SingleDevice, F32> fabric;
  std::int64_t step = 0;
  at::Tensor x = torch::zeros({3});
  const State state{{"step", step}, {"x", x}};
  using Folders = fabric::Checkpoints<Fabric<Cpu, SingleDevice, F32>, DistributedCheckpoint>;
  CHECK_THROWS_WITH(Folders(fabric, {.folder = folder / "run", .asynchronous = true}), ContainsSubstring("background"));
  Folders checkpoints(fabric, {.folder = folder / "run", .keep = 2});
  CHECK_FALSE(checkpoints.load_latest(state).has_value());
  for (step = 1; step <= 4; ++step) {
    x.fill_(static_cast<double>(step));
    checkpoints.save(step, state);
  }
  CHECK(fs::read_symlink(folder / "run/latest") == "step-0000000004");
  CHECK_FALSE(fs::exists(folder / "run/step-0000000002"));
  REQUIRE(checkpoints.load_latest(state).has_value());
  CHECK((step == 4 && x[0].item<float>() == 4));
  const std::string file = folder / "run/step-0000000004/__0_0.distcp";
  const std::string bytes = bytes_of(file);
  std::string damaged = bytes;  // in the middle of the last item, the tensor
  const std::size_t place = bytes.rfind(std::string("\x00\x00\x80\x40\x00\x00\x80\x40", 8));
  REQUIRE(place != std::string::npos);
  damaged[place] = 1;
  for (const std::string& text : {bytes.substr(0, 100), damaged}) {
    write_bytes(file, text);
    const auto loaded = checkpoints.load_latest(state);
    REQUIRE(loaded.has_value());
    CHECK(loaded->damaged.size() == 1);
    CHECK((step == 3 && x[0].item<float>() == 3));
    step = 0;
  }
  fs::remove_all(folder / "run/step-0000000003");
  CHECK_THROWS_WITH(checkpoints.load_latest(state),
                    ContainsSubstring("no checkpoint in") && ContainsSubstring("is whole"));
}
