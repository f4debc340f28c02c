// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include <torch/torch.h>

#include "fabric/error.hpp"
#include "fabric/interception.hpp"
#include "fabric/module/deferred_init.hpp"
#include "fabric/module/parameters.hpp"
#include "fabric/shard/exchange.hpp"
#include "fabric/shard/file_store.hpp"
#include "fabric/shard/shard.hpp"

namespace fabric::detail {

/// How a unit is kept.
struct UnitOptions {
  at::ScalarType compute = at::kFloat;  ///< Of the whole parameters.
  at::ScalarType master = at::kFloat;   ///< Of what the optimizer changes.
  at::ScalarType reduce = at::kFloat;   ///< Of gradients on their way.
  at::Device device = at::kCPU;         ///< Where the parameters are used.
  at::Device master_device = at::kCPU;  ///< Where `master` and its gradient are.
  at::Device own_device = at::kCPU;     ///< Where this rank's part of the parameters waits while they are not whole.
  std::string folder{};                 ///< Where `master` and that part are files; empty: in memory.
  bool frees_parameters = true;         ///< They are whole only while they are needed.
  bool frees_buckets = true;            ///< Likewise the memory in which gradients are sent.
};

/// Parameters that are gathered and reduced together. They lie one after another in a flat buffer, of which each rank
/// of the shard group owns an equal part; the module's own tensors are views of it, for life. While the unit is not
/// whole the buffer has no memory, and the tensors have their sizes alone.
class FlatUnit {
 public:
  struct Slot {
    Shard shard;
    std::int64_t offset = 0;  ///< Of the parameter in the buffer, in elements.
    bool arrived = false;     ///< Its gradient has come in this backward.
  };

  /// `parameters` are of one dtype, and all trained or all frozen. The unit has no memory before `fill`.
  FlatUnit(const NamedParameters& parameters, const UnitOptions& options, const Exchange& exchange, int number)
      : options_(options),
        exchange_(exchange),
        number_(number),
        trained_(parameters.front().second.requires_grad()),
        kept_(parameters.front().second.scalar_type()) {
    std::int64_t end = 0;
    for (const auto& [name, parameter] : parameters) {
      slots_.push_back({.shard = {.name = name, .parameter = parameter}, .offset = end});
      end += padded(parameter.numel(), alignment);
    }
    elements_ = padded(end, exchange.shards() * alignment);
    part_ = elements_ / exchange.shards();
    for (Slot& slot : slots_) {
      const std::int64_t first = exchange.shard_rank() * part_ - slot.offset;
      slot.shard.begin = std::clamp<std::int64_t>(first, 0, slot.shard.parameter.numel());
      slot.shard.end = std::clamp<std::int64_t>(first + part_, 0, slot.shard.parameter.numel());
    }
  }
  FlatUnit(const FlatUnit&) = delete;
  FlatUnit& operator=(const FlatUnit&) = delete;
  ~FlatUnit() { abandon(); }

  /// Makes the parameters views of the unit, with `values`, one for each, after `agree` has made the buffer that holds
  /// them the same on all ranks.
  template <class Agree>
  void fill(const std::vector<at::Tensor>& values, const Agree& agree) {
    const at::NoGradGuard no_grad;
    const auto options = at::TensorOptions(options_.device);
    at::Tensor exact = at::zeros({elements_}, options.dtype(kept_));
    for (std::size_t i = 0; i < slots_.size(); ++i) range(exact, slots_[i]).copy_(values[i].reshape({-1}));
    agree(exact);
    whole_ = exact.to(options_.compute);
    own_ = exchange_.own_part(whole_);
    if (options_.frees_parameters)
      own_ = own_.to(at::TensorOptions(options_.own_device), /*non_blocking=*/false, /*copy=*/true);
    const bool is_own = options_.master == options_.compute && options_.master_device == own_.device();
    master_ = is_own ? own_
                     : exchange_.own_part(exact).to(at::TensorOptions(options_.master_device).dtype(options_.master),
                                                    /*non_blocking=*/false, /*copy=*/true);
    exact.reset();
    if (!options_.folder.empty()) move_to_file();
    for (Slot& slot : slots_) {
      Shard& shard = slot.shard;
      const c10::DispatchKeySet intercepted = keys_of(shard.parameter) & others_keys;
      become(shard.parameter, range(whole_, slot).view(shard.parameter.sizes()).variable_data());
      keys_of(shard.parameter) = keys_of(shard.parameter) | intercepted;
      shard.master = own_range(master_, slot).variable_data().set_requires_grad(trained_);
    }
    release();
  }

