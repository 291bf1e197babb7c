"""The command line. ``python cli.py …`` in a checkout and the installed ``precast …`` are the same command."""

import os
import sys

if __name__ == "__main__":
    from importlib.util import find_spec

    folder = os.path.dirname(os.path.abspath(__file__))
    if find_spec("precast") is None and os.path.basename(folder) == "precast":
        # Use this clone as the package, because precast is not installed.
        sys.path.insert(1, os.path.dirname(folder))
    try:
        from precast.start import main as start
    except ModuleNotFoundError:
        print(
            "error: precast is not installed in this Python; run: pip install -e '.[export]'", file=sys.stderr
        )
        sys.exit(2)
    sys.exit(start())

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from precast.loaders.console import command, options

if TYPE_CHECKING:
    from precast.loaders.audit.evaluate import Scorer
    from precast.loaders.console.run import AnswerOptions, LoadOptions, SamplingOptions
    from precast.loaders.console.serve import ServeOptions

# Hide XLA's notes about devices, but not its errors. XLA reads this variable when it is loaded.
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
    "-o",
    "--output",
    type=options.PATH,
    help="Folder to write. Default: artifacts/NAME-WEIGHTS, or artifacts/NAME-mixed with --bits.",
)
@click.option(
    "--buckets",
    callback=options.numbers,
    help="Prompt lengths for which prefill is compiled. Default: those of 64,128,512 that fit the context.",
)
@click.option(
    "--context",
    type=int,
    help="Context length: the maximum number of tokens in a sequence. Default: 2048, or the model's limit if that is"
    " lower.",
)
@click.option(
    "--slots",
    type=int,
    help="Maximum number of sequences decoded together. Default: 8, or fewer if idle slots would cost too much memory"
    " or time.",
)
@click.option(
    "--weights",
    help="Format of the weights: float32, bfloat16, int8 or int4, or source for the checkpoint's own format."
    " Default: int8.",
)
@click.option(
    "--kv-cache",
    help="Format of keys and values: float32, bfloat16 or int8. Default: float32 with float32 weights, otherwise"
    " bfloat16.",
)
@click.option(
    "--target",
    "targets",
    multiple=True,
    help="Target to build: cpu, portable, savedmodel or cuda. May be given several times. Default: cpu and portable.",
)
@click.option(
    "--cpu-isa",
    "cpu_isas",
    multiple=True,
    help="Instruction set for which the target cpu is compiled: x86-64-v2, x86-64-v3, x86-64-v4, or native for all"
    " features of this machine. May be given several times. Default: x86-64-v2, or native on a machine without"
    " x86-64-v2.",
)
@click.option(
    "--bits",
    type=float,
    metavar="BITS",
    help="Choose a format of 4 to 8 bits for each matrix, so that weights have at most BITS bits on average (for"
    " example 5.5) and the model loses as little accuracy as possible. The choice takes minutes. Excludes --weights.",
)
@click.option(
    "--calibrate",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Calibrate with this text: with --weights int4 or --bits, round the weights so that the outputs of the layers"
    " on this text change least. Takes minutes. Default with --bits: the documentation that Python contains.",
)
@click.option("--overwrite", is_flag=True, help="Replace an existing artifact.")
def export(
    source: str | None,
    output: Path | None,
    buckets: tuple[int, ...] | None,
    context: int | None,
    slots: int | None,
    weights: str | None,
    kv_cache: str | None,
    targets: tuple[str, ...],
    cpu_isas: tuple[str, ...],
    bits: float | None,
    calibrate: Path | None,
    overwrite: bool,
) -> int:
    """Compile SOURCE into an artifact.

    SOURCE is a Hugging Face directory, a .gguf file or a hub id (org/name). Without SOURCE, the demo model
    SmolLM2-135M-Instruct is fetched.

    Exit code 0: success. 2: an error.
    """
    from precast.loaders.console.extras import need_export

    need_export()
    from precast.exporter import console
    from precast.exporter.options import ExportOptions
    from precast.exporter.targets.kinds import DEFAULT_TARGETS

    form = ExportOptions(
        buckets=buckets,
        context=context,
        slots=slots,
        weights=weights,
        kv_cache=kv_cache,
        targets=targets or DEFAULT_TARGETS,
        cpu_isas=cpu_isas or None,
        bits=bits,
        calibrate=calibrate,
        overwrite=overwrite,
    )
    return console.run(source, output, form)


