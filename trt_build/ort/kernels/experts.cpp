// Experts: routes every row to k of E experts, computes each chosen expert (two matrices with an activation between),
// and returns the weighted sum.
//
// Inputs: x float32 [..., H]; router logits float32 [..., E], which may be absent if E is 1; then for each of the two
// matrices [E, N, K] codes uint8 [E, N/16, K/block, 2 * block * bits], scales float16 or float32
// [E, N/16, K/block, 16], optionally zero points uint8 of the scales' shape, optionally bias float32 [E, N]. The first
// matrix has K = H and N = F, the second K = F and N = H. With the activation "swiglu" the first matrix has N = 2 F,
// and its rows alternate between gate and up.
// Attributes: layout, bits and block_size of the first matrix, second_bits and second_block_size (absent: those of the
// first matrix), activations ("int8" or "float32"), hidden_size, expert_size (F), experts, k, activation ("gelu" in its
// tanh form, "silu", "swiglu"), activation_alpha, activation_beta, activation_limit: swiglu is g * sigmoid(alpha * g) * (u + beta), where g is clamped to at most the limit and u to [-limit, limit].
//
// Each row chooses the k largest logits, among equal logits the lowest expert index; the weights of its experts are the
// softmax over these k. A row's outputs are summed in ascending order of the experts. The weights of an expert that no
// row chose are not read.
#include <algorithm>
#include <cstring>

#include "elementwise.h"
#include "runtime.h"

namespace moeship {
namespace {

constexpr int64_t kMostExperts = 4096;

struct Choice {
  int64_t token;
  float weight;
};

// Rows of one expert that are multiplied together: the choices [first, first + rows).
struct Span {
  int64_t expert, first;
  int rows;
};

// The choices of every token, sorted by expert and then token.
class Routing {
 public:
  Routing(const float* logits, int64_t tokens, int64_t experts, int64_t k, int64_t tile_rows) : choices_(tokens * k) {
    std::vector<int64_t> chosen(tokens * k), ends(experts + 1, 0);
    std::vector<float> weights(tokens * k);
    for (int64_t t = 0; t < tokens; ++t) {
      choose(logits ? logits + t * experts : nullptr, experts, k, &chosen[t * k], &weights[t * k]);
      for (int64_t i = 0; i < k; ++i) ++ends[chosen[t * k + i] + 1];
    }
    for (int64_t e = 0; e < experts; ++e) {
      for (int64_t first = 0; first < ends[e + 1]; first += tile_rows)
        spans_.push_back({e, ends[e] + first, static_cast<int>(std::min(tile_rows, ends[e + 1] - first))});
      if (ends[e + 1]) active_.push_back(e);
      ends[e + 1] += ends[e];
    }
    for (int64_t i = 0; i < tokens * k; ++i) choices_[ends[chosen[i]]++] = {i / k, weights[i]};
  }

  const std::vector<Choice>& choices() const { return choices_; }
  const std::vector<Span>& spans() const { return spans_; }
  const std::vector<int64_t>& active() const { return active_; }

 private:
  static void choose(const float* logits, int64_t experts, int64_t k, int64_t* chosen, float* weights) {
    if (!logits) {
      chosen[0] = 0, weights[0] = 1.0f;
      return;
    }
    bool unordered = false;  // one NaN among the logits makes every weight NaN
    for (int64_t e = 0; e < experts; ++e) unordered |= logits[e] != logits[e];
    float sum = 0;
    for (int64_t i = 0; i < k; ++i) {
      int64_t best = -1;
      for (int64_t e = 0; e < experts; ++e)
        if ((best < 0 || logits[e] > logits[best]) && std::find(chosen, chosen + i, e) == chosen + i) best = e;
      chosen[i] = best;
      weights[i] = unordered ? as_float(0x7FC00000u) : exponential(logits[best] - logits[chosen[0]]);
      sum += weights[i];
    }
    for (int64_t i = 0; i < k; ++i) weights[i] /= sum;
  }

  std::vector<Choice> choices_;
  std::vector<Span> spans_;
  std::vector<int64_t> active_;
};

class Experts : public Kernel {
 public:
  explicit Experts(const Node& node)
      : settings_(read_settings(node)),
        hidden_(node.integer("hidden_size", 1, int64_t{1} << 24)),
        width_(node.integer("expert_size", 1, int64_t{1} << 24)),
        experts_(node.integer("experts", 1, kMostExperts)),
        k_(node.integer("k", 1, experts_)) {
    const std::string kind = node.choice("activation", {"gelu", "silu", "swiglu"});
    function_.kind = kind == "gelu" ? Activation::kGelu : kind == "silu" ? Activation::kSilu : Activation::kSwiglu;
    function_.alpha = node.real("activation_alpha");
    function_.beta = node.real("activation_beta");
    function_.limit = node.real("activation_limit");
    if (!(function_.limit > 0)) node.fail("found an activation_limit that is not positive, expected one, or infinity");
    gated_ = function_.kind == Activation::kSwiglu ? 2 : 1;
    routed_ = node.has_input(1);
    if (!routed_ && experts_ > 1) node.fail("the router's logits are missing");
    const char* const bits = node.has_attribute("second_bits") ? "second_bits" : "bits";
    const char* const block = node.has_attribute("second_block_size") ? "second_block_size" : "block_size";
    in_ = Weights(node, read_storage(node), 2, experts_, gated_ * width_, hidden_, true);
    out_ = Weights(node, read_storage(node, bits, block), 6, experts_, hidden_, width_, true);
  }

