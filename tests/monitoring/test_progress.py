"""What a run shows while it goes on: on a terminal of 80 columns, and where there is none."""

import atexit
import io
import re

from rich.console import Console
from tiny_recipe import tiny_recipe

from dllm_rl.monitoring.json_lines import current_rows, warmup_rows
from dllm_rl.monitoring.log import RunLog
from dllm_rl.monitoring.progress import ProgressDisplay, progress_bar, sparkline
from dllm_rl.training.trainer import train

HEALTHY = {"rollout_corr/ess": 0.9876, "off_policy/old/contribution_positive": 0.00123}
BROKEN = {"rollout_corr/ess": 0.123, "off_policy/rollout/contribution_negative/iteration_1": 0.0456}


def terminal(**changes):
    return Console(**{"file": io.StringIO(), "width": 80, "force_terminal": True, "color_system": None} | changes)


def seen(view: ProgressDisplay) -> list[str]:
    console = Console(file=io.StringIO(), width=80)
    console.print(view)
    return console.file.getvalue().splitlines()


def test_all_of_it_fits_80_columns():
    bar = progress_bar(terminal(), "training", 100_000, completed=99_900)
    view = ProgressDisplay(bar, curve="reward", stage=lambda: "evaluation")
    for step in range(50):
        view({"reward": 1234.5 + step, **BROKEN}, show=False)
    lines = seen(view)
    view({}, show=False, close=True)
    assert max(map(len, lines)) <= 80 and len(lines) == 5
    assert re.fullmatch(r"training +99950/100000 [━╸╺ ]+ \d:\d\d:\d\d ETA \d:\d\d:\d\d", lines[0])
    assert lines[1].startswith("reward     1.28e+03  ▁") and lines[1].endswith("█  1.23e+03 to 1.28e+03")
    assert "".join(lines[2:4]).endswith(
        "backfiring: C +0.046 (A<0, against the rollout) above 0.005, ESS 0.123 below 0.7"
    )
    assert view.bar.tasks[0].completed == 99_950, "the end is no step"
    assert lines[4] == "now        step 99951, evaluation"


def test_a_terminal_is_redrawn_and_lines_stay_above():
    console = terminal()
    view = ProgressDisplay(progress_bar(console, "training", 2), curve="reward")
    view({"reward": 1.0, **HEALTHY}, show=True)
    view({"reward": 2.0, **HEALTHY}, show=False)
    text = console.file.getvalue()
    assert "training 1/2  reward 1  healthy\n" in text
    assert text.count("mismatch   healthy: ESS 0.988, C at most +0.0012 (A>0, against the step's start)") >= 1
    assert text.endswith("\x1b[?25h"), "the cursor is back"
    assert "now " not in text.rpartition("training")[2], "nothing is being done any more"


def test_a_run_that_stops_by_an_error_gives_the_cursor_back(monkeypatch):
    at_exit, console = [], terminal()
    monkeypatch.setattr(atexit, "register", at_exit.append)
    view = ProgressDisplay(progress_bar(console, "training", 2), curve="reward")
    assert "\x1b[?25l" in console.file.getvalue()
    at_exit[0]()
    assert console.file.getvalue().endswith("\x1b[?25h")
    view.live.stop()


def test_elsewhere_there_are_lines_alone():
    console = terminal(force_terminal=False)
    view = ProgressDisplay(progress_bar(console, "training", 2), curve="reward")
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
    view, now = ProgressDisplay(progress_bar(terminal(force_terminal=False), "training", 10), curve="reward"), [0.0]
    view.bar.get_time = lambda: now[0]
    for _ in range(3):
        now[0] += 100.0
        view({"reward": 1.0}, show=False)
    assert view.bar.tasks[0].time_remaining == 700
    assert view.line({}).endswith("ETA 0:11:40")
    shown = view.bar.console.file.getvalue()
    assert shown == "training 2/10  reward 1  ETA 0:13:20\n", "the first time left, and no further line unasked"


def test_a_curve_by_hand():
    assert sparkline([1.0, 2.0, 3.0]) == "▁▅█" and sparkline([5.0, 5.0]) == "▁▁"
    assert sparkline([1.0, 1.0, 3.0, 5.0, 9.0, 9.0], width=3) == "▁▄█"
    assert len(sparkline([float(i) for i in range(1000)])) == 30


def test_a_run_shows_and_keeps_its_warm_up(tmp_path, capsys):
    settings = {"sft_warmup_steps": 6, "sft_warmup_eval_steps": 3, "logging_steps": 4, "num_steps": 1}
    train(tiny_recipe(tmp_path, **settings))
    out = capsys.readouterr().out
    assert re.search(r"^warm-up 4/6  loss \d\.\d+  ETA 0:00:0\d$", out, re.MULTILINE)
    assert "━" not in out.partition("training 1/1")[0].partition("highest and lowest")[0]
    rows = warmup_rows(tmp_path / "metrics.jsonl")
    assert [row["warmup_step"] for row in rows] == list(range(6)) and rows[0]["warmup/loss"] > rows[5]["warmup/loss"]
    assert [row["warmup_step"] for row in rows if "warmup/solve_rate" in row] == [2, 5]
    assert [row["step"] for row in current_rows(tmp_path / "metrics.jsonl")] == [0]


def test_a_resumed_run_draws_what_came_before(tmp_path):
    train(tiny_recipe(tmp_path, num_steps=2, save_steps=1))
    log = RunLog(tmp_path, start=1, main=True)
    rewards = [row["reward"] for row in current_rows(tmp_path / "metrics.jsonl")]
    assert len(rewards) == 1 and log.view("training", 2, curve="reward", completed=1).values == rewards
    log.close()
