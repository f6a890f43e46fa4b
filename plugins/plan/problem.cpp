#include "plan/problem.h"

#include <cstdio>

namespace awq_trt {
namespace {

constexpr int64_t kMaxFeatures = 1 << 20;
constexpr int32_t kMinSm = 80;

}  // namespace

Reason UnsupportedReason(int64_t n, int64_t k, int64_t group_size, ActivationType type, int32_t sm) {
  Reason reason{};
  auto say = [&reason](auto... args) { std::snprintf(reason.text, sizeof(reason.text), args...); };
  if (type != ActivationType::kHalf && type != ActivationType::kBfloat16) {
    say("activations are of type %d; the kernels take float16 or bfloat16", static_cast<int>(type));
  } else if (sm < kMinSm) {
    say("compute capability %.1f; the kernels need 8.0 or newer", sm / 10.0);
  } else if (n % 8 != 0 || n < 8 || n > kMaxFeatures) {
    say("out_features %lld is not a multiple of 8 between 8 and %lld", static_cast<long long>(n),
        static_cast<long long>(kMaxFeatures));
  } else if (k % 32 != 0 || k < 32 || k > kMaxFeatures) {
    say("in_features %lld is not a multiple of 32 between 32 and %lld", static_cast<long long>(k),
        static_cast<long long>(kMaxFeatures));
  } else if (group_size != k && group_size != 32 && group_size != 64 && group_size != 128) {
    say("group_size %lld is not 32, 64, 128 or the whole row", static_cast<long long>(group_size));
  } else if (k % group_size != 0) {
    say("in_features %lld is not a multiple of the group_size %lld", static_cast<long long>(k),
        static_cast<long long>(group_size));
  }
  return reason;
}

Reason UnsupportedSplitReason(int64_t n, int32_t outputs, int32_t const* splits) {
  Reason reason{};
  auto say = [&reason](auto... args) { std::snprintf(reason.text, sizeof(reason.text), args...); };
  if (outputs < 1 || outputs > kMaxOutputs) {
    say("splits has %d values, need 1 to %d", outputs, kMaxOutputs);
    return reason;
  }
  int64_t sum = 0;
  for (int32_t i = 0; i < outputs; ++i) {
    if (splits[i] < 8 || splits[i] % 8 != 0) {
      say("splits[%d] is %d, need a multiple of 8", i, splits[i]);
      return reason;
    }
    sum += splits[i];
  }
  if (sum != n) {
    say("splits add up to %lld, need out_features %lld", static_cast<long long>(sum), static_cast<long long>(n));
  }
  return reason;
}

GemmArgs MakeArgs(LayerConfig const& layer) {
  GemmArgs args{};
  args.n = layer.out_features;
  args.k = layer.in_features;
  args.workspace_mib = layer.workspace_mib;
  args.groups = layer.in_features / layer.group_size;
  args.group_shift = 31;  // one group per row: every column shifts to 0
  for (int32_t shift = 5; shift <= 7; ++shift) {
    if (args.groups > 1 && layer.group_size == 1 << shift) args.group_shift = shift;
  }
  for (int32_t i = 0, end = 0; i < kMaxOutputs; ++i) {
    if (i < layer.outputs) end = layer.outputs > 1 ? end + layer.splits[i] : layer.out_features;
    args.ends[i] = end;
  }
  return args;
}

}  // namespace awq_trt