  void compute(const Call& call) const override {
    const Tensor x = call.input(0, "the input of Experts", hidden_);
    if (!x.data && x.shape.empty()) throw Failure{"Experts has no input"};
    int64_t tokens = 1;
    for (size_t i = 0; i + 1 < x.shape.size(); ++i) tokens *= x.shape[i];
    const float* logits = routed_ ? router_logits(call, tokens) : nullptr;
    float* y = call.output(0, x.shape);
    if (!tokens) return;

    const Routing routing(logits, tokens, experts_, k_, settings_.tile_rows);
    const auto rows = static_cast<int64_t>(routing.choices().size());
    Scratch scratch;
    scratch.reserve(Activations::bytes(settings_, rows, in_.shape()) +
                    Activations::bytes(settings_, rows, out_.shape()));
    const Activations inputs(settings_, rows, in_.shape(), scratch), inner(settings_, rows, out_.shape(), scratch);
    gather(call, routing, static_cast<const float*>(x.data), inputs);
    first_product(call, routing, inputs, inner);
    second_product(call, routing, inner, tokens, y);
  }

 private:
  const float* router_logits(const Call& call, int64_t tokens) const {
    const Tensor logits = call.input(1, "the router's logits", experts_);
    int64_t rows = 1;
    for (size_t i = 0; i + 1 < logits.shape.size(); ++i) rows *= logits.shape[i];
    if (logits.shape.empty() || rows != tokens)
      throw Failure{"the router's logits have the shape " + in_brackets(logits.shape) + ", expected " +
                    std::to_string(tokens) + " rows"};
    return static_cast<const float*>(logits.data);
  }

  void gather(const Call& call, const Routing& routing, const float* x, const Activations& inputs) const {
    const auto& spans = routing.spans();
    auto fill = [&](int64_t s) {
      const Tile tile = inputs.tile(spans[s].first, spans[s].rows);
      for (int r = 0; r < tile.rows; ++r)
        inputs.put(x + routing.choices()[spans[s].first + r].token * hidden_, hidden_, 0, r, tile);
    };
    const auto count = static_cast<int64_t>(spans.size());
    if (routing.choices().size() <= kFewRows) {
      for (int64_t s = 0; s < count; ++s) fill(s);
    } else {
      call.parallel(count, fill);
    }
  }

  // The first product and the activation: a task computes whole blocks of the inner features, as the second matrix has
  // them, for all rows of one expert.
  void first_product(const Call& call, const Routing& routing, const Activations& inputs,
                     const Activations& inner) const {
    const Matrix& shape = in_.shape();
    const int64_t block = out_.shape().block, values = kGroupRows / gated_;  // values of one group after the activation
    const int64_t step = groups_of_task(shape, block / values);
    const int64_t tasks = (shape.groups + step - 1) / step;
    const auto& active = routing.active();
    call.parallel(tasks * static_cast<int64_t>(active.size()), [&](int64_t task) {
      alignas(64) float sums[kTileRows * kMostGroups * kGroupRows];
      const int64_t expert = active[task / tasks], first = task % tasks * step;
      const int64_t count = std::min(step, shape.groups - first);
      const int64_t begin = first * values, width = std::min(count * values, width_ - begin);
      const Matrix w = in_.of(expert);
      for (const Span& span : routing.spans()) {
        if (span.expert != expert) continue;
        const Tile from = inputs.tile(span.first, span.rows), to = inner.tile(span.first, span.rows);
        settings_.level->product(w, first, count, from, sums);
        for (int r = 0; r < span.rows; ++r) {
          float* row = sums + r * count * kGroupRows;
          settings_.level->activate(function_, row, width * gated_);
          inner.put(row, width, begin / block, r, to);
        }
      }
    });
  }

  // The second product: a task computes some columns of the output for all rows, and so sums the experts in order.
  void second_product(const Call& call, const Routing& routing, const Activations& inner, int64_t tokens,
                      float* y) const {
    const Matrix& shape = out_.shape();
    const int64_t step = groups_of_task(shape, 1);
    call.parallel((shape.groups + step - 1) / step, [&](int64_t task) {
      alignas(64) float sums[kTileRows * kMostGroups * kGroupRows];
      const int64_t first = task * step, count = std::min(step, shape.groups - first);
      const int64_t column = first * kGroupRows, width = std::min(count * kGroupRows, hidden_ - column);
      for (int64_t t = 0; t < tokens; ++t) std::fill_n(y + t * hidden_ + column, width, 0.0f);
      for (const Span& span : routing.spans()) {
        settings_.level->product(out_.of(span.expert), first, count, inner.tile(span.first, span.rows), sums);
        for (int r = 0; r < span.rows; ++r) {
          const Choice& choice = routing.choices()[span.first + r];
          settings_.level->accumulate(sums + r * count * kGroupRows, choice.weight,
                                      y + choice.token * hidden_ + column, width);
        }
      }
    });
  }

  Settings settings_;
  int64_t hidden_, width_, experts_, k_;
  int64_t gated_ = 1;
  bool routed_ = false;
  Nonlinearity function_{};
  Weights in_, out_;
};

}  // namespace

Kernel* make_experts(const Node& node) { return new Experts(node); }

}  // namespace moeship
