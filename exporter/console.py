"""The command ``precast export``, which shows progress on standard error and a summary on standard output."""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars
from rich.table import Table

from precast.loaders.artifact.errors import printable
from precast.loaders.artifact.folders import check_free
from precast.loaders.artifact.interrupt import on_interrupt
from precast.loaders.artifact.manifest import WEIGHTS_FILE, Manifest
from precast.loaders.compiling.isa import audience_of
from precast.loaders.progress import Progress, Step, amount, show_progress

from .export import export
from .options import ExportOptions, check_options
from .sources.open import open_source
from .targets.built import BuiltProgram


def run(spec: str | None, output: Path | None, options: ExportOptions) -> int:
    """Export a model, with progress on standard error and a summary on standard output.

    Args:
        spec: the model, as for `open_source`.
        output: folder to write; None for ``artifacts/NAME-WEIGHTS``.
        options: the options of the export.

    Returns:
        The exit code, 0.

    Raises:
        PrecastError: an option is wrong, `output` exists, the model cannot be opened, or the export fails.
    """
    started = time.perf_counter()
    check_options(options)
    if output is not None:
        check_free(output, options.overwrite)
    console = _console(stderr=True)

    def log(line: str) -> None:
        # Remarks quote names from the source, and these names may contain control characters.
        console.print(printable(line))

    log(f"reading {spec or 'the demo model, SmolLM2-135M-Instruct'}")
    source = open_source(spec)
    path = output or Path("artifacts") / f"{source.name}-{options.weight_format}"
    built: list[BuiltProgram] = []
    with on_interrupt(partial(_show_cursor, console)), _shown(console) as show:
        progress = partial(_report, console, built, show)
        manifest = export(source, path, options, log=log, progress=progress)
    output_console = _console(stderr=False)
    output_console.print(_summary(path, manifest, built, time.perf_counter() - started))
    if (cpus := audience_of(manifest.targets)) is not None:
        output_console.print(f"runs on {cpus}", soft_wrap=True)
    return 0


def _console(*, stderr: bool) -> Console:
    # Names of files and models may contain square brackets, which rich would read as markup.
    return Console(stderr=stderr, highlight=False, markup=False, emoji=False)


def _show_cursor(console: Console) -> None:
    """Show the cursor, which progress bars hide.

    The escape sequence is written to the file descriptor, because an interrupt may arrive while the stream itself is
    writing a line.
    """
    if console.is_terminal:
        os.write(sys.stderr.fileno(), b"\x1b[?25h")


def _report(console: Console, built: list[BuiltProgram], show: Progress, step: Step) -> None:
    """Print a built program and append it to `built`; pass any other step to `show`."""
    if not isinstance(step, BuiltProgram):
        show(step)
        return
    built.append(step)
    compiled = f", compiled {step.compile_s:.2f} s" if step.compile_s else ""
    size = f"{step.bytes / 1e3:.1f} kB"
    console.print(f"  {step.program.name:<14} lowered {step.lower_s:.2f} s{compiled}, {size}")


@contextmanager
def _shown(console: Console) -> Iterator[Progress]:
    """Yield a function that shows progress: as a bar on a terminal, as occasional lines elsewhere."""
    if not console.is_terminal:
        with show_progress() as progress:
            yield progress
        return
    amounts = TextColumn("{task.fields[amount]}")
    columns = (TextColumn("  {task.description}"), BarColumn(), amounts, TimeElapsedColumn())
    with Bars(*columns, console=console, transient=True) as bars:
        yield _bar(bars)


def _bar(bars: Bars) -> Progress:
    """Return a function that shows a step as a bar until the step is done."""
    task = bars.add_task("", total=None, visible=False, amount="")
    text = ""

    def progress(step: Step) -> None:
        nonlocal text
        if step.text != text:
            text = step.text
            bars.reset(task)  # restarts the elapsed time
        bars.update(
            task,
            description=step.text,
            completed=step.done,
            total=step.total,
            amount=amount(step),
            visible=step.done < step.total,
        )

    return progress


def _summary(path: Path, manifest: Manifest, built: list[BuiltProgram], seconds: float) -> Table:
    table = Table(title=printable(str(path)), title_justify="left", caption_justify="left")
    for name, justify in (("target", "left"), ("program", "left"), ("bytes", "right"), ("seconds", "right")):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    for b in built:
        table.add_row(b.target, b.program.name, f"{b.bytes:,}", f"{b.lower_s + b.compile_s:.2f}")
    table.add_section()
    table.add_row("", WEIGHTS_FILE, f"{manifest.files[WEIGHTS_FILE].bytes:,}", "")
    table.add_row(
        "", "whole artifact", f"{sum(f.bytes for f in manifest.files.values()):,}", f"{seconds:.2f}"
    )
    table.caption = printable(f"answers checked against the reference; run it with: precast run {path}")
    return table
