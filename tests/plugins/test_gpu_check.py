"""tools/gpu_check.py: one JSON, with or without a GPU; a refusal is recorded in its own words."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

TOOLS = Path(__file__).resolve().parents[2] / "tools"


def _run(*arguments: object, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, TOOLS / "gpu_check.py", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def test_writes_one_json(tmp_path: Path) -> None:
    output = tmp_path / "result.json"
    done = _run("--output", output, "--seed", 5)
    assert done.returncode == 0, done.stderr
    result = json.loads(output.read_text())
    assert result["seed"] == 5
    assert result["engine"] is None
    summary = result["plugin"]["summary"]
    assert summary["failed"] == 0
    assert summary["passed"] == sum(check.get("ok") is True for check in result["plugin"]["checks"]) > 90
    if summary["gpu"] is None:
        assert "no GPU: launch checks skipped" in done.stdout
        assert summary["skipped"] >= 144
    else:
        assert result["hardware"]
        assert summary["skipped"] == 0
    assert [p.name for p in tmp_path.iterdir()] == ["result.json"]


def test_sanitizer(tmp_path: Path, host_check: Path) -> None:
    """Every tool runs the short list; a tool that finds something fails the whole; without a GPU nothing is clean."""
    folder = tmp_path / "bin"
    folder.mkdir()
    fake = folder / "compute-sanitizer"
    environment = {**os.environ, "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}
    for code, gpu, clean in ((0, '"H100"', True), (9, '"H100"', False), (0, "null", None)):
        fake.write_text(
            f'#!/bin/sh\n[ "$5" = "{host_check}" ] && [ "$6" = few ] || exit 7\n'
            f"echo '========= ERROR SUMMARY: of '$2\necho '{{\"summary\": true, \"gpu\": {gpu}}}'\nexit {code}\n"
        )
        fake.chmod(0o755)
        done = _run("--output", tmp_path / "r.json", "--sanitizer", environment=environment)
        found = json.loads((tmp_path / "r.json").read_text())["sanitizer"]
        assert [found[t]["clean"] for t in ("memcheck", "racecheck", "synccheck", "initcheck")] == [clean] * 4
        assert done.returncode == (1 if clean is False else 0), done.stdout + done.stderr
        assert {True: "racecheck: clean", False: "racecheck: NOT CLEAN: ========= ERROR SUMMARY: of racecheck",
                None: "racecheck: not run: no GPU"}[clean] in done.stdout  # fmt: skip


def test_binaries_that_are_carried_along(tmp_path: Path, library: Path) -> None:
    """A missing one is an error; the test program's exit code and lines are taken over."""
    folder = tmp_path / "carried"
    folder.mkdir()
    (folder / library.name).symlink_to(library)
    missing = _run("--output", tmp_path / "r.json", "--library", folder)
    assert (missing.returncode, "awq_trt_host_check is missing" in missing.stderr) == (2, True)
    fake = folder / "awq_trt_host_check"
    fake.write_text(
        '#!/bin/sh\necho \'{"check": "x", "ok": false}\'\n'
        'echo \'{"summary": true, "passed": 0, "failed": 1, "skipped": 0, "gpu": "g"}\'\nexit 1\n'
    )
    fake.chmod(0o755)
    done = _run("--output", tmp_path / "r.json", "--library", folder)
    assert (done.returncode, 'failed: {"check": "x", "ok": false}' in done.stdout) == (1, True)
    assert json.loads((tmp_path / "r.json").read_text())["plugin"]["checks"] == [{"check": "x", "ok": False}]


def test_a_refusal_is_recorded_in_its_own_words(tmp_path: Path) -> None:
    (tmp_path / "broken.plan").write_bytes(b"not a plan")
    (tmp_path / "broken.onnx").write_bytes(b"")
    missing = _run("--output", tmp_path / "r.json", "--engine", tmp_path / "missing.plan")
    assert (missing.returncode, "missing.plan does not exist" in missing.stderr) == (2, True)
    assert not (tmp_path / "r.json").exists()
    done = _run("--output", tmp_path / "r.json", "--engine", tmp_path / "broken.plan")
    engine = json.loads((tmp_path / "r.json").read_text())["engine"]
    assert engine["ran"] is False
    assert engine["refusal"].strip()
    assert engine["refusal"].splitlines()[0] in done.stdout


def test_missing_files_are_named(tmp_path: Path) -> None:
    done = _run("--output", tmp_path / "r.json", "--engine", tmp_path / "missing.plan")
    assert done.returncode == 2
    assert "missing.plan does not exist" in done.stderr
    assert not (tmp_path / "r.json").exists()
