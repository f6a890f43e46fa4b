// One line of JSON per check on stdout, and the counts.
#pragma once

#include <string>

namespace awq_trt {

class Report {
 public:
  // `details`: further JSON members, such as "\"max_error\": 0.1", or nothing.
  void Check(std::string const& name, bool ok, std::string const& details = "");
  void Skip(std::string const& name, int64_t count, std::string const& reason);
  void PrintSummary(std::string const& gpu) const;
  int64_t failed() const { return failed_; }

 private:
  int64_t passed_ = 0, failed_ = 0, skipped_ = 0;
};

std::string Quote(std::string const& text);  // as a JSON string

}  // namespace awq_trt
