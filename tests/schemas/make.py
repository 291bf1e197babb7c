"""Make `sample.jsonl.xz` from a clone of github.com/guidance-ai/jsonschemabench: python make.py CLONE.

The sample contains small schemas from the families whose sources have the Apache licence 2.0 (README.md lists them).
"""

import json
import lzma
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

FAMILIES = ("BFCL", "Glaiveai2K", "JME", "JsonSchemaStore", "Kubernetes", "Snowplow")
EACH = 70
LONGEST = 6_000  # maximum number of characters in a schema with its instances
MOST_INSTANCES = 4


def main() -> None:
    (clone,) = sys.argv[1:]
    listing = git(clone, "ls-tree", "-r", "-l", "HEAD", "maskbench/data").splitlines()
    sizes = ((path, line.split()[3]) for line in listing for path in line.split("\t")[1:])
    # Limit for a file, which is indented: a schema of LONGEST characters takes less. A partial clone lacks large files.
    names = [path for path, size in sizes if size.isdigit() and int(size) < 5 * LONGEST]
    rows = [row for family in FAMILIES for row in sample(clone, family, sorted(names))]
    text = "".join(json.dumps(row, ensure_ascii=False, separators=(",", ":")) + "\n" for row in rows)
    Path(__file__).with_name("sample.jsonl.xz").write_bytes(lzma.compress(text.encode(), preset=9))
    print(f"{len(rows)} schemas, {len(text):,} characters")


def sample(clone: str, family: str, names: list[str]) -> list[dict[str, object]]:
    mine = [name for name in names if Path(name).name.startswith(family)]
    random.Random(family).shuffle(mine)
    found: list[dict[str, object]] = []
    for row in rows_of(clone, mine):
        if len(found) == EACH:
            break
        if len(json.dumps(row)) <= LONGEST:
            found.append(row)
    return sorted(found, key=lambda row: str(row["name"]))


def rows_of(clone: str, names: list[str]) -> Iterator[dict[str, object]]:
    for name in names:
        case = json.loads(git(clone, "show", f"HEAD:{name}"))
        instances = [{"valid": test["valid"], "data": test["data"]} for test in case["tests"]]
        yield {"name": Path(name).stem, "schema": case["schema"], "instances": instances[:MOST_INSTANCES]}


def git(clone: str, *arguments: str) -> str:
    return subprocess.run(
        ["git", "-C", clone, *arguments], check=True, capture_output=True, encoding="utf-8"
    ).stdout


if __name__ == "__main__":
    main()
