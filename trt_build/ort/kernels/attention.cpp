// Attention: causal attention over keys and values in int8, in the records of attention.h; the rotary embedding of
// queries and keys is applied here. B sequences, of which each takes up to S tokens; N heads over G of keys and values,
// each of D channels, R of which are turned; room for P positions.
//
// Inputs: query float32 [B, S, N * D], or with keys and values behind it [B, S, (N + 2 * G) * D]; key and value float32
// [B, S, G * D], absent in the second case; stored keys and stored values int8 [B, G, P, D + 4]; the last position of
// each sequence after the step int32 [B]; the number of its tokens int32 [B]; cosines and sines float32
// [positions, R / 2], initializers; optionally a sink for each head float32 [N], an initializer.
// Outputs: float32 [B, S, N * D], of which the places without a token are not written; the stored keys and values with
// those of the tokens, which may be the memory of the inputs.
// Attributes: layout, num_heads, kv_num_heads, head_size, rotary_dim, positions, scale, window (0: none).
//
// A key or value x is stored as code * scale + middle. The middle is that of its largest and its smallest channel, the
// scale the larger of their distances from it / 127, rounded up, both bfloat16; codes are the nearest integers.
#include "attention.h"

#include <algorithm>
#include <cstring>
#include <limits>

#include "elementwise.h"
#include "runtime.h"

namespace moeship {
namespace {

constexpr int64_t kRecordLayout = 1;
constexpr auto kFloat = ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
constexpr auto kInt8 = ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8;
constexpr auto kInt32 = ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32;

// The nearest bfloat16, ties to even, of a finite number.
inline uint32_t nearest_bfloat16(float value) {
  const uint32_t bits = as_bits(value);
  return (bits + 0x7FFFu + (bits >> 16 & 1)) & 0xFFFF0000u;
}

// Store a key or value as a record. The largest magnitudes may overflow bfloat16; they are taken as not finite.
void store(const float* x, int size, int8_t* record) {
  float low = x[0], high = x[0];
  bool finite = true;
  for (int d = 0; d < size; ++d) {
    finite = finite && (as_bits(x[d]) & 0x7F800000u) != 0x7F800000u;
    low = x[d] < low ? x[d] : low;
    high = high < x[d] ? x[d] : high;
  }
  uint32_t grid[2] = {0x7FC00000u, 0};
  if (finite) grid[1] = nearest_bfloat16(low * 0.5f + high * 0.5f);
  const float middle = as_float(grid[1]);
  const float reach = std::max(high - middle, middle - low);
  if (finite && reach < std::numeric_limits<float>::max()) grid[0] = (as_bits(reach / 127.0f) + 0xFFFFu) & 0xFFFF0000u;
  const float scale = as_float(grid[0]);
  if (!(scale > 0)) {
    std::memset(record, 0, static_cast<size_t>(size));
  } else {
    for (int d = 0; d < size; ++d) {
      float q = (x[d] - middle) / scale;
      q = q > 127.0f ? 127.0f : q;
      q = q < -127.0f ? -127.0f : q;
      record[d] = static_cast<int8_t>(as_bits(q + kRoundingMagic) - as_bits(kRoundingMagic));
    }
  }
  for (int i = 0; i < 2; ++i) {
    const uint16_t half = static_cast<uint16_t>(grid[i] >> 16);
    std::memcpy(record + size + 2 * i, &half, sizeof half);
  }
}

class Attention : public Kernel {
 public:
  explicit Attention(const Node& node)
      : level_(&chosen_level()),
        heads_(node.integer("num_heads", 1, 1 << 16)),
        groups_(node.integer("kv_num_heads", 1, heads_)),
        size_(static_cast<int>(node.integer("head_size", 16, kLargestHead))),
        turned_(static_cast<int>(node.integer("rotary_dim", 0, size_))),
        positions_(node.integer("positions", 1, int64_t{1} << 30)),
        window_(node.integer("window", 0, int64_t{1} << 30)),
        scale_(node.real("scale")) {
    node.integer("layout", kRecordLayout, kRecordLayout);
    if (heads_ % groups_) node.fail("num_heads is no multiple of kv_num_heads");
    if (size_ % 16 || turned_ % 2) node.fail("head_size is no multiple of 16, or rotary_dim is odd");
    const auto table = [&](size_t index, const char* what) {
      return static_cast<const float*>(node.constant(index, what, {kFloat}, {positions_, turned_ / 2}).data);
    };
    cosines_ = table(7, "the cosines' tensor");
    sines_ = table(8, "the sines' tensor");
    if (node.has_input(9))
      sinks_ = static_cast<const float*>(node.constant(9, "the sinks' tensor", {kFloat}, {heads_}).data);
  }

