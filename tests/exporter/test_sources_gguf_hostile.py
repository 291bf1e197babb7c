"""Malicious GGUF files, and headers with every field of a small file set to awkward values."""

import struct
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from precast.exporter.models.registry import read_model
from precast.exporter.sources.gguf.container import Container, read_container
from precast.exporter.sources.gguf.source import open_gguf
from precast.exporter.sources.open import open_source
from precast.loaders.artifact.errors import PrecastError

WIDTHS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "B", 10: "Q", 11: "q", 12: "d"}
EVIL = {
    "I": (0, 1, 2, 3, 7, 8, 9, 13, 255, 1 << 16, (1 << 31) - 1, 1 << 31, (1 << 32) - 1),
    "Q": (0, 1, 2, 3, 31, 33, 64, 1 << 16, 1 << 27, 1 << 40, 1 << 61, (1 << 63) - 1, 1 << 63, (1 << 64) - 1),
}
# Far more memory than a small file needs, and far less than a malicious header claims.
MEMORY = 16 << 20


@contextmanager
def bounded() -> Iterator[None]:
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < MEMORY
    finally:
        tracemalloc.stop()


def read(path: Path) -> Container | str:
    """Return the container or the one-sentence refusal; fail the test for anything else."""
    try:
        with bounded():
            return read_container(path)
    except PrecastError as error:
        text = str(error)
        assert text.startswith(f"{path}: ")
        assert text.endswith(".")
        assert "\n" not in text
        return text


def refusal(path: Path) -> str:
    found = read(path)
    assert isinstance(found, str)
    return found


# --- a small file, and where its fields lie -----------------------------------------------------------------


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def header(tensors: int, keys: int, version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, keys)


ARCHITECTURE = text(b"general.architecture") + struct.pack("<I", 8) + text(b"llama")
TOKENS = text(b"tokenizer.ggml.tokens")


def fields(data: bytes) -> list[tuple[int, str]]:
    """Yield the offset and the type letter of every number in the header of a valid file."""
    found = [(4, "I"), (8, "Q"), (16, "Q")]
    at = 24
    tensors, keys = struct.unpack_from("<QQ", data, 8)

    def number(letter: str) -> int:
        nonlocal at
        found.append((at, letter))
        (value,) = struct.unpack_from(f"<{letter}", data, at)
        at += struct.calcsize(letter)
        return int(value)

    def string() -> None:
        nonlocal at
        length = number("Q")
        at += length

    def value(kind: int) -> None:
        nonlocal at
        if kind == 8:
            string()
        elif kind == 9:
            inner, count = number("I"), number("Q")
            for _ in range(count):
                value(inner)
        else:
            at += struct.calcsize(WIDTHS[kind])

    for _ in range(keys):
        string()
        value(number("I"))
    for _ in range(tensors):
        string()
        for _ in range(number("I")):
            number("Q")
        number("I")
        number("Q")
    return found


