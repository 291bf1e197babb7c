"""Arguments and options that several commands share."""

from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import click

Command = Callable[..., None]


def numbers(_: click.Context, parameter: click.Parameter, value: str | None) -> tuple[int, ...] | None:
    """Parse whole numbers separated by commas."""
    if value is None:
        return None
    try:
        return tuple(int(part) for part in value.split(","))
    except ValueError:
        raise click.BadParameter(f"expected whole numbers with commas between, found {value!r}.") from None


class Artifact(click.ParamType):
    """A parameter type: an artifact's folder, as a path, or the URL of a pushed one, as text."""

    name = "path or url"

    def convert(self, value: Any, _: click.Parameter | None, __: click.Context | None) -> Any:
        return Path(value) if isinstance(value, str) and "://" not in value else value


def _required(_: click.Context, __: click.Parameter, value: Path | None) -> Path | None:
    """Return the given key, or the one that the whole installation requires."""
    from ..required_key import required_key

    return required_key(value)


ARTIFACT = Artifact()
STATS = click.option(
    "--stats",
    is_flag=True,
    help="Print the speed on standard error at the end: prompt, first token, answer.",
)
LITERAL = click.option(
    "--literal",
    is_flag=True,
    help="Treat messages as plain text: special tokens spelt in them cannot forge a turn. Implies --chat.",
)
KEY = click.option(
    "--require-signature",
    metavar="KEY",
    type=click.Path(path_type=Path),
    callback=_required,
    help="Refuse an artifact without a signature by this key: a PEM file of the public key. Default: the file named by"
    " PRECAST_REQUIRE_SIGNATURE.",
)
THREADS = click.option(
    "--threads",
    type=int,
    help="Compute with this many threads. Default: one per core that the process may use, within its container's CPU"
    " quota.",
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
        help="0 is greedy. Default of this and the options below: the model's own.",
    ),
    click.option("--top-k", type=int, help="Keep the k likeliest tokens; 0 keeps all."),
    click.option("--top-p", type=float, help="Keep the likeliest tokens that make up this probability."),
    click.option("--min-p", type=float, help="Keep tokens at least this likely, relative to the likeliest."),
    click.option("--repetition-penalty", type=float, help="Above 1 makes tokens that occurred less likely."),
    click.option("--no-repeat-ngram-size", type=int, help="Never repeat a sequence of this many tokens."),
    click.option("--min-tokens", type=int, help="Generate at least this many tokens."),
    click.option("--seed", type=int, help="Seed for sampling; the same seed gives the same tokens."),
    click.option("--stop", multiple=True, help="Stop before this text. May be given several times."),
    click.option("--ignore-eos", is_flag=True, help="Continue past the end token, to the limit."),
)
_LOADING = (
    click.option("--verify", is_flag=True, help="Hash every file again, including unchanged ones."),
    click.option("--target", help="Run this target of the artifact. Default: the best that fits."),
    click.option("--compile", is_flag=True, help="Compile from StableHLO where no executable fits."),
    KEY,
    THREADS,
)


def sampling(command: Command) -> Command:
    """Give a command the options for sampling; it receives them as one argument, `sampling`."""
    return _gathering(command, _SAMPLING, "sampling", "SamplingOptions")


def loading(command: Command) -> Command:
    """Give a command the options for loading an artifact; it receives them as one argument, `loading`."""
    return _gathering(command, _LOADING, "loading", "LoadOptions")


def _gathering(
    command: Command, options: tuple[Callable[[Command], Command], ...], name: str, kind: str
) -> Command:
    """Decorate a command with options that become the fields of a class in `console`."""

    @wraps(command)
    def wrapper(**arguments: Any) -> None:
        from . import run as console

        gathered = getattr(console, kind)
        values = {key: arguments.pop(key) for key in gathered.__dataclass_fields__}
        command(**arguments, **{name: gathered(**values)})

    decorated: Command = wrapper
    for option in reversed(options):
        decorated = option(decorated)
    return decorated
