"""The command ``precast run``: its text, its JSON, and its options."""

import hashlib
import io
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

PROMPT = "7,200,31"
# Scripts read these fields.
FIELDS = ["text", "token_ids", "prompt_token_ids", "finish_reason", "timing", "target", "compiles"]
TIMING = [
    "import_s",
    "load_s",
    "prefill_s",
    "first_token_s",
    "decode_tokens_per_s",
    "cached_tokens",
    "target",
]


# --- run ----------------------------------------------------------------------------------------------------


def test_the_record_has_exactly_its_fields(record, tiny_artifact, tiny_model, answer):
    found = record(tiny_artifact, "--ids", PROMPT, "--ignore-eos")
    assert list(found) == FIELDS
    assert list(found["timing"]) == TIMING
    assert found["text"] == answer.text
    assert found["token_ids"] == list(answer.token_ids)
    assert found["prompt_token_ids"] == [7, 200, 31]
    assert found["finish_reason"] == "length"
    assert found["target"] == tiny_model.target.name
    assert found["compiles"] == 0


def test_the_times_of_a_fresh_process_add_up(tiny_artifact, python):
    result = python("cli.py", "run", str(tiny_artifact), "--ids", PROMPT, "--ignore-eos", "--json")
    assert result.returncode == 0, result.stderr
    timing = json.loads(result.stdout)["timing"]
    assert timing.pop("target").startswith("cpu-")
    assert timing.pop("cached_tokens") == 0
    assert all(value > 0 for value in timing.values())
    assert timing["first_token_s"] >= timing["import_s"] + timing["load_s"] + timing["prefill_s"] - 1e-3
    assert timing["first_token_s"] < 60


def test_text_goes_to_standard_output_and_nothing_else(cli, tiny_artifact, answer):
    result = cli("run", tiny_artifact, "--ids", PROMPT, "--ignore-eos")
    assert result.exit_code == 0
    assert result.stdout == answer.text + "\n"
    assert result.stderr == ""


def test_a_folder_with_one_artifact_will_do(record, tiny_artifact, answer):
    found = record(tiny_artifact.parent, "--ids", PROMPT, "--ignore-eos")
    assert found["token_ids"] == list(answer.token_ids)


def test_a_prompt_may_be_piped_in(record, tiny_artifact, tiny_model):
    text = "the quick brown fox\n"
    # The command echo and editors add one newline at the end.
    piped = record(tiny_artifact, stdin=text + "\n")
    assert piped["prompt_token_ids"] == tiny_model.tokenizer.encode(text)
    given = record(tiny_artifact, "-p", text)
    assert (given["token_ids"], given["text"]) == (piped["token_ids"], piped["text"])


@pytest.mark.parametrize(
    ("piped", "prompt"),
    [
        (b"\xef\xbb\xbfthe fox", "the fox"),
        (b"the fox\r\nthe dog\r\n", "the fox\nthe dog"),
        (b"\xef\xbb\xbfthe\r\n\r\n", "the\n"),
        (b"a\rb\n\r", "a\rb\n\r"),  # a carriage return without a newline is text
        (b"the \xef\xbb\xbffox", "the \ufefffox"),  # a byte order mark that is not at the start is text too
    ],
)
def test_a_piped_prompt_loses_the_byte_order_mark_and_crlf(
    record, tiny_artifact, tiny_model, monkeypatch, piped, prompt
):
    from precast.loaders.console import run as console

    # Use the real standard input, which translates nothing; click's replacement does.
    stdin = io.TextIOWrapper(io.BytesIO(piped), encoding="utf-8", newline="\n")
    monkeypatch.setattr(console, "sys", SimpleNamespace(stdin=stdin, stdout=sys.stdout, stderr=sys.stderr))
    found = record(tiny_artifact, "-n", "1")
    assert found["prompt_token_ids"] == tiny_model.tokenizer.encode(prompt)


def test_a_prompt_option_is_not_normalised(record, tiny_artifact, tiny_model):
    prompt = "\ufeffthe fox\r\nthe dog\r\n"
    found = record(tiny_artifact, "-n", "1", "-p", prompt)
    assert found["prompt_token_ids"] == tiny_model.tokenizer.encode(prompt)


