"""Load a plan, run every optimization profile on random inputs, compare every output with its ONNX file.

    python tools/run_plan.py out.plan out.onnx

Prints one JSON object: {"ran": true, "agrees": bool, "profiles": [...]} or {"ran": false, "refusal": text} with the
words of whatever refused. Started by tools/gpu_check.py in a process of its own, since a runtime may abort it.
Needs TensorRT or TensorRT-RTX, PyTorch with CUDA (device memory) and ONNX Runtime (the reference, on the CPU).
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

TOLERANCE = {"float16": 0.02, "bfloat16": 0.06, "float32": 0.02}
"""Largest relative error, ||engine - onnx|| / ||onnx||: fp16 and bf16 activations through a whole network."""


class RefusedError(Exception):
    """Something here cannot load or run the plan; the text is its own words."""


def runtimes(plan: Path) -> list[str]:
    """Module names to try: the one that the sidecar says built the plan, else both."""
    sidecar = plan.with_name(plan.name + ".json")
    if sidecar.is_file():
        built_by = json.loads(sidecar.read_text()).get("versions", {})
        if "runtime" in built_by:
            return [built_by["runtime"]]
    return ["tensorrt_rtx", "tensorrt"]


def collecting_logger(trt: Any, words: list[str]) -> Any:
    """An ILogger that appends warnings and worse to `words`."""

    class Logger(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, text: str) -> None:
            if severity <= trt.ILogger.WARNING:
                words.append(text)

    return Logger()


def load(plan: Path) -> tuple[Any, Any, list[str]]:
    """(TensorRT module, engine, what it logged)."""
    words: list[str] = []
    for name in runtimes(plan):
        try:
            trt = importlib.import_module(name)
        except ImportError as error:
            words.append(f"{name}: {error}")
            continue

        logger = collecting_logger(trt, words)
        try:
            runtime = trt.Runtime(logger)
            runtime.engine_host_code_allowed = True  # the plan brings its plugin
            engine = runtime.deserialize_cuda_engine(plan.read_bytes())
        except Exception as error:
            words.append(f"{name}: {error}")
            continue
        if engine is not None:
            _KEEP.extend([logger, runtime])
            return trt, engine, words
    raise RefusedError("\n".join(words) or "the engine could not be deserialized, and nothing said why")


_KEEP: list[Any] = []  # the logger and the runtime must outlive the engine


def random_inputs(trt: Any, torch: Any, engine: Any, profile: int) -> dict[str, Any]:
    """Inputs by name, CPU tensors of the profile's optimal shapes; ids below 100, masks of ones, the rest normal."""
    dtypes = {
        trt.DataType.HALF: torch.float16,
        trt.DataType.BF16: torch.bfloat16,
        trt.DataType.FLOAT: torch.float32,
        trt.DataType.INT64: torch.int64,
        trt.DataType.INT32: torch.int32,
    }
    inputs = {}
    for i in range(engine.num_io_tensors):
        name = engine.get_tensor_name(i)
        if engine.get_tensor_mode(name) != trt.TensorIOMode.INPUT:
            continue
        shape, dtype = tuple(engine.get_tensor_profile_shape(name, profile)[1]), dtypes[engine.get_tensor_dtype(name)]
        if "mask" in name:
            inputs[name] = torch.ones(shape, dtype=dtype)
        elif dtype.is_floating_point:
            inputs[name] = torch.randn(shape).to(dtype)
        else:
            inputs[name] = torch.randint(0, 100, shape, dtype=dtype)
    return inputs


