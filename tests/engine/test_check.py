"""awq_trt/engine/check.py and tools/check.py: real sidecars of tiny plans against machines that are made up."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from driver_stub import fake_driver
from stand_ins import GIB, RTX_4090, plan_in

from awq_trt.engine import check, plugin, sidecar
from awq_trt.engine.check import FAILS, OK, WARNING, Finding
from awq_trt.engine.driver import Driver, Gpu
from awq_trt.engine.plugin import library_path
from awq_trt.errors import AwqTrtError
from awq_trt.files import sha256

TOOL = Path(__file__).parents[2] / "tools" / "check.py"

TENSORRT = """
__version__ = "10.14.1.48"
class ILogger:
    WARNING = 2
    def __init__(self): pass
class Engine:
    device_memory_size_v2 = 123 << 20
class Registry:
    def load_library(self, path): open({log!r}, "a").write(path + "\\n")
class Runtime:
    def __init__(self, logger): self.logger = logger
    def get_plugin_registry(self): return Registry()
    def deserialize_cuda_engine(self, data):
        {action}
"""


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """What the machine of the test has; change its attributes."""
    here = SimpleNamespace(
        driver=Driver("580.65.06", (13, 0), (RTX_4090,)), version="1.7.1.116", cuda=13, host=64 * GIB
    )
    monkeypatch.setattr(check, "query", lambda: here.driver)
    monkeypatch.setattr(check, "installed", lambda runtime: (here.version, here.cuda))
    monkeypatch.setattr(check, "host_memory", lambda: here.host)
    monkeypatch.setattr(check, "ask", lambda *arguments: {"log": [], "validity": "VALID", "reasons": []})
    return here


def change(engine: Path, **values: Any) -> None:
    """Change values in a sidecar, given as part__key."""
    content = json.loads(sidecar.path_of(engine).read_text())
    for name, value in values.items():
        part, _, key = name.partition("__")
        content[part][key] = value
    sidecar.path_of(engine).write_text(json.dumps(content))


def found(engine: Path, name: str, **options: Any) -> Finding:
    """The one finding of this name."""
    (finding,) = [f for f in check.check(engine, **options) if f.check == name]
    return finding


def test_a_machine_that_fits(tmp_path: Path, machine: SimpleNamespace) -> None:
    engine = plan_in(tmp_path, "tensorrt")
    machine.version = "10.14.1.48"
    findings = check.check(engine)
    assert {f.status for f in findings} == {OK}, findings
    assert all(f.found and not f.advice for f in findings)
    assert [f.check for f in findings] == [
        "GPU", "compute capability", "TensorRT", "driver", "plugin", "GPU memory", "host memory", "disk",
    ]  # fmt: skip


def test_tensorrt_rtx_is_asked_and_its_plugins_are_a_warning(tmp_path: Path, machine: SimpleNamespace) -> None:
    findings = {f.check: f for f in check.check(plan_in(tmp_path))}
    assert findings["header"] == Finding("header", OK, "TensorRT-RTX accepts the plan's header")
    assert findings["plugin layers"].status == WARNING
    assert {f.check for f in findings.values() if f.status != OK} == {"plugin layers"}


@pytest.mark.parametrize(
    ("runtime", "gpu", "built", "status", "advice"),
    [
        ("tensorrt_rtx", "8.6", None, OK, ""),
        ("tensorrt_rtx", "8.6", ("8.9",), FAILS, 'architectures=["8.6"]'),
        ("tensorrt_rtx", "9.0", None, FAILS, 'runtime="tensorrt"'),
        ("tensorrt", "9.0", ("8.9",), FAILS, "on this GPU"),
        ("tensorrt", "9.0", (), WARNING, "on this GPU"),
    ],
)
def test_compute_capability(
    tmp_path: Path, machine: SimpleNamespace, runtime: str, gpu: str, built: Any, status: str, advice: str
) -> None:
    machine.driver = Driver("580", (13, 0), (Gpu("a GPU", gpu, 8 * GIB, 8 * GIB),))
    options = {} if built is None else {"architectures": built}
    finding = found(plan_in(tmp_path, runtime, **options), "compute capability")
    assert finding.status == status
    assert gpu in finding.found
    assert advice in finding.advice


def test_another_model_of_gpu(tmp_path: Path, machine: SimpleNamespace) -> None:
    engine = plan_in(tmp_path, "tensorrt")
    assert not [f for f in check.check(engine) if f.check == "GPU model"]
    machine.driver = Driver("580", (13, 0), (Gpu("NVIDIA L4", "8.9", 8 * GIB, 8 * GIB),))
    finding = found(engine, "GPU model")
    assert (finding.status, finding.found) == (WARNING, "NVIDIA L4; built on NVIDIA GeForce RTX 4090")


def test_no_gpu(tmp_path: Path, machine: SimpleNamespace) -> None:
    engine = plan_in(tmp_path)
    machine.driver = Driver(problem="there is no NVIDIA driver here (libnvidia-ml.so.1 is missing)")
    findings = {f.check: f for f in check.check(engine, load=True)}
    assert (findings["GPU"].status, findings["loading"].status) == (FAILS, FAILS)
    assert "libnvidia-ml.so.1" in findings["GPU"].found
    assert findings["GPU memory"].status == WARNING
    assert "needed" in findings["GPU memory"].found
    assert "header" not in findings
    machine.driver = Driver("580", (13, 0), (RTX_4090,))
    assert "there is no GPU 3: 1 are visible" in found(engine, "GPU", device=3).found


def test_gpus_that_differ_may_be_numbered_otherwise(
    tmp_path: Path, machine: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_DEVICE_ORDER", raising=False)
    machine.driver = Driver("580", (13, 0), (RTX_4090, Gpu("NVIDIA L4", "8.9", 24 * GIB, 23 * GIB)))
    engine = plan_in(tmp_path)
    finding = found(engine, "GPU", device=1)
    assert (finding.status, finding.found) == (WARNING, "NVIDIA L4, 24.0 GiB, one of 2")
    assert "CUDA_DEVICE_ORDER=PCI_BUS_ID" in finding.advice
    monkeypatch.setenv("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    assert found(engine, "GPU", device=1).status == OK


@pytest.mark.parametrize(
    ("version", "status", "words"),
    [
        ("1.7.1.116", OK, "1.7.1.116"),
        ("1.7.1.120", WARNING, "1.7.1.120; the plan was built by 1.7.1.116"),
        ("1.8.0.1", FAILS, "1.8.0.1; the plan was built by 1.7.1.116"),
        ("1.7.0.116", FAILS, "built by"),
        ("", WARNING, "unknown version"),
        (None, FAILS, "is not installed"),
    ],
)
def test_version_of_the_runtime(
    tmp_path: Path, machine: SimpleNamespace, version: str | None, status: str, words: str
) -> None:
    machine.version = version
    finding = found(plan_in(tmp_path), "TensorRT-RTX")
    assert finding.status == status
    assert words in finding.found
    assert finding.advice.startswith("" if status == OK else "pip install tensorrt-rtx-cu13==1.7.1.116")


def test_what_is_really_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensorrt_rtx = pytest.importorskip("tensorrt_rtx")
    assert check.installed("tensorrt_rtx") == (tensorrt_rtx.__version__, 13)
    assert check.installed("tensorrt_that_is_not") == (None, None)
    (tmp_path / "trt_here").mkdir()
    (tmp_path / "trt_here" / "__init__.py").write_text('raise SystemExit\n__version__ = "10.15.2.3"\n')
    monkeypatch.syspath_prepend(str(tmp_path))
    assert check.installed("trt_here") == ("10.15.2.3", None), "nothing was imported"
    (tmp_path / "trt_here" / "__init__.py").write_text("")
    assert check.installed("trt_here") == ("", None)


def test_driver(tmp_path: Path, machine: SimpleNamespace) -> None:
    engine = plan_in(tmp_path)
    assert found(engine, "driver") == Finding("driver", OK, "580.65.06, runs CUDA up to 13.0")
    machine.driver = Driver("570.10", (12, 8), (RTX_4090,))
    finding = found(engine, "driver")
    assert (finding.status, finding.found) == (
        FAILS, "570.10, runs CUDA up to 12.8; the installed TensorRT-RTX needs CUDA 13",
    )  # fmt: skip
    assert finding.advice == "update the driver to 580.65.06 or newer, or install the package for CUDA 12"
    machine.cuda = 12
    assert found(engine, "driver").status == OK


# ---- the plugin


def test_plugin_beside_the_plan(tmp_path: Path, machine: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = plan_in(tmp_path, plugin_embedded=False)
    finding = found(engine, "plugin")
    assert finding.status == OK
    assert str(library_path().resolve()) in finding.found
    change(engine, plugin__sha256="0" * 64)
    assert (found(engine, "plugin").status, "SHA-256 differs" in found(engine, "plugin").found) == (FAILS, True)
    other = tmp_path / "other.so"
    other.write_bytes(b"\x7fELF AWQ_TRT_PLUGIN_VERSION=0.0.9;")
    change(engine, plugin__path=str(other), plugin__sha256=sha256(other))
    finding = found(engine, "plugin")
    assert finding.status == FAILS
    assert f"{other} is version 0.0.9; the plan needs {plugin.library_version(library_path())}" in finding.found
    other.write_bytes(b"no library")
    assert "is not an awq_trt plugin library" in found(engine, "plugin").found
    other.unlink()
    finding = found(engine, "plugin")
    assert (finding.status, "could not read" in finding.found) == (FAILS, True)
    assert "AWQ_TRT_PLUGIN" in finding.advice
    monkeypatch.setenv(plugin.ENVIRONMENT_VARIABLE, str(library_path()))
    change(engine, plugin__sha256=sha256(library_path()))
    assert found(engine, "plugin").status == OK


def test_no_plugin(tmp_path: Path, machine: SimpleNamespace) -> None:
    engine = plan_in(tmp_path, "tensorrt", "decoder", plugin=False)
    assert found(engine, "plugin") == Finding("plugin", OK, "the plan needs none")
    assert not [f for f in check.check(engine) if f.check == "disk"]


def test_cublaslt_is_only_of_use_for_many_tokens(
    tmp_path: Path, machine: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = plan_in(tmp_path, "tensorrt", "decoder", max_seq=64)
    assert not [f for f in check.check(engine) if f.check == "cuBLASLt"]
    engine = plan_in(tmp_path, "tensorrt", "decoder", max_seq=256)
    monkeypatch.setattr("ctypes.util.find_library", lambda name: None)
    assert found(engine, "cuBLASLt").status == WARNING
    monkeypatch.setenv("AWQ_TRT_CUBLASLT", "/some/libcublasLt.so.13")
    assert found(engine, "cuBLASLt").status == OK


# ---- memory


@pytest.mark.parametrize(
    ("free", "status"), [(20 * GIB, OK), (11 * GIB, OK), (10 * GIB + (100 << 20), WARNING), (9 * GIB, FAILS)]
)
def test_gpu_memory(tmp_path: Path, machine: SimpleNamespace, free: int, status: str) -> None:
    engine = plan_in(tmp_path, "tensorrt")
    change(engine, sizes__quantized_weights=6 * GIB, sizes__other_weights=1 * GIB, sizes__activations=3 * GIB)
    machine.driver = Driver("580", (13, 0), (Gpu("a GPU", "8.9", 24 * GIB, free),))
    finding = found(engine, "GPU memory")
    assert finding.status == status
    assert "10.0 GiB needed: weights 7.0 GiB, " in finding.found
    assert "activations, estimated from the graph 3.0 GiB" in finding.found
    assert ("smaller max_batch" in finding.advice) == (status != OK)


def test_gpu_memory_of_which_little_is_known(tmp_path: Path, machine: SimpleNamespace) -> None:
    engine = plan_in(tmp_path, "tensorrt")
    change(engine, sizes__activations=None)
    assert (found(engine, "GPU memory").status, found(engine, "GPU memory").advice) == (
        WARNING, "load the plan to ask the engine (load=True)",
    )  # fmt: skip
    machine.driver = Driver("580", (13, 0), (Gpu("a GPU", "8.9", None, None),))
    assert "64.0 GiB free on the host" in found(engine, "GPU memory").found


def test_host_memory_and_disk(tmp_path: Path, machine: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = plan_in(tmp_path)
    machine.host = 7000
    assert found(engine, "host memory").status == WARNING
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=1000))
    finding = found(engine, "disk")
    assert (finding.status, "TMPDIR" in finding.advice) == (FAILS, True)
    machine.host = None
    assert not [f for f in check.check(engine) if f.check == "host memory"]


# ---- asking the runtime itself


@pytest.mark.parametrize(
    ("answer", "status", "words"),
    [
        ({"validity": "VALID", "reasons": []}, OK, "accepts"),
        ({"validity": "SUBOPTIMAL", "reasons": []}, WARNING, "older than this GPU"),
        (
            {"validity": "INVALID", "reasons": ["VERSION_MISMATCH", "UNSUPPORTED_CC"]},
            FAILS,
            "another version built it; it was not built for this compute capability",
        ),
        ({"validity": "INVALID", "reasons": [], "log": ["its own words"]}, FAILS, "refuses the plan: its own words"),
        ({"error": "it crashed"}, FAILS, "it crashed"),
    ],
)
def test_the_header(
    tmp_path: Path,
    machine: SimpleNamespace,
    monkeypatch: pytest.MonkeyPatch,
    answer: dict[str, Any],
    status: str,
    words: str,
) -> None:
    monkeypatch.setattr(check, "ask", lambda *arguments: answer)
    finding = found(plan_in(tmp_path), "header")
    assert finding.status == status
    assert words in finding.found


def test_tensorrt_rtx_judges_a_real_header_without_a_gpu(tmp_path: Path) -> None:
    """There is no GPU here that it could say yes for; what it says of another file is another thing."""
    pytest.importorskip("tensorrt_rtx")
    file = tmp_path / "x.plan"
    file.write_bytes(b"no plan at all" * 100)
    answer = check.ask(file, "tensorrt_rtx", None, 0, load=False)
    assert (answer["validity"], answer["reasons"]) == ("INVALID", ["MALFORMED_ENGINE"])


@pytest.mark.parametrize(
    ("action", "status", "words"),
    [
        ("return Engine()", OK, "the plan was loaded"),
        ('for level in (1, 3): self.logger.log(level, f"words {level}")', FAILS, "could not be loaded: words 1"),
        ("raise ValueError('no such GPU')", FAILS, "ValueError: no such GPU"),
        ("import os; os.abort()", FAILS, "ended with status -6"),
        ("import signal; signal.raise_signal(signal.SIGALRM)", FAILS, "no answer after 900 seconds"),
    ],
)  # fmt: skip
def test_loading(
    tmp_path: Path, machine: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, action: str, status: str, words: str
) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(check, "query", lambda: machine.driver)
    package = tmp_path / "packages" / "tensorrt"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(TENSORRT.format(log=str(tmp_path / "loaded"), action=action))
    monkeypatch.syspath_prepend(str(package.parent))
    monkeypatch.setenv("PYTHONPATH", str(package.parent), prepend=os.pathsep)
    engine = plan_in(tmp_path, "tensorrt", plugin_embedded=False)
    findings = {f.check: f for f in check.check(engine, load=True)}
    assert findings["TensorRT"] == Finding("TensorRT", OK, "10.14.1.48")
    assert findings["loading"].status == status
    assert words in findings["loading"].found
    assert (tmp_path / "loaded").read_text() == f"{library_path().resolve()}\n"
    assert ("activations, says the engine 123.0 MiB" in findings["GPU memory"].found) == (status == OK)


# ---- the command line


def run(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(TOOL), *words], env=os.environ | environment, capture_output=True, text=True, timeout=120
    )


def test_the_tool_with_a_driver(tmp_path: Path) -> None:
    """Everything real but the driver and the TensorRT module, which nobody imports."""
    libraries = fake_driver(tmp_path / "lib")
    package = tmp_path / "packages" / "tensorrt"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text('raise SystemExit("imported")\n__version__ = "10.14.1.48"\n')
    engine = plan_in(tmp_path, "tensorrt")
    gpus = f"NVIDIA H100;9;0;{80 * GIB};{70 * GIB},{RTX_4090.name};8;9;{24 * GIB};{20 * GIB}"
    environment = {"LD_LIBRARY_PATH": str(libraries), "PYTHONPATH": str(package.parent), "FAKE_GPUS": gpus}
    environment["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"
    done = run(str(engine), "--json", "--device", "1", **environment)
    assert done.returncode == 0, done.stdout + done.stderr
    answer = json.loads(done.stdout)
    assert answer["runs"] is True
    assert {c["status"] for c in answer["checks"]} == {OK}
    done = run(str(engine), **environment)
    assert done.returncode == 1
    assert "9.0; the plan is for 8.9" in done.stdout
    assert "1 will fail, 0 warnings" in done.stdout


def test_the_tool_with_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main = runpy.run_path(str(TOOL))["main"]
    engine = plan_in(tmp_path)
    assert main([str(tmp_path / "none.plan")]) == 2
    assert "no such file" in capsys.readouterr().err
    assert main([str(engine), "--device", "-1"]) == 2
    assert "numbered from 0" in capsys.readouterr().err
    change(engine, versions__runtime="tvm")
    assert main([str(engine)]) == 2
    assert "the runtime is 'tvm'" in capsys.readouterr().err
    sidecar.path_of(engine).unlink()
    assert main([str(engine)]) == 2
    captured = capsys.readouterr()
    assert "out.plan.json: no such file" in captured.err
    assert captured.out == ""
    with pytest.raises(AwqTrtError):
        check.check(engine)


def test_the_table_shows_brackets_as_they_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "[red]x[").mkdir()
    main = runpy.run_path(str(TOOL))["main"]
    assert main([str(plan_in(tmp_path / "[red]x["))]) == 1  # there is no GPU here
    assert "[red]x[" in capsys.readouterr().out.replace("\n", "")
