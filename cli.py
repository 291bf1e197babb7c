"""The command line. ``python cli.py …`` in a checkout and the installed ``precast …`` are the same."""

import os
import sys

if __name__ == "__main__":
    from importlib.util import find_spec

    folder = os.path.dirname(os.path.abspath(__file__))
    if find_spec("precast") is None and os.path.basename(folder) == "precast":
        sys.path.insert(1, os.path.dirname(folder))  # a clone without installation also serves as the package
    try:
        from precast.start import main as start
    except ModuleNotFoundError:
        print(
            "error: precast is not installed in this Python; run: pip install -e '.[export]'", file=sys.stderr
        )
        sys.exit(2)
    sys.exit(start())

from pathlib import Path
from typing import TYPE_CHECKING

import click

from precast.loaders.console import command, options

if TYPE_CHECKING:
    from precast.loaders.console.run import LoadOptions, SamplingOptions

# Hide XLA's notes about devices from users; errors still show. XLA reads this when loaded.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "1")


@click.group(
    cls=command.Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100}
)
@click.version_option(package_name="precast", message="precast %(version)s")
def main() -> None:
    """Compile language models ahead of time into artifacts, and run them without compiling."""


@main.command()
@click.argument("source", required=False)
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), help="Folder to write; default artifacts/NAME-WEIGHTS."
)
@click.option(
    "--buckets",
    callback=options.numbers,
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
@click.option(
    "--target",
    "targets",
    multiple=True,
    help="What to make: cpu, portable, savedmodel, cuda. May be given several times. Default: cpu and portable.",
)
@click.option(
    "--cpu-isa",
    "cpu_isas",
    multiple=True,
    help="Instruction set to compile target cpu for: x86-64-v2, x86-64-v3, x86-64-v4, or native for all that this"
    " machine has. May be given several times. Default: x86-64-v2, and native on other machines.",
)
@click.option("--overwrite", is_flag=True, help="Replace an artifact that is there already.")
def export(
    source: str | None,
    output: Path | None,
    buckets: tuple[int, ...] | None,
    context: int | None,
    slots: int,
    weights: str,
    cache: str | None,
    targets: tuple[str, ...],
    cpu_isas: tuple[str, ...],
    overwrite: bool,
) -> None:
    """Compile SOURCE into an artifact.

    SOURCE is a Hugging Face directory, a .gguf file or a hub id (org/name); without it the demo model
    SmolLM2-135M-Instruct is fetched.
    """
    _need_export()
    from precast.exporter import console
    from precast.exporter.export import DEFAULT_TARGETS, ExportOptions

    wanted = ExportOptions(
        buckets=buckets,
        context=context,
        slots=slots,
        weights=weights,
        cache=cache,
        targets=targets or DEFAULT_TARGETS,
        cpu_isas=cpu_isas or None,
        overwrite=overwrite,
    )
    console.run_export(source, output, wanted)


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
@click.argument("artifact", type=options.ARTIFACT)
@click.option(
    "-p",
    "--prompt",
    help="Text to continue, or to answer with --chat. Default: standard input, less one final newline.",
)
@click.option("--ids", callback=options.numbers, help="Token ids to continue instead of text: 1,2,3.")
@click.option("--chat", is_flag=True, help="Put the prompt through the model's chat template.")
@click.option("--system", help="System message, which may be empty; implies --chat.")
@options.LITERAL
@options.sampling
@click.option("--json", "as_json", is_flag=True, help="Print one line of JSON when done.")
@options.STATS
@options.loading
def run(
    artifact: Path | str,
    prompt: str | None,
    ids: tuple[int, ...] | None,
    chat: bool,
    system: str | None,
    literal: bool,
    as_json: bool,
    stats: bool,
    sampling: "SamplingOptions",
    loading: "LoadOptions",
) -> None:
    """Generate text with ARTIFACT.

    ARTIFACT is an artifact's folder, a folder that holds exactly one artifact, or the URL of an artifact in a store,
    which is pulled once into the cache folder.

    Without a prompt, on a terminal, the command starts an interactive chat.
    """
    from precast.loaders.console import run as console

    request = console.Request(
        prompt=prompt, ids=ids, chat=chat, system=system, literal=literal, as_json=as_json, stats=stats
    )
    console.run(artifact, request, loading, sampling)


@main.command()
@click.argument("artifact", type=options.ARTIFACT)
@click.option("--system", help="System message, which may be empty.")
@options.LITERAL
@options.sampling
@options.STATS
@options.loading
def chat(
    artifact: Path | str,
    system: str | None,
    literal: bool,
    stats: bool,
    sampling: "SamplingOptions",
    loading: "LoadOptions",
) -> None:
    """Chat with ARTIFACT in the terminal.

    ARTIFACT is as for run. If standard input is not a terminal, its text is the only message.

    The arrow keys recall your messages of earlier chats, stored in $XDG_STATE_HOME/precast/chat_history. Set
    PRECAST_HISTORY to another file, or to off to store none.
    """
    from precast.loaders.console import run as console

    request = console.Request(
        prompt=None, ids=None, chat=True, system=system, literal=literal, as_json=False, stats=stats
    )
    console.run(artifact, request, loading, sampling)


@main.command("add-target")
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option(
    "--cpu-isa",
    help="Instruction set to compile for: x86-64-v2, x86-64-v3, x86-64-v4, or native for all features of this machine."
    " Default: x86-64-v2; native for --target portable and on other machines.",
)
@click.option("--target", help="Target whose StableHLO is compiled. Default: the quickest that runs here.")
@click.option("--overwrite", is_flag=True, help="Replace a target of the same name.")
@options.KEY
def add_target(
    artifact: Path, cpu_isa: str | None, target: str | None, overwrite: bool, require_signature: Path | None
) -> None:
    """Compile ARTIFACT for another CPU or jaxlib.

    The installed jaxlib compiles the new target from the artifact's StableHLO. Nothing is traced, and jax is not
    needed. The target must give the recorded answers before it is added. The command removes a signature, because it
    would no longer fit: sign the artifact again.
    """
    from precast.loaders import add_target as adding
    from precast.loaders.artifact.errors import printable

    added = adding.add_target(
        artifact,
        isa=cpu_isa,
        source=target,
        overwrite=overwrite,
        require_signature=require_signature,
        log=command.log,
    )
    for line in adding.summary(added, artifact):
        click.echo(printable(line))


@main.command("list")
@click.argument("folder", type=click.Path(path_type=Path), default="artifacts")
@click.option("--json", "as_json", is_flag=True, help="Print one line of JSON.")
@options.KEY
def list_artifacts(folder: Path, as_json: bool, require_signature: Path | None) -> None:
    """List the artifacts below FOLDER.

    FOLDER is artifacts by default. The list shows each artifact's model and size, and if it runs here. For a broken
    artifact it shows the reason.
    """
    from precast.loaders.console import listing as list_console

    list_console.run(folder, as_json=as_json, require_signature=require_signature)


@main.command()
@click.argument("artifact", type=options.ARTIFACT)
@click.option("--json", "as_json", is_flag=True, help="Print the facts as JSON.")
@options.KEY
def inspect(artifact: Path | str, as_json: bool, require_signature: Path | None) -> None:
    """Show what ARTIFACT holds: model, programs, cache, targets."""
    from precast.loaders.audit import inspect as inspecting

    folder = command.local(artifact, require_signature)
    click.echo(inspecting.render(folder, as_json=as_json, require_signature=require_signature))


@main.command()
@click.argument("artifact", type=options.ARTIFACT)
@click.option("--target", help="Ask about this target alone. Default: the first that fits.")
@click.option(
    "--compile", "may_compile", is_flag=True, help="A target that must be compiled here first will do."
)
@click.option("--json", "as_json", is_flag=True, help="Print what was found as one line of JSON.")
@options.KEY
def check(
    artifact: Path | str, target: str | None, may_compile: bool, as_json: bool, require_signature: Path | None
) -> None:
    """Check if ARTIFACT runs on this machine.

    The answer names each obstacle and its remedy. The command reads only the manifest.

    Exit code 0: the artifact runs here. 1: it does not. 2: it could not be read.
    """
    from precast.loaders.console import check as check_console

    folder = command.local(artifact, require_signature)
    sys.exit(
        check_console.run(
            folder, target=target, compile=may_compile, as_json=as_json, require_signature=require_signature
        )
    )


@main.command()
@click.argument("artifact", type=options.ARTIFACT)
@click.option("--target", help="Let this target answer. Default: the first that fits.")
@click.option(
    "--compile", "may_compile", is_flag=True, help="Compile from StableHLO where no executable fits."
)
@click.option("--json", "as_json", is_flag=True, help="Print what was found as one line of JSON.")
@options.KEY
@options.THREADS
def verify(
    artifact: Path | str,
    target: str | None,
    may_compile: bool,
    as_json: bool,
    require_signature: Path | None,
    threads: int | None,
) -> None:
    """Check the files and the recorded answers of ARTIFACT.

    The command hashes every file, and repeats the prompts whose answers were recorded at export.

    Exit code 0: every file is what the manifest says, and answers and logits are those recorded. 1: something
    differs. 2: it could not be read, or does not run on this machine.
    """
    from precast.loaders.console import verify as verify_console

    folder = command.local(artifact, require_signature)
    sys.exit(
        verify_console.run(
            folder,
            target=target,
            compile=may_compile,
            as_json=as_json,
            require_signature=require_signature,
            threads=threads,
        )
    )


@main.command()
@click.argument("before", metavar="A", type=options.ARTIFACT)
@click.argument("after", metavar="B", type=options.ARTIFACT)
@click.option("--json", "as_json", is_flag=True, help="Print the differences as one line of JSON.")
@options.KEY
def diff(before: Path | str, after: Path | str, as_json: bool, require_signature: Path | None) -> None:
    """Show what changed from artifact A to artifact B.

    Exit code 0: nothing. 1: something. 2: one of them could not be read.
    """
    from precast.loaders.console import diff as diff_console

    a, b = (command.local(artifact, require_signature) for artifact in (before, after))
    sys.exit(diff_console.run(a, b, as_json=as_json, require_signature=require_signature))


@main.command("eval")
@click.argument("artifact", type=options.ARTIFACT)
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
@click.option("--window", type=int, help="Tokens of a window. Default: 512, or the context if that is less.")
@click.option("--json", "as_json", is_flag=True, help="Print one line of JSON.")
@options.KEY
@options.THREADS
def evaluate(
    artifact: Path | str,
    reference: Path | None,
    text: Path | None,
    tokens: int,
    window: int | None,
    as_json: bool,
    require_signature: Path | None,
    threads: int | None,
) -> None:
    """Measure how well ARTIFACT predicts a text.

    The measure is perplexity. With a reference there is also the distance from the reference's predictions: the mean
    and the 99th percentile of the divergence KL(reference || artifact) in nats per token, and how often both find the
    same token likeliest.

    The text is tokenised without a chat template and cut into windows; a last, shorter window counts where it
    has at least 64 tokens. The first half of each window is prefilled, the second half is fed token by token
    through decode, and every prediction from the last prefilled position on is scored. A reference that is no
    artifact computes each window at once, uncached and in float32, which needs the export extra. A required
    signature applies to both artifacts, but not to another kind of reference.
    """
    from precast.loaders.console import evaluate as eval_console

    key = require_signature
    folder = command.local(artifact, key)
    request = eval_console.Request(text=text, tokens=tokens, window=window, as_json=as_json)
    if reference is None:
        eval_console.run(folder, request, None, key, threads)
    elif eval_console.names_source(reference):
        _need_export("a reference that is no artifact")
        from precast.exporter.reference.fidelity import open_reference

        eval_console.run(
            folder, request, lambda context: open_reference(str(reference), context), key, threads
        )
    else:
        eval_console.run(
            folder, request, lambda _: eval_console.open_artifact(reference, key, threads), key, threads
        )


@main.command()
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option(
    "--key",
    required=True,
    type=click.Path(path_type=Path),
    help="PEM file of the private key: an elliptic curve key of P-256, P-384 or P-521.",
)
def sign(artifact: Path, key: Path) -> None:
    """Sign ARTIFACT.

    The signature is manifest.json.sig, beside the manifest, which holds the sha256 of every other file.

    The command asks for the key's password, or takes it from PRECAST_KEY_PASSWORD. The signature follows OpenSSF model
    signing, whose own command also verifies it.
    """
    from precast.loaders import signing
    from precast.loaders.artifact.errors import printable
    from precast.loaders.artifact.interrupt import raise_on_interrupt
    from precast.loaders.locate import find_artifact

    def ask() -> str:
        given = os.environ.get("PRECAST_KEY_PASSWORD")
        if given is not None:
            return given
        with raise_on_interrupt():  # so that the terminal shows again what is typed
            password: str = click.prompt(f"password of {key}", hide_input=True, err=True)
            return password

    root = find_artifact(artifact)
    fingerprint = signing.sign(root, key, ask)
    click.echo(printable(f"signed {root} with the key of sha256 {fingerprint}"))
    click.echo(printable(f"check it with: precast run {root} --require-signature PUBLIC.pem"))


@main.command()
@click.argument("artifact", type=click.Path(path_type=Path))
@click.argument("url")
@click.option(
    "--verify", is_flag=True, help="Read back what is there already, and send again what is altered."
)
@click.option("--json", "as_json", is_flag=True, help="Print what was sent as one line of JSON.")
def push(artifact: Path, url: str, verify: bool, as_json: bool) -> None:
    """Send ARTIFACT to a store.

    URL is a folder of a store plus the artifact's name in it. fsspec must support the store:
    s3://bucket/models/NAME, gs://bucket/models/NAME, file:///folder/NAME. Artifacts in one folder share equal pieces,
    so a second version adds only the changes.
    """
    from precast.loaders.console import store as store_console

    store_console.push(artifact, url, verify=verify, as_json=as_json)


@main.command()
@click.argument("url")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), help="Folder to write; default artifacts/NAME."
)
@click.option("--overwrite", is_flag=True, help="Replace an artifact that is there already.")
@options.KEY
@click.option("--json", "as_json", is_flag=True, help="Print what was fetched as one line of JSON.")
def pull(
    url: str, output: Path | None, overwrite: bool, require_signature: Path | None, as_json: bool
) -> None:
    """Fetch an artifact from a store.

    URL is the one that it was pushed to. Every byte is checked. After an interruption the next pull resumes.
    """
    from precast.loaders.console import store as store_console

    store_console.pull(url, output, overwrite=overwrite, require_signature=require_signature, as_json=as_json)
