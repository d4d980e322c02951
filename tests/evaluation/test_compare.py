"""Comparisons of stored runs against numbers by hand; what cannot be compared is refused in one line."""

import json
from pathlib import Path

import numpy as np
import pytest
from refusals import refuses

from dllm_rl.cli.compare_runs import read_arms
from dllm_rl.cli.main import main
from dllm_rl.evaluation.compare import common_name, compare, read_run, settings_of, tails
from dllm_rl.evaluation.held_out import grading_of, held_out_row
from dllm_rl.evaluation.intervals import bootstrap_interval
from dllm_rl.evaluation.results import Evaluation, GradedAnswer
from dllm_rl.groups import Best, Log, Saves
from dllm_rl.monitoring.plots import default_style
from dllm_rl.records import to_json
from dllm_rl.tasks import Reward, Sudoku, task_from_dataset

GREEDY = {"class_path": "Unmask", "init_args": {"max_new_tokens": 2, "temperature": 0.0}}
ZERO_TO_NINE = np.arange(10) / 10


def write_run(folder: Path, values, *, seed=0, step=10, before=0.0, resumed=False, **changes) -> str:
    """A run whose evaluation before training and after `step` updates has these values of `right`. `changes` are those
    of the rows, or of the recipe."""
    folder.mkdir(parents=True, exist_ok=True)
    recipe = {"name": "grpo", "seed": seed, "num_steps": 10, "learning_rate": 0.1, "eval_sampler": GREEDY}
    recipe |= {"output_dir": str(folder)}
    row = {"task": "eval_task", "problems": "p", "grading": {"reward": "g"}}
    row |= {name: changes.pop(name) for name in tuple(changes) if name in row}
    row["recipe"] = recipe | changes
    rows = [row | {"step": at, "metrics": {"right": list(each)}} for at, each in ((0, [before] * 10), (step, values))]
    (folder / "held_out.jsonl").write_text("".join(f"{json.dumps(each)}\n" for each in rows))
    return str(folder)


def said(comparison) -> str:
    (line,) = comparison.sentences()
    return line


def test_two_runs_are_paired_by_problem(tmp_path):
    values = ZERO_TO_NINE + np.array([0.1] * 6 + [-0.1] * 2 + [0.0] * 2)
    runs = [write_run(tmp_path / "a", ZERO_TO_NINE), write_run(tmp_path / "b", values, learning_rate=0.2)]
    comparison = compare(runs)
    found = comparison.difference(comparison.arms[1])
    assert (found.first, found.arm, found.counts) == (pytest.approx(0.45), pytest.approx(0.49), (6, 2, 2))
    alone = bootstrap_interval(values - ZERO_TO_NINE, np.random.default_rng(0))  # as if each were one number
    assert found.over_problems == pytest.approx(alone) and found.over_problems[0] < 0 < found.over_problems[1]
    assert found.over_seeds is None and found.seeds == (0,)
    text = said(comparison)
    assert text.startswith("It is not clear whether b or a is better: right 0.490 against 0.450, +0.040")
    half = (alone[1] - alone[0]) / 2
    assert f"about {int(np.ceil(10 * (half / 0.04) ** 2))} held-out problems" in text
    assert comparison.settings() == {"learning_rate": ["0.1", "0.2"]}
    assert comparison.before(comparison.arms[0]) == 0.0


@pytest.mark.parametrize("order", [1, -1])
def test_the_better_one_is_named_first(order, tmp_path):
    runs = [write_run(tmp_path / "low", ZERO_TO_NINE)]
    runs += [write_run(tmp_path / "high", ZERO_TO_NINE + 0.1 + ZERO_TO_NINE / 10, learning_rate=0.2)]
    text = said(compare(runs[::order]))
    assert text.startswith("high is better than low: right 0.595 against 0.450, +0.145 (95 % interval +0.1")
    assert "higher on 10 problems, lower on 0, equal on 0" in text and "only more seeds" in text


