"""The model that generates in a Triton repository: text or a chat in, a stream of text out.

Triton's Python backend runs it: the repository's model.py only imports it from awq_trt.zip beside it. The engine, its
KV cache and the tokenizer live in a process of their own (engine_process.py), and no tensor of the cache leaves it.
What is here: a request's fields become a message to that process, its events become Triton responses, and the request
of a client that has gone is cancelled. This side needs only Python, numpy, and what the backend provides.

Requests run side by side in the rows of the cache (continuous batching, generator.py), so `execute` only hands them
over: the model is decoupled, and none of Triton's batchers has anything to do.
"""

from __future__ import annotations

import dataclasses
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from awq_trt.errors import AwqTrtError
from awq_trt.serve.chat import check_size, read_messages
from awq_trt.serve.sampling import Sampling
from awq_trt.serve.triton.supervisor import Engine

try:
    import triton_python_backend_utils as pb_utils
except ImportError:  # outside of Triton, where repository.py reads the tables
    pb_utils = None

FIELDS = {
    "text_input": ("STRING", 1),
    "messages": ("STRING", 1),
    "stream": ("BOOL", 1),
    "max_tokens": ("INT32", 1),
    "temperature": ("FP32", 1),
    "top_k": ("INT32", 1),
    "top_p": ("FP32", 1),
    "repetition_penalty": ("FP32", 1),
    "stop_words": ("STRING", -1),
    "seed": ("UINT64", 1),
    "ignore_eos": ("BOOL", 1),
    "frequency_penalty": ("FP32", 1),
    "presence_penalty": ("FP32", 1),
    "return_num_input_tokens": ("BOOL", 1),
    "return_num_output_tokens": ("BOOL", 1),
}
"""Inputs, all optional: Triton's type and size. The names are those that Triton's own OpenAI frontend sends; its two
penalties may only be 0, and both counts are always returned. A field may be given as an input or, unless it is a
list, as a request parameter of the same name. `messages` is a JSON list of {"role": ..., "content": ...}."""

OUTPUTS = {
    "text_output": "STRING",
    "finish_reason": "STRING",
    "num_input_tokens": "INT32",
    "num_output_tokens": "INT32",
}
"""Outputs, one element each. With `stream` a response is a piece: its text, and how many tokens it took."""

SAMPLING = ("temperature", "top_k", "top_p", "repetition_penalty", "seed", "ignore_eos")
"""Fields that go to `Sampling` as they are, max_tokens and stop_words apart."""

LIMITS = {"max_queue": 64, "max_prompt_tokens": None, "max_tokens": None, "default_max_tokens": 256}
"""Parameters of config.pbtxt that limit requests, and what holds where they are missing: requests that may wait for a
row of the cache, tokens of a prompt, tokens to be generated (None: what the cache has room for), and those of a
request that does not say."""

POLL_SECONDS = 0.1
"""How often clients that have gone are looked for, and metrics reported. Asking is a round trip to Triton's process."""


class RefusedError(Exception):
    """A request that cannot be taken: the text for the client, and a name of pb_utils.TritonError's codes."""

    def __init__(self, text: str, code: str = "INVALID_ARG") -> None:
        super().__init__(text)
        self.code = code


