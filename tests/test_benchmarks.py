"""The arithmetic of the benchmarks (limits, divergences, ratios), and the tables of the results."""

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest

PEERS = Path(__file__).parents[1] / "benchmarks" / "peers"


@pytest.fixture
def peers(monkeypatch):
    """Return the modules of benchmarks/peers, which import each other by bare names."""
    monkeypatch.syspath_prepend(str(PEERS))
    before = set(sys.modules)
    import fidelity
    import limits
    import report

    yield {"limits": limits, "report": report, "fidelity": fidelity}
    for name in set(sys.modules) - before:
        del sys.modules[name]


def _argument(name, shape, dtype):
    return {"name": name, "role": "weight", "shape": shape, "dtype": dtype}


def _manifest(*arguments):
    decode = {"kind": "decode", "arguments": [{"role": "tokens"}, *arguments]}
    return {
        "targets": [{"runtime": "stablehlo"}, {"runtime": "pjrt", "programs": [decode]}],
        "cache": [{"bytes": 1000, "shape": [1, 1, 1, 100, 1], "axes": "LBKSH"}] * 2,
        "capacity": 100,
        "slots": 1,
    }


def test_a_step_of_one_sequence_reads_the_filled_part_of_one_slot(peers):
    manifest = _manifest()
    assert peers["limits"].cache_bytes(manifest, 10) == 200
    eight = {"bytes": 8000, "shape": [1, 8, 1, 100, 1], "axes": "LBKSH"}
    assert peers["limits"].cache_bytes({**manifest, "cache": [eight, eight]}, 10) == 200
    assert peers["limits"].cache_bytes({**manifest, "cache": [{**eight, "window": 4}]}, 10) == 40


def test_tied_weights_are_read_whole_and_an_untied_embedding_is_not(peers):
    embedding = _argument("model.embed_tokens.weight", [10, 4], "int8")
    scale = _argument("model.embed_tokens.weight.scale", [10], "float16")
    head = _argument("lm_head.weight", [10, 4], "float32")
    assert peers["limits"].weight_bytes(_manifest(embedding, scale)) == 60
    assert peers["limits"].weight_bytes(_manifest(embedding, scale, head)) == 160


def test_decode_share_counts_weights_and_filled_cache(peers):
    manifest = _manifest(_argument("a", [100], "uint8"))
    # 100 bytes of weights and 10 positions of 20 bytes at 1000 bytes per second need at least 0.3 s.
    assert peers["limits"].decode_share(manifest, 0.6, 10, 1000.0) == pytest.approx(0.5)


def test_prompt_operations_by_hand(peers):
    model = {"layers": 1, "width": 2, "heads": 1, "kv_heads": 1, "head_dim": 2, "ff_width": 3, "vocab": 5}
    # A token needs q, k, v, o of 2×2, three matrices of 2×3, attention to itself (2 + 2), and the head of 5×2.
    assert peers["limits"].prompt_operations(model, 1) == 2 * (16 + 18 + 4 + 10)


def test_spread_of_an_even_number(peers):
    assert peers["limits"].spread([4.0, 1.0, 2.0, 3.0]) == {
        "median": 2.5,
        "min": 1.0,
        "max": 4.0,
        "rounds": 4,
    }


def test_divergence_of_two_outcomes(peers):
    rows = np.log(np.array([[0.5, 0.5], [0.9, 0.1]]))
    other = np.log(np.array([[0.25, 0.75], [0.9, 0.1]])) + 3.0
    expected = [0.5 * np.log(2) + 0.5 * np.log(2 / 3), 0.0]
    np.testing.assert_allclose(peers["fidelity"].divergences(rows, other), expected, atol=1e-12)


def _contender(label, group, prefill, decode):
    figures = {"prefill_s": {"median": prefill}, "decode_tokens_per_s": {"median": decode}}
    return {"label": label, "group": group, "prompts": {"128": figures}}


def _result(*contenders):
    return {"contenders": {name: c for name, c in contenders}}


def test_each_figure_is_compared_with_the_best_peer_of_its_group(peers):
    result = _result(
        ("precast-int8", _contender("precast int8", "int8", 0.1, 90.0)),
        ("llama.cpp-q8_0", _contender("llama.cpp Q8_0", "int8", 0.2, 100.0)),
        ("openvino-int8", _contender("OpenVINO INT8", "int8", 0.05, 80.0)),
        ("llama.cpp-q4_0", _contender("llama.cpp Q4_0", "int4", 0.01, 500.0)),
    )
    found = {r.figure: (r.peer, r.times) for r in peers["report"].ratios(result)}
    assert found["prefill 128, ms"] == ("OpenVINO INT8", pytest.approx(0.5))
    assert found["decode after 128, tokens/s"] == ("llama.cpp Q8_0", pytest.approx(0.9))
    text = peers["report"].tables(result)
    assert "- precast int8: prefill 128, ms: 0.50× of OpenVINO INT8" in text
    assert "- precast int8: decode after 128, tokens/s: 0.90× of llama.cpp Q8_0" in text


