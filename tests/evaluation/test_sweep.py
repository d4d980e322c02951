"""Tables and curves of made-up results, by hand."""

import matplotlib
import pytest
from matplotlib import pyplot as plt

from dllm_rl.evaluation.sweep import draw_sweep, plot_curve, varying


def result(steps, accuracy, **settings):
    facts = {"task": "t", "n": 4, "diffusion_steps": steps, "accuracy": accuracy}
    cost = {
        "forwards_per_answer": float(steps),
        "tokens_per_forward": 9 / steps,
        "tokens": 9,
        "forwards": 2,
        "seconds": 0.5,
    }
    facts["samples"] = 2
    return facts | settings | {"accuracy_interval": [accuracy - 0.1, accuracy + 0.1]} | cost


def test_settings_that_vary():
    assert varying([result(2, 0.5), result(4, 0.5)]) == ["diffusion_steps"]
    assert varying([result(2, 0.5, rank="a", model="m"), result(4, 0.5, rank="b", model="m")]) == [
        "diffusion_steps",
        "rank",
    ]
    assert varying([result(2, 0.5), result(2, 0.75)]) == ["model"]  # accuracy is no setting


def test_a_number_without_an_interval_has_no_band():
    found = [result(steps, 0.5) | {"accuracy_interval": None} for steps in (2, 4)]
    axis = draw_sweep(found).axes[0]
    assert axis.lines[0].get_xydata().tolist() == [[2, 0.5], [4, 0.5]]
    assert not any(len(path.vertices) for band in axis.collections for path in band.get_paths())


@pytest.mark.parametrize(
    ("facts", "metric"),
    [
        ({"protocol": "d1", "cell_accuracy": 0.25, "cell_accuracy_interval": None}, "cell_accuracy"),
        ({"protocol": "strict", "cell_accuracy": 0.25}, "accuracy"),
        ({"protocol": "own", "cell_accuracy": 0.25}, "accuracy"),
        ({"protocol": "d1"}, "accuracy"),
    ],
)
def test_a_curve_is_of_the_metric_that_the_protocol_reports(facts, metric):
    axis = draw_sweep([result(2, 0.5) | facts]).axes[0]
    assert axis.get_ylabel() == metric and axis.lines[0].get_ydata().tolist() == [{**result(2, 0.5), **facts}[metric]]


def test_a_curve_has_a_line_per_rule_and_its_points_by_forwards(tmp_path):
    """The numbers of an adaptive rule are points of one line; nothing in a label is a formula."""
    found = [
        result(3, 0.5, commit="threshold=0.9"),
        result(2, 0.75, commit="threshold=0.8"),
        result(4, 0.25, commit="$a"),
    ]
    figure = draw_sweep(found)
    axis, seconds = figure.axes
    points = {line.get_label(): line.get_xydata().tolist() for line in axis.lines}
    assert points == {"threshold": [[2, 0.75], [3, 0.5]], r"\$a": [[4, 0.25]]}
    assert {line.get_xdata()[0] for line in seconds.lines} == {0.5 / 8}
    (band,) = {tuple(each.get_paths()[0].get_extents().intervaly) for each in axis.collections[1:]}
    assert band == pytest.approx((0.15, 0.35)), "the interval"
    assert figure.get_suptitle() == "t, 4 problems" and axis.get_ylabel() == "accuracy"
    assert axis.get_xlabel() == "forwards per answer" and seconds.get_xlabel() == "seconds per answer"
    plt.switch_backend("svg")
    plot_curve(tmp_path / "a.png", found)
    assert matplotlib.get_backend() == "svg" and plt.get_fignums() == []
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"


def test_the_axis_of_seconds_has_several_ticks():
    """One of powers of 2 has a single tick, or none, where all costs lie between two of them."""
    for seconds in ([0.30, 0.33, 0.36], [0.30, 0.30, 0.31], [0.1, 0.5, 3.0], [0.2]):
        found = [result(step + 1, 0.5) | {"seconds": 8 * cost} for step, cost in enumerate(seconds)]
        axis = draw_sweep(found).axes[1]
        low, high = axis.get_xlim()
        assert sum(low <= tick <= high for tick in axis.get_xticks()) >= 2
        labels = [label.get_text() for label in axis.get_xticklabels()]
        assert len({*labels}) == len(labels), labels
