"""``precast add-prefix``: prompts start after a stored prefix, and the artifact stays whole."""

import errno
import json
import os
import shutil
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from precast.loaders import add_prefix as adding
from precast.loaders import artifact_changes
from precast.loaders.add_prefix import PrefixSource, add_prefix, remove_prefix
from precast.loaders.artifact import folders
from precast.loaders.artifact.errors import PrecastError
from precast.loaders.artifact.files import unlisted_files
from precast.loaders.artifact.weights import map_weights
from precast.loaders.audit.prefixes import replay_prefixes
from precast.loaders.audit.verify import check_files
from precast.loaders.generation.model import Model
from precast.loaders.generation.prefixes import PrefixTree
from precast.loaders.generation.sampling_params import SamplingParams
from precast.loaders.generation.stored_prefixes import obstacle
from precast.loaders.load import load
from precast.loaders.locate import read_manifest
from precast.loaders.store.push import push

SYSTEM = "the quick brown fox"
PARAMS = SamplingParams(max_tokens=6, ignore_eos=True)


def add(root: Path, name: str = "fox", source: PrefixSource | None = None, **options):
    return add_prefix(root, name, source or PrefixSource(system=SYSTEM), log=lambda _: None, **options)


def refusal(root: Path, *arguments, **options) -> str:
    with pytest.raises(PrecastError) as error:
        add(root, *arguments, **options)
    return str(error.value)


@pytest.fixture
def copy(prefixed_artifact, tmp_path) -> Path:
    return Path(shutil.copytree(prefixed_artifact, tmp_path / "copy"))


def messages(text: str, system: str = SYSTEM):
    return [{"role": "system", "content": system}, {"role": "user", "content": text}]


# --- use --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["a cat", "jumps over the lazy dog", "0", " x"])
def test_every_chat_with_the_system_message_starts_after_it(prefixed_artifact, tiny_model, greedy, text):
    model = load(prefixed_artifact, prefix_memory=0)
    found = model.chat(messages(text), PARAMS)
    assert found.timing.cached_tokens == model.manifest.prefixes[0].tokens
    assert found.token_ids == greedy(tiny_model.engine, found.prompt_token_ids, 6)
    other = model.chat(messages(text, "another"), PARAMS)
    assert 0 < other.timing.cached_tokens < found.timing.cached_tokens  # only the beginning of the template
    assert model.prefixes.bytes == 0  # the prefix is mapped, and takes no memory


def test_only_a_prompt_s_last_token_is_read_after_an_equal_prefix(copy, greedy):
    model = load(copy)
    tokens = json.loads((copy / model.manifest.prefixes[0].file).read_text())
    found = model.generate(tokens, PARAMS)
    assert found.timing.cached_tokens == len(tokens) - 1
    assert found.token_ids == greedy(model.engine, tokens, 6)
    assert model.generate(tokens[:5], PARAMS).timing.cached_tokens == 4


def test_sources_of_text(copy):
    chat = [*messages("cat"), {"role": "assistant", "content": "dog"}]
    assert add(copy, "chat", PrefixSource(chat=chat)).prefix.tokens > 20
    assert add(copy, "asked", PrefixSource(chat=messages("cat"))).prefix.tokens > 20
    assert add(copy, "text", PrefixSource(text="def fibonacci(n): return n and the")).prefix.tokens > 5
    model = load(copy)
    assert [p.name for p in model.manifest.prefixes] == ["fox", "chat", "asked", "text"]
    known = {p.name: p.tokens for p in model.manifest.prefixes}
    found = model.chat([*chat, {"role": "user", "content": "fox"}], PARAMS)
    assert found.timing.cached_tokens == known["chat"]
    assert model.chat(messages("cat"), PARAMS).timing.cached_tokens == known["asked"] - 1
    found = model.generate("def fibonacci(n): return n and then", PARAMS)
    # The last token of "the" differs from that of "then".
    assert found.timing.cached_tokens == known["text"]


CACHES = {
    "float32": {},
    "bfloat16": {"weights": "int4", "kv_cache": "bfloat16"},
    "int8": {"weights": "int8", "kv_cache": "int8"},
}


