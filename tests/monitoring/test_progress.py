"""What a run shows while it goes on: on a terminal of 80 columns, and where there is none."""

import atexit
import io
import re

import pytest
from rich.console import Console
from tiny_recipe import tiny_recipe

from dllm_rl.monitoring.json_lines import current_rows, warmup_rows
from dllm_rl.monitoring.progress import ProgressDisplay
from dllm_rl.training.trainer import train

pytestmark = pytest.mark.usefixtures("no_rehearsal")


def terminal(**changes):
    return Console(**{"file": io.StringIO(), "width": 80, "force_terminal": True, "color_system": None} | changes)


def test_a_bar_and_its_lines_fit_80_columns():
    console = terminal()
    view = ProgressDisplay(console, "training", 100_000, completed=99_900)
    for _ in range(50):
        view("reward 1234.5", show=False)
    view("", show=False, close=True)
    (line,) = {line for line in console.file.getvalue().replace("\r", "\n").split("\n") if "99950" in line}
    text = re.sub(r"\x1b\[[^A-Za-z]*[A-Za-z]", "", line)
    assert len(text) <= 80 and re.fullmatch(r"training +99950/100000 [━╸╺ ]+ \d:\d\d:\d\d ETA \d:\d\d:\d\d", text)
    assert view.bar.tasks[0].completed == 99_950, "the end is no step"


def test_a_terminal_is_redrawn_and_lines_stay_above():
    console = terminal()
    view = ProgressDisplay(console, "training", 2)
    view("reward 1", show=True)
    view("reward 2", show=False)
    text = console.file.getvalue()
    assert "training 1/2  reward 1\n" in text
    assert text.endswith("\x1b[?25h"), "the cursor is back"


def test_a_run_that_stops_by_an_error_gives_the_cursor_back(monkeypatch):
    at_exit, console = [], terminal()
    monkeypatch.setattr(atexit, "register", at_exit.append)
    view = ProgressDisplay(console, "training", 2)
    assert "\x1b[?25l" in console.file.getvalue()
    at_exit[0]()
    assert console.file.getvalue().endswith("\x1b[?25h")
    view.bar.stop()


def test_elsewhere_there_are_lines_alone():
    console = terminal(force_terminal=False)
    view = ProgressDisplay(console, "training", 2)
    view("reward 1", show=False)
    view("reward 2  healthy", show=True)
    assert console.file.getvalue() == "training 2/2  reward 2  healthy\n"


def test_a_notebook_gets_no_cursor_codes(tmp_path, monkeypatch, capsys):
    """A kernel sets FORCE_COLOR, which rich takes for a terminal; its standard output is none."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    train(tiny_recipe(tmp_path, num_steps=1))
    out = capsys.readouterr().out
    assert "training 1/1  reward" in out and not re.search(r"\x1b\[[^m]*[A-HJKhl]", out)


def clocked(total):
    now = [0.0]
    return ProgressDisplay(terminal(force_terminal=False, get_time=lambda: now[0]), "training", total), now


def shown_after(view, now, seconds):
    """The steps that got a line."""
    for step, duration in enumerate(seconds, 1):
        now[0] += duration
        view(f"text of {step}", show=False)
    return [int(step) for step in re.findall(r"text of (\d+)", view.bar.console.file.getvalue())]


def test_the_time_left_is_known_of_long_steps():
    """Rich's own speed forgets after 30 s, which one step of a large model takes."""
    view, now = clocked(10)
    assert shown_after(view, now, [100.0] * 3) == [2], "the first time left, and no further line unasked"
    assert view.bar.tasks[0].time_remaining == 700
    assert view.line("").endswith("ETA 0:11:40")
    assert view.bar.console.file.getvalue() == "training 2/10  text of 2  ETA 0:13:20\n"


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        ([100.0] * 9, [2, 5, 8]),  # a line at 200, 500 and 800 s
        ([10.0] * 100, [2, 32, 62, 92]),
        ([301.0, 400.0, 1.0, 1.0], [1, 2]),  # steps that take longer than five minutes have a line each
        ([1.0] * 60, [2]),
    ],
)
def test_five_minutes_have_a_line_whatever_is_asked_for(seconds, shown):
    view, now = clocked(1000)
    assert shown_after(view, now, seconds) == shown


def test_a_line_that_is_asked_for_begins_the_five_minutes_anew():
    view, now = clocked(1000)
    for step in range(1, 11):
        now[0] += 100.0
        view(f"text of {step}", show=step == 4)
    assert re.findall(r"text of (\d+)", view.bar.console.file.getvalue()) == ["2", "4", "7", "10"]


def test_a_run_shows_and_keeps_its_warm_up(tmp_path, capsys):
    settings = {"sft_warmup_steps": 4, "sft_warmup_eval_steps": 2, "logging_steps": 3, "num_steps": 1}
    train(tiny_recipe(tmp_path, **settings))
    out = capsys.readouterr().out
    assert re.search(r"^warm-up 3/4  loss \d\.\d+  ETA 0:00:0\d$", out, re.MULTILINE)
    assert "━" not in out.partition("training 1/1")[0].partition("highest and lowest")[0]
    rows = warmup_rows(tmp_path / "metrics.jsonl")
    assert [row["warmup_step"] for row in rows] == list(range(4)) and rows[0]["warmup/loss"] > rows[3]["warmup/loss"]
    assert [row["warmup_step"] for row in rows if "warmup/solve_rate" in row] == [1, 3]
    assert [row["step"] for row in current_rows(tmp_path / "metrics.jsonl")] == [0]
