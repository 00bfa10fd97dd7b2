// The exported functions of the library. ONNX Runtime calls RegisterCustomOps with the options of each session. Before
// that, trt_build/ort/kernels/__init__.py calls MoeshipKernelsInterface and refuses a library of another version.
// `moeship doctor` reports the instruction set that MoeshipKernelsLevel returns.
#include <climits>
#include <exception>
#include <string>

#include "runtime.h"

namespace moeship {
namespace {

constexpr const char* kDomain = "moeship";
constexpr uint32_t kOldestApi = 17;  // first version with KernelContext_ParallelFor
const OrtApi* api = nullptr;

// Runs f and converts an exception into an OrtStatus.
template <class F>
OrtStatus* guarded(const F& f) {
  try {
    f();
    return nullptr;
  } catch (const Failure& failure) {
    return api->CreateStatus(ORT_INVALID_ARGUMENT, failure.text.c_str());
  } catch (const std::exception& error) {
    return api->CreateStatus(ORT_FAIL, error.what());
  }
}

struct Operator : OrtCustomOp {
  const char* name;
  size_t inputs;
  uint32_t optional;  // bit i: input i may be absent
  uint32_t floats;    // bit i: input i is float32; the types of other inputs are checked when a kernel is made or run
  size_t outputs;     // the first is float32, others are int8
  Kernel* (*make)(const Node&);
};

const Operator& of(const OrtCustomOp* op) { return *static_cast<const Operator*>(op); }

Operator describe(const char* name, size_t inputs, uint32_t optional, uint32_t floats, Kernel* (*make)(const Node&),
                  size_t outputs = 1) {
  Operator op{};
  op.version = kOldestApi;
  op.name = name;
  op.inputs = inputs;
  op.optional = optional;
  op.floats = floats;
  op.outputs = outputs;
  op.make = make;
  op.GetName = [](const OrtCustomOp* self) { return of(self).name; };
  op.GetExecutionProviderType = [](const OrtCustomOp*) -> const char* { return nullptr; };
  op.GetInputTypeCount = [](const OrtCustomOp* self) { return of(self).inputs; };
  op.GetInputType = [](const OrtCustomOp* self, size_t index) {
    return of(self).floats >> index & 1 ? ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT
                                        : ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
  };
  op.GetOutputTypeCount = [](const OrtCustomOp* self) { return of(self).outputs; };
  op.GetOutputType = [](const OrtCustomOp*, size_t index) {
    return index ? ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8 : ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
  };
  op.GetInputCharacteristic = [](const OrtCustomOp* self, size_t index) {
    return of(self).optional >> index & 1 ? INPUT_OUTPUT_OPTIONAL : INPUT_OUTPUT_REQUIRED;
  };
  op.GetOutputCharacteristic = [](const OrtCustomOp*, size_t) { return INPUT_OUTPUT_REQUIRED; };
  op.GetInputMemoryType = [](const OrtCustomOp*, size_t) { return OrtMemTypeDefault; };
  op.GetVariadicInputMinArity = [](const OrtCustomOp*) { return 1; };
  op.GetVariadicInputHomogeneity = [](const OrtCustomOp*) { return 1; };
  op.GetVariadicOutputMinArity = [](const OrtCustomOp*) { return 1; };
  op.GetVariadicOutputHomogeneity = [](const OrtCustomOp*) { return 1; };
  op.GetStartVersion = [](const OrtCustomOp*) { return 1; };
  op.GetEndVersion = [](const OrtCustomOp*) { return INT_MAX; };
  op.CreateKernelV2 = [](const OrtCustomOp* self, const OrtApi*, const OrtKernelInfo* info, void** kernel) {
    return guarded([&] { *kernel = of(self).make(Node(*api, info, of(self).name)); });
  };
  op.KernelComputeV2 = [](void* kernel, OrtKernelContext* context) {
    return guarded([&] { static_cast<const Kernel*>(kernel)->compute(Call(*api, context)); });
  };
  op.KernelDestroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
  return op;
}

OrtCustomOpDomain* make_domain() {
  // x, codes, scales, zeros, bias
  static const Operator block_linear = describe("BlockLinear", 5, 0b11000, 0b10001, make_block_linear);
  // x, logits, then codes, scales, zeros, bias for each of the two matrices
  static const Operator experts = describe("Experts", 10, 0b1100110010, 0b1000100011, make_experts);
  // token ids, codes, scales, zeros
  static const Operator embedding = describe("Embedding", 4, 0b1000, 0, make_embedding);
  // query, key, value, stored keys, stored values, last positions, new lengths, cosines, sines, sinks
  static const Operator attention = describe("Attention", 10, 0b1000000110, 0b1110000111, make_attention, 3);
  OrtCustomOpDomain* domain = nullptr;
  check(*api, api->CreateCustomOpDomain(kDomain, &domain));
  check(*api, api->CustomOpDomain_Add(domain, &block_linear));
  check(*api, api->CustomOpDomain_Add(domain, &experts));
  check(*api, api->CustomOpDomain_Add(domain, &embedding));
  check(*api, api->CustomOpDomain_Add(domain, &attention));
  return domain;
}

}  // namespace
}  // namespace moeship

extern "C" __attribute__((visibility("default"))) OrtStatus* RegisterCustomOps(OrtSessionOptions* options,
                                                                               const OrtApiBase* base) {
  using namespace moeship;
  const OrtApi* found = base->GetApi(kOldestApi);
  if (!found) {
    const OrtApi* oldest = base->GetApi(1);
    const std::string text = std::string("registering moeship's kernels: they need ONNX Runtime 1.17 or later, found ") +
                             base->GetVersionString();
    return oldest ? oldest->CreateStatus(ORT_FAIL, text.c_str()) : nullptr;
  }
  api = found;
  return guarded([&] {
    static OrtCustomOpDomain* const domain = make_domain();  // sessions use it for as long as they live
    check(*api, api->AddCustomOpDomain(options, domain));
  });
}

// The name of the instruction set that the kernels use in this process; null if there is none, with the reason in
// `problem`.
extern "C" __attribute__((visibility("default"))) const char* MoeshipKernelsLevel(const char** problem) {
  try {
    return moeship::chosen_level().name;
  } catch (const moeship::Failure& failure) {
    static thread_local std::string text;
    text = failure.text;
    *problem = text.c_str();
    return nullptr;
  }
}

extern "C" __attribute__((visibility("default"))) int64_t MoeshipKernelsInterface() { return moeship::kInterface; }