@pytest.fixture
def small(tmp_path):
    """Make a file with a value of every type, lists, and tensors of three types."""
    from gguf import GGMLQuantizationType, GGUFWriter
    from gguf.constants import GGUFValueType

    path = tmp_path / "small.gguf"
    writer = GGUFWriter(path, "llama")
    for kind in GGUFValueType:
        if kind not in (GGUFValueType.STRING, GGUFValueType.ARRAY):
            writer.add_key_value(f"llama.{kind.name}", 1, kind)
    writer.add_array("tokenizer.ggml.tokens", ["a", "é", ""])
    writer.add_array("tokenizer.ggml.scores", [0.5, -1.0, 2.0])
    writer.add_array("llama.flags", [True, False])
    writer.add_tensor("token_embd.weight", np.arange(12, dtype=np.float32).reshape(3, 4))
    writer.add_tensor("half", np.arange(4, dtype=np.float16))
    writer.add_tensor("blocks", np.zeros((2, 34), np.uint8), raw_dtype=GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_the_small_file_is_read_as_the_gguf_library_reads_it(small):
    from gguf import GGUFReader

    found, theirs = read(small), GGUFReader(small)
    assert isinstance(found, Container)
    known = {key: field.contents() for key, field in theirs.fields.items() if not key.startswith("GGUF.")}
    assert found.metadata == known
    assert {type(found.metadata[key]) for key in known} == {int, float, bool, str, list}
    assert list(found.tensors) == [tensor.name for tensor in theirs.tensors]
    for tensor in theirs.tensors:
        mine = found.tensors[tensor.name]
        assert mine.shape == tuple(reversed(tensor.shape.tolist()))
        assert mine.type == tensor.tensor_type
        assert mine.data.dtype == tensor.data.dtype
        np.testing.assert_array_equal(mine.data, tensor.data)


# --- sweeps -------------------------------------------------------------------------------------------------


def test_every_number_of_the_header_set_to_every_awkward_value(small):
    data = small.read_bytes()
    found = fields(data)
    assert len(found) > 50
    refused = 0
    for at, letter in found:
        for value in EVIL[letter]:
            small.write_bytes(
                data[:at] + struct.pack(f"<{letter}", value) + data[at + struct.calcsize(letter) :]
            )
            refused += isinstance(read(small), str)
    assert refused > 0.8 * sum(len(EVIL[letter]) for _, letter in found)


def test_truncation_at_every_byte(small):
    data = small.read_bytes()
    padding = 28  # after the last tensor's 68 bytes
    for length in (*range(0, len(data) - padding, 3), len(data) - padding - 1):
        small.write_bytes(data[:length])
        endings = ("; fetch it again.", f"found {data[:length]!r}); fetch it again, or name another file.")
        assert refusal(small).endswith(endings)


@settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    derandomize=True,
)
@given(
    changes=st.lists(
        st.tuples(st.integers(4, 700), st.binary(min_size=1, max_size=9)), min_size=1, max_size=4
    )
)
def test_bytes_of_the_header_changed_at_random(small, changes):
    whole = small.read_bytes()
    data = bytearray(whole)
    for at, piece in changes:
        data[at : at + len(piece)] = piece
    small.write_bytes(data)
    read(small)
    small.write_bytes(whole)


SCALARS = {
    "block_count": (0, 1 << 20, (1 << 32) - 1),
    "context_length": (0, 1, (1 << 32) - 1),
    "embedding_length": (0, 1, (1 << 32) - 1),
    "feed_forward_length": (0, (1 << 32) - 1),
    "attention.head_count": (0, 3, 1 << 31),
    "attention.head_count_kv": (0, 3, 1 << 31),
    "attention.key_length": (0, 1, 1 << 31),
    "attention.sliding_window": (0, 1 << 31),
    "attention.sliding_window_pattern": (0, 1 << 31, [True], [], ["x"]),
    "attention.layer_norm_rms_epsilon": (0.0, -1.0, float("inf"), float("nan"), 1e-45),
    "rope.freq_base": (0.0, -1.0, 1.0, float("inf"), float("nan")),
    "rope.dimension_count": (0, 1, 1 << 31),
    "rope.scaling.original_context_length": (0, 1, 1 << 31),
    "rope.scaling.factor": (0.0, -1.0, float("inf"), float("nan")),
    "rope.scaling.attn_factor": (0.0, float("nan")),
    "vocab_size": (0, 1, (1 << 32) - 1),
}
ONES = np.ones(32, np.float32)
FACTORS = {
    "llama": {"rope_freqs.weight": ONES},
    "gemma3": {},
    "phi3": {"rope_factors_long.weight": ONES, "rope_factors_short.weight": ONES},
}


BASE = {"attention.sliding_window": 64, "rope.scaling.original_context_length": 512}