def test_without_peers_the_table_compares_nothing(peers):
    text = peers["report"].tables(_result(("precast-int8", _contender("precast int8", "int8", 0.1, 90.0))))
    assert "behind" not in text
    assert "| **precast int8** | 100 | 90.0 |" in text


# --- benchmarks/gpu.py --------------------------------------------------------------------------------------


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.syspath_prepend(str(PEERS.parent))
    import gpu

    yield gpu
    for name in ("gpu", "machine"):
        sys.modules.pop(name, None)


def test_the_7b_shape_has_7b_parameters(gpu):
    shapes = gpu.tensor_shapes(gpu.SHAPES["7b"])
    assert sum(math.prod(shape) for shape in shapes.values()) == 7_241_732_096  # as Mistral 7B


def test_random_tensors_are_reproducible_and_as_large_as_trained_ones(gpu):
    first, second = (gpu.random_tensor("model.layers.0.mlp.up_proj.weight", (64, 256)) for _ in range(2))
    assert np.array_equal(first, second)
    assert first.std() == pytest.approx(1.5 / 16, rel=0.02)
    assert not np.array_equal(first, gpu.random_tensor("model.layers.1.mlp.up_proj.weight", (64, 256)))


def test_bytes_of_a_step_on_a_gpu(gpu):
    embedding = _argument("model.embed_tokens.weight", [10, 4], "bfloat16")
    head = _argument("lm_head.weight", [1, 10, 4], "bfloat16")
    manifest = _manifest(embedding, head, _argument("a", [100], "int8"))
    manifest["targets"] = [{"name": "cuda", **manifest["targets"][1]}]
    # The head, the other weight, and a tenth of two cache arrays of 1000 bytes.
    assert gpu.step_bytes(manifest, "cuda", 10) == 80 + 100 + 200
    manifest["targets"][0]["programs"][0]["arguments"].remove(head)
    assert gpu.step_bytes(manifest, "cuda", 0) == 80 + 100


def test_without_a_gpu_the_benchmark_ends_with_an_error(gpu, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    with pytest.raises(SystemExit) as raised:
        gpu.main()
    expected = "benchmarks/gpu.py measures GPUs, and there is none: --target cuda needs a GPU that jax sees"
    assert str(raised.value).startswith(expected)
    assert capsys.readouterr().out == ""


def test_the_gpu_benchmark_runs_on_a_cpu_for_this_test_alone(gpu, monkeypatch, capsys):
    found = {"prefill_s": [0.5, 0.7, 0.6], "tokens_per_s": [4.0, 5.0, 6.0], "backend": "inductor"}
    monkeypatch.setattr(gpu, "torch_in_a_child", lambda _: found)
    options = "--shape tiny --platform cpu --steps 4 --rounds 2 --capacity 160 --gigabytes 0.01"
    monkeypatch.setattr(sys, "argv", ["gpu.py", *options.split()])
    gpu.main()
    *table, line = capsys.readouterr().out.strip().splitlines()
    facts = json.loads(line)
    assert (facts["benchmark"], facts["device"], facts["torch"]["backend"]) == ("gpu", "cpu", "inductor")
    assert facts["limit_tokens_per_s"] == facts["bandwidth_bytes_per_s"] / facts["step_bytes"]
    # Two layers, the head and norms in bfloat16 and float32, and 130 of 160 positions.
    matrices = 2 * 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 128) + 2 * 512 * 64
    assert facts["step_bytes"] == matrices + 4 * 5 * 64 + 2 * (2 * 2 * 160 * 16 * 2) * 130 // 160
    assert facts["torch"]["decode_tokens_per_s"] == {"median": 5.0, "min": 4.0, "max": 6.0}
    assert "| torch: decode | 5.0 tokens/s" in "\n".join(table)
    assert "precast over torch" in "\n".join(table)


def test_a_missing_peer_is_named(gpu, monkeypatch):
    monkeypatch.setattr(gpu, "find_spec", lambda name: None)
    assert gpu.torch_in_a_child(None) == {"skipped": "torch and transformers not installed"}