def test_seeds_are_paired_and_have_students_interval(tmp_path):
    """Differences 0.1, 0.2 and 0.3: mean 0.2, standard error 0.1 / sqrt(3), and t(2) = 4.303."""
    runs = [write_run(tmp_path / f"a-seed{seed}", ZERO_TO_NINE * (seed + 1), seed=seed) for seed in range(3)]
    for seed in range(3):
        values = ZERO_TO_NINE * (seed + 1) + (seed + 1) / 10 + (ZERO_TO_NINE - 0.45) / 10
        runs.append(write_run(tmp_path / f"b-seed{seed}", values, seed=seed, learning_rate=0.2))
    comparison = compare(runs)
    assert [(arm.label, arm.seeds) for arm in comparison.arms] == [("a", [0, 1, 2]), ("b", [0, 1, 2])]
    found = comparison.difference(comparison.arms[1])
    half = 4.302653 * 0.1 / 3**0.5
    assert found.value == pytest.approx(0.2) and found.over_seeds == pytest.approx((0.2 - half, 0.2 + half))
    assert found.over_problems == pytest.approx(
        bootstrap_interval(0.2 + (ZERO_TO_NINE - 0.45) / 10, np.random.default_rng(0))
    )
    assert found.over_seeds[0] < 0 < found.over_problems[0]  # sure of the problems, not of the seeds
    text = said(comparison)
    assert text.startswith("It is not clear") and text.endswith("takes about 4 seeds.")


def test_other_seeds_are_not_paired(tmp_path):
    """Means 0.45 and 0.55 against 0.65 and 0.85: variances 0.005 and 0.02 over two, and t(1) = 12.706."""
    arms = {"a": [(0, 0.0), (1, 0.1)], "b": [(2, 0.2), (3, 0.4)]}
    folders = {
        name: [write_run(tmp_path / f"{name}{seed}", ZERO_TO_NINE + more, seed=seed) for seed, more in each]
        for name, each in arms.items()
    }
    comparison = compare(folders)
    found = comparison.difference(comparison.arms[1])
    half = 12.706205 * (0.005 / 2 + 0.02 / 2) ** 0.5
    assert found.value == pytest.approx(0.25) and found.over_seeds == pytest.approx((0.25 - half, 0.25 + half))
    assert found.seeds == () and found.over_problems is None  # every problem has the same difference


def test_seeds_that_the_other_arm_lacks_are_left_out(tmp_path):
    a = [write_run(tmp_path / f"a{seed}", ZERO_TO_NINE + seed, seed=seed) for seed in (0, 1)]
    b = [write_run(tmp_path / f"b{seed}", ZERO_TO_NINE + seed / 2, seed=seed) for seed in (1, 2)]
    comparison = compare({"a": a, "b": b})
    found = comparison.difference(comparison.arms[1])
    assert found.seeds == (1,) and found.value == pytest.approx(-0.5)


def test_a_ratio_is_pooled_and_null_is_left_out(tmp_path):
    """Problem 1 has no number in one run: 1/2 and 9/10 against 0/2 and 3/10 are left, 10/12 - 3/12."""
    ours, theirs = [[1, 2], None, [9, 10]], [[0, 2], [5, 5], [3, 10]]
    runs = [write_run(tmp_path / "a", theirs), write_run(tmp_path / "b", ours, learning_rate=0.2)]
    comparison = compare(runs)
    found = comparison.difference(comparison.arms[1])
    assert found.value == pytest.approx(10 / 12 - 3 / 12) and found.counts == (2, 0, 0)
    runs = [write_run(tmp_path / "a", [None, 1.0]), write_run(tmp_path / "b", [1.0, None], learning_rate=0.2)]
    refuses("no metric in common: right: two runs have it on no problem in common", lambda: compare(runs))


def test_equal_runs_and_one_problem_say_so(tmp_path):
    runs = [write_run(tmp_path / "a", ZERO_TO_NINE), write_run(tmp_path / "b", ZERO_TO_NINE, learning_rate=0.2)]
    said_of_equal = (
        "right cannot say which of b and a is better, because it is 0.450 in both and equal on each of the 10 "
    )
    assert said(compare(runs)) == f"{said_of_equal}held-out problems."
    runs = [write_run(tmp_path / "a", [0.5] * 3), write_run(tmp_path / "b", [0.75] * 3, learning_rate=0.2)]
    assert said(compare(runs)).startswith("b and a differ by the same number on each held-out problem: right 0.750")
    runs = [write_run(tmp_path / "a", [0.5]), write_run(tmp_path / "b", [0.75], learning_rate=0.2)]
    assert said(compare(runs)).startswith("One held-out problem cannot say which of b and a is better")


