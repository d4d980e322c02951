"""Evaluation during a run: when, and under which names."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
from run_outputs import metrics_of
from tiny_recipe import ONE_PUZZLE, Wrapped, tiny_recipe, with_changes

from dllm_rl import Unmask, grpo, tiny_masked_lm
from dllm_rl.callbacks import StopBelow
from dllm_rl.groups import Best, Evaluation, Saves
from dllm_rl.samplers.sampler import FunctionSampler
from dllm_rl.supervised.sft import SFT
from dllm_rl.tasks import Sudoku, task_from_dataset
from dllm_rl.tasks.protocols import under_protocol
from dllm_rl.training.finish import result_text
from dllm_rl.training.start import start
from dllm_rl.training.trainer import train, validate
from dllm_rl.training.validation import evaluate_with, format_change, format_metrics, validation_interval

pytestmark = pytest.mark.usefixtures("no_rehearsal")


def test_it_is_every_eval_steps_on_the_validation_task(tmp_path):
    run = start(recipe := tiny_recipe(tmp_path))
    means = evaluate_with(recipe, run.policy, recipe.validation_task, run.accelerator)
    wanted = {f"eval/{name}": value for name, value in means.items()}  # greedy: the same each time
    assert "eval/solve_rate" in wanted
    assert validation_interval(with_changes(recipe, eval_steps=None)) == 10
    for every, steps in ((0, []), (2, [1, 3]), (3, [2]), (None, [9])):
        often = replace(run, recipe=with_changes(recipe, eval_steps=every))
        found = [validate(often, step) for step in range(10 if every is None else 4)]
        assert found == [wanted if step in steps else {} for step in range(len(found))]
    run.log.close()


@pytest.mark.parametrize(
    ("eval_rows", "eval_steps_each", "step_rows", "steps_each", "every"),
    [
        (200, 2, 512, 2, 20),  # sudoku_tiny: 0.39 of a step's rollout, and 0.39 / 0.02 = 19.5
        (256, 128, 48, 128, 270),  # LLaDA-8B's 4x4 Sudoku: 5.33 / 0.02 = 266.7
        (256, 16, 256, 4, 200),
        (1, 1, 1000, 8, 10),  # never more often than every tenth step
        (8, None, 16, 4, 30),  # a sampler without a number of steps: rows alone
    ],
)
def test_without_eval_steps_evaluations_take_two_percent(eval_rows, eval_steps_each, step_rows, steps_each, every):
    def bound(steps):
        return FILLED if steps is None else Unmask(max_new_tokens=16, diffusion_steps=steps)

    recipe = tiny_recipe(
        "x",
        validation_task=Sudoku(split="validation", size=eval_rows),
        train_batch_size=step_rows // 8 or 1,
        num_generations=8 if step_rows >= 8 else 1,
        sampler=bound(steps_each),
        eval_sampler=bound(eval_steps_each),
        eval_steps=None,
    )
    assert validation_interval(recipe) == every
    assert [validation_interval(with_changes(recipe, eval_steps=steps)) for steps in (0, 7)] == [0, 7]


FILLED = FunctionSampler(function=lambda policy, prompts, generator: None, max_new_tokens=0)  # fills in blanks


def test_evaluations_change_no_other_number_and_a_best_checkpoint_needs_one(tmp_path):
    rows = [{"prompt": f"{a}{b}=", "answer": f"{b}{a}"} for a in "1234" for b in "1234"]

    def right(completions, answer, **columns):
        return [sum(map(str.__eq__, *pair)) / 2 for pair in zip(completions, answer, strict=True)]

    sizes = {"hidden_size": 16, "num_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    options = {"train_batch_size": 2, "num_generations": 4, "max_new_tokens": 2, "num_steps": 2, "report_to": None}
    curves = {}
    for steps in (1, 0):
        model, folder = tiny_masked_lm(characters="1234=", **sizes), tmp_path / str(steps)
        grpo(model, rows, right, eval_split=1, eval_steps=steps, output_dir=str(folder), **options)
        curves[steps] = metrics_of(folder)
    names = {name for row in curves[1] for name in row if name.startswith("eval/")}
    assert names and all(names <= row.keys() for row in curves[1])
    assert [{name: value for name, value in row.items() if name not in names} for row in curves[1]] == curves[0]
    with pytest.raises(ValueError, match=r"saves.best.metric.*every 30 steps.*evaluation.steps"):
        grpo(
            model, rows, right, eval_split=4, metric_for_best_model="reward", output_dir=str(tmp_path / "x"), **options
        )


def test_a_line_shows_all_that_a_task_is_judged_by():
    before = {"parsed": 1.0, "mine": 0.25, "reward": 1.5}
    assert format_metrics(before) == "reward 1.500 (mine 0.250)"
    assert format_metrics({"mine": 0.25, "reward": 0.25}) == "reward 0.250", "a single function is the reward"
    assert format_metrics({"a": 0.25, "b": 0.25, "reward": 0.25}) == "reward 0.250 (a 0.250, b 0.250)"
    assert format_metrics({"mine": 0.25}) == "mine 0.250" and format_metrics({"parsed": 1.0}) == "no reward"
    after = {"mine": 0.5, "reward": 2.0, "new": 1.0}
    assert format_change(before, after) == "reward 1.500 -> 2.000 (mine 0.250 -> 0.500)"


@pytest.mark.parametrize(
    ("warmup_steps", "steps", "said"),
    [
        (7, 0, "the warm-up alone, 7 supervised steps and no RL: reward 0.500 on 3 held-out problems"),
        (0, 0, "no training: reward 0.500 on 3 held-out problems"),
        (7, 2, "reward 0.250 -> 0.500 on 3 held-out problems, after 7 warm-up and 2 RL steps"),
    ],
)
def test_a_run_without_rl_says_that_it_was_the_warm_up(warmup_steps, steps, said):
    run = SimpleNamespace(state=SimpleNamespace(step=steps, warmup_steps=warmup_steps))
    assert result_text(run, {"reward": 0.25}, {"reward": 0.5}, "3 held-out problems") == said


class Mine(Wrapped):
    """Sudoku whose only metric beside the reward is `mine`."""

    def reward(self, problem, completion):
        return replace(self.task.reward(problem, completion), breakdown={"mine": 1.0})


NAMED = {
    "best": lambda name: {"metric_for_best_model": name},
    "callback": lambda name: {"callbacks": [StopBelow(f"eval/{name}", 0.0)]},
    "warm-up": lambda name: {"sft_warmup_metric": name, "sft_warmup_steps": 1, "sft_warmup_eval_steps": 1},
}


@pytest.mark.parametrize("named", NAMED.values(), ids=NAMED)
@pytest.mark.repeated(first_only=True)
def test_a_metric_is_looked_for_where_it_is_measured(named, tmp_path, rehearsal):
    """On validation_task: its metrics are enough, and those of eval_task or task do not count."""

    def of(folder, name, **tasks):
        small = {"num_steps": 1, "eval_steps": 1, "train_batch_size": 2, **ONE_PUZZLE}
        return tiny_recipe(tmp_path / folder, **small | named(name) | tasks)

    few, some = Mine(Sudoku(split="test", size=4)), Mine(Sudoku(split="train", size=8))
    train(of("a", "solve_rate", task=some, eval_task=few))
    train(of("b", "mine", validation_task=few))
    with pytest.raises(ValueError, match=r"solve_rate.* is not a metric of the evaluations: mine, parsed"):
        train(of("c", "solve_rate", validation_task=few))
    assert not (tmp_path / "c").exists()


def never(*_, **__):
    raise AssertionError("a model was made before the names of the metrics were checked")


def half(completions, answer=None, **columns):
    return [None if answer is None else 0.5 for _ in completions]


def length(completions, **columns):
    return [float(len(text)) for text in completions]


ROWS = task_from_dataset([{"prompt": "1="}, {"prompt": "2=", "answer": "2"}], reward_funcs=[length, half])
PLACES = {
    "rows of a data set": ({"validation_task": ROWS, "eval_task": ROWS}, "lenght", "half, length, parsed, reward;"),
    "a part of the reward": ({"validation_task": ROWS}, "length/mean", "half, length, parsed, reward"),
    "a task of the library": ({}, "cell_accurcy", "cell_accuracy, .*parsed, .*; the nearest is 'cell_accuracy'"),
    "a protocol": ({"validation_task": under_protocol(Sudoku(split="test", size=2), "d1")}, "accuracy", "parsed"),
}  # fmt: skip


@pytest.mark.parametrize("named", NAMED.values(), ids=NAMED)
@pytest.mark.parametrize("dry_run", [False, True])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.repeated(first_only=True)
def test_a_metric_that_does_not_exist_is_refused_before_a_model_is_made(named, dry_run, place, tmp_path):
    tasks, name, known = PLACES[place]
    recipe = tiny_recipe(tmp_path, num_steps=2, eval_steps=1, dry_run=dry_run, **ONE_PUZZLE | tasks)
    recipe = recipe if dry_run else recipe.replace(model=never)
    with pytest.raises(ValueError, match=f"{name}.*is not a metric of the evaluations: .*{known}"):
        train(with_changes(recipe, **named(name)))


def test_a_function_that_returns_none_for_some_rows_is_a_metric_by_name(tmp_path, rehearsal):
    """Its number for the first row, which the rehearsal grades, says nothing about the others."""
    settings = {"num_steps": 1, "eval_steps": 1, "train_batch_size": 2, "eval_task": ROWS, "validation_task": ROWS}
    train(tiny_recipe(tmp_path, metric_for_best_model="half", callbacks=[StopBelow("eval/half", 0.0)], **settings))


@pytest.mark.parametrize(
    "changes", [{"saves": Saves(best=Best(metric="los"))}, {"callbacks": [StopBelow("eval/accuracy")]}]
)
def test_sft_names_its_only_metric(changes):
    SFT(
        name="x",
        model=never,
        dataset=[],
        evaluation=Evaluation(steps=1),
        saves=Saves(best=Best(metric="eval_loss")),
        callbacks=[StopBelow("eval/loss")],
    )
    with pytest.raises(ValueError, match=r"(los'|accuracy.*) is not the metric of the held-out rows, which is loss"):
        SFT(name="x", model=never, dataset=[], evaluation=Evaluation(steps=1), **changes)
