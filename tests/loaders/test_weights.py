"""The weight file is a valid, aligned safetensors file. A file with an invalid header is refused."""

import hashlib
import json
import mmap
from math import prod
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from precast.loaders.artifact.errors import PrecastError
from precast.loaders.artifact.weights import ALIGNMENT, TensorSpec, map_weights, write_weights

RANDOM = np.random.default_rng(0)
ARRAYS = {
    "odd": RANDOM.standard_normal(3, np.float32),
    "matrix": RANDOM.standard_normal((4, 16), np.float32),
    "stack": RANDOM.standard_normal((3, 8, 4), np.float32),
    "also odd": RANDOM.standard_normal((5, 7), np.float32),
    "größe.日本": RANDOM.integers(-9, 9, (16,), np.int32),
    "scalar": np.array(7, np.int32),
    "nothing": np.zeros((2, 0, 3), np.float32),
    "half": RANDOM.standard_normal((4, 8)).astype(np.float16),
    "brain": RANDOM.standard_normal((3, 32)).astype(ml_dtypes.bfloat16),
    "signed bytes": RANDOM.integers(-128, 128, (2, 64)).astype(np.int8),
    "bytes": RANDOM.integers(0, 256, (64,)).astype(np.uint8),
    "odd bytes": RANDOM.integers(0, 256, (5, 3)).astype(np.uint8),
}


def write(path, arrays=ARRAYS, parts=None) -> str:
    specs = [TensorSpec(name=n, shape=a.shape, dtype=a.dtype) for n, a in arrays.items()]
    return write_weights(path, specs, arrays.items() if parts is None else parts)


@pytest.fixture
def path(tmp_path):
    write(tmp_path / "w.safetensors")
    return tmp_path / "w.safetensors"


def same(found, expected):
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)


# --- writing ------------------------------------------------------------------------------------------------


def test_the_safetensors_library_reads_the_same(path):
    from safetensors.numpy import load_file

    same(load_file(path), ARRAYS)
    same(map_weights(path), ARRAYS)


def test_the_digest_is_the_file_s(tmp_path):
    digest = write(tmp_path / "w.safetensors")
    assert digest == hashlib.sha256((tmp_path / "w.safetensors").read_bytes()).hexdigest()


def test_the_order_of_the_specs_does_not_matter(tmp_path):
    backwards = dict(reversed(ARRAYS.items()))
    assert write(tmp_path / "a") == write(tmp_path / "b", backwards)


@given(st.dictionaries(st.text(max_size=8), st.lists(st.integers(0, 9), max_size=4), max_size=12))
@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_tensors_before_the_first_odd_size_start_on_boundaries(tmp_path_factory, shapes):
    """Read the file according to the format's specification, without precast's reader."""
    shapes.pop("__metadata__", None)
    path = tmp_path_factory.mktemp("aligned") / "w"
    write(path, {name: np.ones(shape, np.float32) for name, shape in shapes.items()})
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    assert start % ALIGNMENT == 0
    header = json.loads(data[8:start])
    assert header.keys() == shapes.keys()
    tensors = sorted((e["data_offsets"], e["shape"]) for e in header.values())
    odd = False
    for (begin, end), shape in tensors:
        assert odd or (start + begin) % ALIGNMENT == 0
        odd = odd or (end - begin) % ALIGNMENT != 0
        assert not odd or (end - begin) % ALIGNMENT != 0 or end == begin  # odd ones are last
        assert end - begin == 4 * prod(shape)
    assert len(data) == start + sum(4 * prod(shape) for _, shape in tensors)


def test_views_keep_the_mapping_alive(path):
    weights = map_weights(path)
    matrix = weights["matrix"]
    assert matrix.ctypes.data % ALIGNMENT == 0
    assert not matrix.flags.owndata
    del weights
    np.testing.assert_array_equal(matrix, ARRAYS["matrix"])


