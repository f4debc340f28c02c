// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <dirent.h>
#include <dlfcn.h>
#include <unistd.h>

#include <algorithm>
#include <climits>
#include <cstdio>
#include <deque>
#include <string>
#include <string_view>
#include <vector>

#include "fabric/connector/cores.hpp"
#include "fabric/connector/cuda_visible_devices.hpp"
#include "fabric/connector/host.hpp"

extern "C" char** environ;  // NOLINT(readability-redundant-declaration): POSIX leaves it to the program

namespace fabric {

/// This process's environment variables as they were when it was made. It owns them: `Variables` made from it are valid
/// as long as it is.
class CapturedVariables {
 public:
  CapturedVariables() {
    for (char** entry = environ; entry != nullptr && *entry != nullptr; ++entry) texts_.emplace_back(*entry);
    for (const std::string& text : texts_) {
      const std::string_view view = text;
      const std::size_t equals = std::min(view.find('='), view.size());
      variables_.push_back({view.substr(0, equals), view.substr(std::min(equals + 1, view.size()))});
    }
  }
  CapturedVariables(const CapturedVariables&) = delete;
  CapturedVariables& operator=(const CapturedVariables&) = delete;

  operator Variables() const { return {variables_.data(), variables_.size()}; }  // NOLINT(google-explicit-constructor)

