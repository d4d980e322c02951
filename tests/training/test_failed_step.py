"""A failed step: the state before it is saved, what it had made is dumped, and `dllm-rl replay` runs it again."""

import json
import pickle
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from runs import assert_same_weights
from safetensors.torch import load_file, save_file
from tiny_recipe import tiny_recipe

from dllm_rl.cli import replay
from dllm_rl.cli.main import main
from dllm_rl.training import checkpoint, train
from dllm_rl.training.prompts import draw_indices

# The recipe's grader raises, or waits to, on a problem that step 2 draws and no earlier one.
DRAWN = [draw_indices(64, 4, 0, "train", step).tolist() for step in range(3)]
HIT = next(i for i in DRAWN[2] if i not in {0, *DRAWN[0], *DRAWN[1]})

SCRIPT = """
import torch
from dataclasses import replace
from functools import partial
from pathlib import Path
from dllm_rl import tiny_masked_lm
from dllm_rl.algorithms.correctors import none
from dllm_rl.models.lora import Lora
from dllm_rl.tasks.sudoku import Sudoku
from dllm_rl.training import train
from tiny_recipe import SIZES, tiny_recipe

class Raising:
    name, version, mended = "raising", "1", Path(__file__).with_name("mended")
    task = Sudoku(split="train", size=64)
    def __repr__(self): return "Raising"
    def __len__(self): return 64
    def __getitem__(self, index): return self.task[index]
    def reward(self, problem, completion):
        if problem == self.task[HIT] and not self.mended.exists():
            raise ZeroDivisionError("by [/red] zero")
        return self.task.reward(problem, completion)

def nothing(rewards):  # but of the made-up rewards of a rehearsal
    return rewards if rewards.max() == rewards.numel() - 1 else rewards * float("nan")

def in_second_iteration(log_ratio, advantages, mask):
    if log_ratio.any():
        raise RuntimeError("the surrogate has met a ratio")
    return advantages[:, None] * log_ratio.exp()

def late(step, num_steps):
    return float(step > 0)

twice = {"num_iterations": 2, "lr_schedule": late, "lora": partial(Lora, r=2), "warmup_steps": 2}
FAULTS = {
    "grader": {"task": Raising()},
    "gradient": {"advantages": nothing},
    "second iteration": {"corrector": replace(none(), surrogate=in_second_iteration)} | twice,
}
small = {"model": partial(tiny_masked_lm, **SIZES | {"hidden_size": 16, "num_layers": 1}), "beta": 0.1, "num_steps": 4}
recipe = tiny_recipe("x", learning_rate=5e-3, **small | FAULTS["WHICH"])

if __name__ == "__main__":
    raise AssertionError("the script was run")
"""


def failed(folder: Path, which: str) -> tuple[Path, str]:
    """The script of a recipe that was trained until it failed, and the error's notes."""
    script = folder / "script.py"
    script.write_text(SCRIPT.replace("HIT", str(HIT)).replace("WHICH", which))
    with pytest.raises((RuntimeError, FloatingPointError)) as raised:
        train(recipe_of(script, folder / "run"))
    return script, "\n".join(raised.value.__notes__)


def recipe_of(script: Path, directory: Path, **changes):
    return replace(replay.recipe_of(script), output_dir=str(directory), **changes)


