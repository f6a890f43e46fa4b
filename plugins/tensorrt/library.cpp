// The two functions that the library exports: TensorRT finds them by name. It registers the creators itself; the
// library never calls the registry, whose interface differs between TensorRT versions.
#include <NvInferRuntime.h>

#include "tensorrt/creator.h"
#include "tensorrt/logging.h"
#include "version.h"

namespace {

// awq_trt/engine/plugin.py reads the version from the file, without loading it.
[[gnu::used]] char const kVersionMarker[] = "AWQ_TRT_PLUGIN_VERSION=" AWQ_TRT_VERSION ";";

}  // namespace

extern "C" {

[[gnu::visibility("default")]] nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& count) noexcept {
  static awq_trt::W4A16GemmCreator creator;
  static nvinfer1::IPluginCreatorInterface* const creators[] = {&creator};
  count = 1;
  return creators;
}

[[gnu::visibility("default")]] void setLoggerFinder(nvinfer1::ILoggerFinder* finder) noexcept {
  awq_trt::SetLoggerFinder(finder);
}
}
