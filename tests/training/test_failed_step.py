"""A failed step: the state before it is saved, so that a resume repeats the step."""

from functools import partial

import pytest
import torch
from run_outputs import assert_same_weights
from tiny_recipe import SIZES, tiny_recipe

from dllm_rl import Callback
from dllm_rl.algorithms.correctors import FunctionCorrector
from dllm_rl.algorithms.replay import Replay
from dllm_rl.checkpoints import checkpoint
from dllm_rl.models.lora_settings import Lora
from dllm_rl.models.tiny import tiny_masked_lm
from dllm_rl.screen import line_of
from dllm_rl.step.collect import draw_indices
from dllm_rl.tasks.sudoku import Sudoku
from dllm_rl.training.trainer import train

pytestmark = pytest.mark.usefixtures("no_rehearsal")

# The recipe's grader raises on a problem that step 1 draws and no earlier one.
DRAWN = [draw_indices(64, 4, 0, "train", step).tolist() for step in range(2)]
HIT = next(i for i in DRAWN[1] if i not in {0, *DRAWN[0]})


class Raising:
    name = "raising"
    version = "1"
    task = Sudoku(split="train", size=64)

    def __init__(self):
        self.fixed = False

    def __repr__(self):
        return "Raising"

    def __len__(self):
        return 64

    def __getitem__(self, index):
        return self.task[index]

    def reward(self, problem, completion):
        if problem == self.task[HIT] and not self.fixed:
            raise ZeroDivisionError("by [/red] zero")
        return self.task.reward(problem, completion)


def small(folder, **changes):
    """A recipe of two steps, with a reference, whose first checkpoint after the start is at its end."""
    model = partial(tiny_masked_lm, **SIZES | {"hidden_size": 16, "num_layers": 1})
    fixed = {"model": model, "beta": 0.1, "num_steps": 2, "learning_rate": 5e-3, "save_steps": 2}
    fixed |= {"rollout_quantization": None, "eval_task": Sudoku(split="test", size=1)}
    return tiny_recipe(folder, **fixed | changes)


def failed(folder, error=Exception, **changes) -> str:
    """The notes of the error that ended a run."""
    with pytest.raises(error) as raised:
        train(small(folder, **changes))
    return "\n".join(raised.value.__notes__)


def steps(run) -> list[int]:
    return [step for step, _ in checkpoint.list_checkpoints(run / "checkpoints")]


def test_weights_that_a_failed_optimizer_step_has_changed_are_not_saved(tmp_path, monkeypatch):
    """The second update changes a weight, and then fails: no later checkpoint than that of the start is whole."""
    plain, calls = torch.optim.AdamW.step, []

    def halfway(self, *arguments, **keywords):
        calls.append(self)
        if len(calls) < 2:
            return plain(self, *arguments, **keywords)
        with torch.no_grad():
            self.param_groups[0]["params"][0].add_(1)
        raise ZeroDivisionError("halfway")

    monkeypatch.setattr(torch.optim.AdamW, "step", halfway)
    note = failed(tmp_path / "run", ZeroDivisionError)
    assert steps(tmp_path / "run") == [0] and "step 1" in note


def test_the_state_before_the_failed_step_is_saved_and_the_fixed_run_is_the_whole_one(tmp_path):
    task = Raising()
    note = failed(tmp_path / "run", RuntimeError, task=task)
    assert steps(tmp_path / "run") == [0, 1]
    assert note.startswith(
        "process 0, whose last stage was reward: failed after step 1 was complete; fix the cause and continue with "
        "resume_from_checkpoint='latest'"
    )
    assert "\n" not in note
    again = failed(tmp_path / "run", RuntimeError, task=task, resume_from_checkpoint="latest")
    assert again == note and steps(tmp_path / "run") == [0, 1], "a resume repeats the step"
    task.fixed = True
    parts = train(small(tmp_path / "run", task=task, resume_from_checkpoint="latest", allow_changed="task"))
    assert_same_weights(parts, train(small(tmp_path / "whole", task=task)))


def test_a_gradient_that_is_not_finite_loses_no_step(tmp_path):
    """It is met in the update, before the weights change."""

    class Done(Callback):
        steps = 0

        def on_step(self, run, metrics):
            self.steps = run.step

    def huge(log_ratio, advantages, mask):
        return log_ratio * (float("inf") if done.steps else 1.0)

    done = Done()
    note = failed(tmp_path, FloatingPointError, loss=huge, callbacks=[done])
    assert "stage was update: failed after step 1 was complete" in note and steps(tmp_path) == [0, 1]


