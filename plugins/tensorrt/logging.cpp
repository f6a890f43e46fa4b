#include "tensorrt/logging.h"

#include <cxxabi.h>

#include <atomic>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <typeinfo>

namespace awq_trt {
namespace {

using Severity = nvinfer1::ILogger::Severity;

std::atomic<void*> logger_finder{nullptr};

// ILoggerFinder and ILogger are plain classes in TensorRT 10; TensorRT 11 and TensorRT-RTX derive them from
// IVersionedInterface, whose virtual functions then come first. The headers know one of the two and the library has to
// serve both, so each object is asked for its run-time type, which lies in front of its first virtual function
// (Itanium C++ ABI, 2.5.2), and the function is called by its place in the table.
constexpr int kPlainSlot = 0;
constexpr int kVersionedSlot = 4;  // after getAPILanguage, getInterfaceInfo and the two entries of the destructor
constexpr int kNoSlot = -1;

// The base of `type` whose mangled name ends with `suffix`, itself included; nullptr where there is none.
std::type_info const* FindBase(std::type_info const* type, char const* suffix) {
  size_t const length = std::strlen(type->name()), wanted = std::strlen(suffix);
  if (length >= wanted && std::strcmp(type->name() + length - wanted, suffix) == 0) return type;
  if (auto const* single = dynamic_cast<abi::__si_class_type_info const*>(type)) {
    return FindBase(single->__base_type, suffix);
  }
  if (auto const* multiple = dynamic_cast<abi::__vmi_class_type_info const*>(type)) {
    for (unsigned int i = 0; i < multiple->__base_count; ++i) {
      if (auto const* found = FindBase(multiple->__base_info[i].__base_type, suffix)) return found;
    }
  }
  return nullptr;
}

// The place of the first virtual function that the interface itself declares.
int OwnSlot(void* object, char const* interface_suffix) {
  if (object == nullptr) return kNoSlot;
  auto const* const type = (*static_cast<std::type_info const* const* const*>(object))[-1];
  if (type == nullptr) return kNoSlot;  // compiled without run-time types: no way to tell
  std::type_info const* const interface = FindBase(type, interface_suffix);
  if (interface == nullptr) return kNoSlot;
  return FindBase(interface, "19IVersionedInterfaceE") != nullptr ? kVersionedSlot : kPlainSlot;
}

template <typename Function>
Function VirtualFunction(void* object, int slot) {
  return reinterpret_cast<Function>((*static_cast<void***>(object))[slot]);
}

// False where there is no logger to give the message to.
bool SendToLogger(Severity severity, char const* text) {
  void* const finder = logger_finder.load();
  int const find_slot = OwnSlot(finder, "13ILoggerFinderE");
  if (find_slot == kNoSlot) return false;
  void* const logger = VirtualFunction<void* (*)(void*)>(finder, find_slot)(finder);
  int const log_slot = OwnSlot(logger, "7ILoggerE");
  if (log_slot == kNoSlot) return false;
  VirtualFunction<void (*)(void*, Severity, char const*)>(logger, log_slot)(logger, severity, text);
  return true;
}

void Log(Severity severity, char const* format, va_list arguments) noexcept {
  char text[1024];
  int const prefix = std::snprintf(text, sizeof(text), "W4A16Gemm: ");
  std::vsnprintf(text + prefix, sizeof(text) - prefix, format, arguments);
  bool sent = false;
  try {  // another library's code
    sent = SendToLogger(severity, text);
  } catch (...) {
  }
  if (!sent) std::fprintf(stderr, "%s\n", text);
}

}  // namespace

void SetLoggerFinder(void* finder) noexcept { logger_finder.store(finder); }

void LogError(char const* format, ...) noexcept {
  va_list arguments;
  va_start(arguments, format);
  Log(Severity::kERROR, format, arguments);
  va_end(arguments);
}

void LogWarning(char const* format, ...) noexcept {
  va_list arguments;
  va_start(arguments, format);
  Log(Severity::kWARNING, format, arguments);
  va_end(arguments);
}

}  // namespace awq_trt