@dataclass(eq=False)
class InFlightRequest:
    """A request that has not had its last response.

    Whoever uses the sender holds the lock and looks at `done` first: to ask a sender that has sent its last response
    whether it is cancelled ends the whole server with a segmentation fault (seen in Triton 2.51).
    """

    sender: Any
    started: float = field(default_factory=time.monotonic)
    stream: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)
    done: bool = False  # has had its last response
    failed: bool = False  # a response could not be sent
    cancelled: bool = False
    prompt_tokens: int = 0
    text: str = ""  # not sent yet
    tokens: int = 0  # not sent yet
    answered: bool = False  # has had a token

    def send_piece(self, finish: str | None) -> None:
        """A response with what has come since the last one; the last one where there is a finish reason."""
        values = {
            "text_output": self.text.encode(),
            "finish_reason": (finish or "").encode(),
            "num_input_tokens": self.prompt_tokens,
            "num_output_tokens": self.tokens,
        }
        self.text, self.tokens = "", 0
        kinds = {"STRING": np.object_, "INT32": np.int32}
        tensors = [pb_utils.Tensor(name, np.array([[values[name]]], kinds[kind])) for name, kind in OUTPUTS.items()]
        self._send(pb_utils.InferenceResponse(output_tensors=tensors), last=finish is not None)

    def send_error(self, text: str, code: str) -> None:
        """The last response: an error."""
        error = pb_utils.TritonError(text, getattr(pb_utils.TritonError, code))
        self._send(pb_utils.InferenceResponse(output_tensors=[], error=error), last=True)

    def _send(self, response: Any, last: bool) -> None:
        with self.lock:
            if self.done:
                return
            self.done = last
            final = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL
            try:
                self.sender.send(response, flags=final if last else 0)
            except Exception as error:  # of one client; the thread serves all of them
                log(f"a response could not be sent: {error}")
                self.done = self.failed = True  # a piece is missing, so the answer ends here
                with suppress(Exception):
                    why = pb_utils.TritonError(f"a response could not be sent: {error}")
                    self.sender.send(pb_utils.InferenceResponse(output_tensors=[], error=why), flags=final)

    def has_lost_its_client(self) -> bool:
        """Whether the client has gone, or cannot be reached; True only once."""
        with self.lock:
            if self.cancelled or (self.done and not self.failed):
                return False
            self.cancelled = self.failed or bool(self.sender.is_cancelled())
            return self.cancelled


