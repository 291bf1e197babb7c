"""State files: a sequence continues in another process, and a state of another model is refused."""

import dataclasses
import json
import os
from types import SimpleNamespace

import numpy as np
import pytest

from precast import kernels
from precast.loaders.artifact.errors import PrecastError
from precast.loaders.artifact.origin import origin_of
from precast.loaders.artifact.weights import file_parts, map_weights, read_metadata
from precast.loaders.console import conversation
from precast.loaders.generation import state_file
from precast.loaders.generation.sampling_params import SamplingParams
from precast.loaders.load import load

PROMPT = [7, 200, 31, 5, 5, 90, 12, 64, 3, 250, 17, 101, 44, 8, 19, 77, 30, 2, 6, 11]
PARAMS = SamplingParams(max_tokens=10, ignore_eos=True)
MESSAGES = [{"role": "user", "content": "héllo"}, {"role": "assistant", "content": "the cat"}]


@pytest.fixture(scope="module")
def answered(tiny_artifact):
    """Return a model without memory of prompts, its answer to the prompt, and its answer to prompt and answer."""
    model = load(tiny_artifact, prefix_memory=0)
    first = model.generate(PROMPT, PARAMS)
    return model, first, model.generate([*PROMPT, *first.token_ids, 9], PARAMS)


@pytest.fixture
def saved(answered, tmp_path):
    """Return a state file of the prompt and its answer."""
    model, first, _ = answered
    path = tmp_path / "chat.state"
    model.save_state(path, first, messages=MESSAGES)
    return path


def test_a_sequence_goes_on_after_its_state(answered, saved, tiny_artifact):
    _, first, second = answered
    model = load(tiny_artifact, prefix_memory=0)
    state = model.load_state(saved)
    assert state.tokens == (*PROMPT, *first.token_ids)
    assert list(state.messages) == MESSAGES
    found = model.generate([*state.tokens, 9], PARAMS)
    assert found.token_ids == second.token_ids
    assert found.timing.cached_tokens == len(state.tokens)
    assert model.generate(PROMPT, PARAMS).token_ids == first.token_ids  # a part of the state is reused too
    assert model.prefixes.bytes == 0  # the state is mapped


def test_the_file_is_a_safetensors_file(saved):
    from safetensors.numpy import load_file

    assert (os.stat(saved).st_mode & 0o777) == 0o600
    tensors = load_file(saved)
    assert sorted(tensors) == ["cache.keys", "cache.values", "tokens"]
    assert tensors["cache.keys"].shape == (3, 2, 30, 12)
    assert int.from_bytes(saved.read_bytes()[:8], "little") % 64 == 56


def test_tokens_may_be_saved_without_an_answer(answered, tmp_path, tiny_artifact):
    model, first, _ = answered
    model.save_state(tmp_path / "a.state", PROMPT)
    other = load(tiny_artifact)
    assert other.load_state(tmp_path / "a.state").messages == ()
    found = other.generate(PROMPT, PARAMS)
    assert found.token_ids == first.token_ids
    assert found.timing.cached_tokens == len(PROMPT) - 1


def test_an_answer_that_fills_the_context(answered, tmp_path):
    model, _, _ = answered
    full = model.generate(PROMPT, SamplingParams(ignore_eos=True))
    model.save_state(tmp_path / "full.state", full)
    assert len(model.load_state(tmp_path / "full.state").tokens) == 63


# --- refusals ---------------------------------------------------------------------------------------------------


def refusal(model, path) -> str:
    with pytest.raises(PrecastError) as error:
        model.load_state(path)
    return str(error.value)


GEOMETRY = "cache.keys float32 L=3 K=2 H=12; cache.values float32 L=3 K=2 H=12"
OTHERS = {
    "weights": ("weights", "f" * 64, "weights sha256 {weights}…, found sha256 ffffffffffff…"),
    "cache": (
        "cache",
        "cache.keys bfloat16 L=3 K=2 H=12",
        f"KV cache '{GEOMETRY}', found 'cache.keys bfloat16 L=3 K=2 H=12'",
    ),
    "tokenizer": (
        "tokenizer",
        "0" * 64,
        "tokenizer sha256 {tokenizer}…, found sha256 000000000000…",
    ),
    "target": ("target", "cpu-x86-64-v9", "target '{target}', found 'cpu-x86-64-v9'"),
    "abi": ("kernel_abi", "99", "kernel ABI '{kernel_abi}', found '99'"),
    "isa": ("isa", "avx1024", "instruction set '{isa}', found 'avx1024'"),
}


