"""mypy --strict on code that uses the package: right calls have no error, and each wrong one has."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

RIGHT = """
from collections.abc import Sequence
from typing import Any

from torch import Generator, Tensor

from dllm_rl import (
    AIS, CISPO, ELBO, GSPO, K1, MIS, SFT, TIS, AdamW, Autoregress, Compose, Corrector, Coupled,
    Float8WeightOnly, GroupRelative, IcePop, Int4WeightOnly, Lora, Loss, MaxProb, Policy, PPOClip, PrefixCache,
    Prompts, Recipe, Reject, Rollout, Sampler, SoftThreshold, TokenMean, TokenStats, TokenWeights, Trajectory,
    Unmask, evaluate, grpo, grpo_recipe, load_policy, option, quantized_copy, sft, tiny_masked_lm, train,
)
from dllm_rl.tasks import Sudoku, Task


class Half(Corrector):
    factor: float = option(default=0.5, above=0, at_most=1)

    def weights(self, stats: TokenStats) -> TokenWeights:
        return TokenWeights(self.factor * stats.log_mismatch.exp(), stats.mask, {"half/factor": self.factor})


class Squared(Loss):
    def __call__(self, log_ratio: Tensor, advantages: Tensor, *rest: Tensor, **inputs: Any) -> Tensor:
        return -log_ratio.square() * advantages


def correct(completions: Sequence[str], **columns: Any) -> list[float]:
    return [float(text == "4") for text in completions]


def model(*, seed: int = 0) -> Policy:
    return tiny_masked_lm(characters="1234", seed=seed)


sampler = Unmask(
    max_new_tokens=16, rank=MaxProb(), commit=SoftThreshold(tau=0.9), cache=PrefixCache(refresh=2), suppress=(0, 2)
)
greedy: Unmask = sampler.replace(temperature=0)
parts: tuple[Corrector, ...] = (TIS(cap=3), MIS(level="sequence"), IcePop(), Reject(threshold=0.01), Half(factor=0.25))
task: Task = Sudoku(clues=(1, 3), unique=False)
recipe = Recipe(
    name="typed",
    model=model,
    task=task,
    validation_task=task,
    eval_task=Sudoku(split="test"),
    sampler=sampler,
    eval_sampler=greedy,
    likelihood=Trajectory(),
    corrector=Compose(parts=parts),
    advantages=GroupRelative(scale_rewards="none"),
    loss=PPOClip(epsilon=0.1, epsilon_high=None),
    loss_reduction=TokenMean(),
    kl=K1(),
    optim=AdamW(),
    rollout_quantization=Float8WeightOnly(),
    lora=Lora(r=8),
)
again: Recipe = recipe.replace(corrector=AIS(tau=0.1), likelihood=ELBO(num_samples=2), loss=GSPO())
others = (Coupled(num_samples=2), CISPO(max_ratio=4), Squared())
reward: float = train(again)["final_reward"]
policy = load_policy("folder", dtype="bfloat16")
copy: Policy = quantized_copy(policy, Int4WeightOnly(group_size=64))
prompts = Prompts.from_ids([[3, 4]], pad_id=0)
rollout: Rollout = sampler(copy, prompts, Generator())
left_to_right: Sampler = Autoregress(max_new_tokens=4)
rates = evaluate(policy, task, left_to_right, samples=2, limit=8)
made: Recipe = grpo_recipe("folder", [{"prompt": "2+2="}], [correct], reward_weights=[1], learning_rate=1e-4)
summary = grpo(model, [{"prompt": "2+2="}], correct, corrector=TIS())
tuned: Policy = sft("folder", [{"text": "2+2=4"}]).policy
tuning = SFT(name="tune", model="folder", dataset=[{"text": "2+2=4"}], max_length=32)
"""

WRONG = """
from dllm_rl import (
    AIS, ELBO, TIS, Autoregress, Compose, Float8WeightOnly, Int4Packed, MaxProb, Policy, PPOClip, Recipe,
    SoftThreshold, Unmask, evaluate, grpo, grpo_recipe,
)
from dllm_rl.tasks import Sudoku


def calls(policy: Policy, recipe: Recipe) -> None:
    TIS(capp=3)  # wrong
    AIS(0.5)  # wrong
    MaxProb().name = "own"  # wrong
    Compose(parts=(TIS(), ELBO()))  # wrong
    Unmask(max_new_tokens="16")  # wrong
    Unmask(max_new_tokens=16, rank=SoftThreshold(tau=0.9))  # wrong
    Autoregress(max_new_tokens=16, rank=MaxProb())  # wrong
    ELBO(num_samples=2.5)  # wrong
    PPOClip(0.2)  # wrong
    Int4Packed(group_size=48)  # wrong
    Float8WeightOnly(granularity="rows")  # wrong
    grpo("folder", [{"prompt": "2+2="}], "correct")  # wrong
    grpo_recipe("folder", [], lambda completions: [0.0], max_new_tokens="16")  # wrong
    Recipe(name="incomplete", model="folder")  # wrong
    evaluate(policy, Sudoku(), MaxProb())  # wrong
    evaluate(policy, Sudoku(), Unmask(max_new_tokens=16), sample=2)  # wrong
"""


@pytest.fixture(scope="module")
def errors(tmp_path_factory):
    """The messages of one run of mypy, by file and line."""
    folder = tmp_path_factory.mktemp("typed")
    (folder / "right_calls.py").write_text(RIGHT)
    (folder / "wrong_calls.py").write_text(WRONG)
    command = [sys.executable, "-m", "mypy", "--strict", "--config-file=", "--follow-imports=silent"]
    files = [str(folder / name) for name in ("right_calls.py", "wrong_calls.py")]
    root = Path(__file__).parents[1]
    # The cache lasts in the checkout: without it, each run would check the whole package again.
    command += ["--ignore-missing-imports", "--cache-dir", str(root / ".mypy_cache" / "user_code"), *files]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert done.returncode == 1, done.stdout + done.stderr
    return re.findall(r"(\w+)_calls\.py:(\d+): error: (.*)", done.stdout)


@pytest.mark.slow  # without a cache mypy takes a minute for the package
def test_right_calls_have_no_error(errors):
    names = set(re.findall(r"\w+", RIGHT.partition("import (")[2].partition(")")[0]))
    assert len([name for name in names if len(re.findall(rf"\b{name}\b", RIGHT)) > 1]) >= 40
    assert [error for error in errors if error[0] != "wrong"] == []


@pytest.mark.slow
def test_each_wrong_call_is_an_error(errors):
    wrong = {number for number, line in enumerate(WRONG.split("\n"), 1) if line.endswith("# wrong")}
    assert len(wrong) >= 10
    assert {int(number) for file, number, _ in errors if file == "wrong"} == wrong
