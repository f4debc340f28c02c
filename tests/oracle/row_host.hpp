// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <deque>
#include <string>
#include <vector>

#include <nlohmann/json.hpp>

#include "fabric/connector/host.hpp"

namespace oracle {

using Json = nlohmann::ordered_json;

/// A row's host and variables, with the memory that `fabric::Host` and `fabric::Variables` only view.
class RowHost {
 public:
  explicit RowHost(const Json& row) {
    if (row.contains("env")) {
      for (const auto& [name, value] : row["env"].items()) {
        variables_.push_back({keep(name), keep(value.get<std::string>())});
      }
    }
    const Json json = row.value("host", Json::object());
    host_.cuda_devices = json.value("cuda", 0);
    host_.mps = json.value("mps", false);
    host_.tpu_devices = json.value("tpu", 0);
    host_.interactive = json.value("interactive", false);
    host_.fork = json.value("fork", true);
    host_.srun = json.value("srun", false);
    host_.hostname = keep(json.value("hostname", "h0"));
    if (json.contains("packages")) {
      const auto has = [&](const char* name) {
        for (const Json& package : json["packages"]) {
          if (package == name) return true;
        }
        return false;
      };
      host_.xla_engine = has("torch_xla");
      host_.deepspeed_engine = has("deepspeed");
      host_.bitsandbytes_engine = has("bitsandbytes");
      host_.transformer_engine = has("transformer_engine");
    }
    if (json.contains("files")) {
      for (const auto& [path, lines] : json["files"].items()) {
        std::string text;
        for (const Json& line : lines) text += line.get<std::string>() + "\n";
        files_.push_back({keep(path), keep(text)});
      }
    }
    host_.files = files_.data();
    host_.file_count = files_.size();
    if (json.contains("mpi") && !json["mpi"].is_null()) {
      const Json& mpi = json["mpi"];
      host_.mpi.available = true;
      host_.mpi.size = mpi.value("size", 1);
      host_.mpi.rank = mpi.value("rank", 0);
      host_.mpi.local_rank = mpi.value("local_rank", 0);
      for (const Json& name : mpi.value("hosts", Json::array())) mpi_hosts_.push_back(keep(name.get<std::string>()));
      host_.mpi.hosts = mpi_hosts_.data();
      host_.mpi.host_count = mpi_hosts_.size();
    }
  }
  RowHost(const RowHost&) = delete;
  RowHost& operator=(const RowHost&) = delete;

  [[nodiscard]] const fabric::Host& host() const { return host_; }
  [[nodiscard]] fabric::Variables variables() const { return {variables_.data(), variables_.size()}; }

 private:
  std::string_view keep(std::string text) { return texts_.emplace_back(std::move(text)); }

  std::deque<std::string> texts_;
  std::vector<fabric::Variable> variables_;
  std::vector<fabric::HostFile> files_;
  std::vector<std::string_view> mpi_hosts_;
  fabric::Host host_;
};

}  // namespace oracle
