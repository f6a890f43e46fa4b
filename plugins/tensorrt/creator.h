// Creates W4A16Gemm plugins from the attributes of an ONNX node or from the fields of a plan.
#pragma once

#include <NvInferRuntime.h>

#include "tensorrt/plugin.h"

namespace awq_trt {

class W4A16GemmCreator final : public nvinfer1::IPluginCreatorV3One {
 public:
  W4A16GemmCreator() noexcept;

  char const* getPluginName() const noexcept override { return kPluginName; }
  char const* getPluginVersion() const noexcept override { return kPluginVersion; }
  char const* getPluginNamespace() const noexcept override { return kPluginNamespace; }
  nvinfer1::PluginFieldCollection const* getFieldNames() noexcept override { return &field_collection_; }

  // Both phases take the same fields: what getFieldNames says is what getFieldsToSerialize writes.
  nvinfer1::IPluginV3* createPlugin(char const* name, nvinfer1::PluginFieldCollection const* fields,
                                    nvinfer1::TensorRTPhase phase) noexcept override;

 private:
  nvinfer1::PluginField fields_[kFieldCount];
  nvinfer1::PluginFieldCollection field_collection_;
};

}  // namespace awq_trt
