"""Generated requests, by the thousand: the server must answer each as its OpenAPI description says, and none with 5xx.

    python tests/fuzz/serve.py --examples 900 --seed 1          about 10,000 requests, most of them malformed
    python tests/fuzz/serve.py --examples 10 --only /tokenize

Schemathesis makes the requests: first the boundary values of each parameter, then random ones. Requests that break the
description must be refused, and every reply must have the described type and form. Only one check is left out: that
requests which fit the description are accepted, because a schema cannot express rules such as the size of the
vocabulary.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import run as artifacts

# Other work may hold up a machine for minutes.
START_S = 300
_STARTED = re.compile(rb"Serving .* at (http://\S+)/v1;")
# Short answers, and time for a machine that is busy with other work.
_LIMITS = ("--max-tokens", "4", "--request-timeout", "300")


@contextmanager
def serving(artifact: Path, log: Path) -> Iterator[str]:
    """Serve an artifact, and yield the server's URL."""
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "precast", "serve", "--port", "0", *_LIMITS, str(artifact)],
            stdout=file,
            stderr=file,
            cwd=log.parent,
        )
    try:
        yield _ready(process, log)
    finally:
        process.terminate()
        process.wait(60)


def _ready(process: "subprocess.Popen[bytes]", log: Path) -> str:
    end = time.monotonic() + START_S
    while time.monotonic() < end and process.poll() is None:
        if (found := _STARTED.search(log.read_bytes())) and b": loaded" in log.read_bytes():
            return found[1].decode()
        time.sleep(0.1)
    raise SystemExit(f"the server does not start: {log.read_text()[-2000:]}")


def described(url: str, model: str) -> dict[str, Any]:
    """Return the server's OpenAPI description, with the model's name instead of any text."""
    with urllib.request.urlopen(f"{url}/openapi.json") as reply:
        description: dict[str, Any] = json.load(reply)
    for schema in description["components"]["schemas"].values():
        if "model" in schema.get("properties", ()) and "required" in schema:
            schema["properties"]["model"] = {"const": model}
    return description


def send(url: str, folder: Path, model: str, options: argparse.Namespace) -> dict[str, Any]:
    """Send the requests, print Schemathesis' findings, and return its report."""
    document, report = folder / "openapi.json", folder / "report.json"
    document.write_text(json.dumps(described(url, model)))
    chosen: Sequence[str] = [part for path in options.only for part in ("--include-path", path)]
    command = [sys.executable, "-m", "schemathesis.cli", "run", str(document), "--url", url, *chosen]
    command += ["--phases", "coverage,fuzzing", "--exclude-checks", "positive_data_acceptance"]
    command += ["--max-examples", str(options.examples), "--seed", str(options.seed), "--continue-on-failure"]
    command += [
        "--generation-database",
        "none",
        "--warnings",
        "off",
        "--request-timeout",
        "300",
        "--no-color",
    ]
    command += ["--report", "json", "--report-json-path", str(report)]
    subprocess.run(command, cwd=folder, check=False)
    found: dict[str, Any] = json.loads(report.read_text())
    return found


def failures(log: Path) -> list[str]:
    """Return the lines of the server's log about internal errors."""
    return [line for line in log.read_text().splitlines() if '"event": "error"' in line]


def main() -> None:
    """Run the campaign, and exit with 1 if there are findings."""
    parser = argparse.ArgumentParser(description="Send generated requests to a server.")
    parser.add_argument("--examples", type=int, default=900, help="random requests for each route")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", type=lambda paths: paths.split(","), default=[], help="paths, with commas")
    parser.add_argument("--artifact", type=Path, help="artifact to serve; a tiny one is made by default")
    options = parser.parse_args()
    folder, started = Path(tempfile.mkdtemp(prefix="precast-serve-")), time.monotonic()
    os.environ["PRECAST_CACHE"] = str(folder / "cache")
    log = folder / "log"
    try:
        artifact = options.artifact or artifacts.make_base(folder / "tiny")
        with serving(artifact.resolve(), log) as url:
            report = send(url, folder, artifact.resolve().name, options)
        errors = failures(log)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(*errors[:20], sep="\n")
    cases = report["test_cases"]
    findings = cases["with_failures"] + cases["errored"] + len(errors)
    seconds = round(time.monotonic() - started)
    print(json.dumps({"requests": cases["generated"], "findings": findings, "seconds": seconds}))
    sys.exit(1 if findings or not report["complete"] or not cases["generated"] else 0)


if __name__ == "__main__":
    main()