  [[nodiscard]] std::vector<Slot>& slots() { return slots_; }
  [[nodiscard]] const std::vector<Slot>& slots() const { return slots_; }
  [[nodiscard]] bool trained() const { return trained_; }
  [[nodiscard]] int number() const { return number_; }
  [[nodiscard]] const c10::StorageImpl* storage() const { return whole_.storage().unsafeGetStorageImpl(); }
  [[nodiscard]] bool frees_parameters() const { return options_.frees_parameters; }
  /// Bytes of the whole parameters, and of the gradients that each rank sends.
  [[nodiscard]] std::int64_t parameter_bytes() const {
    return elements_ * static_cast<std::int64_t>(c10::elementSize(options_.compute));
  }
  [[nodiscard]] std::int64_t gradient_bytes() const {
    return elements_ * static_cast<std::int64_t>(c10::elementSize(options_.reduce));
  }

  // ---- Parameters ----

  enum class State : char { released, arriving, whole };
  [[nodiscard]] State state() const { return state_; }

  /// Begins to make the unit whole.
  void begin_gather() {
    if (state_ != State::released) return;
    const at::NoGradGuard no_grad;
    auto* storage = whole_.storage().unsafeGetStorageImpl();
    const auto bytes = static_cast<std::size_t>(parameter_bytes());
    storage->set_data_ptr_noswap(c10::GetAllocator(options_.device.type())->allocate(bytes));
    storage->set_nbytes(bytes);
    fetch(own_);
    exchange_.own_part(whole_).copy_(own_, /*non_blocking=*/true);
    put_away(own_);
    arriving_ = exchange_.gather(whole_, number_);
    state_ = State::arriving;
  }
  /// Makes it whole.
  void gather() {
    begin_gather();
    if (state_ == State::whole) return;
    exchange_.finish(arriving_, "the gathering of parameters");
    state_ = State::whole;
  }
  /// Gives the memory of the whole parameters back. Nothing happens where they are always whole.
  void release() {
    if (!options_.frees_parameters) {
      state_ = State::whole;
      return;
    }
    if (state_ == State::arriving) exchange_.finish(arriving_, "the gathering of parameters");
    auto* storage = whole_.storage().unsafeGetStorageImpl();
    storage->set_data_ptr_noswap(at::DataPtr(nullptr, options_.device));
    storage->set_nbytes(std::size_t{0});
    state_ = State::released;
  }
  /// The optimizer, or a checkpoint, has changed the master values: brings what is made from them up to date. Where
  /// parameters are always whole that begins to gather them, and `gather_changed` ends it.
  void begin_changed() {
    const at::NoGradGuard no_grad;
    fetch_master();
    if (!master_.is_same(own_)) {
      fetch(own_);
      own_.copy_(master_);
      put_away(own_);
    }
    put_master_away();
    release();
    if (!options_.frees_parameters) arriving_ = exchange_.gather(whole_, number_);
  }
  void finish_changed() { exchange_.finish(arriving_, "the gathering of parameters"); }
  /// This rank's part from the whole parameters, which somebody has changed in the same way on all ranks.
  void take_whole() {
    const at::NoGradGuard no_grad;
    fetch(own_);
    fetch_master();
    if (options_.frees_parameters) own_.copy_(exchange_.own_part(whole_));
    if (!master_.is_same(own_)) master_.copy_(own_);
    put_away(own_);
    put_master_away();
  }
  /// Brings the masters into memory, where they are in a file, and back.
  void begin_fetch_master() {
    if (store_) store_->prefetch(master_);
  }
  void fetch_master() { fetch(master_); }
  void put_master_away() { put_away(master_); }

