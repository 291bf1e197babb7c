"""Answers that must call tools: even from random logits, every answer consists of calls that fit the schemas."""

import json
from collections.abc import Mapping
from types import MappingProxyType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from precast.loaders.artifact.errors import PrecastError
from precast.loaders.artifact.manifest import SamplingDefaults
from precast.loaders.generation.chats import chat_form
from precast.loaders.generation.model import Model
from precast.loaders.generation.sampling_params import SamplingParams
from precast.loaders.text.chat_messages import ChatOptions
from precast.loaders.text.tokenizer import Tokenizer

TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}\n"
SCHEMA = {
    "type": "object",
    "properties": {"at": {"enum": ["é", 'a "b"']}, "n": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["at", "n"],
    "additionalProperties": False,
}
TOOLS = [
    {"type": "function", "function": {"name": "look", "parameters": SCHEMA}},
    {
        "name": "say-hi.2",
        "parameters": {
            **SCHEMA,
            "description": "A & B" * 13,
            "properties": {"n": {"const": None}},
            "required": [],
        },
    },
]
MESSAGES = [{"role": "user", "content": "the cat"}]
MARKERS = ["<tool_call>", "</tool_call>", "<|tool_call|>", "<|/tool_call|>", "[TOOL_CALLS]", "</think>"]
END = 1


class RandomEngine:
    """An engine with random logits."""

    context, slots, vocab, buckets, score_tokens = 4096, 2, 320, (4096,), 0
    windows: Mapping[str, int] = MappingProxyType({})

    def __init__(self, seed: int) -> None:
        self._rng = np.random.default_rng(seed)

    def new_cache(self) -> None:
        return None

    def prefill_chunk(self, tokens: list[int], cache: None, *, start: int, slot: int) -> Any:
        return self._step(1)

    def decode(self, rows: list[Any], cache: None) -> Any:
        return self._step(len(rows))

    def logits(self, step: Any) -> np.ndarray:
        return step.logits

    def _step(self, rows: int) -> Any:
        logits = self._rng.standard_normal((rows, self.vocab)).astype(np.float32)
        return SimpleNamespace(token=logits.argmax(-1), logits=logits)


@pytest.fixture(scope="module")
def random_model(tiny_source):
    """Return a function that makes a model with random answers, with the given special tokens and template."""
    pytest.importorskip("llguidance", reason="constraints need llguidance")

    def make(markers: list[str], template: str = TEMPLATE, seed: int = 0) -> Model:
        data = json.loads(tiny_source().tokenizer_json)
        special = {
            "special": True,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
        }
        for token_id, content in enumerate(markers, len(data["model"]["vocab"])):
            data["added_tokens"].append({"id": token_id, "content": content, **special})
        tokenizer = Tokenizer.from_json(
            json.dumps(data).encode(), chat_template=template, bos_token="<s>", eos_token="</s>"
        )
        manifest = SimpleNamespace(
            tokenizer=SimpleNamespace(eos_token_ids=(END,)), sampling=SamplingDefaults(), name="random"
        )
        engine: Any = RandomEngine(seed)
        target = SimpleNamespace(name="cpu", kernels=None)
        return Model(engine=engine, tokenizer=tokenizer, manifest=manifest, target=target, compiles=0)

    return make


def check(call: Any) -> None:
    arguments = json.loads(call.arguments)
    if call.name == "look":
        assert list(arguments) == ["at", "n"]
        assert arguments["at"] in ("é", 'a "b"')
        assert arguments["n"] in range(100)
    else:
        assert (call.name, arguments) in (("say-hi.2", {}), ("say-hi.2", {"n": None}))


FAMILIES = {
    "hermes": "<tool_call>\n%s\n</tool_call>",
    "llama3": "%s",
    "mistral": "[TOOL_CALLS] [%s]",
    "phi4": "<|tool_call|>[%s]<|/tool_call|>",
    "granite": "<|tool_call|>[%s]",
    "smollm3": "<tool_call>\n%s\n</tool_call>",
}


def free_answers(model: Model, family: str, strict: frozenset[str], count: int = 1) -> list[Any]:
    """Return streams of answers that may call tools."""
    form = chat_form(TOOLS, None, False, family, "auto", None, strict)
    return model.stream_chat_answers(MESSAGES, [SamplingParams(max_tokens=600)] * count, form)


def is_answer(model: Model, family: str, strict: frozenset[str], text: str) -> bool:
    """Return True if the text may be a whole answer that may call tools."""
    (stream,) = free_answers(model, family, strict)
    constraint = stream._sequence.sampler._constraint
    for token in [*model.tokenizer.encode(text, add_special_tokens=False), END]:
        if not constraint.mask()[token // 32] >> np.uint32(token % 32) & 1:
            return False
        if token != END:
            constraint.accept(token)
    return True


@pytest.mark.parametrize("markers", [[], MARKERS])
@pytest.mark.parametrize("family", FAMILIES)
def test_calls_of_strict_tools_follow_their_schemas_in_free_answers(random_model, family, markers):
    model = random_model(markers)

    def accepts(text: str, strict: frozenset[str] = frozenset({"look", "say-hi.2"})) -> bool:
        return is_answer(model, family, strict, text)

    key = "parameters" if family == "llama3" else "arguments"

    def call(name: str, arguments: Any) -> str:
        return FAMILIES[family] % f'{{"name": "{name}", "{key}": {json.dumps(arguments)}}}'

    assert accepts("the cat <sat> [on] {1} functools")
    assert accepts("")
    for before in ("", "the cat") if family != "llama3" else ("",):
        assert accepts(before + call("look", {"at": 'a "b"', "n": 7}))
        assert accepts(before + call("say-hi.2", {}))
        assert not accepts(before + call("look", {"at": 'a "b"', "n": -7}))
        assert not accepts(before + call("other", {}))
        assert accepts(before + call("look", {"n": "x"}), frozenset({"say-hi.2"}))
        assert not accepts(before + call("say-hi.2", {"n": 3}), frozenset({"say-hi.2"}))


@pytest.mark.parametrize("family", ["hermes", "mistral", "phi4", "granite", "smollm3"])
def test_random_answers_call_strict_tools_by_their_schemas(random_model, family):
    model, calls = random_model(MARKERS, seed=5), 0
    for stream in free_answers(model, family, frozenset({"look", "say-hi.2"}), 12):
        found = stream.finish()
        for call in found.tool_calls:
            check(call)
        calls += len(found.tool_calls)
    assert calls > 0


def test_strict_tools_need_a_known_form_of_calls(random_model):
    with pytest.raises(
        PrecastError, match="tools: strict needs a chat template that prescribes a known form"
    ):
        free_answers(random_model([]), None, frozenset({"look"}))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("tools", "given", "family", "text"),
    [
        (TOOLS, {"regex": "a"}, "hermes", "Sampling parameters: regex and strict cannot be combined; give"),
        (TOOLS, {"ignore_eos": True}, "hermes", "Sampling parameters: ignore_eos must be false with strict, because"),
        (TOOLS, {}, "gemma", "tools: calls of the family 'gemma' can be neither required nor strict; leave out"),
        (
            [{"name": "big", "parameters": {"properties": {"a" * 60_000: {}, "b" * 60_000: {}}}}],
            {},
            "hermes",
            "tools: with strict, names and parameters must have at most 100,000 characters in total, found 120,",
        ),
        (
            [{"name": "bad", "parameters": {"properties": {"a": {"if": {}}}}}],
            {},
            "hermes",
            "tools: parameters of 'bad' at #/properties/a: expected a schema that llguidance can enforce, found: Unim",
        ),
    ],
)  # fmt: skip
def test_errors_about_strict_tools_name_strict(random_model, tools, given, family, text):
    names = frozenset(str(tool.get("name", "look")) for tool in tools)
    form = chat_form(tools, None, False, family, "auto", None, names)
    with pytest.raises(PrecastError) as raised:
        random_model(MARKERS).stream_chat_answers(MESSAGES, [SamplingParams(**given)], form)
    assert str(raised.value).startswith(text)
    assert "with tool_choice" not in str(raised.value)
    assert "in tool_choice" not in str(raised.value)


@pytest.mark.parametrize("space", ["", " ", "\n\t", "\x1c", "\x1d", "\x1e\n", "\x1f"])
def test_space_before_a_call_does_not_lift_its_schema(random_model, space):
    """Phi-4's calls may begin an answer without a marker, and the parser skips all of Python's whitespace."""
    model = random_model([])
    strict = frozenset({"look"})
    assert not is_answer(
        model, "phi4", strict, space + 'functools[{"name": "look", "arguments": {"n": "x"}}]'
    )
    assert is_answer(model, "phi4", strict, space + "the cat functools[")


@pytest.mark.parametrize("markers", [[], MARKERS, [*MARKERS, "[ARGS]"]])
@pytest.mark.parametrize("family", ["hermes", "llama3", "mistral", "phi4", "granite", "smollm3"])
def test_every_answer_is_calls_by_the_schemas(random_model, family, markers):
    names = set()
    for seed in range(4):
        model = random_model(markers, seed=seed)
        found = model.chat(MESSAGES, tools=TOOLS, answer_format=family, tool_choice="required")
        assert (found.text, found.reasoning, found.finish_reason) == ("", "", "tool_calls")
        for call in found.tool_calls:
            check(call)
        names |= {call.name for call in found.tool_calls}
    assert names <= {"look", "say-hi.2"}


def test_a_tool_by_name(random_model):
    for seed in range(3):
        found = random_model(MARKERS, seed=seed).chat(
            MESSAGES,
            SamplingParams(temperature=1.0, seed=seed),
            tools=TOOLS,
            answer_format="hermes",
            tool_choice="look",
        )
        assert {call.name for call in found.tool_calls} == {"look"}


@pytest.mark.parametrize("name", ["get weather", "a{b", 'a"b', " é", "a\nb", "[ARGS]"])
@pytest.mark.parametrize("family", ["hermes", "llama3", "mistral", "phi4", "granite", "smollm3"])
@pytest.mark.parametrize("markers", [[], [*MARKERS, "[ARGS]"]])
def test_every_name_is_read_or_refused(random_model, family, markers, name):
    tools = [{"name": name, "parameters": {"properties": {}, "additionalProperties": False}}]
    model = random_model(markers)
    if family == "mistral" and markers:
        with pytest.raises(PrecastError) as raised:
            model.chat(MESSAGES, tools=tools, answer_format=family, tool_choice="required")
        assert str(raised.value) == (
            "tools: calls of the family 'mistral' allow only letters, digits, '_', '-', '.' and ':' in a tool's"
            f" name, found {name!r}; rename the tool."
        )
        return
    found = model.chat(MESSAGES, tools=tools, answer_format=family, tool_choice="required")
    assert (found.text, {call.name for call in found.tool_calls}) == ("", {name})


CALL = '<tool_call>\n{"name": "look", "arguments": {"at": "é", "n": 7}}\n</tool_call>'


@pytest.mark.parametrize("marks", [(), ("<tool_call>", "</tool_call>", "<think>", "</think>")])
@pytest.mark.parametrize("is_open", [True, False])
def test_a_model_may_reason_before_the_calls(scripted_model, marks, is_open):
    tail = (
        "<think>\n" if is_open else "<think>, or no more"
    )  # the marker is a token, or the prompt mentions it
    said = ("" if is_open else "<think>\n") + "hm, é\n</think>\n\n" + CALL
    model = scripted_model(said, TEMPLATE + tail + "{# <tool_call> #}", marks=marks)
    found = model.chat(MESSAGES, tools=TOOLS, tool_choice="required")
    assert (found.text, found.reasoning, found.finish_reason) == ("", "hm, é", "tool_calls")
    assert [(call.name, call.arguments) for call in found.tool_calls] == [("look", '{"at": "é", "n": 7}')]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"tools": TOOLS, "tool_choice": "walk"}, "tool_choice: expected 'required', 'auto' or the name of a tool"),
        ({"tools": TOOLS, "answer_format": "gemma"}, "tools: calls of the family 'gemma' can be neither"),
        ({"tools": TOOLS, "answer_format": None}, "tool_choice: expected tools, and a chat template that prescribes"),
        ({"tools": None}, "tool_choice: expected tools, and a chat template that prescribes a known form of tool"),
        (
            {"tools": TOOLS, "params": SamplingParams(regex="a")},
            "Sampling parameters: regex and tool_choice cannot be combined; give one of them.",
        ),
        (
            {"tools": TOOLS, "params": SamplingParams(ignore_eos=True)},
            (
                "Sampling parameters: ignore_eos must be false with tool_choice, because only an end token can follow a"
                " complete answer."
            ),
        ),
        (
            {"tools": [*TOOLS, {"name": "bad", "parameters": {"properties": {"a": {"if": {}}}}}]},
            "tools: parameters of 'bad' at #/properties/a: expected a schema that llguidance can enforce, found: Unim",
        ),
        (
            {"tools": [{"name": "bad", "parameters": {"properties": {"a": {}}, "required": 5}}]},
            "tools: parameters of 'bad'",
        ),
        (
            {"tools": [{"name": "bad", "parameters": {"properties": {"a": {}}, "required": [["a"]]}}]},
            "tools: parameters of 'bad'",
        ),
        (
            {"tools": [{"name": "bad", "parameters": {"properties": {"a": {"pattern": "("}}}}]},
            "tools: parameters of 'bad' at #/properties/a: expected a schema that llguidance can enforce, found: a reg",
        ),
        (
            {"tools": [{"name": "big", "parameters": {"properties": {"a" * 60_000: {}, "b" * 60_000: {}}}}]},
            "tools: with tool_choice, names and parameters must have at most 100,000 characters in total, found 120,",
        ),
        (
            {"tools": [{"name": "odd", "parameters": {"properties": {"a": {"multipleOf": 9_999_991}}}}]},
            "tools: parameters of 'odd': without decimal points, multipleOf must be at most 1,000,000; use a",
        ),
    ],
)  # fmt: skip
def test_choices_that_cannot_be_enforced(random_model, options, text):
    with pytest.raises(PrecastError) as raised:
        random_model([]).chat(MESSAGES, **{"answer_format": "hermes", "tool_choice": "required", **options})
    assert str(raised.value).startswith(text)


