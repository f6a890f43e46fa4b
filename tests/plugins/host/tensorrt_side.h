// The other side of the plugin interface: what TensorRT does, as far as a plugin can see it.
#pragma once

#include <NvInferRuntime.h>

#include <deque>
#include <memory>
#include <string>
#include <vector>

#include "plan/problem.h"

namespace awq_trt {

using GetCreators = nvinfer1::IPluginCreatorInterface* const* (*)(int32_t& count);
using SetLoggerFinderFunction = void (*)(void* finder);

// The two entry points of a plugin library.
struct Library {
  GetCreators get_creators;
  SetLoggerFinderFunction set_logger_finder;
};

// Open a plugin library as TensorRT does. Ends the program with a message where that fails.
Library OpenLibrary(std::string const& path);
// The same plugin, compiled into this program with the emulated kernels.
Library EmulatedLibrary();

class Dimension final : public nvinfer1::IDimensionExpr, private nvinfer1::apiv::VDimensionExpr {
 public:
  explicit Dimension(int64_t value) : value_(value) { mImpl = this; }
  bool isConstant() const override { return value_ >= 0; }
  int64_t getConstantValue() const override { return value_; }
  bool isSizeTensor() const override { return false; }

 private:
  int64_t value_;  // -1: known at run time only
};

class ExprBuilder final : public nvinfer1::IExprBuilder, private nvinfer1::apiv::VExprBuilder {
 public:
  ExprBuilder() { mImpl = this; }
  nvinfer1::IDimensionExpr const* constant(int64_t value) override { return &dimensions_.emplace_back(value); }
  nvinfer1::IDimensionExpr const* operation(nvinfer1::DimensionOperation, nvinfer1::IDimensionExpr const&,
                                            nvinfer1::IDimensionExpr const&) override {
    return constant(-1);
  }
  nvinfer1::IDimensionExpr const* declareSizeTensor(int32_t, nvinfer1::IDimensionExpr const&,
                                                    nvinfer1::IDimensionExpr const&) override {
    return constant(-1);
  }
  nvinfer1::DimsExprs Expressions(nvinfer1::Dims const& dims);

 private:
  std::deque<Dimension> dimensions_;  // addresses stay
};

struct DeletePlugin {
  void operator()(nvinfer1::IPluginV3* plugin) const { delete plugin; }
};
using Plugin = std::unique_ptr<nvinfer1::IPluginV3, DeletePlugin>;

// A plugin's field as the ONNX parser hands it over.
struct Field {
  std::string name;
  int64_t value;
  nvinfer1::PluginFieldType type = nvinfer1::PluginFieldType::kINT32;
  int32_t length = 1;
  bool null_data = false;
  std::vector<int32_t> values = {};  // of a list, instead of `value` and `length`
};
std::vector<Field> FieldsOf(LayerConfig const& layer);
Plugin CreatePlugin(Library const& library, std::vector<Field> const& fields,
                    nvinfer1::TensorRTPhase phase = nvinfer1::TensorRTPhase::kBUILD);

nvinfer1::IPluginCreatorV3One* CreatorOf(Library const& library);
nvinfer1::IPluginV3OneCore* CoreOf(nvinfer1::IPluginV3& plugin);
nvinfer1::IPluginV3OneBuild* BuildOf(nvinfer1::IPluginV3& plugin);
nvinfer1::IPluginV3OneRuntime* RuntimeOf(nvinfer1::IPluginV3& plugin);

nvinfer1::Dims MakeDims(std::vector<int64_t> const& dims);

// The inputs of a layer, in order, with `x` as the shape of X.
struct InputSpec {
  std::string name;
  nvinfer1::DataType type;
  nvinfer1::Dims dims;
};
// The width of each output of a layer.
std::vector<int32_t> WidthsOf(LayerConfig const& layer);
std::vector<InputSpec> InputsOf(LayerConfig const& layer, nvinfer1::DataType type, std::vector<int64_t> const& x);
std::vector<nvinfer1::PluginTensorDesc> DescsOf(std::vector<InputSpec> const& inputs);
std::vector<nvinfer1::DynamicPluginTensorDesc> DynamicDescsOf(std::vector<InputSpec> const& inputs);

}  // namespace awq_trt