@pytest.fixture(scope="module")
def kinds(export_tiny, tiny_source, tiny_artifact):
    """Return artifacts with each type of the KV cache; the last one has windows and more slots."""
    windowed = tiny_source(config={"model_type": "mistral", "sliding_window": 8})
    made = {}
    for name, options in CACHES.items():
        source = windowed if name == "int8" else None
        made[name] = tiny_artifact if not options else export_tiny(source, targets=("cpu",), **options)
    return {name: load(root) for name, root in made.items()}


@pytest.mark.parametrize("kind", CACHES)
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    prefix=st.lists(st.integers(2, 319), min_size=1, max_size=40),
    shared=st.integers(0, 40),
    rest=st.lists(st.integers(2, 319), min_size=1, max_size=15),
    slot=st.integers(0, 7),
)
def test_answers_are_the_same_with_any_prefix_and_cut(kinds, kind, prefix, shared, rest, slot):
    """The prompt may leave the prefix after any token; logits equal those of the whole prompt, bit for bit."""
    engine = kinds[kind].engine
    tree = PrefixTree(engine, 0)
    tree.pin(prefix, tree.compute(prefix))
    prompt, cache = [*prefix[:shared], *rest], engine.new_cache()
    slot %= engine.slots
    known = tree.restore(prompt[:-1], cache, slot)
    if kind != "int8":  # without a window
        assert known >= min(shared, len(prefix), len(prompt) - 1)
    found = engine.prefill(prompt[known:], cache, start=known, slot=slot)
    expected = engine.prefill(prompt, engine.new_cache(), slot=slot)
    np.testing.assert_array_equal(engine.logits(found), engine.logits(expected))


@pytest.fixture(scope="module")
def models(kinds):
    """Return the models with little memory for prefixes, and with none."""
    return {name: (limited(model, 30_000), limited(model, 0)) for name, model in kinds.items()}


def limited(model, limit: int):
    """Return the model with a changed limit on the memory for prefixes."""
    return Model(
        engine=model.engine,
        tokenizer=model.tokenizer,
        manifest=model.manifest,
        target=model.target,
        compiles=0,
        prefixes=PrefixTree(model.engine, limit),
    )


@pytest.mark.parametrize("kind", CACHES)
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.lists(st.sampled_from([5, 200]), min_size=1, max_size=40), min_size=1, max_size=6))
def test_answers_are_the_same_with_any_earlier_prompts(models, kind, prompts):
    """Prompts of two different tokens share beginnings, which small limits evict. They run together, then alone."""
    remembering, fresh = models[kind]
    expected = [answer.token_ids for answer in fresh.generate_many(prompts, PARAMS)]
    assert [answer.token_ids for answer in remembering.generate_many(prompts, PARAMS)] == expected
    assert [remembering.generate(prompt, PARAMS).token_ids for prompt in prompts] == expected
    assert remembering.prefixes.bytes <= 30_000
    assert fresh.prefixes.bytes == 0


# --- reports ----------------------------------------------------------------------------------------------------


def test_inspect_check_verify_and_diff_show_it(cli, prefixed_artifact, tiny_artifact):
    prefix = read_manifest(prefixed_artifact).prefixes[0]
    by = f"by target {prefix.target} with kernels for {prefix.isa}"
    inspected = cli("inspect", prefixed_artifact).stdout
    assert f"  prefix   fox: {prefix.tokens} tokens, " in inspected
    assert by in inspected
    (facts,) = json.loads(cli("inspect", prefixed_artifact, "--json").stdout)["prefixes"]
    assert (facts["name"], facts["tokens"]) == ("fox", prefix.tokens)
    assert f"  prefix    fox: {prefix.tokens} tokens, used" in cli("check", prefixed_artifact).stdout
    verified = cli("verify", prefixed_artifact)
    assert verified.exit_code == 0, verified.output
    assert f"  prefix    fox: {prefix.tokens} tokens, recomputed and compared" in verified.stdout
    differs = cli("diff", tiny_artifact, prefixed_artifact)
    assert "  prefixes: 1 difference\n    + fox: " in differs.stdout
    assert "other files" in differs.stdout.splitlines()[-1]


