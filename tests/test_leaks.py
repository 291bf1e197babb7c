"""Repeated loads: memory, descriptors, threads and mappings do not grow."""

import json

SCRIPT = """
import gc, json, os, sys
from pathlib import Path
from precast.loaders.artifact.errors import PrecastError
from precast.loaders.load import load
from precast.loaders.generation.sampling_params import SamplingParams

def now():
    gc.collect()
    pages = Path("/proc/self/statm").read_text().split()
    return {
        "resident": int(pages[1]) * os.sysconf("SC_PAGE_SIZE"),
        "descriptors": len(os.listdir("/proc/self/fd")),
        "threads": len(os.listdir("/proc/self/task")),
        "mapped": Path("/proc/self/maps").read_text().count("weights.safetensors"),
    }

def use(times):
    for _ in range(times):
        load(whole, trusted=True, log=lambda _: None).generate([1, 2, 3], SamplingParams(max_tokens=2, ignore_eos=True))
        try:
            load(broken, trusted=True)
        except PrecastError:
            pass
        else:
            raise SystemExit("the broken one was loaded")

whole, broken, loads = sys.argv[1], sys.argv[2], int(sys.argv[3])
use(100)
before = now()
use(loads // 2)
between = now()
use(loads // 2)
print(json.dumps([before, between, now()]))
"""


def test_500_loads_in_one_process_leak_nothing(
    tiny_artifact, artifact_copy, edit_manifest, python, own_cache
):
    """The same number of loads is refused after the weights were mapped."""

    def another_shape(manifest):
        for program in manifest["targets"][0]["programs"]:
            for value in program["arguments"]:
                if value["name"] == "model.norm.weight":
                    value |= {"shape": [1, 49]}

    edit_manifest(artifact_copy, another_shape)
    result = python("-c", SCRIPT, str(tiny_artifact), str(artifact_copy), "500")
    assert result.returncode == 0, result.stderr
    before, between, after = json.loads(result.stdout)
    same = ("descriptors", "threads", "mapped")
    assert [after[key] for key in same] == [before[key] for key in same]
    # Allocators keep a little memory. 250 leaks of a program or of the weights would take tens of megabytes.
    assert after["resident"] - between["resident"] < 4 << 20, (before, between, after)
