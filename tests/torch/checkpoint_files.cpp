// SPDX-License-Identifier: Apache-2.0
// labels: checkpoint torch
//
// The files alone: what is written comes back, and nothing that is damaged or made up gets through.
#include <cstdint>
#include <cstdio>
#include <limits>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include <torch/torch.h>

#include "fabric/checkpoint/safetensors_file.hpp"
#include "fabric/checkpoint/torch_file.hpp"
#include "support/catch.hpp"

namespace {

using fabric::CheckpointContents;
using fabric::DamagedCheckpoint;
using fabric::Dict;
using fabric::Error;
using fabric::List;
using fabric::SafetensorsFile;
using fabric::TorchFile;
using fabric::Value;
using fabric::detail::Bytes;
using fabric::detail::MemoryFile;

Bytes in_memory(std::string text) {
  auto owner = std::make_shared<std::string>(std::move(text));
  return {owner, owner->data(), owner->size()};
}

template <class Io>
std::string written(const Value& state) {
  MemoryFile file;
  Io::write(file, state, {{"library", "test"}});
  return file.bytes;
}
template <class Io>
Value read(const std::string& bytes) {
  return Io::read(in_memory(bytes), "the file").state;
}

bool same(const Value& a, const Value& b);

bool same(const at::Tensor& a, const at::Tensor& b) {
  if (a.sizes() != b.sizes() || a.scalar_type() != b.scalar_type()) return false;
  const auto bytes = [](const at::Tensor& tensor) { return tensor.contiguous().view(-1).view(at::kByte); };
  return a.numel() == 0 || bytes(a).equal(bytes(b));
}
bool same(const List& a, const List& b) {
  if (a.items.size() != b.items.size() || a.is_tuple != b.is_tuple) return false;
  for (std::size_t i = 0; i < a.items.size(); ++i) {
    if (!same(a.items[i], b.items[i])) return false;
  }
  return true;
}
bool same(const Dict& a, const Dict& b) {
  if (a.size() != b.size()) return false;
  for (auto x = a.begin(), y = b.begin(); x != a.end(); ++x, ++y) {
    if (x->first != y->first || !same(x->second, y->second)) return false;
  }
  return true;
}
bool same(const Value& a, const Value& b) {
  if (a.data().index() != b.data().index()) return false;
  return std::visit(
      [&](const auto& one) {
        using T = std::decay_t<decltype(one)>;
        const auto& other = std::get<T>(b.data());
        if constexpr (std::is_same_v<T, std::monostate>) {
          return true;
        } else if constexpr (std::is_same_v<T, List> || std::is_same_v<T, Dict> || std::is_same_v<T, at::Tensor>) {
          return same(one, other);
        } else {
          return one == other;
        }
      },
      a.data());
}

Value small_state() {
  return Dict{{"model", Dict{{"weight", torch::arange(6, torch::kFloat).view({2, 3})}, {"bias", torch::ones({2})}}},
              {"step", 7},
              {"name", "x"}};
}

Value large_state() {
  const auto base = torch::arange(20, torch::kDouble);
  return Dict{{"none", Value()},
              {"flags", List{{true, false}, false}},
              {"numbers", List{{0, 255, 256, -1, std::numeric_limits<std::int64_t>::min(),
                                std::numeric_limits<std::int64_t>::max(), 1.5, -0.0, 1e300,
                                std::numeric_limits<double>::infinity()},
                               true}},
              {"texts", List{{"", "a", "zwölf €", std::string(300, 'x'), "line\nbreak \"quoted\" \\ \x01"}, false}},
              {"by number", Dict{{0, "zero"}, {-7, Dict{}}, {std::int64_t{1} << 40, List{}}}},
              {"shared", base},
              {"view", base.slice(0, 3, 9)},
              {"transposed", torch::arange(6).view({2, 3}).t()},
              {"half", torch::randn({5}).to(at::kHalf)},
              {"bf16", torch::randn({5}).to(at::kBFloat16)},
              {"fp8", torch::randn({5}).to(at::kFloat8_e4m3fn)},
              {"u16", torch::arange(3).to(at::kUInt16)},
              {"bool", torch::tensor({true, false})},
              {"scalar", torch::tensor(3)},
              {"empty", torch::zeros({3, 0, 2})}};
}

/// A file of `torch.save` with any pickle and the storages that it may ask for.
std::string zip_of(const std::string& pickle, const std::vector<std::string>& storages = {std::string(16, '\1')}) {
  MemoryFile file;
  fabric::detail::ZipWriter zip(file);
  zip.add("archive/data.pkl", pickle.data(), pickle.size());
  for (std::size_t i = 0; i < storages.size(); ++i) {
    zip.add("archive/data/" + std::to_string(i), storages[i].data(), storages[i].size());
  }
  zip.finish();
  return file.bytes;
}
Value unpickled(const std::string& pickle) { return read<TorchFile>(zip_of(pickle)); }

std::string text(const std::string& value) {
  return std::string("X") + static_cast<char>(value.size()) + std::string(3, '\0') + value;
}
std::string integer(std::int64_t number) {
  return std::string("\x8A\x08", 2) + std::string(reinterpret_cast<const char*>(&number), 8);
}
/// A tensor of floats on the storage "0", whose 16 bytes are four floats.
std::string tensor(std::int64_t offset, const std::vector<std::int64_t>& sizes,
                   const std::vector<std::int64_t>& strides, std::int64_t count = 4) {
  const auto tuple = [](const std::vector<std::int64_t>& numbers) {
    std::string all = "(";
    for (const auto number : numbers) all += integer(number);
    return all + "t";
  };
  return "ctorch._utils\n_rebuild_tensor_v2\n((" + text("storage") + "ctorch\nFloatStorage\n" + text("0") +
         text("cpu") + integer(count) + "tQ" + integer(offset) + tuple(sizes) + tuple(strides) + "\x89" +
         "ccollections\nOrderedDict\n)RtR";
}
std::string proto(const std::string& body) { return "\x80\x02" + body + "."; }

/// How many of the damaged forms of `bytes` are refused; the others must read as if nothing had happened.
template <class Io, class Damage>
std::pair<int, int> refused_of(const std::string& bytes, const Value& state, const Damage& damage) {
  std::pair<int, int> refused{0, 0};
  damage(bytes, [&](const std::string& damaged) {
    ++refused.second;
    bool right = true;
    try {
      right = same(read<Io>(damaged), state);
    } catch (const DamagedCheckpoint&) {
      ++refused.first;
    }
    REQUIRE(right);
  });
  return refused;
}

template <class Try>
void every_truncation(const std::string& bytes, const Try& attempt) {
  for (std::size_t size = 0; size < bytes.size(); ++size) attempt(bytes.substr(0, size));
}
template <class Try>
void every_flipped_bit(std::string bytes, const Try& attempt) {
  for (std::size_t i = 0; i < bytes.size(); ++i) {
    for (int bit = 0; bit < 8; ++bit) {
      bytes[i] = static_cast<char>(bytes[i] ^ (1 << bit));
      attempt(bytes);
      bytes[i] = static_cast<char>(bytes[i] ^ (1 << bit));
    }
  }
}

}  // namespace

