"""Arguments and options that several commands share."""

import json
import re
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import click

from ..required_key import required_key
from .run import AnswerOptions, LoadOptions, SamplingOptions
from .serve import ServeOptions

Command = Callable[..., int]
# The syntax of llama.cpp's --logit-bias.
_BIAS = re.compile(r"([0-9]{1,18})([+-](?:[0-9]+\.?[0-9]*|\.[0-9]+))")


def numbers(_: click.Context, parameter: click.Parameter, value: str | None) -> tuple[int, ...] | None:
    """Parse whole numbers separated by commas."""
    if value is None:
        return None
    try:
        return tuple(int(part) for part in value.split(","))
    except ValueError:
        raise click.BadParameter(f"expected whole numbers separated by commas, found {value!r}.") from None


def biases(_: click.Context, parameter: click.Parameter, value: tuple[str, ...]) -> dict[int, float]:
    """Parse pairs of a token id and a signed number: 15043+1, 15043-0.5."""
    found = {}
    for text in value:
        match = _BIAS.fullmatch(text)
        if match is None:
            raise click.BadParameter(
                f"expected a token id and a signed number, such as 15043-1, found {text!r}."
            )
        found[int(match[1])] = float(match[2])
    return found


def template_variables(
    _: click.Context, parameter: click.Parameter, value: tuple[str, ...]
) -> dict[str, Any]:
    """Parse pairs of a name and a JSON value: enable_thinking=false."""
    found = {}
    for text in value:
        name, _equals, data = text.partition("=")
        try:
            found[name] = json.loads(data)
        except (ValueError, RecursionError):
            raise click.BadParameter(
                f"expected a name and a JSON value, such as enable_thinking=false, found {text!r:.80}."
            ) from None
    return found


def text_file(_: click.Context, parameter: click.Parameter, value: str | None) -> str | None:
    """Return the text of a file."""
    if value is None:
        return None
    try:
        return Path(value).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise click.BadParameter(f"expected a file of UTF-8 text, found other bytes in {value!r}.") from None
    except OSError as error:
        raise click.BadParameter(f"cannot read {value!r}: {error.strerror}.") from None


class Artifact(click.ParamType):  # type: ignore[type-arg]  # click 8.1 has no type argument
    """A parameter type for an artifact: the Path of its folder, or a string with the URL that it was pushed to."""

    name = "path or url"

    def convert(self, value: Any, _: click.Parameter | None, __: click.Context | None) -> Any:
        return Path(value) if isinstance(value, str) and "://" not in value else value


def _required(_: click.Context, __: click.Parameter, value: Path | None) -> Path | None:
    """Return the given key file, or else the key file that the environment or the machine requires."""
    return required_key(value)