def test_an_empty_system_message_counts(record, tiny_artifact, tiny_model):
    messages = [{"role": "system", "content": ""}, {"role": "user", "content": "the dog"}]
    found = record(tiny_artifact, "--system", "", "-p", "the dog", "-n", "1")
    assert found["prompt_token_ids"] == tiny_model.chat_prompt(messages)


# --- a terminal ---------------------------------------------------------------------------------------------


@pytest.fixture
def on_a_terminal(monkeypatch):
    """Make standard output a terminal for `console.run`."""
    from precast.loaders.console import run as console

    class Terminal:
        def __init__(self, stream):
            self._stream = stream

        def isatty(self):
            return True

        def __getattr__(self, name):
            return getattr(self._stream, name)

    class Sys:
        @property
        def stdout(self):
            return Terminal(sys.stdout)

        def __getattr__(self, name):
            return getattr(sys, name)

    def switch(on):
        monkeypatch.setattr(console, "sys", Sys() if on else sys)

    return switch


def test_model_text_cannot_control_a_terminal(cli, tiny_artifact, monkeypatch, on_a_terminal):
    """A file or a pipe receives the model's text unchanged."""
    from precast.loaders.generation.model import Model

    class Said(list):
        is_split = False

        def finish(self):
            return None

    said = Said(["a\x1b", "]52;c;eA==\x07", "b\r", "\n\x9b2J", "\u202e"])
    monkeypatch.setattr(Model, "stream", lambda *_: said)
    on_a_terminal(True)
    assert cli("run", tiny_artifact, "-p", "x").stdout == "a�]52;c;eA==�b\n�2J�\n"
    on_a_terminal(False)
    assert cli("run", tiny_artifact, "-p", "x").stdout_bytes.decode() == "".join(said) + "\n"


def test_json_cannot_control_a_terminal(cli, tiny_artifact, monkeypatch):
    from precast.loaders.generation.stream import Stream

    completion = SimpleNamespace(
        text="\x1b]0;x\x07\x9b2J\u202e é",
        token_ids=(),
        prompt_token_ids=(),
        finish_reason="stop",
        timing=SimpleNamespace(prefill_s=0.0, decode_tokens_per_s=0.0, cached_tokens=0),
        reasoning="\x1b]0;y\x07",
        tool_calls=(),
    )
    monkeypatch.setattr(Stream, "completion", completion)
    line = cli("run", tiny_artifact, "-p", "x", "--json").stdout
    assert line.removesuffix("\n").isprintable()
    assert "é" in line
    assert json.loads(line)["text"] == completion.text
    assert json.loads(line)["reasoning"] == completion.reasoning


def test_a_chat_goes_through_the_template(record, tiny_artifact, tiny_model):
    messages = [{"role": "system", "content": "be a cat"}, {"role": "user", "content": "the dog"}]
    found = record(tiny_artifact, "--chat", "--system", "be a cat", "-p", "the dog")
    assert found["prompt_token_ids"] == tiny_model.chat_prompt(messages)
    assert record(tiny_artifact, "--chat", stdin="the dog")["prompt_token_ids"] == tiny_model.chat_prompt(
        messages[1:]
    )


def test_a_literal_chat_forges_nothing(record, cli, tiny_artifact, tiny_model):
    messages = [{"role": "user", "content": "the </s> dog"}]
    found = record(tiny_artifact, "--literal", "-p", "the </s> dog")["prompt_token_ids"]
    assert found == tiny_model.chat_prompt(messages, literal=True)
    assert found.count(1) == tiny_model.chat_prompt(messages).count(1) - 1
    result = cli("run", tiny_artifact, "--literal", "--ids", "1,2")
    assert result.exit_code == 2
    assert (
        "--literal needs text to format with the chat template; use --prompt instead of --ids."
        in result.stderr
    )


def test_eos_ends_the_text_unless_it_is_ignored(record, artifact_copy, edit_manifest, answer):
    end = answer.token_ids[4]
    cut = answer.token_ids.index(end) + 1

    def change(manifest):
        manifest["tokenizer"]["eos_token_ids"] = [end]

    edit_manifest(artifact_copy, change)
    found = record(artifact_copy, "--ids", PROMPT)
    assert (found["finish_reason"], found["token_ids"]) == ("stop", list(answer.token_ids[:cut]))
    ignored = record(artifact_copy, "--ids", PROMPT, "--ignore-eos")
    assert (ignored["finish_reason"], ignored["token_ids"]) == ("length", list(answer.token_ids))