@pytest.mark.parametrize("what", OTHERS)
def test_a_state_of_another_origin_is_refused(answered, tmp_path, what):
    model, _, _ = answered
    field, value, expected = OTHERS[what]
    origin = origin_of(model.manifest, model.target, kernels.isa())
    spans = model.prefixes.compute(PROMPT)
    state = state_file.State(tokens=tuple(PROMPT), messages=())
    path = tmp_path / "other.state"
    state_file.write_state(
        path, state, spans, model.manifest.cache, dataclasses.replace(origin, **{field: value})
    )
    known = {k: v[:12] if len(v) == 64 else v for k, v in vars(origin).items()}
    assert refusal(model, path) == (
        f"{path}: expected a state computed with {expected.format(**known)}; choose another file, or start a new state."
    )


def test_targets_that_cannot_reuse_anything_are_refused(tiny_artifact, tmp_path):
    model = load(tiny_artifact, target="portable", allow_compile=True)
    assert model.prefixes is None
    for act in (lambda p: model.load_state(p), lambda p: model.save_state(p, PROMPT)):
        with pytest.raises(PrecastError) as error:
            act(tmp_path / "x.state")
        assert str(error.value) == (
            f"{tmp_path / 'x.state'}: target 'portable' cannot save or load a state, because no other process may"
            " reuse its keys and values; add a target for this CPU with precast add-target."
        )


def rewritten(path, change) -> None:
    """Change the tensors and metadata of a state file, and update its hash."""
    with path.open("rb") as file:
        metadata = read_metadata(file)
        tensors = {name: array.copy() for name, array in map_weights(file).items()}
    change(tensors, metadata)
    metadata.pop("sha256")
    metadata["sha256"] = state_file._digest(tensors, metadata)
    path.write_bytes(b"".join(file_parts(tensors, metadata)))


def set_item(tensors, name, index, value):
    tensors[name][index] = value


CHANGES = {
    "nan": (
        lambda t, _: set_item(t, "cache.keys", (0, 0, 0, 0), np.nan),
        "expected finite numbers in 'cache.keys', found NaN or infinity",
    ),
    "infinite": (
        lambda t, _: set_item(t, "cache.values", (2, 1, 29, 11), -np.inf),
        "expected finite numbers in 'cache.values', found NaN or infinity",
    ),
    "missing": (
        lambda t, _: t.pop("cache.values"),
        "expected 'cache.values' as float32 [3, 2, 30, 12], found nothing",
    ),
    "unknown": (
        lambda t, _: t.update(more=np.zeros(16, np.float32)),
        "expected only the arrays of the KV cache, found another array, 'more'",
    ),
    "shorter": (
        lambda t, _: t.update({"cache.keys": t["cache.keys"][:, :, 1:].copy()}),
        "expected 'cache.keys' as float32 [3, 2, 30, 12], found float32 [3, 2, 29, 12]",
    ),
    "type": (
        lambda t, _: t.update({"cache.keys": t["cache.keys"].astype(np.float16)}),
        "expected 'cache.keys' as float32 [3, 2, 30, 12], found float16 [3, 2, 30, 12]",
    ),
    "tokens": (
        lambda t, _: t.update(tokens=t["tokens"] + 1000),
        "expected tokens from 0 to 319, found a token outside this range",
    ),
    "negative": (
        lambda t, _: t.update(tokens=-t["tokens"]),
        "expected tokens from 0 to 319, found a token outside this range",
    ),
    "many": (
        lambda t, _: t.update(tokens=np.zeros(64, np.int32)),
        "expected 1 to 63 tokens as int32, found int32 [64]",
    ),
    "none": (lambda t, _: t.pop("tokens"), "expected 1 to 63 tokens as int32, found nothing"),
    "messages": (
        lambda _, m: m.update(messages='{"role": "user"}'),
        "expected the messages of a chat, found something else",
    ),
    "JSON": (
        lambda _, m: m.update(messages='[{"role": "user"'),
        "expected the messages of a chat, found something else",
    ),
    "no text": (lambda _, m: m.pop("messages"), "expected the messages of a chat, found something else"),
    "contents": (
        lambda _, m: m.update(messages='[{"role": "user", "content": 3}]'),
        "expected the messages of a chat, found something else",
    ),
    "roles": (
        lambda _, m: m.update(messages='[{"content": "x"}]'),
        "expected the messages of a chat, found something else",
    ),
}


