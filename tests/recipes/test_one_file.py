"""recipes/one_file.py is the package in one file: the same steps of both, from the same weights, are compared.

They write the same tokens because they draw the same random numbers. Their forwards have the same shapes, so that even
the bits were equal, with AVX-512, AVX2 and neither; the bound of 1e-5 is for a machine that rounds otherwise.
"""

import re
import sys
from functools import partial

import pytest
import torch
from run_outputs import metrics_of

from dllm_rl import AIS, Float8WeightOnly, MaxProb, PPOClip, Recipe, Trajectory, Unmask
from dllm_rl.algorithms.advantages import GroupRelative
from dllm_rl.groups import Log, Saves
from dllm_rl.models.base import copied
from dllm_rl.models.tiny import tiny_masked_lm
from dllm_rl.samplers.sampler import FunctionSampler
from dllm_rl.tasks import Sudoku
from dllm_rl.training.trainer import train
from recipes import one_file

# Untrained: such a policy writes padding and end tokens too.
SIZES = {"characters": "1234.=", "hidden_size": 32, "num_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
TASK = Sudoku(split="train", clues=(10, 12))
CLOSE = {"rtol": 0, "atol": 1e-5}


class Recorded:
    """A run of the package with the settings of one_file, and what its sampler, advantages and loss were given."""

    def __init__(self, policy, settings, directory):
        self.rollouts = []
        self.rewards = []
        self.old = []
        length, steps = one_file.LENGTH, settings.diffusion_steps
        sample = Unmask(max_new_tokens=length, diffusion_steps=steps, rank=MaxProb(), temperature=1.0)

        def sampler(policy, prompts, generator):
            self.rollouts.append(sample(policy, prompts, generator))
            return self.rollouts[-1]

        def advantages(rewards, group):
            self.rewards.append(rewards)
            return GroupRelative()(rewards, group)

        def loss(log_ratio, advantages, mask, *, old_logprobs):
            self.old.append(old_logprobs)
            return PPOClip(epsilon=settings.epsilon)(log_ratio, advantages, mask)

        few = Sudoku(split="test", size=2)
        recipe = Recipe(
            name="package",
            model=policy,
            task=TASK,
            validation_task=few,
            eval_task=few,
            sampler=FunctionSampler(function=sampler, max_new_tokens=length),
            eval_sampler=sample,
            likelihood=Trajectory(),
            corrector=AIS(cap=settings.cap, tau=settings.tau),
            advantages=advantages,
            loss=loss,
            rollout_quantization=Float8WeightOnly(),
            seed=settings.seed,
            train_batch_size=settings.train_batch_size,
            num_generations=settings.num_generations,
            num_steps=settings.num_steps,
            num_iterations=settings.num_iterations,
            learning_rate=settings.learning_rate,
            lr_schedule=lambda step, num_steps: 1.0,
            max_grad_norm=settings.max_grad_norm,
            max_retained_graphs=settings.diffusion_steps,  # one backward for all views, as in one_file
            saves=Saves(steps=1000),
            log=Log(report_to=None),
            output_dir=str(directory),
        )
        self.module = train(recipe).policy.module
        self.metrics = metrics_of(directory)
        # Checks on made-up rewards came first.
        self.rewards = self.rewards[-settings.num_steps :]
        self.old = self.old[-settings.num_steps * settings.num_iterations :: settings.num_iterations]


@pytest.mark.usefixtures("no_rehearsal")
@pytest.mark.parametrize(
    "changed",
    [
        {"num_steps": 3},
        # Ratios leave 1 in the second update, and with such steps many of them the clip.
        pytest.param({"num_steps": 4, "num_iterations": 2, "learning_rate": 5e-3}, marks=pytest.mark.nightly),
        # Unequal shares: three steps write 6, 5 and 5 cells.
        pytest.param({"num_steps": 2, "diffusion_steps": 3, "seed": 1}, marks=pytest.mark.nightly),
    ],
    ids=["3 steps", "two updates a rollout", "three unmasking steps"],
)
def test_the_package_does_the_same(changed, tmp_path):
    settings = one_file.Settings(train_batch_size=8, num_generations=4, **changed)
    policy = tiny_masked_lm(**SIZES, seed=3, head_std=0.3)  # confident, so that FP8 moves its log-probs
    module = copied(policy).module
    steps = list(one_file.train(module, policy.tokenizer, TASK, settings))
    package = Recorded(policy, settings, tmp_path)

    assert len(steps) == settings.num_steps == len(package.metrics)
    completion = slice(-one_file.LENGTH, None)
    for number, (step, rollout) in enumerate(zip(steps, package.rollouts, strict=True)):
        assert torch.equal(step.rollout.prompts_BS, rollout.tokens[:, : -one_file.LENGTH]), number
        assert torch.equal(step.rollout.unmask_step_BL, rollout.unmask_step[:, completion]), number
        assert torch.equal(step.rollout.tokens_BL, rollout.tokens[:, completion]), number
        assert torch.equal(step.rewards_PG.flatten(), package.rewards[number]), number
        torch.testing.assert_close(step.rollout.logprobs_BL, rollout.logprobs[:, completion], **CLOSE)
        old = package.old[number][step.learned_B][:, completion]
        torch.testing.assert_close(step.old_RL, old, **CLOSE)
        row = package.metrics[number]
        ours = [step.metrics[name] for name in ("reward", "solve_rate", "ess", "lambda", "mismatch")]
        names = ("reward", "rewards/solve_rate/mean", "trained/ess", "ais/lambda", "ais/D")
        assert ours == pytest.approx([row[name] for name in names], rel=0, abs=1e-5), number

    start = policy.module.state_dict()
    end = package.module.state_dict()
    for name, weight in module.state_dict().items():
        if name.endswith("key.bias"):
            # It moves all scores of a query alike, which a softmax does not see: its gradient is rounding alone, which
            # AdamW divides by its own size.
            continue
        torch.testing.assert_close(weight, end[name], **CLOSE, msg=lambda text, name=name: f"{name}: {text}")
    # What would make the comparison empty: weights that stay, no mismatch to correct, and no ratio that is clipped.
    assert max((end[name] - start[name]).abs().max() for name in start) > 1e-3
    assert max(step.metrics["lambda"] for step in steps) > 0.2
    assert (max(row["clip_ratio/region_mean"] for row in package.metrics) > 0.1) == (settings.num_iterations > 1)


@pytest.mark.slow
def test_it_warms_up_and_prints_what_each_step_did(monkeypatch, capsys):
    sizes = {name: size for name, size in SIZES.items() if name != "characters"}
    monkeypatch.setattr(one_file, "tiny_masked_lm", partial(tiny_masked_lm, **sizes))
    words = "--warmup_steps 20 --num_steps 2 --train_batch_size 4 --num_generations 4 --seed 5"
    monkeypatch.setattr(sys, "argv", ["one_file.py", *words.split()])
    one_file.main()
    warm_up, *steps, last = capsys.readouterr().out.splitlines()
    assert [line.split("  reward ")[0] for line in steps] == ["RL step   1", "RL step   2"]
    assert all("  solve_rate 0." in line and "  ess " in line for line in steps)
    assert last.startswith("solve rate on 400 held-out puzzles: 0.")
    found = re.fullmatch(r"warm-up step  20  loss (\d\.\d+)  solve_rate 0\.\d+", warm_up)
    # log 9 = 2.20 nats per token before the first step; log 4 = 1.39 where only digits are left.
    assert 1.2 < float(found[1]) < 2.1
