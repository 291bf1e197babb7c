"""The command line. ``python cli.py …`` in a checkout and the installed ``precast …`` are the same."""

import os
import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import click

# XLA's own notes about devices are not for users; errors still show. Set before anything loads it.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "1")

FAILED, INTERRUPTED = 2, 130


def _lines_only(command: Callable[..., None]) -> Callable[..., None]:
    """Turns what a user can put right into one line on standard error and exit code 2."""

    @wraps(command)
    def wrapper(*args: Any, **kwargs: Any) -> None:
        from precast.loaders.artifact.errors import PrecastError

        try:
            command(*args, **kwargs)
        except PrecastError as error:
            _fail(str(error))
        except KeyboardInterrupt:
            click.echo("\ninterrupted", err=True)
            sys.stdout.flush()
            # At once: a compiler's threads that still work do not survive the usual way out of Python.
            os._exit(INTERRUPTED)
        except BrokenPipeError:
            # The reader has seen enough; what Python would flush at exit has nowhere to go.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(1)
        except OSError as error:
            # What the system refuses is for the user too, wherever it refuses it.
            _fail(
                f"{error.filename or 'input or output'}: {error.strerror or error}; check the path and its disk."
            )

    return wrapper


def _fail(message: str) -> None:
    # One line, also where a library's own message, quoted in ours, has several.
    click.echo(f"error: {' '.join(message.split())}", err=True)
    sys.exit(FAILED)


def _numbers(_: click.Context, parameter: click.Parameter, value: str | None) -> tuple[int, ...] | None:
    if value is None:
        return None
    try:
        return tuple(int(part) for part in value.split(","))
    except ValueError:
        raise click.BadParameter(f"expected whole numbers with commas between, found {value!r}.") from None


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="precast", message="precast %(version)s")
def main() -> None:
    """Language models as ahead-of-time compiled artifacts."""


@main.command()
@click.argument("source", required=False)
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), help="Folder to write; default artifacts/NAME-WEIGHTS."
)
@click.option(
    "--buckets",
    callback=_numbers,
    help="Prompt lengths to compile prefill for; default 64,128,512 as far as the context goes.",
)
@click.option(
    "--context", type=int, help="Positions a sequence may have; default 2048 or the model's own limit."
)
@click.option("--slots", type=int, default=1, show_default=True, help="Sequences that decode together.")
@click.option(
    "--weights",
    default="int8",
    show_default=True,
    help="How weights are stored: float32, bfloat16, int8, int4.",
)
@click.option(
    "--cache",
    help="How keys and values are kept: float32, bfloat16, int8. Default: float32 with float32 weights, else bfloat16.",
)
@click.option("--overwrite", is_flag=True, help="Replace an artifact that is there already.")
@_lines_only
def export(
    source: str | None,
    output: Path | None,
    buckets: tuple[int, ...] | None,
    context: int | None,
    slots: int,
    weights: str,
    cache: str | None,
    overwrite: bool,
) -> None:
    """Compile SOURCE into an artifact.

    SOURCE is a Hugging Face directory, a .gguf file or a hub id (org/name); without it the demo model
    SmolLM2-135M-Instruct is fetched.
    """
    _need_export()
    from precast.exporter import console
    from precast.exporter.export import ExportOptions

    options = ExportOptions(
        buckets=buckets, context=context, slots=slots, weights=weights, cache=cache, overwrite=overwrite
    )
    console.run_export(source, output, options)


def _need_export(what: str = "exporting") -> None:
    from importlib.util import find_spec

    from precast.loaders.artifact.errors import PrecastError

    used = ("jax", "flax", "gguf", "huggingface_hub", "rich", "safetensors", "yaml")
    missing = [name for name in used if find_spec(name) is None]
    if missing:
        raise PrecastError(
            f"{what} needs {', '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not installed:"
            " pip install 'precast[export]'"
        )