  void compute(const Call& call) const override {
    const Step step(*this, call);
    Scratch scratch;
    const int64_t tokens = step.num_tokens, per_group = heads_ / groups_;
    const size_t total_bytes = sizeof(float) * static_cast<size_t>(tokens * heads_);
    const size_t query_bytes = total_bytes * static_cast<size_t>(size_);
    scratch.reserve(Scratch::rounded(query_bytes) + Scratch::rounded(total_bytes));
    auto* const queries = static_cast<float*>(scratch.take(query_bytes));
    auto* const totals = static_cast<float*>(scratch.take(total_bytes));
    call.parallel(tokens, [&](int64_t token) { take(step, token, queries, totals); });

    struct Tile {
      int64_t sequence, group, first;
    };
    std::vector<Tile> tiles;
    for (int64_t b = 0; b < step.sequences; ++b)
      for (int64_t g = 0; g < groups_; ++g)
        for (int64_t row = 0; row < step.lengths[b] * per_group; row += kAttendingRows) tiles.push_back({b, g, row});
    call.parallel(static_cast<int64_t>(tiles.size()), [&](int64_t index) {
      const Tile& tile = tiles[static_cast<size_t>(index)];
      const int64_t b = tile.sequence, rows = step.lengths[b] * per_group;
      const int64_t records = (b * groups_ + tile.group) * step.room * (size_ + kGridBytes);
      Attending a;
      a.rows = static_cast<int>(std::min<int64_t>(rows - tile.first, kAttendingRows));
      a.size = size_;
      a.scale = scale_;
      a.keys = step.keys + records;
      a.values = step.values + records;
      for (int r = 0; r < a.rows; ++r) {
        const int64_t number = (tile.first + r) / per_group;
        const int64_t head = tile.group * per_group + (tile.first + r) % per_group;
        const int64_t place = (step.starts[b] + number) * heads_ + head;
        a.queries[r] = queries + place * size_;
        a.totals[r] = totals[place];
        a.out[r] = step.out + ((b * step.width + number) * heads_ + head) * size_;
        a.end[r] = step.first_position(b) + number + 1;
        a.first[r] = window_ ? std::max<int64_t>(0, a.end[r] - window_) : 0;
        a.largest[r] = sinks_ ? sinks_[head] : -std::numeric_limits<float>::infinity();
        a.sum[r] = sinks_ ? 1.0f : 0.0f;
        a.shift[r] = 0.0f;
      }
      level_->attend(a);
    });
  }

 private:
  // The inputs and outputs of a call.
  struct Step {
    Step(const Attention& op, const Call& call) {
      const int64_t own = op.heads_ * op.size_, others = op.groups_ * op.size_;
      const Tensor found = call.exactly(5, "the last positions of Attention", kInt32, {-1});
      sequences = found.shape[0];
      last = static_cast<const int32_t*>(found.data);
      lengths = static_cast<const int32_t*>(
          call.exactly(6, "the new lengths of Attention", kInt32, {sequences}).data);
      const bool packed = !call.has(1);
      const Tensor x = call.exactly(0, "the query of Attention", kFloat,
                                    {sequences, -1, packed ? own + 2 * others : own});
      width = x.shape[1];
      parts[0] = static_cast<const float*>(x.data);
      strides[0] = x.shape[2];
      for (int part : {1, 2}) {
        strides[part] = packed ? strides[0] : others;
        if (packed) {
          parts[part] = parts[0] + own + (part - 1) * others;
          continue;
        }
        const Tensor given = call.exactly(static_cast<size_t>(part), "the key or value of Attention", kFloat,
                                          {sequences, width, others});
        parts[part] = static_cast<const float*>(given.data);
      }
      const Tensor past = call.exactly(3, "the stored keys of Attention", kInt8,
                                       {sequences, op.groups_, -1, op.size_ + kGridBytes});
      room = past.shape[2];
      const Tensor past_values = call.exactly(4, "the stored values of Attention", kInt8, past.shape);
      check(op);
      out = call.output(0, {sequences, width, own});
      keys = call.codes_output(1, past.shape);
      values = call.codes_output(2, past.shape);
      const auto bytes = static_cast<size_t>(sequences * op.groups_ * room * (op.size_ + kGridBytes));
      if (keys != past.data) std::memmove(keys, past.data, bytes);
      if (values != past_values.data) std::memmove(values, past_values.data, bytes);
    }