def test_verify_reports_keys_that_the_machine_does_not_compute(copy):
    """The keys and values of the prefix are changed, and the manifest lists the new hash."""
    prefix = read_manifest(copy).prefixes[0]
    with (copy / prefix.arrays).open("rb") as file:
        tensors = {name: array.copy() for name, array in map_weights(file).items()}
    tensors["cache.values"][1, 0, 3] += 1
    from precast.loaders.artifact.weights import file_parts

    data = b"".join(file_parts(tensors, {}))
    (copy / prefix.arrays).write_bytes(data)
    relist(copy, prefix.arrays)
    model = load(copy)
    report = replay_prefixes(model, copy, prefix.isa)
    assert report.problems[0] == (
        f"{copy}: prefix 'fox': 1 vectors of cache.values differ from those recomputed now; this artifact computes"
        " other numbers on this machine than at export: do not use it here, and report this."
    )


def relist(root: Path, name: str) -> None:
    """Update the manifest with the present size and hash of a file."""
    import hashlib

    value = json.loads((root / "manifest.json").read_text())
    data = (root / name).read_bytes()
    value["files"][name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (root / "manifest.json").write_text(json.dumps(value))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"target": "portable"}, "target 'portable' computed it, but target '{target}' runs here"),
        ({"programs": "0" * 64}, "other programs of target '{target}', or other kernels, computed it"),
        ({"kernels": 1}, "kernels of ABI 1 computed it, but the target calls ABI {kernels}"),
        ({"isa": "avx1024"}, "kernels for avx1024 computed it, but this machine's kernels use {isa}"),
    ],
)
def test_a_prefix_of_another_origin_is_not_used(copy, edit_manifest, cli, changes, expected):
    prefix = read_manifest(copy).prefixes[0]
    reason = expected.format(**vars(prefix))
    edit_manifest(copy, lambda m: m["prefixes"][0].update(changes))
    said: list[str] = []
    model = load(copy, log=said.append)
    assert said[-1] == f"{copy}: prefix 'fox' is not used here: {reason}"
    assert model.chat(messages("cat"), PARAMS).timing.cached_tokens == 0
    assert f"  prefix    fox: {prefix.tokens} tokens, not used: {reason}" in cli("check", copy).stdout
    assert f"not compared: {reason}" in cli("verify", copy).stdout


def test_programs_compiled_here_do_not_use_it(prefixed_artifact):
    manifest = read_manifest(prefixed_artifact)
    target = next(t for t in manifest.targets if t.name == manifest.prefixes[0].target)
    compiled = replace(target, runtime="stablehlo", jaxlib="any")
    assert obstacle(manifest.prefixes[0], manifest, compiled, manifest.prefixes[0].isa) == (
        f"executables of target {target.name!r} computed it, but programs compiled here may differ"
    )


def test_a_store_carries_it(prefixed_artifact, own_cache, tmp_path):
    url = f"file://{tmp_path / 'store'}/tiny"
    push(prefixed_artifact, url)
    model = load(url, log=lambda _: None)
    found = model.chat(messages("cat"), PARAMS)
    assert found.timing.cached_tokens == model.manifest.prefixes[0].tokens