TEST_CASE("[issue-7.1] what is written comes back, in both formats") {
  torch::manual_seed(1);
  const Value state = large_state();
  CHECK(same(read<TorchFile>(written<TorchFile>(state)), state));
  CHECK(same(read<SafetensorsFile>(written<SafetensorsFile>(state)), state));
  CHECK(written<TorchFile>(state) == written<TorchFile>(state));  // equal states are equal files
}

TEST_CASE("[issue-7.1] views of one storage are written once and shared again") {
  const auto base = torch::zeros({1000}, torch::kDouble);
  const std::string bytes = written<TorchFile>(Dict{{"a", base}, {"b", base.slice(0, 10, 20)}});
  CHECK(bytes.size() < 10000);
  const Value back = read<TorchFile>(bytes);
  const auto a = back.as<Dict>("").at("a").as<at::Tensor>("");
  const auto b = back.as<Dict>("").at("b").as<at::Tensor>("");
  CHECK(a.storage().unsafeGetStorageImpl() == b.storage().unsafeGetStorageImpl());
  CHECK(b.storage_offset() == 10);
}

TEST_CASE("[issue-7.1] what no file can hold is refused by its key") {
  const auto refuses = [](const Value& state, const std::string& key, const std::string& why) {
    CHECK_THROWS_WITH(written<TorchFile>(Dict{{"outer", state}}), ContainsSubstring(key) && ContainsSubstring(why));
  };
  refuses(Dict{{"sparse", torch::eye(2).to_sparse()}}, "'outer.sparse'", "to_dense");
  refuses(List{{at::Tensor()}, false}, "'outer.0'", "undefined");
  refuses("\xFF", "'outer'", "UTF-8");
  refuses(torch::ones({2}, torch::kComplexFloat).conj(), "'outer'", "resolve_conj");
  CHECK_THROWS_WITH(written<SafetensorsFile>(Dict{{"x", torch::ones({2}, torch::kComplexDouble)}}),
                    ContainsSubstring("'x'") && ContainsSubstring("complex128"));
}

