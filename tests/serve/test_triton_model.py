"""Triton's side of a generating model, without Triton: whatever fails, a request has an end and its slot is given back.

test_triton_server.py has the real server, in which most of this cannot be made to happen.
"""

from __future__ import annotations

import json
import re
import sys
import types
from typing import Any

import pytest

from awq_trt.serve.triton import engine_process, model, supervisor

ROWS, QUEUE = 1, 2
ASK = {"text_input": "x", "max_tokens": 4}


class Sender:
    """Keeps what it is sent; `broken` fails so many times."""

    def __init__(self, broken: int = 0) -> None:
        self.sent: list[tuple[Any, bool]] = []
        self.broken = broken

    def send(self, response: Any, flags: int = 0) -> None:
        if self.broken:
            self.broken -= 1
            raise RuntimeError("no shared memory")
        self.sent.append((response, bool(flags)))

    def is_cancelled(self) -> bool:
        return False

    @property
    def ends(self) -> list[str | None]:
        """The error, or None, of each last response; there has to be one."""
        return [response["error"] for response, last in self.sent if last]


class Request:
    def __init__(self, sender: Sender, fields: dict[str, Any]) -> None:
        self.sender, self.fields = sender, fields

    def get_response_sender(self) -> Sender:
        return self.sender

    def parameters(self) -> str:
        return json.dumps(self.fields)

    def inputs(self) -> list[Any]:
        return []


class FakeEngine:
    """Takes messages; `error` is raised by `send`."""

    def __init__(self) -> None:
        self.ready: dict[str, Any] | None = {"rows": ROWS, "prompt_tokens": 100}
        self.trouble, self.error, self.messages = "", None, []

    def send(self, message: dict[str, Any]) -> None:
        if self.error is not None:
            raise self.error
        self.messages.append(json.loads(json.dumps(message)))


@pytest.fixture
def triton(monkeypatch: pytest.MonkeyPatch) -> model.TritonPythonModel:
    class Family:
        COUNTER = GAUGE = 0

        def __init__(self, **_: Any) -> None:
            pass

    utils = types.SimpleNamespace(
        Tensor=lambda name, values: (name, values.reshape(-1)[0]),
        InferenceResponse=lambda output_tensors, error=None: {"tensors": dict(output_tensors), "error": error},
        TritonError=type(
            "TritonError",
            (str,),
            {"INVALID_ARG": 1, "UNAVAILABLE": 2, "INTERNAL": 3, "__new__": lambda c, t, *_: str.__new__(c, t)},
        ),
        TRITONSERVER_RESPONSE_COMPLETE_FINAL=1,
        MetricFamily=Family,
        Logger=types.SimpleNamespace(log_info=lambda text: print(text, file=sys.stderr)),
    )
    monkeypatch.setattr(model, "pb_utils", utils)
    monkeypatch.setattr(
        model,
        "Engine",
        lambda *_: types.SimpleNamespace(start=lambda: None, stopping=types.SimpleNamespace(wait=lambda _: True)),
    )
    made = model.TritonPythonModel()
    config = {"parameters": {"model": {"string_value": "m.onnx"}, "max_queue": {"string_value": str(QUEUE)}}}
    names = ("model_repository", "model_name", "model_version", "model_instance_name", "model_instance_device_id")
    made.initialize({"model_config": json.dumps(config), "model_instance_kind": "CPU"} | dict.fromkeys(names, "1"))
    made._engine = FakeEngine()  # type: ignore[assignment]
    return made


def execute(triton: model.TritonPythonModel, fields: dict[str, Any] = ASK, broken: int = 0) -> Sender:
    sender = Sender(broken)
    triton.execute([Request(sender, fields)])
    return sender


def events(triton: model.TritonPythonModel, *changes: dict[str, Any]) -> None:
    defaults = {"text": "a", "tokens": 1, "finish": None, "error": None}
    triton._read({"events": [defaults | change for change in changes], "active": 0, "waiting": 0})


def full(triton: model.TritonPythonModel) -> bool:
    return len(triton._in_flight) == ROWS + QUEUE


@pytest.mark.parametrize("error", [ValueError("bad"), RecursionError("deep"), MemoryError(), OSError("pipe")])
def test_a_request_that_cannot_be_handed_over_gives_its_slot_back(triton: Any, error: Exception) -> None:
    triton._engine.error = error
    for _ in range(2 * (ROWS + QUEUE)):
        sender = execute(triton)
        assert len(sender.ends) == 1
        assert type(error).__name__ in str(sender.ends[0])
    assert not triton._in_flight
    triton._engine.error = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        execute(triton)
    assert not triton._in_flight


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"messages": '[{"a":' + "[" * 991 + "]" * 991 + "}]"}, "deeper than 32"),
        ({"messages": "[" * 3000 + "]" * 3000}, "deeper than 32"),
        ({"messages": '[{"role": "user", "content": 3}]'}, "it is a int"),
        ({"text_input": "x" * 6401}, "6401 characters; this model takes at most 100 tokens"),
        ({"text_input": "x", "temperature": 1e30}, "temperature is 1e.30"),
        ({"text_input": "x", "max_tokens": 1 << 40}, "max_tokens is"),
        ({"text_input": "x", "stop_words": "q" * 1025}, "1 to 1024 characters"),
    ],
)
def test_what_is_refused_takes_no_slot(triton: Any, fields: dict[str, Any], why: str) -> None:
    for _ in range(2 * (ROWS + QUEUE)):
        (text,) = execute(triton, fields).ends
        assert re.search(why, str(text)), text
    assert not triton._in_flight
    assert not triton._engine.messages