def test_a_metric_that_is_equal_everywhere_names_one_that_differs(tmp_path):
    runs = [write_run(tmp_path / name, [0.0] * 10, learning_rate=rate) for name, rate in (("a", 0.1), ("b", 0.2))]
    for run, values in zip(runs, (ZERO_TO_NINE, ZERO_TO_NINE + 0.1), strict=True):
        file = Path(run, "held_out.jsonl")
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        for row in rows:
            row["metrics"] |= {"also_equal": [1.0] * 10, "style": list(values)}
        file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    assert said(compare(runs)).endswith("held-out problems. Other metrics differ: take --metric style.")
    assert said(compare(runs, metric="style")).startswith("b and a differ by the same number")


def test_the_last_evaluation_counts_also_after_a_resume(tmp_path):
    folder = Path(write_run(tmp_path / "a", ZERO_TO_NINE, step=5))
    last = json.loads((folder / "held_out.jsonl").read_text().splitlines()[-1])
    with (folder / "held_out.jsonl").open("a") as file:
        for step, more in ((8, 1), (9, 2)):
            file.write(json.dumps(last | {"step": step, "metrics": {"right": list(ZERO_TO_NINE + more)}}) + "\n")
        file.write(json.dumps({"resume_from": 7}) + "\n")
        file.write(json.dumps(last | {"step": 8, "metrics": {"right": list(ZERO_TO_NINE + 3)}}) + "\n")
        file.write('{"step": 9, "metrics": {"ri')  # a kill while it writes
    run = read_run(folder)
    assert [row["step"] for row in run.rows] == [0, 5, 8] and run.last("eval_task")["metrics"]["right"][0] == 3


