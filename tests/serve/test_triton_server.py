"""The generating model of a repository in a real Triton server (triton_server.py), its decoder in ONNX Runtime."""

from __future__ import annotations

import itertools
import json
import signal
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import tiny_onnx
import triton_server
from stand_ins import plan_of
from transformers import AutoTokenizer
from triton_server import MODEL, Server, Stream, started, until

from awq_trt.serve.generate import Generated, generate
from awq_trt.serve.sampling import Sampling
from awq_trt.serve.triton.repository import write_triton_repo

ROWS, QUEUE, CAPACITY = 4, 20, 512  # the last is that of the tiny llama
TOKENS = 24
PROMPTS = [
    "Once upon a time",
    "x",
    "The quick brown fox jumps over the lazy dog. " * 4,
    "def add(a, b):\n    return",
    "Ein Satz mit ä, ö und ü.",
    "1, 2, 3, 4,",
    "Dear Sir or Madam, I am writing to you because",
    "日本語の文章",
]
TEMPLATE = """{% for m in messages %}<{{ m.role }}>{{ m.content }}{% if m.content == 'hang' %}
{%- for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}{% endif %}{% endfor %}<assistant>"""
TOO_LONG = CAPACITY - 10
LONG = {"text_input": "Once", "max_tokens": TOO_LONG, "ignore_eos": True}


@pytest.fixture(scope="module")
def decoder(exported: Path) -> Path:
    return exported / "llama.onnx"


@pytest.fixture(scope="module")
def offline(decoder: Path) -> list[Generated]:
    """What `generate` answers to PROMPTS, greedy."""
    answers = generate(decoder, PROMPTS, Sampling(max_tokens=TOKENS), threads=1)
    assert len({answer.text for answer in answers}) > 5
    return answers


@pytest.fixture(scope="module")
def server(decoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("triton")
    tokenizer = AutoTokenizer.from_pretrained(decoder.with_suffix(".awq"))
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder / "tokenizer")
    settings = {"python": sys.executable, "threads": "1", "max_batch": str(ROWS), "max_queue": str(QUEUE)}
    report = write_triton_repo(decoder, folder / "models", tokenizer=folder / "tokenizer", parameters=settings)
    assert report.command == f"tritonserver --model-repository={folder / 'models'}"
    options = ("--model-control-mode=explicit", "--load-model=*")
    with triton_server.running(folder / "models", folder / "server", *options) as running:
        engine = running.engine().pid
        yield running
    assert not psutil.pid_exists(engine)


@pytest.fixture(autouse=True)
def up_afterwards(server: Server, offline: list[Generated]) -> Iterator[None]:
    """Whatever a test did, the server is up after it, idle, and right."""
    yield
    assert server.process.poll() is None, server.log[-4000:]
    until(lambda: server.metrics()["active"] == server.metrics()["waiting"] == 0)
    assert ask(server, PROMPTS[0])["text_output"] == offline[0].text


def ask(server: Server, prompt: str, **fields: Any) -> dict[str, Any]:
    """One answer over HTTP, not streamed."""
    status, text = server.request(f"{MODEL}/generate", {"text_input": prompt, "max_tokens": TOKENS} | fields)
    assert status == 200, text
    return json.loads(text)


def stream(server: Server, prompt: str, **fields: Any) -> list[dict[str, Any]]:
    """The pieces of an answer over HTTP."""
    fields = {"text_input": prompt, "max_tokens": TOKENS, "stream": True} | fields
    status, text = server.request(f"{MODEL}/generate_stream", fields)
    assert status == 200, text
    return [json.loads(line.removeprefix("data:")) for line in text.splitlines() if line]


