"""Mutated files to every reader: each must be accepted or refused in one AwqTrtError, in seconds, in little memory.

    python tests/fuzz/run.py --cases 100000 --workers 2 --output tools/results/fuzz.json
    python tests/fuzz/run.py --target sidecar --case 1234        # one case again, with its traceback

A case is a target's name and a number. Cases run in forked processes: a worker that ends or hangs is one case lost, and
is noted as that. Seconds are the processor's, as the machine may do other work, and three times as many on the clock.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import io
import json
import multiprocessing
import multiprocessing.connection
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
if __name__ == "__main__":  # under pytest, other tests see these, too
    os.environ |= {
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }

import mutations  # noqa: E402
import targets  # noqa: E402

from awq_trt.errors import AwqTrtError  # noqa: E402

SECONDS, GIB = 5, 1 << 30
MEMORY = 2 * GIB
PATIENCE = 100  # seconds without a result after which a worker that does not even take a signal is ended


class TooLong(BaseException):
    """A case took longer than SECONDS."""


def limit(seconds: int) -> None:
    """Raise TooLong after so many seconds; never with 0."""
    signal.setitimer(signal.ITIMER_PROF, seconds)
    signal.setitimer(signal.ITIMER_REAL, 3 * seconds)


def run_case(name: str, number: int, folder: Path, seeds: Path) -> dict[str, Any]:
    """One case in this process: {"outcome": "accepted", "refused", or what went wrong; and where}."""
    target = targets.TARGETS[name]
    rng = Random(f"{name}/{number}")
    work = folder / name
    if not work.exists():
        shutil.copytree(seeds / name, work, symlinks=True)
    files = [f.relative_to(seeds / name) for f in sorted({g for p in target.files for g in (seeds / name).glob(p)})]
    file = rng.choice(files)
    if rng.random() < 0.03:
        what = mutations.no_file(work / file, rng)
    else:
        what = "content"
        (work / file).write_bytes(mutations.mutate(file.name, (seeds / name / file).read_bytes(), rng))
    found: dict[str, Any] = {"target": name, "case": number, "file": str(file), "what": what}
    started = time.monotonic()
    limit(SECONDS * target.seconds)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            facts = target.read(work, file)
            limit(0)
            found["outcome"] = "accepted"
            if target.judge is not None and rng.random() < target.judged:
                limit(4 * SECONDS)
                try:
                    trouble = target.judge(work, file, facts)
                except Exception as error:
                    trouble = f"the judge refuses it: {type(error).__name__}: {error}"
                if trouble:
                    found |= {"outcome": "wrong", "message": trouble[:500]}
    except AwqTrtError as error:
        found |= {"outcome": "refused", "message": str(error)[:500]}
        if len(str(error)) > 4000:
            found |= {"outcome": "long message", "message": str(error)[:300]}
    except TooLong:
        found |= {"outcome": "hang", "message": traceback.format_exc(limit=-6)}
    except BaseException as error:  # also what Rust throws; Ctrl-C is for the parent
        found |= {
            "outcome": "bare",
            "message": f"{type(error).__name__}: {error}"[:500],
            "where": traceback.format_exc(limit=-8),
        }
    finally:
        limit(0)
        found["seconds"] = time.monotonic() - started
    again = work / file
    if again.is_dir() and not again.is_symlink():
        shutil.rmtree(again)
    else:
        again.unlink(missing_ok=True)
    shutil.copyfile(seeds / name / file, again)
    clean(work, target)
    return found


def clean(folder: Path, target: targets.Target) -> None:
    """Delete what reading left there."""
    for extra in target.clean:
        path = folder / extra
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def worker(cases: Sequence[tuple[str, int]], seeds: Path, pipe: Any) -> None:
    """Run cases and send what was found; first of all which one begins."""

    def too_long(*_: object) -> None:
        raise TooLong

    signal.signal(signal.SIGALRM, too_long)
    signal.signal(signal.SIGPROF, too_long)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with contextlib.suppress(OSError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 2)
    used = int(Path("/proc/self/statm").read_text().split()[5]) * resource.getpagesize()  # without maps of files
    resource.setrlimit(resource.RLIMIT_DATA, (used + MEMORY, resource.RLIM_INFINITY))
    with tempfile.TemporaryDirectory(prefix="fuzz.") as folder:
        for name, number in cases:
            pipe.send((name, number))
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            try:
                found = run_case(name, number, Path(folder), seeds)
            except BaseException:  # the harness itself, or a signal that came late
                found = {"target": name, "case": number, "outcome": "crash", "message": traceback.format_exc(limit=-6)}
            grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
            if grown > MEMORY:
                found |= {"outcome": "memory", "message": f"{grown / GIB:.1f} GiB"}
            pipe.send(found)
    pipe.send(None)


def fuzz(cases: Sequence[tuple[str, int]], seeds: Path, workers: int = 1) -> list[dict[str, Any]]:
    """Run cases in forked processes and return what was found, in no order."""
    context = multiprocessing.get_context("fork")
    parts = [list(cases[i::workers]) for i in range(workers)]
    running: dict[Any, tuple[Any, list[tuple[str, int]]]] = {}
    found: list[dict[str, Any]] = []

    def start(part: list[tuple[str, int]]) -> None:
        if part:
            here, there = context.Pipe(duplex=False)
            process = context.Process(target=worker, args=(part, seeds, there), daemon=True)
            process.start()
            there.close()
            running[here] = (process, part)

    for part in parts:
        start(part)
    while running:
        ready = multiprocessing.connection.wait(list(running), PATIENCE)
        for pipe in ready or list(running):
            process, part = running[pipe]
            try:
                if pipe not in ready and not pipe.poll():
                    raise TimeoutError
                message = pipe.recv()
                if message is None:
                    raise StopIteration
                if isinstance(message, dict):
                    found.append(message)
                    part.pop(0)
                    if len(found) % 10_000 == 0:
                        print(f"{len(found)} cases", flush=True)
            except StopIteration:
                process.join()
                del running[pipe]
            except (EOFError, TimeoutError, OSError) as error:
                if isinstance(error, TimeoutError):
                    process.kill()
                process.join()
                del running[pipe]
                name, number = part.pop(0)
                outcome = "hang" if isinstance(error, TimeoutError) else "crash"
                found.append(
                    {"target": name, "case": number, "outcome": outcome, "message": f"exit {process.exitcode}"}
                )
                start(part)
    return found


def plan(count: int, first: int = 0, only: Sequence[str] = ()) -> list[tuple[str, int]]:
    """`count` cases, shared among the targets by their weights, each numbered from `first`."""
    chosen = {n: t for n, t in targets.TARGETS.items() if not only or n in only}
    whole = sum(t.weight for t in chosen.values())
    cases = [(n, first + i) for n, t in chosen.items() for i in range(max(1, round(count * t.weight / whole)))]
    Random(0).shuffle(cases)
    return cases


def make_seeds(folder: Path, only: Sequence[str] = ()) -> None:
    """The files that are mutated, in a process of its own: threads of a library do not survive a fork."""

    def make() -> None:
        for name, target in targets.TARGETS.items():
            if not only or name in only:
                (folder / name).mkdir()
                target.make(folder / name)

    process = multiprocessing.get_context("fork").Process(target=make)
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit("the seeds could not be made")


def bad(found: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """What must not be."""
    return [x for x in found if x["outcome"] not in ("accepted", "refused")]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--first", type=int, default=0, help="number of each target's first case")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--target", action="append", default=[], choices=list(targets.TARGETS))
    parser.add_argument("--case", type=int, help="this one alone")
    parser.add_argument("--output", type=Path, help="a record of the counts")
    parser.add_argument("--show", type=int, default=40, help="kinds of failures printed")
    args = parser.parse_args()
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="fuzz.") as folder:
        make_seeds(Path(folder), args.target)
        print(f"seeds after {time.monotonic() - started:.1f} s", flush=True)
        cases = plan(args.cases, args.first, args.target)
        if args.case is not None:
            cases = [(name, args.case) for name in args.target]
        found = fuzz(cases, Path(folder), args.workers)
    seconds = time.monotonic() - started
    counts = Counter((x["target"], x["outcome"]) for x in found)
    times = Counter()
    for x in found:
        times[x["target"]] += x.get("seconds", 0)
    for name in targets.TARGETS:
        row = {outcome: n for (t, outcome), n in counts.items() if t == name}
        if row:
            print(f"{name:12} {sum(row.values()):7} {1000 * times[name] / sum(row.values()):7.1f} ms  {row}")
    kinds: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for x in bad(found):
        place = [line for line in x.get("where", x.get("message", "")).splitlines() if "awq_trt" in line][-1:]
        kinds.setdefault((x["target"], x["outcome"], x["message"][:60], *place), []).append(x)
    for key, some in sorted(kinds.items(), key=lambda item: -len(item[1]))[: args.show]:
        print(
            f"\n{len(some)} x {key[1:]}\n  e.g. --target {key[0]!r} --case {some[0]['case']} "
            f"({some[0].get('file')}, {some[0].get('what')})"
        )
        print(some[0].get("where", some[0]["message"]) if args.case is not None else some[0]["message"])
    if args.case is not None:
        print(found)
    print(f"{len(found)} cases in {seconds:.0f} s, {len(bad(found))} bad")
    if args.output:
        record = {
            "date": datetime.date.today().isoformat(),
            "versions": targets.versions(),
            "cases": len(found),
            "seconds": round(seconds),
            "first": args.first,
            "targets": {n: {o: c for (t, o), c in sorted(counts.items()) if t == n} for n in targets.TARGETS},
        }
        args.output.write_text(json.dumps(record, indent=1) + "\n")
    return int(bool(bad(found)))


if __name__ == "__main__":
    sys.exit(main())
