#include "interface_checks.h"

#include <algorithm>
#include <cstring>
#include <set>

#include "loggers.h"
#include "plan/kernels.h"

namespace awq_trt {
namespace {

using nvinfer1::DataType;
using nvinfer1::PluginFieldType;

constexpr LayerConfig kFull{72, 96, 32, true, true, true};
constexpr LayerConfig kBare{72, 96, 96, false, false, false};
constexpr LayerConfig kFused{72, 96, 32, true, true, true, 3, {40, 24, 8}};

// `text` must have been logged: a failure without a reason is a failure of the check.
void CheckLogged(Report& report, Log10& log, std::string const& name, bool refused, std::string const& text) {
  std::string const logged = log.Take();
  bool const ok = refused && logged.find(text) != std::string::npos;
  report.Check(name, ok, "\"message\": " + Quote(logged));
}

void CheckCreator(Library const& library, Report& report) {
  int32_t count = 0;
  library.get_creators(count);
  nvinfer1::IPluginCreatorV3One* creator = CreatorOf(library);
  report.Check("one creator: W4A16Gemm, version 1, no namespace",
               count == 1 && std::string(creator->getPluginName()) == "W4A16Gemm" &&
                   std::string(creator->getPluginVersion()) == "1" &&
                   std::string(creator->getPluginNamespace()).empty());
  nvinfer1::PluginFieldCollection const* names = creator->getFieldNames();
  std::string listed;
  bool all_int32 = true;
  for (int32_t i = 0; i < names->nbFields; ++i) {
    listed += std::string(names->fields[i].name) + " ";
    all_int32 &= names->fields[i].type == PluginFieldType::kINT32 && names->fields[i].length == 1;
  }
  report.Check("field names: seven int32",
               all_int32 && listed == "out_features in_features group_size has_zeros has_bias has_pre_scale splits ");
}

void CheckFields(Library const& library, Log10& log, Report& report) {
  struct BadField {
    char const* name;
    Field field;
    char const* message;
  };
  BadField const bad[] = {
      {"out_features of a wrong type", {"out_features", 72, PluginFieldType::kINT64}, "field 'out_features' is INT64"},
      {"in_features as a float", {"in_features", 96, PluginFieldType::kFLOAT32}, "field 'in_features' is FLOAT32"},
      {"group_size with two values", {"group_size", 32, PluginFieldType::kINT32, 2}, "with 2 values"},
      {"group_size with no values", {"group_size", 32, PluginFieldType::kINT32, 0}, "with 0 values"},
      {"has_zeros without data", {"has_zeros", 1, PluginFieldType::kINT32, 1, true}, "and no data"},
      {"has_zeros=2", {"has_zeros", 2}, "field 'has_zeros' is 2, need 0 or 1"},
      {"has_bias=-1", {"has_bias", -1}, "field 'has_bias' is -1, need 0 or 1"},
      {"has_pre_scale=7", {"has_pre_scale", 7}, "field 'has_pre_scale' is 7, need 0 or 1"},
      {"out_features=0", {"out_features", 0}, "out_features 0 is not a multiple of 8 between 8 and 1048576"},
      {"out_features=-8", {"out_features", -8}, "out_features -8 "},
      {"out_features=12", {"out_features", 12}, "out_features 12 "},
      {"out_features too large", {"out_features", (1 << 20) + 8}, "out_features 1048584 "},
      {"in_features=16", {"in_features", 16}, "in_features 16 is not a multiple of 32 between 32 and 1048576"},
      {"in_features=0", {"in_features", 0}, "in_features 0 "},
      {"group_size=0", {"group_size", 0}, "group_size 0 is not 32, 64, 128 or the whole row"},
      {"group_size=-1", {"group_size", -1}, "group_size -1 "},
      {"group_size=48", {"group_size", 48}, "group_size 48 "},
      {"group_size that does not divide", {"group_size", 64}, "in_features 96 is not a multiple of the group_size 64"},
  };
  for (BadField const& b : bad) {
    std::vector<Field> fields = FieldsOf(kFull);
    for (Field& field : fields) {
      if (field.name == b.field.name) field = b.field;
    }
    CheckLogged(report, log, std::string("bad field: ") + b.name, CreatePlugin(library, fields) == nullptr, b.message);
  }
  for (char const* required : {"out_features", "in_features", "group_size"}) {
    std::vector<Field> fields;
    for (Field const& field : FieldsOf(kFull)) {
      if (field.name != required) fields.push_back(field);
    }
    CheckLogged(report, log, std::string("bad field: no ") + required, CreatePlugin(library, fields) == nullptr,
                std::string("field '") + required + "' is missing");
  }
  std::vector<Field> twice = FieldsOf(kFull);
  twice.push_back({"out_features", 80});
  CheckLogged(report, log, "bad field: out_features twice", CreatePlugin(library, twice) == nullptr, "given twice");
  CheckLogged(report, log, "bad field: no fields at all",
              CreatorOf(library)->createPlugin(nullptr, nullptr, nvinfer1::TensorRTPhase::kBUILD) == nullptr,
              "'out_features' is missing");

  struct BadSplits {
    std::vector<int32_t> values;
    char const* message;
  };
  for (BadSplits const& b : {BadSplits{{40, 24}, "splits add up to 64, need out_features 72"},
                             BadSplits{{36, 36}, "splits[0] is 36, need a multiple of 8"},
                             BadSplits{{72, 0}, "splits[1] is 0, need a multiple of 8"},
                             BadSplits{{80, -8}, "splits[1] is -8, need a multiple of 8"},
                             BadSplits{{24, 16, 16, 8, 8}, "field 'splits' is INT32 with 5 values, need 1 to 4"}}) {
    std::vector<Field> fields = FieldsOf(kFull);
    fields.push_back({"splits", 0, PluginFieldType::kINT32, 1, false, b.values});
    CheckLogged(report, log, std::string("bad field: ") + b.message, CreatePlugin(library, fields) == nullptr,
                b.message);
  }
  std::vector<Field> one = FieldsOf(kFull);
  one.push_back({"splits", 72});
  std::vector<Field> none = FieldsOf(kFull);
  none.push_back({"splits", 0, PluginFieldType::kINT32, 0, true});
  for (std::vector<Field> const& fields : {one, none}) {
    Plugin const plugin = CreatePlugin(library, fields);
    report.Check("one split and no split are one output",
                 plugin != nullptr && BuildOf(*plugin)->getNbOutputs() == 1 &&
                     RuntimeOf(*plugin)->getFieldsToSerialize()->nbFields == 6 && log.Take().empty());
  }

  std::vector<Field> unknown = FieldsOf(kFull);
  unknown.push_back({"has_zero", 1});
  CheckLogged(report, log, "unknown field: a warning that names it", CreatePlugin(library, unknown) != nullptr,
              "field 'has_zero' is not known");
  Plugin const few = CreatePlugin(library, {{"out_features", 72}, {"in_features", 96}, {"group_size", 96}});
  bool zero = few != nullptr;
  if (zero) {
    nvinfer1::PluginFieldCollection const* fields = RuntimeOf(*few)->getFieldsToSerialize();
    for (int32_t i = 3; i < 6; ++i) zero &= *static_cast<int32_t const*>(fields->fields[i].data) == 0;
  }
  report.Check("missing has_* mean 0", zero);
}

void CheckShapes(Library const& library, Log10& log, Report& report) {
  for (LayerConfig const& layer : {kFull, kBare, kFused}) {
    Plugin const plugin = CreatePlugin(library, FieldsOf(layer));
    std::vector<int32_t> const widths = WidthsOf(layer);
    int32_t const outputs = BuildOf(*plugin)->getNbOutputs();
    report.Check("number of outputs", outputs == static_cast<int32_t>(widths.size()));
    for (std::vector<int64_t> const& x : std::vector<std::vector<int64_t>>{
             {96}, {5, 96}, {-1, 96}, {2, 3, 96}, {-1, -1, 96}, {1, 2, 3, 96}, {-1, -1}, {0, 96}, {-1, 4, 1, 2, 96}}) {
      ExprBuilder builder;
      std::vector<nvinfer1::DimsExprs> inputs;
      for (InputSpec const& input : InputsOf(layer, DataType::kHALF, x)) {
        inputs.push_back(builder.Expressions(input.dims));
      }
      std::vector<nvinfer1::DimsExprs> ys(outputs);
      bool ok = BuildOf(*plugin)->getOutputShapes(inputs.data(), static_cast<int32_t>(inputs.size()), nullptr, 0,
                                                  ys.data(), outputs, builder) == 0;
      for (int32_t output = 0; ok && output < outputs; ++output) {
        nvinfer1::DimsExprs const& y = ys[output];
        ok &= y.nbDims == static_cast<int32_t>(x.size());
        for (size_t i = 0; ok && i + 1 < x.size(); ++i) ok &= y.d[i] == inputs[0].d[i];  // the very same expression
        ok &= ok && y.d[y.nbDims - 1]->isConstant() && y.d[y.nbDims - 1]->getConstantValue() == widths[output];
      }
      report.Check("output shapes for X of rank " + std::to_string(x.size()), ok);
      CheckLogged(report, log, "a wrong number of outputs",
                  BuildOf(*plugin)->getOutputShapes(inputs.data(), static_cast<int32_t>(inputs.size()), nullptr, 0,
                                                    ys.data(), outputs + 1, builder) != 0,
                  "outputs, need " + std::to_string(outputs));
    }
  }

  // every input of a wrong shape, seen by each function that is told shapes
  Plugin const plugin = CreatePlugin(library, FieldsOf(kFull));
  std::vector<InputSpec> const good = InputsOf(kFull, DataType::kHALF, {5, 96});
  int32_t const count = static_cast<int32_t>(good.size());
  for (size_t wrong = 0; wrong < good.size(); ++wrong) {
    std::vector<InputSpec> inputs = good;
    inputs[wrong].dims.d[inputs[wrong].dims.nbDims - 1] += 1;
    std::string const expected = inputs[wrong].name + " has shape [";
    ExprBuilder builder;
    std::vector<nvinfer1::DimsExprs> expressions;
    for (InputSpec const& input : inputs) expressions.push_back(builder.Expressions(input.dims));
    nvinfer1::DimsExprs y{};
    CheckLogged(report, log, "wrong shape of " + inputs[wrong].name + " in getOutputShapes",
                BuildOf(*plugin)->getOutputShapes(expressions.data(), count, nullptr, 0, &y, 1, builder) != 0,
                expected);
    CheckLogged(report, log, "wrong shape of " + inputs[wrong].name + " in configurePlugin",
                BuildOf(*plugin)->configurePlugin(DynamicDescsOf(inputs).data(), count, nullptr, 1) != 0, expected);
    CheckLogged(report, log, "wrong shape of " + inputs[wrong].name + " in onShapeChange",
                RuntimeOf(*plugin)->onShapeChange(DescsOf(inputs).data(), count, nullptr, 1) != 0, expected);
  }
  CheckLogged(report, log, "an input too few",
              BuildOf(*plugin)->configurePlugin(DynamicDescsOf(good).data(), count - 1, nullptr, 1) != 0,
              "5 inputs, need 6");
  report.Check("right shapes are accepted",
               BuildOf(*plugin)->configurePlugin(DynamicDescsOf(good).data(), count, nullptr, 1) == 0 &&
                   RuntimeOf(*plugin)->onShapeChange(DescsOf(good).data(), count, nullptr, 1) == 0 &&
                   log.Take().empty());
}

void CheckTypes(Library const& library, Log10& log, Report& report) {
  Plugin const plugin = CreatePlugin(library, FieldsOf(kFull));
  for (DataType type : {DataType::kHALF, DataType::kBF16, DataType::kFLOAT, DataType::kINT32, DataType::kINT8}) {
    bool const supported = type == DataType::kHALF || type == DataType::kBF16;
    std::vector<InputSpec> const inputs = InputsOf(kFull, type, {5, 96});
    std::vector<DataType> types;
    for (InputSpec const& input : inputs) types.push_back(input.type);
    int32_t const count = static_cast<int32_t>(types.size());
    DataType y = DataType::kBOOL;
    int32_t const status = BuildOf(*plugin)->getOutputDataTypes(&y, 1, types.data(), count);
    std::string const name = "type " + std::to_string(static_cast<int>(type)) + " of X";
    if (supported) {
      report.Check("output " + name, status == 0 && y == type && log.Take().empty());
    } else {
      CheckLogged(report, log, name + " refused", status != 0, "need HALF or BF16");
    }

    // formats: exactly one combination per supported type, each wrong type or format at each place refused
    std::vector<nvinfer1::DynamicPluginTensorDesc> tensors = DynamicDescsOf(inputs);
    tensors.push_back(tensors[0]);
    bool all = true, strict = true;
    for (int32_t position = 0; position <= count; ++position) {
      all &= BuildOf(*plugin)->supportsFormatCombination(position, tensors.data(), count, 1);
      for (int32_t other = 0; other <= static_cast<int32_t>(DataType::kINT4); ++other) {
        auto changed = tensors;
        changed[position].desc.type = static_cast<DataType>(other);
        bool const same = changed[position].desc.type == tensors[position].desc.type;
        bool const both = position == 0 && (other == static_cast<int32_t>(DataType::kHALF) ||
                                            other == static_cast<int32_t>(DataType::kBF16));
        if (same || both) continue;
        strict &= !BuildOf(*plugin)->supportsFormatCombination(position, changed.data(), count, 1);
      }
      auto changed = tensors;
      changed[position].desc.format = nvinfer1::TensorFormat::kCHW2;
      strict &= !BuildOf(*plugin)->supportsFormatCombination(position, changed.data(), count, 1);
    }
    report.Check("formats for " + name, supported ? all && strict : !all);
  }
  std::vector<InputSpec> const good = InputsOf(kFull, DataType::kHALF, {5, 96});
  for (size_t wrong = 1; wrong < good.size(); ++wrong) {
    std::vector<DataType> types;
    for (InputSpec const& input : good) types.push_back(input.type);
    types[wrong] = DataType::kFLOAT;
    DataType y;
    CheckLogged(report, log, "type FLOAT of " + good[wrong].name + " refused",
                BuildOf(*plugin)->getOutputDataTypes(&y, 1, types.data(), static_cast<int32_t>(types.size())) != 0,
                good[wrong].name + " is of type FLOAT");
  }
}

void CheckTactics(Library const& library, Log10& log, Report& report) {
  Plugin const plugin = CreatePlugin(library, FieldsOf(kFull));
  int32_t const count = BuildOf(*plugin)->getNbTactics();
  std::vector<int32_t> tactics(count, 0);
  bool ok = count > 0 && BuildOf(*plugin)->getValidTactics(tactics.data(), count) == 0;
  std::set<int32_t> const unique(tactics.begin(), tactics.end());
  ok &= static_cast<int32_t>(unique.size()) == count && unique.count(0) == 0;
  for (int32_t tactic : tactics) ok &= RuntimeOf(*plugin)->setTactic(tactic) == 0;
  ok &= RuntimeOf(*plugin)->setTactic(0) == 0;
  report.Check("tactics are unique, not 0, and can be set", ok && log.Take().empty());
  CheckLogged(report, log, "an unknown tactic", RuntimeOf(*plugin)->setTactic(1000) != 0, "tactic 1000 is not known");
  CheckLogged(report, log, "a wrong number of tactics",
              BuildOf(*plugin)->getValidTactics(tactics.data(), count - 1) != 0, "getNbTactics said");

  auto workspace = [](nvinfer1::IPluginV3& plugin, LayerConfig const& layer, std::vector<int64_t> const& x) {
    std::vector<InputSpec> const inputs = InputsOf(layer, DataType::kHALF, x);
    return BuildOf(plugin)->getWorkspaceSize(DynamicDescsOf(inputs).data(), static_cast<int32_t>(inputs.size()),
                                             nullptr, 1);
  };
  report.Check("a K of one K-block needs no workspace", workspace(*plugin, kFull, {5, 96}) == 0);
  LayerConfig const large{4096, 14336, 128, true, false, false};
  Plugin const large_plugin = CreatePlugin(library, FieldsOf(large));
  bool sizes = workspace(*large_plugin, large, {0, 14336}) == 0;
  for (std::vector<int64_t> const& x :
       std::vector<std::vector<int64_t>>{{1, 14336}, {32, 14336}, {2, 16, 14336}, {3, 100, 14336}}) {
    int64_t tokens = 1;
    for (size_t i = 0; i + 1 < x.size(); ++i) tokens *= x[i];
    sizes &= workspace(*large_plugin, large, x) == WorkspaceBytes(large, tokens);
  }
  for (std::vector<int64_t> const& x : std::vector<std::vector<int64_t>>{{1 << 20, 1 << 20, 14336}, {8, -1, 14336}}) {
    sizes &= workspace(*large_plugin, large, x) == WorkspaceBytes(large, kMaxTokens);
  }
  report.Check("the workspace is that of the most tokens", sizes);

  Plugin const bare = CreatePlugin(library, FieldsOf(kBare)), fused = CreatePlugin(library, FieldsOf(kFused));
  std::set<std::string> ids;
  for (nvinfer1::IPluginV3* p : {plugin.get(), bare.get(), fused.get()}) {
    ids.insert(BuildOf(*p)->getTimingCacheID());
  }
  for (DataType type : {DataType::kHALF, DataType::kBF16}) {
    std::vector<InputSpec> const typed = InputsOf(kFused, type, {5, 96});
    BuildOf(*fused)->configurePlugin(DynamicDescsOf(typed).data(), static_cast<int32_t>(typed.size()), nullptr, 3);
    ids.insert(BuildOf(*Plugin(fused->clone()))->getTimingCacheID());
  }
  std::string listed;
  bool whole = ids.size() == 5;
  for (std::string const& id : ids) {
    listed += id + " ";
    whole &= id.find("awq_trt-") == 0 && id.find("-sm") != std::string::npos;
  }
  whole &= listed.find("-BF16-n72-k96-g32-z1-b1-p1-y40-y24-y8 ") != std::string::npos;
  report.Check("timing cache ids tell layers, types and outputs apart", whole, "\"ids\": " + Quote(listed));
}

void CheckSerialization(Library const& library, Log10& log, Report& report) {
  bool ok = true;
  for (int32_t flags = 0; flags < 8; ++flags) {
    LayerConfig layer{136, 256, 128, (flags & 1) != 0, (flags & 2) != 0, (flags & 4) != 0};
    if (flags % 3 == 0) layer.outputs = 2, layer.splits[0] = 96, layer.splits[1] = 40;
    Plugin const built = CreatePlugin(library, FieldsOf(layer));
    Plugin restored(CreatorOf(library)->createPlugin("restored", RuntimeOf(*built)->getFieldsToSerialize(),
                                                     nvinfer1::TensorRTPhase::kRUNTIME));
    ok &= restored != nullptr;
    if (!ok) break;
    Plugin const copy(restored->clone());
    restored.reset();  // a clone owns what it serializes
    std::vector<Field> const expected = FieldsOf(layer);
    for (nvinfer1::IPluginV3* plugin : {built.get(), copy.get()}) {
      nvinfer1::PluginFieldCollection const* fields = RuntimeOf(*plugin)->getFieldsToSerialize();
      ok &= fields->nbFields == static_cast<int32_t>(expected.size());
      for (size_t i = 0; ok && i < expected.size(); ++i) {
        nvinfer1::PluginField const& field = fields->fields[i];
        std::vector<int32_t> values = expected[i].values;
        if (values.empty()) values = {static_cast<int32_t>(expected[i].value)};
        int32_t const* data = static_cast<int32_t const*>(field.data);
        ok &= expected[i].name == field.name && field.type == PluginFieldType::kINT32 &&
              field.length == static_cast<int32_t>(values.size()) && std::equal(values.begin(), values.end(), data);
      }
    }
    ok &= std::string(CoreOf(*copy)->getPluginName()) == "W4A16Gemm";
  }
  report.Check("serialization and clone keep every field", ok && log.Take().empty());
}

void CheckEnqueueArguments(Library const& library, Log10& log, Report& report) {
  Plugin const plugin = CreatePlugin(library, FieldsOf(kFull));
  alignas(256) static char memory[512];
  for (size_t wrong = 0; wrong < 7; ++wrong) {
    for (bool null : {false, true}) {
      std::vector<InputSpec> const inputs = InputsOf(kFull, DataType::kHALF, {5, 96});
      std::vector<void const*> pointers(inputs.size(), memory);
      void* y = memory;
      char* const bad = null ? nullptr : memory + 1;
      if (wrong < inputs.size()) {
        pointers[wrong] = bad;
      } else {
        y = bad;
      }
      std::string const name = wrong < inputs.size() ? inputs[wrong].name : "Y";
      CheckLogged(
          report, log, (null ? "no address of " : "odd address of ") + name,
          RuntimeOf(*plugin)->enqueue(DescsOf(inputs).data(), nullptr, pointers.data(), &y, nullptr, nullptr) != 0,
          name + " is at address");
    }
  }
  for (std::vector<int64_t> const& x : std::vector<std::vector<int64_t>>{{0, 96}, {4, 0, 96}}) {
    std::vector<void const*> const pointers(6, nullptr);
    void* y = nullptr;
    report.Check("no tokens: nothing is touched",
                 RuntimeOf(*plugin)->enqueue(DescsOf(InputsOf(kFull, DataType::kHALF, x)).data(), nullptr,
                                             pointers.data(), &y, nullptr, nullptr) == 0);
  }
  std::vector<void const*> const pointers(6, memory);
  void* y = memory;
  CheckLogged(report, log, "too many tokens",
              RuntimeOf(*plugin)->enqueue(DescsOf(InputsOf(kFull, DataType::kHALF, {1 << 20, 1 << 20, 96})).data(),
                                          nullptr, pointers.data(), &y, nullptr, nullptr) != 0,
              "limit 1073741824");
}

// A product of too many tiles is refused before anything is launched, and the message names the tactic.
void CheckTooManyTiles(Log10& log, Report& report) {
  Library const library = EmulatedLibrary();
  library.set_logger_finder(log.AsFinder());
  LayerConfig widest{1 << 20, 32, 32, false, false, false};
  widest.workspace_mib = 0;  // so that no tactic leaves it to cuBLASLt
  Plugin const plugin = CreatePlugin(library, FieldsOf(widest));
  alignas(256) static char memory[256];
  std::vector<void const*> const pointers(3, memory);
  void* y = memory;
  for (Tactic const& tactic : kTactics) {
    RuntimeOf(*plugin)->setTactic(tactic.id);
    Plugin const copy(plugin->clone());
    std::vector<InputSpec> const inputs = InputsOf(widest, DataType::kHALF, {kMaxTokens, 32});
    CheckLogged(report, log, "too many tiles; a clone keeps tactic " + std::to_string(tactic.id),
                RuntimeOf(*copy)->enqueue(DescsOf(inputs).data(), nullptr, pointers.data(), &y, memory, nullptr) != 0,
                "group_size=32, tactic " + std::to_string(tactic.id));
  }
  library.set_logger_finder(nullptr);
}

void CheckLoggers(Library const& library, Log10& log, Report& report) {
  Log11 log11;
  Finder11 finder11(log11);
  library.set_logger_finder(&finder11);
  CreatePlugin(library, {});
  report.Check("a logger of TensorRT 11 gets the message",
               log11.Take().find("W4A16Gemm: test_layer: field") == 0 && log.Take().empty());
  library.set_logger_finder(log.AsFinder());
  CreatePlugin(library, {});
  report.Check("a logger of TensorRT 10 gets the message",
               log.Take().find("W4A16Gemm: test_layer: field") == 0 && log11.Take().empty());
}

}  // namespace

void CheckInterface(Library const& library, Report& report) {
  Log10 log;
  library.set_logger_finder(log.AsFinder());
  CheckCreator(library, report);
  CheckFields(library, log, report);
  CheckShapes(library, log, report);
  CheckTypes(library, log, report);
  CheckTactics(library, log, report);
  CheckSerialization(library, log, report);
  CheckEnqueueArguments(library, log, report);
  CheckTooManyTiles(log, report);
  CheckLoggers(library, log, report);
  library.set_logger_finder(nullptr);
}

}  // namespace awq_trt