def read_with(gguf_spec, folder: Path, architecture: str, changes) -> str | None:
    """Read a model with some numbers changed; return the refusal, or None."""
    metadata = {f"{architecture}.{name}": number for name, number in (BASE | changes).items()}
    if architecture == "llama":
        metadata.pop("llama.attention.sliding_window")
    # An unknown name is refused here; later steps compare config and weights.
    tensors = {name: gguf_spec().tensors[name] for name in ("token_embd.weight", "output_norm.weight")}
    tensors |= FACTORS[architecture]
    path = gguf_spec(architecture=architecture, metadata=metadata, tensors=tensors).write(folder)
    try:
        with bounded():
            source = open_source(str(path))
            read_model(source.config, source.name)
    except PrecastError as error:
        return str(error)
    return None


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("architecture", FACTORS)
def test_every_number_of_the_model_set_to_every_awkward_value(gguf_spec, tmp_path, architecture):
    """Each change of metadata is refused in a sentence or gives a model with a valid config."""
    assert read_with(gguf_spec, tmp_path, architecture, {}) is None
    found = [
        read_with(gguf_spec, tmp_path, architecture, {key: value})
        for key, values in SCALARS.items()
        for value in values
    ]
    assert sum(text is not None for text in found) > len(found) // 2


# --- files made to do harm ----------------------------------------------------------------------------------

HARMFUL = {
    "keys": (header(0, 1 << 62) + ARCHITECTURE, "expected at most "),
    "tensors": (
        header(1 << 62, 1) + ARCHITECTURE,
        "tensors, found 4,611,686,018,427,387,904, so the file is truncated or damaged",
    ),
    "text": (
        header(0, 1) + struct.pack("<Q", 1 << 62) + b"x",
        "expected a metadata key to have at most 65,535 bytes",
    ),
    "list of numbers": (
        header(0, 2) + ARCHITECTURE + TOKENS + struct.pack("<IIQ", 9, 0, 1 << 61),
        "expected 2,305,843,009,213,693,952 bytes of tokenizer.ggml.tokens, but only 64 are left",
    ),
    "list of strings": (
        header(0, 2) + ARCHITECTURE + TOKENS + struct.pack("<IIQ", 9, 8, 1 << 40),
        "expected 8,796,093,022,208 bytes of tokenizer.ggml.tokens",
    ),
    "nested lists": (
        header(0, 2) + ARCHITECTURE + text(b"a") + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 5000,
        "expected a to be a list of numbers or strings, found a list of lists",
    ),
    "empty lists": (
        header(0, 2) + ARCHITECTURE + text(b"a") + struct.pack("<IIQ", 9, 9, 1 << 30) + bytes(1200),
        "found a list of lists",
    ),
    "shape": (
        header(1, 1)
        + ARCHITECTURE
        + text(b"token_embd.weight")
        + struct.pack("<IQQQQIQ", 4, *[1 << 62] * 4, 0, 0),
        "is not aligned to 32 bytes, or exceeds the 206 bytes",
    ),
    "axes": (header(1, 1) + ARCHITECTURE + text(b"w") + struct.pack("<I", 1 << 31), "to have 1 to 4 axes"),
    "no values": (
        header(1, 1) + ARCHITECTURE + text(b"w") + struct.pack("<IQIQ", 1, 0, 0, 0),
        "expected w to have values, found shape [0]",
    ),
    "long name": (
        header(1, 1) + ARCHITECTURE + text(b".".join([b"a"] * 2000)) + struct.pack("<IQIQ", 1, 1, 0, 0),
        "expected a tensor's name to have at most 63 bytes, found 3,999",
    ),
    "alignment 0": (
        header(0, 2) + ARCHITECTURE + text(b"general.alignment") + struct.pack("<II", 4, 0),
        "expected general.alignment to be a power of two, found 0",
    ),
    "alignment 48": (
        header(0, 2) + ARCHITECTURE + text(b"general.alignment") + struct.pack("<II", 4, 48),
        "expected general.alignment to be a power of two, found 48",
    ),
    "key twice": (
        header(0, 2) + ARCHITECTURE * 2,
        "found the metadata key general.architecture a second time",
    ),
    "tensor twice": (
        header(2, 1) + ARCHITECTURE + (text(b"w") + struct.pack("<IQIQ", 1, 1, 0, 0)) * 2,
        "found the tensor w a second time",
    ),
    "type of tensor": (
        header(1, 1) + ARCHITECTURE + text(b"w") + struct.pack("<IQIQ", 1, 1, 99, 0),
        "stored as type 99, which the installed gguf library does not know",
    ),
    "blocks": (
        header(1, 1) + ARCHITECTURE + text(b"w") + struct.pack("<IQIQ", 1, 33, 8, 0),
        "expected rows of w to have a multiple of 32 values (Q8_0), found 33",
    ),
    "offset": (
        header(1, 1) + ARCHITECTURE + text(b"w") + struct.pack("<IQIQ", 1, 1, 0, 4),
        "is not aligned to 32 bytes, or exceeds the",
    ),
    "version": (header(0, 0, 1 << 31), "expected GGUF version 2 or 3, found 2147483648"),
    "version 0": (header(0, 0, 0), "expected GGUF version 2 or 3, found 0"),
    "version 1": (header(0, 0, 1), "expected GGUF version 2 or 3, found 1"),
}