@main.command()
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option(
    "-p",
    "--prompt",
    help="Text to continue, or to answer with --chat. Default: standard input, less one final newline.",
)
@click.option("--ids", callback=_numbers, help="Token ids to continue instead of text: 1,2,3.")
@click.option("--chat", is_flag=True, help="Put the prompt through the model's chat template.")
@click.option("--system", help="System message; implies --chat.")
@click.option(
    "-n", "--max-tokens", type=int, help="Tokens to generate at most. Default: until the context is full."
)
@click.option("--temperature", type=float, help="0 is greedy. Default of this and the next: the model's own.")
@click.option("--top-k", type=int, help="Keep the k likeliest tokens; 0 keeps all.")
@click.option("--top-p", type=float, help="Keep the likeliest tokens that make up this probability.")
@click.option("--min-p", type=float, help="Keep tokens at least this likely, relative to the likeliest.")
@click.option("--repetition-penalty", type=float, help="Above 1 makes tokens that occurred less likely.")
@click.option("--seed", type=int, help="Same seed, same tokens, where a temperature makes them differ.")
@click.option("--stop", multiple=True, help="Stop before this text. May be given several times.")
@click.option("--ignore-eos", is_flag=True, help="Go on to the limit.")
@click.option("--json", "as_json", is_flag=True, help="Print one line of JSON when done.")
@click.option("--verify", is_flag=True, help="Hash every file again, whether or not it has changed.")
@click.option("--target", help="Run this target of the artifact. Default: the first that fits.")
@click.option(
    "--compile", "may_compile", is_flag=True, help="Compile from StableHLO where no executable fits."
)
@_lines_only
def run(
    artifact: Path,
    prompt: str | None,
    ids: tuple[int, ...] | None,
    chat: bool,
    system: str | None,
    ignore_eos: bool,
    as_json: bool,
    verify: bool,
    target: str | None,
    may_compile: bool,
    **sampling: Any,
) -> None:
    """Generate from ARTIFACT: the folder of one, or a folder with exactly one in it.

    With a terminal and no prompt it is an interactive chat.
    """
    from precast.loaders import console

    console.run(
        artifact,
        console.Request(prompt=prompt, ids=ids, chat=chat, system=system, as_json=as_json),
        console.LoadOptions(verify=verify, target=target, compile=may_compile),
        console.SamplingOptions(ignore_eos=ignore_eos, **sampling),
    )


@main.command()
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print the facts as JSON.")
@_lines_only
def inspect(artifact: Path, as_json: bool) -> None:
    """Show what ARTIFACT holds: model, programs, cache, targets."""
    from precast.loaders import inspect as inspecting

    click.echo(inspecting.render(artifact, as_json=as_json))


@main.command("eval")
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option(
    "--reference",
    type=click.Path(path_type=Path),
    help="Compare with this: another artifact, or a Hugging Face directory or .gguf file, computed in float32.",
)
@click.option(
    "--text", type=click.Path(path_type=Path), help="UTF-8 text to predict. Default: one that is shipped."
)
@click.option(
    "--tokens", type=int, default=3072, show_default=True, help="Tokens of the text to use at most."
)
@click.option("--window", type=int, help="Tokens of a window. Default: 512, or the capacity if that is less.")
@click.option("--json", "as_json", is_flag=True, help="Print one line of JSON.")
@_lines_only
def evaluate(
    artifact: Path, reference: Path | None, text: Path | None, tokens: int, window: int | None, as_json: bool
) -> None:
    """Measure how well ARTIFACT predicts a text: perplexity.

    With a reference also how far its predictions are from the reference's: the mean and the 99th percentile of
    the divergence KL(reference || artifact) in nats per token, and how often both find the same token likeliest.

    The text is tokenised without a chat template and cut into windows; a last, shorter window counts where it
    has at least 64 tokens. The first half of each window is prefilled, the second half is fed token by token
    through decode, and every prediction from the last prefilled position on is scored. A reference that is no
    artifact computes each window at once, uncached and in float32, which needs the export extra.
    """
    from precast.loaders import eval_console

    request = eval_console.Request(text=text, tokens=tokens, window=window, as_json=as_json)
    if reference is None:
        eval_console.run(artifact, request, None, jax=False)
    elif eval_console.names_source(reference):
        _need_export("a reference that is no artifact")
        from precast.exporter.fidelity import open_reference

        eval_console.run(
            artifact, request, lambda capacity: open_reference(str(reference), capacity), jax=True
        )
    else:
        eval_console.run(artifact, request, lambda _: eval_console.open_artifact(reference), jax=False)


if __name__ == "__main__":
    from importlib.util import find_spec

    if find_spec("precast") is None:
        _fail("precast is not installed in this Python; run: pip install -e '.[export]'")
    main()