def test_answers_over_http_are_the_offline_ones(server: Server, offline: list[Generated]) -> None:
    counts = []
    for prompt, wanted in zip(PROMPTS, offline, strict=True):
        answer, pieces = ask(server, prompt), stream(server, prompt)
        counts.append(len(pieces))
        assert answer["text_output"] == "".join(piece["text_output"] for piece in pieces) == wanted.text
        assert [piece["finish_reason"] for piece in pieces] == [""] * (len(pieces) - 1) + [wanted.finish_reason]
        assert answer["finish_reason"] == wanted.finish_reason
        assert {piece["num_input_tokens"] for piece in [answer, *pieces]} == {wanted.prompt_tokens}
        tokens = sum(piece["num_output_tokens"] for piece in pieces)
        assert answer["num_output_tokens"] == tokens == len(wanted.token_ids)
    assert max(counts) > TOKENS / 2


def test_a_grpc_stream_carries_several_answers_at_once(server: Server, offline: list[Generated]) -> None:
    stream = Stream(server)
    for i, prompt in enumerate(PROMPTS):
        stream.send(prompt, str(i), max_tokens=TOKENS, stream=True)
    answers = stream.collect(len(PROMPTS))
    stream.client.stop_stream()
    for i, wanted in enumerate(offline):
        assert "".join(text for text, _ in answers[str(i)]) == wanted.text
        assert answers[str(i)][-1][1] == wanted.finish_reason


def test_the_inputs_of_tritons_openai_frontend(server: Server, offline: list[Generated]) -> None:
    """The tensors that server/python/openai makes for a model of the Python backend, names, types and shapes."""
    given = {
        "text_input": ("BYTES", np.array([[PROMPTS[0].encode()]], object)),
        "stream": ("BOOL", np.array([[False]])),
        "max_tokens": ("INT32", np.int32([[TOKENS]])),
        "stop_words": ("BYTES", np.array([[b"\x00never", b"nor this"]], object)),
        "top_p": ("FP32", np.float32([[1.0]])),
        "frequency_penalty": ("FP32", np.float32([[0.0]])),
        "presence_penalty": ("FP32", np.float32([[0.0]])),
        "seed": ("UINT64", np.uint64([[7]])),
        "temperature": ("FP32", np.float32([[0.0]])),
        "return_num_input_tokens": ("BOOL", np.array([[True]])),
        "return_num_output_tokens": ("BOOL", np.array([[True]])),
    }
    stream = Stream(server)
    inputs = [triton_server.tensor(name, kind, value) for name, (kind, value) in given.items()]
    stream.client.async_stream_infer("llama", inputs, request_id="7")
    assert stream.collect(1)["7"] == [(offline[0].text, offline[0].finish_reason)]
    stream.client.stop_stream()


def test_sampling_is_per_request(server: Server, decoder: Path) -> None:
    settings = [
        {"temperature": 0.8, "seed": 5},
        {"temperature": 1.5, "seed": 5, "top_k": 20},
        {"temperature": 1.0, "seed": 6, "top_p": 0.7, "repetition_penalty": 1.3},
        {"repetition_penalty": 2.0},
    ]
    exact = [{k: float(np.float32(v)) if isinstance(v, float) else v for k, v in s.items()} for s in settings]
    wanted = [generate(decoder, PROMPTS[:1], Sampling(max_tokens=TOKENS, **s), threads=1)[0] for s in exact]
    with ThreadPoolExecutor(len(settings)) as pool:
        answers = list(pool.map(lambda s: ask(server, PROMPTS[0], **s), settings))
    assert [a["text_output"] for a in answers] == [w.text for w in wanted]
    assert len({w.text for w in wanted}) == len(settings)


