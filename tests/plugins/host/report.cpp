#include "report.h"

#include <cstdio>

namespace awq_trt {

std::string Quote(std::string const& text) {
  std::string quoted = "\"";
  for (char c : text) {
    if (c == '"' || c == '\\') {
      quoted += std::string("\\") + c;
    } else if (c == '\n') {
      quoted += "\\n";
    } else if (static_cast<unsigned char>(c) >= 0x20) {
      quoted += c;
    }
  }
  return quoted + "\"";
}

void Report::Check(std::string const& name, bool ok, std::string const& details) {
  ok ? ++passed_ : ++failed_;
  std::printf("{\"check\": %s, \"ok\": %s%s%s}\n", Quote(name).c_str(), ok ? "true" : "false",
              details.empty() ? "" : ", ", details.c_str());
}

void Report::Skip(std::string const& name, int64_t count, std::string const& reason) {
  skipped_ += count;
  std::printf("{\"check\": %s, \"skipped\": %lld, \"reason\": %s}\n", Quote(name).c_str(),
              static_cast<long long>(count), Quote(reason).c_str());
}

void Report::PrintSummary(std::string const& gpu) const {
  std::printf("{\"summary\": true, \"passed\": %lld, \"failed\": %lld, \"skipped\": %lld, \"gpu\": %s}\n",
              static_cast<long long>(passed_), static_cast<long long>(failed_), static_cast<long long>(skipped_),
              gpu.empty() ? "null" : Quote(gpu).c_str());
}

}  // namespace awq_trt
