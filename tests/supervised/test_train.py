"""Supervised fine-tuning: layouts, runs that stop and go on, processes, and rows that cannot be learned."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from run_outputs import assert_same_weights, metrics_of
from sft_toys import MODELS, ROWS, masks, tiny_sft, trainer_of
from tiny_recipe import SIZES, tiny_recipe

from dllm_rl.algorithms.optimizers import AdamW, LinearDecay
from dllm_rl.cli.run_recipe import main
from dllm_rl.config import from_command_line
from dllm_rl.models.load import load_policy
from dllm_rl.models.lora_settings import Lora
from dllm_rl.models.tiny import tiny_masked_lm
from dllm_rl.supervised.examples import read_examples
from dllm_rl.supervised.trainer import SupervisedTrainer
from dllm_rl.training.fine_tune import fine_tune, read_datasets, rows_of_step, sft
from dllm_rl.training.trainer import train

pytestmark = pytest.mark.usefixtures("no_rehearsal")

ROOT = Path(__file__).parents[2]


@pytest.mark.repeated
@pytest.mark.parametrize("kind", MODELS)
def test_the_layout_does_not_change_the_gradient(kind):
    policy = MODELS[kind]()
    examples = read_examples(tiny_sft(), policy, ROWS)
    gradients, losses, paddings = [], [], []
    for changes in ({}, {"micro_batch_size": 3}):
        policy.module.zero_grad()
        loss, (padding, _) = trainer_of(policy, **changes).add_gradients(examples, masks())
        losses.append(loss)
        paddings.append(padding.item())
        gradients.append({name: p.grad.clone() for name, p in policy.module.named_parameters() if p.grad is not None})
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=1e-6)
    assert gradients[0].keys() == gradients[1].keys() and gradients[0]
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-4, atol=1e-6)
    assert paddings[0] > 0 and losses[0] > 0


def test_a_run_that_was_stopped_and_resumed_is_the_same_bit_for_bit(tmp_path):
    lora = Lora(r=4, alpha=64.0, dropout=0.05)
    options = {"lora": lora, "eval_steps": 1, "gradient_checkpointing": True, "num_steps": 2}
    straight = fine_tune(tiny_sft(tmp_path / "straight", **options))

    def stopping(step, num_steps):
        if step == 0 and not (tmp_path / "parts/checkpoints/step-000001").exists():
            os.kill(os.getpid(), signal.SIGUSR1)
        return LinearDecay()(step, num_steps)

    recipe = tiny_sft(tmp_path / "parts", **options)
    with pytest.raises(SystemExit) as stopped:
        fine_tune(replace(recipe, lr_schedule=stopping))
    assert stopped.value.code == 128 + signal.SIGUSR1
    resumed = fine_tune(replace(recipe, lr_schedule=stopping, resume_from_checkpoint="latest"))
    assert_same_weights(straight, resumed)
    assert metrics_of(tmp_path / "straight") == metrics_of(tmp_path / "parts")
    assert straight["eval_after"] == resumed["eval_after"] and straight["eval_before"] == resumed["eval_before"]


def test_a_step_that_fails_saves_the_last_finished_one(tmp_path, monkeypatch):
    """RL's way of saving is SFT's: the checkpoint holds what a run of so many steps ends with."""

    def failing(trainer, *given, place, **options):
        if place == "step 1":
            raise KeyError("a fault")
        return step(trainer, *given, place=place, **options)

    step = SupervisedTrainer.step

    recipe = tiny_sft(tmp_path / "run", num_steps=2, save_steps=100)
    with monkeypatch.context() as patched, pytest.raises(KeyError, match="a fault") as raised:
        patched.setattr(SupervisedTrainer, "step", failing)
        fine_tune(recipe)
    assert "failed after step 1 was complete; fix the cause and continue" in raised.value.__notes__[0]
    assert sorted(path.name for path in (tmp_path / "run/checkpoints").glob("step-*")) == ["step-000000", "step-000001"]
    resumed = fine_tune(replace(recipe, resume_from_checkpoint="latest"))
    assert_same_weights(fine_tune(replace(recipe, output_dir=str(tmp_path / "whole"))), resumed)


def test_lora_trains_adapters_alone(tmp_path):
    model = tiny_masked_lm(**SIZES)
    policy = fine_tune(tiny_sft(tmp_path, model=model, lora=Lora(r=4, alpha=64.0, dropout=0.05), num_steps=1)).policy
    state = {name.replace(".base_layer", ""): value for name, value in policy.module.state_dict().items()}
    for name, value in model.module.state_dict().items():
        assert torch.equal(state[name], value)
    assert any(value.any() for name, value in state.items() if "lora_B" in name)
    assert (tmp_path / "checkpoints/step-000001/adapter/adapter_model.safetensors").exists()


@pytest.mark.parametrize("kind", ["masked", pytest.param("causal", marks=pytest.mark.slow)])
@pytest.mark.usefixtures("pictures")
def test_it_learns_and_rl_starts_from_its_checkpoint(tmp_path, kind):
    settings = {"num_steps": 21, "train_batch_size": 14, "learning_rate": 2e-2, "eval_dataset": ROWS[:4]}
    settings |= {"output_dir": str(tmp_path / "sft"), "max_length": 16, "report_to": None}
    summary = sft(MODELS[kind](), ROWS, **settings)
    assert summary["eval_after"]["loss"] < 0.5 * summary["eval_before"]["loss"]
    assert (tmp_path / "sft/training.png").stat().st_size > 1000
    rows = metrics_of(tmp_path / "sft")
    # An evaluation is 4 forwards of 4 rows, and a step 3 of 14: 2 % are 19.05 steps.
    assert kind != "masked" or [row["step"] for row in rows if "eval/loss" in row] == [19]
    assert rows[-1]["epoch"] == pytest.approx(21 * 14 / 16) and rows[-1]["loss"] < rows[0]["loss"]
    if kind == "masked":
        recipe = tiny_recipe(tmp_path / "rl", model=summary["checkpoint"], num_steps=1)
        first = load_policy(summary["checkpoint"]).module.state_dict()
        assert train(recipe)["checkpoint"].endswith("step-000001")
        start = load_policy(tmp_path / "rl/checkpoints/step-000000").module.state_dict()
        assert all(torch.equal(value, start[name]) for name, value in first.items())


def test_the_held_out_loss_does_not_depend_on_its_batches():
    policy = tiny_masked_lm(**SIZES)
    examples = 4 * read_examples(tiny_sft(), policy, ROWS)
    found = [trainer_of(policy).loss(examples, masks(), micro_batch_size=size) for size in (3, 64)]
    assert found[1] == pytest.approx(found[0], rel=1e-5) and found[0] > 1


@pytest.mark.parametrize("kind", MODELS)
def test_autocast_rounds_and_no_more(kind):
    policy = MODELS[kind]()
    examples = read_examples(tiny_sft(), policy, ROWS)
    exact, rounded = (trainer_of(policy, bf16=b).add_gradients(examples, masks())[0].item() for b in (False, True))
    assert rounded == pytest.approx(exact, rel=0.02) and rounded != exact


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path):
    found = []
    words = ["--num_steps", "3", "--train_batch_size", "8", "--evaluation.steps", "2", "--log.report_to", "none"]
    words += ["--micro_batch_size", "2"]
    for name, launcher in (("one", ["--cpu"]), ("two", ["--config_file", "recipes/accelerate/cpu_2.yaml"])):
        command = [sys.executable, "-m", "accelerate.commands.launch", *launcher, "recipes/sft_tiny.py", *words]
        command += ["--output_dir", str(tmp_path / name)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        found.append(metrics_of(tmp_path / name))
    assert len(found[0]) == 3 and "eval/loss" in found[0][1]
    for a, b in zip(*found, strict=True):
        assert a == pytest.approx(b, rel=2e-3, abs=2e-5)


def test_model_and_rows_may_be_path_objects(tmp_path):
    tiny_masked_lm(**SIZES).save_pretrained(tmp_path / "Model")
    rows = tmp_path / "rows.jsonl"
    rows.write_text(2 * '{"text": "12=34"}\n')
    options = {"num_steps": 1, "max_length": 8, "train_batch_size": 1, "report_to": "none"}
    summary = sft(tmp_path / "Model", rows, eval_dataset=rows, output_dir=tmp_path / "run", **options)
    assert summary["recipe"]["name"] == "model" and summary["eval_rows"] == 2
    with pytest.raises(ValueError, match=r"has no length .*give its first rows, list\(itertools.islice"):
        sft(tmp_path / "Model", iter([]), output_dir=tmp_path / "other", **options)


def test_an_epoch_shows_every_row_once():
    steps = [rows_of_step(10, 4, 0, step) for step in range(5)]
    seen = [i for step in steps for i in step]
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10)) and seen[:10] != seen[10:]
    assert rows_of_step(10, 10, 0, 0) != rows_of_step(10, 10, 1, 0), "another seed, another order"


def test_a_file_of_json_lines_from_the_command_line(tmp_path, monkeypatch):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    words = ["--dataset", str(file), "--output_dir", str(tmp_path / "run"), "--num_steps", "1", "--optim.beta1", "0.8"]
    recipe = from_command_line(tiny_sft(), words)
    assert recipe.dataset == str(file) and recipe.optim == AdamW(beta1=0.8, beta2=0.95, weight_decay=0.01)
    monkeypatch.setattr("sys.argv", ["sft.py", *words])
    summary = main(tiny_sft())
    assert summary["eval_rows"] == 1 and summary["recipe"]["dataset"].startswith("15 rows, ")
    with pytest.raises(ValueError, match="dataset='14 rows"):
        changed = tiny_sft(tmp_path / "run", dataset=ROWS[1:], num_steps=1, adam_beta1=0.8)
        fine_tune(replace(changed, resume_from_checkpoint="latest"))
    assert [len(rows) for rows in read_datasets(str(file), None, None)] == [15, 1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dataset": [{"a": "1"}] * 3}, "dataset: row 0: has no columns messages, prompt and completion, or text"),
        ({"dataset": [{"text": "1"}] * 9 + [{"text": ""}]}, "dataset: row 9: has nothing to learn"),
        ({"eval_dataset": [{"text": "1"}, {"text": ""}]}, "eval_dataset: row 1: has nothing to learn"),
        ({"dataset": [{"text": ""}] * 3}, "dataset: row 0: has nothing to learn"),
        (
            {"dataset": [{"prompt": "1", "completion": []}] * 3},
            r"dataset: row 0: prompt and completion=\[\] is neither text nor chat messages",
        ),
        ({"dataset": []}, "dataset is empty"),
        ({"max_length": 3}, "all of 15 rows are longer than max_length=3"),
        ({"max_length": 65}, "max_length=65 is more than the model's 64 positions"),
        (
            {"dataset": [{"prompt": "1", "completion": "23"}] * 3, "completion_length": 1},
            r"all of 2 rows are longer than max_length=\d+, or their completion than completion_length=1; raise it",
        ),
        ({"dataset": [{"messages": [{"role": "user", "content": "1"}]}] * 3}, "has no chat template"),
    ],
)
def test_what_cannot_be_shown_is_refused_before_anything_is_written(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        fine_tune(tiny_sft(tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


def test_another_kind_of_run_is_not_resumed(tmp_path):
    fine_tune(tiny_sft(tmp_path, num_steps=1))
    with pytest.raises(ValueError, match="comes from another kind of run, without eval_sampler, eval_task"):
        train(tiny_recipe(tmp_path, name="tiny", resume_from_checkpoint="latest"))


def test_each_step_hides_other_tokens():
    policy = tiny_masked_lm(**SIZES)
    examples = read_examples(tiny_sft(), policy, ROWS)
    losses = [trainer_of(policy).add_gradients(examples, masks(step))[0].item() for step in (0, 1, 1)]
    assert losses[0] != losses[1] == losses[2]


def test_each_step_of_a_run_hides_other_tokens(tmp_path):
    """One row, and a learning rate that moves no weight: only the masks can change the loss."""
    fine_tune(tiny_sft(tmp_path, dataset=ROWS[1:2] * 8, eval_dataset=ROWS[:1], learning_rate=1e-30, num_steps=3))
    losses = sorted(row["loss"] for row in metrics_of(tmp_path))
    assert len(losses) == 3 and all(after - before > 1e-3 for before, after in pairwise(losses))


def test_a_step_goes_as_far_as_rate_schedule_and_clipped_gradient_say(tmp_path):
    """Plain descent: 0.04 times the first factor of four steps, 1/4, times a gradient scaled down to 0.25."""

    def descent(parameters, lr):
        return torch.optim.SGD(parameters, lr=lr)

    given = {"optim": descent, "learning_rate": 0.04, "max_grad_norm": 0.25}
    given |= {"lr_schedule": lambda step, num_steps: 1 / num_steps, "lr_schedule_steps": 4}
    policy = fine_tune(tiny_sft(tmp_path, num_steps=1, **given)).policy
    start = tiny_masked_lm(**SIZES)
    pairs = zip(policy.module.parameters(), start.module.parameters(), strict=True)
    moved = torch.cat([(after - before).detach().flatten() for after, before in pairs]).norm().item()
    (row,) = metrics_of(tmp_path)
    assert row["grad_norm"] > 0.5 and row["learning_rate"] == pytest.approx(0.01)
    assert moved == pytest.approx(0.0025, rel=1e-3)


@pytest.mark.slow
def test_a_resumed_model_keeps_its_dtype(tmp_path):
    model = tiny_masked_lm(**SIZES)
    model.module.bfloat16()
    recipe = tiny_sft(tmp_path, model=model, num_steps=1, lr_schedule_steps=2)
    fine_tune(recipe)
    policy = fine_tune(replace(recipe, num_steps=2, resume_from_checkpoint="latest")).policy
    assert {p.dtype for p in policy.module.parameters()} == {torch.bfloat16}


def test_a_run_of_sft_saves_in_the_background_what_it_saves_otherwise(tmp_path):
    runs = [tmp_path / "waits", tmp_path / "goes on"]
    for folder in runs:
        fine_tune(tiny_sft(folder, num_steps=3, save_steps=1, save_total_limit=9, async_save=folder is runs[1]))
    for step in (1, 2, 3):
        waited, went_on = (load_policy(folder / "checkpoints" / f"step-{step:06d}").module for folder in runs)
        assert all(torch.equal(x, y) for x, y in zip(waited.parameters(), went_on.parameters(), strict=True))