def test_stop_words_end_an_answer(server: Server, offline: list[Generated]) -> None:
    text = offline[0].text
    stop = text[len(text) // 2 :][:3]
    answer = ask(server, PROMPTS[0], stop_words=["\x00never", stop])
    assert (answer["text_output"], answer["finish_reason"]) == (text[: text.index(stop)], "stop")


def test_a_chat_goes_through_the_template(server: Server) -> None:
    for content in ("Guten Tag", [{"type": "text", "text": "Guten Tag"}]):
        messages = json.dumps([{"role": "user", "content": content}])
        status, text = server.request(f"{MODEL}/generate", {"messages": messages, "max_tokens": TOKENS})
        assert status == 200
        assert json.loads(text)["text_output"] == ask(server, "<user>Guten Tag<assistant>")["text_output"]


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"text_input": "long " * 400}, "tokens; this model takes at most 511"),
        ({"text_input": "long " * 20000}, "characters; this model takes at most 511 tokens"),
        ({"text_input": ""}, "no tokens"),
        ({"max_tokens": 8}, "give either text_input or messages"),
        ({"text_input": "x", "messages": "[]"}, "give either text_input or messages"),
        ({"text_input": "x", "max_tokens": 513}, "at most 512"),
        ({"text_input": "x", "max_tokens": 0}, "max_tokens is 0"),
        ({"text_input": "x", "max_token": 8}, "'max_token' is not a field"),
        ({"text_input": "x", "temperature": -1.0}, "temperature is -1.0"),
        ({"text_input": "x", "presence_penalty": 0.5}, "presence_penalty is not supported"),
        ({"text_input": "x", "stop_words": [""]}, "stop is"),
        ({"text_input": ["x", "y"]}, "batch-size must be <= 1"),
        ({"text_input": "x", "temperature": 1.0, "repetition_penalty": 1e-44}, "it must be a number from 0.01 to 100"),
        ({"text_input": "x", "temperature": 1e30, "top_p": 1e-20}, "it must be a number from 0 (greedy) to 100"),
        ({"text_input": "x", "stop_words": [f"{i:010d}" for i in range(10000)]}, "it must be at most 64 strings"),
        ({"text_input": "x", "stop_words": ["q" * 100000]}, "it must be strings of 1 to 1024 characters"),
        ({"messages": '[{"a":' + "[" * 991 + "]" * 991 + "}]"}, "nested deeper than 32 levels"),
        ({"messages": "[" * 15000 + "]" * 15000}, "nested deeper than 32 levels"),
        ({"messages": '[{"role": "user", "content": [{"type": "image_url"}]}]'}, "a part of type 'image_url'"),
        ({"messages": "[1]"}, "must be a JSON list"),
        ({"messages": "["}, "not JSON"),
        ({"messages": '[{"role": "user", "content": "\\ud83d"}]'}, "not Unicode"),
        (b'{"text_input": "\xff"}', "not UTF-8"),
        (b"", "failed to parse"),
    ],
)
def test_bad_requests_are_refused(server: Server, fields: Any, why: str) -> None:
    for path in ("generate", "generate_stream"):
        status, text = server.request(f"{MODEL}/{path}", fields, timeout=10)
        assert status in (400, 500)
        assert why in text


def test_bad_parameters_over_grpc(server: Server) -> None:
    stream = Stream(server)
    stream.send("x", "0", max_tokens="many")
    assert "max_tokens is 'many'; it must be of type INT32" in str(stream.answers.get(timeout=10)[1])
    stream.send("x", "1", max_tokens=True)
    assert "max_tokens is True; it must be of type INT32" in str(stream.answers.get(timeout=10)[1])
    stream.send("x", "2", text_input="y")
    assert "text_input is given twice" in str(stream.answers.get(timeout=10)[1])
    stream.send("x", "3", stop_words="y", max_tokens=4)
    assert stream.collect(1)["3"][-1][1] in ("stop", "length")
    stream.client.stop_stream()