PATH = click.Path(path_type=Path)
ARTIFACT = Artifact()
JSON = click.option("--json", "as_json", is_flag=True, help="Print one line of JSON.")
STATS = click.option(
    "--stats", is_flag=True, help="Print the speed of prompt and answer on standard error at the end."
)
STATE = click.option(
    "--state",
    metavar="FILE",
    type=PATH,
    help="If FILE exists, continue the text or the chat that was saved in it; its tokens are not computed again. Save"
    " the text or the chat, with the new answer, to FILE.",
)
LITERAL = click.option(
    "--literal",
    is_flag=True,
    help="Treat messages as plain text, so that a message that spells a special token cannot forge a turn. In precast"
    " run, implies --chat.",
)
TEMPLATE_VARIABLES = click.option(
    "--template-variable",
    "template_variables",
    metavar="NAME=JSON",
    multiple=True,
    callback=template_variables,
    help="Set a variable of the chat template. For example, enable_thinking=false turns off the reasoning of some"
    " models. A string needs JSON's quotes. May be given several times. In precast run, implies --chat.",
)
KEY = click.option(
    "--require-signature",
    metavar="KEY",
    type=PATH,
    callback=_required,
    help="Refuse an artifact that is not signed with this key. KEY is a PEM file of the public key. Default: the file"
    " named by PRECAST_REQUIRE_SIGNATURE.",
)
THREADS = click.option(
    "--threads",
    type=int,
    help="Compute with this many threads. Default: one per core that the process may use, within its container's CPU"
    " quota.",
)
COMPILE = click.option(
    "--compile",
    "allow_compile",
    is_flag=True,
    help="Compile from StableHLO on this machine if no executable fits.",
)
_SAMPLING = (
    click.option(
        "-n",
        "--max-tokens",
        type=int,
        help="Generate at most this many tokens. Default: until the context is full.",
    ),
    click.option(
        "--temperature",
        type=float,
        help="Sample at this temperature; 0 is greedy. The defaults of this option and the sampling options below are"
        " the model's own values.",
    ),
    click.option("--top-k", type=int, help="Keep the k likeliest tokens; 0 keeps all."),
    click.option(
        "--top-p", type=float, help="Keep the likeliest tokens until their probabilities add up to this."
    ),
    click.option(
        "--min-p",
        type=float,
        help="Keep tokens with at least this share of the likeliest token's probability.",
    ),
    click.option(
        "--repetition-penalty",
        type=float,
        help="Above 1, make tokens less likely if the prompt or the answer already contains them.",
    ),
    click.option(
        "--presence-penalty",
        type=float,
        help="Above 0, make tokens less likely if the answer already contains them. From -2 to 2.",
    ),
    click.option(
        "--frequency-penalty",
        type=float,
        help="Above 0, make a token less likely each time that it occurs in the answer. From -2 to 2.",
    ),
    click.option(
        "--logit-bias",
        multiple=True,
        callback=biases,
        help="Add a number from -100 to 100 to the logit of a token: 15043-1 adds -1 to the logit of token 15043. May"
        " be given several times.",
    ),
    click.option("--no-repeat-ngram-size", type=int, help="Never repeat a sequence of this many tokens."),
    click.option("--min-tokens", type=int, help="Generate at least this many tokens."),
    click.option("--seed", type=int, help="Seed for sampling; the same seed gives the same tokens."),
    click.option("--stop", multiple=True, help="Stop before this text. May be given several times."),
    click.option(
        "--stop-token-id",
        "stop_token_ids",
        multiple=True,
        type=int,
        help="Stop at this token. May be given several times.",
    ),
    click.option(
        "--bad-word",
        "bad_words",
        multiple=True,
        help="Never generate this word. May be given several times.",
    ),
    click.option("--ignore-eos", is_flag=True, help="Continue past the end token, up to the limit."),
    click.option(
        "--json-schema",
        metavar="FILE",
        callback=text_file,
        help="Answer in JSON that matches the JSON Schema in this file. This option and the four below need"
        " precast[grammar].",
    ),
    click.option("--json-object", is_flag=True, help="Answer with any JSON object."),
    click.option(
        "--regex", help="Answer with a text that this regular expression matches, in Rust's syntax."
    ),
    click.option(
        "--grammar",
        metavar="FILE",
        callback=text_file,
        help="Answer with a text that the Lark grammar in this file allows.",
    ),
    click.option(
        "--choice",
        multiple=True,
        help="Answer with this text. If the option is given several times, answer with one of the texts.",
    ),
)
_ANSWERS = (
    click.option(
        "--answers",
        type=int,
        default=1,
        help="Generate this many answers. Each uses a different seed: --seed, --seed + 1, and so on. Needs --json.",
    ),
    click.option(
        "--logprobs",
        type=int,
        metavar="K",
        help="Add the log-probability of each token of the answer and of the K likeliest tokens at its position,"
        " computed before penalties and temperature. Needs --json.",
    ),
    click.option(
        "--prompt-logprobs",
        type=int,
        metavar="K",
        help="Like --logprobs, but for the tokens of the prompt. Needs --json.",
    ),
    click.option("--echo", is_flag=True, help="Begin the text of the answer with the prompt."),
    click.option(
        "--tools",
        type=PATH,
        metavar="FILE",
        help="JSON file with an array of tool schemas. The model may call these tools. Its calls are printed after the"
        " answer, one line of JSON each. Needs --chat.",
    ),
    click.option(
        "--tool-choice",
        default="auto",
        metavar="NAME",
        help="Answer with calls of the tool NAME. With required: answer with calls of any tools. With auto: let the"
        " model choose. Every choice except auto needs precast[grammar]. Default: auto.",
    ),
    click.option(
        "--answer-format",
        metavar="FAMILY",
        help="Expect the tool-call syntax of this model family: hermes, qwen3_coder, llama3, mistral, phi4, granite,"
        " smollm3, gemma or pythonic. With text, reasoning and tool calls stay in the answer's text. Default: the"
        " family that the chat template suggests.",
    ),
)
_LOADING = (
    click.option("--rehash", is_flag=True, help="Hash every file again, including unchanged ones."),
    click.option("--target", help="Run this target of the artifact. Default: the best target that fits."),
    COMPILE,
    KEY,
    THREADS,
)
_SERVING = (
    click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on."),
    click.option(
        "--port",
        type=click.IntRange(0, 65535),
        default=8000,
        show_default=True,
        help="Port to listen on; 0 takes any free port.",
    ),
    click.option(
        "--api-key-file",
        metavar="FILE",
        type=PATH,
        help="Answer only requests with an API key from this file, with one key per line. Default: the keys in"
        " PRECAST_API_KEYS, separated by commas. Without keys, every request is answered.",
    ),
    click.option(
        "--cors-origin",
        "cors_origins",
        metavar="ORIGIN",
        multiple=True,
        help="Let web pages of this origin, such as https://example.org, read the answers; * lets all. May be given"
        " several times.",
    ),
    click.option(
        "--max-queue",
        type=int,
        default=64,
        show_default=True,
        help="Refuse requests (429) while this many answers per model wait for a slot.",
    ),
    click.option("--max-tokens", type=int, help="Refuse requests for longer answers than this many tokens."),
    click.option(
        "--max-body",
        type=float,
        default=4,
        show_default=True,
        metavar="MIB",
        help="Refuse requests whose body is larger.",
    ),
    click.option(
        "--request-timeout",
        type=float,
        default=600,
        show_default=True,
        metavar="SECONDS",
        help="End an answer this long after its request arrived.",
    ),
    click.option(
        "--drain-timeout",
        type=float,
        default=30,
        show_default=True,
        metavar="SECONDS",
        help="Let the answers in progress take this long after SIGTERM.",
    ),
    click.option(
        "--idle-unload",
        type=float,
        metavar="SECONDS",
        help="Unload a model that has had no request for this long. The next request loads it again.",
    ),
    click.option(
        "--memory",
        type=float,
        metavar="GB",
        help="Before loading a model, unload others, the least recently used first, so that the loaded models take at"
        " most this much memory.",
    ),
    click.option(
        "--literal/--no-literal",
        default=True,
        show_default=True,
        help="Treat messages as plain text: special tokens spelt in them cannot forge a turn.",
    ),
    click.option(
        "--answer-format",
        metavar="FAMILY",
        help="Expect the tool-call syntax of this model family, as in precast run.",
    ),
)


