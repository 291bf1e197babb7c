"""``precast run``: load an artifact and answer one prompt."""

import atexit
import gc
import json
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..artifact.errors import PrecastError
from ..artifact.frozen import Frozen
from ..artifact.interrupt import raise_on_interrupt
from .clock import process_age
from .terminal import escaped, harmless_pieces

if TYPE_CHECKING:
    from ..generation.model import Model
    from ..generation.sampling_params import SamplingParams
    from ..generation.stream import Completion, Stream


class Request(Frozen):
    """A prompt and its form. At most one of `prompt` and `ids` is set.

    Attributes:
        system: the system message, which may be empty; None for none.
        literal: treat messages as plain text.
    """

    prompt: str | None
    ids: tuple[int, ...] | None
    chat: bool
    system: str | None
    literal: bool
    as_json: bool
    stats: bool

    @property
    def templated(self) -> bool:
        """Return True if the prompt goes through the chat template."""
        return self.chat or self.literal or self.system is not None


class LoadOptions(Frozen):
    """The command line's options for loading."""

    verify: bool
    target: str | None
    compile: bool
    require_signature: Path | None
    threads: int | None


class SamplingOptions(Frozen):
    """As the command line gives them: None leaves the model's own default."""

    max_tokens: int | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float | None
    no_repeat_ngram_size: int | None
    min_tokens: int | None
    seed: int | None
    stop: tuple[str, ...]
    ignore_eos: bool

    def given(self) -> Mapping[str, Any]:
        return {key: value for key, value in vars(self).items() if value not in (None, ())}


def run(artifact: Path | str, request: Request, load_options: LoadOptions, sampling: SamplingOptions) -> None:
    """Loads the artifact and answers the request on standard output.

    Raises:
        PrecastError: for anything the user can put right.
    """
    _check(request)
    typed = request.prompt is None and request.ids is None and sys.stdin.isatty()
    interactive = typed and sys.stdout.isatty()
    if typed and request.as_json:
        raise PrecastError("--json needs a prompt: give one with -p or --ids, or pipe it in.")

    with starting(artifact):
        # Before this process exits, a garbage collection frees nothing and costs 5 % of a short answer's time.
        atexit.register(gc.freeze)
        from ..load import load

        imported = process_age()
        model = load(
            artifact,
            rehash=load_options.verify,
            target=load_options.target,
            allow_compile=load_options.compile,
            require_signature=load_options.require_signature,
            threads=load_options.threads,
        )
    loaded = process_age()
    params = replace(model.default_sampling(), **sampling.given())
    if interactive:
        from .chat import converse

        with raise_on_interrupt():  # KeyboardInterrupt ends an answer and resets the terminal
            converse(model, params, request.system, stats=request.stats, literal=request.literal)
        return
    stream = _stream(model, request, _read_prompt(request), params)
    asked = process_age()
    if request.as_json:
        print(_json_line(model, stream.finish(), imported=imported, loaded=loaded, asked=asked))
    else:
        _write_pieces(stream)
    if request.stats:
        from .speed import full

        print(full([stream.completion], asked + stream.completion.timing.prefill_s), file=sys.stderr)


@contextmanager
def starting(artifact: Path | str) -> Iterator[None]:
    """A quick start, for imports and the load of an artifact; what it sets in the process is then as it was.

    Args:
        artifact: a folder, as a path, or a URL. What comes from a URL makes garbage, and is waited for anyway.
    """
    collecting, threads = gc.isenabled(), "OPENBLAS_NUM_THREADS"
    limited = threads in os.environ
    # NumPy multiplies no matrices here, and its threads, once started, spin beside ours for a tenth of the start.
    os.environ.setdefault(threads, "1")
    if isinstance(artifact, Path):
        # Nothing that it makes is garbage, and looking for it takes a fortieth of the start.
        gc.disable()
    try:
        yield
    finally:
        if not limited:
            os.environ.pop(threads, None)
        if not gc.get_freeze_count():
            # All of it is old now, or else the next collection, a young one, would go through it.
            gc.freeze()
            gc.unfreeze()
        if collecting:
            gc.enable()


def _check(request: Request) -> None:
    if request.prompt is not None and request.ids is not None:
        raise PrecastError("--prompt and --ids both say what to continue; give one of them.")
    if request.templated and request.ids is not None:
        option = "--chat" if request.chat else "--literal" if request.literal else "--system"
        raise PrecastError(
            f"{option} needs text to put through the chat template; use --prompt instead of --ids."
        )


def _read_prompt(request: Request) -> str:
    if request.ids is not None:
        return ""
    if request.prompt is not None:
        return request.prompt
    if sys.stdin.isatty():
        print("Type the prompt; Ctrl-D on a line of its own ends it.", file=sys.stderr)
    try:
        return piped_text(sys.stdin.read())
    except UnicodeDecodeError as error:
        raise PrecastError(
            f"standard input: expected a prompt in {error.encoding}, found other bytes."
        ) from None


def piped_text(text: str) -> str:
    """Strip the byte order mark, CRLF and one final newline of editors and shells from a piped prompt."""
    return text.removeprefix("\ufeff").replace("\r\n", "\n").removesuffix("\n")


def _stream(model: "Model", request: Request, text: str, params: "SamplingParams") -> "Stream":
    if request.ids is not None:
        return model.stream(request.ids, params)
    if request.templated:
        if not text.strip():
            raise PrecastError("prompt: expected some text, found none; give it with -p or pipe it in.")
        from .chat import opening

        messages = [*opening(request.system), {"role": "user", "content": text}]
        return model.stream_chat(messages, params, literal=request.literal)
    return model.stream(text, params)


def _write_pieces(stream: "Stream") -> None:
    for piece in harmless_pieces(stream) if sys.stdout.isatty() else stream:
        sys.stdout.write(piece)
        sys.stdout.flush()
    sys.stdout.write("\n")


def _json_line(
    model: "Model", completion: "Completion", *, imported: float, loaded: float, asked: float
) -> str:
    timing = completion.timing
    record = {
        "text": completion.text,
        "token_ids": completion.token_ids,
        "prompt_token_ids": completion.prompt_token_ids,
        "finish_reason": completion.finish_reason,
        "timing": {
            "import_s": round(imported, 4),
            "load_s": round(loaded - imported, 4),
            "prefill_s": round(timing.prefill_s, 4),
            "first_token_s": round(asked + timing.prefill_s, 4),
            "decode_tokens_per_s": round(timing.decode_tokens_per_s, 2),
            "target": model.target.name,
        },
        "target": model.target.name,
        "compiles": model.compiles,
    }
    # Escapes are JSON too, for an output that takes less than Unicode.
    encoding = (getattr(sys.stdout, "encoding", None) or "utf-8").lower()
    return escaped(json.dumps(record, ensure_ascii=not encoding.startswith("utf")))