TEST_CASE("[issue-7.2] the checksum is that of zip files, however it is computed and cut") {
  using fabric::detail::crc32;
  CHECK(crc32("123456789", 9) == 0xCBF43926);
  std::string text;
  for (int i = 0; i < 1000; ++i) text += static_cast<char>(i * i * 7 + i / 3);
  const auto by_tables = [](const char* data, std::size_t size) {
    return ~fabric::detail::crc32_by_tables(reinterpret_cast<const unsigned char*>(data), size, ~std::uint32_t{0});
  };
  for (std::size_t size = 0; size <= text.size(); ++size) {
    const std::uint32_t whole = by_tables(text.data(), size);
    REQUIRE(crc32(text.data(), size) == whole);
    const std::size_t part = size / 3;
    REQUIRE(crc32(text.data() + part, size - part, crc32(text.data(), part)) == whole);
  }
}

TEST_CASE("[issue-7.3] a file cut short anywhere is refused") {
  const Value state = small_state();
  const auto cut = [](const std::string& bytes, const auto& attempt) { every_truncation(bytes, attempt); };
  const auto torch_file = refused_of<TorchFile>(written<TorchFile>(state), state, cut);
  CHECK(torch_file.first == torch_file.second);
  const auto safetensors = refused_of<SafetensorsFile>(written<SafetensorsFile>(state), state, cut);
  CHECK(safetensors.first == safetensors.second);
  std::printf("truncated files refused: %d of %d\n", torch_file.first + safetensors.first,
              torch_file.second + safetensors.second);
}

TEST_CASE("[issue-7.3] a flipped bit is noticed, or changes nothing") {
  const Value state = small_state();
  const auto flip = [](const std::string& bytes, const auto& attempt) { every_flipped_bit(bytes, attempt); };
  const auto torch_file = refused_of<TorchFile>(written<TorchFile>(state), state, flip);
  // The others are padding, dates and versions of the zip format.
  CHECK(torch_file.first > torch_file.second / 4);
  std::printf("files with a flipped bit refused: %d of %d, all others read as written\n", torch_file.first,
              torch_file.second);
  // Each bit of what was saved is noticed.
  const std::string bytes = written<TorchFile>(state);
  const std::size_t weight = bytes.find(std::string("\0\0\0\0\0\0\x80\x3F\0\0\0\x40", 12));
  REQUIRE(weight != std::string::npos);
  for (std::size_t i = weight; i < weight + 24; ++i) {
    std::string damaged = bytes;
    damaged[i] = static_cast<char>(damaged[i] ^ 0x10);
    CHECK_THROWS_WITH(read<TorchFile>(damaged), ContainsSubstring("checksum") && ContainsSubstring("data/0"));
  }
}

TEST_CASE("[issue-7.3] a flipped bit among the tensors of a safetensors file is noticed") {
  const std::string bytes = written<SafetensorsFile>(small_state());
  for (std::size_t i = bytes.size() - 32; i < bytes.size(); ++i) {
    std::string damaged = bytes;
    damaged[i] = static_cast<char>(damaged[i] ^ 1);
    CHECK_THROWS_WITH(read<SafetensorsFile>(damaged), ContainsSubstring("checksum"));
  }
}

TEST_CASE("[issue-7.2] the manifest says what is in the file, and a file of the future is refused") {
  const Value state = small_state();
  const auto contents = TorchFile::read(in_memory(written<TorchFile>(state)), "x");
  CHECK(contents.manifest.at("library").as<std::string>("") == "test");
  CHECK(contents.manifest.at("records").as<Dict>("").find("data/0") != nullptr);
  std::string manifest = R"({"format":2,"records":{}})";
  MemoryFile file;
  fabric::detail::ZipWriter zip(file);
  zip.add("archive/data.pkl", proto("}").data(), 4);
  zip.add("archive/fabric.json", manifest.data(), manifest.size());
  zip.finish();
  CHECK_THROWS_WITH(read<TorchFile>(file.bytes), ContainsSubstring("format 2") && ContainsSubstring("newer"));
  manifest = R"({"format":1,"records":{"data/0":[4,5]}})";
  MemoryFile without;
  fabric::detail::ZipWriter again(without);
  again.add("archive/data.pkl", proto("}").data(), 4);
  again.add("archive/fabric.json", manifest.data(), manifest.size());
  again.finish();
  CHECK_THROWS_WITH(read<TorchFile>(without.bytes), ContainsSubstring("data/0 is missing"));
}