TWO_TOKENS = {"class_path": "Unmask", "init_args": {"max_new_tokens": 2, "temperature": 0.5}}
OTHER_REWARD = {"grading": {"reward": "h"}}


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"problems": "q"}, r"a and \S*b have different held-out problems \(10 each\); train both with the same rows"),
        ({"eval_sampler": TWO_TOKENS}, r"differently, eval_sampler.temperature=0.0 and 0.5; train both with the same"),
        ({"eval_sampler": {"class_path": "Renoise", "init_args": {}}}, "eval_sampler='Unmask' and 'Renoise'"),
        (OTHER_REWARD, "the runs have no metric in common: right: its code or settings differ"),
        (
            {"step": 0},
            r"b has no held-out evaluation after a training step; wait for one, or set a smaller evaluation.steps",
        ),
        ({"seed": 1, "learning_rate": 0.1}, "1 arm cannot be compared: the runs have the same settings except for"),
    ],
)
def test_comparisons_that_mean_nothing_are_refused(changes, error, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    runs = [write_run(tmp_path / "a", ZERO_TO_NINE)]
    runs.append(write_run(tmp_path / "b", ZERO_TO_NINE, **{"learning_rate": 0.2} | changes))
    refuses(error, lambda: compare(runs))
    assert main(["compare", *runs]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1 and not (tmp_path / "compare.png").exists()


def test_a_folder_without_rows_is_refused(tmp_path):
    with pytest.raises(ValueError, match="none does not exist; give the folder that a run writes"):
        compare([tmp_path / "none", tmp_path / "none"])
    refuses(r"has no rows in held_out\.jsonl; give the folder of an RL run", lambda: compare([tmp_path, tmp_path]))
    (tmp_path / "held_out.jsonl").write_text('{"step": 3, "task": "eval_task"}\n')
    refuses(r"held_out\.jsonl is damaged: the row of step 3 has no 'metrics'", lambda: compare([tmp_path, tmp_path]))


def test_arms_by_name():
    assert read_arms(["runs/a", "runs/b"]) == ["runs/a", "runs/b"]
    assert read_arms(["x=a,b", "y=c", "x=d"]) == {"x": ["a", "b", "d"], "y": ["c"]}
    refuses("runs/b has no name, and x=a has one", lambda: read_arms(["x=a", "runs/b"]))
    refuses("'x=a,' must be a name and its runs", lambda: read_arms(["x=a,"]))


def test_an_arm_has_a_seed_once(tmp_path):
    runs = [write_run(tmp_path / name, ZERO_TO_NINE) for name in "ab"]
    refuses(r"x has two runs with the same seed, \[0, 0\]", lambda: compare({"x": runs, "y": runs[:1]}))
    assert len(compare(runs).arms) == 2  # equal settings and seeds: perhaps of two versions of the code


def test_labels_are_short_and_differ():
    assert common_name(["tis-seed0", "tis-seed12"]) == "tis" and common_name(["tis_1", "tis_2"]) == "tis"
    assert common_name(["only-seed0"]) == "only-seed0"
    assert tails([Path("/r/x/a"), Path("/r/y/a")]) == ["x/a", "y/a"]
    assert tails([Path("/r/a"), Path("/r/a")]) == ["a (1)", "a (2)"]


def test_seeds_may_differ_in_name_folder_and_logging(tmp_path):
    one = read_run(write_run(tmp_path / "a", [1.0], log=to_json(Log(steps=1))))
    other = read_run(write_run(tmp_path / "b", [1.0], seed=3, name="b", log=to_json(Log(steps=9))))
    assert settings_of(one) == settings_of(other)
    for setting, value in {
        "num_steps": 20,
        "learning_rate": 0.5,
        "saves": to_json(Saves(best=Best(metric="right"))),
    }.items():
        assert settings_of(read_run(write_run(tmp_path / "c", [1.0], **{setting: value}))) != settings_of(one)


def test_runs_that_go_on_are_compared_by_their_validation(tmp_path):
    """One of two runs has ended: with another validation_task that evaluation is of other problems."""
    runs = []
    for name in "ab":
        folder = Path(write_run(tmp_path / name, ZERO_TO_NINE, learning_rate=ord(name)))
        first, last = map(json.loads, (folder / "held_out.jsonl").read_text().splitlines())
        rows = [first, last | {"task": "validation_task", "problems": "v", "step": 5}, last][: 3 if name == "a" else 2]
        (folder / "held_out.jsonl").write_text("".join(f"{json.dumps(each)}\n" for each in rows))
        runs.append(folder)
    assert compare(runs).task == "validation_task"


def answers_of(task, *rewards):
    return Evaluation(tuple(GradedAnswer(i, 0, reward, content=str(i)) for i, reward in enumerate(rewards)), {})


def test_a_row_of_the_file_by_hand():
    cells = {"correct_cells": 3.0, "empty_cells": 4.0, "cell_accuracy": 0.75, "solve_rate": 0.0}
    evaluation = answers_of(None, Reward(2.5, True, cells), Reward(None, False))
    row = json.loads(json.dumps(held_out_row(7, evaluation, Sudoku(), {"seed": 3}, is_test=False)))
    assert (row["step"], row["task"], row["recipe"]) == (7, "validation_task", {"seed": 3})
    expected = {
        "reward": [2.5, None],
        "parsed": [1.0, None],
        "solve_rate": [0.0, None],
        "cell_accuracy": [[3, 4], None],
    }
    assert row["metrics"] == expected
    other = answers_of(None, *(answer.reward for answer in evaluation.answers[::-1]))
    assert held_out_row(7, other, Sudoku(), {}, is_test=True)["problems"] == row["problems"]
    unbounded = held_out_row(7, other, Sudoku(), {"bound": [float("inf")]}, is_test=True)
    assert json.loads(json.dumps(unbounded, allow_nan=False))["recipe"] == {"bound": ["Infinity"]}
    longer = answers_of(None, *[Reward(1.0, True)] * 3)
    assert held_out_row(7, longer, Sudoku(), {}, is_test=True)["problems"] != row["problems"]


def test_what_grades_is_known_by_its_code():
    rows = [{"prompt": "1", "answer": "2"}]

    def right(completions, answer, **columns):
        return [float(text == each) for text, each in zip(completions, answer, strict=True)]

    def short(completions, **columns):
        return [-float(len(text)) for text in completions]

    both = grading_of(task_from_dataset(rows, reward_funcs=[right, short], name="x"))
    alone = grading_of(task_from_dataset(rows, reward_funcs=right, name="y"))
    weighted = grading_of(task_from_dataset(rows, reward_funcs=[right, short], weights=[1.0, 2.0]))
    assert both["right"] == alone["right"] == weighted["right"] != both["short"]
    assert len({grading["reward"] for grading in (both, alone, weighted)}) == 3

    def right(completions, answer, **columns):  # another function of the same name
        return [float(text != each) for text, each in zip(completions, answer, strict=True)]

    assert grading_of(task_from_dataset(rows, reward_funcs=right, name="y"))["right"] != alone["right"]
    assert grading_of(Sudoku(size=8)) == grading_of(Sudoku(size=8)) != grading_of(Sudoku(size=8, match_weight=1.0))


def test_a_metric_that_all_compute_alike_decides(tmp_path):
    """The reward is another sum in each run: `right` decides."""
    runs = []
    for name in "ab":
        folder = Path(write_run(tmp_path / name, ZERO_TO_NINE, learning_rate=ord(name)))
        rows = list(map(json.loads, (folder / "held_out.jsonl").read_text().splitlines()))
        for row in rows:
            row["metrics"] |= {"parsed": [1.0] * 10, "reward": [ord(name)] * 10}
            row["grading"] = {"reward": name, "right": "r", "parsed": "p"}
        (folder / "held_out.jsonl").write_text("".join(f"{json.dumps(each)}\n" for each in rows))
        runs.append(folder)
    comparison = compare(runs)
    assert comparison.metrics == ["right", "parsed"]
    assert comparison.left_out == {"reward": "reward: the rewards are not the same sum"}
    assert compare(runs, metric="parsed").metric == "parsed"
    with pytest.raises(ValueError, match=r"metric='reward' is not compared: reward: the rewards are not the same sum"):
        compare(runs, metric="reward")
    refuses(r"metric='rigth' is not compared.*the nearest is 'right'", lambda: compare(runs, metric="rigth"))


@pytest.mark.filterwarnings("ignore:Glyph")  # a font has no picture of the escaped character
def test_the_pictures_ticks_are_whole_steps_and_whole_numbers(tmp_path):
    runs = [write_run(tmp_path / name, ZERO_TO_NINE / 1e5 + 0.9999, step=3, learning_rate=name) for name in "ab"]
    for run in runs:
        rows = [{"step": step, "rollout_corr/ess": 0.99998 + step / 1e6} for step in range(3)]
        rows = [row | {"rollout_corr/abs_log_ratio_mean": 0.01} for row in rows]
        (Path(run) / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    with default_style():
        figure = compare(runs).draw()
        figure.draw_without_rendering()
    over_steps = [axis for axis in figure.axes if axis.get_xlabel() == "step"]
    assert len(over_steps) == 3
    for axis in over_steps:
        assert axis.yaxis.get_offset_text().get_text() == "" and all(tick == round(tick) for tick in axis.get_xticks())


def test_the_command_prints_a_table_a_picture_and_a_sentence(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    hostile = write_run(tmp_path / "b\x1b[2J$[bold]", ZERO_TO_NINE + 0.1, learning_rate=0.2)
    runs = [write_run(tmp_path / "a", ZERO_TO_NINE), hostile]
    assert main(["compare", *runs]) == 0
    printed = capsys.readouterr().out
    assert "\x1b" not in printed and "[bold]" in printed and "Picture: compare.png" in printed
    assert printed.rstrip().splitlines()[-1].startswith("b")
    assert (tmp_path / "compare.png").stat().st_size > 10_000
    assert main(["compare", *runs, "--json", "--plot", "other.png"]) == 0
    found = json.loads(capsys.readouterr().out)
    monkeypatch.setenv("COLUMNS", "60")
    schemes = ({"class_path": "NVFP4", "init_args": {"from_original": value}} for value in (False, True))
    for run, scheme in zip("cd", schemes, strict=True):
        write_run(tmp_path / run, ZERO_TO_NINE, rollout_quantization=scheme)
    assert main(["compare", "c", "d"]) == 0
    table = capsys.readouterr().out
    assert "…" not in table and "rollout_quantization.fr" in table.replace(" ", ""), "names are folded, not cut"
    assert found["compared_with"] == "a" and found["picture"] == "other.png" and (tmp_path / "other.png").exists()
