#include "runtime.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <memory>
#include <utility>

#if defined(__x86_64__)
#include <cpuid.h>

#include "amx_tiles.h"
#endif

namespace moeship {
namespace {

constexpr int64_t kTaskBytes = 256 << 10;

struct Free {
  void operator()(void* p) const { std::free(p); }
};
thread_local std::unique_ptr<char, Free> memory;
thread_local size_t memory_bytes = 0;

Tensor describe(const OrtApi& api, const OrtValue* value) {
  OrtTensorTypeAndShapeInfo* info = nullptr;
  check(api, api.GetTensorTypeAndShape(value, &info));
  Tensor tensor{nullptr, ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED, {}};
  size_t axes = 0;
  OrtStatus* status = api.GetTensorElementType(info, &tensor.type);
  if (!status) status = api.GetDimensionsCount(info, &axes);
  tensor.shape.resize(axes);
  if (!status) status = api.GetDimensions(info, tensor.shape.data(), axes);
  if (!status) status = api.GetTensorMutableData(const_cast<OrtValue*>(value), &tensor.data);
  api.ReleaseTensorTypeAndShapeInfo(info);
  check(api, status);
  return tensor;
}

#if defined(__x86_64__)
using Extension = std::pair<const char*, bool>;  // name of an extension of the instruction set, whether the CPU has it

// A build for tests (amx_tiles.h) treats the extensions in MOESHIP_CPU_WITHOUT as missing.
Extension extension(const char* name, bool has) {
#if defined(MOESHIP_EMULATED_CPU)
  const char* without = std::getenv("MOESHIP_CPU_WITHOUT");
  if (without && std::strstr(without, name)) has = false;
#endif
  return {name, has};
}
#define CPU_HAS(name) extension(name, __builtin_cpu_supports(name))

bool has_f16c() {  // __builtin_cpu_supports of GCC before 11 and clang before 17 lacks F16C
  unsigned eax, ebx, ecx, edx;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx & bit_F16C);
}
#endif

const char* type_name(ONNXTensorElementDataType type) {
  switch (type) {
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT: return "float32";
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16: return "float16";
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8: return "uint8";
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8: return "int8";
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32: return "int32";
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64: return "int64";
    default: return "another type";
  }
}

}  // namespace

void check(const OrtApi& api, OrtStatus* status) {
  if (!status) return;
  Failure failure{api.GetErrorMessage(status)};
  api.ReleaseStatus(status);
  throw failure;
}

std::string in_brackets(const std::vector<int64_t>& shape) {
  std::string text = "[";
  for (size_t i = 0; i < shape.size(); ++i) text += (i ? ", " : "") + std::to_string(shape[i]);
  return text + "]";
}

Node::Node(const OrtApi& api, const OrtKernelInfo* info, const char* op) : api_(api), info_(info), name_(op) {
  size_t size = 0;
  check(api, api.KernelInfo_GetNodeName(info, nullptr, &size));
  std::string name(size, '\0');
  check(api, api.KernelInfo_GetNodeName(info, &name[0], &size));
  if (size > 1) name_ += " " + name.substr(0, size - 1);
}

void Node::fail(const std::string& problem) const {
  throw Failure{"loading " + name_ + ": " + problem + "; export the engine again with this version's moeship"};
}

int64_t Node::integer(const char* name, int64_t least, int64_t most) const {
  int64_t value = 0;
  if (OrtStatus* status = api_.KernelInfoGetAttribute_int64(info_, name, &value)) {
    api_.ReleaseStatus(status);
    fail(std::string("the attribute ") + name + " is missing");
  }
  if (value < least || value > most)
    fail(std::string("found ") + name + " " + std::to_string(value) + ", expected " + std::to_string(least) +
         (least == most ? "" : " to " + std::to_string(most)));
  return value;
}

float Node::real(const char* name) const {
  float value = 0;
  if (OrtStatus* status = api_.KernelInfoGetAttribute_float(info_, name, &value)) {
    api_.ReleaseStatus(status);
    fail(std::string("the attribute ") + name + " is missing");
  }
  return value;
}