@pytest.fixture(scope="module")
def grader(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("grader")
    return failed(folder, "grader")[0]


def replayed(*arguments: object) -> int:
    return main(["replay", *map(str, arguments)])


def steps(run: Path) -> list[int]:
    return [step for step, _ in checkpoint.found(run / "checkpoints")]


def test_the_state_before_the_failed_step_is_saved_and_the_mended_run_is_the_whole_one(tmp_path):
    script, note = failed(tmp_path, "grader")
    run = tmp_path / "run"
    assert steps(run) == [0, 2] and "\n" not in note
    assert note.startswith("process 0: the step after step 2 failed; mend the cause and continue with --resume_from_ch")
    assert f"dllm-rl replay {run}/failed/step-000002" in note
    assert list(DRAWN[2]).count(HIT) and json.loads((run / "failed/step-000002/dump.json").read_text())["seed"] == 0
    (tmp_path / "mended").touch()
    parts = train(recipe_of(script, run, resume_from_checkpoint="latest"))
    assert_same_weights(parts, train(recipe_of(script, tmp_path / "whole")))


def test_a_dump_holds_what_was_made(grader):
    made = load_file(grader.parent / "run/failed/step-000002/made.safetensors")
    assert made["rollout.tokens"].shape[0] == 16 and made["rollout.logprobs"].isfinite().all()
    assert not any(name.startswith(("noise", "logps", "batch")) for name in made)


def test_a_replay_fails_on_the_same_numbers(grader, capsys):
    assert replayed(grader.parent / "run/failed/step-000002", grader) == 0
    out = capsys.readouterr().out
    assert re.search(r"step after step 2 failed as before, its \d+ tensors the same bit for bit: RuntimeError", out)
    assert "ZeroDivisionError('by [/red] zero')" in out and steps(grader.parent / "run") == [0, 2]


def test_a_replay_tells_what_differs(grader, tmp_path, capsys):
    shutil.copytree(grader.parent, tmp_path / "copy")
    dump, script = tmp_path / "copy/run/failed/step-000002", tmp_path / "copy/script.py"
    made = load_file(dump / "made.safetensors")
    made["rollout.logprobs"][0, -1] += 1e-6
    save_file(made, dump / "made.safetensors")
    assert replayed(dump, script) == 1
    assert "Tensors that differ: rollout.logprobs\n" in capsys.readouterr().out
    (tmp_path / "copy/mended").touch()
    assert replayed(dump, script) == 1
    assert "The step after step 2 did not fail. Before, it did: RuntimeError" in capsys.readouterr().out
    assert replayed(dump, script, "--seed", 1) == 2
    assert "seed=1 differs from the checkpoint's 0" in capsys.readouterr().err


def test_a_gradient_that_is_not_finite(tmp_path, capsys):
    script, note = failed(tmp_path, "gradient")
    dump = tmp_path / "run/failed/step-000000"
    assert str(dump) in note and load_file(dump / "made.safetensors")["batch.advantages"].isnan().all()
    assert replayed(dump, script) == 0
    assert "the same bit for bit: FloatingPointError: gradient norm is nan" in capsys.readouterr().out


def test_weights_that_an_update_has_begun_to_change_are_not_saved(tmp_path, capsys):
    script, _ = failed(tmp_path, "second iteration")
    assert steps(tmp_path / "run") == [0]
    assert replayed(tmp_path / "run/failed/step-000001", script) == 0  # two steps from step 0
    assert "the same bit for bit: RuntimeError: the surrogate has met a ratio" in capsys.readouterr().out


class TestHostileDumps:
    @pytest.fixture
    def dump(self, grader, tmp_path) -> Path:
        return Path(shutil.copytree(grader.parent / "run", tmp_path / "run")) / "failed/step-000002"

    def refused(self, capsys, said: str, *arguments: object) -> None:
        assert replayed(*arguments) == 2
        err = capsys.readouterr().err
        assert re.search(said, err) and err.count("\n") == 1, err

    def test_no_code_is_run_because_a_dump_names_it(self, dump, grader, capsys):
        facts = json.loads((dump / "dump.json").read_text())
        (dump / "dump.json").write_text(json.dumps(facts | {"command": ["\x1b[2J" + str(grader)]}))
        self.refused(capsys, r"none is run because a dump names it.*script\.py", dump)

    @pytest.mark.parametrize(
        "change",
        [{"step": -1}, {"step": "2"}, {"step": True}, {"error": None}, {"versions": []}, {"format": 2}, {"command": 1}],
    )
    def test_facts_of_other_kinds(self, dump, grader, capsys, change):
        facts = json.loads((dump / "dump.json").read_text())
        (dump / "dump.json").write_text(json.dumps(facts | change))
        self.refused(capsys, "step-000002: the dump is damaged|is no dump of this version", dump, grader)

    def test_a_step_that_the_recipe_does_not_have(self, dump, grader, capsys):
        facts = json.loads((dump / "dump.json").read_text())
        (dump / "dump.json").write_text(json.dumps(facts | {"step": 10**12}))
        self.refused(capsys, "step=1000000000000 is none of the recipe's num_steps=4", dump, grader)

    def test_a_pickle_is_not_loaded(self, dump, grader, capsys):
        (dump / "made.safetensors").write_bytes(pickle.dumps({"rollout.tokens": torch.zeros(2)}))
        self.refused(capsys, "the dump is damaged: .*", dump, grader)
        (dump / "made.safetensors").unlink()
        self.refused(capsys, "is no dump of a failed step", dump, grader)
        (dump / "dump.json").write_bytes(b"\xff[")
        save_file({}, dump / "made.safetensors")
        self.refused(capsys, "the dump is damaged", dump, grader)

    def test_without_a_checkpoint_or_a_recipe(self, dump, grader, capsys):
        self.refused(capsys, "is no Python file; give the recipe's script", dump, dump / "dump.json")
        (dump / "empty.py").touch()
        self.refused(capsys, "empty.py has no `recipe`", dump, dump / "empty.py")
        (dump.parents[1] / "checkpoints").rename(dump / "elsewhere")
        self.refused(capsys, "holds no checkpoint of step 2 or before", dump, grader)


def test_what_is_no_failed_step_leaves_none(tmp_path, monkeypatch):
    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    with pytest.raises(ValueError, match="exceed the model's 64 positions") as raised:
        train(tiny_recipe(tmp_path / "a", max_prompt_length=10**6))
    assert not hasattr(raised.value, "__notes__") and not (tmp_path / "a/failed").exists()
    with monkeypatch.context() as patched, pytest.raises(OSError, match="No space") as raised:
        patched.setattr("dllm_rl.training.finish.plots.plot", full)  # after the last step, which is whole
        train(tiny_recipe(tmp_path / "end", num_steps=1))
    assert not hasattr(raised.value, "__notes__") and not (tmp_path / "end/failed").exists()
    monkeypatch.setattr(checkpoint.torch, "save", full)
    with pytest.raises(OSError, match="was not saved"):
        train(tiny_recipe(tmp_path / "b", num_steps=1))
    assert not (tmp_path / "b/failed").exists()


def test_where_nothing_can_be_saved_the_error_is_still_the_first(tmp_path, monkeypatch):
    def failing(rewards):
        if rewards.max() > 1:  # made-up ones, before the first step
            return rewards
        monkeypatch.setattr("dllm_rl.training.dump.save_file", unsaved)
        raise KeyError("the first")

    def unsaved(*arguments):
        raise OSError(28, "No space left on device")

    with pytest.raises(KeyError, match="the first") as raised:
        train(tiny_recipe(tmp_path, advantages=failing))
    assert "saving what there was failed too: [Errno 28] No space left" in raised.value.__notes__[0]
    assert not any((tmp_path / "failed").iterdir())
