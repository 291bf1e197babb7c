"""Grammars with reasoning before the answer, and grammars that several threads build."""

import dis
import sys
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer as Library
from tokenizers import decoders, models, normalizers

from precast.loaders.artifact.errors import PrecastError
from precast.loaders.generation import grammars as grammars_module
from precast.loaders.generation.constraint_texts import ConstraintText
from precast.loaders.generation.constraints import Constraint
from precast.loaders.generation.grammars import Grammars
from precast.loaders.generation.sampling_params import SamplingParams
from precast.loaders.text.answer_formats import answer_format
from precast.loaders.text.reasoning_grammar import reasoning_grammar
from precast.loaders.text.tokenizer import Tokenizer

pytest.importorskip("llguidance")

END = 1


def start(grammars: Grammars, regex: str) -> Constraint:
    text = SamplingParams(regex=regex).constraint
    assert text is not None
    return grammars.start(text)


def allowed(constraint: Constraint) -> set[int]:
    return set(np.flatnonzero(np.unpackbits(constraint.mask().view(np.uint8), bitorder="little")).tolist())


# --- reasoning before the answer ----------------------------------------------------------------------------


def spelling(*, drops: bool, marks: bool) -> Tokenizer:
    """Return a tokenizer of single characters whose decoder drops the first space, like Llama 2's, or keeps it."""
    texts = ["</s>", "▁", "\n", *"<>/[]3think", "▁at"]
    library = Library(models.BPE({text: n for n, text in enumerate(dict.fromkeys(texts))}, []))
    library.normalizer = normalizers.Replace(" ", "▁")
    library.add_special_tokens(["</s>"])
    if marks:
        library.add_tokens(["<think>", "</think>"])
    steps = [decoders.Replace("▁", " "), decoders.Fuse()]
    library.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if drops else steps)
    return Tokenizer.from_json(
        library.to_str().encode(), chat_template=None, bos_token=None, eos_token="</s>"
    )


@pytest.mark.parametrize("marks", [True, False])
def test_the_added_tokens_are_fetched_once(monkeypatch: pytest.MonkeyPatch, marks: bool) -> None:
    """Some vocabularies have thousands of added tokens."""
    tokenizer, fetches = spelling(drops=True, marks=marks), []

    class Counting:
        def __getattr__(self, name: str) -> Any:
            fetches.extend([name] if name == "get_added_tokens_decoder" else [])
            return getattr(library, name)

    library = tokenizer.library
    monkeypatch.setattr(tokenizer, "_library", Counting())
    syntax = answer_format("<think>").reasoning[0]
    assert reasoning_grammar(syntax, "<think>", tokenizer, is_open=False).count("<[") == 2 * marks
    start(Grammars(tokenizer, 20, [0]), "3")
    assert len(fetches) == 1


def accepts(constraint: Constraint, tokens: list[int]) -> bool:
    for token in tokens:
        if token not in allowed(constraint):
            return False
        constraint.accept(token)
    return True


@pytest.mark.parametrize("drops", [True, False])
@pytest.mark.parametrize("marks", [True, False])
@pytest.mark.parametrize(
    ("prompt", "text", "is_accepted"),
    [
        ("use <think>", "<think> think</think>\n\n[3]", True),
        ("use <think>", "<think></think>[3]", True),
        ("use <think>", "[3]", True),
        ("use <think>", "<think>think", False),
        ("<think>\n", "think\n</think>[3]", True),
        ("<think>\n", "[3]", False),
        ("<think>\n\n</think>\n", "[3]", True),
        ("<think>\n\n</think>\n", "<think></think>[3]", False),
    ],
)
def test_reasoning_in_any_tokenisation(
    drops: bool, marks: bool, prompt: str, text: str, is_accepted: bool
) -> None:
    tokenizer = spelling(drops=drops, marks=marks)
    (syntax,) = answer_format("<think>").reasoning
    rule = reasoning_grammar(syntax, prompt, tokenizer, is_open=prompt == "<think>\n")
    grammars = Grammars(tokenizer, tokenizer.vocab_size, [0])
    constraint = grammars.start(ConstraintText("grammar", 'start: "[3]"', reasoning=rule))
    begins_with_mark = marks and text.startswith("<think>")
    spelt = f" {text}" if drops and not begins_with_mark else text  # the space that the decoder drops
    tokens = [*tokenizer.encode(spelt, add_special_tokens=False), 0]
    assert accepts(constraint, tokens) == is_accepted


# --- threads ------------------------------------------------------------------------------------------------


