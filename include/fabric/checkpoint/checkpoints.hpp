// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <exception>
#include <filesystem>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#include <dirent.h>
#include <sys/stat.h>
#include <unistd.h>

#include "fabric/checkpoint/file.hpp"
#include "fabric/checkpoint/ranks.hpp"
#include "fabric/checkpoint/save_load.hpp"
#include "fabric/checkpoint/state.hpp"
#include "fabric/error.hpp"

namespace fabric {

/// How `Checkpoints` keeps its folder.
struct CheckpointsOptions {
  std::string folder;
  std::size_t keep = 2;       ///< The newest that stay; the others are deleted. At least 1.
  bool asynchronous = false;  ///< Write in the background what the state was when it was saved.
  std::chrono::milliseconds patience = detail::default_patience;  ///< See `Fabric::save`.
};

namespace detail {

/// The folder of checkpoints of one job, as rank 0 sees it.
class CheckpointFolder {
 public:
  CheckpointFolder(std::string folder, std::string_view extension, std::size_t keep)
      : folder_(std::move(folder)), extension_(extension), keep_(keep) {}

  [[nodiscard]] std::string path_of(const std::string& name) const { return folder_ + "/" + name; }
  [[nodiscard]] std::string name_of(std::int64_t step) const {
    char number[32];
    std::snprintf(number, sizeof number, "step-%010lld", static_cast<long long>(step));
    return number + std::string(extension_);
  }
  [[nodiscard]] std::string latest() const {
    char name[4096];
    const ssize_t size = readlink(path_of("latest").c_str(), name, sizeof name);
    return size <= 0 ? "" : std::string(name, static_cast<std::size_t>(size));
  }

  /// Makes the folder, and clears what a killed job left half-written.
  void open() const {
    make_folder(folder_);
    for (const std::string& name : names()) {
      if (name.starts_with(".") && name.ends_with(".tmp")) remove(name);
    }
  }

  /// `latest` becomes a link to that file, from one moment to the next; then the oldest files beyond `keep` go.
  void publish(const std::string& name) const {
    const std::string temporary = path_of(".latest.tmp");
    unlink(temporary.c_str());
    if (symlink(name.c_str(), temporary.c_str()) != 0 || rename(temporary.c_str(), path_of("latest").c_str()) != 0) {
      file_error("write", path_of("latest"), errno);
    }
    sync_folder(folder_);
    std::vector<std::pair<std::int64_t, std::string>> by_age;
    for (const std::string& file : checkpoints()) {
      struct stat facts {};
      if (file == name || stat(path_of(file).c_str(), &facts) != 0) continue;
      constexpr std::int64_t nanoseconds = 1'000'000'000;
      by_age.emplace_back(-(facts.st_mtim.tv_sec * nanoseconds + facts.st_mtim.tv_nsec), file);
    }
    std::sort(by_age.begin(), by_age.end());
    for (std::size_t i = std::max<std::size_t>(keep_, 1) - 1; i < by_age.size(); ++i) {
      remove(by_age[i].second);
    }
  }

  /// The one that `latest` means, then the others, the highest step first.
  [[nodiscard]] std::vector<std::string> candidates() const {
    std::vector<std::string> files = checkpoints();
    std::sort(files.rbegin(), files.rend());
    const std::string linked = latest();
    const auto found = std::find(files.begin(), files.end(), linked);
    if (found != files.end()) std::rotate(files.begin(), found, found + 1);
    return files;
  }

 private:
  [[nodiscard]] std::vector<std::string> names() const {
    std::vector<std::string> found;
    DIR* folder = opendir(folder_.c_str());
    if (folder == nullptr) return found;
    while (const dirent* entry = readdir(folder)) found.emplace_back(entry->d_name);
    closedir(folder);
    return found;
  }
  [[nodiscard]] std::vector<std::string> checkpoints() const {
    std::vector<std::string> found = names();
    std::erase_if(found, [this](const std::string& name) {
      // Folders have no extension; files of another format beside them have one.
      const bool other = extension_.empty() && name.find('.') != std::string::npos;
      return !name.starts_with("step-") || !name.ends_with(extension_) || other;
    });
    return found;
  }
  void remove(const std::string& name) const {
    std::error_code error;
    std::filesystem::remove_all(path_of(name), error);
  }

  std::string folder_;
  std::string extension_;
  std::size_t keep_;
};

}  // namespace detail

/// The checkpoints of a job in a folder: `step-0000000100.pt` and so on, of which the newest stay, and `latest`, a link
/// to the newest whole one. All ranks make it and call its members together.
///
///     Checkpoints checkpoints(fabric, {.folder = "run", .keep = 2});
///     const State state{{"model", model}, {"optimizer", optimizer}, {"step", step}};
///     checkpoints.load_latest(state);
///     ...
///     checkpoints.save(step, state);
template <class F, class Io = TorchFile>
class Checkpoints {
 public:
  /// Makes the folder. Throws fabric::Error if that is not possible. `fabric` must outlive this object.
  Checkpoints(const F& fabric, CheckpointsOptions options)
      : fabric_(fabric), options_(std::move(options)), folder_(options_.folder, Io::extension, options_.keep) {
    Ranks ranks(fabric_.world(), "opening the checkpoints in " + options_.folder, options_.patience);
    ranks.agree(detail::problem_of([&] {
      if (detail::Checkpointing<Io>::is_folder && options_.asynchronous) {
        throw Error(
            "fabric: checkpoints: a DistributedCheckpoint is not written in the background: set asynchronous "
            "= false, or use TorchFile");
      }
      if (options_.keep == 0) throw Error("fabric: checkpoints: keep is 0; one or more is legal");
      if (fabric_.is_global_zero()) folder_.open();
    }));
  }
  /// Waits for a write in the background. What it fails with is printed; call `close` to have it thrown.
  ~Checkpoints() {
    wait();
    try {
      if (failed_) std::rethrow_exception(failed_);
    } catch (const std::exception& error) {
      std::fprintf(stderr, "%s\n", error.what());
    } catch (...) {
      std::fputs("fabric: writing a checkpoint failed\n", stderr);
    }
  }
  Checkpoints(const Checkpoints&) = delete;
  Checkpoints& operator=(const Checkpoints&) = delete;

