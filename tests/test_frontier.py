"""The frontier's files: off the grid without changing a layer, made from known files, and shown in order of size."""

import sys
from pathlib import Path

import numpy as np
import pytest

PEERS = Path(__file__).parents[1] / "benchmarks" / "peers"


@pytest.fixture
def modules(monkeypatch):
    """Return modules of benchmarks/peers, whose scripts import them by bare names."""
    monkeypatch.syspath_prepend(str(PEERS))
    monkeypatch.delitem(sys.modules, "frontier", raising=False)  # the checkout's folder, if it has that name
    before = set(sys.modules)
    import frontier
    import frontier_files
    import frontier_picture
    import off_grid

    yield {"frontier": frontier, "files": frontier_files, "picture": frontier_picture, "off_grid": off_grid}
    for name in set(sys.modules) - before:
        del sys.modules[name]


WIDTH, FF, HEADS, KV_HEADS, HEAD = 64, 96, 4, 2, 32
_SHAPES = {
    "attn_norm": (WIDTH,),
    "ffn_norm": (WIDTH,),
    "attn_q": (HEADS * HEAD, WIDTH),
    "attn_k": (KV_HEADS * HEAD, WIDTH),
    "attn_v": (KV_HEADS * HEAD, WIDTH),
    "attn_output": (WIDTH, HEADS * HEAD),
    "ffn_gate": (FF, WIDTH),
    "ffn_up": (FF, WIDTH),
    "ffn_down": (WIDTH, FF),
}


def _layer() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(3)
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in _SHAPES.items()}