std::string Node::choice(const char* name, const std::vector<std::string>& choices) const {
  char text[32] = {};
  size_t size = sizeof text;
  std::string found, expected;
  if (OrtStatus* status = api_.KernelInfoGetAttribute_string(info_, name, text, &size)) {
    api_.ReleaseStatus(status);
  } else {
    found = text;
  }
  for (const std::string& choice : choices) {
    if (found == choice) return found;
    expected += (expected.empty() ? "" : " or ") + choice;
  }
  fail(std::string("found ") + name + " \"" + found + "\", expected " + expected);
}

bool Node::has_attribute(const char* name) const {
  int64_t value = 0;
  OrtStatus* status = api_.KernelInfoGetAttribute_int64(info_, name, &value);
  if (status) api_.ReleaseStatus(status);
  return !status;
}

bool Node::has_input(size_t index) const {
  size_t count = 0, size = 0;
  check(api_, api_.KernelInfo_GetInputCount(info_, &count));
  if (index >= count) return false;
  check(api_, api_.KernelInfo_GetInputName(info_, index, nullptr, &size));
  return size > 1;
}

Tensor Node::constant(size_t index, const char* what, const std::vector<ONNXTensorElementDataType>& types,
                      const std::vector<int64_t>& shape) const {
  int is_constant = 0;
  const OrtValue* value = nullptr;
  if (has_input(index)) check(api_, api_.KernelInfoGetConstantInput_tensor(info_, index, &is_constant, &value));
  if (!is_constant || !value) fail(std::string(what) + " is no initializer of the graph");
  Tensor tensor = describe(api_, value);
  if (std::find(types.begin(), types.end(), tensor.type) == types.end()) {
    std::string expected;
    for (auto type : types) expected += (expected.empty() ? "" : " or ") + std::string(type_name(type));
    fail(std::string(what) + " is of " + type_name(tensor.type) + ", expected " + expected);
  }
  if (tensor.shape != shape)
    fail(std::string(what) + " has the shape " + in_brackets(tensor.shape) + ", expected " + in_brackets(shape));
  return tensor;
}

Storage read_storage(const Node& node, const char* bits, const char* block) {
  node.integer("layout", kLayout, kLayout);
  const Storage storage{static_cast<int>(node.integer(bits, 2, 8)), static_cast<int>(node.integer(block, 32, 128))};
  if (storage.bits == 7) node.fail(std::string("found ") + bits + " 7, expected 2, 3, 4, 5, 6 or 8");
  if (storage.block != 32 && storage.block != 64 && storage.block != 128)
    node.fail(std::string("found ") + block + " " + std::to_string(storage.block) + ", expected 32, 64 or 128");
  return storage;
}

Settings read_settings(const Node& node) {
  Settings settings{};
  settings.floats = node.choice("activations", {"int8", "float32"}) == "float32";
  settings.level = &chosen_level();
  settings.tile_rows = settings.floats ? kFewRows : settings.level->tile_rows;
  return settings;
}

Weights::Weights(const Node& node, const Storage& storage, size_t first_input, int64_t experts, int64_t rows,
                 int64_t features, bool stacked) {
  first_.bits = storage.bits;
  first_.block = storage.block;
  first_.rows = rows;
  first_.groups = (rows + kGroupRows - 1) / kGroupRows;
  first_.blocks = (features + storage.block - 1) / storage.block;
  auto shape = [&](std::vector<int64_t> axes) {
    if (stacked) axes.insert(axes.begin(), experts);
    return axes;
  };
  const int64_t block_bytes = int64_t{storage.block} * kGroupRows * storage.bits / 8;
  const auto uint8 = ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8, float32 = ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT,
             float16 = ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16;
  const Tensor codes = node.constant(first_input, "the codes' tensor", {uint8},
                                     shape({first_.groups, first_.blocks, block_bytes}));
  const Tensor scales = node.constant(first_input + 1, "the scales' tensor", {float16, float32},
                                      shape({first_.groups, first_.blocks, kGroupRows}));
  first_.codes = static_cast<const uint8_t*>(codes.data);
  first_.scales = scales.data;
  first_.half_scales = scales.type == float16;
  if (node.has_input(first_input + 2))
    first_.zeros = static_cast<const uint8_t*>(
        node.constant(first_input + 2, "the zero points' tensor", {uint8},
                      shape({first_.groups, first_.blocks, kGroupRows})).data);
  if (node.has_input(first_input + 3))
    first_.bias =
        static_cast<const float*>(node.constant(first_input + 3, "the bias", {float32}, shape({rows})).data);
}

