"""The loader's CUDA client on a machine without GPU: installed packages, refusals, copies to and from the device.

XLA's CPU client replaces the GPU's client behind the same interface, which copies arrays to and from the device.
"""

import dataclasses
import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from jaxlib import _jax

from precast.loaders import load as loading
from precast.loaders.artifact.compat import choose_target, mismatches
from precast.loaders.artifact.errors import PrecastError
from precast.loaders.artifact.machine import Machine, nvidia_gpus
from precast.loaders.artifact.manifest import Target
from precast.loaders.artifact.manifest_parser import parse_manifest
from precast.loaders.artifact.weights import numpy_dtype
from precast.loaders.console import check as check_console
from precast.loaders.generation.engine import DecodeRow
from precast.loaders.runtime import cuda, installed, pjrt

H100, A100 = "NVIDIA H100 80GB HBM3", "NVIDIA A100-SXM4-40GB"
MACHINE = Machine(
    machine="x86_64",
    features=(),
    jaxlib="0.12.0.1",
    kernel_abi=3,
    kernels=(),
    gpus=(H100,),
    cuda_plugin="0.12.0.1",
)
TARGET = Target(
    name="cuda-nvidia-h100-80gb-hbm3",
    runtime="pjrt",
    platform="cuda",
    device=H100,
    machine="any",
    jaxlib="0.12.0.1",
    cpu_features=(),
    kernel_abi=0,
    kernels=(),
    xla_flags="",
    stablehlo_expires="2030-01-01",
    programs=(),
)


# --- what is installed ------------------------------------------------------------------------------------------


def driver(root: Path, *kinds: str) -> Path:
    for i, kind in enumerate(kinds):
        folder = root / f"proc/driver/nvidia/gpus/0000:0{i}:00.0"
        folder.mkdir(parents=True)
        (folder / "information").write_text(f"Model: \t\t {kind}\nIRQ:   \t\t 35\nGPU UUID: \t GPU-0\n")
    return root


@pytest.mark.parametrize(
    ("visible", "found"),
    [("", ()), ("-1", ()), (" -1,0", ()), ("0", (H100,)), ("GPU-0", (H100,)), (None, (H100,))],
)
def test_hidden_gpus_do_not_count(tmp_path, monkeypatch, visible, found):
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert nvidia_gpus(driver(tmp_path, H100)) == found


def test_gpus_are_looked_for_only_if_a_target_needs_one(artifact_copy, monkeypatch, capsys):
    looked = []
    monkeypatch.setattr(installed, "nvidia_gpus", lambda: looked.append("gpus") or (H100,))
    monkeypatch.setattr(installed, "_cuda_plugin", lambda: looked.append("plugin") or "0.1")
    loading.load(artifact_copy, trusted=True)
    check_console.run(artifact_copy, target=None, allow_compile=False, as_json=True, require_signature=None)
    assert looked == []
    assert installed.this_machine(cuda=False).gpus == ()
    assert (installed.this_machine().gpus, installed.this_machine().cuda_plugin) == ((H100,), "0.1")
    looked.clear()
    as_cuda(artifact_copy, A100)
    with pytest.raises(PrecastError, match=f"compiled for {A100}, but this machine has {H100}"):
        loading.load(artifact_copy, trusted=True)
    assert looked == ["gpus", "plugin"]
    check_console.run(artifact_copy, target=None, allow_compile=False, as_json=True, require_signature=None)
    assert looked == ["gpus", "plugin"] * 2


def test_gpus_are_named_by_the_driver_s_files(tmp_path, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert nvidia_gpus(tmp_path) == ()
    assert nvidia_gpus(driver(tmp_path / "one", H100)) == (H100,)
    assert nvidia_gpus(driver(tmp_path / "three", H100, A100, H100)) == (A100, H100)
    silent = tmp_path / "silent"
    (silent / "dev").mkdir(parents=True)
    (silent / "dev/dxg").touch()
    assert nvidia_gpus(silent) == ("any",)


def plugin(folder: Path, name: str, package: str, version: str, contents: bytes = b"") -> None:
    (folder / "jax_plugins" / name).mkdir(parents=True)
    (folder / "jax_plugins" / name / "xla_cuda_plugin.so").write_bytes(contents)
    # Importing the package would import jax.
    (folder / "jax_plugins" / name / "__init__.py").write_text("raise AssertionError\n")
    info = folder / f"{package.replace('-', '_')}_pjrt-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}-pjrt\nVersion: {version}\n")