def test_attackers_cost_the_others_nothing(server: Server, offline: list[Generated]) -> None:
    """More of them than there are slots: each is refused and gives its slot back. The engine is not started again."""
    engine, user = server.engine().pid, {"role": "user", "content": "hang"}
    hostile: list[dict[str, Any]] = [
        {"messages": '[{"a":' + "[" * 991 + "]" * 991 + "}]"},
        {"text_input": "x", "repetition_penalty": 1e-44, "temperature": 1.0},
        {"text_input": "x", "stop_words": [f"{i:05d}" * 200 for i in range(2000)]},
        {"messages": json.dumps([user | {"content": 3}])},
    ]
    with ThreadPoolExecutor(8) as pool:
        hanging = [pool.submit(server.request, f"{MODEL}/generate", {"messages": json.dumps([user])}) for _ in "ab"]
        asked = [pool.submit(server.request, f"{MODEL}/generate", each) for each in hostile * (ROWS + QUEUE)]
        most = {
            "text_input": PROMPTS[0],
            "max_tokens": 4,
            "temperature": 100.0,
            "top_p": 1e-20,
            "stop_words": ["q" * 999] * 64,
        }
        assert server.request(f"{MODEL}/generate", most)[0] == 200  # in range, if odd
        for prompt, wanted in zip(PROMPTS, offline, strict=True):
            assert ask(server, prompt)["text_output"] == wanted.text
        assert not any(each.done() for each in hanging)  # the others did not wait for them
        assert all(each.result()[0] == 400 for each in asked)
        assert all("it takes longer than 5 seconds" in each.result()[1] for each in hanging)
    assert server.engine().pid == engine


def test_more_requests_than_may_wait(server: Server) -> None:
    count = ROWS + QUEUE + 10
    with ThreadPoolExecutor(count) as pool:
        asked = [pool.submit(server.request, f"{MODEL}/generate", LONG) for _ in range(count)]
        answers = [each.result() for each in asked]
    refused = [text for status, text in answers if status != 200]
    assert 0 < len(refused) <= 10
    assert all("are running or waiting already" in text for text in refused)
    assert len({text for status, text in answers if status == 200}) == 1


@pytest.mark.parametrize("streamed", [True, False])
def test_clients_that_disconnect_give_their_rows_back(server: Server, streamed: bool) -> None:
    """Triton 2.51 does not tell the model of those that do not stream: their answers are made and thrown away."""
    before = server.metrics()
    path = "generate_stream" if streamed else "generate"
    connections = [started(server, LONG | {"stream": streamed}, path) for _ in range(2 * ROWS)]  # half have to wait
    until(lambda: server.metrics()["active"] == ROWS)
    for connection in connections:
        connection.close()
    until(lambda: server.metrics()["active"] == server.metrics()["waiting"] == 0)
    after = server.metrics()
    if streamed:
        assert after["requests cancelled"] > before.get("requests cancelled", 0)
        assert after["generated_tokens"] - before["generated_tokens"] < len(connections) * TOO_LONG


def test_a_grpc_stream_that_is_cancelled(server: Server) -> None:
    before = server.metrics().get("requests cancelled", 0)
    stream = Stream(server)
    for i in range(ROWS + QUEUE):
        stream.send("Once", str(i), stream=True, ignore_eos=True, max_tokens=TOO_LONG)
    stream.answers.get(timeout=10)
    stream.client.stop_stream(cancel_requests=True)
    until(lambda: server.metrics().get("requests cancelled", 0) > before)


