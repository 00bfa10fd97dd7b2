// Wrappers of ONNX Runtime's C API for the operators: attributes and inputs of a node, data of a call, the threads.
#pragma once

#include <string>
#include <vector>

#include "layout.h"
#include "third_party/onnxruntime_c_api.h"

namespace moeship {

// Exception inside the library; converted into an OrtStatus before a call returns to ONNX Runtime.
struct Failure {
  std::string text;
};

struct Tensor {
  void* data;
  ONNXTensorElementDataType type;
  std::vector<int64_t> shape;
};

void check(const OrtApi& api, OrtStatus* status);
std::string in_brackets(const std::vector<int64_t>& shape);

// A node while its kernel is made: its attributes and constant inputs. Every method throws Failure that names the node.
class Node {
 public:
  Node(const OrtApi& api, const OrtKernelInfo* info, const char* op);

  [[noreturn]] void fail(const std::string& problem) const;
  int64_t integer(const char* name, int64_t least, int64_t most) const;
  float real(const char* name) const;
  std::string choice(const char* name, const std::vector<std::string>& choices) const;
  bool has_attribute(const char* name) const;
  bool has_input(size_t index) const;
  // A constant input of one of the given types and of exactly this shape; `what` names it in errors.
  Tensor constant(size_t index, const char* what, const std::vector<ONNXTensorElementDataType>& types,
                  const std::vector<int64_t>& shape) const;

 private:
  const OrtApi& api_;
  const OrtKernelInfo* info_;
  std::string name_;
};

// How a matrix is stored. Throws Failure for a layout that is not this library's.
struct Storage {
  int bits, block;
};
Storage read_storage(const Node& node, const char* bits = "bits", const char* block = "block_size");

// How a node multiplies.
struct Settings {
  bool floats;  // activations stay float32
  const Level* level;
  int tile_rows;  // largest number of rows in a tile
};
Settings read_settings(const Node& node);

// Read the matrices of one or more experts [experts, rows, features] from four inputs of the node, beginning with
// `first_input`: codes, scales, zeros, bias. Zeros and bias are optional.
class Weights {
 public:
  Weights() = default;
  Weights(const Node& node, const Storage& storage, size_t first_input, int64_t experts, int64_t rows,
          int64_t features, bool stacked);
  Matrix of(int64_t expert) const;
  const Matrix& shape() const { return first_; }

 private:
  Matrix first_{};
};

// One call of a kernel.
class Call {
 public:
  Call(const OrtApi& api, OrtKernelContext* context) : api_(api), context_(context) {}

  // A float32 input whose last axis has `width` values; its data is null if an optional input is absent.
  Tensor input(size_t index, const char* what, int64_t width) const;
  // An int64 input of any shape.
  Tensor indices(size_t index, const char* what) const;
  // Whether an input is present.
  bool has(size_t index) const { return any(index).type != ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED; }
  // An input of a type and of this shape; -1 stands for any size.
  Tensor exactly(size_t index, const char* what, ONNXTensorElementDataType type,
                 const std::vector<int64_t>& shape) const;
  float* output(size_t index, const std::vector<int64_t>& shape) const;
  int8_t* codes_output(size_t index, const std::vector<int64_t>& shape) const;

  // f(0) ... f(count - 1) on the session's threads.
  template <class F>
  void parallel(int64_t count, const F& f) const {
    if (count == 1) return f(0);
    if (count <= 0) return;
    auto call = [](void* data, size_t index) { (*static_cast<const F*>(data))(static_cast<int64_t>(index)); };
    check(api_, api_.KernelContext_ParallelFor(context_, call, static_cast<size_t>(count), 0, const_cast<F*>(&f)));
  }

 private:
  Tensor any(size_t index) const;
  void* room(size_t index, const std::vector<int64_t>& shape) const;

  const OrtApi& api_;
  OrtKernelContext* context_;
};

// Working memory of one call. The calling thread keeps it for its next calls.
class Scratch {
 public:
  // Memory from `take` is aligned to 64 bytes, a cache line. `reserve` the total before the first `take`.
  void reserve(size_t bytes);
  void* take(size_t bytes);
  static size_t rounded(size_t bytes) { return (bytes + 63) / 64 * 64; }

 private:
  size_t used_ = 0;
};

// Activations [rows, features] divided into tiles, as int8 or float32 as `Settings` says.
class Activations {
 public:
  static size_t bytes(const Settings& settings, int64_t rows, const Matrix& weights);
  Activations(const Settings& settings, int64_t rows, const Matrix& weights, Scratch& scratch);
  // The tile of `rows` rows that begins with row `first_row`.
  Tile tile(int64_t first_row, int rows) const;
  // Write x[count] into row `row` of a tile, beginning with block `first_block`; the rest of the last block is zero.
  void put(const float* x, int64_t count, int64_t first_block, int row, const Tile& tile) const;

 private:
  const Settings& settings_;
  int block_;
  int64_t blocks_;
  int zero_;  // see Level::quantize
  int8_t* codes_ = nullptr;
  float* scales_ = nullptr;
  int32_t* offsets_ = nullptr;
  float* values_ = nullptr;
};

// The number of groups in a task: a multiple of `multiple`, whose weights take a share of the second-level cache.
int64_t groups_of_task(const Matrix& weights, int64_t multiple);

// The best level that this CPU has, or the one that MOESHIP_KERNELS_LEVEL names. Throws Failure.
const Level& chosen_level();

struct Kernel {
  virtual ~Kernel() = default;
  virtual void compute(const Call& call) const = 0;
};

Kernel* make_attention(const Node& node);
Kernel* make_block_linear(const Node& node);
Kernel* make_embedding(const Node& node);
Kernel* make_experts(const Node& node);

}  // namespace moeship