  // ---- Gradients ----

  /// Begins to sum the gradients of this rank's parameters over the ranks, and drops them. Missing ones count as zeros.
  void begin_reduce() {
    const at::NoGradGuard no_grad;
    if (!bucket_.defined()) bucket_ = at::empty({elements_}, at::TensorOptions(options_.device).dtype(options_.reduce));
    std::vector<at::Tensor> places;
    std::vector<at::Tensor> gradients;
    std::int64_t end = 0;
    for (Slot& slot : slots_) {
      at::Tensor& gradient = slot.shard.parameter.mutable_grad();
      if (slot.offset > end) bucket_.narrow(0, end, slot.offset - end).zero_();
      if (gradient.defined()) {
        refuse_sparse(slot, gradient);
        places.push_back(range(bucket_, slot).view(gradient.sizes()));
        gradients.push_back(gradient);
      } else {
        range(bucket_, slot).zero_();
      }
      end = slot.offset + slot.shard.parameter.numel();
    }
    if (elements_ > end) bucket_.narrow(0, end, elements_ - end).zero_();
    if (!places.empty()) at::_foreach_copy_(places, gradients);
    gradients.clear();
    for (Slot& slot : slots_) slot.shard.parameter.mutable_grad().reset();
    // Half floats would overflow in a sum over many ranks.
    if (options_.reduce == at::kHalf) bucket_.mul_(1.0 / divisor());
    if (exchange_.shards() > 1) received_ = exchange_.received_from(bucket_);
    leaving_ = exchange_.scatter(bucket_, received_, number_);
  }
  /// Adds the mean over all ranks to the gradients of this rank's part. `used(i)` says whether slot i has one.
  template <class Used>
  void finish_reduce(const Used& used) {
    const at::NoGradGuard no_grad;
    exchange_.finish(leaving_, "the reduction of gradients");
    at::Tensor total = exchange_.sum(bucket_, received_, options_.master);
    received_.reset();
    if (options_.frees_buckets) bucket_.reset();
    exchange_.sum_over_replicas(total);
    if (options_.reduce != at::kHalf) total.mul_(1.0 / divisor());
    total = total.to(options_.master_device);
    if (!gradient_.defined()) {
      gradient_ = std::move(total);
    } else {
      for (const Slot& slot : slots_) {  // which somebody may have dropped
        if (!slot.shard.master.grad().defined()) own_range(gradient_, slot).zero_();
      }
      gradient_.add_(total);
    }
    for (std::size_t i = 0; i < slots_.size(); ++i) {
      at::Tensor& gradient = slots_[i].shard.master.mutable_grad();
      if (!gradient.defined() && used(i)) gradient = own_range(gradient_, slots_[i]).variable_data();
    }
  }
  /// Forgets the gradients if the optimizer has dropped them all.
  void drop_gradients() {
    for (const Slot& slot : slots_) {
      if (slot.shard.master.grad().defined()) return;
    }
    gradient_.reset();
  }

  /// How much memory of each kind this rank holds now, in bytes.
  [[nodiscard]] std::int64_t held_parameters() const {
    const auto whole = static_cast<std::int64_t>(whole_.storage().nbytes());
    return whole + (options_.frees_parameters ? bytes_of(own_) : 0);
  }
  [[nodiscard]] std::int64_t held_masters() const { return master_.is_same(own_) ? 0 : bytes_of(master_); }
  [[nodiscard]] std::int64_t held_gradients() const {
    std::int64_t bytes = bytes_of(gradient_) + bytes_of(bucket_) + bytes_of(received_);
    for (const Slot& slot : slots_) bytes += bytes_of(slot.shard.parameter.grad());
    return bytes;
  }

