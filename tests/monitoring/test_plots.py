"""The picture of a run, and its numbers by hand."""

import json
import math

import pytest

from dllm_rl.monitoring.plots import (
    PANELS,
    PICTURE,
    PICTURE_OF_SFT,
    Panel,
    lines_of,
    measured,
    plot,
    read_summary,
    smoothed,
    whole_steps,
)

ALWAYS = {"reward": 0.5, "parsed": 1.0, "rollout_corr/k3_kl": 0.0, "rollout_corr/rollout_is_eff_sample_size": 1.0}


def test_a_curve_is_smoothed_by_hand():
    nan = math.nan
    assert smoothed([0.0, 3.0, 6.0, nan, 9.0], width=1) == [1.5, 3.0, 4.5, 7.5, 9.0]
    assert smoothed([1.0, 2.0], width=0) == [1.0, 2.0] and math.isnan(smoothed([nan], width=3)[0])


def test_the_picture_and_the_page_share_their_panels():
    """RL's loss is no likelihood: neither shows it. The picture's panels are some of the page's."""
    assert {*PICTURE, *PICTURE_OF_SFT} <= {panel.title for panel in PANELS}
    rl = [{"step": 0, "reward": 0.5, "loss": 1.0}]
    assert [panel.title for panel in PANELS if measured(panel, [rl])] == ["Reward"]
    sft = [{"step": 0, "loss": 1.0, "grad_norm": 2.0}]
    assert tuple(panel.title for panel in PANELS if measured(panel, [sft])) == PICTURE_OF_SFT


def test_ticks_are_whole_steps_and_no_run_hides_another(tmp_path):
    plt = pytest.importorskip("matplotlib.pyplot")
    for last in (1, 2, 3, 7, 1000):
        figure, axis = plt.subplots(figsize=(4.6, 2.9))
        rows = [{"step": step, "reward": 0.5} for step in range(last)]
        lines_of(axis, [rows, rows, rows], Panel("Reward", "reward", {"reward": "training"}))
        whole_steps(axis)
        assert (axis.lines[0].get_marker() == "o") == (last == 1), "one point is no line"
        assert all(tick == round(tick) for tick in axis.get_xticks()), "a tick between two steps"
        widths = [line.get_linewidth() for line in axis.lines[::2]]
        assert widths == sorted(widths, reverse=True) and len(set(widths)) == 3
        plt.close(figure)


def test_a_report_is_drawn_where_a_step_lacks_a_breakdown(tmp_path):
    rows = [{"step": 0, **ALWAYS}, {"step": 1, **ALWAYS, "rewards/accuracy/mean": 1.0}, {"step": 2, "reward": 0.5}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert plot(tmp_path).is_file()


def test_of_a_run_that_has_not_ended_the_newest_checkpoint_is_told(tmp_path):
    for step in (2, 10, 30):
        folder = tmp_path / "checkpoints" / f"step-{step:06d}"
        folder.mkdir(parents=True)
        (folder / "state.json").write_text(json.dumps({"step": step}))
    assert read_summary(tmp_path) == {"step": 30}
    (folder / "state.json").write_text("{")
    assert read_summary(tmp_path) == {"step": 10}, "that one is damaged"
    (tmp_path / "summary.json").write_text('{"seconds": 3}')
    assert read_summary(tmp_path) == {"seconds": 3}
