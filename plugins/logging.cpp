#include "logging.h"

#include <atomic>
#include <cstdarg>
#include <cstdio>

namespace awq_trt {
namespace {

using nvinfer1::ILogger;

std::atomic<nvinfer1::ILoggerFinder*> logger_finder{nullptr};

void Log(ILogger::Severity severity, char const* format, va_list arguments) noexcept {
  char text[1024];
  int const prefix = std::snprintf(text, sizeof(text), "W4A16Gemm: ");
  std::vsnprintf(text + prefix, sizeof(text) - prefix, format, arguments);
  nvinfer1::ILoggerFinder* finder = logger_finder.load();
  ILogger* logger = nullptr;
  try {  // findLogger is another library's code and not noexcept
    if (finder != nullptr) logger = finder->findLogger();
  } catch (...) {
  }
  if (logger != nullptr) {
    logger->log(severity, text);
  } else {
    std::fprintf(stderr, "%s\n", text);
  }
}

}  // namespace

void SetLoggerFinder(nvinfer1::ILoggerFinder* finder) noexcept { logger_finder.store(finder); }

void LogError(char const* format, ...) noexcept {
  va_list arguments;
  va_start(arguments, format);
  Log(ILogger::Severity::kERROR, format, arguments);
  va_end(arguments);
}

void LogWarning(char const* format, ...) noexcept {
  va_list arguments;
  va_start(arguments, format);
  Log(ILogger::Severity::kWARNING, format, arguments);
  va_end(arguments);
}

}  // namespace awq_trt