def test_writing_to_a_view_does_not_reach_the_file(path):
    before = path.read_bytes()
    map_weights(path)["matrix"][:] = 0
    assert path.read_bytes() == before


def test_parts_are_written_one_after_another(tmp_path):
    whole = np.arange(64, dtype=np.float32).reshape(4, 16)
    parts = [whole[:1], whole[1:].T.copy().T, whole[:0]]  # the second is not contiguous
    write(tmp_path / "w", {"whole": whole}, (("whole", part) for part in parts))
    same(map_weights(tmp_path / "w"), {"whole": whole})


@given(st.permutations([name for name, array in ARRAYS.items() for _ in range(max(1, array.size))]))
@settings(deadline=None, max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_parts_of_several_tensors_may_come_in_any_order(tmp_path_factory, order):
    folder = tmp_path_factory.mktemp("order")
    left = {name: iter(np.split(array.reshape(-1), max(1, array.size))) for name, array in ARRAYS.items()}
    digest = write(folder / "w", parts=((name, next(left[name])) for name in order))
    same(map_weights(folder / "w"), ARRAYS)
    assert digest == write(folder / "in order") == hashlib.sha256((folder / "w").read_bytes()).hexdigest()


@pytest.mark.parametrize(
    ("parts", "text"),
    [
        ([np.zeros((3, 16), np.float32)], "whole: expected 256 bytes, found 192"),
        ([np.zeros((5, 16), np.float32)], "whole: expected 256 bytes, found 320"),
        ([np.zeros((4, 16), np.float64)], "whole: expected parts of float32, found float64"),
        ([], "whole: expected 256 bytes, found 0"),
    ],
)
def test_parts_that_do_not_match_the_tensor_are_refused(tmp_path, parts, text):
    with pytest.raises(ValueError, match=text):
        write(tmp_path / "w", {"whole": np.zeros((4, 16), np.float32)}, [("whole", p) for p in parts])


def test_a_part_that_is_too_long_does_not_reach_the_next_tensor(tmp_path):
    arrays = {"a": np.zeros(16, np.float32), "b": np.ones(16, np.float32)}
    with pytest.raises(ValueError, match="a: expected 64 bytes, found 128"):
        write(tmp_path / "w", arrays, [("b", arrays["b"]), ("a", arrays["a"]), ("a", arrays["a"])])
    assert (tmp_path / "w").read_bytes().endswith(arrays["a"].tobytes() + arrays["b"].tobytes())


def test_a_part_of_an_unknown_tensor_is_refused(tmp_path):
    with pytest.raises(
        ValueError, match="other: expected one of the specified tensors, found a piece of another"
    ):
        write(tmp_path / "w", {"a": np.zeros(16, np.float32)}, [("other", np.zeros(16, np.float32))])


def test_only_bfloat16_imports_ml_dtypes(python, tmp_path):
    """The import of ml_dtypes takes 10 ms."""
    code = (
        "import sys; from pathlib import Path; from precast.loaders.artifact.weights import map_weights\n"
        "found = map_weights(Path(sys.argv[1])); print('ml_dtypes' in sys.modules, found['x'].dtype)"
    )
    for dtype, said in ((np.float16, "False float16"), (ml_dtypes.bfloat16, "True bfloat16")):
        path = tmp_path / np.dtype(dtype).name
        write(path, {"x": np.ones(32, dtype)})
        assert python("-c", code, str(path)).stdout.strip() == said


def test_no_file_is_overwritten(path):
    with pytest.raises(FileExistsError):
        write(path)


# --- refusals -----------------------------------------------------------------------------------------------


def broken(tmp_path, header, data: bytes = bytes(64)):
    """Write a file with the given header, and return the error that reading it raises."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path = tmp_path / "broken"
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    with pytest.raises(PrecastError) as raised:
        map_weights(path)
    assert str(raised.value).startswith(f"{path}: ")
    return str(raised.value)


def tensor(begin=0, end=64, shape=(16,), dtype="F32", **more):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end], **more}


def test_a_truncated_file_is_refused_at_every_length(path, tmp_path):
    data = path.read_bytes()
    for length in [*range(200), *range(200, len(data), 37), len(data) - 1]:
        (tmp_path / "cut").write_bytes(data[:length])
        with pytest.raises(PrecastError, match=r"cut: "):
            map_weights(tmp_path / "cut")


def test_a_file_with_trailing_bytes_is_refused(path):
    with path.open("ab") as file:
        file.write(b"\0")
    with pytest.raises(PrecastError, match=r"the tensors cover .* bytes of data, but the file contains"):
        map_weights(path)


@pytest.mark.parametrize("length", [65, 1 << 20, 1 << 62, (1 << 64) - 1])
def test_a_header_that_does_not_fit_is_refused(tmp_path, length):
    (tmp_path / "w").write_bytes(length.to_bytes(8, "little") + bytes(64))
    with pytest.raises(PrecastError, match="expected a safetensors file, found no valid header length"):
        map_weights(tmp_path / "w")


@pytest.mark.parametrize(
    ("header", "text"),
    [
        ([], "expected a safetensors header, found []"),
        (b"[" * 50_000, "nested too deeply"),
        (b"[" * 980 + b"]" * 980, ""),
        (b"\xff", "expected JSON"),
        (b'{"a":1,"a":1}', "a key occurs twice"),
        ({"a": 1}, "entry for tensor 'a' is invalid (1); copy or export the artifact again."),
        ({"a": tensor(more=1)}, "entry for tensor 'a' is invalid"),
        ({"a": {"dtype": "F32", "shape": [16]}}, "entry for tensor 'a' is invalid"),
        ({"a": tensor(dtype="F99")}, "entry for tensor 'a' is invalid ({'dtype': 'F99'"),
        ({"a": tensor(dtype=["F32"])}, "entry for tensor 'a' is invalid"),
        ({"a": tensor(shape=[17])}, "entry for tensor 'a' is invalid"),
        ({"a": tensor(shape=[-1])}, "entry for tensor 'a' is invalid"),
        ({"a": tensor(shape=[-4, -4])}, "entry for tensor 'a' is invalid"),
        ({"a": tensor(shape=[16.0])}, "entry for tensor 'a' is invalid"),
        ({"a": tensor(shape=[True] * 4 + [16])}, "entry for tensor 'a' is invalid"),
        ({"a": tensor(shape=[2**32, 2**32])}, "entry for tensor 'a' is invalid"),
        ({"a": tensor(shape=[0, 2**70], end=0)}, "entry for tensor 'a' is invalid"),
        ({"a": tensor(shape=[1] * 65, end=4)}, "entry for tensor 'a' is invalid"),
        (
            {"a": {"dtype": "F32", "shape": {}, "data_offsets": [0, 4]}},
            "entry for tensor 'a' is invalid",
        ),
        (
            {"a": {"dtype": "F32", "shape": "", "data_offsets": [0, 4]}},
            "entry for tensor 'a' is invalid",
        ),
        ({"a": tensor(begin=-64, end=0)}, "entry for tensor 'a' is invalid"),
        ({"a": tensor(begin=64, end=0)}, "entry for tensor 'a' is invalid"),
        ({"a": tensor(begin=2**80, end=2**80 + 64)}, "entry for tensor 'a' is invalid"),
        (
            {"a": {"dtype": "F32", "shape": [16], "data_offsets": [0, 32, 64]}},
            "entry for tensor 'a' is invalid",
        ),
        (
            {"a": tensor(begin=64, end=128)},
            "tensor 'a' begins at byte 64 of the data, expected 0; copy or export the artifact again.",
        ),
        (
            {"a": tensor(shape=[15], end=60)},
            "the tensors cover 60 bytes of data, but the file contains 64; copy or export the artifact again.",
        ),
        (
            {"a": tensor(shape=[32], end=128)},
            "the tensors cover 128 bytes of data, but the file contains 64; copy or export the artifact again.",
        ),
        (
            {},
            "the tensors cover 0 bytes of data, but the file contains 64; copy or export the artifact again.",
        ),
        (
            {"a": tensor(shape=[8], end=32), "b": tensor(shape=[12], begin=16)},
            "tensor 'b' begins at byte 16 of the data, expected 32; copy or export the artifact again.",
        ),
        (
            {"a": tensor(), "b": tensor()},
            "tensor 'b' begins at byte 0 of the data, expected 64; copy or export the artifact again.",
        ),
        (
            {"a": tensor(shape=[4], end=16), "b": tensor(shape=[8], begin=32)},
            "tensor 'b' begins at byte 32 of the data, expected 16; copy or export the artifact again.",
        ),
    ],
)
def test_a_header_that_does_not_describe_its_data_is_refused(tmp_path, header, text):
    assert text in broken(tmp_path, header)


def test_header_entries_may_be_in_any_order(tmp_path):
    """Files written by other tools have another order."""
    header = json.dumps(
        {"b": tensor(32, 64, [8]), "__metadata__": {"format": "pt"}, "a": tensor(0, 32, [8])}
    ).encode()
    values = np.arange(16, dtype=np.float32)
    (tmp_path / "w").write_bytes(len(header).to_bytes(8, "little") + header + values.tobytes())
    same(map_weights(tmp_path / "w"), {"a": values[:8], "b": values[8:]})


@given(data=st.data())
@settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_damage_to_the_header_is_accepted_or_raises_precast_error(path, data):
    """No other exception is raised. No view exceeds the end of the file, because accessing it would crash."""
    original = path.read_bytes()
    end = 8 + int.from_bytes(original[:8], "little")
    damaged = bytearray(original)
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, end - 1))
        damaged[place] = data.draw(st.integers(0, 255) | st.sampled_from(b'0123456789-.,:[]{}"'))
    other = path.with_name("damaged")
    other.write_bytes(damaged)
    weights, text = {}, f"{other}: "
    try:
        weights = map_weights(other)
    except PrecastError as error:
        text = str(error)
    assert text.startswith(f"{other}: ")
    assert not weights or sum(w.nbytes for w in weights.values()) == len(original) - end
    for w in weights.values():
        w.tobytes()


@pytest.mark.parametrize("depth", range(900, 1000, 7))
def test_a_deep_header_is_refused_at_any_depth(tmp_path, depth):
    """At some depths parsing succeeds, but repr of the value exceeds the recursion limit."""
    deep = b"[" * depth + b"]" * depth
    broken(tmp_path, deep)
    broken(tmp_path, b'{"a":' + deep + b"}")


def asks_for_huge_pages(array: np.ndarray) -> bool:
    at = array.ctypes.data + array.nbytes // 2
    flags = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first = line.split()[0]
        if "-" in first and not first.endswith(":"):
            begin, end = (int(n, 16) for n in first.split("-"))
        elif first == "VmFlags:" and begin <= at < end:
            flags = "hg" in line.split()
    return flags


@pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="needs Linux")
@pytest.mark.parametrize("head", [True, False])
def test_an_embedding_beside_a_separate_head_is_read_in_small_pages(tmp_path, head):
    names = ["model.embed_tokens.weight", "model.layers.x", *(["lm_head.weight"] if head else [])]
    write(tmp_path / "w", {n: np.zeros((64, 4096), np.float32) for n in names})
    mapped = map_weights(tmp_path / "w")
    if not asks_for_huge_pages(mapped["model.layers.x"]):
        pytest.skip("this kernel has no huge pages")
    assert [asks_for_huge_pages(mapped[n]) for n in names] == [not head, True, True][: len(names)]
