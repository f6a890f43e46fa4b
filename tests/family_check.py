"""Model families, from a tiny random checkpoint to an ONNX file that computes the right thing, or a refusal in seconds.

    python tests/family_check.py                        # all of the table
    python tests/family_check.py llama3 gemma2 mamba    # some; also any other model_type of transformers
    python tests/family_check.py --output tools/results/families.json --workers 2

`awq-trt export --onnx` is run as a user would, with few calibration samples. Then a family is

right    exit 0, and (1) the ONNX file in ONNX Runtime gives what transformers gives, which loaded the original
         checkpoint by `from_pretrained` in fp32 and was given the rounded weights; decoders read five rows of
         different lengths in one batch through the cache, in pieces and then token by token. And (2) it differs from
         the original by no more than rounding every weight to 4 bits does, which is done here anew.
refused  exit 2 in less than ten seconds, no traceback, nothing written; and what the message says to try works.
WRONG    anything else.

Seconds: of a refusal, those of the command in a new process, with the import of torch and transformers: on the clock,
and of the processor, which is what is limited here, as the machine may do other work; else of the command alone, in a
process that has imported them. `--output` renews the rows of the families that were run, as they are done.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tools")]

import families  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
import transformers as t  # noqa: E402
from bench.machine import memory_bytes, now, processor, versions, write_json  # noqa: E402
from commands import export  # noqa: E402
from tiny_families import NAMES, UnknownFamilyError, tiny  # noqa: E402

from awq_trt.evaluate.verify import onnx_session  # noqa: E402
from awq_trt.serve.open import open_decoder  # noqa: E402

PATIENCE = 10.0
"""Seconds that a refusal may take."""
SAME, ROUNDING = 0.01, 2.0
"""Most that |difference| / |expected| may be, and how many times the error of plain rounding."""
CAPACITY, LENGTHS, PIECE, PROMPT = 96, (3, 9, 17, 30, 44), 8, 32
"""Tokens of a cache row and of the rows that are read; how many at a time until PROMPT, then one by one."""
CALIBRATION = ("--calibration-samples", 2, "--calibration-length", 64)
ADVICE = r"--no-verify|--kv-cache dynamic|--part [a-z]+|--format qdq"
"""What a message may tell to try, and must work then."""


def inputs_of(cls: Any, config: t.PretrainedConfig, rows: int) -> dict[str, np.ndarray]:
    """Random inputs of an encoder that does not read text; {} for one that does."""
    main = "input_features" if config.model_type == "whisper" else cls.main_input_name
    size = getattr(config, "image_size", 32) or 32
    size = size if isinstance(size, int) else 32
    shapes = {"pixel_values": (3, size, size), "input_values": (800,), "input_features": (16, 64)}
    if main not in shapes:
        return {}
    return {main: np.random.default_rng(rows).standard_normal((rows, *shapes[main])).astype(np.float16)}


def original_model(source: Path, architecture: str) -> t.PreTrainedModel:
    """transformers' model of the checkpoint, or of the part of it that was exported."""
    attention = "sdpa" if getattr(t.AutoConfig.from_pretrained(source), "alibi", False) else "eager"
    whole = {"WhisperEncoder": "WhisperForConditionalGeneration"}.get(architecture, architecture)
    model = getattr(t, whole).from_pretrained(source, dtype=torch.float32, attn_implementation=attention).eval()
    return model if whole == architecture else model.get_encoder()


def rounded(model: t.PreTrainedModel, group: int) -> t.PreTrainedModel:
    """Plain rounding of every matrix inside the model but embeddings, head and routers: 4 bits, a scale and zero point
    for each group of inputs. Round here, not by the package."""
    skipped = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    head = model.get_output_embeddings()
    skipped |= {id(head.weight)} if head is not None else set()
    for name, parameter in model.named_parameters():
        if parameter.dim() not in (2, 3) or id(parameter) in skipped or "position" in name:
            continue
        if min(parameter.shape[-2:]) < 8 or parameter.shape[-1] % group:
            continue
        w = parameter.data.reshape(*parameter.shape[:-1], -1, group)
        low, high = w.amin(-1, keepdim=True).clamp(max=0), w.amax(-1, keepdim=True).clamp(min=0)
        scale = ((high - low) / 15).clamp(min=1e-9)
        zero = (-low / scale).round()
        q = ((w / scale).round() + zero).clamp(0, 15)
        parameter.data = ((q - zero) * scale).reshape(parameter.shape)
    return model