def test_max_tokens_and_stop(record, tiny_artifact, answer):
    found = record(tiny_artifact, "--ids", PROMPT, "--ignore-eos", "-n", "5")
    assert (found["token_ids"], found["finish_reason"]) == (list(answer.token_ids[:5]), "length")
    stop = answer.text[10:13]
    found = record(tiny_artifact, "--ids", PROMPT, "--ignore-eos", "--stop", "never", "--stop", stop)
    assert found["finish_reason"] == "stop"
    assert found["text"] == answer.text[: answer.text.index(stop)]


def test_the_same_seed_gives_the_same_text(record, tiny_artifact, answer):
    def sampled(seed):
        options = ("--temperature", "1.5", "--top-k", "50", "--top-p", "0.99", "--min-p", "0.001")
        return record(tiny_artifact, "--ids", PROMPT, "--ignore-eos", *options, "--seed", seed)["token_ids"]

    assert sampled(3) == sampled(3)
    assert len({tuple(sampled(seed)) for seed in range(4)} | {answer.token_ids}) == 5


def test_missing_options_take_the_model_s_defaults(record, artifact_copy, edit_manifest, answer, tiny_model):
    from precast.loaders.generation.sampling_params import SamplingParams

    edit_manifest(artifact_copy, lambda manifest: manifest["sampling"].update(repetition_penalty=1.7))
    own = record(artifact_copy, "--ids", PROMPT, "--ignore-eos")
    expected = tiny_model.generate([7, 200, 31], SamplingParams(repetition_penalty=1.7, ignore_eos=True))
    assert own["token_ids"] == list(expected.token_ids) != list(answer.token_ids)
    given = record(artifact_copy, "--ids", PROMPT, "--ignore-eos", "--repetition-penalty", "1")
    assert given["token_ids"] == list(answer.token_ids)


def test_the_model_s_own_lists_are_kept_beside_other_options(
    record, artifact_copy, edit_manifest, answer, tiny_model
):
    from precast.loaders.generation.sampling_params import SamplingParams

    first, second = answer.token_ids[:2]
    stop = tiny_model.tokenizer.decode([second])
    edit_manifest(
        artifact_copy, lambda manifest: manifest["sampling"].update(suppress_tokens=[first], stop=[stop])
    )
    own = record(artifact_copy, "--ids", PROMPT, "--ignore-eos", "--no-repeat-ngram-size", "1", "-n", "30")
    params = SamplingParams(
        suppress_tokens=[first], stop=[stop], no_repeat_ngram_size=1, ignore_eos=True, max_tokens=30
    )
    assert own["token_ids"] == list(tiny_model.generate([7, 200, 31], params).token_ids)
    assert first not in own["token_ids"]
    assert len(set(own["token_ids"])) == len(own["token_ids"])


@pytest.mark.parametrize(
    ("option", "value", "text"),
    [
        (
            "--temperature",
            "1e-300",
            "temperature must be a finite number of at least 0 that float32 can represent: 0, or",
        ),
        (
            "--top-p",
            "5e-324",
            "top_p must be a finite number between 0 and 1 that float32 can represent: 0, or",
        ),
        (
            "--repetition-penalty",
            "1e39",
            "repetition_penalty must be a finite number of at least 0 that float32 can represent",
        ),
        (
            "--top-k",
            str(2**80),
            "top_k must be an integer from 0 to 2^63 - 1, found 1208925819614629174706176.",
        ),
        (
            "--seed",
            str(2**128),
            "seed must be an integer from 0 to 2^128 - 1, found 34028236692093846346337460743",
        ),
        (
            "--presence-penalty",
            "2.5",
            "presence_penalty must be a finite number between -2 and 2, found 2.5.",
        ),
        (
            "--frequency-penalty",
            "-3",
            "frequency_penalty must be a finite number between -2 and 2, found -3.0.",
        ),
        ("--logit-bias", "5+101", "a bias of logit_bias must be a finite number between -100 and 100, found"),
        ("--logit-bias", "320+1", "token ids of logit_bias must be from 0 to 319, found 320."),
        (
            "--stop-token-id",
            "-1",
            "a token id of stop_token_ids must be an integer from 0 to 2^63 - 1, found -1.",
        ),
        ("--min-tokens", "-1", "min_tokens must be an integer from 0 to 2^63 - 1, found -1."),
    ],
)
def test_numbers_out_of_range_are_refused(cli, tiny_artifact, option, value, text):
    result = cli("run", tiny_artifact, "--ids", PROMPT, option, value)
    assert (result.exit_code, result.stdout) == (2, "")
    assert f"Sampling parameters: {text}" in result.stderr.replace("\n", " ")


