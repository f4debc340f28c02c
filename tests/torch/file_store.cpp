// SPDX-License-Identifier: Apache-2.0
// labels: torch sharding
#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <functional>
#include <string>
#include <vector>

#include <fcntl.h>
#include <malloc.h>
#include <torch/torch.h>
#include <unistd.h>

#include "fabric/shard/file_store.hpp"
#include "fabric/shard/file_transfers.hpp"
#include "support/catch.hpp"

namespace {

using namespace fabric;
namespace fs = std::filesystem;

/// A folder that is gone after the test.
struct Folder {
  std::string path = fs::temp_directory_path() / "fabric-file-store-XXXXXX";

  Folder() { path = mkdtemp(path.data()); }
  ~Folder() { fs::remove_all(path); }
  Folder(const Folder&) = delete;
  Folder& operator=(const Folder&) = delete;
};

/// This process's memory, in bytes.
std::int64_t resident() {
  std::ifstream file("/proc/self/statm");
  std::int64_t all = 0;
  std::int64_t in_memory = 0;
  file >> all >> in_memory;
  return in_memory * sysconf(_SC_PAGESIZE);
}

constexpr std::int64_t mebibyte = 1 << 20;

std::string message_of(const std::function<void()>& function) {
  try {
    function();
  } catch (const Error& error) {
    return error.what();
  }
  return "";
}

/// Runs a test for each way of having pages.
template <class Test>
void each_way(const Test& test) {
  SECTION("mapped") { test(static_cast<MappedPages*>(nullptr)); }
  SECTION("buffered") { test(static_cast<BufferedPages*>(nullptr)); }
}

}  // namespace

TEST_CASE("[issue-8.4] tensors in a file: what was written is there again, and memory stays bounded") {
  each_way([]<class Pages>(Pages* /*type*/) {
    const Folder folder;
    constexpr int number = 16;
    constexpr std::int64_t size = 16 * mebibyte;
    FileStore<Pages> store(folder.path, number * size);
    REQUIRE(at::ones({size / 4}).eq(1).all().item<bool>());  // loads the kernels' code
    malloc_trim(0);
    const std::int64_t before = resident();
    std::int64_t most = 0;
    std::vector<at::Tensor> tensors;
    for (int i = 0; i < number; ++i) {
      tensors.push_back(store.tensor({size / 8, 2}, at::kFloat));
      REQUIRE(tensors.back().count_nonzero().item<std::int64_t>() == 0);
      tensors.back().fill_(i + 1);
      most = std::max(most, resident() - before);
      store.release(tensors.back());
    }
    // As an optimizer goes through them, three times: two are here, of which one is coming, and one is leaving.
    for (int step = 1; step <= 3; ++step) {
      for (int i = 0; i < number; ++i) {
        store.fetch(tensors[i]);
        if (i + 1 < number) store.prefetch(tensors[i + 1]);
        REQUIRE(tensors[i].eq(step * (i + 1)).all().item<bool>());
        tensors[i].add_(i + 1);
        most = std::max(most, resident() - before);
        store.release(tensors[i]);
      }
    }
    store.finish();
    malloc_trim(0);
    CAPTURE(most / mebibyte);
    CHECK(most < 5 * size);  // of sixteen: three tensors, and what operators and threads need for themselves
    CHECK(most > size / 2);  // otherwise nothing was measured
    CHECK(resident() - before < size / 2);
  });
}

TEST_CASE("[issue-8.4] who looks at what was released finds its values, again and again") {
  each_way([]<class Pages>(Pages* /*type*/) {
    const Folder folder;
    constexpr std::int64_t size = 3 * mebibyte;  // of whole pages and more than one transfer
    FileStore<Pages> store(folder.path, 3 * size);
    std::vector<at::Tensor> tensors;
    tensors.reserve(3);
    for (int i = 0; i < 3; ++i) tensors.push_back(store.tensor({size / 4}, at::kFloat));
    for (int step = 0; step < 3; ++step) {
      for (int i = 0; i < 3; ++i) {
        store.fetch(tensors[i]);
        tensors[i].fill_(10 * step + i);
        store.release(tensors[i]);
      }
      if (step > 0) store.finish();
      for (int i = 0; i < 3; ++i) REQUIRE(tensors[i].eq(10 * step + i).all().item<bool>());
    }
  });
}

TEST_CASE("[issue-8.4] the engine's store is mapped, or goes past the cache, as the program says") {
  const Folder folder;
  for (const bool past_cache : {false, true}) {
    FileStore<> store(folder.path, mebibyte, past_cache);
    const at::Tensor tensor = store.tensor({1000}, at::kFloat);
    tensor.fill_(3);
    store.release(tensor);
    store.finish();
    REQUIRE(store.fetch(tensor));
    REQUIRE_FALSE(store.fetch(tensor));
    tensor.fill_(4);
    store.discard(tensor);
    // The pages of the cache are the file's own, where nothing is discarded.
    REQUIRE(tensor.eq(past_cache ? 3 : 4).all().item<bool>());
  }
}

