"""Keys and values of a slot, copied to the host and to another slot of a real KV cache."""

import numpy as np

from precast.loaders.generation import kv_state
from precast.loaders.runtime import pjrt

PROMPT = [7, 200, 31, 5, 5, 90, 12, 64, 3, 250, 17]


def test_a_view_is_the_memory_of_the_cache(slots_model):
    engine = slots_model.engine
    cache = engine.new_cache()
    engine.prefill(PROMPT, cache, slot=1)
    for name, view in engine.slot_views(cache, 1).items():
        array = pjrt.client().get(cache.buffers[name])[:, 1]
        np.testing.assert_array_equal(view.view(np.float32), array)
        assert np.shares_memory(view, array)


def test_a_sequence_goes_on_in_another_slot_of_another_cache(slots_model):
    engine = slots_model.engine
    ours, theirs = engine.new_cache(), engine.new_cache()
    expected = engine.logits(engine.prefill(PROMPT, ours, slot=2))
    views = engine.slot_views(ours, 2)
    spans = kv_state.read(views, dict.fromkeys(views, 0), len(PROMPT) - 1)
    assert kv_state.size(views, dict.fromkeys(views, 0), len(PROMPT) - 1) == sum(
        s.array.nbytes for s in spans.values()
    )
    kv_state.write(engine.slot_views(theirs, 0), spans.items())
    found = engine.logits(engine.prefill(PROMPT[-1:], theirs, start=len(PROMPT) - 1, slot=0))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_the_client_s_view_is_writable_and_holds_no_reference(tiny_model):
    client = pjrt.client()
    array = np.arange(16, dtype=np.int32)
    buffer = client.put(np.array(array))
    view = client.view(buffer)
    view.view(np.int32)[3] = 99
    assert client.get(buffer).tolist() == [0, 1, 2, 99, *range(4, 16)]
