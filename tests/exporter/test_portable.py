"""The portable target: one module for cpu, cuda and tpu, without custom calls or extra arguments."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export as jax_export

from precast.exporter.programs import ProgramSpec
from precast.exporter.targets.build import _stablehlo
from precast.exporter.targets.kinds import DEFAULT_TARGETS, TARGET_KINDS
from precast.loaders.artifact.errors import PrecastError
from precast.loaders.artifact.manifest import Value
from precast.loaders.artifact.manifest_parser import parse_manifest
from precast.loaders.artifact.weights import numpy_dtype
from precast.loaders.runtime import pjrt

PORTABLE = TARGET_KINDS["portable"]


@pytest.fixture(scope="module")
def manifest(tiny_artifact):
    return parse_manifest((tiny_artifact / "manifest.json").read_bytes(), "m")


def target(manifest, name):
    return next(t for t in manifest.targets if t.name.startswith(name))


def test_it_serves_three_platforms_and_depends_on_none(manifest):
    assert PORTABLE.lowered_for == ("cpu", "cuda", "tpu")
    portable = target(manifest, "portable")
    about = (portable.runtime, portable.platform, portable.device, portable.machine, portable.jaxlib)
    assert about == ("stablehlo", "any", "any", "any", "any")
    assert (portable.kernels, portable.kernel_abi, portable.cpu_features) == ((), 0, ())
    # An export makes targets that need a GPU only on request.
    assert DEFAULT_TARGETS == ("cpu", "portable")


def test_it_has_no_custom_calls(manifest, tiny_artifact):
    found = {}
    for name in ("cpu", "portable"):
        files = [tiny_artifact / str(p.stablehlo) for p in target(manifest, name).programs]
        found[name] = [b"custom_call" in file.read_bytes() for file in files]
    assert not any(found["portable"])
    assert all(found["cpu"])  # proves that the search works


def test_its_compiled_programs_take_exactly_the_arguments_of_the_manifest(manifest, tiny_artifact):
    client = pjrt.client()
    for program in target(manifest, "portable").programs:
        results = [pjrt.Result(shape=v.shape, dtype=numpy_dtype(v.dtype)) for v in program.results]
        compiled = client.compile((tiny_artifact / str(program.stablehlo)).read_bytes(), results, "here")
        arguments, returned = compiled.layouts()
        assert [len(a) for a in arguments] == [len(v.shape) for v in program.arguments]
        assert [len(r) for r in returned] == [len(v.shape) for v in program.results]


def spec_of(function):
    x = Value(name="x", role="weight", shape=(3,), dtype="float32", layout=(0,), alias=None)
    y = Value(name="y", role="logits", shape=(3,), dtype="float32", layout=(0,), alias=None)
    return ProgramSpec(
        name="p", kind="decode", tokens=1, arguments=(x,), results=(y,), function=function, flops=0
    )


def test_one_module_for_several_platforms_takes_no_platform_index():
    """jax.export's modules for several platforms have such an argument, so each platform is lowered separately."""
    function = jax.jit(lambda x: (jnp.sin(x) + jnp.argmax(x),), keep_unused=True)
    spec = spec_of(function)
    shape = jax.ShapeDtypeStruct((3,), np.float32)
    together = jax_export.export(function, platforms=PORTABLE.lowered_for)(shape)
    assert "_platform_index" in str(together.mlir_module())
    client = pjrt.client()
    results = [pjrt.Result(shape=(3,), dtype=np.dtype(np.float32))]
    with pytest.raises(
        PrecastError, match=r"^p: the program failed \(.*\); check the artifact with precast verify\.$"
    ):
        client.compile(together.mlir_module_serialized, results, "p")([client.put(np.ones(3, np.float32))])
    x = np.array([0.0, 1.0, 0.5], np.float32)
    found = client.compile(_stablehlo(PORTABLE, spec, function), results, "p")([client.put(x)])[0]
    np.testing.assert_allclose(client.get(found), np.sin(x) + 1, rtol=1e-6)


def test_a_program_that_platforms_lower_differently_is_refused():
    def function(x):
        return (jax.lax.platform_dependent(x, tpu=jnp.sin, default=jnp.cos),)

    spec = spec_of(function)
    with pytest.raises(PrecastError) as raised:
        _stablehlo(PORTABLE, spec, jax.jit(function, keep_unused=True))
    assert str(raised.value) == (
        f"target 'portable': jax {jax.__version__} lowers program 'p' differently for cpu, cuda, tpu, so one module"
        " cannot serve them all: please report this."
    )
    assert _stablehlo(TARGET_KINDS["cpu"], spec, jax.jit(function, keep_unused=True))