def test_the_plugin_is_found_and_not_imported(tmp_path, monkeypatch):
    importlib.metadata.version(
        "numpy"
    )  # importlib.metadata imports its dependencies now, while the path is intact
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert cuda.find_plugin() is None
    plugin(tmp_path, "xla_cuda12", "jax-cuda12", "0.12.0.1")
    found = cuda.find_plugin()
    assert found is not None
    assert (found.version, found.library.parent.name) == ("0.12.0.1", "xla_cuda12")
    plugin(tmp_path, "xla_cuda13", "jax-cuda13", "0.12.0.1")
    newer = cuda.find_plugin()
    assert newer is not None
    assert newer.library.parent.name == "xla_cuda13"


def test_without_a_gpu_nothing_of_cuda_is_imported():
    if nvidia_gpus():
        pytest.skip("there is a GPU here")
    code = (
        "import sys; from precast.loaders.load import load; from precast.loaders.runtime import installed, pjrt;"
        "m = installed.this_machine(); assert (m.gpus, m.cuda_plugin) == ((), '');"
        "assert not {'precast.loaders.runtime.cuda', 'importlib.metadata'} & set(sys.modules) - set(before)"
    )
    done = subprocess.run(
        [sys.executable, "-c", f"import sys, numpy, jaxlib; before = set(sys.modules)\n{code}"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


# --- what fits ----------------------------------------------------------------------------------------------

WANTED = "pip install 'jax-cuda12-plugin[with-cuda]==0.12.0.1'"


@pytest.mark.parametrize(
    ("target", "machine", "expected"),
    [
        ({}, {}, []),
        ({}, {"gpus": ("any",)}, []),
        ({"device": "any"}, {"gpus": (A100,)}, []),
        ({"device": f"{H100} MIG 1g.10gb"}, {}, []),
        ({}, {"gpus": (A100, H100)}, []),
        ({}, {"gpus": (), "cuda_plugin": ""}, ["it needs an NVIDIA GPU, but this machine has none"]),
        (
            {},
            {"cuda_plugin": ""},
            [f"it needs jax's CUDA plugin 0.12.0.1, which is not installed: {WANTED}"],
        ),
        (
            {},
            {"cuda_plugin": "0.11.0"},
            [f"it needs jax's CUDA plugin 0.12.0.1, but 0.11.0 is installed: {WANTED}"],
        ),
        ({}, {"gpus": (A100,)}, [f"it was compiled for {H100}, but this machine has {A100}"]),
        (
            {"jaxlib": "0.10.1"},
            {"gpus": (A100,), "cuda_plugin": ""},
            [
                f"it needs jax's CUDA plugin 0.12.0.1, which is not installed: {WANTED}",
                f"it was compiled for {H100}, but this machine has {A100}",
                "it was compiled by jaxlib 0.10.1, but 0.12.0.1 is installed",
            ],
        ),
    ],
)
def test_mismatches(target, machine, expected):
    found = mismatches(dataclasses.replace(TARGET, **target), dataclasses.replace(MACHINE, **machine))
    assert found == expected


def test_a_target_for_another_gpu_is_compiled_on_request():
    program = dataclasses.make_dataclass("Program", ["stablehlo"])("p.stablehlo")
    target = dataclasses.replace(TARGET, programs=(program,))
    manifest = dataclasses.make_dataclass("Manifest", ["targets"])((target,))
    machine = dataclasses.replace(MACHINE, gpus=(A100,))
    with pytest.raises(PrecastError, match="compiled for NVIDIA H100"):
        choose_target(manifest, machine, "art", name=None, allow_compile=False)
    chosen = choose_target(manifest, machine, "art", name=None, allow_compile=True)
    assert (chosen.runtime, chosen.platform, chosen.device) == ("stablehlo", "cuda", "any")


# --- the client ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stand_in():
    """Return a CUDA client over XLA's asynchronous CPU client."""
    pjrt.client()  # this registers the kernels
    return cuda.Client(_jax.get_tfrt_cpu_client(asynchronous=True))


@pytest.fixture
def no_client(monkeypatch):
    """Remove the process's client before and after a test."""
    cuda._client.cache_clear()
    yield
    cuda._client.cache_clear()


TYPES = ("float32", "bfloat16", "float16", "int32", "int8", "uint8")


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", [(), (1,), (3, 5), (2, 3, 4)])
def test_arrays_are_copied_in_and_out(stand_in, dtype, shape):
    array = np.arange(np.prod(shape, dtype=int)).reshape(shape).astype(numpy_dtype(dtype))
    expected = array.copy()
    buffer = stand_in.uploaded(array)
    array[...] = 1
    np.testing.assert_array_equal(stand_in.get(buffer), expected)
    np.testing.assert_array_equal(stand_in.get(stand_in.put(expected)), expected)


ADD = """
module @add {
  func.func public @main(%a: tensor<3xi32>, %b: tensor<3xi32>) -> (tensor<3xi32>) {
    %0 = stablehlo.add %a, %b : tensor<3xi32>
    return %0 : tensor<3xi32>
  }
}
"""


def test_staged_arrays_are_uploaded_at_every_call(stand_in):
    results = [pjrt.Result(shape=(3,), dtype=np.dtype(np.int32))]
    compiled = stand_in.compile(ADD.encode(), results, "add")
    program = stand_in.load(compiled.serialize(), results, "add")
    assert (compiled.compiled, program.compiled) == (True, False)
    constant = stand_in.put(np.array([100, 200, 300], np.int32))
    array, buffer = stand_in.staging((3,), np.dtype(np.int32))
    kept = []
    for i in range(4):
        array[:] = i
        kept += program([buffer, constant])
    array[:] = 99
    assert [stand_in.get(k).tolist() for k in kept] == [[100 + i, 200 + i, 300 + i] for i in range(4)]


def test_refused_arguments_have_an_error_text(stand_in):
    program = stand_in.compile(ADD.encode(), [pjrt.Result(shape=(3,), dtype=np.dtype(np.int32))], "add")
    with pytest.raises(PrecastError, match=r"(the program failed|a program failed on the GPU) \(.*\); check"):
        stand_in.get(program([stand_in.put(np.zeros(3, np.int32))] * 3)[0])


def as_cuda(root: Path, device: str) -> None:
    """Change an artifact's first target into a target for a GPU."""
    record = json.loads((root / "manifest.json").read_text())
    record["targets"] = record["targets"][:1]
    record["targets"][0] |= {
        "name": "cuda",
        "platform": "cuda",
        "device": device,
        "machine": "any",
        "cpu_features": [],
    }
    (root / "manifest.json").write_text(json.dumps(record))
    parse_manifest((root / "manifest.json").read_bytes(), "m")


def greedy(model, prompt, count=8):
    cache = model.engine.new_cache()
    step = model.engine.prefill(prompt, cache)
    tokens = [int(step.token[0])]
    while len(tokens) < count:
        step = model.engine.decode([DecodeRow(0, tokens[-1], len(prompt) + len(tokens) - 1)], cache)
        tokens.append(int(step.token[0]))
    return tokens


def test_an_artifact_for_a_gpu_generates_through_the_client(artifact_copy, tiny_model, stand_in, monkeypatch):
    as_cuda(artifact_copy, H100)
    here = dataclasses.replace(installed.this_machine(), gpus=(H100,), cuda_plugin=pjrt.jaxlib_version)
    monkeypatch.setattr(loading.installed, "this_machine", lambda **_: here)
    asked = []
    monkeypatch.setattr(cuda, "client", lambda device: asked.append(device) or stand_in)
    messages = []
    loading.load(artifact_copy, trusted=True, threads=2, log=messages.append)
    assert messages == [
        f"{artifact_copy}: target 'cuda' runs on the GPU, so the number of threads is ignored"
    ]
    del messages[:], asked[:]
    model = loading.load(artifact_copy, trusted=True, log=messages.append)
    assert (asked, messages) == ([H100], [])
    assert model.target.platform == "cuda"
    for prompt in ([3], list(range(1, 12)), [i * 7 % 300 for i in range(40)]):
        assert greedy(model, prompt) == greedy(tiny_model, prompt)


def test_without_a_gpu_an_artifact_for_one_is_refused_from_its_manifest(artifact_copy, monkeypatch):
    as_cuda(artifact_copy, H100)
    nothing = dataclasses.replace(installed.this_machine(), gpus=(), cuda_plugin="")
    monkeypatch.setattr(loading.installed, "this_machine", lambda **_: nothing)
    with pytest.raises(
        PrecastError, match="target 'cuda': it needs an NVIDIA GPU, but this machine has none"
    ):
        loading.load(artifact_copy)


# --- making the client ----------------------------------------------------------------------------------------------


def test_a_missing_plugin_is_named(no_client, monkeypatch):
    monkeypatch.setattr(cuda, "find_plugin", lambda: None)
    with pytest.raises(PrecastError) as raised:
        cuda.client("any")
    assert str(raised.value) == (
        "CUDA: jax's plugin for NVIDIA GPUs is not installed: pip install"
        f" 'jax-cuda12-plugin[with-cuda]=={pjrt.jaxlib_version}'"
    )


def test_a_plugin_that_cannot_be_loaded_has_an_error_text(no_client, monkeypatch, tmp_path):
    (tmp_path / "xla_cuda_plugin.so").write_bytes(b"no library")
    found = cuda.Plugin(library=tmp_path / "xla_cuda_plugin.so", version="0.12.0.1")
    monkeypatch.setattr(cuda, "find_plugin", lambda: found)
    monkeypatch.setattr(cuda, "_NAME", "cuda_of_a_test")
    with pytest.raises(
        PrecastError, match=r"XLA's plugin 0\.12\.0\.1 finds no GPU that it can use"
    ) as raised:
        cuda.client("any")
    assert "\n" not in str(raised.value)


class Calls:
    """Replacements for jaxlib's plugin functions, which record their calls."""

    def __init__(self, *, loaded=False):
        self.loaded, self.initialized, self.asked = loaded, loaded, []

    def pjrt_plugin_loaded(self, name):
        return self.loaded

    def pjrt_plugin_initialized(self, name):
        return self.initialized

    def load_pjrt_plugin_dynamically(self, name, path):
        self.asked.append(("load", name, Path(path).name))

    def initialize_pjrt_plugin(self, name):
        self.asked.append(("initialize", name))

    def generate_pjrt_gpu_plugin_options(self):
        return {"platform_name": "cuda", "preallocate": False}

    def make_c_api_client(self, name, options):
        self.asked.append(("make", name, options))
        return _jax.get_tfrt_cpu_client(asynchronous=True)


@pytest.mark.parametrize("loaded", [False, True], ids=["first", "jax has loaded it"])
def test_the_plugin_s_client_is_made_once(no_client, monkeypatch, tmp_path, loaded):
    calls = Calls(loaded=loaded)
    monkeypatch.setattr(cuda, "xla_client", calls)
    found = cuda.Plugin(library=tmp_path / "xla_cuda_plugin.so", version="0.12.0.1")
    monkeypatch.setattr(cuda, "find_plugin", lambda: found)
    first = cuda.client("any")
    assert cuda.client("cpu") is first
    options = {"platform_name": "cuda", "preallocate": False, "visible_devices": [0]}
    before = [] if loaded else [("load", "cuda", "xla_cuda_plugin.so"), ("initialize", "cuda")]
    assert calls.asked == [*before, ("make", "cuda", options)]
    with pytest.raises(PrecastError) as raised:
        cuda.client(H100)
    assert str(raised.value) == (
        f"CUDA: the executables are compiled for {H100}, but this machine's first GPU is cpu; compile them here"
        " with --compile, or choose another GPU with CUDA_VISIBLE_DEVICES."
    )


def test_nvidia_s_libraries_are_found_in_the_order_of_their_dependencies(tmp_path, monkeypatch):
    names = (
        "cudnn/lib/libcudnn.so.9",
        "cublas/lib/libcublasLt.so.12",
        "cu13/lib/libcudart.so.13",
        "cublas/lib/libcublas.so.12",
    )
    for name in names:
        (tmp_path / "nvidia" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "nvidia" / name).touch()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    found = [p.name for p in cuda._nvidia_libraries()]
    assert found == ["libcudart.so.13", "libcublasLt.so.12", "libcublas.so.12", "libcudnn.so.9"]


def test_the_compiler_is_told_where_nvidia_s_files_are(tmp_path, monkeypatch, stand_in):
    (tmp_path / "nvidia/cuda_nvcc").mkdir(parents=True)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    options = stand_in._options()
    assert options.executable_build_options.debug_options.xla_gpu_cuda_data_dir == str(
        tmp_path / "nvidia/cuda_nvcc"
    )
