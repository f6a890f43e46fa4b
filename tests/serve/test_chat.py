"""Chats: what is refused, what templates are given, and what becomes of templates that do not end."""

from __future__ import annotations

import json
import os
import signal
import threading
from typing import Any

import pytest
import tiny_models
from tokenizers import processors

from awq_trt.errors import AwqTrtError
from awq_trt.serve import chat, render_process
from awq_trt.serve.generate import encode

LIST = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
TRIMMED = "{% for m in messages %}{{ '[' + m.role + ']' + m['content'] | trim }}{% endfor %}[a]"
EITHER = """{{ bos_token }}{% for m in messages %}<{{ m.role }}>{% if m.content is string %}{{ m.content }}{% else %}
{%- for part in m.content %}{% if part.type == 'image' %}<image>{% else %}{{ part.text }}{% endif %}{% endfor %}
{%- endif %}{% endfor %}<a>"""
ONLY_PARTS = "{% for m in messages %}<{{ m.role }}>{% for p in m.content %}{{ p.text }}{% endfor %}{% endfor %}<a>"
PARTS = [{"type": "text", "text": "Hello"}, {"type": "text", "text": "you"}]


def user(content: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": content}]


def tokenizer(template: Any) -> Any:
    found = tiny_models.tokenizer()
    found.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>"})
    found.chat_template = template
    return found


@pytest.mark.parametrize(
    "template", [LIST, TRIMMED, EITHER, "{{ messages | tojson }}", {"default": LIST, "tool_use": ""}]
)
def test_text_is_that_of_transformers(template: Any) -> None:
    one = tokenizer(template)
    messages = [{"role": "system", "content": "Be kind. 日本語"}, *user(' "Hi"\n ')]
    messages += [{"role": "assistant", "content": "Hello", "tool_calls": None}, *user("é🙂")]
    wanted = one.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert chat.render(one, messages) == wanted
    assert encode(one, messages) == one(wanted, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize(
    ("template", "text", "of_a_string"),
    [
        (LIST, "<user>Hello\nyou\n<a>", "<user>Hello\n<a>"),
        (TRIMMED, "[user]Hello\nyou[a]", "[user]Hello[a]"),
        (EITHER, "<s><user>Helloyou<a>", "<s><user>Hello<a>"),
        (ONLY_PARTS, "<user>Helloyou<a>", "<user>Hello<a>"),  # a string's characters have no .text: it would be lost
    ],
)
def test_parts_of_text_are_the_text(template: str, text: str, of_a_string: str) -> None:
    """As transformers has it where the template reads parts, joined where it would print the list."""
    one = tokenizer(template)
    assert chat.render(one, user(PARTS)) == text
    assert chat.render(one, user("Hello")) == of_a_string
    if template in (EITHER, ONLY_PARTS):
        assert text == one.apply_chat_template(user(PARTS), add_generation_prompt=True, tokenize=False)


def test_each_role_has_the_form_that_the_template_reads() -> None:
    loop = "{% for p in m.content %}{{ p.text }}{% endfor %}"
    template = (
        "{% for m in messages %}{% if m.role == 'ROLE' %}" + loop + "{% else %}<{{ m.content }}>{% endif %}{% endfor %}"
    )
    for role, text in (("system", "Helloyou<Hello\nyou><Hi>"), ("assistant", "<Hello\nyou><Hello\nyou>Hi")):
        one = tokenizer(template.replace("ROLE", role))
        messages = [{"role": "system", "content": PARTS}, *user(PARTS), {"role": "assistant", "content": "Hi"}]
        assert chat.render(one, messages) == text


@pytest.mark.parametrize(
    ("messages", "why"),
    [
        (user([{"type": "image_url", "image_url": {"url": "x"}}]), r"messages\[0\] has a part of type 'image_url'"),
        (user([*PARTS, {"type": "text"}]), "part of type 'text'"),
        (user(["Hello"]), "part of type 'str'"),
        (user(3), "it is a int"),
        (user({"text": "Hello"}), "it is a dict"),
        ([*user("x"), {"content": "x"}], r"messages\[1\] has no role"),
        ([{"role": None, "content": "x"}], "no role"),
        (user("x") * 1025, "1025 messages; a chat has 1 to 1024"),
        ([{"role": "user", "content": "x", "more": object()}], "cannot be rendered: .*object"),
    ],
)
def test_what_is_no_chat_of_texts(messages: Any, why: str) -> None:
    with pytest.raises(AwqTrtError, match=why):
        encode(tokenizer(EITHER), messages)


def test_depth_and_size() -> None:
    def nested(levels: int) -> str:
        return '[{"role": "user", "content": "[[]{", "a": ' + "[" * levels + "]" * levels + "}]"

    assert chat.read_messages(nested(30))[0]["content"] == "[[]{"
    for levels in (31, 991, 100_000):
        with pytest.raises(AwqTrtError, match="deeper than 32"):
            chat.read_messages(nested(levels))
    deep: list[Any] = []
    for _ in range(10_000):
        deep = [deep]
    with pytest.raises(AwqTrtError, match="cannot be rendered"):
        encode(tokenizer(LIST), [{"role": "user", "content": "x", "a": deep}])
    for text, why in (
        ("[", "not JSON"),
        ("[" + "1" * 5000 + "]", "not JSON"),
        ("{}", "JSON list"),
        ("[1]", "JSON list"),
    ):
        with pytest.raises(AwqTrtError, match=why):
            chat.read_messages(text)
    for prompt in ("x" * 641, user("x" * 641)):
        with pytest.raises(AwqTrtError, match="characters; this model takes at most 10 tokens"):
            encode(tokenizer(LIST), prompt, 10)
    with pytest.raises(AwqTrtError, match="makes 1000 characters of them; 640 are the most"):
        encode(tokenizer("{{ 'x' * 1000 }}"), user("x"), 10)


ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
DOUBLING = "{% set n = namespace(s='x') %}{% for i in range(99) %}{% set n.s = n.s ~ n.s %}{% endfor %}{{ n.s }}"
RECURSIVE = "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}"


@pytest.mark.parametrize(
    ("template", "why"),
    [
        (ENDLESS, "longer than 1 seconds"),
        ("{{ 10 ** (10 ** 9) }}", "longer than 1 seconds|256 MiB"),
        (DOUBLING, "256 MiB"),
        (RECURSIVE, "recursion"),
        ("{{ messages[0].no.such }}", "no attribute"),
        ("{% for %}", "Expected"),
        (5, "."),
    ],
)
def test_templates_that_do_not_end(template: Any, why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """They cost their own request, and the next is rendered."""
    monkeypatch.setattr(chat, "SECONDS", 1 if "seconds" in why else 60)
    one = tokenizer(template)
    with pytest.raises(AwqTrtError, match=f"does not take these messages: .*({why})"):
        encode(one, user("x"))
    monkeypatch.setattr(chat, "SECONDS", 60)
    assert chat.render(tokenizer(LIST), user("Hi")) == "<user>Hi\n<a>"


def test_a_process_that_was_killed_is_replaced() -> None:
    one = tokenizer(LIST)
    chat.render(one, user("x"))
    (process,) = chat._idle
    process.kill()
    process.wait()
    assert chat.render(one, user("Hi")) == "<user>Hi\n<a>"
    (other,) = chat._idle
    other.send_signal(signal.SIGSTOP)
    answers: list[str] = []

    def ask() -> None:
        with pytest.raises(AwqTrtError, match="ended with status -9"):
            chat.render(one, user("x"))
        answers.append("refused")

    thread = threading.Thread(target=ask)
    thread.start()
    os.kill(other.pid, signal.SIGKILL)
    thread.join(20)
    assert answers == ["refused"]


@pytest.mark.parametrize("before", ["<s>", "[gMASK]<s>"])
@pytest.mark.parametrize("named", [True, False])
def test_a_rendered_chat_as_text_has_one_bos(before: str, named: bool) -> None:
    """As Triton's OpenAI frontend sends it; BOS may come from a post-processor alone, or be two tokens."""
    one = tokenizer("{{ bos_token }}" + LIST)
    one.add_special_tokens({"additional_special_tokens": ["[gMASK]"]})
    ids = {token: one.convert_tokens_to_ids(token) for token in ("<s>", "</s>", "[gMASK]")}
    first = " ".join(before.replace("]<", "] <").split())
    one.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{first} $A </s>", special_tokens=list(ids.items())
    )
    one.chat_template = before + LIST
    if not named:
        one.bos_token = None
    text = one.apply_chat_template(user("Hello"), add_generation_prompt=True, tokenize=False)
    plain = one("Hello")["input_ids"]
    assert encode(one, text) == encode(one, user("Hello"))
    assert encode(one, text).count(ids["<s>"]) == 1
    assert encode(one, "Hello") == plain
    assert plain[0] == ids[first.split()[0]]
    assert encode(one, "<s>Hello" if before == "<s>" else "Hello <s>").count(ids["<s>"]) == (
        1 if before == "<s>" else 2
    )


def test_the_process_reads_lines_until_its_input_ends() -> None:
    job = {"template": LIST, "tokens": {}, "messages": user("x"), "longest": 5, "seconds": 5}
    assert render_process.answer(job) == {"failed": "it makes 11 characters of them; 5 are the most."}
    assert render_process.answer(job | {"longest": 99}) == {"text": "<user>x\n<a>"}
    process = chat._start()
    out, _ = process.communicate(json.dumps(job | {"longest": 99}) + "\n", timeout=60)
    assert (json.loads(out), process.returncode) == ({"text": "<user>x\n<a>"}, 0)
