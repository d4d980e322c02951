"""What is tried before a run begins: every part is asked once, nothing is left of it."""

import random
import shutil
from collections import namedtuple
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from emulated import five_level_emulated
from tiny_recipe import SIZES, OddPuzzles, Wrapped, tiny_recipe

from dllm_rl import main, tiny_masked_lm, train
from dllm_rl.checkpoints.run_folder import REHEARSAL
from dllm_rl.distributed.collectives import make_accelerator
from dllm_rl.models.lora_settings import Lora
from dllm_rl.samplers.revise import Edit
from dllm_rl.samplers.rules import MaxProb
from dllm_rl.samplers.sampler import FunctionSampler
from dllm_rl.samplers.unmask import Unmask
from dllm_rl.training.policies import build_policy
from dllm_rl.training.rehearsal import preserve_random_state
from dllm_rl.training.start import load_and_rehearse

SMALL = partial(tiny_masked_lm, **SIZES | {"hidden_size": 16, "num_layers": 1, "intermediate_size": 16})


def small(directory, **changes):
    return tiny_recipe(directory, **{"model": SMALL, "num_steps": 1} | changes)


def no_scheme():
    raise ValueError("scheme: not today")


def no_rank(logits):
    raise ValueError("rank: not today")


def no_surrogate(log_ratio, advantages, mask):
    raise ValueError("surrogate: not today")


BAD = {
    "quantize": ({"rollout_quantization": no_scheme}, "scheme: not today"),
    "sample": ({"sampler": Unmask(max_new_tokens=16, rank=no_rank)}, "rank: not today"),
    "sample to evaluate": ({"eval_sampler": Unmask(max_new_tokens=16, rank=no_rank)}, "rank: not today"),
    "replay of a sampler that comes back": (
        {
            "sampler": Unmask(
                max_new_tokens=16, diffusion_steps=3, rank=MaxProb(), commit=Edit(tau=0.5), temperature=1.0
            )
        },
        r"Trajectory.*depends on the tokens drawn \(Edit, Confidence\)",
    ),
    "warm-up": (
        {"sft_warmup_steps": 1, "sft_warmup_metric": "solved"},
        "warmup.metric='solved' is not a metric of the eval",
    ),
    "advantages": (
        {"advantages": lambda rewards, group: rewards[:4]},
        r"advantages=.*numbers of shape \(4,\) for rewards",
    ),
    "nan": ({"advantages": lambda rewards, group: rewards / 0 * 0}, "numbers that are not finite for rewards of shape"),
    "loss": ({"loss": no_surrogate}, "surrogate: not today"),
    "optimizer": (
        {"optim": lambda parameters, lr, **rest: torch.optim.SGD(parameters, lr=-lr)},
        "Invalid learning rate",
    ),
}


@pytest.mark.parametrize("part", BAD)
def test_a_part_that_refuses_is_heard_before_anything_is_made(part, tmp_path):
    changes, message = BAD[part]
    with pytest.raises(ValueError, match=message):
        train(small(tmp_path / "run", **changes))
    assert not any(tmp_path.iterdir())


def test_a_full_disk_is_said_before_a_run_begins(tmp_path, monkeypatch, capsys):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 1000, 1000))
    monkeypatch.setattr("sys.argv", ["recipe.py"])
    with pytest.raises(SystemExit) as stopped:
        main(small(tmp_path / "run"))
    error = capsys.readouterr().err
    assert stopped.value.code == 1 and "MB are missing" in error and error.count("\n") == 1
    assert not any(tmp_path.iterdir())


def test_room_is_needed_for_the_moments_too(tmp_path, monkeypatch):
    recipe, usage = small(tmp_path / "run"), namedtuple("usage", "total used free")
    weights = sum(p.numel() * 4 for p in SMALL().module.parameters())
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 0, 2 * weights + (1 << 20)))
    with pytest.raises(OSError, match="was not saved"):  # two moments as large as the weights
        train(recipe)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 0, 3 * weights + (2 << 20)))
    train(replace(recipe, num_steps=0))


class Drawing(Wrapped):
    """A task whose grader draws from every global generator."""

    name = "drawing"

    def reward(self, problem, completion):
        random.random(), np.random.random(), torch.rand(())
        return self.task.reward(problem, completion)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"lora": Lora(dropout=0.05), "beta": 0.1},
        {"rollout_quantization": five_level_emulated, "beta": 0.1},
    ],
    ids=["plain", "adapters", "quantized"],
)
def test_nothing_is_left_of_it(changes, tmp_path):
    recipe = small(tmp_path, **changes)
    recipe = replace(recipe, task=Drawing(recipe.task))
    accelerator = make_accelerator()
    before = build_policy(recipe, accelerator.device)
    drawn = torch.get_rng_state(), np.random.get_state()[1].tolist()
    policy, _ = load_and_rehearse(recipe, accelerator)
    assert torch.equal(torch.get_rng_state(), drawn[0]) and np.random.get_state()[1].tolist() == drawn[1]
    assert policy.lora is None and policy.weights_version == before.weights_version
    now = dict(policy.module.named_parameters())
    for name, parameter in before.module.named_parameters():
        assert torch.equal(now.pop(name), parameter) and parameter.requires_grad
    assert not now and all(p.requires_grad and p.grad is None for p in policy.module.parameters())
    assert not any(tmp_path.iterdir())


def test_global_generators_go_on_as_if_nobody_had_drawn():
    def draw():
        return random.random(), np.random.random(), torch.rand(()).item()

    seeds = random.seed, np.random.seed, torch.manual_seed
    for seed in seeds:
        seed(3)
    expected = draw()
    for seed in seeds:
        seed(3)
    with preserve_random_state():
        assert draw() == expected
    assert draw() == expected


def test_it_takes_the_longest_prompt_and_a_whole_group(tmp_path):
    seen = []

    def spy(policy, prompts, generator):
        seen.append((prompts.tokens.shape[1], len(prompts.tokens)))
        return Unmask(max_new_tokens=16, diffusion_steps=2, temperature=1.0)(policy, prompts, generator)

    task = OddPuzzles()
    recipe = small(tmp_path, task=task, sampler=FunctionSampler(function=spy, max_new_tokens=16))
    load_and_rehearse(recipe, make_accelerator())
    assert seen[0] == (max(len(task[i].prompt) for i in range(len(task))), 4)


def test_what_a_kill_left_of_it_is_removed(tmp_path):
    (tmp_path / REHEARSAL / "step-000000").mkdir(parents=True)
    train(small(tmp_path, num_steps=0))
    assert not (tmp_path / REHEARSAL).exists()
