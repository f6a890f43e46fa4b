"""A real Triton Inference Server for the tests: the binary in NVIDIA's wheel nvidia-pytriton, no container, no GPU.

The wheel (144 MB unpacked, Triton 2.51) has the Python backend and no other. It is not a package of the test extra,
because it wants numpy below 2: it lies beside the environment (peers.py), and so does a numpy for its stub process,
which cannot read strings of a newer one. The engine's own process has the environment's packages.
"""

from __future__ import annotations

import http.client
import json
import os
import queue
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import peers
import psutil
import pytest

MODEL = "/v2/models/llama"
"""The path of a model's requests; the tests' repositories hold a tiny Llama."""

VERSION = f"{sys.version_info.major}.{sys.version_info.minor}"


def home() -> Path:
    """The folder of the wheel's bin/ and backends/, downloaded once; skips the test where the wheel does not run."""
    if sysconfig.get_platform() != "linux-x86_64" or sys.version_info >= (3, 13):
        pytest.skip("nvidia-pytriton is for Linux x86-64, and the numpy of its time for Python up to 3.12")
    library = Path(sysconfig.get_config_var("LIBDIR"), sysconfig.get_config_var("INSTSONAME") or "-")
    if not library.is_file():
        pytest.skip(f"Triton's stub links libpython{VERSION}.so, and this Python was built without one")
    place = peers.folder("pytriton") / "pytriton" / "tritonserver"
    program = "triton_python_backend_stub"
    stub = place / "backends" / "python" / program
    if not stub.exists():
        temporary = stub.with_suffix(f".{os.getpid()}")
        shutil.copy2(place / "python_backend_stubs" / VERSION / program, temporary)
        temporary.rename(stub)
    return place


