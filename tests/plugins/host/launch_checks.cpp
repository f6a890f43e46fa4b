#include "launch_checks.h"

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <memory>
#include <random>

#include "emulated_kernels.h"
#include "kernels/device.h"
#include "plan/kernels.h"
#include "reference.h"

namespace awq_trt {
namespace {

constexpr int64_t kGuard = 64;          // elements before and after Y that must not change
constexpr uint16_t kPoison = 0xffff;    // NaN in fp16 and in bf16
constexpr int64_t kMaxCompared = 8000;  // of one call: the reference is what takes time

void Must(cudaError_t error, char const* what) {
  if (error == cudaSuccess) return;
  std::printf("{\"check\": %s, \"ok\": false, \"error\": %s}\n", Quote(what).c_str(),
              Quote(cudaGetErrorString(error)).c_str());
  std::fflush(stdout);
  std::_Exit(1);
}

// Memory of the device, or of the emulator, `offset` bytes beyond a multiple of 256.
class Buffer {
 public:
  Buffer(Where where, void const* data, size_t bytes, size_t offset = 0,
         emulator::Memory kind = emulator::Memory::kConstant)
      : where_(where), bytes_(bytes), offset_(offset) {
    if (where == Where::kGpu) {
      Must(cudaMalloc(&base_, bytes + offset + 1), "cudaMalloc");
    } else {
      base_ = std::aligned_alloc(256, (bytes + offset + 512) / 256 * 256);
    }
    if (where == Where::kEmulator) emulator::RegisterMemory(get(), static_cast<int64_t>(bytes), kind);
    Upload(data);
  }
  ~Buffer() { where_ == Where::kGpu ? static_cast<void>(cudaFree(base_)) : std::free(base_); }
  Buffer(Buffer const&) = delete;

  char* get() const { return static_cast<char*>(base_) + offset_; }
  void Upload(void const* data) {
    if (where_ == Where::kGpu) {
      Must(cudaMemcpy(get(), data, bytes_, cudaMemcpyHostToDevice), "cudaMemcpy to the device");
    } else {
      std::memcpy(get(), data, bytes_);
    }
  }
  void Download(void* data) const {
    if (where_ == Where::kGpu) {
      Must(cudaMemcpy(data, get(), bytes_, cudaMemcpyDeviceToHost), "cudaMemcpy from the device");
    } else {
      std::memcpy(data, get(), bytes_);
    }
  }

 private:
  Where where_;
  void* base_ = nullptr;
  size_t bytes_, offset_;
};

nvinfer1::DataType DataTypeOf(ActivationType type) {
  return type == ActivationType::kHalf ? nvinfer1::DataType::kHALF : nvinfer1::DataType::kBF16;
}

// What an engine does: the fields of a built plugin are stored, and a plugin made from them runs.
class RunningPlugin {
 public:
  RunningPlugin(Library const& library, LayerConfig const& layer) : layer_(layer) {
    Plugin built = CreatePlugin(library, FieldsOf(layer));
    if (built == nullptr) return;
    nvinfer1::PluginFieldCollection const* fields = RuntimeOf(*built)->getFieldsToSerialize();
    Plugin const restored(CreatorOf(library)->createPlugin("restored", fields, nvinfer1::TensorRTPhase::kRUNTIME));
    if (restored == nullptr) return;
    plugin_.reset(RuntimeOf(*restored)->attachToContext(nullptr));
  }
  bool ready() const { return plugin_ != nullptr; }

