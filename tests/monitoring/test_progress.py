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

HEALTHY = {"rollout_corr/ess": 0.9876, "off_policy/old/contribution_positive": 0.00123}
BROKEN = {"rollout_corr/ess": 0.123, "off_policy/rollout/contribution_negative/iteration_1": 0.0456}


def terminal(**changes):
    return Console(**{"file": io.StringIO(), "width": 80, "force_terminal": True, "color_system": None} | changes)


def test_a_bar_and_its_lines_fit_80_columns():
    console = terminal()
    view = ProgressDisplay(console, "training", 100_000, completed=99_900)
    for step in range(50):
        view({"reward": 1234.5 + step, **BROKEN}, show=False)
    view({}, show=False, close=True)
    (line,) = {line for line in console.file.getvalue().replace("\r", "\n").split("\n") if "99950" in line}
    text = re.sub(r"\x1b\[[^A-Za-z]*[A-Za-z]", "", line)
    assert len(text) <= 80 and re.fullmatch(r"training +99950/100000 [━╸╺ ]+ \d:\d\d:\d\d ETA \d:\d\d:\d\d", text)
    assert view.bar.tasks[0].completed == 99_950, "the end is no step"


def test_a_terminal_is_redrawn_and_lines_stay_above():
    console = terminal()
    view = ProgressDisplay(console, "training", 2)
    view({"reward": 1.0, **HEALTHY}, show=True)
    view({"reward": 2.0, **HEALTHY}, show=False)
    text = console.file.getvalue()
    assert "training 1/2  reward 1  healthy\n" in text
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
    view({"reward": 1.0, **HEALTHY}, show=False)
    view({"reward": 2.0, **BROKEN}, show=True)
    reason = "C +0.046 (A<0, against the rollout) above 0.005, ESS 0.123 below 0.7"
    assert console.file.getvalue() == f"training 2/2  reward 2  mismatch backfiring ({reason})\n"


def test_a_notebook_gets_no_cursor_codes(tmp_path, monkeypatch, capsys):
    """A kernel sets FORCE_COLOR, which rich takes for a terminal; its standard output is none."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    train(tiny_recipe(tmp_path, num_steps=1))
    out = capsys.readouterr().out
    assert "training 1/1  reward" in out and not re.search(r"\x1b\[[^m]*[A-HJKhl]", out)


def test_the_time_left_is_known_of_long_steps():
    """Rich's own speed forgets after 30 s, which one step of a large model takes."""
    view, now = ProgressDisplay(terminal(force_terminal=False), "training", 10), [0.0]
    view.bar.get_time = lambda: now[0]
    for _ in range(3):
        now[0] += 100.0
        view({"reward": 1.0}, show=False)
    assert view.bar.tasks[0].time_remaining == 700
    assert view.line({}).endswith("ETA 0:11:40")
    shown = view.bar.console.file.getvalue()
    assert shown == "training 2/10  reward 1  ETA 0:13:20\n", "the first time left, and no further line unasked"


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