TEST_CASE("[issue-7.7] nothing in a file is executed") {
  CHECK_THROWS_WITH(unpickled(proto("cos\nsystem\n" + text("touch /tmp/never") + "\x85R")),
                    ContainsSubstring("os.system"));
  CHECK_THROWS_WITH(unpickled(proto("cbuiltins\neval\n" + text("1") + "\x85R")), ContainsSubstring("builtins.eval"));
  CHECK_THROWS_WITH(unpickled(proto(text("os") + text("system") + "\x93")), ContainsSubstring("os.system"));
  CHECK_THROWS_WITH(unpickled(proto("c__main__\nNet\n)\x81}b")), ContainsSubstring("__main__.Net"));
}

TEST_CASE("[issue-7.7] a tensor lies inside its storage") {
  CHECK(unpickled(proto(tensor(0, {2, 2}, {2, 1}))).is<at::Tensor>());
  CHECK(unpickled(proto(tensor(4, {0}, {1}))).is<at::Tensor>());
  const std::int64_t huge = std::numeric_limits<std::int64_t>::max();
  for (const auto& bad : {tensor(1, {2, 2}, {2, 1}), tensor(-1, {1}, {1}), tensor(0, {5}, {1}), tensor(0, {2}, {-1}),
                          tensor(0, {-1}, {1}), tensor(0, {2}, {huge}), tensor(huge, {2}, {1}), tensor(5, {0}, {1}),
                          tensor(0, {huge, huge, 4}, {0, 0, 0}), tensor(0, {2, 2}, {1}), tensor(0, {}, {1})}) {
    CHECK_THROWS_AS(unpickled(proto(bad)), DamagedCheckpoint);
  }
  for (const std::int64_t count : {std::int64_t{5}, std::int64_t{3}, std::int64_t{-1}, huge}) {
    CHECK_THROWS_WITH(unpickled(proto(tensor(0, {1}, {1}, count))), ContainsSubstring("16 bytes"));
  }
}

TEST_CASE("[issue-7.7] a small file cannot ask for much memory, time or depth") {
  std::string deep = std::string(200, ']') + std::string(199, 'a');
  CHECK_THROWS_WITH(unpickled(proto(deep)), ContainsSubstring("deep"));
  CHECK_THROWS_WITH(unpickled(proto(std::string(1000000, ']') + std::string(999999, 'a'))), ContainsSubstring("deep"));
  CHECK_THROWS_WITH(unpickled(proto(std::string("]q\0h\0a", 6))), ContainsSubstring("circle"));
  std::string laughs = "]";  // each list holds the one before it twice: 2^60 items in 400 bytes
  for (char i = 0; i < 60; ++i) laughs += std::string("q") + i + "0](h" + i + "h" + i + "e";
  CHECK_THROWS_WITH(unpickled(proto(laughs)), ContainsSubstring("over and over"));
  CHECK_THROWS_AS(unpickled(proto(std::string("\x8D\xFF\xFF\xFF\xFF\xFF\xFF\xFF\x7F", 9))), DamagedCheckpoint);
  CHECK_THROWS_AS(unpickled(proto(std::string("r\xFF\xFF\xFF\x7F", 5))), DamagedCheckpoint);
  for (const std::string bad :
       {"", "t", "s", "u", "R", "a", "e", "Q", "b", "\x85", "(", "}(K\1u", "K\1K\2a", "h\7", "cabc", "X\5\0\0\0ab",
        "\x8A\x09"
        "123456789",
        "}]K\1s", "\xFF"}) {
    CHECK_THROWS_AS(unpickled(proto(bad)), DamagedCheckpoint);
    CHECK_THROWS_AS(read<TorchFile>(zip_of("\x80\x02" + bad)), DamagedCheckpoint);
  }
}