def run_engine(trt: Any, torch: Any, engine: Any, profile: int, inputs: dict[str, Any]) -> dict[str, Any]:
    """Outputs by name, float32 CPU tensors."""
    context = engine.create_execution_context()
    if context is None:
        raise RefusedError("no execution context could be made")
    stream = torch.cuda.Stream()
    context.set_optimization_profile_async(profile, stream.cuda_stream)
    device = {name: tensor.cuda() for name, tensor in inputs.items()}
    for name, tensor in device.items():
        context.set_input_shape(name, tuple(tensor.shape))
        context.set_tensor_address(name, tensor.data_ptr())
    dtypes = {trt.DataType.HALF: torch.float16, trt.DataType.BF16: torch.bfloat16, trt.DataType.FLOAT: torch.float32}
    outputs = {}
    for i in range(engine.num_io_tensors):
        name = engine.get_tensor_name(i)
        if engine.get_tensor_mode(name) == trt.TensorIOMode.OUTPUT:
            shape = tuple(context.get_tensor_shape(name))
            outputs[name] = torch.full(shape, float("nan"), dtype=dtypes[engine.get_tensor_dtype(name)], device="cuda")
            context.set_tensor_address(name, outputs[name].data_ptr())
    torch.cuda.synchronize()
    if not context.execute_async_v3(stream.cuda_stream):
        raise RefusedError("execute_async_v3 returned false")
    stream.synchronize()
    return {name: tensor.float().cpu() for name, tensor in outputs.items()}


def run_onnx(torch: Any, onnx: Path, inputs: dict[str, Any], names: list[str]) -> dict[str, Any]:
    """The same in ONNX Runtime on the CPU."""
    import onnxruntime as ort

    session = ort.InferenceSession(str(onnx), providers=["CPUExecutionProvider"])
    bfloat16 = 16  # onnx.TensorProto.BFLOAT16
    feeds = {}
    for name, tensor in inputs.items():
        if tensor.dtype == torch.bfloat16:
            feeds[name] = ort.OrtValue.ortvalue_from_numpy_with_onnx_type(tensor.view(torch.uint16).numpy(), bfloat16)
        else:
            feeds[name] = ort.OrtValue.ortvalue_from_numpy(tensor.numpy())
    found = session.run_with_ort_values(names, feeds)
    return {name: torch.from_dlpack(value).float() for name, value in zip(names, found, strict=True)}


def compare(torch: Any, engine_out: dict[str, Any], onnx_out: dict[str, Any], dtype: str) -> dict[str, Any]:
    """Relative error per output, and whether all are within tolerance; top-1 agreement where there are logits."""
    errors = {
        name: float((engine_out[name] - onnx_out[name]).norm() / onnx_out[name].norm().clamp(min=1e-6))
        for name in onnx_out
    }
    result: dict[str, Any] = {
        "relative_error": errors,
        "tolerance": TOLERANCE[dtype],
        "agrees": all(error <= TOLERANCE[dtype] for error in errors.values()),
    }
    if "logits" in onnx_out:
        same = engine_out["logits"].argmax(-1) == onnx_out["logits"].argmax(-1)
        result["top1_agreement"] = float(same.float().mean())
    return result


def main() -> int:
    """Run every profile; one JSON object on standard output."""
    plan, onnx = Path(sys.argv[1]), Path(sys.argv[2])
    try:
        trt, engine, words = load(plan)
        torch = importlib.import_module("torch")
        if not torch.cuda.is_available():
            raise RefusedError("PyTorch sees no CUDA device")
        torch.manual_seed(0)
        profiles = []
        for profile in range(engine.num_optimization_profiles):
            inputs = random_inputs(trt, torch, engine, profile)
            outputs = run_engine(trt, torch, engine, profile, inputs)
            reference = run_onnx(torch, onnx, inputs, list(outputs))
            floats = [str(t.dtype).removeprefix("torch.") for t in inputs.values() if t.dtype.is_floating_point]
            compared = compare(torch, outputs, reference, floats[0] if floats else "float16")
            shapes = {name: list(tensor.shape) for name, tensor in inputs.items()}
            profiles.append({"profile": profile, "shapes": shapes} | compared)
        agrees = all(p["agrees"] for p in profiles)
        answer = {"ran": True, "agrees": agrees, "runtime": trt.__name__, "version": trt.__version__, "log": words}
        answer["profiles"] = profiles
    except RefusedError as refusal:
        answer = {"ran": False, "refusal": str(refusal)}
    except Exception as error:
        answer = {"ran": False, "refusal": f"{type(error).__name__}: {error}"}
    print(json.dumps(answer))
    return 0


if __name__ == "__main__":
    sys.exit(main())