def _products(layer: dict[str, np.ndarray], x: np.ndarray) -> list[np.ndarray]:
    """Return the products whose values a layer depends on, for normalised inputs x ``[T, D]``."""
    before, behind = x * layer["attn_norm"], x * layer["ffn_norm"]
    values = (before @ layer["attn_v"].T).reshape(len(x), KV_HEADS, HEAD)
    mixed = np.repeat(values, HEADS // KV_HEADS, axis=1).reshape(len(x), -1)
    gated = np.tanh(behind @ layer["ffn_gate"].T) * (behind @ layer["ffn_up"].T)
    return [
        before @ layer["attn_q"].T,
        before @ layer["attn_k"].T,
        mixed @ layer["attn_output"].T,
        behind @ layer["ffn_gate"].T,
        gated @ layer["ffn_down"].T,
    ]


def test_a_changed_layer_computes_the_same(modules):
    layer, changed = _layer(), _layer()
    modules["off_grid"].change_layer(changed, HEADS, KV_HEADS, np.random.default_rng(0))
    x = np.random.default_rng(1).normal(size=(5, WIDTH)).astype(np.float32)
    for before, after in zip(_products(layer, x), _products(changed, x), strict=True):
        np.testing.assert_allclose(after, before, rtol=1e-4, atol=1e-3)
    for name in _SHAPES:
        ratio = changed[name] / layer[name]
        assert np.log(ratio).std() > 0.2, name


@pytest.fixture
def quantised(tmp_path):
    """A GGUF file with one layer in Q8_0, and norms and an embedding in float32."""
    from gguf import GGUFWriter
    from gguf.constants import GGMLQuantizationType, GGUFValueType
    from gguf.quants import quantize

    writer = GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_file_type(7)
    writer.add_key_value("tokenizer.ggml.tokens", ["a", "b"], GGUFValueType.ARRAY, GGUFValueType.STRING)
    embedding = np.arange(2 * WIDTH, dtype=np.float32).reshape(2, WIDTH)
    writer.add_tensor("token_embd.weight", embedding)
    for name, array in _layer().items():
        if array.ndim == 1:
            writer.add_tensor(f"blk.0.{name}.weight", array)
        else:
            blocks = quantize(array, GGMLQuantizationType.Q8_0)
            writer.add_tensor(f"blk.0.{name}.weight", blocks, raw_dtype=GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tmp_path / "model.gguf"


def _read(path):
    from gguf import GGUFReader

    reader = GGUFReader(path)
    fields = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    return fields, {t.name: np.array(t.data) for t in reader.tensors}


def test_the_published_variant_holds_the_values_of_the_quantised_file(modules, quantised, tmp_path):
    from gguf import GGUFReader
    from gguf.quants import dequantize

    modules["off_grid"].write(quantised, tmp_path / "float.gguf", "published")
    fields, tensors = _read(tmp_path / "float.gguf")
    before, _ = _read(quantised)
    assert fields == before | {"general.file_type": 0}
    for tensor in GGUFReader(quantised).tensors:
        expected = dequantize(tensor.data, tensor.tensor_type)
        np.testing.assert_array_equal(tensors[tensor.name], expected, err_msg=tensor.name)


@pytest.mark.parametrize("variant", ["off-grid", "dithered"])
def test_a_variant_off_the_grid_changes_the_layers_alone(modules, quantised, tmp_path, variant):
    files = [tmp_path / "published.gguf", tmp_path / "changed.gguf", tmp_path / "again.gguf"]
    for path, each in zip(files, ("published", variant, variant), strict=True):
        modules["off_grid"].write(quantised, path, each)
    published, changed, _ = (_read(path)[1] for path in files)
    same = {name for name in published if np.array_equal(published[name], changed[name])}
    norms = {name for name in published if "norm" in name}
    assert same == {"token_embd.weight"} | (norms if variant == "dithered" else set())
    assert files[1].read_bytes() == files[2].read_bytes()


def test_dithered_weights_stay_in_their_cell_of_a_grid_of_16_levels(modules):
    layer, changed = _layer(), _layer()
    modules["off_grid"].dither_layer(changed, np.random.default_rng(0))
    before, after = (each["attn_q"].reshape(-1, 32) for each in (layer, changed))
    moved = np.abs(after - before) / (np.ptp(before, axis=1, keepdims=True) / 15)
    assert 0.49 < moved.max() < 0.501
    assert 0.24 < moved.mean() < 0.26


def test_every_file_is_made_from_files_that_can_be_made(modules):
    makers = modules["files"].MAKERS
    for name, (interpreter, parts, make) in makers.items():
        assert interpreter in ("peers", "precast")
        assert callable(make)
        assert [part for part in parts if part not in makers] == [], name
    names = {
        modules["files"].name_of(model, variant, point.file)
        for model in modules["files"].MODELS
        for variant in modules["off_grid"].VARIANTS
        for point in modules["frontier"].points(model, variant)
        if point.engine != "precast"
    }
    assert len(names) > 20
    assert names - makers.keys() == set()


def test_without_llama_cpps_tools_its_files_with_an_importance_matrix_are_left_out(
    modules, monkeypatch, capsys
):
    frontier = modules["frontier"]
    monkeypatch.setattr(frontier.llama_tools, "find", lambda name: None)
    found = [point.name for point in frontier.points("smollm2-135m", "off-grid")]
    assert "llama.cpp Q4_K_M" in found
    assert [name for name in found if "imatrix" in name] == []
    assert "leaving out its files with an importance matrix" in capsys.readouterr().err
    monkeypatch.setattr(frontier.llama_tools, "find", lambda name: f"/bin/{name}")
    found = [point.name for point in frontier.points("smollm2-135m", "off-grid")]
    assert sum("imatrix" in name for name in found) == 5


def test_tools_that_exist_are_built_again_only_by_name(modules, monkeypatch, capsys):
    tools, built = modules["frontier"].llama_tools, []
    monkeypatch.setattr(tools, "build", lambda names: built.append(list(names)))
    monkeypatch.setattr(tools, "find", lambda name: None if name == "llama-imatrix" else f"/bin/{name}")
    tools.main([])
    tools.main(["llama-server"])
    assert built == [["llama-imatrix"], ["llama-server"]]
    monkeypatch.setattr(tools, "find", lambda name: f"/bin/{name}")
    tools.main([])
    assert len(built) == 2
    assert capsys.readouterr().out == "llama-quantize, llama-imatrix, llama-server exist already\n"
    with pytest.raises(SystemExit, match=r"expected llama-quantize, .*, found llama-bench"):
        tools.main(["llama-bench"])


def test_without_cmake_the_remedy_is_named(modules, monkeypatch):
    tools = modules["frontier"].llama_tools
    monkeypatch.setattr(tools, "find", lambda name: None)
    with pytest.raises(SystemExit, match=r"cmake is missing; install it: .* -m pip install cmake"):
        tools.build(tools.NAMES)


def _point(engine, label, bits, kl):
    return {"engine": engine, "label": label, "bits": bits, "kl_mean": kl, "kl_p99": kl, "top1": 0.9}


def _result():
    points = (
        _point("llama.cpp", "Q8_0", 8.5, 0.004),
        _point("llama.cpp", "Q4_0 imatrix", 5.3, 0.3),
        _point("precast", "--bits 5", 5.0, 0.1),
        _point("precast", "int8", 8.5, 0.001),
    )
    found = {"points": {f"{p['engine']} {p['label']}": p for p in points}}
    return {"models": {"smollm2-135m": {"off-grid": found}}}


def test_the_table_is_in_order_of_size(modules):
    text = modules["frontier"].table(_result())
    assert text.splitlines()[1].startswith("| SmolLM2-135M-Instruct, off-grid |")
    places = [text.index(label) for label in ("--bits 5", "Q4_0 imatrix", "Q8_0")]
    assert places == sorted(places)
    assert "| llama.cpp Q4_0 imatrix | 5.30 | 0.3000 | 0.300 | 90.0% |" in text


def test_series_of_the_picture(modules):
    found = modules["picture"].series(
        list(_result()["models"]["smollm2-135m"]["off-grid"]["points"].values())
    )
    labels = {key: [point["label"] for point in points] for key, points in found.items()}
    assert labels[("llama.cpp", True)] == ["Q4_0 imatrix"]
    assert labels[("llama.cpp", False)] == ["Q8_0"]
    assert labels[("precast", False)] == ["--bits 5", "int8"]


def test_divergences_of_a_worker_are_those_of_its_logits(modules, tmp_path):
    """A worker that answers with the reference's logits plus a constant for each position agrees exactly."""
    frontier = modules["frontier"]
    logits = np.random.default_rng(0).normal(size=(4, 11)).astype(np.float32)
    np.save(tmp_path / "reference.npy", logits)

    class Same:
        def ask(self, *, score, first, out):
            assert (score, first) == (list(range(8)), 3)
            np.save(out, logits + np.arange(4, dtype=np.float32)[:, None])

    reference = frontier.Reference(windows=[range(8)], files=[tmp_path / "reference.npy"], weights=1)
    found = frontier.measure(Same(), reference, tmp_path)
    assert found["kl_mean"] == pytest.approx(0, abs=1e-9)
    assert (found["top1"], found["predictions"]) == (1.0, 4)