 private:
  std::deque<std::string> texts_;
  std::vector<Variable> variables_;
};

/// A copy of this process's environment variables.
[[nodiscard]] inline CapturedVariables capture_variables() { return {}; }

namespace detail {

/// What the file has, all of it; false where it cannot be read.
inline bool read_file(const std::string& path, std::string& text) {
  std::FILE* file = std::fopen(path.c_str(), "re");
  if (file == nullptr) return false;
  char buffer[4096];
  for (std::size_t n = 1; n > 0; text.append(buffer, n)) n = std::fread(buffer, 1, sizeof buffer, file);
  const bool whole = std::ferror(file) == 0;
  std::fclose(file);
  return whole;
}

/// The UUIDs of the machine's NVIDIA GPUs in NVML's order. NVML creates no CUDA context, so that the process can still
/// fork; without its library the driver's files say as much.
inline std::vector<std::string> nvidia_gpu_uuids() {
  std::vector<std::string> uuids;
  if (void* library = dlopen("libnvidia-ml.so.1", RTLD_LAZY | RTLD_LOCAL)) {
    using Device = void*;
    const auto function = [library]<class F>(F*& to, const char* name) {
      to = reinterpret_cast<F*>(dlsym(library, name));
      return to != nullptr;
    };
    int (*init)() = nullptr;
    int (*shutdown)() = nullptr;
    int (*get_count)(unsigned*) = nullptr;
    int (*get_device)(unsigned, Device*) = nullptr;
    int (*get_uuid)(Device, char*, unsigned) = nullptr;
    if (function(init, "nvmlInit_v2") && function(shutdown, "nvmlShutdown") &&
        function(get_count, "nvmlDeviceGetCount_v2") && function(get_device, "nvmlDeviceGetHandleByIndex_v2") &&
        function(get_uuid, "nvmlDeviceGetUUID") && init() == 0) {
      unsigned count = 0;
      if (get_count(&count) != 0) count = 0;
      for (unsigned i = 0; i < count; ++i) {
        Device device = nullptr;
        char uuid[96]{};
        if (get_device(i, &device) == 0) get_uuid(device, uuid, sizeof uuid);
        uuids.emplace_back(uuid);
      }
      shutdown();
      dlclose(library);
      return uuids;
    }
    dlclose(library);
  }
  const std::string folder = "/proc/driver/nvidia/gpus/";
  std::vector<std::string> gpus;
  if (DIR* entries = opendir(folder.c_str())) {
    while (const dirent* entry = readdir(entries)) {
      if (entry->d_name[0] != '.') gpus.emplace_back(entry->d_name);
    }
    closedir(entries);
  }
  std::sort(gpus.begin(), gpus.end());
  for (const std::string& gpu : gpus) {
    std::string information;
    read_file(folder + gpu + "/information", information);
    const std::size_t begin = std::min(information.rfind("GPU-"), information.size());
    uuids.push_back(information.substr(begin, information.find_first_of(" \t\n", begin) - begin));
  }
  return uuids;
}

/// Whether a program of that name is on PATH.
inline bool on_path(std::string_view path, std::string_view program) {
  while (!path.empty()) {
    const std::size_t colon = path.find(':');
    const std::string folder(path.substr(0, colon));
    if (!folder.empty() && access((folder + "/" + std::string(program)).c_str(), X_OK) == 0) return true;
    path.remove_prefix(colon == std::string_view::npos ? path.size() : colon + 1);
  }
  return false;
}

/// Whether the running program is a C++ interpreter. A compiled program is never interactive: it can be started again,
/// even when a notebook started it.
inline bool runs_in_interpreter() {
  char path[PATH_MAX];
  const ssize_t length = readlink("/proc/self/exe", path, sizeof path);
  const std::string_view exe(path, length > 0 ? static_cast<std::size_t>(length) : 0);
  const std::string_view name = exe.substr(exe.rfind('/') + 1);
  return name.starts_with("xcpp") || name.starts_with("cling") || name.starts_with("clang-repl") || name == "root.exe";
}

}  // namespace detail

/// What this machine is, with the texts that `Host` views. It must outlive every use of the `Host`.
class ProbedHost {
 public:
  explicit ProbedHost(const Variables& variables) {
    char name[256]{};
    if (gethostname(name, sizeof name - 1) == 0) host_.hostname = keep(name);
    host_.srun = detail::on_path(variables.get("PATH"), "srun");
    host_.cores = detail::count_usable_cores();
    host_.interactive = detail::runs_in_interpreter();
#ifdef __APPLE__
    host_.mps = true;
#endif
    for (std::string& uuid : detail::nvidia_gpu_uuids()) uuids_.push_back(keep(std::move(uuid)));
    const Expected<VisibleGpus> visible = visible_gpus(variables, static_cast<int>(uuids_.size()), uuids_.data());
    host_.cuda_devices = visible ? visible->count : 1;  // several MIG devices: `parse_devices` refuses them
    for (int i = 0; access(("/dev/accel" + std::to_string(i)).c_str(), F_OK) == 0; ++i) ++host_.tpu_devices;
    if (const Found<Variable> path = variables.find("LSB_DJOB_RANKFILE")) {
      std::string text;
      if (detail::read_file(std::string(path->value), text)) {
        file_ = {keep(std::string(path->value)), keep(std::move(text))};
        host_.files = &file_;
        host_.file_count = 1;
      }
    }
  }
  ProbedHost(const ProbedHost&) = delete;
  ProbedHost& operator=(const ProbedHost&) = delete;

  [[nodiscard]] const Host& host() const { return host_; }
  operator const Host&() const { return host_; }  // NOLINT(google-explicit-constructor): it is that host
  /// The UUIDs of all NVIDIA GPUs of the machine, visible or not.
  [[nodiscard]] const std::vector<std::string_view>& gpu_uuids() const { return uuids_; }

 private:
  std::string_view keep(std::string text) { return texts_.emplace_back(std::move(text)); }

  std::deque<std::string> texts_;
  std::vector<std::string_view> uuids_;
  HostFile file_;
  Host host_;
};

/// Asks the machine: GPUs that are visible to CUDA (without creating a CUDA context), host name, srun, LSF's rank file.
/// Reads nothing but `variables`, /proc, /dev and that file; throws nothing but std::bad_alloc.
[[nodiscard]] inline ProbedHost probe_host(const Variables& variables) { return ProbedHost(variables); }

}  // namespace fabric