@pytest.mark.parametrize("what", CHANGES)
def test_contents_that_no_model_computes_are_refused(answered, saved, what):
    change, expected = CHANGES[what]
    rewritten(saved, change)
    assert refusal(answered[0], saved) == (
        f"{saved}: {expected}, so the file is damaged; start a new state in another file."
    )


def test_every_flipped_byte_is_noticed(answered, saved):
    """Header, metadata and data are all covered."""
    whole = saved.read_bytes()
    for at in [*range(0, 900, 7), *range(900, len(whole), 997), len(whole) - 1]:
        damaged = bytearray(whole)
        damaged[at] ^= 1
        saved.write_bytes(damaged)
        if damaged[at] in b"\t\n\r !" and whole[at] in b" ":  # another space in the header's padding
            continue
        assert refusal(answered[0], saved).startswith(str(saved))


def test_every_truncated_file_is_refused(answered, saved):
    whole = saved.read_bytes()
    for size in [*range(0, 1500, 50), *range(1500, len(whole), 1999), len(whole) - 1]:
        saved.write_bytes(whole[:size])
        assert refusal(answered[0], saved).startswith(str(saved))
    saved.write_bytes(whole + b"\0")
    assert refusal(answered[0], saved).startswith(str(saved))


def test_other_files_are_refused(answered, tiny_artifact, tmp_path):
    model = answered[0]
    weights = tiny_artifact / "weights.safetensors"
    assert refusal(model, weights) == (
        f"{weights}: expected a precast state of version 1, found a different file; choose another file."
    )
    missing = tmp_path / "missing.state"
    assert refusal(model, missing) == (
        f"{missing}: the state cannot be read (No such file or directory); check the path."
    )
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    assert (
        refusal(model, pipe) == f"{pipe}: the state cannot be read (it is not a plain file); check the path."
    )


def test_a_later_version_is_refused(answered, saved):
    rewritten(saved, lambda _, m: m.update(precast_state="2"))
    assert refusal(answered[0], saved) == (
        f"{saved}: expected a precast state of version 1, found version 2; choose another file."
    )