def test_weights_that_an_update_has_begun_to_change_are_not_saved(tmp_path):
    def in_second_iteration(log_ratio, advantages, mask):
        if log_ratio.any():
            raise RuntimeError("the surrogate has met a ratio")
        return advantages[:, None] * log_ratio.exp()

    changes = {"corrector": FunctionCorrector(loss=in_second_iteration), "lora": Lora(r=2)}
    late = {"num_iterations": 2, "lr_schedule": lambda step, num_steps: float(step > 0)}
    note = failed(tmp_path, RuntimeError, **changes, **late)
    assert "failed after step 1 was complete and is not saved; the newest checkpoint is step-000000; fix" in note
    assert steps(tmp_path) == [0]


@pytest.mark.parametrize("kind", [RuntimeError, KeyError, FloatingPointError])
@pytest.mark.parametrize("learns", [False, True], ids=["", "replay"])
def test_an_update_that_is_done_is_saved_whatever_ends_its_measurement(tmp_path, monkeypatch, kind, learns):
    """As the loss of another process does. Weights whose logits are not finite are not saved."""
    monkeypatch.setattr("dllm_rl.step.settings.MEASURE_STEPS", 2)
    changes = {"replay": Replay(min_reward=0.0), "beta": 0.0} if learns else {}
    with monkeypatch.context() as patched, pytest.raises(kind) as raised:
        patched.setattr("dllm_rl.step.update.update_direction", partial(raises, kind))
        train(small(tmp_path / "run", num_steps=3, save_steps=100, **changes))
    is_saved = kind is not FloatingPointError
    assert steps(tmp_path / "run") == ([0, 2] if is_saved else [0])
    assert f"failed after step {2 if is_saved else 1} was {'updated' if is_saved else 'complete'}" in str(
        raised.value.__notes__
    )
    parts = train(small(tmp_path / "run", num_steps=3, resume_from_checkpoint="latest", **changes))
    assert_same_weights(parts, train(small(tmp_path / "whole", num_steps=3, **changes)))


def raises(kind, *_):
    raise kind("of the measurement")


def test_where_nothing_can_be_saved_the_error_is_still_the_first(tmp_path, monkeypatch):
    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    calls = []

    def failing(rewards, group):
        if not torch.equal(rewards, torch.arange(len(rewards)) / len(rewards)):  # a run tries them on these first
            calls.append(1)
        if len(calls) == 2:
            monkeypatch.setattr(checkpoint.torch, "save", full)
            raise KeyError("the first")
        return rewards

    note = failed(tmp_path, KeyError, advantages=failing)
    assert "and saving it failed too: [Errno 28]" in note and steps(tmp_path) == [0]


@pytest.mark.slow
def test_an_error_after_the_last_step_says_that_a_resume_finishes_the_run(tmp_path, monkeypatch):
    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("dllm_rl.training.results.write_json", full)
        note = failed(tmp_path, OSError)
    assert "failed after step 2 was complete; fix the cause and continue with resume_" in note
    assert train(small(tmp_path, resume_from_checkpoint="latest"))["eval_after"]


def test_what_is_no_failed_step_leaves_none(tmp_path, rehearsal, monkeypatch):
    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    with pytest.raises(ValueError, match="exceed the model's 64 positions") as raised:
        train(tiny_recipe(tmp_path / "a", max_prompt_length=10**6))
    assert not hasattr(raised.value, "__notes__") and not (tmp_path / "a").exists()
    monkeypatch.setattr(checkpoint.torch, "save", full)
    with pytest.raises(OSError, match="was not saved") as raised:
        train(tiny_recipe(tmp_path / "b", num_steps=1))
    assert not hasattr(raised.value, "__notes__")


class Moved(Raising):
    """Its grader renames the run's folder in the first step."""

    def __init__(self, folder):
        self.folder, self.graded = folder, 0

    def reward(self, problem, completion):
        self.graded += 1
        if self.graded == 10:
            self.folder.rename(self.folder.with_name("elsewhere"))
        return self.task.reward(problem, completion)


def test_a_folder_that_is_renamed_during_the_run_is_missed_after_the_step(tmp_path):
    folder = tmp_path / "run"
    with pytest.raises(OSError, match="was removed or renamed during the run") as raised:
        train(small(folder, task=Moved(folder), save_steps=9))
    assert len(line_of(raised.value)) <= 390 + len(str(folder))
    assert steps(folder) == [1] and steps(tmp_path / "elsewhere") == [0]
