#include "tensorrt_side.h"

#include <dlfcn.h>

#include <cstdio>
#include <cstdlib>

extern "C" nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& count) noexcept;
extern "C" void setLoggerFinder(void* finder) noexcept;

namespace awq_trt {

using nvinfer1::DataType;
using nvinfer1::Dims;

Library OpenLibrary(std::string const& path) {
  void* const handle = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  void* const creators = handle != nullptr ? dlsym(handle, "getCreators") : nullptr;
  void* const finder = handle != nullptr ? dlsym(handle, "setLoggerFinder") : nullptr;
  if (creators == nullptr || finder == nullptr) {
    std::fprintf(stderr, "cannot open the plugin library %s: %s\n", path.c_str(), dlerror());
    std::exit(2);
  }
  return {reinterpret_cast<GetCreators>(creators), reinterpret_cast<SetLoggerFinderFunction>(finder)};
}

Library EmulatedLibrary() { return {getCreators, setLoggerFinder}; }

nvinfer1::DimsExprs ExprBuilder::Expressions(Dims const& dims) {
  nvinfer1::DimsExprs expressions{};
  expressions.nbDims = dims.nbDims;
  for (int32_t i = 0; i < dims.nbDims; ++i) expressions.d[i] = constant(dims.d[i]);
  return expressions;
}

std::vector<Field> FieldsOf(LayerConfig const& layer) {
  std::vector<Field> fields{{"out_features", layer.out_features}, {"in_features", layer.in_features},
                            {"group_size", layer.group_size},     {"has_zeros", layer.has_zeros},
                            {"has_bias", layer.has_bias},         {"has_pre_scale", layer.has_pre_scale}};
  if (layer.outputs > 1) fields.push_back({"splits", 0, nvinfer1::PluginFieldType::kINT32, 1, false, WidthsOf(layer)});
  if (layer.workspace_mib != kDefaultWorkspaceMib) fields.push_back({"workspace_mib", layer.workspace_mib});
  return fields;
}

std::vector<int32_t> WidthsOf(LayerConfig const& layer) {
  if (layer.outputs == 1) return {layer.out_features};
  return {layer.splits, layer.splits + layer.outputs};
}

Plugin CreatePlugin(Library const& library, std::vector<Field> const& fields, nvinfer1::TensorRTPhase phase) {
  // room for two values of up to 8 bytes, so that a field of a wrong type or length is still readable memory
  std::vector<std::vector<int64_t>> data;
  std::vector<nvinfer1::PluginField> plugin_fields;
  for (Field const& field : fields) data.push_back({field.value, 0});
  for (size_t i = 0; i < fields.size(); ++i) {
    Field const& field = fields[i];
    bool const list = !field.values.empty();
    void const* const values = list ? static_cast<void const*>(field.values.data()) : data[i].data();
    plugin_fields.push_back({field.name.c_str(), field.null_data ? nullptr : values, field.type,
                             list ? static_cast<int32_t>(field.values.size()) : field.length});
  }
  nvinfer1::PluginFieldCollection const collection{static_cast<int32_t>(plugin_fields.size()), plugin_fields.data()};
  return Plugin(CreatorOf(library)->createPlugin("test_layer", &collection, phase));
}

nvinfer1::IPluginCreatorV3One* CreatorOf(Library const& library) {
  int32_t count = 0;
  return static_cast<nvinfer1::IPluginCreatorV3One*>(library.get_creators(count)[0]);
}

nvinfer1::IPluginV3OneCore* CoreOf(nvinfer1::IPluginV3& plugin) {
  return static_cast<nvinfer1::IPluginV3OneCore*>(plugin.getCapabilityInterface(nvinfer1::PluginCapabilityType::kCORE));
}
nvinfer1::IPluginV3OneBuild* BuildOf(nvinfer1::IPluginV3& plugin) {
  return static_cast<nvinfer1::IPluginV3OneBuild*>(
      plugin.getCapabilityInterface(nvinfer1::PluginCapabilityType::kBUILD));
}
nvinfer1::IPluginV3OneRuntime* RuntimeOf(nvinfer1::IPluginV3& plugin) {
  return static_cast<nvinfer1::IPluginV3OneRuntime*>(
      plugin.getCapabilityInterface(nvinfer1::PluginCapabilityType::kRUNTIME));
}

Dims MakeDims(std::vector<int64_t> const& dims) {
  Dims made{};
  made.nbDims = static_cast<int32_t>(dims.size());
  for (size_t i = 0; i < dims.size(); ++i) made.d[i] = dims[i];
  return made;
}

std::vector<InputSpec> InputsOf(LayerConfig const& layer, DataType type, std::vector<int64_t> const& x) {
  int64_t const tiles_n = (layer.out_features + 15) / 16, tiles_k = (layer.in_features + 63) / 64;
  int64_t const groups = layer.in_features / layer.group_size;
  std::vector<InputSpec> inputs{{"X", type, MakeDims(x)},
                                {"qweight", DataType::kINT32, MakeDims({tiles_n, tiles_k, 32, 4})},
                                {"scales", type, MakeDims({tiles_n, groups, 8, 2})}};
  if (layer.has_zeros) inputs.push_back({"zeros", DataType::kINT32, MakeDims({tiles_n, groups, 2})});
  if (layer.has_bias) inputs.push_back({"bias", type, MakeDims({layer.out_features})});
  if (layer.has_pre_scale) inputs.push_back({"pre_scale", type, MakeDims({layer.in_features})});
  return inputs;
}

std::vector<nvinfer1::PluginTensorDesc> DescsOf(std::vector<InputSpec> const& inputs) {
  std::vector<nvinfer1::PluginTensorDesc> descs;
  for (InputSpec const& input : inputs) {
    descs.push_back({input.dims, input.type, nvinfer1::TensorFormat::kLINEAR, 1.0f});
  }
  return descs;
}

std::vector<nvinfer1::DynamicPluginTensorDesc> DynamicDescsOf(std::vector<InputSpec> const& inputs) {
  std::vector<nvinfer1::DynamicPluginTensorDesc> descs;
  for (nvinfer1::PluginTensorDesc const& desc : DescsOf(inputs))
    descs.push_back({desc, desc.dims, desc.dims, desc.dims});
  return descs;
}

}  // namespace awq_trt