@main.command()
@click.argument("artifact", type=options.ARTIFACT)
@click.option(
    "-p",
    "--prompt",
    help="Text to continue, or with --chat, the message to answer. Default: standard input without one final newline.",
)
@click.option(
    "--ids", callback=options.numbers, help="Token ids to continue instead of a text, such as 1,2,3."
)
@click.option("--chat", is_flag=True, help="Format the prompt with the model's chat template.")
@click.option("--system", help="System message, which may be empty; implies --chat.")
@options.LITERAL
@options.TEMPLATE_VARIABLES
@options.STATE
@options.sampling
@options.answers
@options.JSON
@options.STATS
@options.loading
def run(
    artifact: Path | str,
    prompt: str | None,
    ids: tuple[int, ...] | None,
    chat: bool,
    system: str | None,
    literal: bool,
    template_variables: "Mapping[str, Any]",
    state: Path | None,
    as_json: bool,
    stats: bool,
    sampling: "SamplingOptions",
    answers: "AnswerOptions",
    loading: "LoadOptions",
) -> int:
    """Generate text with ARTIFACT.

    ARTIFACT is an artifact's folder, a folder that contains exactly one artifact, or the URL of an artifact in a store.
    An artifact in a store is pulled into the cache folder once.

    If no prompt is given on a terminal, the command starts an interactive chat.

    In a chat, a terminal shows the model's reasoning, dimmed, before the answer. Output to a pipe or a file omits the
    reasoning, except with --json.

    Exit code 0: success. 2: an error.
    """
    from precast.loaders.console import run as console

    text = console.Prompt(
        text=prompt,
        ids=ids,
        chat=chat,
        system=system,
        literal=literal,
        state=state,
        template_variables=template_variables,
    )
    return console.run(
        artifact, text, sampling=sampling, loading=loading, as_json=as_json, stats=stats, answers=answers
    )


@main.command()
@click.argument("artifact", type=options.ARTIFACT)
@click.option("--system", help="System message, which may be empty.")
@options.LITERAL
@options.TEMPLATE_VARIABLES
@options.STATE
@options.sampling
@options.STATS
@options.loading
def chat(
    artifact: Path | str,
    system: str | None,
    literal: bool,
    template_variables: "Mapping[str, Any]",
    state: Path | None,
    stats: bool,
    sampling: "SamplingOptions",
    loading: "LoadOptions",
) -> int:
    """Chat with ARTIFACT in the terminal.

    ARTIFACT is a folder or a URL, as in precast run. If standard input is not a terminal, its text is the only message.

    The arrow keys recall your messages from earlier chats, stored in $XDG_STATE_HOME/precast/chat_history.
    Set PRECAST_HISTORY to use another file, or set it to off to store no messages.

    Exit code 0: success. 2: an error.
    """
    from precast.loaders.console import chat as console

    return console.run(
        artifact,
        system=system,
        literal=literal,
        template_variables=template_variables,
        state=state,
        sampling=sampling,
        loading=loading,
        stats=stats,
    )


@main.command()
@click.argument("artifact", type=options.ARTIFACT)
@click.argument("source", metavar="INPUT", type=options.PATH)
@click.argument("output", metavar="OUTPUT", type=options.PATH)
@options.TEMPLATE_VARIABLES
@options.sampling
@options.loading
def batch(
    artifact: Path | str,
    source: Path,
    output: Path,
    template_variables: "Mapping[str, Any]",
    sampling: "SamplingOptions",
    loading: "LoadOptions",
) -> int:
    """Answer the requests in the file INPUT with ARTIFACT.

    The command writes one line to OUTPUT for each line of INPUT. A line of INPUT is a JSON object with a "prompt" or
    "messages", and optionally with sampling parameters, which take precedence over the command's options. A line in the
    format of OpenAI's batch API is also accepted. A line of OUTPUT contains the "text" of the answer or an "error", and
    the "custom_id" of the request. If a file's name ends in .parquet, its format is Parquet, which needs the extra
    parquet.

    The artifact's slots answer several requests at the same time. After an interruption, the same command continues
    with the remaining requests.

    Exit code 0: all requests were answered. 1: some requests failed. 2: the command failed.
    """
    from precast.loaders.console import batch as console

    return console.run(
        artifact, source, output, template_variables=template_variables, sampling=sampling, loading=loading
    )


