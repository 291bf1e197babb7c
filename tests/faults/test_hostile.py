"""FAULTS 1 to 7: malicious artifacts and checkpoints. Every hash in them is correct."""

import ast
import json
import os
import pickle
import re
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
PROGRAM = "programs/cpu/decode.xla"


class Payload:
    """A pickle that creates a file when loaded."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


# --- 1: pickles ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (PROGRAM, "XLA does not load this executable"),
        ("weights.safetensors", "weights.safetensors: "),
        ("tokenizer.json", "tokenizer.json"),
        ("chat_template.jinja", "chat_template.jinja is not UTF-8 text; export the model again."),
        ("manifest.json", "manifest.json: expected JSON, found something else"),
    ],
)
def test_fault_01_no_pickle_is_ever_read(artifact_copy, put, run_refused, tmp_path, name, text):
    proof = pickle.dumps(Payload(tmp_path / "ran"))
    if name == "manifest.json":
        (artifact_copy / name).write_bytes(proof)
    else:
        put(artifact_copy, name, proof)
    assert text in run_refused(artifact_copy)
    assert not (tmp_path / "ran").exists()
    pickle.loads(proof)  # the exploit works
    assert (tmp_path / "ran").exists()


def test_fault_01_what_jax_itself_serialises_is_a_pickle_and_refused(artifact_copy, put, run_refused):
    import jax
    from jax.experimental.serialize_executable import serialize

    payload, _, _ = serialize(jax.jit(lambda x: x + 1).lower(1.0).compile())
    assert payload[:1] == pickle.PROTO
    put(artifact_copy, PROGRAM, payload)
    assert f"{artifact_copy / PROGRAM}: XLA does not load this executable" in run_refused(artifact_copy)


def test_fault_01_nothing_that_unpickles_is_imported():
    readers = {"pickle", "_pickle", "cPickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}
    checked = 0
    for path in (*(ROOT / "loaders").rglob("*.py"), *(ROOT / "exporter").rglob("*.py"), ROOT / "cli.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            names = [a.name for a in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert readers.isdisjoint(name.partition(".")[0] for name in names), path
            assert not (isinstance(node, ast.keyword) and node.arg == "allow_pickle"), path
        checked += 1
    assert checked > 50


# --- 2: chat templates --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "'__class__' of 'str' object is unsafe"),
        ("{{ cycler.__init__.__globals__.os.mkdir('ran') }}", "'__init__' of 'type' object is unsafe"),
        ("{{ messages.__init__.__globals__ }}", "'__init__' of 'list' object is unsafe"),
        ("{{ self.__init__.__globals__['__builtins__'] }}", "is unsafe"),
        ("{{ ('%s' | format)['__globals__'] }}", ""),
        ("{{ '{0.__class__.__init__.__globals__}'.format(messages) }}", "unsafe"),
        ("{{ raise_exception.__globals__['os'].mkdir('ran') }}", "unsafe"),
        ("{% include '/etc/passwd' %}", "another template cannot be included here"),
        ("{% import 'os' as os %}{{ os.mkdir('ran') }}", "another template cannot be included here"),
        ("{% for a in range(99999) %}" + "{% set b = 1 %}" * 99 + "{% endfor %}", "was stopped, because it"),
        ("{% macro f(n) %}{{ f(n) }}{{ f(n) }}{% endmacro %}{{ f(1) }}", ""),
        ("{{ 'x' * 10 ** 12 }}", "one operation would take more than 2,000,000 steps"),
        ("{{ 10 ** (10 ** 10) }}", "a number grew beyond 4096 bits"),
        (
            "{% for a in range(9000) %}" + "x" * 9999 + "{% endfor %}",
            "the prompt grew beyond 16,777,216 characters",
        ),
    ],
)
def test_fault_02_a_chat_template_neither_escapes_nor_loops(
    artifact_copy, put, refusal, tmp_path, monkeypatch, template, text
):
    monkeypatch.chdir(tmp_path)
    put(artifact_copy, "chat_template.jinja", template.encode())
    found = refusal("run", artifact_copy, "--chat", "-p", "hello")
    assert "chat template" in found
    assert text in found
    assert not (tmp_path / "ran").exists()


# --- 3: code hooks ------------------------------------------------------------------------------------------

HOOK = {"AutoModelForCausalLM": "hook.Model", "AutoConfig": "hook.Config", "AutoTokenizer": ["hook.T", None]}


@pytest.mark.parametrize(
    ("name", "hook"),
    [
        ("config.json", {"auto_map": HOOK}),
        ("config.json", {"auto_map": {}}),
        ("config.json", {"custom_pipelines": {"text-generation": {"impl": "hook.Pipeline"}}}),
        ("config.json", {"trust_remote_code": True}),
        ("tokenizer_config.json", {"auto_map": HOOK}),
        ("tokenizer_config.json", {"tokenizer_class": "hook.Tokenizer", "auto_map": HOOK}),
    ],
)
def test_fault_03_a_code_hook_in_a_checkpoint_is_never_followed(
    cli, tiny_checkpoint, tmp_path, monkeypatch, name, hook
):
    folder = tiny_checkpoint()
    (folder / "hook.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'ran')!r})\n")
    before = json.loads((folder / name).read_text()) if (folder / name).exists() else {}
    (folder / name).write_text(json.dumps(before | hook))
    monkeypatch.syspath_prepend(folder)
    options = ("--buckets", "8", "--context", "64", "--weights", "float32")
    result = cli("export", folder, "-o", tmp_path / "out", *options)
    assert not (tmp_path / "ran").exists()
    assert result.exit_code == 2, result.output
    assert list(hook)[-1] in result.stderr
    assert not (tmp_path / "out").exists()


def test_fault_03_a_manifest_has_no_place_for_a_hook(artifact_copy, edit_manifest, run_refused):
    for place in ((), ("model",), ("tokenizer",), ("provenance",)):

        def hook(manifest, place=place):
            for key in place:
                manifest = manifest[key]
            manifest["auto_map"] = HOOK

        before = (artifact_copy / "manifest.json").read_bytes()
        edit_manifest(artifact_copy, hook)
        assert "key 'auto_map' is not known to this format version" in run_refused(artifact_copy)
        (artifact_copy / "manifest.json").write_bytes(before)


# --- 4: paths -----------------------------------------------------------------------------------------------


def rename_file(manifest, old, new):
    manifest["files"][new] = manifest["files"].pop(old)
    text = json.dumps({k: v for k, v in manifest.items() if k != "files"}).replace(
        json.dumps(old), json.dumps(new)
    )
    manifest |= json.loads(text)


@pytest.mark.parametrize(
    "name",
    [
        "../secret",
        "/etc/hostname",
        "programs/../../secret",
        "./secret",
        "programs//secret",
        "a\\..\\secret",
        "x\0",
        "",
    ],
)
@pytest.mark.parametrize("file", [PROGRAM, "tokenizer.json", "golden.json"])
def test_fault_04_a_name_never_leaves_the_folder(artifact_copy, edit_manifest, cli, tmp_path, name, file):
    (tmp_path / "secret").write_bytes((artifact_copy / file).read_bytes())
    edit_manifest(artifact_copy, lambda manifest: rename_file(manifest, file, name))
    commands = [("verify", artifact_copy)]
    if file != "golden.json":  # only verify reads it
        commands.append(("run", artifact_copy, "--ids", "7"))
    for command in commands:
        result = cli(*command)
        assert result.exit_code in (1, 2), result.output
        assert f"{name!r} is not a valid name for a file of an artifact" in result.output


@pytest.mark.parametrize(
    ("file", "kind"),
    [
        (PROGRAM, "linked folder"),
        *(
            (file, kind)
            for file in (PROGRAM, "tokenizer.json", "weights.safetensors", "golden.json")
            for kind in ("link", "folder", "pipe")
        ),
    ],
)
def test_fault_04_links_and_what_is_no_file_are_refused(artifact_copy, cli, tmp_path, file, kind):
    path = artifact_copy / file
    if kind == "linked folder":
        path.parent.rename(tmp_path / "elsewhere")
        path.parent.symlink_to(tmp_path / "elsewhere")
    else:
        path.rename(tmp_path / "elsewhere")
        make = {"link": lambda: path.symlink_to(tmp_path / "elsewhere"), "folder": path.mkdir}
        make.get(kind, lambda: os.mkfifo(path))()
    name = "programs/cpu/[a-z_0-9]+.xla" if kind == "linked folder" else re.escape(file)
    text = (
        rf"expected '{name}' to be a plain file inside the artifact, found a symlink or a folder;"
        r" copy the artifact again\."
    )
    result = cli("verify", artifact_copy)
    assert result.exit_code == 1
    assert re.search(text, result.stdout)
    if file != "golden.json":
        result = cli("run", artifact_copy, "--ids", "7")
        assert result.exit_code == 2
        assert re.search(text, result.stderr)


def test_fault_04_a_link_in_place_of_the_manifest_is_refused(artifact_copy, refusal, tmp_path):
    path = artifact_copy / "manifest.json"
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    for command in (
        ("run", artifact_copy, "--ids", "7"),
        ("check", artifact_copy),
        ("verify", artifact_copy),
    ):
        assert "expected 'manifest.json' to be a plain file inside the artifact" in refusal(*command)


def test_fault_04_a_hard_link_shows_nothing_of_what_it_leads_to(
    artifact_copy, run_refused, tmp_path, own_cache
):
    """A hard link looks like a regular file, but precast neither uses nor shows contents with another hash."""
    secret = tmp_path / "secret"
    secret.write_text("the launch code is 0000")
    path = artifact_copy / "tokenizer.json"
    path.unlink()
    os.link(secret, path)
    text = run_refused(artifact_copy)
    assert "file 'tokenizer.json' has 23 bytes, expected" in text
    assert "launch" not in text
    assert secret.read_text() == "the launch code is 0000"


# --- 5: offsets and sizes -----------------------------------------------------------------------------------


def header_of(data: bytes) -> tuple[dict, bytes]:
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def weights_with(data: bytes, change) -> bytes:
    header, rest = header_of(data)
    change(header)
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % 64)
    return len(text).to_bytes(8, "little") + text + rest


NORM = "model.norm.weight"


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda h: h[NORM].update(data_offsets=[0, 192]), "begins at byte"),
        (lambda h: h[NORM].update(data_offsets=[10**9, 10**9 + 192]), "begins at byte"),
        (lambda h: h[NORM].update(data_offsets=[2**64 - 192, 2**64]), "is invalid ("),
        (lambda h: h[NORM].update(data_offsets=[-192, 0]), "is invalid ("),
        (lambda h: h[NORM].update(data_offsets=[192, 0]), "is invalid ("),
        (lambda h: h[NORM].update(data_offsets=[0.0, 192.0]), "is invalid ("),
        (lambda h: h[NORM].update(shape=[2**62, 2**62], data_offsets=[0, 0]), "is invalid ("),
        (lambda h: h[NORM].update(shape=[2**32, 2**32 + 48]), "is invalid ("),
        (lambda h: h[NORM].update(shape=[48, 0]), "is invalid ("),
        (lambda h: h[NORM].update(shape=[1] * 65), "is invalid ("),
        (lambda h: h.update(more={"dtype": "F32", "shape": [0], "data_offsets": [7, 7]}), "begins at byte"),
        (lambda h: h.pop(NORM), "begins at byte"),
    ],
)
def test_fault_05_offsets_and_sizes_that_lie(artifact_copy, put, run_refused, change, text):
    data = (artifact_copy / "weights.safetensors").read_bytes()
    put(artifact_copy, "weights.safetensors", weights_with(data, change))
    found = run_refused(artifact_copy)
    assert text in found
    assert f"{artifact_copy}/weights.safetensors: " in found


@pytest.mark.parametrize("length", [2**64 - 1, 2**63, 2**40, 10**6])
def test_fault_05_a_header_longer_than_its_file(artifact_copy, put, run_refused, length):
    data = (artifact_copy / "weights.safetensors").read_bytes()
    put(artifact_copy, "weights.safetensors", length.to_bytes(8, "little") + data[8:])
    assert (
        "expected a safetensors file, found no valid header length; copy or export the artifact again."
        in run_refused(artifact_copy)
    )


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda m: m["files"]["weights.safetensors"].update(bytes=2**63), "from 0 to 2^63 - 1"),
        (lambda m: m["files"]["weights.safetensors"].update(bytes=-1), "from 0 to 2^63 - 1"),
        (lambda m: m["cache"][0].update(shape=[2**31] * 5), "cache 'cache.keys'"),
        (lambda m: m["cache"][0].update(bytes=2**63 - 1), "cache 'cache.keys': bytes"),
        (lambda m: m["model"].update(vocab=2**40), "expected"),
    ],
)
def test_fault_05_numbers_of_a_manifest_that_lie(artifact_copy, edit_manifest, run_refused, change, text):
    edit_manifest(artifact_copy, change)
    assert text in run_refused(artifact_copy)


def test_fault_05_a_manifest_that_lies_about_a_model_consistently(artifact_copy, run_refused, edit_manifest):
    """The manifest claims twice the positions that the programs were compiled for, which the trial detects."""

    def double(manifest):
        manifest["capacity"] *= 2
        for value in (*manifest["cache"], *values_of(manifest)):
            if value["name"] in ("cache.keys", "cache.values"):
                value["shape"][value["shape"].index(64)] *= 2
        for array in manifest["cache"]:
            array["bytes"] *= 2

    edit_manifest(artifact_copy, double)
    assert (
        "its programs allocate 147456 bytes for 'cache.keys', but the manifest states 294912;"
        in run_refused(artifact_copy)
    )


def values_of(manifest):
    for target in manifest["targets"]:
        for program in target["programs"]:
            yield from (*program["arguments"], *program["results"])


# --- 6: bombs -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (
            b" " * (16 << 20) + b"{}",
            "expected at most 16777216 bytes, found 16777218; copy or export the artifact again.",
        ),
        (b'{"a":' * 200_000, "nested too deeply"),
        (b"[" * 1_000_000, "nested too deeply"),
        (b'{"format_version": 5, "format_version": 5}', "a key occurs twice in one object"),
        (
            b'{"format_version": 99}',
            "expected format version 4 to 7, found 99; update precast.",
        ),
        (b'{"format_version": ' + b"9" * 5000 + b"}", "manifest.json: "),
        (b'{"format_version": 1e999}', "manifest.json: "),
        (b'{"format_version": 5, "name": "' + b"x" * (1 << 20) + b'"}', "key 'buckets' is missing"),
    ],
)
def test_fault_06_a_manifest_that_is_a_bomb(artifact_copy, refusal, data, text):
    (artifact_copy / "manifest.json").write_bytes(data)
    for command in (
        ("run", artifact_copy, "--ids", "7"),
        ("check", artifact_copy),
        ("inspect", artifact_copy),
    ):
        found = refusal(*command)
        assert text in found
        assert len(found) < 5000


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda m: m.update(slots=2**40), "exceed any machine's memory"),
        (lambda m: m.update(capacity=2**40), "exceed any machine's memory"),
        (lambda m: m.update(buckets=list(range(1, 10**5))), "expected lengths from 1 to the context"),
        (lambda m: m["model"].update(layers=2**40), "number of layers: expected 1099511627776, found 3"),
        (lambda m: m.update(targets=m["targets"] * 50), "targets of this name: expected 1, found 50"),
    ],
)
def test_fault_06_counts_without_bound(artifact_copy, edit_manifest, run_refused, change, text):
    edit_manifest(artifact_copy, change)
    assert text in run_refused(artifact_copy)


def test_fault_06_a_weights_header_that_is_a_bomb(artifact_copy, put, run_refused):
    for text, expected in (
        (b'{"a":' * 100_000, "nested too deeply"),
        (b'{"a":1,"a":1}', "a key occurs twice in one object"),
        (b"x" * 128, "expected JSON"),
        (b"[]" + b" " * 62, "expected a safetensors header, found []"),
        (
            b" " * (17 << 20),
            "expected at most 16777216 bytes of JSON, found 17825792; copy or export the artifact again.",
        ),
    ):
        put(artifact_copy, "weights.safetensors", len(text).to_bytes(8, "little") + text + bytes(64))
        assert expected in run_refused(artifact_copy)


@pytest.mark.parametrize("shift", [1, 4, 8, 63])
def test_fault_06_weights_out_of_alignment_are_used_or_refused_but_never_wrong(
    artifact_copy, put, answers, tiny_artifact, shift
):
    data = (artifact_copy / "weights.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + length] + b" " * shift
    put(artifact_copy, "weights.safetensors", len(header).to_bytes(8, "little") + header + data[8 + length :])
    assert answers(artifact_copy) == answers(tiny_artifact)


# --- 7: vocabularies and texts ------------------------------------------------------------------------------


def vocabulary(data: bytes, entries: dict, *, byte_fallback: bool = True) -> bytes:
    tokenizer = json.loads(data)
    tokenizer["model"]["vocab"] |= entries
    tokenizer["model"]["byte_fallback"] = byte_fallback
    if byte_fallback:
        tokenizer["decoder"] = {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]}
    return json.dumps(tokenizer).encode()


@pytest.mark.parametrize(
    "entry", ["<0x-1>", "<0xZZ>", "<0x100>", "<0x>", "<0xFF", "<0x😀>", "\0", "", "x" * 10**6]
)
def test_fault_07_a_hostile_vocabulary_entry_is_a_token_like_any_other(artifact_copy, put, cli, entry):
    data = (artifact_copy / "tokenizer.json").read_bytes()
    put(artifact_copy, "tokenizer.json", vocabulary(data, {entry: 310}))
    for prompt in ("<0x-1> <0x41>", "hello \ud83d\ude00".encode("utf-16", "surrogatepass").decode("utf-16")):
        result = cli("run", artifact_copy, "-p", prompt, "-n", "50", "--temperature", "5", "--seed", "1")
        assert result.exit_code == 0, result.output
    result = cli("run", artifact_copy, "--ids", "310,310", "-n", "2")
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize("token", [-1, 2**32, 2**64, 1.5, "7", None])
def test_fault_07_a_token_id_that_is_none_is_refused(artifact_copy, put, run_refused, token):
    data = (artifact_copy / "tokenizer.json").read_bytes()
    put(artifact_copy, "tokenizer.json", vocabulary(data, {"evil": token}))
    assert "tokenizer.json" in run_refused(artifact_copy)


def test_fault_07_an_id_beyond_the_model_never_reaches_it(artifact_copy, put, refusal):
    tokenizer = json.loads((artifact_copy / "tokenizer.json").read_bytes())
    added = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    tokenizer["added_tokens"].append({"id": 4_000_000_000, "content": "<evil>", **added})
    tokenizer["model"]["vocab"]["<evil>"] = 4_000_000_000
    put(artifact_copy, "tokenizer.json", json.dumps(tokenizer).encode())
    found = refusal("run", artifact_copy, "-p", "<evil>")
    assert found == (
        "prompt: expected token ids from 0 to 319, found 4000000000 at index 0; leave out '<evil>', for which the"
        " model has no embedding."
    )


def test_fault_07_an_enormous_text_is_refused(tiny_artifact, refusal):
    text = refusal("run", tiny_artifact, stdin="fox " * 50_000)
    assert "tokens leave no room in a context of 64; shorten it to 63 or fewer" in text
    assert len(text) < 300


def test_fault_07_enormous_ids_are_refused(tiny_artifact):
    from precast.loaders.artifact.errors import PrecastError
    from precast.loaders.load import load

    model = load(tiny_artifact)
    for ids in ([2**63], [-1], [10**30], np.array([2**31], np.int64), [float("nan")]):
        with pytest.raises(
            PrecastError, match=r"prompt: expected token ids from 0 to 319, found .* at index 0\."
        ):
            model.generate(ids)
