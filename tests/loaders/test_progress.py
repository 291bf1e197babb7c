"""Progress on standard error: a changing line on a terminal, occasional lines elsewhere."""

import pytest

from precast.loaders import progress
from precast.loaders.progress import Step, progress_on_terminal, show_progress, silent


def test_a_step_replaces_the_one_before_on_a_terminal(terminal):
    with show_progress() as display:
        display(Step(text="reading the reference"))
        display(Step(text="hashing", done=1_000_000, total=2_500_000, unit="bytes"))
        display(Step(text="hashing", done=1_000_001, total=2_500_000, unit="bytes"))
        display(Step(text="answering", done=2, total=1000, unit="prompts"))
    assert terminal.getvalue().split("\r\x1b[K") == [
        "",
        "reading the reference …",
        "hashing: 1.0 of 2.5 MB",
        "answering: 2 of 1,000 prompts",
        "",
    ]


def test_elsewhere_a_line_is_printed_every_15_seconds_at_most(capsys):
    now = 0.0
    with show_progress(lambda: now) as display:
        for seconds, done in ((1, 1), (15, 2), (15, 3), (29, 4), (300, 100), (301, 1000), (400, 1000)):
            now = float(seconds)
            display(Step(text="scoring", done=done, total=1000, unit="predictions"))
    assert capsys.readouterr().err == (
        "scoring: 2 of 1,000 predictions, 116:26 left\nscoring: 100 of 1,000 predictions, 44:51 left\n"
    )


def test_the_time_left_is_that_of_the_current_work(capsys):
    now = 0.0
    with show_progress(lambda: now) as display:
        display(Step(text="hashing", done=5, total=5, unit="bytes"))
        now = 100.0
        display(Step(text="answering", done=0, total=4, unit="prompts"))
        now = 116.0
        display(Step(text="answering", done=1, total=4, unit="prompts"))
    assert capsys.readouterr().err == "answering: 0 of 4 prompts\nanswering: 1 of 4 prompts, 0:48 left\n"


def test_the_line_is_erased_when_the_work_fails(terminal):
    def fail():
        with show_progress() as display:
            display(Step(text="a name \x1b]0;x\x07\nand " + "x" * 100))
            raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        fail()
    assert terminal.getvalue() == f"\r\x1b[Ka name �]0;x� and {'x' * 61}\r\x1b[K"


def test_a_message_stays_on_the_screen(terminal):
    with show_progress() as display:
        display(Step(text="loading decode"))
        display.log("compiling \x1b[2J")
        display(Step(text="loading decode"))
    assert terminal.getvalue() == (
        "\r\x1b[Kloading decode …\r\x1b[Kcompiling �[2J\n\r\x1b[Kloading decode …\r\x1b[K"
    )


def test_silent_shows_nothing(terminal, capsys):
    silent(Step(text="hashing"))
    assert (terminal.getvalue(), *capsys.readouterr()) == ("", "", "")


def test_library_calls_show_progress_on_a_terminal_alone(terminal):
    with progress_on_terminal() as show:
        show(Step(text="pulling", done=1, total=2, unit="files"))
    assert "pulling: 1 of 2 files" in terminal.getvalue()


def test_library_calls_print_nothing_without_a_terminal(capsys, monkeypatch):
    monkeypatch.setattr(progress, "_PAUSE_S", 0.0)
    with progress_on_terminal() as show:
        for done in (1, 2):
            show(Step(text="pulling", done=done, total=3, unit="files"))
    assert capsys.readouterr().err == ""