class TritonPythonModel:
    """What Triton's Python backend calls: `initialize` once, `execute` with requests, `finalize` once."""

    def initialize(self, args: dict[str, str]) -> None:
        """Start the engine and wait until it is ready; what is wrong with it is the error that Triton shows."""
        parameters = {k: v["string_value"] for k, v in json.loads(args["model_config"])["parameters"].items()}
        self._limits: dict[str, Any] = {
            n: int(parameters[n]) if parameters.get(n) else default for n, default in LIMITS.items()
        }
        self._lock = threading.Lock()
        self._in_flight: dict[int, InFlightRequest] = {}
        self._next_id = 0
        self._metrics = Metrics(args)
        folder = Path(args["model_repository"], args["model_version"]).resolve()
        device = args["model_instance_device_id"] if args["model_instance_kind"] == "GPU" else None
        self._engine = Engine(folder, parameters, device, self._read, self._lost, log)
        self._engine.start()
        threading.Thread(target=self._watch_clients, daemon=True).start()

    def execute(self, requests: list[Any]) -> None:
        """Hand requests over to the engine, or refuse them."""
        for each in requests:
            request = InFlightRequest(each.get_response_sender())
            try:
                self._add(request, fields_of(each))
            except RefusedError as error:
                self._fail(request, "refused", str(error), error.code)
            except AwqTrtError as error:
                self._fail(request, "refused", str(error), "INVALID_ARG")
            except Exception as error:  # whatever it is, the client gets an answer
                self._fail(request, "error", f"{type(error).__name__}: {error}", "INTERNAL")

    def is_ready(self) -> bool:
        """For /v2/models/NAME/ready, in Triton versions that ask."""
        return self._engine.ready is not None

    def finalize(self) -> None:
        """End the engine's process. Triton has waited for all requests."""
        self._engine.stop()

    def _add(self, request: InFlightRequest, fields: dict[str, Any]) -> None:
        given = [name for name in ("text_input", "messages") if name in fields]
        if len(given) != 1:
            raise RefusedError(f"give either text_input or messages; this request has {given or 'neither'}.")
        for name in ("frequency_penalty", "presence_penalty"):
            if fields.get(name, 0) != 0:
                raise RefusedError(f"{name} is not supported, only repetition_penalty. Leave it out.")
        limit, most = self._limits["max_tokens"], fields.get("max_tokens", self._limits["default_max_tokens"])
        if limit is not None and most > limit:
            if "max_tokens" in fields:
                raise RefusedError(f"max_tokens is {most}; this model generates at most {limit} tokens.")
            most = limit
        given_settings = {name: fields[name] for name in SAMPLING if name in fields}
        sampling = Sampling(**given_settings, max_tokens=most, stop=fields.get("stop_words", ()))
        if (ready := self._engine.ready) is not None:
            check_size(len(fields[given[0]]), ready["prompt_tokens"])
        prompt = fields["text_input"] if "text_input" in fields else read_messages(fields["messages"])
        request.stream = fields.get("stream", False)
        with self._slot(request) as number:
            self._engine.send({"add": number, "prompt": prompt, "sampling": dataclasses.asdict(sampling)})

    @contextmanager
    def _slot(self, request: InFlightRequest) -> Iterator[int]:
        """A number for a request that is handed over, by which the engine's events find it; given back if that fails.

        Afterwards it is given back by the request's last event, whatever becomes of the answer, or by the engine's end.
        """
        with self._lock:
            if (ready := self._engine.ready) is None:
                raise RefusedError(
                    f"the engine is being started again ({self._engine.trouble}). Try again.", "UNAVAILABLE"
                )
            if len(self._in_flight) >= ready["rows"] + self._limits["max_queue"]:
                raise RefusedError(
                    f"{len(self._in_flight)} requests are running or waiting already. Try again.", "UNAVAILABLE"
                )
            self._next_id += 1
            number = self._next_id
            self._in_flight[number] = request
            try:
                yield number
            except BaseException:
                del self._in_flight[number]
                raise

    def _read(self, message: dict[str, Any]) -> None:
        """Events of the engine. Only the engine's reading thread comes here."""
        for event in message["events"]:
            last = event.get("finish") or event.get("refused")
            with self._lock:
                request = (self._in_flight.pop if last else self._in_flight.get)(event["id"], None)
            if request is not None:
                try:
                    self._respond(request, event)
                except Exception as error:  # of one request; the others of this message have theirs yet to come
                    request.failed = True
                    self._fail(request, "error", f"{type(error).__name__}: {error}", "INTERNAL")
        self._metrics.active, self._metrics.waiting = message["active"], message["waiting"]

    def _respond(self, request: InFlightRequest, event: dict[str, Any]) -> None:
        if "prompt_tokens" in event:
            request.prompt_tokens = event["prompt_tokens"]
            self._metrics.add("prompt_tokens", event["prompt_tokens"])
            return
        if "refused" in event:
            self._fail(request, "refused", event["refused"], "INVALID_ARG")
            return
        if event["tokens"] and not request.answered:
            request.answered = True
            self._metrics.add("first_tokens")
            self._metrics.add("first_token_seconds", time.monotonic() - request.started)
        self._metrics.add("generated_tokens", event["tokens"])
        request.text += event["text"]
        request.tokens += event["tokens"]
        if event["finish"] == "error":
            self._fail(request, "error", event["error"], "INTERNAL")
        elif event["finish"] is not None:
            self._metrics.add("requests", outcome=event["finish"])
            request.send_piece(event["finish"])
        elif request.stream and event["text"]:
            request.send_piece(None)

    def _fail(self, request: InFlightRequest, outcome: str, text: str, code: str) -> None:
        self._metrics.add("requests", outcome=outcome)
        request.send_error(text, code)

    def _lost(self, why: str) -> None:
        """The engine's process has ended without being asked to."""
        with self._lock:
            requests, self._in_flight = list(self._in_flight.values()), {}
        self._metrics.active = self._metrics.waiting = 0
        self._metrics.add("engine_restarts")
        for request in requests:
            try:
                text = f"the engine is started again ({why}). Send the request again."
                self._fail(request, "error", text, "UNAVAILABLE")
            except Exception as error:  # of one client
                log(f"{type(error).__name__}: {error}")

    def _watch_clients(self) -> None:
        """Cancel the requests of clients that have gone, and report metrics, from time to time."""
        while not self._engine.stopping.wait(POLL_SECONDS):
            try:
                with self._lock:
                    requests = list(self._in_flight.items())
                for number, request in requests:
                    if request.has_lost_its_client():
                        with self._lock:
                            self._engine.send({"cancel": number})
                self._metrics.report()
            except Exception as error:  # next time, then
                log(f"{type(error).__name__}: {error}")


