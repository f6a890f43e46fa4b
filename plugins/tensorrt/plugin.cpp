#include "tensorrt/plugin.h"

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <initializer_list>
#include <new>

#include "plan/cublas_lt.h"
#include "tensorrt/logging.h"
#include "version.h"

namespace awq_trt {
namespace {

using nvinfer1::DataType;
using nvinfer1::Dims;
using nvinfer1::DimsExprs;
using nvinfer1::DynamicPluginTensorDesc;
using nvinfer1::PluginTensorDesc;

constexpr int32_t kFailure = 1;
constexpr int32_t kMaxInputs = 6;
constexpr int32_t kUnknown = -1;  // a dimension known only at run time

enum class Input : int32_t { kX, kQweight, kScales, kZeros, kBias, kPreScale };
constexpr char const* kInputNames[kMaxInputs] = {"X", "qweight", "scales", "zeros", "bias", "pre_scale"};

// Which inputs a layer has, in their order.
struct InputList {
  Input inputs[kMaxInputs];
  int32_t count = 0;
  explicit InputList(LayerConfig const& layer) {
    for (Input input : {Input::kX, Input::kQweight, Input::kScales}) inputs[count++] = input;
    if (layer.has_zeros) inputs[count++] = Input::kZeros;
    if (layer.has_bias) inputs[count++] = Input::kBias;
    if (layer.has_pre_scale) inputs[count++] = Input::kPreScale;
  }
};

char const* NameOf(Input input) { return kInputNames[static_cast<int32_t>(input)]; }

char const* NameOf(DataType type) {
  constexpr char const* kNames[] = {"FLOAT", "HALF", "INT8", "INT32", "BOOL", "UINT8", "FP8", "BF16", "INT64", "INT4"};
  int32_t const index = static_cast<int32_t>(type);
  return index >= 0 && index < static_cast<int32_t>(sizeof(kNames) / sizeof(kNames[0])) ? kNames[index] : "other";
}

bool IsActivation(DataType type) { return type == DataType::kHALF || type == DataType::kBF16; }

DataType ExpectedType(Input input, DataType x_type) {
  return input == Input::kQweight || input == Input::kZeros ? DataType::kINT32 : x_type;
}

Dims ExpectedShape(Input input, LayerConfig const& layer) {
  int64_t const tiles_n = (layer.out_features + 15) / 16, tiles_k = (layer.in_features + 63) / 64;
  int64_t const groups = layer.in_features / layer.group_size;
  switch (input) {
    case Input::kQweight:
      return Dims{4, {tiles_n, tiles_k, 32, 4}};
    case Input::kScales:
      return Dims{4, {tiles_n, groups, 8, 2}};
    case Input::kZeros:
      return Dims{3, {tiles_n, groups, 2}};
    case Input::kBias:
      return Dims{1, {layer.out_features}};
    default:
      return Dims{1, {layer.in_features}};  // pre_scale; X is checked by its last dimension only
  }
}

struct ShapeText {
  char text[128];
  explicit ShapeText(Dims const& dims) {
    size_t used = static_cast<size_t>(std::snprintf(text, sizeof(text), "["));
    for (int32_t i = 0; i < dims.nbDims && used < sizeof(text); ++i) {
      used += std::snprintf(text + used, sizeof(text) - used, i == 0 ? "%lld" : ", %lld",
                            static_cast<long long>(dims.d[i]));
    }
    if (used < sizeof(text)) std::snprintf(text + used, sizeof(text) - used, "]");
  }
};

bool Agrees(Dims const& given, Dims const& expected) {
  if (given.nbDims != expected.nbDims) return false;
  for (int32_t i = 0; i < given.nbDims; ++i) {
    if (given.d[i] != kUnknown && given.d[i] != expected.d[i]) return false;
  }
  return true;
}

}  // namespace

W4A16GemmPlugin::W4A16GemmPlugin(LayerConfig const& layer) noexcept : layer_(layer) {
  int32_t const values[kScalarFields] = {layer.out_features, layer.in_features, layer.group_size,
                                         layer.has_zeros,    layer.has_bias,    layer.has_pre_scale};
  for (int32_t i = 0; i < kScalarFields; ++i) {
    field_values_[i] = values[i];
    fields_[i] = {kFieldNames[i], &field_values_[i], nvinfer1::PluginFieldType::kINT32, 1};
  }
  for (int32_t i = 0; i < layer.outputs; ++i) field_values_[kScalarFields + i] = layer.splits[i];
  fields_[kScalarFields] = {kFieldNames[kScalarFields], &field_values_[kScalarFields],
                            nvinfer1::PluginFieldType::kINT32, layer.outputs};
  int32_t count = layer.outputs > 1 ? kFieldCount : kScalarFields;
  if (layer.workspace_mib != kDefaultWorkspaceMib) {
    fields_[count++] = {kWorkspaceField, &layer_.workspace_mib, nvinfer1::PluginFieldType::kINT32, 1};
  }
  field_collection_ = {count, fields_};
}

W4A16GemmPlugin::~W4A16GemmPlugin() {
  if (counters_ != nullptr) static_cast<void>(Free(counters_));  // fails only where the CUDA context has ended before
}

nvinfer1::IPluginCapability* W4A16GemmPlugin::getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept {
  switch (type) {
    case nvinfer1::PluginCapabilityType::kCORE:
      return static_cast<nvinfer1::IPluginV3OneCore*>(this);
    case nvinfer1::PluginCapabilityType::kBUILD:
      return static_cast<nvinfer1::IPluginV3OneBuild*>(this);
    case nvinfer1::PluginCapabilityType::kRUNTIME:
      return static_cast<nvinfer1::IPluginV3OneRuntime*>(this);
  }
  LogError("TensorRT asked for the capability %d, which does not exist", static_cast<int>(type));
  return nullptr;
}

nvinfer1::IPluginV3* W4A16GemmPlugin::clone() noexcept {
  auto* copy = new (std::nothrow) W4A16GemmPlugin(layer_);
  if (copy == nullptr) {
    LogError("out of host memory while cloning the plugin");
  } else {
    copy->tactic_ = tactic_;
    copy->x_type_ = x_type_;
  }
  return copy;
}

bool W4A16GemmPlugin::CheckInputCount(char const* where, int32_t input_count) const noexcept {
  int32_t const expected = InputList(layer_).count;
  if (input_count == expected) return true;
  LogError("%s: %d inputs, need %d: X, qweight, scales and one for each of has_zeros=%d, has_bias=%d, has_pre_scale=%d",
           where, input_count, expected, layer_.has_zeros, layer_.has_bias, layer_.has_pre_scale);
  return false;
}

bool W4A16GemmPlugin::CheckOutputCount(char const* where, int32_t output_count) const noexcept {
  if (output_count == layer_.outputs) return true;
  LogError("%s: %d outputs, need %d", where, output_count, layer_.outputs);
  return false;
}

// Dimensions of -1 are not known yet and agree with everything.
bool W4A16GemmPlugin::CheckShapes(char const* where, Dims const* inputs) const noexcept {
  InputList const list(layer_);
  Dims const& x = inputs[0];
  int64_t const columns = x.nbDims > 0 ? x.d[x.nbDims - 1] : 0;
  if (x.nbDims < 1 || (columns != kUnknown && columns != layer_.in_features)) {
    LogError("%s: X has shape %s, need a last dimension of in_features=%d", where, ShapeText(x).text,
             layer_.in_features);
    return false;
  }
  for (int32_t i = 1; i < list.count; ++i) {
    Dims const expected = ExpectedShape(list.inputs[i], layer_);
    if (Agrees(inputs[i], expected)) continue;
    LogError("%s: %s has shape %s, need %s for out_features=%d, in_features=%d, group_size=%d", where,
             NameOf(list.inputs[i]), ShapeText(inputs[i]).text, ShapeText(expected).text, layer_.out_features,
             layer_.in_features, layer_.group_size);
    return false;
  }
  return true;
}

int32_t W4A16GemmPlugin::getOutputDataTypes(DataType* output_types, int32_t output_count, DataType const* input_types,
                                            int32_t input_count) const noexcept {
  if (!CheckInputCount("getOutputDataTypes", input_count)) return kFailure;
  if (!CheckOutputCount("getOutputDataTypes", output_count)) return kFailure;
  if (!IsActivation(input_types[0])) {
    LogError("X is of type %s, need HALF or BF16: export the model in float16 or bfloat16", NameOf(input_types[0]));
    return kFailure;
  }
  InputList const list(layer_);
  for (int32_t i = 1; i < list.count; ++i) {
    DataType const expected = ExpectedType(list.inputs[i], input_types[0]);
    if (input_types[i] == expected) continue;
    LogError("%s is of type %s, need %s", NameOf(list.inputs[i]), NameOf(input_types[i]), NameOf(expected));
    return kFailure;
  }
  for (int32_t i = 0; i < output_count; ++i) output_types[i] = input_types[0];
  return 0;
}

int32_t W4A16GemmPlugin::getOutputShapes(DimsExprs const* inputs, int32_t input_count, DimsExprs const*, int32_t,
                                         DimsExprs* outputs, int32_t output_count,
                                         nvinfer1::IExprBuilder& builder) noexcept {
  if (!CheckInputCount("getOutputShapes", input_count)) return kFailure;
  if (!CheckOutputCount("getOutputShapes", output_count)) return kFailure;
  Dims known[kMaxInputs];
  for (int32_t i = 0; i < input_count; ++i) {
    known[i].nbDims = inputs[i].nbDims;
    for (int32_t d = 0; d < inputs[i].nbDims; ++d) {
      known[i].d[d] = inputs[i].d[d]->isConstant() ? inputs[i].d[d]->getConstantValue() : kUnknown;
    }
  }
  if (!CheckShapes("getOutputShapes", known)) return kFailure;
  for (int32_t i = 0; i < output_count; ++i) {
    outputs[i] = inputs[0];
    outputs[i].d[inputs[0].nbDims - 1] = builder.constant(output_count > 1 ? layer_.splits[i] : layer_.out_features);
  }
  return 0;
}

bool W4A16GemmPlugin::supportsFormatCombination(int32_t position, DynamicPluginTensorDesc const* tensors,
                                                int32_t input_count, int32_t output_count) noexcept {
  if (!CheckInputCount("supportsFormatCombination", input_count)) return false;
  if (!CheckOutputCount("supportsFormatCombination", output_count)) return false;
  if (position < 0 || position >= input_count + output_count) {
    LogError("supportsFormatCombination: position %d of %d inputs and %d outputs", position, input_count, output_count);
    return false;
  }
  PluginTensorDesc const& tensor = tensors[position].desc;
  if (tensor.format != nvinfer1::TensorFormat::kLINEAR) return false;
  if (position == 0) return IsActivation(tensor.type);
  DataType const x_type = tensors[0].desc.type;
  if (position >= input_count) return tensor.type == x_type;
  return tensor.type == ExpectedType(InputList(layer_).inputs[position], x_type);
}

int32_t W4A16GemmPlugin::configurePlugin(DynamicPluginTensorDesc const* inputs, int32_t input_count,
                                         DynamicPluginTensorDesc const*, int32_t) noexcept {
  if (!CheckInputCount("configurePlugin", input_count)) return kFailure;
  Dims known[kMaxInputs];
  for (int32_t i = 0; i < input_count; ++i) known[i] = inputs[i].desc.dims;
  x_type_ = inputs[0].desc.type;
  return CheckShapes("configurePlugin", known) ? 0 : kFailure;
}

size_t W4A16GemmPlugin::getWorkspaceSize(DynamicPluginTensorDesc const* inputs, int32_t input_count,
                                         DynamicPluginTensorDesc const*, int32_t) const noexcept {
  if (!CheckInputCount("getWorkspaceSize", input_count)) return 0;
  Dims const& x = inputs[0].max;
  int64_t tokens = 1;
  for (int32_t i = 0; i + 1 < x.nbDims; ++i) {
    if (x.d[i] == 0) return 0;
    tokens = x.d[i] < 0 || x.d[i] > kMaxTokens ? kMaxTokens : std::min<int64_t>(tokens * x.d[i], kMaxTokens);
  }
  return WorkspaceBytes(layer_, tokens);
}

// What a tactic's time depends on, besides the number of tokens, which TensorRT adds.
char const* W4A16GemmPlugin::getTimingCacheID() noexcept {
  Device device{};
  static_cast<void>(QueryDevice(device));  // 0 where there is none
  int32_t used = std::snprintf(timing_cache_id_, sizeof(timing_cache_id_), "awq_trt-%s-sm%d-%s-n%d-k%d-g%d-z%d-b%d-p%d",
                               AWQ_TRT_VERSION, device.sm, NameOf(x_type_), layer_.out_features, layer_.in_features,
                               layer_.group_size, layer_.has_zeros, layer_.has_bias, layer_.has_pre_scale);
  for (int32_t i = 0; layer_.outputs > 1 && i < layer_.outputs; ++i) {
    used += std::snprintf(timing_cache_id_ + used, sizeof(timing_cache_id_) - used, "-y%d", layer_.splits[i]);
  }
  return timing_cache_id_;
}

int32_t W4A16GemmPlugin::getValidTactics(int32_t* tactics, int32_t count) noexcept {
  if (count != kTacticCount) {
    LogError("getValidTactics: asked for %d tactics, getNbTactics said %d", count, kTacticCount);
    return kFailure;
  }
  for (int32_t i = 0; i < kTacticCount; ++i) tactics[i] = kTactics[i].id;
  return 0;
}

int32_t W4A16GemmPlugin::setTactic(int32_t tactic) noexcept {
  Tactic const* const found = FindTactic(tactic);
  if (found == nullptr) {
    LogError(
        "tactic %d is not known to plugin library %s, which has 1 to %d: the plan was built with another one; "
        "build it again",
        tactic, AWQ_TRT_VERSION, kTacticCount);
    return kFailure;
  }
  tactic_ = found;
  return 0;
}

int32_t W4A16GemmPlugin::onShapeChange(PluginTensorDesc const* inputs, int32_t input_count, PluginTensorDesc const*,
                                       int32_t) noexcept {
  if (!CheckInputCount("onShapeChange", input_count)) return kFailure;
  Dims known[kMaxInputs];
  for (int32_t i = 0; i < input_count; ++i) known[i] = inputs[i].dims;
  if (!CheckShapes("onShapeChange", known)) return kFailure;
  if (!IsActivation(inputs[0].type)) {
    LogError("onShapeChange: X is of type %s, need HALF or BF16", NameOf(inputs[0].type));
    return kFailure;
  }
  return 0;
}

int32_t W4A16GemmPlugin::enqueue(PluginTensorDesc const* input_descs, PluginTensorDesc const*,
                                 void const* const* inputs, void* const* outputs, void* workspace,
                                 cudaStream_t stream) noexcept {
  GemmArgs args = MakeArgs(layer_);
  int64_t tokens = 1;
  Dims const& x_dims = input_descs[0].dims;
  for (int32_t i = 0; i + 1 < x_dims.nbDims; ++i) tokens *= x_dims.d[i];
  if (tokens == 0) return 0;
  if (tokens < 0 || tokens > kMaxTokens) {
    LogError("enqueue: X has shape %s, %lld tokens, limit %d", ShapeText(x_dims).text, static_cast<long long>(tokens),
             kMaxTokens);
    return kFailure;
  }
  args.tokens = static_cast<int32_t>(tokens);

  InputList const list(layer_);
  for (int32_t i = 0; i < list.count; ++i) {
    void const* p = inputs[i];
    uintptr_t alignment = sizeof(uint16_t);
    switch (list.inputs[i]) {
      case Input::kX:
        args.x = static_cast<uint16_t const*>(p);
        break;
      case Input::kQweight:
        args.qweight = static_cast<uint32_t const*>(p), alignment = 16;
        break;
      case Input::kScales:
        args.scales = static_cast<uint16_t const*>(p), alignment = 16;
        break;
      case Input::kZeros:
        args.zeros = static_cast<uint8_t const*>(p), alignment = 8;
        break;
      case Input::kBias:
        args.bias = static_cast<uint16_t const*>(p);
        break;
      case Input::kPreScale:
        args.pre_scale = static_cast<uint16_t const*>(p), alignment = 16;
        break;
    }
    if (p == nullptr || !IsAligned(p, alignment)) {
      LogError("enqueue: %s is at address %p, need a multiple of %d bytes", NameOf(list.inputs[i]), p,
               static_cast<int>(alignment));
      return kFailure;
    }
  }
  args.y_aligned = true;
  for (int32_t i = 0; i < layer_.outputs; ++i) {
    args.y[i] = static_cast<uint16_t*>(outputs[i]);
    args.y_aligned = args.y_aligned && IsAligned(outputs[i], 16);
    if (outputs[i] != nullptr && IsAligned(outputs[i], sizeof(uint16_t))) continue;
    LogError("enqueue: Y is at address %p, need a multiple of 2 bytes", outputs[i]);
    return kFailure;
  }
  args.x_aligned = IsAligned(args.x, 16);
  if (!Attach()) return kFailure;
  args.workspace = workspace;
  args.counters = counters_;
  if (WorkspaceBytes(layer_, tokens) > 0 && (workspace == nullptr || !IsAligned(workspace, 16))) {
    LogError("enqueue: the workspace is at address %p, need a multiple of 16 bytes", workspace);
    return kFailure;
  }

  if (tokens >= tactic_->dequantize_from && !CublasLtAvailable()) {
    static std::atomic_flag said = ATOMIC_FLAG_INIT;
    if (!said.test_and_set()) {
      LogWarning("layers of %d tokens and more, planned for cuBLASLt, run on our own kernel: %s",
                 tactic_->dequantize_from, CublasLtProblem());
    }
  }

  ActivationType const type =
      input_descs[0].type == DataType::kHALF ? ActivationType::kHalf : ActivationType::kBfloat16;
  cudaError_t const error = Launch(args, type, *tactic_, device_, stream);
  if (error != cudaSuccess) {
    LogError("enqueue: %s (%s) at the launch for %d tokens, out_features=%d, in_features=%d, group_size=%d, tactic %d",
             cudaGetErrorString(error), cudaGetErrorName(error), args.tokens, layer_.out_features, layer_.in_features,
             layer_.group_size, tactic_->id);
    return kFailure;
  }
  return 0;
}

// Learn about the GPU and take memory of it, once.
bool W4A16GemmPlugin::Attach() noexcept {
  if (counters_ != nullptr) return true;
  cudaError_t error = QueryDevice(device_);
  if (error != cudaSuccess) {
    LogError("no usable GPU: %s (%s)", cudaGetErrorString(error), cudaGetErrorName(error));
    return false;
  }
  Reason const reason =
      UnsupportedReason(layer_.out_features, layer_.in_features, layer_.group_size, ActivationType::kHalf, device_.sm);
  if (!reason.empty()) {
    LogError("this GPU: %s", reason.text);
    return false;
  }
  void* memory = nullptr;
  error = AllocateZeroed(&memory, CounterBytes(layer_));
  if (error != cudaSuccess) {
    LogError("cannot get %zu bytes of GPU memory: %s (%s)", CounterBytes(layer_), cudaGetErrorString(error),
             cudaGetErrorName(error));
    return false;
  }
  counters_ = static_cast<uint32_t*>(memory);
  return true;
}

nvinfer1::IPluginV3* W4A16GemmPlugin::attachToContext(nvinfer1::IPluginResourceContext*) noexcept {
  auto* copy = static_cast<W4A16GemmPlugin*>(clone());
  if (copy != nullptr && !copy->Attach()) {
    delete copy;
    return nullptr;
  }
  return copy;
}

nvinfer1::PluginFieldCollection const* W4A16GemmPlugin::getFieldsToSerialize() noexcept { return &field_collection_; }

}  // namespace awq_trt