# --- damage -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["file", "arrays"])
@pytest.mark.parametrize("how", ["flipped", "truncated", "missing"])
def test_damaged_files_are_refused(copy, own_cache, which, how):
    path = copy / getattr(read_manifest(copy).prefixes[0], which)
    data = path.read_bytes()
    if how == "missing":
        path.unlink()
    else:
        path.write_bytes(data[:-1] if how == "truncated" else data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(PrecastError) as error:
        load(copy)
    assert str(error.value).startswith(f"{copy}: file {path.relative_to(copy).as_posix()!r} ")


AGAIN = "remove the prefix with precast remove-prefix, and add it again"
TOKENS = {
    "fewer": (b"[1, 2]", "expected a list of {n} token ids, found 2"),
    "object": (b"{}", "expected a list of {n} token ids, found something else"),
    "cut": (
        b"[1, 2",
        "expected JSON, found something else (Expecting ',' delimiter: line 1 column 6 (char 5))",
    ),
    "vocabulary": (None, "expected token ids from 0 to 319, found 320"),
}


@pytest.mark.parametrize("what", TOKENS)
def test_listed_files_of_other_contents_are_refused(copy, what):
    prefix = read_manifest(copy).prefixes[0]
    data, expected = TOKENS[what]
    (copy / prefix.file).write_bytes(data or json.dumps([320] * prefix.tokens).encode())
    relist(copy, prefix.file)
    with pytest.raises(PrecastError) as error:
        load(copy)
    text = expected.format(n=prefix.tokens)
    assert str(error.value) == f"{copy / prefix.file}: {text}; {AGAIN}."
    remove_prefix(copy, "fox", log=lambda _: None)
    add(copy)
    load(copy)


def test_arrays_of_another_model_are_refused(copy):
    prefix = read_manifest(copy).prefixes[0]
    from precast.loaders.artifact.weights import file_parts

    (copy / prefix.arrays).write_bytes(
        b"".join(file_parts({"cache.keys": np.zeros((3, 2, 4, 12), np.float32)}, {}))
    )
    relist(copy, prefix.arrays)
    with pytest.raises(PrecastError) as error:
        load(copy)
    assert str(error.value) == (
        f"{copy / prefix.arrays}: expected 'cache.keys' as float32 [3, 2, {prefix.tokens}, 12], found float32 [3, 2, 4,"
        f" 12], so the file is damaged; {AGAIN}."
    )


# --- refusals and writing ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["", "a/b", "../x", ".hidden", "ü", "x" * 65, "a b", "a\\b"])
def test_unsuitable_names_are_refused(tiny_artifact, name):
    assert refusal(tiny_artifact, name) == (
        "prefix: expected a name of 1 to 64 letters, digits, '-', '_' or '.', not beginning with '.', found"
        f" {name!r:.80}; choose another name."
    )


def test_a_taken_name_is_replaced_on_request(copy):
    assert refusal(copy) == (
        f"{copy}: prefix 'fox' exists already; replace it with --overwrite, or choose another name."
    )
    before = read_manifest(copy).prefixes[0]
    change = add(copy, "fox", PrefixSource(text="the lazy dog jumps"), overwrite=True)
    assert change.has_replaced
    (after,) = read_manifest(copy).prefixes
    assert after.file == "prefixes/fox.2/tokens.json"
    assert after.tokens != before.tokens
    assert check_files(copy, read_manifest(copy)).problems == ()
    assert unlisted_files(copy, read_manifest(copy).files) == []


def test_text_that_is_no_prefix(artifact_copy):
    before = sorted(artifact_copy.rglob("*"))
    assert refusal(artifact_copy, "x", PrefixSource(text="")) == (
        "prefix: expected some text, found none; give a file that is not empty."
    )
    text = "the cat sat on the mat " * 20
    assert refusal(artifact_copy, "x", PrefixSource(system=text)).startswith("prefix: ")
    assert refusal(artifact_copy, "x", PrefixSource(system=text)).endswith(
        " tokens leave no room in a context of 64; shorten it to 63 or fewer, or export with a larger --context."
    )
    assert sorted(artifact_copy.rglob("*")) == before


def test_targets_without_reproducible_keys_are_refused(artifact_copy, monkeypatch):
    monkeypatch.setattr(adding, "is_reproducible", lambda _: False)
    name = read_manifest(artifact_copy).targets[0].name
    assert refusal(artifact_copy) == (
        f"{artifact_copy}: target {name!r} cannot reuse keys and values; choose a target with precast's CPU kernels"
        " (--target), or add one with precast add-target."
    )


def test_remove(copy, prefixed_artifact, tiny_artifact, cli):
    assert cli("remove-prefix", copy, "cat").stderr == (
        f"error: {copy}: the artifact has no prefix 'cat'; choose one of its prefixes: 'fox'.\n"
    )
    removed = cli("remove-prefix", copy, "fox")
    assert (removed.exit_code, removed.stdout.startswith(f"{copy}: prefix fox removed: ")) == (0, True)
    assert not (copy / "prefixes").exists()
    assert read_manifest(copy) == read_manifest(tiny_artifact)
    with pytest.raises(PrecastError, match="has no prefix 'fox'; add it with precast add-prefix"):
        remove_prefix(copy, "fox", log=print)


def test_a_signature_is_removed(copy):
    (copy / "manifest.json.sig").write_text("signed")
    assert remove_prefix(copy, "fox", log=print).signature_removed
    assert not (copy / "manifest.json.sig").exists()


class Stop(BaseException):
    """An exception that no code handles, like a signal that ends the process."""


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), Stop()], ids=["full", "stop"]
)
@pytest.mark.parametrize("is_killed", [False, True])
def test_the_artifact_is_whole_whatever_fails(copy, tmp_path, tree, monkeypatch, error, is_killed):
    """Add a second prefix, and fail at each change of a file in turn, with and without clean-up."""
    model = load(copy)
    monkeypatch.setattr(adding, "load", lambda *_, **__: model)
    source, before = PrefixSource(text="the lazy dog jumps"), tree(copy)
    for n in range(1, 100):
        shutil.rmtree(copy)
        for name, data in before.items():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            (copy / name).write_bytes(data)
        seen: list[str] = []
        with monkeypatch.context() as patch:
            for owner, name in (
                (Path, "mkdir"),
                (Path, "rename"),
                (Path, "replace"),
                (Path, "unlink"),
                (os, "fsync"),
            ):
                patch.setattr(owner, name, failing(getattr(owner, name), seen, n, error))
            if is_killed:
                patch.setattr(artifact_changes, "_settle", lambda *_: None)
                patch.setattr(folders, "remove", lambda _: None)
            with suppress(PrecastError, Stop):
                add(copy, "dog", source)
        manifest = read_manifest(copy)
        assert check_files(copy, manifest).problems == ()
        add(copy, "dog", source, overwrite=True)
        manifest = read_manifest(copy)
        assert set(tree(copy)) == {*manifest.files, "manifest.json"}
        assert {p.name for p in manifest.prefixes} == {"fox", "dog"}
        if len(seen) < n:
            break
    assert 8 < n < 99


