"""Compiling the CUDA target without a GPU: XLA's compiler gets the description of an H100.

The tests need jax's plugin (jax-cuda12-pjrt in the version of jaxlib), but no driver and no CUDA. They are skipped if
the plugin is missing.
"""

import json
import os
import subprocess
import sys

import pytest

from precast.loaders.runtime import cuda

CODE = '''
import dataclasses, datetime, json, sys, tempfile
from pathlib import Path
import jax
from jax.experimental import topologies
from precast.exporter.models.registry import read_model
from precast.exporter.programs import Geometry, build_programs, stored_model
from precast.exporter.targets.kinds import TARGET_KINDS
from precast.exporter.targets.build import build_target

H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128 block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535 block_dim_limit_z: 65535 memory_bandwidth: 3352320000000 l2_cache_size: 52428800
  clock_rate_ghz: 1.98 device_memory_size: 84929347584 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 } registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA" runtime_version { major: 12 minor: 8 } dnn_version_info { major: 9 minor: 7 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
jax.devices("cpu")
device = topologies.get_topology_desc("", "cuda", target_config=H100, topology="1x1x1").devices[0]
config, weights = json.loads(sys.argv[1]), sys.argv[2]
model = stored_model(read_model(config, "m").with_context(256), weights)
kind = dataclasses.replace(TARGET_KINDS["cuda"], device=lambda: device)
programs = build_programs(model, Geometry(context=256, slots=1, buckets=(64,), kv_cache="bfloat16"), kind.ops)
with tempfile.TemporaryDirectory() as folder:
    target = build_target(kind, programs, Path(folder), datetime.date(2026, 1, 1), lambda _: None)
    sizes = {p.name: (Path(folder) / p.executable).stat().st_size for p in target.programs}
print(json.dumps({**dataclasses.asdict(target), "sizes": sizes}))
'''
LLAMA = {
    "model_type": "llama",
    "hidden_size": 1024,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "intermediate_size": 4096,
    "vocab_size": 4096,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}


def compiled(config, weights="bfloat16"):
    if cuda.find_plugin() is None:
        pytest.skip("jax's CUDA plugin is not installed")
    done = subprocess.run(
        [sys.executable, "-c", CODE, json.dumps(config), weights],
        env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_gpu_autotune_level=0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_programs_compile_for_an_absent_gpu():
    target = compiled(LLAMA)
    assert (target["name"], target["platform"]) == ("cuda-nvidia-h100-80gb-hbm3", "cuda")
    assert (target["device"], target["machine"]) == ("NVIDIA H100 80GB HBM3", "any")
    assert (target["cpu_features"], target["kernels"], target["kernel_abi"]) == ([], [], 0)
    assert all(size > 1000 for size in target["sizes"].values())
    cache, prefill, decode = (p["memory"] for p in target["programs"])
    held = cache["results"]
    assert prefill["aliased"] == decode["aliased"] == 2 * 4 * 256 * 4 * 128 * 2
    assert held >= decode["aliased"]
    # Weights are read in place, so no layer's matrix is copied out of its stack.
    matrix = 1024 * 4096 * 2
    assert decode["temporary"] < matrix


@pytest.mark.parametrize("weights", ["int8", "int4", "float32"])
def test_other_weights_compile_too(weights):
    assert compiled(LLAMA, weights)["device"] == "NVIDIA H100 80GB HBM3"
