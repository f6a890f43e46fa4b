// W4A16Gemm as a TensorRT plugin: types, shapes, formats, tactics; the arithmetic is behind kernels.h.
//
// Inputs, in this order, absent optional ones left out (N16 = ceil(N/16), K64 = ceil(K/64), G = K / group_size):
//   X         [..., K]               fp16 or bf16
//   qweight   [N16, K64, 32, 4]      int32, packed as drawn in fragments.h
//   scales    [N16, G, 8, 2]         type of X
//   zeros     [N16, G, 2]            int32, where has_zeros
//   bias      [N]                    type of X, where has_bias
//   pre_scale [K]                    type of X, where has_pre_scale
// Output: Y [..., N], type of X; with `splits` one output [..., splits[i]] for each.
#pragma once

#include <NvInferRuntime.h>

#include "plan/kernels.h"
#include "plan/problem.h"

namespace awq_trt {

constexpr char kPluginName[] = "W4A16Gemm";
constexpr char kPluginVersion[] = "1";  // of the operator and its packed layout
constexpr char kPluginNamespace[] = "";

constexpr int32_t kScalarFields = 6, kFieldCount = kScalarFields + 1;  // the last one, splits, has up to kMaxOutputs
extern char const* const kFieldNames[kFieldCount];                     // in the order of LayerConfig
// Not in getFieldNames, as it is not the model's but the build's; a plan has it where it is not the default.
constexpr char kWorkspaceField[] = "workspace_mib";
constexpr int32_t kRequiredFields = 3;  // the first ones; the rest default to 0

class W4A16GemmPlugin final : public nvinfer1::IPluginV3,
                              public nvinfer1::IPluginV3OneCore,
                              public nvinfer1::IPluginV3OneBuild,
                              public nvinfer1::IPluginV3OneRuntime {
 public:
  // `layer` has passed UnsupportedReason and UnsupportedSplitReason.
  explicit W4A16GemmPlugin(LayerConfig const& layer) noexcept;
  ~W4A16GemmPlugin() override;

  // IPluginV3
  nvinfer1::IPluginCapability* getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept override;
  nvinfer1::IPluginV3* clone() noexcept override;

  // Core
  char const* getPluginName() const noexcept override { return kPluginName; }
  char const* getPluginVersion() const noexcept override { return kPluginVersion; }
  char const* getPluginNamespace() const noexcept override { return kPluginNamespace; }

  // Build
  int32_t getNbOutputs() const noexcept override { return layer_.outputs; }
  int32_t getOutputDataTypes(nvinfer1::DataType* output_types, int32_t output_count,
                             nvinfer1::DataType const* input_types, int32_t input_count) const noexcept override;
  int32_t getOutputShapes(nvinfer1::DimsExprs const* inputs, int32_t input_count, nvinfer1::DimsExprs const*, int32_t,
                          nvinfer1::DimsExprs* outputs, int32_t output_count,
                          nvinfer1::IExprBuilder& builder) noexcept override;
  bool supportsFormatCombination(int32_t position, nvinfer1::DynamicPluginTensorDesc const* tensors,
                                 int32_t input_count, int32_t output_count) noexcept override;
  int32_t configurePlugin(nvinfer1::DynamicPluginTensorDesc const* inputs, int32_t input_count,
                          nvinfer1::DynamicPluginTensorDesc const* outputs, int32_t output_count) noexcept override;
  size_t getWorkspaceSize(nvinfer1::DynamicPluginTensorDesc const* inputs, int32_t input_count,
                          nvinfer1::DynamicPluginTensorDesc const*, int32_t) const noexcept override;
  int32_t getNbTactics() noexcept override { return kTacticCount; }
  int32_t getValidTactics(int32_t* tactics, int32_t count) noexcept override;
  char const* getTimingCacheID() noexcept override;

  // Runtime
  int32_t setTactic(int32_t tactic) noexcept override;
  int32_t onShapeChange(nvinfer1::PluginTensorDesc const* inputs, int32_t input_count,
                        nvinfer1::PluginTensorDesc const* outputs, int32_t output_count) noexcept override;
  int32_t enqueue(nvinfer1::PluginTensorDesc const* input_descs, nvinfer1::PluginTensorDesc const* output_descs,
                  void const* const* inputs, void* const* outputs, void* workspace,
                  cudaStream_t stream) noexcept override;
  nvinfer1::IPluginV3* attachToContext(nvinfer1::IPluginResourceContext*) noexcept override;
  nvinfer1::PluginFieldCollection const* getFieldsToSerialize() noexcept override;

 private:
  W4A16GemmPlugin(W4A16GemmPlugin const&) = delete;

  bool CheckInputCount(char const* where, int32_t input_count) const noexcept;
  bool CheckOutputCount(char const* where, int32_t output_count) const noexcept;
  bool CheckShapes(char const* where, nvinfer1::Dims const* inputs) const noexcept;

  bool Attach() noexcept;

  LayerConfig layer_;
  Tactic const* tactic_ = &kTactics[0];
  nvinfer1::DataType x_type_ = nvinfer1::DataType::kFLOAT;  // not known before configurePlugin
  char timing_cache_id_[160];
  Device device_{};               // once attached
  uint32_t* counters_ = nullptr;  // once attached: this context's own, because TensorRT's workspace is never zeroed
  int32_t field_values_[kScalarFields + kMaxOutputs];
  nvinfer1::PluginField fields_[kFieldCount + 1];
  nvinfer1::PluginFieldCollection field_collection_;
};

}  // namespace awq_trt