def test_biases_penalties_and_further_ends(record, tiny_artifact, tiny_model, answer):
    from precast.loaders.generation.sampling_params import SamplingParams

    first, second = answer.token_ids[:2]
    options = ["--logit-bias", f"{first}-100", "--logit-bias", f"{second}+.5", "--bad-word", "cat"]
    options += [
        "--presence-penalty",
        "1.5",
        "--frequency-penalty",
        "0.5",
        "--stop-token-id",
        answer.token_ids[9],
    ]
    params = SamplingParams(
        logit_bias={first: -100, second: 0.5},
        bad_words=["cat"],
        presence_penalty=1.5,
        frequency_penalty=0.5,
        stop_token_ids=[answer.token_ids[9]],
        ignore_eos=True,
    )
    expected = tiny_model.generate([7, 200, 31], params).token_ids
    assert record(tiny_artifact, "--ids", PROMPT, "--ignore-eos", *options)["token_ids"] == list(expected)
    assert first not in expected


def test_log_probabilities(record, tiny_artifact, answer):
    found = record(
        tiny_artifact, "--ids", PROMPT, "--ignore-eos", "-n", "3", "--logprobs", "2", "--prompt-logprobs", "0"
    )
    assert (
        [item["token_id"] for item in found["logprobs"]] == list(answer.token_ids[:3]) == found["token_ids"]
    )
    for item in found["logprobs"]:
        assert [sorted(other) for other in item["top"]] == [["logprob", "text", "token_id"]] * 2
        assert item["top"][0] == {key: item[key] for key in ("token_id", "text", "logprob")}
        assert 0 >= item["logprob"] >= item["top"][1]["logprob"]
    assert found["prompt_logprobs"][0] is None
    assert [item["token_id"] for item in found["prompt_logprobs"][1:]] == [200, 31]
    assert all(item["top"] == [] for item in found["prompt_logprobs"][1:])


def test_several_answers_have_seeds_of_their_own(cli, record, tiny_artifact):
    options = (tiny_artifact, "--ids", PROMPT, "--ignore-eos", "-n", "6", "--temperature", "2")
    result = cli("run", *options, "--seed", "5", "--answers", "3", "--json")
    found = [json.loads(line)["token_ids"] for line in result.stdout.splitlines()]
    assert found == [record(*options, "--seed", seed)["token_ids"] for seed in (5, 6, 7)]
    assert len({tuple(ids) for ids in found}) == 3


def test_an_echo(record, tiny_artifact):
    plain = record(tiny_artifact, "-p", "the cat", "-n", "3")
    assert record(tiny_artifact, "-p", "the cat", "-n", "3", "--echo")["text"] == "the cat" + plain["text"]


def test_tools_reach_the_template(record, artifact_copy, tmp_path, edit_manifest):
    source = (
        "{% for tool in tools or [] %}{{ tool.name }}{% endfor %}{{ messages[-1].content }}{# <tool_call> #}"
    )
    (artifact_copy / "chat_template.jinja").write_text(source)
    entry = {"bytes": len(source), "sha256": hashlib.sha256(source.encode()).hexdigest()}
    edit_manifest(artifact_copy, lambda manifest: manifest["files"].update({"chat_template.jinja": entry}))
    tools = tmp_path / "tools.json"
    tools.write_text('[{"name": "look"}]')
    plain, given = (
        record(artifact_copy, "--chat", "-p", "the cat", "-n", "1", "--echo", *options)["text"]
        for options in ((), ("--tools", tools, "--answer-format", "hermes"))
    )
    assert given.startswith("lookthe cat")
    assert plain.startswith("the cat")


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--answers", "2"], "--answers needs --json, which prints one line for each answer; add --json."),
        (["--logprobs", "2"], "--logprobs needs --json, which prints one line for each answer; add --json."),
        (["--prompt-logprobs", "2"], "--prompt-logprobs needs --json, which prints one line for each answer; add"),
        (["--tools", "x"], "--tools needs a prompt formatted with the chat template; add --chat."),
        (["--answer-format", "x"], "--answer-format needs a prompt formatted with the chat template; add --chat."),
        (["--answers", "2", "--json", "--state", "x"], "--answers and --state cannot be combined; give one of them."),
        (["--echo", "--state", "x"], "--echo and --state cannot be combined; give one of them."),
        (["--tool-choice", "x"], "--tool-choice needs the tools to choose from; add --tools FILE."),
        (["--answers", "0", "--json"], "--answers: expected a number of at least 1, found 0."),
        (["--chat", "--tools", "/nowhere"], "--tools: cannot read /nowhere: No such file or directory."),
        (["--chat", "--tools", __file__], ": expected JSON, found something else (Extra data: line 1 column 3"),
        (["--chat", "--answer-format", "x"], "answer_format: expected one of gemma, granite, hermes, llama3,"),
    ],
)  # fmt: skip
def test_options_of_answers_are_checked(cli, tiny_artifact, options, text):
    result = cli("run", tiny_artifact, "-p", "the cat", *options)
    assert (result.exit_code, result.stdout) == (2, "")
    assert text in result.stderr


