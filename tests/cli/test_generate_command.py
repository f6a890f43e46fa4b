"""tools/generate.py: one prompt, a file of prompts, a conversation."""

from __future__ import annotations

import io
import json
import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_onnx
from decoders import letters

from awq_trt.serve.generate import encode, generate
from awq_trt.serve.generator import Event, Generator
from awq_trt.serve.open import open_decoder
from awq_trt.serve.sampling import Sampling

MAIN = runpy.run_path(str(Path(__file__).parents[2] / "tools" / "generate.py"))["main"]
SAMPLING = Sampling(max_tokens=6, ignore_eos=True)
OPTIONS = ["--max-tokens", "6", "--ignore-eos", "--threads", "1"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A decoder of 128 tokens with a tokenizer beside it."""
    folder = tmp_path_factory.mktemp("tool")
    letters().save_pretrained(folder / "m.awq")
    return tiny_onnx.fixed_decoder(folder / "m.onnx", capacity=128, tokenizer="m.awq")


def expected(model: Path, prompt: Any, sampling: Sampling = SAMPLING) -> str:
    return generate(model, [prompt], sampling, threads=1)[0].text


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = MAIN([str(a) for a in arguments])
    out, err = capsys.readouterr()
    return code, out, err


def test_one_prompt(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, model, "--prompt", "hello", *OPTIONS)
    assert code == 0
    assert out == expected(model, user("hello")) + "\n"
    assert "prompt 10 tokens, " in err
    assert "answer 5 tokens, " in err  # the first one came of the prompt
    code, out, err = run(capsys, model, "--prompt", "hello", "--raw", "--quiet", *OPTIONS)
    assert (code, out, err) == (0, expected(model, "hello") + "\n", "")
    _, out, _ = run(capsys, model, "--prompt", "hello", "--system", "be kind", *OPTIONS)
    assert out == expected(model, [{"role": "system", "content": "be kind"}, *user("hello")]) + "\n"


def test_sampling_options(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--temperature", "1.5", "--top-k", "30", "--top-p", "0.9", "--repetition-penalty", "1.1", "--seed", "4"]
    _, out, _ = run(capsys, model, "--prompt", "hello", *given, *OPTIONS)
    sampling = Sampling(
        max_tokens=6, temperature=1.5, top_k=30, top_p=0.9, repetition_penalty=1.1, seed=4, ignore_eos=True
    )
    assert out == expected(model, user("hello"), sampling) + "\n"
    text = expected(model, user("hello"))
    _, out, _ = run(capsys, model, "--prompt", "hello", "--stop", text[3:5], "--stop", "no such text", *OPTIONS)
    assert out == text[: text.index(text[3:5])] + "\n"
    _, out, _ = run(capsys, model, "--prompt", "hello", "--ignore-eos", "--threads", "1")
    assert len(out) > 100  # without --max-tokens the cache is the limit


def test_a_file_of_prompts(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = ["hello", "a much longer prompt than the others", "x", "who are you", "and me"]
    (tmp_path / "prompts.txt").write_text("\n".join([texts[0], "", *texts[1:], ""]))
    answers = [expected(model, user(text)) for text in texts]
    code, out, _ = run(capsys, model, "--prompts", tmp_path / "prompts.txt", "--json", *OPTIONS)
    assert code == 0
    rows = [json.loads(line) for line in out.splitlines()]
    assert rows == [
        {"prompt": text, "text": answer, "tokens": 6, "finish_reason": "length"}
        for text, answer in zip(texts, answers, strict=True)
    ]
    _, out, _ = run(capsys, model, "--prompts", tmp_path / "prompts.txt", "--max-batch", "2", *OPTIONS)
    for text, answer in zip(texts, answers, strict=True):
        assert f">>> {text}\n{answer}\n" in out


def talk(monkeypatch: pytest.MonkeyPatch, *lines: str) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))


def test_a_conversation(model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Every turn reads what was said before, until /reset; a message that is too long is left out."""
    talk(monkeypatch, "hello", "  ", "and you", "/reset", "and you", "x" * 200, "bye", "/exit", "never read")
    code, out, err = run(capsys, model, "--system", "be kind", *OPTIONS)
    assert code == 0
    history: list[dict[str, str]] = [{"role": "system", "content": "be kind"}]
    answers = []
    for text in ("hello", "and you", "/reset", "and you", "bye"):
        if text == "/reset":
            history = history[:1]
            continue
        history += user(text)
        answers.append(expected(model, history))
        history.append({"role": "assistant", "content": answers[-1]})
    assert out == "".join(answer + "\n" for answer in answers)
    assert err.count("error: the prompt has 234 tokens; ") == 1
    assert "so 127 is the most" in err
    assert "tokens, " in err.splitlines()[-1]


def test_without_a_chat_template_every_line_is_continued(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = letters()
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path / "plain")
    talk(monkeypatch, "hello", "hello")
    code, out, _ = run(capsys, model, "--tokenizer", tmp_path / "plain", *OPTIONS)
    assert code == 0
    assert out == 2 * (expected(model, "hello") + "\n")
    code, _, err = run(capsys, model, "--tokenizer", tmp_path / "plain", "--system", "x", *OPTIONS)
    assert code == 2
    assert "system message needs a chat template" in err


def test_ctrl_c_stops_an_answer_and_not_the_chat(
    model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    step, steps = Generator.step, 0

    def interrupted(self: Generator) -> list[Event]:
        nonlocal steps
        steps += 1
        if steps == 4:
            raise KeyboardInterrupt
        return step(self)

    monkeypatch.setattr(Generator, "step", interrupted)
    talk(monkeypatch, "hello", "hello")
    code, out, _ = run(capsys, model, "--max-tokens", "20", "--ignore-eos", "--threads", "1")
    monkeypatch.undo()
    assert code == 0
    first, second = out.split("\n", 1)[0], out
    with open_decoder(model, threads=1) as decoder:
        ids = encode(letters(), user("hello"))
        whole = generate(decoder, [ids], Sampling(max_tokens=20, ignore_eos=True))[0].text
    assert 0 < len(first) < 20
    assert whole.startswith(first)
    assert len(second) > 20


def bad_prompts(tmp_path: Path) -> Iterator[tuple[list[object], str]]:
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    yield ["--prompts", tmp_path / "empty.txt"], "no prompts in it"
    yield ["--prompts", tmp_path / "binary.txt"], "cannot be read"
    yield ["--prompts", tmp_path / "missing.txt"], "cannot be read"
    yield ["--prompt", ""], "no tokens"
    yield ["--prompt", "x" * 300], "has 305 tokens"
    yield ["--prompt", "x", "--temperature", "-1"], "temperature is -1.0"
    yield ["--prompt", "x", "--tokenizer", tmp_path / "missing"], "no such directory"
    yield ["--prompt", "x", "--threads", "0"], "threads is 0"


def test_errors_are_one_message(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in bad_prompts(tmp_path):
        raw = ["--raw"] if "" in arguments else []
        code, out, err = run(capsys, model, *arguments, *raw)
        assert (code, out) == (2, "")
        assert err.startswith("error: ")
        assert message in err
    code, _, err = run(capsys, tmp_path / "missing.onnx", "--prompt", "x")
    assert (code, "no such file" in err) == (2, True)