TEST_CASE("[issue-8.4] a disk that fails is an error of the range that it failed at, once") {
  const Folder folder;
  const int only_writable = open((folder.path + "/file").c_str(), O_CREAT | O_WRONLY | O_CLOEXEC, 0600);
  REQUIRE(only_writable >= 0);
  {
    constexpr std::int64_t size = 8 * mebibyte;
    std::vector<char> memory(static_cast<std::size_t>(2 * size), 'x');
    fabric::detail::FileTransfers transfers(only_writable, memory.data());
    const fabric::detail::FileRange unreadable{0, size};
    const fabric::detail::FileRange written{size, size};
    bool others_are_well = false;
    const std::string message = message_of([&] {
      transfers.begin_read(unreadable);
      transfers.begin_write(written);
      transfers.finish(written);
      others_are_well = true;
      transfers.finish(unreadable);
    });
    REQUIRE(message.starts_with("fabric: offload: the disk failed to give back"));
    REQUIRE(others_are_well == transfers.in_background());  // otherwise reading has failed at once
    transfers.finish(unreadable);
  }
  close(only_writable);
}

TEST_CASE("[issue-8.4] the tensors are no copies, keep their addresses, and outlive the store") {
  each_way([]<class Pages>(Pages* /*type*/) {
    const Folder folder;
    at::Tensor tensor;
    at::Tensor other;
    {
      FileStore<Pages> store(folder.path, 2 * store.rounded(1000 * 8));
      tensor = store.tensor({1000}, at::kDouble);
      other = store.tensor({10, 100}, at::kDouble);
      const void* const address = tensor.data_ptr();
      const at::Tensor part = tensor.narrow(0, 990, 10);
      part.fill_(7);
      other.fill_(3);
      store.release(part);  // means all of `tensor`
      store.release(part);
      store.prefetch(tensor);
      store.fetch(tensor);
      store.fetch(tensor);
      part.add_(1);
      store.release(tensor);
      store.release(other);
      store.fetch(other);
      store.fetch(tensor);
      REQUIRE(tensor.data_ptr() == address);
      REQUIRE(part[0].item<double>() == 8);
    }
    REQUIRE(tensor.sum().item<double>() == 80);
    REQUIRE(other.mean().item<double>() == 3);
    tensor.set_requires_grad(true);
    tensor.square().sum().backward();
    REQUIRE(tensor.grad().sum().item<double>() == 160);
  });
}

TEST_CASE("[issue-8.4] the file has no name from the beginning, so that nothing is left of a process that is killed") {
  each_way([]<class Pages>(Pages* /*type*/) {
    const Folder folder;
    FileStore<Pages> store(folder.path, mebibyte);
    const at::Tensor tensor = store.tensor({1000}, at::kFloat);
    tensor.fill_(1);
    store.release(tensor);
    store.finish();
    REQUIRE(fs::is_empty(folder.path));
  });
}

TEST_CASE("[issue-8.4] a full disk, a wrong folder and a full store are errors that say what is missing") {
  each_way([]<class Pages>(Pages* /*type*/) {
    const Folder folder;
    constexpr std::int64_t too_much = std::int64_t{1} << 60;
    const std::string full = message_of([&] { FileStore<Pages>(folder.path, too_much); });
    REQUIRE(full.starts_with("fabric: offload: the folder " + folder.path + " cannot hold 1152921504606846976 bytes"));
    REQUIRE(full.find("No space left on device") != std::string::npos);
    REQUIRE(full.find("are free") != std::string::npos);

    const std::string nowhere = message_of([&] { FileStore<Pages>(folder.path + "/nowhere", mebibyte); });
    REQUIRE(nowhere.starts_with("fabric: offload: no file can be made in the folder " + folder.path + "/nowhere"));
    REQUIRE(nowhere.find("No such file or directory") != std::string::npos);

    FileStore<Pages> store(folder.path, 8192);
    const at::Tensor half = store.tensor({5}, at::kFloat);
    const std::string small = message_of([&] { (void)store.tensor({1025}, at::kFloat); });
    REQUIRE(small.starts_with("fabric: FileStore: 4100 bytes (0.0 MiB) are wanted, but of 8192 bytes"));
    REQUIRE(message_of([&] { store.release(at::zeros({3})); }) ==
            "fabric: FileStore: a tensor that lies in none of the store's was given to it");
    REQUIRE(store.tensor({1024}, at::kFloat).numel() == 1024);
    REQUIRE(store.tensor({0, 3}, at::kFloat).numel() == 0);
    store.release(store.tensor({0}, at::kFloat));
  });
}