@pytest.mark.parametrize("value", ["5", "5+", "-5+1", "5+nan", "x+1", "5:1"])
def test_a_malformed_bias_is_a_usage_error(cli, tiny_artifact, value):
    result = cli("run", tiny_artifact, "--ids", PROMPT, "--logit-bias", value)
    assert result.exit_code == 2
    assert f"expected a token id and a signed number, such as 15043-1, found '{value}'." in result.stderr


def test_min_tokens(record, artifact_copy, edit_manifest, answer):
    def end_at_the_first(manifest):
        manifest["tokenizer"]["eos_token_ids"] = [answer.token_ids[0]]

    edit_manifest(artifact_copy, end_at_the_first)
    assert len(record(artifact_copy, "--ids", PROMPT)["token_ids"]) == 1
    found = record(artifact_copy, "--ids", PROMPT, "--min-tokens", "5", "-n", "9")["token_ids"]
    assert answer.token_ids[0] not in found[:4]
    assert len(found) >= 5


def test_compiling_happens_on_request_and_is_logged(cli, tiny_artifact, answer, own_cache):
    result = cli(
        "run", tiny_artifact, "--ids", PROMPT, "--ignore-eos", "--target", "portable", "--compile", "--json"
    )
    found = json.loads(result.stdout)
    assert (found["target"], found["compiles"], found["token_ids"]) == ("portable", 6, list(answer.token_ids))
    assert result.stderr.splitlines()[-1] == "compiling score from StableHLO …"


def test_rehash_hashes_unchanged_files_again(cli, artifact_copy):
    assert cli("run", artifact_copy, "--ids", PROMPT, "--rehash").exit_code == 0
    (artifact_copy / "golden.json").write_text("{}")
    result = cli("run", artifact_copy, "--ids", PROMPT, "--rehash")
    assert result.exit_code == 2
    assert "'golden.json'" in result.stderr


def test_malformed_numbers_are_a_usage_error(cli, tiny_artifact):
    for options in (["--ids", "1,x"], ["--ids", ""], ["--ids", "1,,2"]):
        result = cli("run", tiny_artifact, *options)
        assert result.exit_code == 2
        assert "expected whole numbers separated by commas" in result.stderr


def test_a_reader_that_leaves_early_is_not_an_error(tiny_artifact, python):
    code = (
        "import subprocess, sys\n"
        "run = subprocess.Popen([sys.executable, 'cli.py', 'run', sys.argv[1], '--ids', '7,200,31', '--ignore-eos'],\n"
        "    stdout=subprocess.PIPE, stderr=subprocess.PIPE)\n"
        "run.stdout.close()\n"
        "print(run.stderr.read().decode(), run.wait())"
    )
    result = python("-c", code, str(tiny_artifact))
    assert result.stdout.split() == ["1"]


@pytest.mark.parametrize("closed", ["<&-", ">&-", "<&- >&-"])
def test_a_process_without_its_streams(tiny_artifact, closed):
    """Shells and some supervisors start processes without streams; no file may get a stream's descriptor."""
    command = [sys.executable, "cli.py", "run", str(tiny_artifact)]
    result = subprocess.run(
        ["sh", "-c", f'exec "$@" {closed}', "sh", *command],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent.parent,
        timeout=120,
        check=False,
    )
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == (
        "error: prompt: expected at least one token, found none; give the model some text.\n"
    )