class SlowGrammars(Grammars):
    """Grammars that wait for an event before they build one text.

    Attributes:
        builds: the texts, in the order in which their builds began.
        slow: the text whose build waits.
        begun: set when the build begins to wait.
        go: to be set to let the build continue.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__(tokenizer, tokenizer.vocab_size, [END])
        self.builds: list[Any] = []
        self.slow = "slow[ab]"
        self.begun, self.go = threading.Event(), threading.Event()
        self.failures: list[BaseException] = []

    def _compile(self, text: Any) -> Any:
        self.builds.append(text.value)
        if text.value == self.slow:
            self.begun.set()
            assert self.go.wait(60)
            if self.failures:
                raise self.failures.pop()
        return super()._compile(text)


def in_threads(works: list[Callable[[], object]]) -> tuple[list[threading.Thread], list[object]]:
    """Start each function in a thread; return the threads, and a list that receives results and errors."""
    found: list[object] = []

    def run(work: Callable[[], object]) -> None:
        try:
            found.append(work())
        except Exception as error:
            found.append(error)

    threads = [threading.Thread(target=run, args=(work,), daemon=True) for work in works]
    for thread in threads:
        thread.start()
    return threads, found


@pytest.fixture
def slow_grammars(scripted_model: Any) -> SlowGrammars:
    return SlowGrammars(scripted_model("", "").tokenizer)


def test_a_slow_grammar_delays_no_other(slow_grammars: SlowGrammars) -> None:
    threads, found = in_threads([lambda: start(slow_grammars, regex="slow[ab]")])
    assert slow_grammars.begun.wait(60)
    others, _ = in_threads([lambda n=n: start(slow_grammars, regex=f"quick{n}") for n in range(6)])  # type: ignore[misc]
    for thread in others:
        thread.join(60)
        assert not thread.is_alive()
    assert (threads[0].is_alive(), found) == (True, [])
    start(slow_grammars, regex="quick3")  # this text is built already
    assert len(slow_grammars.builds) == 7
    slow_grammars.go.set()
    threads[0].join(60)
    assert isinstance(found[0], Constraint)


def test_threads_that_ask_for_the_same_grammar_share_its_building(slow_grammars: SlowGrammars) -> None:
    threads, found = in_threads([lambda: start(slow_grammars, regex="slow[ab]")] * 8)
    assert slow_grammars.begun.wait(60)
    slow_grammars.go.set()
    for thread in threads:
        thread.join(60)
    assert slow_grammars.builds == ["slow[ab]"]
    assert len({id(constraint) for constraint in found}) == 8
    first, second, *_ = found
    assert isinstance(first, Constraint)
    assert isinstance(second, Constraint)
    (token, *_) = allowed(first)
    first.accept(token)
    assert allowed(second) != allowed(first)


def test_a_refusal_is_shared_and_forgotten(slow_grammars: SlowGrammars) -> None:
    slow_grammars.slow = "a("
    threads, found = in_threads([lambda: start(slow_grammars, regex="a(")] * 4)
    assert slow_grammars.begun.wait(60)
    slow_grammars.go.set()
    for thread in threads:
        thread.join(60)
    assert {str(error)[:40] for error in found} == {"regex: expected a regular expression in "}
    assert len({id(error) for error in found}) == 4
    count = len(slow_grammars.builds)
    with pytest.raises(PrecastError):
        start(slow_grammars, regex="a(")
    assert len(slow_grammars.builds) == count + 1


def test_after_a_failure_a_waiting_thread_builds_the_grammar(slow_grammars: SlowGrammars) -> None:
    slow_grammars.failures.append(MemoryError("once"))
    threads, found = in_threads([lambda: start(slow_grammars, regex="slow[ab]")] * 5)
    assert slow_grammars.begun.wait(60)
    slow_grammars.go.set()
    for thread in threads:
        thread.join(60)
    assert sorted(type(result).__name__ for result in found) == [*["Constraint"] * 4, "MemoryError"]
    assert slow_grammars.builds == ["slow[ab]"] * 2


def interrupted_at(place: int, work: Callable[[], object]) -> bool:
    """Call a function, and raise KeyboardInterrupt at a place in the module; return False if the call ended before.

    The places are those where Python handles signals: after calls, at the start of functions and at the end of loops.
    """
    count, last = 0, ""

    def trace(frame: Any, event: str, _: object) -> Any:
        nonlocal count, last
        if frame.f_code.co_filename != grammars_module.__file__:
            return None
        frame.f_trace_opcodes = True
        if event == "opcode":
            before, last = last, dis.opname[frame.f_code.co_code[frame.f_lasti]]
            count += before.startswith(("CALL", "RESUME", "JUMP_BACKWARD"))
            if count == place:
                raise KeyboardInterrupt
        return trace

    outer = sys.gettrace()
    sys.settrace(trace)
    try:
        work()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(outer)
    return False


def test_an_interrupt_at_any_place_blocks_no_other_thread(slow_grammars: SlowGrammars) -> None:
    slow_grammars.slow, stack = "", threading.stack_size()
    place = 1
    while interrupted_at(place, lambda n=place: start(slow_grammars, regex=f"quick{n}")):  # type: ignore[misc]
        threads, found = in_threads([lambda n=place: start(slow_grammars, regex=f"quick{n}")] * 2)  # type: ignore[misc]
        for thread in threads:
            thread.join(60)
        assert [type(result) for result in found] == [Constraint] * 2
        assert threading.stack_size() == stack
        place += 1
    assert place > 10
