"""No process is left over, however a build ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny_onnx

INTERRUPTED = """
import sys
from pathlib import Path
from awq_trt.engine.build import build_engine
build_engine(Path(sys.argv[1]), Path(sys.argv[2]), runtime="tensorrt", quiet=True)
"""


def children(pid: int) -> list[int]:
    return [int(c) for c in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def alive(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    try:
        return stat.read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGKILL])
def test_no_child_outlives_the_build(tmp_path: Path, sent: signal.Signals) -> None:
    package = tmp_path / "packages" / "tensorrt"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("import time\ntime.sleep(600)\n")
    environment = os.environ | {"PYTHONPATH": f"{package.parent}:{os.environ.get('PYTHONPATH', '')}"}
    model = tiny_onnx.decoder(tmp_path / "d.onnx")
    command = [sys.executable, "-c", INTERRUPTED, str(model), str(tmp_path / "d.plan")]
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as parent:
        deadline = time.monotonic() + 60
        while not (running := children(parent.pid)) and time.monotonic() < deadline:
            time.sleep(0.05)
        (child,) = running
        time.sleep(0.5)  # past the interpreter's start, into the build
        assert alive(child)
        parent.send_signal(sent)
        _, printed = parent.communicate(timeout=20)
    deadline = time.monotonic() + 5
    while alive(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(child)
    assert parent.returncode != 0
    if sent == signal.SIGINT:
        assert "KeyboardInterrupt" in printed
        assert printed.count("Traceback") == 1  # the child is ended by its own process group, without a second error
        assert sorted(p.name for p in tmp_path.iterdir()) == ["d.onnx", "packages"]
    assert not (tmp_path / "d.plan").exists()