Matrix Weights::of(int64_t expert) const {
  Matrix matrix = first_;
  const int64_t scales = expert * first_.groups * first_.blocks * kGroupRows;
  matrix.codes += expert * first_.groups * first_.group_bytes();
  matrix.scales = static_cast<const char*>(first_.scales) + scales * (first_.half_scales ? 2 : 4);
  if (first_.zeros) matrix.zeros += scales;
  if (first_.bias) matrix.bias += expert * first_.rows;
  return matrix;
}

Tensor Call::any(size_t index) const {
  const OrtValue* value = nullptr;
  size_t count = 0;
  check(api_, api_.KernelContext_GetInputCount(context_, &count));
  if (index < count) check(api_, api_.KernelContext_GetInput(context_, index, &value));
  if (!value) return {nullptr, ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED, {}};
  return describe(api_, value);
}

Tensor Call::indices(size_t index, const char* what) const {
  Tensor tensor = any(index);
  if (tensor.type != ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64)
    throw Failure{std::string(what) + " is of " + type_name(tensor.type) + ", expected int64"};
  return tensor;
}

Tensor Call::input(size_t index, const char* what, int64_t width) const {
  Tensor tensor = any(index);
  if (tensor.type == ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED) return tensor;
  if (tensor.type != ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT)
    throw Failure{std::string(what) + " is of " + type_name(tensor.type) + ", expected float32"};
  if (tensor.shape.empty() || tensor.shape.back() != width)
    throw Failure{std::string(what) + " has the shape " + in_brackets(tensor.shape) + ", expected " +
                  std::to_string(width) + " values along its last axis"};
  return tensor;
}

Tensor Call::exactly(size_t index, const char* what, ONNXTensorElementDataType type,
                     const std::vector<int64_t>& shape) const {
  Tensor tensor = any(index);
  if (tensor.type != type)
    throw Failure{std::string(what) + " is of " + type_name(tensor.type) + ", expected " + type_name(type)};
  bool fits = tensor.shape.size() == shape.size();
  for (size_t i = 0; fits && i < shape.size(); ++i) fits = shape[i] < 0 || tensor.shape[i] == shape[i];
  if (!fits)
    throw Failure{std::string(what) + " has the shape " + in_brackets(tensor.shape) + ", expected " +
                  in_brackets(shape)};
  return tensor;
}

float* Call::output(size_t index, const std::vector<int64_t>& shape) const {
  return static_cast<float*>(room(index, shape));
}

int8_t* Call::codes_output(size_t index, const std::vector<int64_t>& shape) const {
  return static_cast<int8_t*>(room(index, shape));
}

void* Call::room(size_t index, const std::vector<int64_t>& shape) const {
  OrtValue* value = nullptr;
  void* data = nullptr;
  check(api_, api_.KernelContext_GetOutput(context_, index, shape.data(), shape.size(), &value));
  check(api_, api_.GetTensorMutableData(value, &data));
  return data;
}

void Scratch::reserve(size_t bytes) {
  if (bytes <= memory_bytes) return;
  memory.reset();
  memory_bytes = 0;
  memory.reset(static_cast<char*>(std::aligned_alloc(64, rounded(bytes))));
  if (!memory) throw Failure{"no memory for " + std::to_string(bytes) + " bytes of activations"};
  memory_bytes = bytes;
}

void* Scratch::take(size_t bytes) {
  void* place = memory.get() + used_;
  used_ += rounded(bytes);
  if (used_ > rounded(memory_bytes)) throw Failure{"more scratch memory taken than reserved"};
  return place;
}

