"""Outputs appear whole or not at all.

An output is one file, a file and others that belong to it (`out.onnx` and `out.onnx.data`), or a directory. All that a
run has in work for it lies beside it in one folder, which a run holds locked:

    .NAME.partial/
        new/       what is being written, under the names it will have
        publish    all of `new/` is complete and on the disk: only renames are left
        old/       what was there before, until the renames are done

The invariant: at every instant, what lies at the output's places is the old set whole or the new set whole, or the file
that names the others is missing. A directory, or a single file, is exchanged in one step. A run that is killed leaves
its folder; the next one finishes the renames if `publish` is there, and deletes everything else.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from awq_trt.errors import AwqTrtError
from awq_trt.outputs import Output, check, could_not_write

_claimed: set[Path] = set()
"""Work folders that a command holds for all of its stages (`claimed`), while no stage works in them."""


def check_outputs(outputs: Sequence[Output], sources: Iterable[Path] = ()) -> None:
    """`outputs.check`, after the renames that a killed run has left to do."""
    for output in outputs:
        if (output.work / "publish").exists():
            with locked(output), could_not_write(output):
                _finish(output.real)
    check(outputs, sources)


@contextmanager
def claimed(outputs: Sequence[Output], sources: Iterable[Path] = ()) -> Iterator[None]:
    """Check and lock all outputs of a command, before its first stage and until its last is done.

    Raises:
        AwqTrtError: see `check`; another run writes to one of them; a folder is not writable.
    """
    check_outputs(outputs, sources)
    with ExitStack() as stack:
        for output in outputs:
            folder = stack.enter_context(locked(output))
            _claimed.add(folder)
            stack.callback(_claimed.discard, folder)
        yield


@contextmanager
def locked(output: Output) -> Iterator[Path]:
    """The work folder of an output, for this run alone; removed at the end unless something is kept in it.

    Raises:
        AwqTrtError: another run writes to this output; or the folder cannot be made.
    """
    folder = output.work
    if folder in _claimed:  # by the command that this stage is part of
        _claimed.remove(folder)
        try:
            yield folder
        finally:
            _claimed.add(folder)
        return
    with could_not_write(output):
        made = [p for p in folder.parents if not p.exists()]
        try:
            while True:
                folder.parent.mkdir(parents=True, exist_ok=True)
                folder.mkdir(exist_ok=True)
                with suppress(FileNotFoundError):  # the run before has just ended, and removed it
                    handle = lock(folder)
                    break
        except OSError:
            _remove_empty(made)
            raise
    if handle is None:
        raise AwqTrtError(
            f"{output.path}: another run is writing to it right now ({folder} is locked). Wait for it, or name another "
            "output."
        )
    try:
        yield folder
    finally:
        _remove_empty([folder])
        os.close(handle)
        _remove_empty(made)


def lock(folder: Path) -> int | None:
    """Lock a folder. Returns the handle that holds the lock until it is closed; None where another process has it.

    Raises:
        FileNotFoundError: another process has removed it.
    """
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(handle), folder.stat()):
            return handle
    except BlockingIOError:
        os.close(handle)
        return None
    except FileNotFoundError:
        os.close(handle)
        raise
    os.close(handle)
    raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(folder))


def _remove_empty(folders: Iterable[Path]) -> None:
    for folder in folders:
        with suppress(OSError):
            folder.rmdir()


@contextmanager
def publishing(output: Output, sources: Iterable[Path] = ()) -> Iterator[list[Path]]:
    """Check and lock an output, yield paths to write it and its others to, and put them in place when the block ends.

    A full disk, a crash, Ctrl-C or an exception leaves what was there before.

    Raises:
        AwqTrtError: see `claimed`; or the disk is full, or not writable.
    """
    sources = list(sources)
    check_outputs([output], sources)
    with locked(output) as folder, could_not_write(output):
        try:
            clear(folder)
            new = folder / "new"
            new.mkdir()
            yield [new / path.name for path in (output.path, *output.others)]
            check_outputs([output], sources)  # hours may have passed
            publish(output)
        finally:
            if not (folder / "publish").exists():
                clear(folder)


def publish(output: Output) -> None:
    """Put what lies complete in `new/` of the locked work folder in place.

    Raises:
        OSError: nothing has changed then, or the next run can tell what to do.
    """
    output = output.real
    new = output.work / "new"
    for path in (new, *new.rglob("*")):
        _flush(path)
    times = {path.name: path.stat().st_mtime_ns for path in new.iterdir()}  # tells new from old, and survives renames
    partial = output.work / "publish.partial"
    partial.write_text(json.dumps(times))
    _flush(partial)
    partial.replace(partial.with_suffix(""))
    try:
        _finish(output)
    except BaseException:
        _undo(output)
        raise


def _finish(output: Output) -> None:
    """Do the renames that are left, in any state that a killed run leaves; see the head of this file."""
    new, old, marker = (output.work / name for name in ("new", "old", "publish"))
    times = _times(marker)
    old.mkdir(exist_ok=True)
    if output.others and _is_new(new / output.path.name, times) and os.path.lexists(output.path):
        output.path.rename(old / output.path.name)
    for path in (*output.others, output.path):
        if _is_new(new / path.name, times) and not _exchange(new / path.name, path):
            if os.path.lexists(path) and (output.others or output.directory):  # a single file is replaced in one step
                path.rename(old / path.name)
            (new / path.name).rename(path)
    with suppress(OSError):  # done
        _flush(output.path.parent)
        clear(new)  # what was exchanged is the old one
        new.rmdir()  # or the marker stays: the next run would take what is left in it for new
        marker.unlink()


def _undo(output: Output) -> None:
    """Take back what `_finish` has done when a rename failed; where that fails too, the next run goes forward."""
    new, old, marker = (output.work / name for name in ("new", "old", "publish"))
    with suppress(OSError):
        times = _times(marker)
        done = _is_new(output.path, times)  # the last one
        for path in () if done else (*output.others, output.path):
            if _is_new(path, times) and not os.path.lexists(new / path.name):
                path.rename(new / path.name)
            elif _is_new(path, times) and not _exchange(path, new / path.name):
                return
            if os.path.lexists(old / path.name):
                (old / path.name).rename(path)
        marker.unlink()


def _times(marker: Path) -> dict[str, int]:
    try:
        return dict(json.loads(marker.read_text()))
    except ValueError:  # not what we wrote: nothing is known to be complete
        return {}


def _is_new(path: Path, times: dict[str, int]) -> bool:
    """Whether a file or directory is the new one of its name."""
    return os.path.lexists(path) and path.lstat().st_mtime_ns == times.get(path.name)


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two names in one step (Linux, renameat2); False where the file system or the C library cannot."""
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return call is not None and call(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0


def _flush(path: Path) -> None:
    """Have a file or a folder on the disk, also after a power failure."""
    if path.is_symlink():
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        if not stat.S_ISDIR(os.fstat(handle).st_mode):
            os.fsync(handle)
        else:
            with suppress(OSError):  # not every file system can do that
                os.fsync(handle)
    finally:
        os.close(handle)


def clear(folder: Path) -> None:
    """Delete all that a folder holds; what cannot be deleted is left for the next run."""
    with suppress(OSError):
        for entry in folder.iterdir():
            remove(entry)


def remove(path: Path) -> None:
    """Delete a file or a directory tree; it may be missing, and what cannot be deleted stays."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


@contextmanager
def scratch(parent: Path | None = None) -> Iterator[Path]:
    """A folder in `parent`, or in TMPDIR, for files that nobody keeps. Those of runs that were killed are deleted."""
    parent = Path(tempfile.gettempdir()) if parent is None else parent
    for left in parent.glob(".awq_trt.*"):
        with suppress(OSError):
            if left.lstat().st_uid == os.getuid() and (handle := lock(left)) is not None:
                remove(left)
                os.close(handle)
    handle = None
    while handle is None:
        folder = Path(tempfile.mkdtemp(prefix=".awq_trt.", dir=parent))
        with suppress(FileNotFoundError):  # another run took it for one that is left
            handle = lock(folder)
    try:
        yield folder
    finally:
        remove(folder)
        os.close(handle)