  // `outputs`: where each Y goes. The workspace holds garbage before.
  int32_t Run(Where where, ActivationType type, int32_t tactic, int32_t tokens, std::vector<void const*> const& inputs,
              std::vector<void*> const& outputs, cudaStream_t stream) {
    nvinfer1::IPluginV3OneRuntime* runtime = RuntimeOf(*plugin_);
    std::vector<InputSpec> const specs = InputsOf(layer_, DataTypeOf(type), {1, tokens, layer_.in_features});
    std::vector<nvinfer1::PluginTensorDesc> const descs = DescsOf(specs);
    std::vector<nvinfer1::PluginTensorDesc> ys;
    for (int32_t width : WidthsOf(layer_)) {
      ys.push_back({MakeDims({1, tokens, width}), DataTypeOf(type), nvinfer1::TensorFormat::kLINEAR, 1.0f});
    }
    size_t const bytes = BuildOf(*plugin_)->getWorkspaceSize(
        DynamicDescsOf(specs).data(), static_cast<int32_t>(specs.size()), nullptr, static_cast<int32_t>(ys.size()));
    std::vector<char> const garbage(bytes, static_cast<char>(0xff));
    Buffer const workspace(where, garbage.data(), bytes, 0, emulator::Memory::kWritable);
    if (runtime->setTactic(tactic) != 0) return 1;
    if (runtime->onShapeChange(descs.data(), static_cast<int32_t>(descs.size()), ys.data(),
                               static_cast<int32_t>(ys.size())) != 0) {
      return 2;
    }
    int32_t const status =
        runtime->enqueue(descs.data(), ys.data(), inputs.data(), outputs.data(), workspace.get(), stream);
    if (where == Where::kGpu && status == 0) Must(cudaStreamSynchronize(stream), "running the kernel");
    return status;
  }

