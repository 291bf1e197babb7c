"""A short run of `make fuzz-serve`, and proof that it notices a reply that differs from the description."""

import json
from pathlib import Path
from typing import Any

FUZZ = Path(__file__).resolve().parent / "fuzz"
# Replaces a schema in the description by one that no reply fits.
_WRONG = """
import sys
sys.path.insert(0, sys.argv.pop(1))
import serve

described = serve.described

def wrong(*arguments):
    document = described(*arguments)
    document["components"]["schemas"]["detokenize_reply"] = {"required": ["missing"]}
    return document

serve.described = wrong
serve.main()
"""


def _report(result: Any) -> dict[str, Any]:
    return json.loads(result.stdout.splitlines()[-1])


def test_generated_requests(tiny_artifact, python) -> None:
    result = python(str(FUZZ / "serve.py"), "--artifact", str(tiny_artifact), "--examples", "10")
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr
    report = _report(result)
    assert report["findings"] == 0
    assert report["requests"] > 1000


def test_a_wrong_reply_is_noticed(tiny_artifact, python) -> None:
    given = ("--artifact", str(tiny_artifact), "--examples", "5", "--only", "/detokenize")
    result = python("-c", _WRONG, str(FUZZ), *given)
    assert result.returncode == 1, result.stdout[-4000:] + result.stderr
    assert _report(result)["findings"] > 0
