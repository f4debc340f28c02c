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

#include <torch/types.h>

#include "fabric/device.hpp"
#include "fabric/error.hpp"
#include "fabric/interception.hpp"
#include "fabric/module/deferred_init.hpp"
#include "fabric/module/parameters.hpp"
#include "fabric/shard/buffer_pool.hpp"
#include "fabric/shard/exchange.hpp"
#include "fabric/shard/file_store.hpp"
#include "fabric/shard/shard.hpp"
#include "fabric/shard/unit_options.hpp"

namespace fabric::detail {

/// Parameters that are gathered and reduced together. They lie one after another in a flat buffer, of which each rank
/// of the shard group owns an equal part; the module's own tensors are views of it, for life. While the unit is not
/// whole the buffer has no memory, and the tensors have their sizes alone.
class FlatUnit {
 public:
  struct Slot {
    Shard shard;
    std::int64_t offset = 0;   ///< Of the parameter in the buffer, in elements.
    bool arrived = false;      ///< Its gradient has come in this backward.
    bool sent = false;         ///< It had one to send, perhaps of a backward before.
    std::int64_t version = 0;  ///< Of the parameter, which changes in place increase.
  };

  /// `parameters` are of one dtype, and all trained or all frozen. The unit has no memory before `fill`.
  FlatUnit(const NamedParameters& parameters, const UnitOptions& options, const Exchange& exchange, BufferPool& pool,
           int number)
      : options_(options),
        exchange_(exchange),
        pool_(pool),
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
    if (options_.frees_parameters) own_ = memory_for_part(options_.own_device, options_.compute).copy_(own_);
    const bool is_own = options_.master == options_.compute && options_.master_device == own_.device();
    master_ = is_own ? own_ : memory_for_part(options_.master_device, options_.master).copy_(exchange_.own_part(exact));
    exact.reset();
    if (!options_.folder.empty()) move_to_file();
    for (Slot& slot : slots_) {
      Shard& shard = slot.shard;
      const c10::DispatchKeySet intercepted = keys_of(shard.parameter) & others_keys;
      become(shard.parameter, range(whole_, slot).view(shard.parameter.sizes()).variable_data());
      keys_of(shard.parameter) = keys_of(shard.parameter) | intercepted;
      shard.master = own_range(master_, slot).variable_data().set_requires_grad(trained_);
    }
    accept_changes();
    release();
  }