def ask_decoder(onnx: Path, rows: list[list[int]]) -> dict[tuple[int, int], np.ndarray]:
    """Logits of the ONNX file: (row, position) -> what follows it, where a call ended."""
    found = {}
    ids = np.zeros((len(rows), max(LENGTHS) + PIECE), np.int64)
    for line, row in zip(ids, rows, strict=True):
        line[: len(row)] = row
    with open_decoder(onnx, max_batch=len(rows), threads=1) as decoder:
        past = 0
        while past < max(LENGTHS):
            step = PIECE if past < PROMPT else 1
            new = np.clip([len(row) - past for row in rows], 0, step)
            logits = decoder.run(0, ids[:, past : past + step], np.minimum([len(r) for r in rows], past), new)
            found |= {(i, past + int(n) - 1): logits[i] for i, n in enumerate(new) if n}
            past += step
    return found


Answers = tuple[np.ndarray, Callable[[t.PreTrainedModel], np.ndarray]]


def decoder_answers(onnx: Path) -> Answers:
    """Logits of the ONNX file, and how to have those of a model at the same places."""
    random = np.random.default_rng(0)
    rows = [random.integers(3, 384, length).tolist() for length in LENGTHS]
    found = ask_decoder(onnx, rows)

    def ask(model: t.PreTrainedModel) -> np.ndarray:
        with torch.no_grad():
            whole = [model(torch.tensor([row]), use_cache=False).logits[0].float().numpy() for row in rows]
        return np.stack([whole[i][place] for i, place in found])

    return np.stack(list(found.values())), ask


def encoder_answers(onnx: Path, session: Any, inputs: dict[str, np.ndarray]) -> Answers:
    """The first output of the ONNX file, and how to have that of a model."""
    real: Any = slice(None)
    if not inputs:
        ids = np.random.default_rng(0).integers(3, 384, (3, 24))
        real = np.ones((3, 24), bool)
        real[1, 9:] = real[2, 20:] = False
        ids[~real] = 1  # the padding token of those that count positions by it
        inputs = {"input_ids": ids, "attention_mask": real.astype(np.int64)}
    names = [i.name for i in session.get_inputs()]
    types = {i.name: np.float16 if i.type == "tensor(float16)" else np.int64 for i in session.get_inputs()}
    given = {n: inputs[n] if n in inputs else np.zeros_like(inputs["input_ids"]) for n in names}
    (output, *_) = session.get_outputs()
    found = session.run([output.name], {n: x.astype(types[n]) for n, x in given.items()})[0].astype(np.float32)
    real = real if found.shape[:2] == (3, 24) else slice(None)

    def ask(model: t.PreTrainedModel) -> np.ndarray:
        tensors = {n: torch.from_numpy(x) for n, x in given.items()}
        with torch.no_grad():
            result = model(**{n: x.float() if x.is_floating_point() else x for n, x in tensors.items()})
        return result[output.name].float().numpy()[real]

    return found[real], ask


def distance(found: np.ndarray, expected: np.ndarray) -> float:
    """|difference| / |expected|, not a number where one of them is."""
    return float(np.linalg.norm(found - expected) / max(float(np.linalg.norm(expected)), 1e-12))


def judge(source: Path, awq: Path, onnx: Path, inputs: dict[str, np.ndarray]) -> dict[str, Any]:
    """What the ONNX file computes, against transformers."""
    quantized = json.loads((awq / "config.json").read_text())
    session = onnx_session(onnx)
    decoder = any(i.name.startswith("past_key_values") for i in session.get_inputs())
    found, ask = decoder_answers(onnx) if decoder else encoder_answers(onnx, session, inputs)
    model = original_model(source, quantized["architectures"][0])
    original = ask(model)
    plain = distance(ask(rounded(model, 32)), original)
    model.load_state_dict(families.reference(awq).state_dict())
    result = {
        "relative": distance(found, ask(model)),
        "to_original": distance(found, original),
        "plain_rounding": plain,
    }
    right = result["relative"] < SAME and result["to_original"] < ROUNDING * plain + SAME
    return {"outcome": "right" if right else "WRONG"} | {k: float(f"{v:.2g}") for k, v in result.items()}