def test_slots_come_back_with_the_last_event_whatever_becomes_of_the_answer(triton: Any) -> None:
    good, piecewise, silent = (
        execute(triton),
        execute(triton, ASK | {"stream": True}, broken=1),
        execute(triton, broken=2),
    )
    assert full(triton)
    assert "running or waiting already" in str(execute(triton).ends[0])
    events(triton, *({"id": i} for i in (1, 2, 3)))
    assert "could not be sent: no shared memory" in str(piecewise.ends[0])  # a piece is missing: the answer ends
    request = triton._in_flight[2]
    assert [request.has_lost_its_client(), request.has_lost_its_client()] == [True, False]  # the engine may stop it
    events(triton, *({"id": i, "finish": "length"} for i in (1, 2, 3)))
    assert not triton._in_flight
    assert good.ends == [None]
    assert good.sent[0][0]["tensors"]["text_output"] == b"aa"
    assert len(piecewise.sent) == 1
    assert not silent.sent


def test_an_event_that_cannot_be_read_ends_one_request(triton: Any) -> None:
    senders = [execute(triton) for _ in range(2)]
    events(triton, {"id": 1, "tokens": "many"}, {"id": 2})
    assert "TypeError" in str(senders[0].ends[0])
    events(triton, *({"id": i, "finish": "stop"} for i in (1, 2)))
    assert senders[1].ends == [None]
    assert not triton._in_flight


def test_when_the_engine_dies_every_request_is_told(triton: Any) -> None:
    senders = [execute(triton), execute(triton, broken=9), execute(triton)]
    triton._lost("it was killed by signal 9")
    assert not triton._in_flight
    assert [len(sender.ends) for sender in senders] == [1, 0, 1]
    assert "killed by signal 9" in str(senders[2].ends[0])


def test_a_line_that_was_cut_short_is_none(tmp_path: Any) -> None:
    """The engine's process is killed while it writes; and errors of one message do not end the thread that reads."""
    engine = supervisor.Engine(tmp_path, {"model": "m"}, None, lambda _: 1 / 0, lambda _: None, print)  # type: ignore[arg-type,return-value]
    write = 'import sys; sys.stdout.write(\'{"ready": {}}\\n{"events": []}\\n{"events": []}\\n{"eve\')'
    engine._command = [sys.executable, "-c", write]
    lost: list[str] = []
    engine._on_loss = lambda why: (lost.append(why), engine.stopping.set())  # type: ignore[assignment,func-returns-value]
    assert engine._launch()
    engine._run()
    assert lost == ["it ended with status 0; see Triton's log"]


class FakeGenerator:
    def __init__(self) -> None:
        self.waiting, self.added, self.cancelled = 0, [], []

    def tokenizer(self, text: str, **_: Any) -> dict[str, list[int]]:
        if text == "panic":
            raise BaseException("a bug in Rust")
        return {"input_ids": [ord(c) for c in text]}

    def add(self, ids: list[int], sampling: Any, id: int) -> None:
        if not ids:
            raise IndexError("no tokens")
        self.added.append((id, ids))

    def cancel(self, id: int) -> None:
        self.cancelled.append(id)


def test_prompts_are_prepared_beside_the_loop() -> None:
    generator = FakeGenerator()
    requests = engine_process.Requests(generator, limit=3)

    def ask(id: int, prompt: Any, **sampling: Any) -> list[dict[str, Any]]:
        assert requests.receive({"add": id, "prompt": prompt, "sampling": sampling}) == []
        assert requests.waiting == 1
        return requests.receive(requests.inbox.get(timeout=10))

    assert ask(1, "abc") == [{"id": 1, "prompt_tokens": 3}]
    for id, prompt, why in (
        (2, "abcd", "4 tokens; this model takes at most 3"),
        (3, "panic", "a bug in Rust"),
        (4, "", "IndexError"),
    ):
        (event,) = ask(id, prompt)
        assert why in event["refused"]
    assert "temperature" in ask(5, "a", temperature=-1)[0]["refused"]
    assert requests.receive({"add": 6, "prompt": "a", "sampling": {}}) == []
    assert requests.receive({"cancel": 6})[0]["finish"] == "cancelled"  # while its prompt is prepared
    assert requests.receive(requests.inbox.get(timeout=10)) == []
    assert requests.receive({"cancel": 1}) == []
    assert generator.added == [(1, [97, 98, 99])]
    assert generator.cancelled == [1]
    assert requests.waiting == 0
