"""What ``precast export`` shows while it works, and when it is done."""

import os
import sys
import time
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars
from rich.table import Table

from precast.loaders.artifact.errors import printable
from precast.loaders.artifact.folders import check_free
from precast.loaders.artifact.interrupt import on_interrupt
from precast.loaders.artifact.manifest import WEIGHTS_FILE, Manifest
from precast.loaders.compiling.isa import audience_of

from .export import ExportOptions, Progress, check_options, export
from .sources.open import open_source
from .targets.built import Built


def run_export(spec: str | None, output: Path | None, options: ExportOptions) -> None:
    """Exports with progress on standard error and a summary on standard output.

    Raises:
        PrecastError: for anything the user can put right.
    """
    started = time.perf_counter()
    check_options(options)
    if output is not None:
        check_free(output, options.overwrite)
    console = _console(stderr=True)
    console.print(printable(f"reading {spec or 'the demo model, SmolLM2-135M-Instruct'}"))
    source = open_source(spec)
    path = output or Path("artifacts") / f"{source.name}-{options.weights}"
    built: list[Built] = []
    with on_interrupt(partial(_show_cursor, console)), _bars(console) as bars:
        manifest = export(source, path, options, _progress(console, bars, built))
    output_console = _console(stderr=False)
    output_console.print(_summary(path, manifest, built, time.perf_counter() - started))
    if (cpus := audience_of(manifest.targets)) is not None:
        output_console.print(f"runs on {cpus}", soft_wrap=True)


def _console(*, stderr: bool) -> Console:
    # Names of files and models are text, whatever brackets and colons they have.
    return Console(stderr=stderr, highlight=False, markup=False, emoji=False)


def _show_cursor(console: Console) -> None:
    """Show the cursor that progress bars hide, bypassing any stream with a half-written line."""
    if console.is_terminal:
        os.write(sys.stderr.fileno(), b"\x1b[?25h")


def _bars(console: Console) -> Bars:
    columns = (TextColumn("  {task.description}"), BarColumn(), DownloadColumn(), TimeElapsedColumn())
    return Bars(*columns, console=console, transient=True)


def _progress(console: Console, bars: Bars, built: list[Built]) -> Progress:
    task = bars.add_task("weights", total=None, visible=False)

    def weights(done: int, total: int) -> None:
        bars.update(task, completed=done, total=total, visible=done < total)

    def program(b: Built) -> None:
        built.append(b)
        compiled = f", compiled {b.compile_s:.2f} s" if b.compile_s else ""
        console.print(f"  {b.program.name:<14} lowered {b.lower_s:.2f} s{compiled}, {b.bytes / 1e3:.1f} kB")

    def stage(words: str) -> None:
        # Remarks quote the source.
        console.print(printable(words))

    return Progress(stage=stage, weights=weights, built=program)


def _summary(path: Path, manifest: Manifest, built: list[Built], seconds: float) -> Table:
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