@pytest.mark.parametrize("name", HARMFUL)
def test_malicious_files(tmp_path, name):
    data, expected = HARMFUL[name]
    path = tmp_path / "h.gguf"
    path.write_bytes(data + bytes(64))
    assert expected in refusal(path)
    with bounded(), pytest.raises(PrecastError):
        open_gguf(path)


def test_a_big_endian_file(tmp_path):
    path = tmp_path / "big.gguf"
    path.write_bytes(b"GGUF" + struct.pack(">IQQ", 3, 0, 0))
    assert refusal(path) == (
        f"{path}: is a big-endian GGUF file; convert it to little-endian (gguf-convert-endian) first."
    )


def test_a_sparse_file_has_no_room_for_a_longer_header(tmp_path):
    """A sparse file of any length takes no disk space, so the file's length alone does not limit a header."""
    path = tmp_path / "sparse.gguf"
    path.write_bytes(header(0, 2) + ARCHITECTURE + TOKENS + struct.pack("<IIQ", 9, 0, 1 << 33))
    with path.open("r+b") as file:
        file.truncate(1 << 34)
    assert "expected a header of at most 134,217,728 bytes, found more" in refusal(path)


# --- bytes that are not UTF-8 -------------------------------------------------------------------------------


def replace_once(path: Path, old: bytes, new: bytes) -> int:
    """Replace bytes in a file, and return their offset."""
    data = path.read_bytes()
    assert data.count(old) == 1
    path.write_bytes(data.replace(old, new))
    return data.index(old)


def test_a_description_may_be_invalid_utf8(gguf_spec, tmp_path):
    path = gguf_spec(metadata={"general.description": "cafe!", "general.license": "mit"}).write(tmp_path)
    expected = open_source(str(path))
    replace_once(path, b"cafe!", b"caf\xe9!")
    found = open_source(str(path))
    assert (found.config, found.tokenizer_json) == (expected.config, expected.tokenizer_json)


def test_a_token_that_is_not_utf8(gguf_spec, tmp_path):
    path = gguf_spec().write(tmp_path)
    at = replace_once(path, b"<tool>", b"<to\xfel>")
    text = open_refusal(path)
    assert text.startswith(
        f"{path}: at byte {at + 3:,}, expected UTF-8 in tokenizer.ggml.tokens, found the byte 0xfe"
    )
    assert text.endswith(
        "convert the model again with a current converter, or use the model's Hugging Face checkpoint."
    )


def open_refusal(path: Path) -> str:
    with pytest.raises(PrecastError) as caught:
        open_source(str(path))
    return str(caught.value)