def failing(real, seen, n, error):
    def call(*arguments, **options):
        seen.append("")
        if len(seen) == n:
            raise error
        return real(*arguments, **options)

    return call


def test_a_read_only_artifact(copy, monkeypatch):
    def read_only(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "mkdir", read_only)
    assert refusal(copy, "dog") == (
        f"{copy}: its prefixes cannot be changed (Read-only file system); copy the artifact to a writable folder on a"
        " disk with free space."
    )


# --- the command ------------------------------------------------------------------------------------------------


def test_the_command(cli, artifact_copy, tmp_path):
    (tmp_path / "system.txt").write_text(SYSTEM)
    (tmp_path / "chat.json").write_text(json.dumps(messages("cat")))
    result = cli("add-prefix", artifact_copy, "fox", "--system", tmp_path / "system.txt")
    assert result.exit_code == 0, result.output
    prefix = read_manifest(artifact_copy).prefixes[0]
    assert result.stdout.splitlines()[1] == (
        f"  target {prefix.target} with kernels for {prefix.isa} reuses it in prompts that begin with the prefix"
    )
    chat = ("--chat", tmp_path / "chat.json", "--template-variable", "mood=1")
    assert cli("add-prefix", artifact_copy, "chat", *chat).exit_code == 0


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ((), "add-prefix: expected one of --system, --chat and --text; give exactly one."),
        (
            ("--system", "s", "--text", "s"),
            "add-prefix: expected one of --system, --chat and --text; give exactly one.",
        ),
        (
            ("--text", "s", "--tools", "t"),
            "add-prefix: --tools needs a chat template; give --system or --chat instead of --text.",
        ),
        (
            ("--text", "s", "--template-variable", "a=1"),
            "add-prefix: --template-variable needs a chat template; give --system or --chat instead of --text.",
        ),
        (("--text", "missing"), "missing: cannot be read (No such file or directory); check the path."),
        (("--text", "bytes"), "bytes: expected UTF-8 text, found other bytes; convert the file."),
        (
            ("--chat", "object"),
            "object: expected a list of messages, found something else; write a JSON list of objects.",
        ),
        (
            ("--chat", "cut"),
            (
                "cut: expected JSON, found something else (Expecting value: line 1 column 2 (char 1)); write a JSON"
                " list of objects."
            ),
        ),
    ],
)
def test_unsuitable_options(cli, tiny_artifact, tmp_path, monkeypatch, options, expected):
    monkeypatch.chdir(tmp_path)
    Path("bytes").write_bytes(b"\xff\xfe")
    Path("object").write_text("{}")
    Path("cut").write_text("[")
    result = cli("add-prefix", tiny_artifact, "x", *options)
    assert (result.exit_code, result.stderr) == (2, f"error: {expected}\n")