 private:
  /// By which tensor-parallel layers are known.
  static constexpr c10::DispatchKeySet others_keys{c10::DispatchKey::TESTING_ONLY_GenericMode};
  /// Each parameter begins where vector loads are fast.
  static constexpr std::int64_t alignment = 16;

  static std::int64_t padded(std::int64_t size, std::int64_t to) { return (size + to - 1) / to * to; }
  static std::int64_t bytes_of(const at::Tensor& tensor) {
    return tensor.defined() ? static_cast<std::int64_t>(tensor.nbytes()) : 0;
  }
  [[nodiscard]] double divisor() const { return static_cast<double>(exchange_.shards() * exchange_.replicas()); }

  static at::Tensor range(const at::Tensor& buffer, const Slot& slot) {
    return buffer.narrow(0, slot.offset, slot.shard.parameter.numel());
  }
  /// The part of a parameter that this rank owns, in a tensor like `master_`.
  [[nodiscard]] at::Tensor own_range(const at::Tensor& part, const Slot& slot) const {
    const std::int64_t size = slot.shard.end - slot.shard.begin;
    const std::int64_t at = size == 0 ? 0 : slot.offset + slot.shard.begin - exchange_.shard_rank() * part_;
    return part.narrow(0, at, size);
  }

  static void refuse_sparse(const Slot& slot, const at::Tensor& gradient) {
    if (!gradient.is_sparse()) return;
    throw Error("fabric: the gradient of " + slot.shard.name +
                " is sparse, which cannot be sharded: make the embedding with sparse(false), or use Ddp");
  }

  void move_to_file() {
    const bool is_own = master_.is_same(own_);
    std::int64_t bytes = FileStore<>::rounded(bytes_of(master_));
    if (!is_own && options_.frees_parameters) bytes += FileStore<>::rounded(bytes_of(own_));
    store_.emplace(options_.folder, bytes);
    const auto moved = [&](const at::Tensor& tensor) {
      at::Tensor file = store_->tensor(tensor.sizes(), tensor.scalar_type());
      return file.copy_(tensor);
    };
    master_ = moved(master_);
    if (is_own) {
      own_ = master_;
    } else if (options_.frees_parameters) {
      own_ = moved(own_);
    }
    put_away(master_);
    put_away(own_);
  }
  [[nodiscard]] bool is_in_file(const at::Tensor& tensor) const {
    return store_ && (tensor.is_same(master_) || options_.frees_parameters);
  }
  void fetch(const at::Tensor& tensor) {
    if (is_in_file(tensor)) store_->fetch(tensor);
  }
  void put_away(const at::Tensor& tensor) {
    if (is_in_file(tensor)) store_->release(tensor);
  }

  /// Memory that a message is still written to must not be freed.
  void abandon() noexcept {
    for (auto* pending : {&arriving_, &leaving_}) {
      for (const auto& work : *pending) {
        try {
          work->wait();
        } catch (...) {
          static_cast<void>(work);  // the group is broken, and its messages with it
        }
      }
      pending->clear();
    }
  }

  UnitOptions options_;
  const Exchange& exchange_;
  int number_;
  bool trained_;
  at::ScalarType kept_;  // the dtype that the module was made with
  std::vector<Slot> slots_;
  std::int64_t elements_ = 0;
  std::int64_t part_ = 0;
  State state_ = State::whole;
  std::optional<FileStore<>> store_;  // of master_ and own_, if they are in a file
  at::Tensor whole_;                  // (elements): what the module's parameters are views of
  at::Tensor own_;                    // (part), in the compute dtype
  at::Tensor master_;                 // (part); the same as own_ where that will do
  at::Tensor gradient_;               // (part), of master_; undefined while there is none
  at::Tensor bucket_;                 // (elements): gradients on their way out
  at::Tensor received_;               // and in
  Exchange::Pending arriving_;
  Exchange::Pending leaving_;
};

}  // namespace fabric::detail