def sampling(command: Command) -> Command:
    """Decorate a command with the options for sampling, which it receives as one argument, `sampling`."""
    return _gathering(command, _SAMPLING, "sampling", SamplingOptions)


def answers(command: Command) -> Command:
    """Decorate a command with the options for its answers, which it receives as one argument, `answers`."""
    return _gathering(command, _ANSWERS, "answers", AnswerOptions)


def loading(command: Command) -> Command:
    """Decorate a command with the options for loading an artifact, which it receives as one argument, `loading`."""
    return _gathering(command, _LOADING, "loading", LoadOptions)


def serving(command: Command) -> Command:
    """Give a command the options for serving; it receives them as one argument, `serving`."""
    return _gathering(command, _SERVING, "serving", ServeOptions)


def _gathering(
    command: Command,
    options: tuple[Callable[[Command], Command], ...],
    name: str,
    record: type[AnswerOptions | LoadOptions | SamplingOptions | ServeOptions],
) -> Command:
    """Decorate a command with options that it receives as the fields of one record."""

    @wraps(command)
    def wrapper(**arguments: Any) -> int:
        values = {key: arguments.pop(key) for key in record.__dataclass_fields__}
        return command(**arguments, **{name: record(**values)})

    decorated: Command = wrapper
    for option in reversed(options):
        decorated = option(decorated)
    return decorated