  /// Saves the state as it is now, under the number of a step. If asynchronous, it returns as soon as the state is
  /// copied and the write before this one is done; what that one failed with is thrown now.
  template <class S = State>
  void save(std::int64_t step, const S& state, const Filter& filter = {}) {
    Ranks ranks(fabric_.world(), "save of step " + std::to_string(step) + " in " + options_.folder, options_.patience);
    ranks.agree();
    finish(ranks);
    Spread spread;
    Value value = detail::Checkpointing<Io>::collect(state, filter, ranks, spread);
    const Dict manifest = detail::Checkpointing<Io>::manifest(fabric_);
    const std::string name = folder_.name_of(step);
    if constexpr (detail::Checkpointing<Io>::is_folder) {
      Io::save(folder_.path_of(name), value, spread, manifest, ranks);
      ranks.agree(detail::problem_of([&] {
                    if (fabric_.is_global_zero()) folder_.publish(name);
                  }),
                  detail::reading_time);
    } else {
      const auto write = [this, manifest, name](const Value& what, const auto&... memory_of) {
        detail::write_file<Io>(folder_.path_of(name), what, manifest, memory_of...);
        folder_.publish(name);
      };
      if (!options_.asynchronous) return detail::Checkpointing<Io>::write_whole(value, spread, ranks, write);
      detail::Checkpointing<Io>::write_whole(value, spread, ranks, [&](const Value& whole) {
        auto snapshot = std::make_shared<Value>(detail::DeepCopy().copy(whole));
        writer_ = std::thread([this, write, snapshot]() mutable {
          failed_ = detail::problem_of([&] { write(*snapshot); });
          snapshot.reset();
        });
      });
    }
  }

  /// Loads the newest checkpoint that is whole: the one that `latest` means, or if that is damaged or lost the one
  /// before it; which were not, and why, is printed and told in the result. Nothing if there is none yet. Throws
  /// fabric::Error if all are damaged, or if a whole one does not fit; nothing is changed then.
  template <class S = State>
  std::optional<Loaded> load_latest(S&& state, bool strict = true) {
    Ranks ranks(fabric_.world(), "load from " + options_.folder, options_.patience);
    ranks.agree();
    finish(ranks);
    std::vector<std::string> damaged;
    std::vector<std::string> refused;  // names of those that turned out to be damaged while they were loaded
    for (;;) {
      std::string chosen;
      std::optional<CheckpointContents> read;
      const auto problem = detail::problem_of([&] {
        if (fabric_.is_global_zero()) choose(refused, damaged, chosen, read);
      });
      ranks.agree(problem, detail::reading_time);
      chosen = ranks.from_zero(chosen);
      if (chosen.empty()) return std::nullopt;
      try {
        Loaded loaded = detail::Checkpointing<Io>::load(ranks, folder_.path_of(chosen), std::move(read), state, strict);
        loaded.damaged = std::move(damaged);
        return loaded;
      } catch (const DamagedCheckpoint& error) {  // on all ranks
        damaged.emplace_back(error.what());
        refused.push_back(chosen);
      }
    }
  }

  /// Waits for a write in the background and throws fabric::Error if it failed.
  void close() {
    Ranks ranks(fabric_.world(), "closing the checkpoints in " + options_.folder, options_.patience);
    ranks.agree();
    finish(ranks);
  }

 private:
  void wait() {
    if (writer_.joinable()) writer_.join();
  }
  /// The write before this one is done, and all ranks know what it failed with.
  void finish(Ranks& ranks) {
    if (!options_.asynchronous) return;
    wait();
    ranks.agree(std::exchange(failed_, nullptr), detail::reading_time);
  }

  void choose(std::vector<std::string>& refused, std::vector<std::string>& damaged, std::string& chosen,
              std::optional<CheckpointContents>& read) const {
    for (const std::string& name : folder_.candidates()) {
      if (std::find(refused.begin(), refused.end(), name) != refused.end()) continue;
      try {
        const std::string path = folder_.path_of(name);
        read = detail::Checkpointing<Io>::read_from(path);
        chosen = name;
        break;
      } catch (const DamagedCheckpoint& error) {
        damaged.emplace_back(error.what());
        refused.push_back(name);
      }
    }
    if (const std::string linked = folder_.latest(); !linked.empty() && linked != chosen && damaged.empty()) {
      damaged.push_back("fabric: " + folder_.path_of(linked) + ", which " + folder_.path_of("latest") +
                        " means, is not there");
    }
    if (damaged.empty()) return;
    std::string all;
    for (const std::string& one : damaged) all += one + "\n";
    if (chosen.empty()) throw DamagedCheckpoint(all + "fabric: no checkpoint in " + options_.folder + " is whole");
    std::fprintf(stderr, "%sfabric: going back to %s\n", all.c_str(), folder_.path_of(chosen).c_str());
  }

  const F& fabric_;
  CheckpointsOptions options_;
  detail::CheckpointFolder folder_;
  std::thread writer_;
  std::exception_ptr failed_;
};

template <class F>
Checkpoints(const F&, CheckpointsOptions) -> Checkpoints<F>;

}  // namespace fabric
