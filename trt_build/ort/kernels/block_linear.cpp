// BlockLinear: y [..., N] = x [..., K] times a block-quantised matrix [N, K], plus a bias.
//
// Inputs: x float32, codes uint8 [N/16, K/block, 2 * block * bits], scales float16 or float32 [N/16, K/block, 16],
// optionally zero points uint8 of the scales' shape, optionally bias float32 [N]. Divisions in shapes round up.
// Attributes: layout, bits, block_size, in_features, out_features, activations ("int8" or "float32").
#include <algorithm>
#include <cstring>

#include "runtime.h"

namespace moeship {
namespace {

class BlockLinear : public Kernel {
 public:
  explicit BlockLinear(const Node& node)
      : settings_(read_settings(node)),
        features_(node.integer("in_features", 1, int64_t{1} << 30)),
        rows_(node.integer("out_features", 1, int64_t{1} << 30)),
        weights_(node, read_storage(node), 1, 1, rows_, features_, false) {}

  void compute(const Call& call) const override {
    const Tensor x = call.input(0, "the input of BlockLinear", features_);
    if (!x.data && x.shape.empty()) throw Failure{"BlockLinear has no input"};
    std::vector<int64_t> shape = x.shape;
    shape.back() = rows_;
    int64_t tokens = 1;
    for (size_t i = 0; i + 1 < shape.size(); ++i) tokens *= shape[i];
    float* y = call.output(0, shape);
    if (!tokens) return;

    const Matrix& w = weights_.shape();
    Scratch scratch;
    scratch.reserve(Activations::bytes(settings_, tokens, w));
    const Activations activations(settings_, tokens, w, scratch);
    const int64_t most = settings_.tile_rows, tiles = (tokens + most - 1) / most;
    auto tile_at = [&](int64_t t) {
      return activations.tile(t * most, static_cast<int>(std::min(most, tokens - t * most)));
    };
    call.parallel(tiles, [&](int64_t t) {
      const Tile tile = tile_at(t);
      for (int r = 0; r < tile.rows; ++r)
        activations.put(static_cast<const float*>(x.data) + (t * most + r) * features_, features_, 0, r, tile);
    });
    const int64_t step = groups_of_task(w, 1);
    call.parallel((w.groups + step - 1) / step, [&](int64_t task) {
      alignas(64) float sums[kTileRows * kMostGroups * kGroupRows];
      const int64_t first = task * step, count = std::min(step, w.groups - first);
      const int64_t column = first * kGroupRows, width = std::min(count * kGroupRows, rows_ - column);
      for (int64_t t = 0; t < tiles; ++t) {
        const Tile tile = tile_at(t);
        settings_.level->product(w, first, count, tile, sums);
        for (int r = 0; r < tile.rows; ++r)
          std::memcpy(y + (t * most + r) * rows_ + column, sums + r * count * kGroupRows,
                      sizeof(float) * static_cast<size_t>(width));
      }
    });
  }

 private:
  Settings settings_;
  int64_t features_, rows_;
  Weights weights_;
};

}  // namespace

Kernel* make_block_linear(const Node& node) { return new BlockLinear(node); }

}  // namespace moeship
