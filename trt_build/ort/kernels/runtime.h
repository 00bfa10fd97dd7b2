// ONNX Runtime's C API as the operators use it: what a node says, what a call gives, its threads.
#pragma once

#include <string>
#include <vector>

#include "layout.h"
#include "third_party/onnxruntime_c_api.h"

namespace moeship {

// Thrown inside the library; turned into an OrtStatus where ONNX Runtime is answered.
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

// A node when its kernel is made: attributes and constant inputs. Every method throws Failure, naming the node.
class Node {
 public:
  Node(const OrtApi& api, const OrtKernelInfo* info, const char* op);

  [[noreturn]] void fail(const std::string& problem) const;
  int64_t integer(const char* name, int64_t least, int64_t most) const;
  float real(const char* name) const;
  std::string choice(const char* name, const std::vector<std::string>& choices) const;
  bool has_input(size_t index) const;
  // A constant input of one of the given types and of exactly this shape; `what` names it in errors.
  Tensor constant(size_t index, const char* what, const std::vector<ONNXTensorElementDataType>& types,
                  const std::vector<int64_t>& shape) const;

 private:
  const OrtApi& api_;
  const OrtKernelInfo* info_;
  std::string name_;
};

// Attributes that both operators have.
struct Settings {
  int bits, block;
  bool floats;  // activations stay float32
  const Level* level;
  int tile_rows;  // the most of a tile
};
Settings read_settings(const Node& node);

// The matrices of one or more experts [experts, rows, features], from the node's inputs codes, scales, zeros, bias at
// `first_input` and after it; zeros and bias are optional.
class Weights {
 public:
  Weights() = default;
  Weights(const Node& node, const Settings& settings, size_t first_input, int64_t experts, int64_t rows,
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

  // Input of float32 whose last axis has `width` values; null data where an optional one is absent.
  Tensor input(size_t index, const char* what, int64_t width) const;
  float* output(size_t index, const std::vector<int64_t>& shape) const;

  // f(0) ... f(count - 1) on the session's threads.
  template <class F>
  void parallel(int64_t count, const F& f) const {
    if (count == 1) return f(0);
    if (count <= 0) return;
    auto call = [](void* data, size_t index) { (*static_cast<const F*>(data))(static_cast<int64_t>(index)); };
    check(api_, api_.KernelContext_ParallelFor(context_, call, static_cast<size_t>(count), 0, const_cast<F*>(&f)));
  }

 private:
  const OrtApi& api_;
  OrtKernelContext* context_;
};

// Memory for one call, kept by the calling thread from call to call.
class Scratch {
 public:
  // Aligned to a cache line and a vector. Reserve for all before the first is taken.
  void reserve(size_t bytes);
  void* take(size_t bytes);
  static size_t rounded(size_t bytes) { return (bytes + 63) / 64 * 64; }

 private:
  size_t used_ = 0;
};

// Activations [rows, features] cut into tiles, in the form that `Settings` asks for.
class Activations {
 public:
  static size_t bytes(const Settings& settings, int64_t rows, const Matrix& weights);
  Activations(const Settings& settings, int64_t rows, const Matrix& weights, Scratch& scratch);
  // The tile of `rows` rows that begins at a row.
  Tile tile(int64_t first_row, int rows) const;
  // Fill count values of a tile's row from a block on, zeros up to the end of the last block.
  void put(const float* x, int64_t count, int64_t first_block, int row, const Tile& tile) const;

 private:
  const Settings& settings_;
  int64_t blocks_;
  int zero_;  // see Level::quantize
  int8_t* codes_ = nullptr;
  float* scales_ = nullptr;
  int32_t* offsets_ = nullptr;
  float* values_ = nullptr;
};

// How many groups a task takes: about a share of the second-level cache, a multiple of `multiple`.
int64_t groups_of_task(const Matrix& weights, int64_t multiple);

// The best level that this CPU has, or the one that MOESHIP_KERNELS_LEVEL names. Throws Failure.
const Level& chosen_level();

struct Kernel {
  virtual ~Kernel() = default;
  virtual void compute(const Call& call) const = 0;
};

Kernel* make_block_linear(const Node& node);
Kernel* make_experts(const Node& node);

}  // namespace moeship
