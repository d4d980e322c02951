"""The model that is checked, and what several sections need of it: prompts, a sampler and a rollout."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, TypeVar

import torch
from torch import Generator

from dllm_rl.decoding.prompts import prompt_ids
from dllm_rl.models.base import Policy
from dllm_rl.rng import generator_for
from dllm_rl.samplers import Autoregress, Renoise, Sampler, Unmask, sampler_for
from dllm_rl.types.rollouts import Prompts, Rollout

Result = TypeVar("Result")
Verdict = Literal["ok", "look", "wrong"]
QUESTIONS = (
    "What is 17 + 25?",
    "Which planet is closest to the sun?",
    "Write a sentence about the sea.",
    "How many days are in a leap year?",
    "Name three colors of the rainbow.",
    "What do bees make?",
    "Explain why the sky is blue.",
    "Translate 'good morning' into French.",
)
NUM_GENERATIONS = 4  # completions of each question
NEW_TOKENS = 64  # of a completion, at most
TOKENS_PER_STEP = 2
BLOCK = 32  # of a model with full attention, as in LLaDA's papers
RANDOM_TOKENS = 8  # of a prompt, if the tokenizer cannot write the questions


@dataclass(frozen=True)
class Finding:
    """What a section found.

    Args:
        verdict: "ok"; "look" for something that a person must judge; "wrong" for something that must be mended first.
        line: The finding in a sentence, for the screen. It may quote the model's texts.
        advice: What to do. "" (default) if there is nothing to do.
        reason: The finding in a few fixed words, for the report. "" (default): nothing was found.
        numbers: What was measured, for the report: numbers, and names of the library and of transformers.
        shown: Further lines for the screen. Default: none.
    """

    verdict: Verdict
    line: str
    advice: str = ""
    reason: str = ""
    numbers: dict[str, Any] = field(default_factory=dict)
    shown: tuple[str, ...] = ()


@dataclass
class Subject:
    """The model that is checked.

    Args:
        policy: The loaded model.
        schemes: Quantization schemes of the rollouts; None: those of `rollouts.SCHEMES` that the device runs.
        seed: Seed of all random numbers.
    """

    policy: Policy
    schemes: list[Any] | None = None
    seed: int = 0

    def generator(self, *key: object) -> Generator:
        return generator_for(self.seed, "doctor", *key)

    @cached_property
    def prompts(self) -> Prompts:
        """The questions, as chats if the tokenizer has a template, each in NUM_GENERATIONS rows."""
        policy, generator = self.policy, self.generator("prompts")
        has_template = getattr(policy.tokenizer, "chat_template", None)
        most = None if policy.spec.max_length is None else max(1, policy.spec.max_length // 2)
        rows = []
        for question in QUESTIONS:
            try:
                ids = prompt_ids(policy, [{"role": "user", "content": question}] if has_template else question)
            except ValueError:  # a tokenizer of proteins or of digits alone
                special = {policy.spec.mask_id, policy.pad_id, *policy.spec.eos_ids}
                ordinary = torch.tensor([token for token in range(policy.vocab_size) if token not in special])
                ids = ordinary[torch.randint(len(ordinary), (RANDOM_TOKENS,), generator=generator)].tolist()
            rows.append(ids[:most])
        numbers = torch.randint(2**31, (len(rows) * NUM_GENERATIONS,), generator=generator).tolist()
        return Prompts.from_ids(rows, pad_id=policy.pad_id, num_generations=NUM_GENERATIONS, seeds=numbers)

    @cached_property
    def sampler(self) -> Sampler:
        """The sampler of training rollouts, at temperature 1."""
        policy, spec = self.policy, self.policy.spec
        room = math.inf if spec.max_length is None else spec.max_length - self.prompts.tokens.shape[1]
        length = int(min(NEW_TOKENS, room))
        kind = sampler_for(policy)
        if kind is Autoregress:
            return Autoregress(max_new_tokens=length, temperature=1.0)
        if kind is Renoise:
            return Renoise(max_new_tokens=spec.block_size or NEW_TOKENS, diffusion_steps=8, answer="drawn")
        block = spec.block_size or (BLOCK if length > BLOCK else length)
        num_blocks = -(-length // block) + 1  # the first block may begin in the prompt
        steps = min(length, max(-(-length // TOKENS_PER_STEP), num_blocks))
        return Unmask(max_new_tokens=length, diffusion_steps=steps, block_size=block, temperature=1.0)

    def sample(self, policy: Policy) -> tuple[Rollout, float]:
        """Return a rollout of the prompts, and its seconds per forward after a short one that loads the kernels."""
        short = self.sampler
        if not isinstance(short, Renoise):
            changes = {"max_new_tokens": 1} | ({"diffusion_steps": 1} if isinstance(short, Unmask) else {})
            short.replace(**changes)(policy, self.prompts, self.generator("sampler"))
        rollout, seconds = timed(policy, lambda: self.sampler(policy, self.prompts, self.generator("sampler")))
        return rollout, seconds / max(1, rollout.forwards)

    @cached_property
    def sampled(self) -> tuple[Rollout, float]:
        """The rollout of the model itself, and its seconds per forward."""
        return self.sample(self.policy)


def timed(policy: Policy, compute: Callable[[], Result]) -> tuple[Result, float]:
    """Return a result and the seconds in which the policy's device computed it."""

    def wait() -> None:
        if policy.device.type == "cuda":
            torch.cuda.synchronize(policy.device)

    wait()
    start = time.perf_counter()
    result = compute()
    wait()
    return result, time.perf_counter() - start


def bits_of(policy: Policy) -> int:
    """Return the bits of the policy's weights."""
    return 8 * next(policy.module.parameters()).dtype.itemsize


def is_stock(policy: Policy) -> bool:
    """Return whether the module is of a class of transformers, whose names of layers are nobody's own text."""
    return type(policy.module).__module__.startswith("transformers.")