def in_new_process(arguments: list[str]) -> dict[str, float]:
    """Seconds of the command from its start, on the clock and of the processor, its own processes included."""
    started, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    program = "import sys; from awq_trt.cli.main import main; sys.exit(main())"
    command = [sys.executable, "-c", program, *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    seconds, after = time.monotonic() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    busy = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    if done.returncode != 2 or "Traceback" in done.stderr:
        raise AssertionError(f"in a new process: exit code {done.returncode}: {done.stderr.strip()[-300:]}")
    return {"seconds": round(seconds, 1), "cpu_seconds": round(busy, 1)}


def check(name: str, *, real: bool = True) -> dict[str, Any]:
    """One family. real: also refuse in a process of its own, and limit its time."""
    with tempfile.TemporaryDirectory(prefix="family.") as place:
        folder = Path(place)
        try:
            return {"family": name} | _check(name, folder, real)
        except UnknownFamilyError as error:
            return {"family": name, "outcome": "unknown", "message": str(error)}
        except Exception as error:
            where = [line.strip() for line in traceback.format_exc().splitlines() if 'File "' in line][-1]
            return {"family": name, "outcome": "WRONG", "message": f"{type(error).__name__}: {error}"[:500] + where}


def _check(name: str, folder: Path, real: bool) -> dict[str, Any]:
    config, cls = tiny(name)
    source = families.checkpoint(config, folder / "m", cls=cls)
    inputs = inputs_of(cls, config, 4)
    arguments: list[Any] = ["--model", source, "--onnx", folder / "out.onnx", "--max-seq", CAPACITY, *CALIBRATION]
    if inputs:
        np.savez(folder / "inputs.npz", **inputs)  # type: ignore[arg-type]
        arguments += ["--calibration", folder / "inputs.npz"]
    before = {path.name for path in folder.iterdir()}
    started = time.monotonic()
    result = export(*arguments)
    seconds = {"seconds": round(time.monotonic() - started, 1)}
    if result.returncode == 0:
        found = judge(source, folder / "out.awq", folder / "out.onnx", inputs_of(cls, config, 3))
        return {"outcome": found.pop("outcome"), **seconds, **found}
    message = {"message": result.stderr.replace(f"{folder}/", "")[:600]}
    left = {path.name for path in folder.iterdir()} - before
    if result.returncode != 2 or "Traceback" in result.stderr or left:
        return {"outcome": "WRONG", **seconds, "exit": result.returncode, "left": sorted(left), **message}
    for advice in re.findall(ADVICE, result.stderr):
        if advice.endswith("vision"):
            np.savez(folder / "images.npz", pixel_values=np.ones((2, 3, 32, 32), np.float32))
            advice += f" --calibration {folder}/images.npz"
        again = export(*arguments, *advice.split())
        if again.returncode:
            return {"outcome": "WRONG", **seconds, **message, "advice": f"{advice}: {again.stderr[:300]}"}
    if real:
        seconds = in_new_process(["export", *map(str, arguments)])
    fast = seconds.get("cpu_seconds", 0.0) < PATIENCE
    return {"outcome": "refused" if fast else "WRONG", **seconds, **message}


def quiet() -> None:
    """In a worker: one thread, no talk, and the float model in this process: a new one imports torch each time."""
    from awq_trt.evaluate import float_model
    from awq_trt.evaluate.float_process import work

    def here(_: str, job: dict[str, Any]) -> tuple[dict[str, Any], int, str]:
        try:
            return json.loads(json.dumps({"done": work(job, print)})), 0, ""
        except Exception as error:
            return {"failed": f"{type(error).__name__}: {error}"}, 0, ""

    float_model.run_child = here
    torch.set_num_threads(1)
    t.utils.logging.set_verbosity_error()
    t.utils.logging.disable_progress_bar()


def show(row: dict[str, Any]) -> str:
    numbers = " ".join(f"{key} {row[key]:.1e}" for key in ("relative", "to_original", "plain_rounding") if key in row)
    rest = " ".join(str(row[key]) for key in ("exit", "left", "message", "advice") if key in row)
    return f"{row['family']:20} {row['outcome']:8} {row.get('seconds', ''):>5}  {numbers}{rest}"


def counted(rows: Iterable[dict[str, Any]]) -> dict[str, int]:
    return dict(Counter(row["outcome"] for row in rows))


def record(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write what was found, beside what the file says of other families."""
    known = json.loads(path.read_text())["families"] if path.exists() else {}
    known |= {row["family"]: {key: value for key, value in row.items() if key != "family"} for row in rows}
    found = {
        "date": now(),
        "hardware": {"processor": processor(), "cores": os.cpu_count(), "memory_gib": memory_bytes() >> 30,
                     "load_average": [round(load, 2) for load in os.getloadavg()]},
        "versions": versions(("awq_trt", "torch", "transformers", "onnx", "onnxruntime", "safetensors", "numpy")),
        "outcomes": counted(known.values()),
        "families": {name: known[name] for name in sorted(known)},
    }  # fmt: skip
    write_json(path, found)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="of families (default: all of the table)")
    parser.add_argument("--output", type=Path, help="a record of the outcomes")
    parser.add_argument("--workers", type=int, default=1)
    args = parser.parse_args()
    rows = []
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(args.workers, mp_context=context, initializer=quiet) as pool:
        for future in as_completed([pool.submit(check, name) for name in args.names or NAMES]):
            rows.append(future.result())
            print(show(rows[-1]), flush=True)
            if args.output:
                record(args.output, rows)
    print(counted(rows))
    return int(any(row["outcome"] not in ("right", "refused") for row in rows))


if __name__ == "__main__":
    sys.exit(main())