@main.command()
@click.argument("artifacts", metavar="ARTIFACT...", nargs=-1, required=True, type=options.ARTIFACT)
@options.serving
@options.loading
def serve(artifacts: tuple[Path | str, ...], serving: "ServeOptions", loading: "LoadOptions") -> int:
    """Serve ARTIFACTs over HTTP.

    An ARTIFACT is the folder of an artifact, a folder of such folders, or the URL of a pushed artifact. The server
    speaks OpenAI's API and Anthropic's API. A model has the name of its folder. A single model is loaded at the start;
    several are loaded at their first requests. A model answers once it has reproduced its golden answers.

    Exit code 0: the server was stopped by SIGTERM or Ctrl-C. 2: an error.
    """
    from precast.loaders.console import serve as console

    return console.run(artifacts, options=serving, loading=loading)


@main.command("add-target")
@click.argument("artifact", type=options.PATH)
@click.option(
    "--cpu-isa",
    help="Instruction set to compile for: x86-64-v2, x86-64-v3, x86-64-v4, or native for all features of this machine."
    " Default: x86-64-v2, or native with --target portable or on a machine without x86-64-v2.",
)
@click.option(
    "--target", help="Target whose StableHLO to compile. Default: the fastest target that runs here."
)
@click.option("--overwrite", is_flag=True, help="Replace a target of the same name.")
@options.KEY
def add_target(
    artifact: Path, cpu_isa: str | None, target: str | None, overwrite: bool, require_signature: Path | None
) -> int:
    """Compile ARTIFACT for another CPU or jaxlib.

    The installed jaxlib compiles the new target from the artifact's StableHLO. Nothing is traced, and jax is not
    needed. The target is added only if it reproduces the golden answers. If the artifact is signed, the command removes
    the signature, which would no longer match. Sign the artifact again.

    Exit code 0: success. 2: an error.
    """
    from precast.loaders.console import add_target as console

    return console.run(
        artifact, cpu_isa=cpu_isa, target=target, overwrite=overwrite, require_signature=require_signature
    )


@main.command("add-prefix")
@click.argument("artifact", type=options.PATH)
@click.argument("name")
@click.option(
    "--system",
    type=options.PATH,
    help="File with the system message that chats begin with.",
)
@click.option("--chat", type=options.PATH, help="JSON file with the messages that chats begin with.")
@click.option("--text", type=options.PATH, help="File with the text that prompts begin with.")
@click.option(
    "--tools", type=options.PATH, help="JSON file with the tools of these chats, for --system or --chat."
)
@options.TEMPLATE_VARIABLES
@click.option(
    "--target",
    help="Compute the prefix with this target. No other target can use the prefix. Default: the best target that runs"
    " here.",
)
@click.option("--overwrite", is_flag=True, help="Replace a prefix of the same name.")
@options.KEY
@options.THREADS
def add_prefix(
    artifact: Path,
    name: str,
    system: Path | None,
    chat: Path | None,
    text: Path | None,
    tools: Path | None,
    template_variables: "Mapping[str, Any]",
    target: str | None,
    overwrite: bool,
    require_signature: Path | None,
    threads: int | None,
) -> int:
    """Store a prefix of prompts in ARTIFACT as NAME.

    If a prompt begins with the prefix, then only the tokens after the prefix are prefilled. The answer stays the same.
    Only the target that computed the prefix uses it, and only on a CPU for which precast's kernels choose the same
    instruction set. If the artifact is signed, the command removes the signature, which would no longer match. Sign the
    artifact again.

    Exit code 0: success. 2: an error.
    """
    from precast.loaders.console import add_prefix as console

    return console.add(
        artifact,
        name,
        console.PrefixFiles(
            system=system, chat=chat, text=text, tools=tools, template_variables=template_variables
        ),
        target=target,
        overwrite=overwrite,
        require_signature=require_signature,
        threads=threads,
    )