COUNTERS = {
    "requests": "Requests that have ended, by outcome",
    "prompt_tokens": "Tokens of prompts",
    "generated_tokens": "Generated tokens",
    "first_tokens": "Requests that have had their first token",
    "first_token_seconds": "Seconds from a request's arrival to its first token, summed",
    "engine_restarts": "Times the engine's process was started again",
}
GAUGES = {"active": "Requests that have a row of the KV cache", "waiting": "Requests that wait for a row"}


class Metrics:
    """Counts, reported to Triton's own metrics (port 8002) now and then: every report is a message to its process."""

    def __init__(self, args: dict[str, str]) -> None:
        self.active = self.waiting = 0  # requests that have a row of the cache, and that wait for one
        self._labels = {"model": args["model_name"], "version": args["model_version"]}
        self._instance = {"instance": args["model_instance_name"]}
        self._counts: dict[tuple[str, str], float] = {}  # since the last report, by name and outcome
        self._lock = threading.Lock()
        self._metrics: dict[tuple[str, str], Any] = {}
        family = pb_utils.MetricFamily
        self._families = {
            name: family(name=f"awq_trt_{name}", description=text, kind=kind)
            for table, kind in ((COUNTERS, family.COUNTER), (GAUGES, family.GAUGE))
            for name, text in table.items()
        }

    def add(self, name: str, count: float = 1, outcome: str = "") -> None:
        """Count something."""
        with self._lock:
            self._counts[name, outcome] = self._counts.get((name, outcome), 0) + count

    def report(self) -> None:
        """Tell Triton what has been counted since."""
        gauges = {name: getattr(self, name) for name in GAUGES}
        with self._lock:
            counts, self._counts = self._counts, {}
        for (name, outcome), count in counts.items():
            self._metric(name, outcome).increment(count)
        for name, value in gauges.items():  # after the counts of what led to it
            self._metric(name).set(value)

    def _metric(self, name: str, outcome: str = "") -> Any:
        if (name, outcome) not in self._metrics:
            labels = self._labels | ({"outcome": outcome} if outcome else {})
            labels |= self._instance if name in GAUGES else {}
            self._metrics[name, outcome] = self._families[name].Metric(labels=labels)
        return self._metrics[name, outcome]


def fields_of(request: Any) -> dict[str, Any]:
    """A request's fields by name, from its inputs and parameters, as Python values.

    Raises:
        RefusedError: an unknown field, one given twice, or a value that cannot be read.
    """
    given = json.loads(request.parameters() or "{}")
    fields = {name: _parameter(name, value) for name, value in given.items() if not name.startswith("triton_")}
    for tensor in request.inputs():
        name = tensor.name()
        if name in fields:
            raise RefusedError(f"{name} is given twice, as an input and as a parameter.")
        try:
            values = [v.decode() if isinstance(v, bytes) else v for v in tensor.as_numpy().reshape(-1).tolist()]
        except UnicodeDecodeError as error:
            raise RefusedError(f"{name} is not UTF-8 text: {error}.") from error
        if FIELDS[name][1] == 1 and len(values) != 1:
            raise RefusedError(f"{name} has {len(values)} values; it takes one.")
        fields[name] = values if FIELDS[name][1] == -1 else values[0]
    return fields


def _parameter(name: str, value: Any) -> Any:
    """The value of a request parameter, whose type is whatever JSON made of it."""
    if name not in FIELDS:
        raise RefusedError(f"{name!r} is not a field of this model; it knows {', '.join(FIELDS)}.")
    kind, size = FIELDS[name]
    wanted = {"STRING": str, "BOOL": bool, "FP32": (int, float)}.get(kind, int)
    if size == -1 and isinstance(value, str):
        return [value]
    if not isinstance(value, wanted) or (isinstance(value, bool) and kind != "BOOL"):  # type: ignore[arg-type]
        raise RefusedError(f"{name} is {value!r:.100}; it must be of type {kind}.")
    return value


def log(text: str) -> None:
    """A line in Triton's log."""
    pb_utils.Logger.log_info(text)