TEST_CASE("[issue-7.7] zip archives that lie about places and sizes are refused") {
  const std::string good = written<TorchFile>(small_state());
  const std::size_t directory = good.find("PK\1\2");
  REQUIRE(directory != std::string::npos);
  const auto with = [&](std::size_t place, std::uint32_t number) {
    std::string bad = good;
    bad.replace(place, 4, reinterpret_cast<const char*>(&number), 4);
    return bad;
  };
  for (const std::size_t field : {20U, 24U, 42U}) {  // the two sizes, the place
    for (const std::uint32_t number : {0xFFFFFFFFU, 0x7FFFFFFFU, 1000000U, 0U, 1U}) {
      if (field == 42 && number == 0) continue;  // where it is
      CHECK_THROWS_AS(read<TorchFile>(with(directory + field, number)), DamagedCheckpoint);
    }
  }
  // Two entries for the same bytes.
  const std::size_t second = good.find("PK\1\2", directory + 4);
  std::uint32_t place;
  std::memcpy(&place, good.data() + directory + 42, 4);
  CHECK_THROWS_AS(read<TorchFile>(with(second + 42, place)), DamagedCheckpoint);
  CHECK_THROWS_WITH(read<TorchFile>(good + "x"), ContainsSubstring("cut short"));
  CHECK_THROWS_AS(read<TorchFile>("x" + good), DamagedCheckpoint);
}

TEST_CASE("[issue-7.7] safetensors headers that lie are refused") {
  const auto file = [](const std::string& header, std::size_t data) {
    const std::uint64_t size = header.size();
    return std::string(reinterpret_cast<const char*>(&size), 8) + header + std::string(data, '\0');
  };
  const auto one = [&](const std::string& facts, std::size_t data = 8) {
    return file("{\"a\":{" + facts + "}}", data);
  };
  CHECK(read<SafetensorsFile>(one(R"("dtype":"F32","shape":[2],"data_offsets":[0,8])")).is<Dict>());
  CHECK(read<SafetensorsFile>(file("{}", 0)).is<Dict>());
  for (const char* bad :
       {R"("dtype":"F32","shape":[3],"data_offsets":[0,8])", R"("dtype":"F32","shape":[2],"data_offsets":[0,9])",
        R"("dtype":"F32","shape":[2],"data_offsets":[8,0])", R"("dtype":"F32","shape":[-2],"data_offsets":[0,8])",
        R"("dtype":"F99","shape":[2],"data_offsets":[0,8])", R"("dtype":"F32","shape":[2])",
        R"("dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,8])",
        R"("dtype":"F32","shape":[1],"data_offsets":[4,8])", R"("dtype":7,"shape":[2],"data_offsets":[0,8])"}) {
    CHECK_THROWS_AS(read<SafetensorsFile>(one(bad)), DamagedCheckpoint);
  }
  CHECK_THROWS_AS(read<SafetensorsFile>(one(R"("dtype":"F32","shape":[2],"data_offsets":[0,8])", 12)),
                  DamagedCheckpoint);
  CHECK_THROWS_AS(read<SafetensorsFile>(file(R"({"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},)"
                                             R"("b":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}})",
                                             8)),
                  DamagedCheckpoint);
  CHECK_THROWS_AS(read<SafetensorsFile>(std::string("\xFF\xFF\xFF\xFF\xFF\xFF\xFF\xFF{}", 10)), DamagedCheckpoint);
}

TEST_CASE("[issue-7.1] JSON is read and written as RFC 8259 says") {
  using fabric::detail::JsonReader;
  using fabric::detail::JsonWriter;
  const auto again = [](const std::string& json) { return JsonWriter::write(JsonReader::read(json, "text")); };
  CHECK(again(R"( { "a" : [ 1 , -2.5e3, true, false, null, "x\n\"\\\u20ac\ud83d\ude00" ], "b":{} } )") ==
        "{\"a\":[1,-2500.0,true,false,null,\"x\\u000a\\\"\\\\\u20ac\U0001F600\"],\"b\":{}}");
  CHECK(again("9223372036854775807") == "9223372036854775807");
  for (const char* bad : {"", "{", "[1,]", "{\"a\"}", "{\"a\":1,\"a\":2}", "tru", "1 2", "\"\\ud800\"", "\"\\q\"",
                          "\"a", "{1:2}", "nan", "\"\x01\"", "\"\xFF\"", "[[", "+1x"}) {
    CHECK_THROWS_AS(again(bad), DamagedCheckpoint);
  }
  CHECK_THROWS_AS(again(std::string(100000, '[')), DamagedCheckpoint);
  CHECK_THROWS_AS(JsonWriter::write(Dict{{1, 2}}), Error);
}
