// Messages for the person who runs TensorRT: through its logger where it gave us one, to stderr where it did not.
#pragma once

#include <NvInferRuntime.h>

namespace awq_trt {

// `finder` is TensorRT's ILoggerFinder, of whichever version called us; nullptr for stderr.
void SetLoggerFinder(void* finder) noexcept;

// printf-style; "W4A16Gemm: " is put in front.
void LogError(char const* format, ...) noexcept __attribute__((format(printf, 1, 2)));
void LogWarning(char const* format, ...) noexcept __attribute__((format(printf, 1, 2)));

}  // namespace awq_trt