# --- many tools ---------------------------------------------------------------------------------------------


def large_tool(number: int) -> dict[str, Any]:
    """Return a tool with nested parameters, in about 2,000 characters."""
    address = {
        "type": "object",
        "description": "A place to deliver to, as the customer wrote it. " * 3,
        "properties": {
            "street": {"type": "string", "maxLength": 80, "description": "Street & number."},
            "country": {"type": "string", "enum": ["DE", "FR", "JP", f"X{number}"]},
            "point": {"type": "array", "items": {"type": "number"}, "minItems": 2, "maxItems": 2},
        },
        "required": ["street", "country"],
        "additionalProperties": False,
    }
    properties = {
        "order": {"type": "string", "pattern": f"^[A-Z]{{2}}-[0-9]{{{1 + number % 6}}}$"},
        "address": {"$ref": "#/$defs/address"},
        "lines": {
            "type": "array",
            "maxItems": 3,
            "items": {
                "type": "object",
                "properties": {"code": {"type": "string", "maxLength": 9}, "count": {"type": "integer"}},
                "required": ["code"],
            },
        },
        "at": {"anyOf": [{"type": "null"}, {"type": "string", "format": "date-time"}]},
    }
    properties |= {
        f"option_{n}": {"type": "boolean", "description": "Part of the order. " * 4} for n in range(8)
    }
    parameters = {
        "type": "object",
        "$defs": {"address": address},
        "properties": properties,
        "required": ["order"],
    }
    description = "Change an order of a customer. " * 5
    return {
        "type": "function",
        "function": {"name": f"orders.v{number}", "description": description, "parameters": parameters},
    }


def test_thirty_large_tools(scripted_model):
    tools = [large_tool(number) for number in range(30)]
    assert 60_000 < len(json.dumps(tools)) < 80_000
    call = (
        '{"name": "orders.v7", "arguments": {"order": "AB-12", "address": {"street": "x", "country": "X7"}}}'
    )
    model = scripted_model(f"<tool_call>\n{call}\n</tool_call>", TEMPLATE)
    for choice in ("required", "orders.v7"):
        found = model.chat(MESSAGES, tools=tools, answer_format="hermes", tool_choice=choice)
        assert [(c.name, c.arguments) for c in found.tool_calls] == [
            ("orders.v7", json.dumps(json.loads(call)["arguments"]))
        ]


def test_the_template_may_print_large_tools(scripted_model):
    tools = [large_tool(number) for number in range(30)]
    template = TEMPLATE + "{% for tool in tools %}{{ tool | tojson }}{% endfor %}"
    prompt = scripted_model("", template).tokenizer.render_chat(MESSAGES, ChatOptions(tools=tools))
    assert prompt.endswith(json.dumps(tools[-1], ensure_ascii=False))
