// Embedding: y [..., K] float32 = the rows of a block-quantised matrix [N, K] that token ids [...] name.
//
// Inputs: token ids int64, codes uint8 [N/16, K/block, 2 * block * bits], scales float16 or float32
// [N/16, K/block, 16], optionally zero points uint8 of the scales' shape. Divisions in shapes round up.
// Attributes: layout, bits, block_size, features (K), rows (N).
//
// A value is float32((code - zero point) * scale). A row lies in every line of its group, four bytes in each.
#include <algorithm>
#include <cstring>

#include "elementwise.h"
#include "runtime.h"

namespace moeship {
namespace {

class Embedding : public Kernel {
 public:
  explicit Embedding(const Node& node)
      : features_(node.integer("features", 1, int64_t{1} << 30)),
        rows_(node.integer("rows", 1, int64_t{1} << 30)),
        weights_(node, read_storage(node), 1, 1, rows_, features_, false) {}

  void compute(const Call& call) const override {
    const Tensor ids = call.indices(0, "the token ids of Embedding");
    const auto* const id = static_cast<const int64_t*>(ids.data);
    int64_t tokens = 1;
    for (int64_t size : ids.shape) tokens *= size;
    std::vector<int64_t> shape = ids.shape;
    shape.push_back(features_);
    float* y = call.output(0, shape);
    for (int64_t t = 0; t < tokens; ++t)
      if (id[t] < 0 || id[t] >= rows_)
        throw Failure{"Embedding was given the token id " + std::to_string(id[t]) + ", expected 0 to " +
                      std::to_string(rows_ - 1)};
    call.parallel(tokens, [&](int64_t t) { gather(id[t], y + t * features_); });
  }

 private:
  void gather(int64_t row, float* y) const {
    const Matrix& w = weights_.shape();
    const int low = low_bits(w.bits);
    const int64_t lane = row % kGroupRows, group = row / kGroupRows;
    const uint8_t* unit = w.codes + group * w.group_bytes() + 4 * lane;
    for (int64_t b = 0; b < w.blocks; ++b) {
      const int64_t place = (group * w.blocks + b) * kGroupRows + lane;
      const float scale = w.half_scales ? from_half(static_cast<const uint16_t*>(w.scales)[place])
                                        : static_cast<const float*>(w.scales)[place];
      const int zero = w.zeros ? w.zeros[place] : 1 << (w.bits - 1);
      for (int64_t first = b * w.block; first < (b + 1) * w.block; first += kUnit, unit += w.bits * kLineBytes) {
        uint8_t codes[kUnit];
        for (int i = 0; i < kQuads; ++i) {
          uint32_t quad = of_plane(unit, low, i);
          if (low < w.bits) quad |= of_plane(unit + low * kLineBytes, w.bits - low, i) << low;
          std::memcpy(codes + 4 * i, &quad, 4);
        }
        const int here = static_cast<int>(std::clamp<int64_t>(features_ - first, 0, kUnit));
        for (int i = 0; i < here; ++i) y[first + i] = static_cast<float>(codes[i] - zero) * scale;
      }
    }
  }

  // What a plane of `width` bits, beginning with a line, has of the four codes of quad `i`: one in each byte.
  static uint32_t of_plane(const uint8_t* line, int width, int i) {
    uint32_t lane;
    std::memcpy(&lane, line + i / (8 / width) * kLineBytes, 4);
    return lane >> (i % (8 / width) * width) & 0x01010101u * ((1u << width) - 1);
  }

  int64_t features_, rows_;
  Weights weights_;
};

}  // namespace

Kernel* make_embedding(const Node& node) { return new Embedding(node); }

}  // namespace moeship