size_t Activations::bytes(const Settings& settings, int64_t rows, const Matrix& weights) {
  const size_t features = static_cast<size_t>(rows * weights.features());
  const size_t blocks = static_cast<size_t>(rows * weights.blocks);
  if (settings.floats) return Scratch::rounded(4 * features);
  return Scratch::rounded(features) + 2 * Scratch::rounded(4 * blocks);
}

Activations::Activations(const Settings& settings, int64_t rows, const Matrix& weights, Scratch& scratch)
    : settings_(settings),
      block_(weights.block),
      blocks_(weights.blocks),
      zero_(weights.zeros ? 1 : 1 << (weights.bits - 1)) {
  const size_t features = static_cast<size_t>(rows * weights.features());
  const size_t blocks = static_cast<size_t>(rows * weights.blocks);
  if (settings.floats) {
    values_ = static_cast<float*>(scratch.take(4 * features));
  } else {
    codes_ = static_cast<int8_t*>(scratch.take(features));
    scales_ = static_cast<float*>(scratch.take(4 * blocks));
    offsets_ = static_cast<int32_t*>(scratch.take(4 * blocks));
  }
}

Tile Activations::tile(int64_t first_row, int rows) const {
  const int64_t features = first_row * blocks_ * block_, blocks = first_row * blocks_;
  if (settings_.floats) return {rows, nullptr, nullptr, nullptr, values_ + features};
  return {rows, codes_ + features, scales_ + blocks, offsets_ + blocks, nullptr};
}

void Activations::put(const float* x, int64_t count, int64_t first_block, int row, const Tile& tile) const {
  if (!settings_.floats) return settings_.level->quantize(x, count, block_, zero_, first_block, row, tile);
  float* to = tile.values + first_block * block_ * tile.rows + row;
  const int64_t padded = (count + block_ - 1) / block_ * block_;
  for (int64_t i = 0; i < padded; ++i) to[i * tile.rows] = i < count ? x[i] : 0.0f;
}

int64_t groups_of_task(const Matrix& weights, int64_t multiple) {
  int64_t groups = std::max<int64_t>(1, kTaskBytes / weights.group_bytes());
  groups = std::min<int64_t>(groups, kMostGroups);
  return std::max(multiple, groups / multiple * multiple);
}

const Level& chosen_level() {
  std::vector<const Level*> levels = {&kPlain};
  std::string missing;
#if defined(__x86_64__)
  static const bool has_tiles = tiles_usable();
  for (const auto& [name, has] : {CPU_HAS("avx2"), CPU_HAS("fma"), extension("f16c", has_f16c())})
    if (!has) missing += (missing.empty() ? "" : ", ") + std::string(name);
  bool further = missing.empty();
  const auto add = [&](const Level& level, std::initializer_list<Extension> needed) {
    for (const Extension& extension : needed) further = further && extension.second;
    if (further) levels.push_back(&level);
  };
  add(kAvx2, {});
  add(kAvx512bw, {CPU_HAS("avx512f"), CPU_HAS("avx512bw"), CPU_HAS("avx512dq"), CPU_HAS("avx512vl")});
  add(kAvx512vnni, {CPU_HAS("avx512vnni")});
  add(kAmx, {extension("amx", has_tiles)});
#endif
  const char* asked = std::getenv("MOESHIP_KERNELS_LEVEL");
  if (!asked || !*asked) {
    if (missing.empty()) return *levels.back();
    throw Failure{"choosing the kernels' instruction set: this CPU lacks " + missing +
                  "; build the engine with --kernels onnxruntime, or set MOESHIP_KERNELS_LEVEL to plain, which is slow"};
  }
  std::string have;
  for (const Level* level : levels) {
    if (std::strcmp(asked, level->name) == 0) return *level;
    have += (have.empty() ? "" : ", ") + std::string(level->name);
  }
  throw Failure{std::string("choosing the kernels' instruction set: MOESHIP_KERNELS_LEVEL is ") + asked +
                ", this CPU has " + have + "; unset it to take the last of them"};
}

}  // namespace moeship