    void check(const Attention& op) {
      for (int64_t b = 0; b < sequences; ++b) {
        const std::string which = "sequence " + std::to_string(b) + " of Attention ";
        if (lengths[b] < 0 || lengths[b] > width)
          throw Failure{which + "takes " + std::to_string(lengths[b]) + " tokens, expected 0 to " +
                        std::to_string(width)};
        if (lengths[b] && (first_position(b) < 0 || last[b] >= std::min(room, op.positions_)))
          throw Failure{which + "takes " + std::to_string(lengths[b]) + " tokens up to position " +
                        std::to_string(last[b]) + ", expected positions from 0 to " +
                        std::to_string(std::min(room, op.positions_) - 1)};
        starts.push_back(num_tokens);
        for (int64_t number = 0; number < lengths[b]; ++number) sequence_of.push_back(b);
        num_tokens += lengths[b];
      }
    }

    int64_t first_position(int64_t b) const { return int64_t{last[b]} + 1 - lengths[b]; }

    int64_t sequences, width, room, num_tokens = 0;
    const int32_t *last, *lengths;
    const float* parts[3];  // query, key, value of the first place
    int64_t strides[3];     // from one place to the next
    float* out;
    int8_t *keys, *values;
    std::vector<int64_t> starts, sequence_of;  // the first token of each sequence; the sequence of each token
  };

  // Turn the queries and the keys of a token, and store its keys and values.
  void take(const Step& step, int64_t token, float* queries, float* totals) const {
    const int64_t b = step.sequence_of[static_cast<size_t>(token)];
    const int64_t number = token - step.starts[static_cast<size_t>(b)];
    const int64_t position = step.first_position(b) + number, place = b * step.width + number;
    const float* const query = step.parts[0] + place * step.strides[0];
    for (int64_t head = 0; head < heads_; ++head) {
      float* const to = queries + (token * heads_ + head) * size_;
      turn(query + head * size_, position, to);
      float total = 0.0f;
      for (int d = 0; d < size_; ++d) total += to[d];
      totals[token * heads_ + head] = total;
    }
    float turned[kLargestHead];
    for (int64_t group = 0; group < groups_; ++group) {
      const int64_t record = ((b * groups_ + group) * step.room + position) * (size_ + kGridBytes);
      turn(step.parts[1] + place * step.strides[1] + group * size_, position, turned);
      store(turned, size_, step.keys + record);
      store(step.parts[2] + place * step.strides[2] + group * size_, size_, step.values + record);
    }
  }

  void turn(const float* x, int64_t position, float* to) const {
    const int half = turned_ / 2;
    const float *cosine = cosines_ + position * half, *sine = sines_ + position * half;
    for (int i = 0; i < half; ++i) {
      to[i] = x[i] * cosine[i] - x[half + i] * sine[i];
      to[half + i] = x[half + i] * cosine[i] + x[i] * sine[i];
    }
    std::copy(x + turned_, x + size_, to + turned_);
  }

  const Level* level_;
  int64_t heads_, groups_;
  int size_, turned_;
  int64_t positions_, window_;
  float scale_;
  const float *cosines_ = nullptr, *sines_ = nullptr, *sinks_ = nullptr;
};

}  // namespace

Kernel* make_attention(const Node& node) { return new Attention(node); }

}  // namespace moeship