def environment(folder: Path) -> dict[str, str]:
    """Variables under which the stub runs this Python with an old numpy, no awq_trt, and nothing else."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    (packages / "numpy.pth").write_text(f"{peers.folder('numpy-1')}\n")
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    variables["PATH"] = f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}"  # the stub's Python is the first python3
    variables["LD_LIBRARY_PATH"] = str(sysconfig.get_config_var("LIBDIR"))
    return variables


class Server:
    """A running server."""

    def __init__(self, repository: Path, folder: Path, *options: str) -> None:
        place = home()
        folder.mkdir(parents=True, exist_ok=True)
        ports = free_ports(3)
        self.http, self.grpc, self.metrics_url = (f"127.0.0.1:{port}" for port in ports)  # like "127.0.0.1:8000"
        self._log, self._shared = folder / "server.log", f"awq_trt_test_{ports[0]}_{os.getpid()}_"
        command = [place / "bin" / "tritonserver", f"--model-repository={repository}"]
        command += [f"--backend-directory={place / 'backends'}", "--exit-timeout-secs=20"]
        command += [f"--backend-config=python,shm-region-prefix-name={self._shared}"]
        for name, port in zip(("http", "grpc", "metrics"), ports, strict=True):
            command += [f"--{name}-port={port}", f"--{name}-address=127.0.0.1"]
        with self._log.open("w") as log:
            self.process = psutil.Popen(
                [*map(str, command), *options],
                stdout=log,
                stderr=log,
                env=environment(folder / "python"),
                cwd=folder,
                start_new_session=True,
            )

    @property
    def log(self) -> str:
        """Its output so far."""
        return self._log.read_text(errors="replace")

    def wait(self, seconds: float = 120) -> None:
        """Until every model is loaded, or at least tried."""
        until = time.monotonic() + seconds
        while not self.ready():
            assert self.process.poll() is None, f"the server has ended:\n{self.log[-4000:]}"
            assert time.monotonic() < until, f"the server is not ready:\n{self.log[-4000:]}"
            time.sleep(0.1)

    def ready(self) -> bool:
        return self.request("/v2/health/ready")[0] == 200

    def request(self, path: str, body: Any = None, timeout: float = 60) -> tuple[int, str]:
        """Status and text of an HTTP request, a POST if there is a body (bytes, or what becomes JSON); 0 if refused."""
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        try:
            with urllib.request.urlopen(
                urllib.request.Request(f"http://{self.http}{path}", data), timeout=timeout
            ) as got:
                return got.status, got.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()
        except urllib.error.URLError:
            return 0, ""

    def metrics(self) -> dict[str, float]:
        """Our metrics: name without prefix, with the outcome where there is one -> value."""
        with urllib.request.urlopen(f"http://{self.metrics_url}/metrics", timeout=10) as got:
            lines = got.read().decode().splitlines()
        found = {}
        for line in lines:
            if line.startswith("awq_trt_"):
                name, rest = line.removeprefix("awq_trt_").split("{", 1)
                labels, value = rest.rsplit("} ", 1)
                outcome = labels.partition('outcome="')[2].partition('"')[0]
                found[f"{name} {outcome}".strip()] = float(value)
        return found

    def stub(self) -> psutil.Process:
        """The process of the Python backend."""
        alive = [p for p in self.process.children() if p.status() != psutil.STATUS_ZOMBIE]
        (process,) = [p for p in alive if "triton_python" in p.name()]
        return process

    def engine(self) -> psutil.Process:
        """The process of the engine."""
        (process,) = [p for p in self.stub().children() if "awq_trt.serve.triton.engine_process" in p.cmdline()]
        return process

    def stop(self) -> int:
        """End it as a user would; its exit status."""
        family = [self.process, *self.process.children(recursive=True)]
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return int(self.process.wait(60))
        finally:
            for process in family:
                if process.is_running():
                    process.kill()
            for region in Path("/dev/shm").glob(f"{self._shared}*"):  # of stubs that were killed
                region.unlink()


class Stream:
    """A gRPC stream of tritonclient's: many requests, their answers as they come."""

    def __init__(self, server: Server) -> None:
        self.answers: queue.Queue[tuple[Any, Any]] = queue.Queue()
        self.client = pytest.importorskip("tritonclient.grpc").InferenceServerClient(server.grpc)
        self.client.start_stream(lambda result, error: self.answers.put((result, error)))

    def send(self, prompt: str, id: str, **parameters: Any) -> None:
        text = tensor("text_input", "BYTES", np.array([[prompt.encode()]], object))
        self.client.async_stream_infer("llama", [text], request_id=id, parameters=parameters)

    def collect(self, count: int) -> dict[str, list[tuple[str, str]]]:
        """(text, finish reason) of each response of `count` requests, by id."""
        pieces: dict[str, list[tuple[str, str]]] = {}
        while count:
            result, error = self.answers.get(timeout=60)
            assert error is None, error
            values = [result.as_numpy(name)[0, 0].decode() for name in ("text_output", "finish_reason")]
            pieces.setdefault(result.get_response().id, []).append((values[0], values[1]))
            count -= bool(values[1])
        return pieces


def tensor(name: str, kind: str, value: np.ndarray) -> Any:
    """An input of tritonclient's gRPC."""
    made = pytest.importorskip("tritonclient.grpc").InferInput(name, list(value.shape), kind)
    made.set_data_from_numpy(value)
    return made


def until(condition: Callable[[], bool], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.05)


def started(server: Server, fields: dict[str, Any], path: str = "generate_stream") -> http.client.HTTPConnection:
    """A connection whose request has been sent, its answer not read."""
    connection = http.client.HTTPConnection(server.http, timeout=10)
    connection.request("POST", f"{MODEL}/{path}", json.dumps(fields))
    return connection


@contextmanager
def running(repository: Path, folder: Path, *options: str) -> Iterator[Server]:
    """A server that is ready, stopped afterwards. options: of tritonserver."""
    server = Server(repository, folder, *options)
    try:
        server.wait()
        yield server
    finally:
        server.stop()


def free_ports(count: int) -> list[int]:
    """Ports that nothing listens on right now."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()
