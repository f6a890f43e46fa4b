// Loggers as TensorRT 10 and as TensorRT 11 (and TensorRT-RTX) declare them, whichever headers this is compiled with.
// The plugin has to tell them apart by their run-time types.
#pragma once

#include <NvInferRuntime.h>

#include <string>

namespace awq_trt {

using Severity = nvinfer1::ILogger::Severity;

namespace tensorrt10 {
class ILogger {
 public:
  virtual void log(Severity severity, char const* text) noexcept = 0;
  virtual ~ILogger() = default;
};
class ILoggerFinder {
 public:
  virtual ILogger* findLogger() = 0;

 protected:
  virtual ~ILoggerFinder() = default;
};
}  // namespace tensorrt10

namespace tensorrt11 {
class ILogger : public nvinfer1::IVersionedInterface {
 public:
  virtual void log(Severity severity, char const* text) noexcept = 0;
};
class ILoggerFinder : public nvinfer1::IVersionedInterface {
 public:
  virtual ILogger* findLogger() noexcept = 0;
};
}  // namespace tensorrt11

struct Messages {
  std::string text;
  std::string Take() {  // everything since the last call
    std::string taken;
    taken.swap(text);
    return taken;
  }
};

class Log10 final : public tensorrt10::ILoggerFinder, public tensorrt10::ILogger, public Messages {
 public:
  tensorrt10::ILogger* findLogger() override { return this; }
  void log(Severity, char const* message) noexcept override { text += std::string(message) + "\n"; }
  void* AsFinder() { return static_cast<tensorrt10::ILoggerFinder*>(this); }
};

class Log11 final : public tensorrt11::ILogger, public Messages {
 public:
  nvinfer1::InterfaceInfo getInterfaceInfo() const noexcept override { return {"ILogger", 1, 0}; }
  void log(Severity, char const* message) noexcept override { text += std::string(message) + "\n"; }
};
class Finder11 final : public tensorrt11::ILoggerFinder {
 public:
  explicit Finder11(Log11& log) : log_(log) {}
  nvinfer1::InterfaceInfo getInterfaceInfo() const noexcept override { return {"ILoggerFinder", 1, 0}; }
  tensorrt11::ILogger* findLogger() noexcept override { return &log_; }

 private:
  Log11& log_;
};

}  // namespace awq_trt