def test_a_state_that_is_written_to_while_in_use(answered, saved, tiny_artifact):
    model = load(tiny_artifact)
    state = model.load_state(saved)
    with saved.open("r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(b"\0\0\0\1")
    with pytest.raises(PrecastError) as error:
        model.generate([*state.tokens, 9], PARAMS)
    assert str(error.value) == (
        f"{saved}: was written to while it was in use; load the artifact again, and replace its folder instead of"
        " writing to its files."
    )


def test_a_file_that_cannot_be_written(answered, tmp_path):
    path = tmp_path / "none" / "x.state"
    with pytest.raises(PrecastError) as error:
        answered[0].save_state(path, PROMPT)
    assert str(error.value) == (
        f"{path}: the state cannot be written (No such file or directory); choose another file, or free disk space."
    )


def test_a_failed_write_leaves_the_old_state(answered, saved, monkeypatch):
    before = saved.read_bytes()

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(PrecastError, match="the state cannot be written \\(No space left on device\\)"):
        answered[0].save_state(saved, PROMPT)
    assert saved.read_bytes() == before
    assert [p.name for p in saved.parent.iterdir()] == [saved.name]


def test_tokens_and_messages_are_checked(answered, tmp_path):
    model = answered[0]
    with pytest.raises(PrecastError, match="prompt: expected token ids from 0 to 319, found 320 at index 0"):
        model.save_state(tmp_path / "x.state", [320])
    with pytest.raises(PrecastError) as error:
        model.save_state(tmp_path / "x.state", PROMPT, messages=[{"role": "user", "content": b"x"}])
    assert str(error.value) == (
        'Chat: expected messages[0] to be a message {"role": string, "content": string or list of parts}, found content'
        " of type bytes."
    )
    with pytest.raises(PrecastError) as error:
        model.save_state(tmp_path / "x.state", PROMPT, messages=[{"role": "user", "content": "\ud800"}])
    assert str(error.value) == (
        "messages: expected values that JSON can represent, found another value ('utf-8' codec can't encode"
        " character '\\ud800' in position 30: surrogates not allowed); remove it."
    )
    assert not (tmp_path / "x.state").exists()


@pytest.mark.parametrize("value", [-1, 1.5, True, "1 GB"])
def test_the_bound_of_memory_is_checked(tiny_artifact, value):
    with pytest.raises(PrecastError) as error:
        load(tiny_artifact, prefix_memory=value)
    assert str(error.value) == (
        f"prefix_memory: expected a number of bytes, 0 or more, found {value!r}; 0 keeps no prefixes."
    )


# --- the command line -------------------------------------------------------------------------------------------


def test_run_goes_on_with_text(cli, record, tiny_artifact, tmp_path, answered):
    _, first, second = answered
    path, options = tmp_path / "text.state", ("-n", 10, "--ignore-eos", "--temperature", 0)
    ids = ",".join(map(str, PROMPT))
    assert record(tiny_artifact, "--ids", ids, "--state", path, *options)["token_ids"] == list(
        first.token_ids
    )
    found = record(tiny_artifact, "--ids", "9", "--state", path, *options)
    assert found["token_ids"] == list(second.token_ids)
    assert found["timing"]["cached_tokens"] == 30
    refused = cli("run", tiny_artifact, "--chat", "-p", "x", "--state", path)
    assert (refused.exit_code, refused.stderr) == (
        2,
        (
            f"error: {path}: contains text, not a chat; leave out --chat, --system and --literal, or choose another"
            " file.\n"
        ),
    )


def test_run_goes_on_with_a_chat(cli, record, tiny_artifact, tmp_path):
    path, options = tmp_path / "chat.state", ("-n", 5, "--temperature", 0)
    first = record(tiny_artifact, "--system", "the", "-p", "cat", "--state", path, *options)
    found = record(tiny_artifact, "-p", "fox", "--state", path, *options)
    assert found["timing"]["cached_tokens"] >= len(first["prompt_token_ids"])
    with path.open("rb") as file:
        messages = json.loads(read_metadata(file)["messages"])
    assert [m["role"] for m in messages] == ["system", "user", "assistant", "user", "assistant"]
    assert messages[4]["content"] == found["text"]
    for option, text in {
        (
            "--system",
            "x",
            "-p",
            "y",
        ): "the chat has begun, so --system cannot change the system message; leave out"
        " --system, or choose another file.",
        ("--ids", "1"): "contains a chat, which --ids cannot continue; use --prompt instead of --ids.",
    }.items():
        refused = cli("run", tiny_artifact, *option, "--state", path)
        assert (refused.exit_code, refused.stderr) == (2, f"error: {path}: {text}\n")


SAID = {"role": "assistant", "content": "yes"}


def test_a_chat_on_a_terminal_is_saved_at_its_end(monkeypatch, capsys, tmp_path):
    """The tokens are those of the last complete answer; a new start keeps the system message."""
    saved, asked = [], []

    def stream_chat(messages, params, literal, template_variables):
        asked.append([m["content"] for m in messages])
        if messages[-1]["content"] == "fail":
            raise PrecastError("no.")
        return SimpleNamespace(completion=SimpleNamespace(place=len(asked), message=lambda: dict(SAID)))

    model = SimpleNamespace(
        manifest=SimpleNamespace(name="tiny", tokenizer=SimpleNamespace(chat_template="x")),
        target=SimpleNamespace(name="cpu"),
        engine=SimpleNamespace(context=64),
        stream_chat=stream_chat,
        save_state=lambda path, completion, messages: saved.append((path, completion, messages)),
    )
    monkeypatch.setenv("PRECAST_HISTORY", "off")
    monkeypatch.setattr(conversation, "write", lambda stream, is_terminal: ["yes"])
    monkeypatch.setattr(conversation.speed, "brief", lambda _: "")
    opening = [{"role": "system", "content": "be"}, *MESSAGES]

    def chat(*typed):
        monkeypatch.setattr(conversation.chat_input, "messages", lambda: iter(typed))
        conversation.converse(model, None, opening, stats=False, literal=False, state=tmp_path / "c.state")
        return capsys.readouterr().out

    assert "c.state: 3 messages. /reset starts over." in chat("/help")
    assert saved == []
    chat("a", "/reset", "b", "fail")
    assert asked == [["be", "héllo", "the cat", "a"], ["be", "b"], ["be", "b", "yes", "fail"]]
    (found,) = saved
    assert (found[0], found[1].place) == (tmp_path / "c.state", 2)
    assert [m["content"] for m in found[2]] == ["be", "b", "yes"]


def test_the_folder_of_a_state_must_exist(cli, tiny_artifact, tmp_path):
    path = tmp_path / "none" / "x.state"
    refused = cli("run", tiny_artifact, "-p", "x", "--state", path)
    assert (refused.exit_code, refused.stderr) == (
        2,
        f"error: {path}: its folder does not exist; create the folder, or choose another file.\n",
    )