  [[nodiscard]] std::vector<Slot>& slots() { return slots_; }
  [[nodiscard]] const std::vector<Slot>& slots() const { return slots_; }
  [[nodiscard]] bool trained() const { return trained_; }
  [[nodiscard]] int number() const { return number_; }
  /// Null before `fill`.
  [[nodiscard]] const c10::StorageImpl* storage() const {
    return whole_.defined() ? whole_.storage().unsafeGetStorageImpl() : nullptr;
  }
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
    memory_ = pool_.take(elements_, options_.compute, options_.device);
    // The storage shares in the memory, since the module may outlive this unit.
    storage->set_data_ptr_noswap(at::DataPtr(
        memory_.mutable_data_ptr(), new at::Tensor(memory_),
        [](void* tensor) { delete static_cast<at::Tensor*>(tensor); }, options_.device));
    storage->set_nbytes(bytes);
    const bool is_unchanged = fetch(own_);
    const auto bring = [&] {
      exchange_.own_part(whole_).copy_(own_, /*non_blocking=*/true);
      arriving_ = exchange_.gather(whole_, number_);
    };
    if (options_.copies != nullptr && own_.is_cpu()) {
      options_.copies->follow();  // what had the memory before
      options_.copies->run(bring);
      options_.copies->mark();
    } else {
      bring();
    }
    is_unchanged ? discard(own_) : put_away(own_);
    state_ = State::arriving;
  }
  /// Makes it whole.
  void gather() {
    begin_gather();
    if (state_ == State::whole) return;
    finish_gather();
    state_ = State::whole;
  }
  /// Gives the memory of the whole parameters back. Nothing happens where they are always whole.
  void release() {
    if (!options_.frees_parameters) {
      state_ = State::whole;
      return;
    }
    if (state_ == State::arriving) finish_gather();
    auto* storage = whole_.storage().unsafeGetStorageImpl();
    storage->set_data_ptr_noswap(at::DataPtr(nullptr, options_.device));
    storage->set_nbytes(std::size_t{0});
    pool_.give(memory_);
    state_ = State::released;
  }
  /// The optimizer, or a checkpoint, has changed the master values: brings what is made from them up to date. Where
  /// parameters are always whole that begins to gather them, and `gather_changed` ends it.
  void begin_changed() {
    const at::NoGradGuard no_grad;
    const bool is_unchanged = fetch(master_);  // since it was put away
    if (!master_.is_same(own_)) {
      fetch(own_);
      if (options_.copies != nullptr && own_.is_cuda()) {
        bring_master();
      } else {
        own_.copy_(master_);
      }
      put_away(own_);
    }
    is_unchanged ? discard(master_) : put_away(master_);
    finish_putting_away();
    release();
    if (!options_.frees_parameters) arriving_ = exchange_.gather(whole_, number_);
  }
  void finish_changed() { finish_gather(); }
  /// This rank's part from the whole parameters, which somebody may have changed in the same way on all ranks. Masters
  /// of what is as it was keep the digits that the whole parameters do not have.
  void take_whole() {
    const at::NoGradGuard no_grad;
    fetch(own_);
    fetch_master();
    if (!master_.is_same(own_)) {
      const at::Tensor now = exchange_.own_part(whole_).to(master_.device());
      const at::Tensor changed = now.ne(master_.to(options_.compute));
      master_.copy_(at::where(changed, now.to(options_.master), master_));
    }
    if (options_.frees_parameters) own_.copy_(exchange_.own_part(whole_));
    put_away(own_);
    put_away(master_);
    finish_putting_away();
    accept_changes();
  }
  /// The first parameter that somebody has changed in place, past `take_whole`; null if there is none.
  [[nodiscard]] const Shard* changed_in_place() const {
    for (const Slot& slot : slots_) {
      if (slot.shard.parameter._version() != slot.version) return &slot.shard;
    }
    return nullptr;
  }
  /// Brings the masters into memory, where they are in a file, and back.
  void begin_fetch_master() {
    if (store_) store_->prefetch(master_);
  }
  void fetch_master() { fetch(master_); }
  void begin_putting_master_away() { put_away(master_); }
  void finish_putting_away() {
    if (store_) store_->finish();
  }

  // ---- Gradients ----

  /// The gradient of slot `i` waits on this rank for others to be added to it: with all the digits with which it will
  /// be summed over the ranks.
  void keep_local_gradient(std::size_t i) {
    at::Tensor& gradient = slots_[i].shard.parameter.mutable_grad();
    if (!gradient.defined() || gradient.is_sparse()) return;
    const auto size = static_cast<std::size_t>(gradient.element_size());
    if (c10::elementSize(options_.reduce) > size) gradient = gradient.to(options_.reduce);
  }
  /// Begins to sum the gradients of this rank's parameters over the ranks, and drops them. Missing ones count as zeros.
  void begin_reduce() {
    const at::NoGradGuard no_grad;
    if (!bucket_.defined()) bucket_ = pool_.take(elements_, options_.reduce, options_.device);
    std::vector<at::Tensor> places;
    std::vector<at::Tensor> gradients;
    std::int64_t end = 0;
    for (Slot& slot : slots_) {
      at::Tensor& gradient = slot.shard.parameter.mutable_grad();
      if (slot.offset > end) bucket_.narrow(0, end, slot.offset - end).zero_();
      slot.sent = gradient.defined();
      if (slot.sent) {
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
    if (exchange_.shards() > 1) {
      const std::int64_t parts = options_.device.is_cuda() ? 1 : exchange_.shards() - 1;
      received_ = pool_.take(parts * part_, options_.reduce, options_.device);
      if (!options_.device.is_cuda()) received_ = received_.view({parts, part_});
    }
    leaving_ = exchange_.scatter(bucket_, received_, number_);
  }
  /// Adds the mean over all ranks to the gradients of this rank's part.
  void finish_reduce() {
    const at::NoGradGuard no_grad;
    exchange_.finish(leaving_, "the reduction of gradients");
    // The memory of gradients is kept, since it is needed again in the next step.
    if (!gradient_.defined()) {
      const OwnPages own_pages(options_.master_device);
      gradient_ = memory_for_part(options_.master_device, options_.master);
    }
    const bool adds = std::exchange(has_gradient_, true);
    at::Tensor total = adds || options_.device != options_.master_device
                           ? memory_for_part(options_.device, options_.master)
                           : gradient_;
    exchange_.sum(bucket_, received_, total);
    pool_.give(received_);
    if (options_.frees_buckets) pool_.give(bucket_);
    exchange_.sum_over_replicas(total);
    if (options_.reduce != at::kHalf) total.mul_(1.0 / divisor());
    if (!adds) {
      if (!gradient_.is_same(total)) send_gradient(total);
    } else {
      total = total.to(options_.master_device);
      for (const Slot& slot : slots_) {  // which somebody may have dropped
        if (!slot.shard.master.grad().defined()) own_range(gradient_, slot).zero_();
      }
      gradient_.add_(total);
    }
  }
  /// Gives the masters their gradients. `used(i)` says whether slot i has one.
  template <class Used>
  void hand_out_gradients(const Used& used) {
    if (!has_gradient_) return;
    for (std::size_t i = 0; i < slots_.size(); ++i) {
      at::Tensor& gradient = slots_[i].shard.master.mutable_grad();
      if (gradient.defined() || !used(i) || !slots_[i].shard.parameter.requires_grad()) continue;
      gradient = own_range(gradient_, slots_[i]).variable_data();
    }
  }
  /// Forgets the gradients if the optimizer has dropped them all.
  void drop_gradients() {
    for (const Slot& slot : slots_) {
      if (slot.shard.master.grad().defined()) return;
    }
    has_gradient_ = false;
    if (gradient_.defined() && gradient_.storage().use_count() > 1) gradient_.reset();  // somebody has kept them
  }

  /// Waits for what is on its way, and drops it.
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
    if (options_.copies != nullptr) options_.copies->synchronize();
    pool_.give(received_);
    if (options_.frees_buckets) pool_.give(bucket_);
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

  /// Without values. What a host sends to a device has pages that stay where they are, so that it can be sent beside
  /// the host's own work.
  [[nodiscard]] at::Tensor memory_for_part(at::Device device, at::ScalarType dtype) const {
    const bool pinned = options_.copies != nullptr && device.is_cpu();
    return at::empty({part_}, at::TensorOptions(device).dtype(dtype).pinned_memory(pinned));
  }
  void finish_gather() {
    exchange_.finish(arriving_, "the gathering of parameters");
    if (options_.copies != nullptr) options_.copies->join();
  }
  /// Begins to send the masters, as what is computed with, from the host to the device.
  void bring_master() {
    at::Tensor sent = master_;
    if (master_.scalar_type() != own_.scalar_type()) sent = memory_for_part(at::kCPU, options_.compute).copy_(master_);
    options_.copies->follow();
    options_.copies->run([&] { own_.copy_(sent, /*non_blocking=*/true); });
    options_.copies->mark();
    options_.copies->join();
  }
  /// Begins to send the gradients from the device to the host.
  void send_gradient(const at::Tensor& total) {
    if (options_.copies == nullptr) {
      gradient_.copy_(total);
      return;
    }
    options_.copies->follow();
    options_.copies->run([&] { gradient_.copy_(total, /*non_blocking=*/true); });
    options_.copies->keep(total);
  }

  void accept_changes() {
    for (Slot& slot : slots_) slot.version = static_cast<std::int64_t>(slot.shard.parameter._version());
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
    store_.emplace(options_.folder, bytes, options_.past_cache);
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
    finish_putting_away();
  }
  [[nodiscard]] bool is_in_file(const at::Tensor& tensor) const {
    return store_ && (tensor.is_same(master_) || options_.frees_parameters);
  }
  bool fetch(const at::Tensor& tensor) { return is_in_file(tensor) && store_->fetch(tensor); }
  void put_away(const at::Tensor& tensor) {
    if (is_in_file(tensor)) store_->release(tensor);
  }
  void discard(const at::Tensor& tensor) {
    if (is_in_file(tensor)) store_->discard(tensor);
  }

  UnitOptions options_;
  const Exchange& exchange_;
  BufferPool& pool_;
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
  at::Tensor memory_;                 // of whole_, while it has some
  at::Tensor gradient_;               // (part), of master_
  bool has_gradient_ = false;
  at::Tensor bucket_;    // (elements): gradients on their way out
  at::Tensor received_;  // and in
  Exchange::Pending arriving_;
  Exchange::Pending leaving_;
};

}  // namespace fabric::detail