@pytest.mark.parametrize("seconds", [4, pytest.param(60, marks=pytest.mark.slow)])
def test_sixteen_clients(server: Server, offline: list[Generated], seconds: int) -> None:
    """Half over HTTP, half over gRPC; some go away in the middle. Every answer is right, and memory stays flat."""
    end = time.monotonic() + seconds
    errors: list[str] = []
    answered = [0] * 16

    def client(number: int) -> None:
        over = Stream(server) if number % 2 else None
        try:
            for turn in itertools.count(number):
                if time.monotonic() > end:
                    break
                i = turn % len(PROMPTS)
                if turn % 7 == 0:
                    connection = started(server, LONG | {"stream": True})
                    connection.getresponse().read(20)
                    connection.close()
                elif over is None:
                    pieces = stream(server, PROMPTS[i])
                    assert "".join(piece["text_output"] for piece in pieces) == offline[i].text
                else:
                    over.send(PROMPTS[i], str(turn), max_tokens=TOKENS, stream=True)
                    assert "".join(text for text, _ in over.collect(1)[str(turn)]) == offline[i].text
                answered[number] += 1
        except BaseException as error:
            errors.append(f"client {number}: {error!r}")
        finally:
            if over is not None:
                over.client.stop_stream()

    threads = [threading.Thread(target=client, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    time.sleep(seconds / 3)
    before = resident(server)
    for thread in threads:
        thread.join(seconds + 60)
    assert not errors
    assert min(answered) >= 2
    growth = {name: size - before[name] for name, size in resident(server).items()}
    assert all(size < 8 << 20 for size in growth.values()), growth


def resident(server: Server) -> dict[str, int]:
    """Bytes in memory of the three processes; psutil's rss."""
    processes = {"server": server.process, "stub": server.stub(), "engine": server.engine()}
    return {name: process.memory_info().rss for name, process in processes.items()}


def test_a_killed_engine_is_started_again(server: Server) -> None:
    before = server.metrics().get("engine_restarts", 0)
    with ThreadPoolExecutor(2 * ROWS) as pool:
        asked = [pool.submit(server.request, f"{MODEL}/generate", LONG) for _ in range(2 * ROWS)]
        until(lambda: server.metrics()["active"] > 0)
        server.engine().kill()
        answers = [each.result(timeout=10) for each in asked]
    told = [text for status, text in answers if status != 200]
    assert told
    assert all("killed by signal 9" in text for text in told)
    until(lambda: server.request(f"{MODEL}/generate", {"text_input": "x", "max_tokens": 1})[0] == 200, 60)
    until(lambda: server.metrics()["engine_restarts"] == before + 1)


def test_after_a_killed_stub_the_model_is_loaded_again(server: Server, offline: list[Generated]) -> None:
    """Triton 2.51 does not start a decoupled model's stub again, and requests that ran in it are never answered."""
    running = started(server, LONG | {"stream": True})
    until(lambda: server.metrics()["active"] == 1)
    stub, engine = server.stub(), server.engine()
    stub.send_signal(signal.SIGKILL)
    psutil.wait_procs([engine], timeout=20)
    assert not engine.is_running()  # it ends with its input
    status, text = server.request(f"{MODEL}/generate", {"text_input": "x"}, timeout=10)
    assert status == 400
    assert "not healthy" in text
    running.close()
    assert server.request("/v2/repository/models/llama/unload", {})[0] == 200
    assert server.request("/v2/repository/models/llama/load", {}, timeout=120)[0] == 200
    assert server.stub().pid != stub.pid
    assert ask(server, PROMPTS[1])["text_output"] == offline[1].text


def test_what_does_not_load_says_why(decoder: Path, tmp_path: Path) -> None:
    """Also a tensorrt_plan: this Triton has no TensorRT backend, and says so after it has understood the config."""
    repository = tmp_path / "models"
    write_triton_repo(decoder, repository, model_name="bare")  # Triton's own Python, which has numpy only
    settings = {"python": sys.executable, "threads": "1"}
    damaged = write_triton_repo(decoder, repository, model_name="damaged", parameters=settings).model
    path = damaged / "1" / "llama.onnx"
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content[:1000])
    plan = write_triton_repo(plan_of(tiny_onnx.quantized(tmp_path / "encoder.onnx")), repository).model
    broken = write_triton_repo(plan_of(tiny_onnx.quantized(tmp_path / "broken.onnx")), repository).model
    text = (broken / "config.pbtxt").read_text()
    (broken / "config.pbtxt").write_text(text.replace('profile: [ "0" ]', 'profil: [ "0" ]'))
    assert plan.name == "encoder"
    wanted = {
        "bare": "No module named 'pydantic'",
        "damaged": "not an ONNX file, or cut short",
        "encoder": "unable to find backend library for backend 'tensorrt'",
        "broken": 'has no field named "profil"',
    }
    with triton_server.running(repository, tmp_path / "server", "--model-control-mode=explicit") as server:
        for name, why in wanted.items():
            status, text = server.request(f"/v2/repository/models/{name}/load", {}, timeout=120)
            assert status >= 400
            assert why in (server.log if name == "broken" else text)
        assert server.request("/v2/health/live")[0] == 200