@main.command("remove-prefix")
@click.argument("artifact", type=options.PATH)
@click.argument("name")
@options.KEY
def remove_prefix(artifact: Path, name: str, require_signature: Path | None) -> int:
    """Remove the prefix NAME from ARTIFACT.

    If the artifact is signed, the command removes the signature, which would no longer match. Sign the artifact again.

    Exit code 0: success. 2: an error.
    """
    from precast.loaders.console import add_prefix as console

    return console.remove(artifact, name, require_signature=require_signature)


@main.command("list")
@click.argument("folder", type=options.PATH, default="artifacts")
@options.JSON
@options.KEY
def list_artifacts(folder: Path, as_json: bool, require_signature: Path | None) -> int:
    """List the artifacts below FOLDER.

    The default of FOLDER is artifacts. The list shows each artifact's model, size and stored prefixes, and whether the
    artifact runs on this machine. For an artifact that cannot be read, the list shows the error.

    Exit code 0: success. 2: an error.
    """
    from precast.loaders.console import listing as console

    return console.run(folder, as_json=as_json, require_signature=require_signature)


@main.command()
@click.argument("artifact", type=options.ARTIFACT)
@options.JSON
@options.KEY
def inspect(artifact: Path | str, as_json: bool, require_signature: Path | None) -> int:
    """Show the contents of ARTIFACT.

    Exit code 0: success. 2: an error.
    """
    from precast.loaders.console import inspect as console

    return console.run(artifact, as_json=as_json, require_signature=require_signature)


@main.command()
@click.argument("artifact", type=options.ARTIFACT)
@click.option("--target", help="Check only this target. Default: all targets.")
@click.option(
    "--compile",
    "allow_compile",
    is_flag=True,
    help="Accept a target that must first be compiled from StableHLO on this machine.",
)
@options.JSON
@options.KEY
def check(
    artifact: Path | str,
    target: str | None,
    allow_compile: bool,
    as_json: bool,
    require_signature: Path | None,
) -> int:
    """Check whether ARTIFACT runs on this machine.

    The output names each obstacle and its remedy. The command reads only the manifest.

    Exit code 0: the artifact runs here. 1: it does not. 2: an error, such as an artifact that cannot be read.
    """
    from precast.loaders.console import check as console

    return console.run(
        artifact,
        target=target,
        allow_compile=allow_compile,
        as_json=as_json,
        require_signature=require_signature,
    )


@main.command()
@click.argument("artifact", type=options.ARTIFACT)
@click.option("--target", help="Replay the answers with this target. Default: the best target that fits.")
@options.COMPILE
@options.JSON
@options.KEY
@options.THREADS
def verify(
    artifact: Path | str,
    target: str | None,
    allow_compile: bool,
    as_json: bool,
    require_signature: Path | None,
    threads: int | None,
) -> int:
    """Verify the files and the golden answers of ARTIFACT.

    The command hashes every file. It also answers the prompts that were recorded at the export, and compares the
    answers and logits.

    Exit code 0: files, answers, and logits are as exported. 1: something differs. 2: an error, such as an artifact
    that cannot be read or does not run on this machine.
    """
    from precast.loaders.console import verify as console

    return console.run(
        artifact,
        target=target,
        allow_compile=allow_compile,
        as_json=as_json,
        require_signature=require_signature,
        threads=threads,
    )


@main.command()
@click.argument("before", metavar="A", type=options.ARTIFACT)
@click.argument("after", metavar="B", type=options.ARTIFACT)
@options.JSON
@options.KEY
def diff(before: Path | str, after: Path | str, as_json: bool, require_signature: Path | None) -> int:
    """Show the differences between the artifacts A and B.

    Exit code 0: the artifacts are the same. 1: they differ. 2: an error, such as an artifact that cannot be read.
    """
    from precast.loaders.console import diff as console

    return console.run(before, after, as_json=as_json, require_signature=require_signature)


