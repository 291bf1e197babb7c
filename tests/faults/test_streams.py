"""Standard streams that are closed, full, or without a reader: every command ends with a message by precast."""

import json
from pathlib import Path

import pytest

CLOSED = ("open", "closed 0", "closed 1", "closed 2")
EVERY = (*CLOSED, "full 1", "full 2", "left 1", "left 2")
WORKER = Path(__file__).with_name("streams.py")


@pytest.fixture(scope="module")
def found(tiny_artifact, python, tmp_path_factory):
    """Return exit code, output and errors, by command and streams."""
    folder = tmp_path_factory.mktemp("streams")
    text = folder / "prose.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 12)
    tiny, none = str(tiny_artifact), str(folder / "none")
    commands = {
        ("--help",): EVERY,
        ("run", tiny, "--ids", "7,200,31", "-n", "4"): EVERY,
        ("inspect", tiny): EVERY,
        ("diff", tiny, none): EVERY,
        ("--version",): CLOSED,
        ("run", tiny): CLOSED,  # a command that reads its standard input, which is empty
        ("run", "--help"): CLOSED,
        ("chat", tiny): CLOSED,
        ("list", tiny): CLOSED,
        ("check", tiny): CLOSED,
        ("verify", tiny): CLOSED,
        ("eval", tiny, "--text", str(text), "--tokens", "64", "--window", "64"): CLOSED,
        ("export", none): CLOSED,
        ("add-target", none): CLOSED,
        ("sign", none, "--key", none): CLOSED,
        ("push", none, f"file://{folder}/store/tiny"): CLOSED,
        ("pull", f"file://{folder}/store/tiny"): CLOSED,
    }
    result = python(str(WORKER), json.dumps(list(commands.items())))
    assert result.returncode == 0, result.stderr
    by_command = {}
    for command, streams, *rest in json.loads(result.stdout):
        by_command.setdefault(" ".join(command), {})[streams] = tuple(rest)
    assert len(by_command) == len(commands)
    return by_command


def test_no_stream_ends_in_a_traceback(found):
    told = [
        (command, streams, out, err)
        for command, results in found.items()
        for streams, (code, out, err) in results.items()
        if code not in (0, 1, 2) or "Traceback" in out + err or "Exception ignored" in out + err
    ]
    assert told == []


@pytest.mark.parametrize("streams", ["closed 0", "closed 1", "closed 2"])
def test_a_closed_stream_changes_nothing_else(found, streams):
    for command, results in found.items():
        code, out, err = results["open"]
        closed_code, closed_out, closed_err = results[streams]
        assert closed_code == code, command
        assert len(closed_out.splitlines()) == (0 if streams == "closed 1" else len(out.splitlines()))
        assert closed_err == ("" if streams == "closed 2" else err), command


def test_an_output_that_is_full_is_one_sentence(found):
    for command, results in found.items():
        if "full 1" not in results:
            continue
        code, out, err = results["open"]
        sentence = "error: standard output: No space left on device; redirect it elsewhere.\n"
        assert results["full 1"][::2] == ((2, sentence) if out else (code, err)), command


def test_a_reader_that_left_is_no_error(found):
    for command, results in found.items():
        if "left 1" not in results:
            continue
        code, out, err = results["open"]
        assert results["left 1"][::2] == ((1, "") if out else (code, err)), command


@pytest.mark.parametrize("streams", ["full 2", "left 2"])
def test_errors_that_nobody_reads_leave_the_exit_code(found, streams):
    for command, results in found.items():
        if streams in results:
            code, out, _ = results["open"]
            assert results[streams][:2] == (code, out), command