 private:
  LayerConfig layer_;
  Plugin plugin_;
};

struct LayerCase {
  LayerConfig layer;
  std::vector<int32_t> tokens;
};

std::vector<int32_t> AllTails() {
  std::vector<int32_t> tokens{0};
  for (int32_t m = 1; m <= 40; ++m) tokens.push_back(m);
  for (int32_t m : {63, 64, 65, 95, 96, 97, 127, 128, 129, 200, 255, 256, 257}) tokens.push_back(m);
  return tokens;
}

// n, k, group_size, zeros, bias, pre_scale: every group size, every option, tails of N (8, 24, 72..) and K (32, 96..).
std::vector<LayerCase> ManyCases() {
  std::vector<int32_t> const some{1, 7, 16, 17, 64, 129, 512}, all = AllTails();
  return {{{1040, 4096, 128, true, true, true, 3, {520, 264, 256}}, all},
          {{48, 96, 32, true, false, false, 4, {8, 16, 8, 16}}, all},
          {{8, 32, 32, true, false, false}, all},
          {{24, 96, 32, true, true, true}, all},
          {{72, 64, 64, false, false, false}, all},
          {{136, 192, 64, true, true, false}, all},
          {{264, 352, 352, true, true, true}, all},
          {{128, 1024, 128, false, true, true}, all},
          {{576, 576, 64, true, false, false}, all},
          {{1536, 576, 64, true, false, true}, all},
          {{40, 96, 96, false, true, false}, all},
          {{2056, 4096, 128, true, true, false}, some},
          {{4096, 11008, 128, true, false, true}, some},
          {{2304, 4096, 128, true, false, false, 3, {1024, 640, 640}}, {384, 1000, 2049, 8191}},
          {{56, 160, 32, false, false, true}, all}};
}

// Few layers and few numbers of tokens: the emulator is a million times slower.
std::vector<LayerCase> FewCases() {
  std::vector<int32_t> const small{0, 1, 2, 3, 7, 8, 9, 15, 16, 17, 24, 31, 32, 33, 40}, around{1, 16, 63, 64, 65},
      few{5, 16, 129};
  // one tile and many, whole ones and split ones; 16 K-blocks of 64 columns, 5, 12 and an odd half
  return {{{8, 32, 32, true, false, false}, small},
          {{24, 96, 32, true, true, true}, small},
          {{56, 2880, 64, true, true, false, 2, {40, 16}}, {1, 9, 30}},
          {{48, 96, 32, true, false, false, 4, {8, 16, 8, 16}}, {2, 33}},
          {{24, 8192, 128, true, false, true}, {3, 25}},
          {{2200, 128, 32, true, true, false}, {4, 16}},
          {{1096, 160, 32, true, false, false}, {2, 9}},  // segments of a row tile's end, a whole one, and a beginning
          {{72, 64, 64, false, false, false}, around},
          {{136, 192, 64, true, true, false}, few},
          {{264, 352, 352, true, true, true}, {3, 33}},
          {{128, 1024, 128, false, true, true}, {1, 17}},
          {{40, 96, 96, false, true, false}, around},
          {{56, 160, 32, false, false, true}, {1, 2, 97, 128}},
          {{776, 320, 64, true, true, true, 3, {264, 504, 8}}, {48, 65, 200}},
          {{520, 736, 32, true, false, false}, {64, 257}},
          {{1304, 256, 128, false, true, false}, {100, 300}},
          {{16, 1984, 64, true, false, false}, {60, 80}}};
}

// Shapes of every odd multiple of 8 up to 8192 as N, with a K of whole groups up to 16384 such that N K is small; on
// the emulator a few of them. Options, tokens and groups at random.
std::vector<LayerCase> TailCases(bool few, uint64_t seed) {
  std::mt19937_64 random(seed);
  auto below = [&random](int64_t bound) { return static_cast<int32_t>(random() % bound); };
  int64_t const most = few ? 1 << 17 : 1 << 20;
  std::vector<LayerCase> cases;
  for (int32_t n = 8; n <= 8192; n += 16) {
    if (few && below(40) != 0) continue;
    int32_t const group = 32 << below(3);
    int32_t const groups = 1 + below(std::max<int64_t>(1, std::min<int64_t>(16384, most / n) / group));
    bool const row = below(8) == 0;  // one group for the whole row
    LayerConfig const layer{
        n, groups * group, row ? groups * group : group, below(4) != 0, below(2) != 0, below(3) == 0};
    cases.push_back({layer, {1 + below(kDecodeMaxTokens), 1 + below(kDecodeMaxTokens + 8)}});
  }
  cases.push_back({{8, 16384, 128, true, true, false}, {1, 31}});
  if (!few) cases.push_back({{8184, 16384, 128, true, true, false}, {1, 17}});
  return cases;
}

std::string NameOf(LayerConfig const& l, ActivationType type, int32_t tactic, size_t offset) {
  char text[160];
  std::snprintf(text, sizeof(text), "n=%d k=%d group=%d zeros=%d bias=%d pre_scale=%d outputs=%d %s tactic=%d%s",
                l.out_features, l.in_features, l.group_size, l.has_zeros, l.has_bias, l.has_pre_scale, l.outputs,
                type == ActivationType::kHalf ? "fp16" : "bf16", tactic, offset != 0 ? " unaligned" : "");
  return text;
}

struct Outcome {
  bool ok = true;
  double worst = 0;  // error / tolerance
  double max_error = 0;
  std::string problem;
  void Fail(std::string const& text) {
    if (ok) problem = text;
    ok = false;
  }
};

// Y of one call, twice, into poisoned memory: same bits, right values, nothing written around any output.
void CheckCall(RunningPlugin& plugin, Where where, RandomLayer const& layer, Reference const& reference, int32_t tactic,
               int32_t tokens, size_t offset, std::vector<void const*> const& inputs, cudaStream_t stream,
               Outcome& outcome) {
  std::vector<int32_t> const widths = WidthsOf(layer.config);
  std::vector<size_t> begins;  // of each output in one buffer, guards between them
  size_t elements = kGuard;
  for (int32_t width : widths) {
    begins.push_back(elements);
    elements += static_cast<size_t>(tokens) * width + kGuard;
  }
  std::vector<uint16_t> const poison(elements, kPoison);
  std::vector<uint16_t> y[2] = {poison, poison};
  for (std::vector<uint16_t>& result : y) {
    Buffer buffer(where, poison.data(), 2 * poison.size(), offset, emulator::Memory::kWritable);
    std::vector<void*> outputs;
    for (size_t begin : begins) outputs.push_back(buffer.get() + 2 * begin);
    int32_t const status = plugin.Run(where, layer.type, tactic, tokens, inputs, outputs, stream);
    if (status != 0) return outcome.Fail("the plugin returned " + std::to_string(status));
    buffer.Download(result.data());
  }
  if (y[0] != y[1]) outcome.Fail("two runs differ at " + std::to_string(tokens) + " tokens");

  size_t const size = static_cast<size_t>(tokens) * layer.config.out_features;
  size_t const stride = std::max<size_t>(1, size / kMaxCompared);
  size_t guard = 0, compared = 0;
  int32_t first_n = 0;
  for (size_t output = 0; output < widths.size(); ++output) {
    for (; guard < begins[output]; ++guard) {
      if (y[0][guard] != kPoison) outcome.Fail("wrote outside of Y");
    }
    for (int32_t token = 0; token < tokens; ++token) {
      for (int32_t n = first_n; n < first_n + widths[output]; ++n, ++guard, ++compared) {
        double const value = Decode(FormatOf(layer.type), y[0][guard]);
        bool const wanted = compared % stride == 0 || compared + 1 == size;
        if (!wanted && !std::isnan(value)) continue;
        Expected const expected = reference.At(token, n);
        double const error = std::fabs(value - expected.value);
        if (error <= expected.tolerance) {
          outcome.max_error = std::max(outcome.max_error, error);
          outcome.worst = std::max(outcome.worst, error / expected.tolerance);
          continue;
        }
        char text[160];
        std::snprintf(text, sizeof(text), "%d tokens: Y[%d, %d] is %g, should be %g +- %g", tokens, token, n, value,
                      expected.value, expected.tolerance);
        return outcome.Fail(text);
      }
    }
    first_n += widths[output];
  }
  for (; guard < elements; ++guard) {
    if (y[0][guard] != kPoison) outcome.Fail("wrote outside of Y");
  }
}

void CheckLayer(Library const& library, Where where, LayerCase const& layer_case, ActivationType type,
                std::vector<int32_t> const& tactics, size_t offset, uint64_t seed, cudaStream_t stream,
                Report& report) {
  LayerConfig const& config = layer_case.layer;
  int32_t const most = *std::max_element(layer_case.tokens.begin(), layer_case.tokens.end());
  RandomLayer const layer = MakeRandomLayer(config, type, most, seed);
  Reference const reference(layer);
  RunningPlugin plugin(library, config);
  for (int32_t tactic : tactics) {
    Outcome outcome;
    if (!plugin.ready()) outcome.Fail("no plugin could be made");
    for (int32_t tokens : layer_case.tokens) {
      if (!outcome.ok) break;
      emulator::ForgetMemory();
      // X is as long as this call needs: reading beyond it is an error on the emulator
      Buffer const x(where, layer.x.data(), 2 * static_cast<size_t>(tokens) * config.in_features, offset,
                     emulator::Memory::kProduced);
      Buffer const qweight(where, layer.qweight.data(), 4 * layer.qweight.size());
      Buffer const scales(where, layer.scales.data(), 2 * layer.scales.size());
      Buffer const zeros(where, layer.zeros.data(), layer.zeros.size());
      Buffer const bias(where, layer.bias.data(), 2 * layer.bias.size());
      Buffer const pre_scale(where, layer.pre_scale.data(), 2 * layer.pre_scale.size());
      std::vector<void const*> inputs{x.get(), qweight.get(), scales.get()};
      if (config.has_zeros) inputs.push_back(zeros.get());
      if (config.has_bias) inputs.push_back(bias.get());
      if (config.has_pre_scale) inputs.push_back(pre_scale.get());
      CheckCall(plugin, where, layer, reference, tactic, tokens, offset, inputs, stream, outcome);
    }
    char numbers[160];
    std::snprintf(numbers, sizeof(numbers),
                  "\"token_counts\": %zu, \"max_error\": %.3g, \"error_over_tolerance\": %.3g",
                  layer_case.tokens.size(), outcome.max_error, outcome.worst);
    std::string const gpu = where == Where::kGpu ? "gpu " : "emulated sm_" + std::to_string(emulated_device.sm) + " ";
    report.Check(gpu + NameOf(config, type, tactic, offset), outcome.ok,
                 numbers + (outcome.ok ? "" : ", \"problem\": " + Quote(outcome.problem)));
  }
}

}  // namespace

std::string DescribeGpu(std::string& reason) {
  int32_t count = 0;
  cudaError_t error = cudaGetDeviceCount(&count);
  cudaDeviceProp properties;
  if (error == cudaSuccess && count > 0) error = cudaGetDeviceProperties(&properties, 0);
  if (error != cudaSuccess || count == 0) {
    reason = error != cudaSuccess ? cudaGetErrorString(error) : "CUDA sees no device";
    return "";
  }
  char text[320];
  std::snprintf(text, sizeof(text), "%s, compute capability %d.%d", properties.name, properties.major,
                properties.minor);
  return text;
}

int64_t CountGpuLaunches() {
  return static_cast<int64_t>(ManyCases().size()) * 4 * kTacticCount +
         static_cast<int64_t>(TailCases(false, 1).size()) + 3;
}

void CheckLaunches(Library const& library, Where where, bool few, uint64_t seed, Report& report) {
  cudaStream_t stream = nullptr;
  if (where == Where::kGpu) Must(cudaStreamCreate(&stream), "cudaStreamCreate");
  std::vector<int32_t> tactics;
  for (Tactic const& tactic : kTactics) tactics.push_back(tactic.id);
  for (LayerCase const& layer_case : few ? FewCases() : ManyCases()) {
    for (ActivationType type : {ActivationType::kHalf, ActivationType::kBfloat16}) {
      for (size_t offset : {0, 2}) {
        if (offset != 0 && few && layer_case.layer.in_features > 200) continue;  // minutes
        CheckLayer(library, where, layer_case, type, tactics, offset, ++seed, stream, report);
      }
      if (where != Where::kEmulator) continue;
      Device const usual = emulated_device;
      LayerCase large{layer_case.layer, {}};  // what runs on wgmma there
      for (int32_t tokens : layer_case.tokens) {
        if (tokens > kDecodeMaxTokens) large.tokens.push_back(tokens);
      }
      emulated_device = type == ActivationType::kHalf ? Device{80, 2, 164 << 10} : Device{120, 3, 100 << 10};
      if (!large.tokens.empty()) CheckLayer(library, where, large, type, tactics, 0, ++seed, stream, report);
      emulated_device = usual;
    }
  }
  // dequantized for cuBLASLt: all at once, and in two pieces of which one belongs to both outputs
  LayerConfig pieces{1040, 512, 128, true, true, true, 2, {800, 240}}, once{136, 96, 32, true, true, false};
  pieces.workspace_mib = 33;
  CheckLayer(library, where, {pieces, {kDequantizeTokens + 3}}, ActivationType::kHalf, {5}, 0, ++seed, stream, report);
  for (ActivationType type : {ActivationType::kHalf, ActivationType::kBfloat16}) {
    CheckLayer(library, where, {once, {kDequantizeTokens + 9}}, type, {5}, 2, ++seed, stream, report);
  }
  for (LayerCase const& layer_case : TailCases(few, seed)) {
    ++seed;
    ActivationType const type = seed % 2 == 0 ? ActivationType::kHalf : ActivationType::kBfloat16;
    CheckLayer(library, where, layer_case, type, {tactics[seed / 2 % kTacticCount]}, 0, seed, stream, report);
  }
  if (stream != nullptr) Must(cudaStreamDestroy(stream), "cudaStreamDestroy");
}

int RunFileCase(Library const& library, Where where, FileCase const& c) {
  std::ifstream file(c.input, std::ios::binary);
  std::vector<char> const data{std::istreambuf_iterator<char>(file), {}};
  std::vector<InputSpec> const specs = InputsOf(c.layer, DataTypeOf(c.type), {c.tokens, c.layer.in_features});
  std::vector<std::unique_ptr<Buffer>> buffers;
  std::vector<void const*> inputs;
  size_t used = 0;
  for (InputSpec const& spec : specs) {
    size_t bytes = spec.type == nvinfer1::DataType::kINT32 ? 4 : 2;
    for (int32_t i = 0; i < spec.dims.nbDims; ++i) bytes *= spec.dims.d[i];
    if (used + bytes > data.size()) break;
    buffers.push_back(std::make_unique<Buffer>(where, data.data() + used, bytes));
    inputs.push_back(buffers.back()->get());
    used += bytes;
  }
  if (inputs.size() != specs.size() || used != data.size()) {
    std::fprintf(stderr, "%s has %zu bytes, the inputs of this layer are of another size\n", c.input.c_str(),
                 data.size());
    return 2;
  }
  std::vector<uint16_t> y(static_cast<size_t>(c.tokens) * c.layer.out_features, kPoison);
  Buffer const output(where, y.data(), 2 * y.size(), 0, emulator::Memory::kWritable);
  RunningPlugin plugin(library, c.layer);
  if (!plugin.ready() || plugin.Run(where, c.type, c.tactic, c.tokens, inputs, {output.get()}, nullptr) != 0) return 1;
  output.Download(y.data());
  std::ofstream(c.output, std::ios::binary).write(reinterpret_cast<char*>(y.data()), 2 * y.size());
  return 0;
}

}  // namespace awq_trt