@main.command("eval")
@click.argument("artifact", type=options.ARTIFACT)
@click.option(
    "--reference",
    type=options.PATH,
    help="Compare with this artifact, or with this Hugging Face directory or .gguf file, which is computed in float32.",
)
@click.option(
    "--text", type=options.PATH, help="UTF-8 text to predict. Default: a text that precast contains."
)
@click.option(
    "--tokens", type=int, default=3072, show_default=True, help="Use at most this many tokens of the text."
)
@click.option(
    "--window",
    type=int,
    help="Length of a window in tokens. Default: 512, or the context length if it is lower.",
)
@options.JSON
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
) -> int:
    """Measure how well ARTIFACT predicts a text.

    The measure is perplexity. With a reference, the command also compares the predictions of the two models. It reports
    the mean and the 99th percentile of the divergence KL(reference || artifact) in nats per token, and how often both
    models agree on the likeliest token.

    The text is tokenised without a chat template and cut into windows. A shorter window at the end counts if it has at
    least 64 tokens. The first half of each window is prefilled, and the second half is decoded token by token. Every
    prediction from the last prefilled position onwards is scored. A reference that is not an artifact needs the export
    extra. It computes each window at once in float32, without a KV cache. If a signature is required, a reference that
    is an artifact must also be signed.

    Exit code 0: success. 2: an error.
    """
    from precast.loaders.console import evaluate as console

    return console.run(
        artifact,
        console.TextOptions(path=text, tokens=tokens, window=window),
        reference=reference,
        source_opener=_source_opener,
        as_json=as_json,
        require_signature=require_signature,
        threads=threads,
    )


def _source_opener() -> "Callable[[str, int], Scorer]":
    """Return a function that opens a source as a reference, given the source's name and a context length.

    Raises:
        PrecastError: the export extra is not installed.
    """
    from precast.loaders.console.extras import need_export

    need_export("a reference that is not an artifact")
    from precast.exporter.reference.fidelity import open_reference

    return open_reference


@main.command()
@click.argument("artifact", type=options.PATH)
@click.option(
    "--key",
    required=True,
    type=options.PATH,
    help="PEM file of the private key: an elliptic curve key of P-256, P-384 or P-521.",
)
def sign(artifact: Path, key: Path) -> int:
    """Sign ARTIFACT.

    The command writes the signature of manifest.json to manifest.json.sig. The manifest contains the sha256 of every
    other file.

    The key's password is read from PRECAST_KEY_PASSWORD, or typed on the terminal. The signature has the format of
    OpenSSF Model Signing, so that project's command can also verify it.

    Exit code 0: success. 2: an error.
    """
    from precast.loaders.console import sign as console

    return console.run(artifact, key=key)


@main.command()
@click.argument("artifact", type=options.PATH)
@click.argument("url")
@click.option(
    "--rehash", is_flag=True, help="Read back the pieces in the store, and send damaged pieces again."
)
@options.JSON
def push(artifact: Path, url: str, rehash: bool, as_json: bool) -> int:
    """Send ARTIFACT to a store.

    URL is a folder in a store, followed by the artifact's name: s3://bucket/models/NAME, gs://bucket/models/NAME,
    file:///folder/NAME. Every protocol of fsspec except sftp and ssh is supported. Artifacts in one folder share
    identical pieces, so a push of a second version sends only the changes.

    Exit code 0: success. 2: an error.
    """
    from precast.loaders.console import push as console

    return console.run(artifact, url, rehash=rehash, as_json=as_json)


@main.command()
@click.argument("url")
@click.option("-o", "--output", type=options.PATH, help="Folder to write. Default: artifacts/NAME.")
@click.option("--overwrite", is_flag=True, help="Replace an existing artifact.")
@options.KEY
@options.JSON
def pull(
    url: str, output: Path | None, overwrite: bool, require_signature: Path | None, as_json: bool
) -> int:
    """Fetch an artifact from a store.

    URL is the URL that the artifact was pushed to. All data is checked against its hashes. After an interruption, the
    same command resumes the pull.

    Exit code 0: success. 2: an error.
    """
    from precast.loaders.console import pull as console

    return console.run(
        url, output=output, overwrite=overwrite, require_signature=require_signature, as_json=as_json
    )
