"""Completions through OpenAI's client, with the demo model."""

from typing import Any

import numpy as np
import pytest

from precast.loaders.audit.evaluate import ArtifactScorer

PROMPT = "The capital of France is"


def ask(openai: Any, **options: Any) -> Any:
    return openai.completions.create(**{"model": "demo", "prompt": PROMPT, "max_tokens": 8, **options})


def test_a_text_is_continued(openai) -> None:
    answer = ask(openai)
    assert answer.choices[0].text.startswith(" Paris")
    assert answer.object == "text_completion"
    assert answer.usage.completion_tokens == 8
    streamed = list(ask(openai, stream=True, stream_options={"include_usage": True}))
    assert "".join(c.choices[0].text for c in streamed if c.choices) == answer.choices[0].text
    assert streamed[-1].usage.total_tokens == answer.usage.total_tokens


def test_several_prompts_and_answers(openai) -> None:
    prompts = [PROMPT, "One, two,"]
    answer = ask(openai, prompt=prompts, n=2, temperature=1.0, seed=3)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    each = [ask(openai, prompt=p, n=2, temperature=1.0, seed=3).choices for p in prompts]
    assert [c.text for c in answer.choices] == [c.text for choices in each for c in choices]


def test_token_ids(openai, demo_server) -> None:
    body = {"model": "demo", "prompt": PROMPT}
    ids = demo_server.request("/tokenize", body)[2]["tokens"]
    one, two = ask(openai, prompt=ids), ask(openai, prompt=[ids])
    assert one.choices[0].text == two.choices[0].text == ask(openai).choices[0].text


@pytest.mark.parametrize("most", [0, 1])
def test_echo_with_logprobs_scores_a_text(openai, most) -> None:
    """As lm-eval's local-completions asks."""
    text = PROMPT + " Paris"
    choice = ask(
        openai, prompt=text, max_tokens=most, echo=True, logprobs=1, temperature=0, seed=1234
    ).choices[0]
    found = choice.logprobs
    assert "".join(found.tokens) == choice.text
    assert choice.text.startswith(text)
    assert found.text_offset == [sum(map(len, found.tokens[:i])) for i in range(len(found.tokens))]
    assert found.token_logprobs[0] is found.top_logprobs[0] is None
    place = 5
    assert found.tokens[place] == " Paris"
    assert found.token_logprobs[place] == max(found.top_logprobs[place].values())
    assert len(found.tokens) == 6 + most


def test_scores_of_answers_are_exact(tiny_server, tiny_model) -> None:
    """The sums of lm-eval's requests are those of an engine that decodes token by token."""
    encode, scorer = tiny_model.tokenizer.encode, ArtifactScorer(model=tiny_model)
    start = len(encode("the quick brown fox"))
    texts = [encode(f"the quick brown fox{rest}") for rest in (" jumps", " sleeps over", " the cat", " a")]
    body = {"model": "tiny", "prompt": texts, "max_tokens": 1, "temperature": 0, "logprobs": 1, "echo": True}
    reply = tiny_server.request("/v1/completions", body | {"seed": 1234})[2]
    assert [choice["index"] for choice in reply["choices"]] == [0, 1, 2, 3]
    for choice, ids in zip(reply["choices"], texts, strict=True):
        rows = [row.astype(np.float64) for row in scorer.logits(ids, start - 1)]
        expected = [
            row[token] - np.logaddexp.reduce(row) for row, token in zip(rows, ids[start:], strict=True)
        ]
        assert choice["logprobs"]["token_logprobs"][start:-1] == pytest.approx(expected, abs=1e-5)


def test_echo_in_a_stream(openai) -> None:
    options = {"echo": True, "logprobs": 2, "max_tokens": 3}
    whole = ask(openai, **options).choices[0]
    chunks = [c.choices[0] for c in ask(openai, **options, stream=True)]
    assert "".join(c.text for c in chunks) == whole.text
    assert [t for c in chunks for t in c.logprobs.tokens] == whole.logprobs.tokens
    assert [t for c in chunks for t in c.logprobs.text_offset] == whole.logprobs.text_offset


def test_precasts_own_parameters(openai) -> None:
    answer = ask(openai, extra_body={"choice": [" Rome", " Berlin"]})
    assert answer.choices[0].text in (" Rome", " Berlin")
    assert answer.choices[0].finish_reason == "stop"
