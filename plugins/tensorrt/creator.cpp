#include "tensorrt/creator.h"

#include <cstdlib>
#include <cstring>
#include <new>

#include "tensorrt/logging.h"

namespace awq_trt {

char const* const kFieldNames[kFieldCount] = {"out_features", "in_features",   "group_size", "has_zeros",
                                              "has_bias",     "has_pre_scale", "splits"};

namespace {

using nvinfer1::PluginField;
using nvinfer1::PluginFieldType;

char const* NameOf(PluginFieldType type) {
  constexpr char const* kNames[] = {"FLOAT16", "FLOAT32", "FLOAT64", "INT8",  "INT16", "INT32", "CHAR",
                                    "DIMS",    "UNKNOWN", "BF16",    "INT64", "FP8",   "INT4",  "FP4"};
  int32_t const index = static_cast<int32_t>(type);
  return index >= 0 && index < static_cast<int32_t>(sizeof(kNames) / sizeof(kNames[0])) ? kNames[index] : "other";
}

constexpr char kWorkspaceVariable[] = "AWQ_TRT_WORKSPACE_MIB";
constexpr int32_t kMaxWorkspaceMib = 1 << 20;

// What the fields say; a scalar that is missing is 0.
struct Values {
  int32_t workspace_mib = -1;
  int32_t scalars[kScalarFields] = {};
  int32_t outputs = 1;
  int32_t splits[kMaxOutputs] = {};
};

// Read every known field; says what is wrong and returns false where something is.
bool ReadFields(char const* layer, nvinfer1::PluginFieldCollection const* collection, Values& values) {
  bool seen[kFieldCount] = {};
  int32_t const given = collection == nullptr ? 0 : collection->nbFields;
  for (int32_t f = 0; f < given; ++f) {
    PluginField const& field = collection->fields[f];
    if (field.name != nullptr && std::strcmp(field.name, kWorkspaceField) == 0) {
      bool const one = field.type == PluginFieldType::kINT32 && field.length == 1 && field.data != nullptr;
      if (one) std::memcpy(&values.workspace_mib, field.data, sizeof(int32_t));
      if (one && values.workspace_mib >= 0 && values.workspace_mib <= kMaxWorkspaceMib) continue;
      LogError("%s: field '%s', need one INT32 of 0 to %d", layer, field.name, kMaxWorkspaceMib);
      return false;
    }
    int32_t index = 0;
    while (index < kFieldCount && (field.name == nullptr || std::strcmp(field.name, kFieldNames[index]) != 0)) ++index;
    if (index == kFieldCount) {
      bool const standard = field.name != nullptr && std::strncmp(field.name, "plugin_", 7) == 0;
      if (!standard) LogWarning("%s: field '%s' is not known and ignored", layer, field.name ? field.name : "(null)");
      continue;
    }
    bool const scalar = index < kScalarFields;
    int32_t const most = scalar ? 1 : kMaxOutputs;
    bool const bare = field.data == nullptr || field.length < 1;
    if (!scalar && bare && field.length == 0)
      continue;  // no splits: how the ONNX parser says an attribute is not there
    if (field.type != PluginFieldType::kINT32 || field.length > most || bare) {
      LogError("%s: field '%s' is %s with %d values%s, need %s INT32", layer, field.name, NameOf(field.type),
               field.length, field.data == nullptr ? " and no data" : "", scalar ? "one" : "1 to 4");
      return false;
    }
    if (seen[index]) {
      LogError("%s: field '%s' is given twice, need it once", layer, field.name);
      return false;
    }
    seen[index] = true;
    if (!scalar) {
      values.outputs = field.length;
      std::memcpy(values.splits, field.data, field.length * sizeof(int32_t));
      continue;
    }
    int32_t& value = values.scalars[index];
    std::memcpy(&value, field.data, sizeof(int32_t));
    if (index >= kRequiredFields && value != 0 && value != 1) {
      LogError("%s: field '%s' is %d, need 0 or 1", layer, field.name, value);
      return false;
    }
  }
  for (int32_t i = 0; i < kRequiredFields; ++i) {
    if (!seen[i]) {
      LogError("%s: field '%s' is missing, need one INT32", layer, kFieldNames[i]);
      return false;
    }
  }
  if (!seen[kScalarFields]) values.splits[0] = values.scalars[0];
  return true;
}

// What the environment says, or the default; -1 where it says nothing sensible.
int32_t WorkspaceMib() {
  char const* const text = std::getenv(kWorkspaceVariable);
  if (text == nullptr) return kDefaultWorkspaceMib;
  char* end = nullptr;
  long const value = std::strtol(text, &end, 10);
  return end != text && *end == '\0' && value >= 0 && value <= kMaxWorkspaceMib ? static_cast<int32_t>(value) : -1;
}

}  // namespace

W4A16GemmCreator::W4A16GemmCreator() noexcept {
  for (int32_t i = 0; i < kFieldCount; ++i) fields_[i] = {kFieldNames[i], nullptr, PluginFieldType::kINT32, 1};
  field_collection_ = {kFieldCount, fields_};
}

nvinfer1::IPluginV3* W4A16GemmCreator::createPlugin(char const* name, nvinfer1::PluginFieldCollection const* fields,
                                                    nvinfer1::TensorRTPhase phase) noexcept {
  char const* const layer = name != nullptr && *name != '\0' ? name : "(unnamed layer)";
  Values values;
  if (!ReadFields(layer, fields, values)) return nullptr;
  int32_t const* v = values.scalars;
  // The type of X and the device are not known here: they are checked where they are.
  Reason reason = UnsupportedReason(v[0], v[1], v[2], ActivationType::kHalf, 80);
  if (reason.empty()) reason = UnsupportedSplitReason(v[0], values.outputs, values.splits);
  if (!reason.empty()) {
    LogError("%s: %s", layer, reason.text);
    return nullptr;
  }
  if (values.workspace_mib < 0) {  // a plan's workspace is what it was built with
    values.workspace_mib = phase == nvinfer1::TensorRTPhase::kBUILD ? WorkspaceMib() : kDefaultWorkspaceMib;
  }
  if (values.workspace_mib < 0) {
    LogError("%s: the environment variable %s is '%s', need MiB, 0 to %d", layer, kWorkspaceVariable,
             std::getenv(kWorkspaceVariable), kMaxWorkspaceMib);
    return nullptr;
  }
  LayerConfig config{v[0], v[1], v[2], v[3] != 0, v[4] != 0, v[5] != 0};
  config.outputs = values.outputs;
  config.workspace_mib = values.workspace_mib;
  std::memcpy(config.splits, values.splits, sizeof(config.splits));
  auto* plugin = new (std::nothrow) W4A16GemmPlugin(config);
  if (plugin == nullptr) LogError("%s: out of host memory while creating the plugin", layer);
  return plugin;
}

}  // namespace awq_trt
