"""A training step by d1's own functions and by ours: the same weights, prompts, tokens and masks.

    python -m benchmarks.peers --d1 CHECKOUT --json benchmarks/results/peers-cpu.json

CHECKOUT is a clone of github.com/dllm-reasoning/d1, of which diffu-grpo/diffu_grpo_trainer.py is imported; modules of
trl and wandb that its other functions need are stood in for. Compared are `generate`, `_get_per_token_logps` and
`compute_loss` with backward, clipping and AdamW; one update per rollout, without a KL term, so that d1 scores nothing
twice. Before they are timed, both must write the same tokens at temperature 0, and have the same log-probs and gradient
norm under d1's masks. Then each draws its own masks of the prompt: ours one for each group, so that its completions
share a forward. `d1's masks` are the timings with the same ones. Processor seconds, one thread, the arms in turns, the
fastest of `--repeats`; a step is the sum of rollout and learning.
"""

import argparse
import importlib.util
import sys
from collections import defaultdict
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import torch
from accelerate import Accelerator
from torch import Tensor

from benchmarks.measure import fastest, machine, peer_arguments, ratios_of, write_json
from benchmarks.sampler import Shape, random_policy
from benchmarks.update import advantages_of, step
from dllm_rl.likelihoods.estimators import OneStep
from dllm_rl.samplers.rules import Confidence
from dllm_rl.samplers.unmask import Unmask
from dllm_rl.types.rollouts import Prompts, Rollout
from dllm_rl.types.scoring import Views

MASK_SEED, PROMPT_MASK, TEMPERATURE, EPSILON = 42, 0.15, 0.9, 0.2  # the first three are d1's
LOGPROB_TOLERANCE, NORM_TOLERANCE = 1e-4, 1e-4  # nats; relative
LIKELIHOOD, THEIR_MASKS = OneStep(prompt_mask=PROMPT_MASK), ", d1's masks"
GROUP = 4  # completions of a prompt
BASE = Shape(4, 128, 4, 352, 2048, batch=4, prompt=32, new=32, block=32, steps=16)  # d1 writes two tokens a step
SHAPES = [
    replace(BASE, vocabulary=vocabulary, **change)
    for vocabulary in (2048, 32768)
    for change in ({}, {"batch": 16}, {"prompt": 64, "new": 64, "steps": 32})
]
SMOKE = [Shape(1, 32, 2, 64, 512, batch=4, prompt=8, new=8, block=4, steps=4)]
STAND_INS = [
    *("wandb", "trl"),
    *(f"trl.{name}" for name in ("data_utils", "extras", "extras.profiling", "import_utils", "models", "trainer")),
    *(f"trl.trainer.{name}" for name in ("grpo_config", "grpo_trainer", "utils")),
]


def d1_trainer_class(checkout: str) -> type:
    """d1's trainer, whose base class is `object`."""
    stand_ins = {name: MagicMock() for name in STAND_INS}
    stand_ins["trl.trainer.grpo_trainer"].GRPOTrainer = object
    stand_ins["trl.extras.profiling"].profiling_decorator = lambda function: function
    spec = importlib.util.spec_from_file_location("d1", Path(checkout) / "diffu-grpo" / "diffu_grpo_trainer.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    others = {name: sys.modules[name] for name in STAND_INS if name in sys.modules}
    sys.modules.update(stand_ins)
    try:
        spec.loader.exec_module(module)
    finally:
        for name in stand_ins:
            del sys.modules[name]
        sys.modules.update(others)
    return module.DiffuGRPOTrainer


def d1_trainer(trainer_class: type, mask_id: int) -> Any:
    """A trainer with what its methods read, which has no model and no data."""
    trainer: Any = object.__new__(trainer_class)
    trainer.args = SimpleNamespace(
        fp16=False, mask_id=mask_id, p_mask_prompt=PROMPT_MASK, cfg_scale=0.0, num_iterations=1
    )
    trainer.num_iterations, trainer.beta, trainer.epsilon, trainer._step = 1, 0.0, EPSILON, 0
    trainer.control, trainer.accelerator = SimpleNamespace(should_evaluate=False), Accelerator(cpu=True)
    trainer._metrics = defaultdict(partial(defaultdict, list))
    return trainer


class OneModel:
    """A model and one batch of prompts of equal length, with our rollouts of it."""

    def __init__(self, shape: Shape) -> None:
        self.shape, self.policy = shape, random_policy(shape, torch.device("cpu"))
        self.model, self.mask_id = self.policy.module, self.policy.spec.mask_id
        self.model.config.use_cache = False
        with torch.no_grad():  # the others do not suppress the mask token: here it is never likely
            self.model.get_output_embeddings().weight[self.mask_id] = 0
        generator = torch.Generator().manual_seed(1)
        ids = torch.randint(3, shape.vocabulary, (shape.batch // GROUP, shape.prompt), generator=generator).tolist()
        seeds = range(shape.batch)
        prompts = Prompts.from_ids(ids, pad_id=self.policy.pad_id, num_generations=GROUP, seeds=seeds)
        self.prompts = replace(prompts, reads_order=False)

    def our_rollout(self, temperature: float) -> Rollout:
        shape = self.shape
        settings = {"max_new_tokens": shape.new, "diffusion_steps": shape.steps, "block_size": shape.block}
        sampler = Unmask(**settings, temperature=temperature, rank=Confidence())
        return sampler(self.policy, self.prompts, torch.Generator())


class Peers(OneModel):
    """Both implementations on one model."""

    def __init__(self, shape: Shape, trainer_class: type) -> None:
        super().__init__(shape)
        self.trainer = d1_trainer(trainer_class, self.mask_id)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.0)

    @torch.no_grad()
    def their_rollout(self, temperature: float) -> Tensor:
        shape = self.shape
        lengths = {"steps": shape.steps, "gen_length": shape.new, "block_length": shape.block}
        return self.trainer.generate(
            self.model, self.prompts.tokens, **lengths, temperature=temperature, mask_id=self.mask_id
        )

    def their_inputs(self, rollout: Rollout) -> dict[str, Any]:
        start = self.shape.prompt
        prompt_ids, completion_ids = rollout.tokens[:, :start], rollout.tokens[:, start:]
        return {
            "prompt_ids": prompt_ids,
            "prompt_mask": torch.ones_like(prompt_ids),
            "completion_ids": completion_ids,
            "completion_mask": rollout.completion_mask[:, start:].int(),
            "advantages": advantages_of(rollout),
            "mask_seeds": [MASK_SEED],
        }

    def their_learning(self, inputs: dict[str, Any]) -> None:
        self.optimizer.zero_grad()
        self.trainer.compute_loss(self.model, inputs).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()

    def our_learning(self, rollout: Rollout, views: Views) -> None:
        step(self.policy, None, rollout, views, self.optimizer, likelihood=LIKELIHOOD, keep=True)

    def their_masks(self, rollout: Rollout) -> Views:
        in_prompt = torch.arange(rollout.tokens.shape[1]) < self.shape.prompt
        noisy, _ = self.trainer.forward_process(rollout.tokens, in_prompt, self.mask_id, seed=MASK_SEED)
        return Views((noisy == self.mask_id)[None], rollout.completion_mask[None].float())

    def gradient_norm(self) -> float:
        return sum(p.grad.double().square().sum().item() for p in self.model.parameters() if p.grad is not None) ** 0.5

    def check(self, rollout: Rollout, views: Views) -> dict[str, float]:
        """The largest differences of log-probs, and the relative one of gradient norms.

        Raises:
            ValueError: The implementations write other tokens, or differ by more than a tolerance.
        """
        if not torch.equal(self.their_rollout(0.0), rollout.tokens):
            raise ValueError("the rollouts differ at temperature 0")
        with torch.no_grad():
            (theirs,) = self.trainer._get_per_token_logps(self.model, rollout.tokens[None], self.shape.new, [MASK_SEED])
        ours = LIKELIHOOD.logprobs(self.policy, rollout, views)[:, self.shape.prompt :]
        scored = rollout.completion_mask[:, self.shape.prompt :]
        apart = (theirs - ours)[scored].abs().max().item()
        self.their_learning(self.their_inputs(rollout))
        norm = self.gradient_norm()
        self.our_learning(rollout, views)
        norm_apart = abs(self.gradient_norm() / norm - 1)
        if apart > LOGPROB_TOLERANCE or norm_apart > NORM_TOLERANCE:
            raise ValueError(f"log-probs differ by {apart:.2g} nats, gradient norms by {norm_apart:.2g}")
        return {"log-probs apart, nats": float(f"{apart:.1g}"), "gradients apart": float(f"{norm_apart:.1g}")}


def compared(shape: Shape, trainer_class: type, repeats: int) -> dict[str, Any]:
    """A row of processor seconds and of ratios d1 / ours."""
    peers = Peers(shape, trainer_class)
    rollout = peers.our_rollout(0.0)
    same_masks = peers.their_masks(rollout)
    facts = {"vocabulary": shape.vocabulary, "tokens": shape.prompt + shape.new, "batch": shape.batch}
    facts |= peers.check(rollout, same_masks)
    our_masks = LIKELIHOOD.draw_views(rollout, torch.Generator().manual_seed(0))
    best = fastest(
        {
            "d1's rollout": partial(peers.their_rollout, TEMPERATURE),
            "rollout": partial(peers.our_rollout, TEMPERATURE),
            "d1's rollout, greedy": partial(peers.their_rollout, 0.0),
            "rollout, greedy": partial(peers.our_rollout, 0.0),
            "d1's learning": partial(peers.their_learning, peers.their_inputs(rollout)),
            "learning": partial(peers.our_learning, rollout, our_masks),
            "learning, d1's masks": partial(peers.our_learning, rollout, same_masks),
        },
        repeats,
    )
    for step_name, rollout_name, learning_name in (
        ("step", "rollout", "learning"),
        ("step, d1's masks", "rollout", "learning, d1's masks"),
        ("step, greedy", "rollout, greedy", "learning"),
    ):
        best[step_name] = best[rollout_name] + best[learning_name]
    best["d1's step"] = best["d1's rollout"] + best["d1's learning"]
    best["d1's step, greedy"] = best["d1's rollout, greedy"] + best["d1's learning"]
    seconds = {f"{name}, s": round(each, 4) for name, each in best.items()}
    ratios = {
        f"d1 / ours, {name}": round(best[f"d1's {name.removesuffix(THEIR_MASKS)}"] / each, 2)
        for name, each in best.items()
        if not name.startswith("d1's")
    }
    return facts | ratios | seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--d1", required=True, help="checkout of github.com/dllm-reasoning/d1")
    arguments = peer_arguments(parser)
    torch.set_num_threads(1)
    trainer_class = d1_trainer_class(arguments.d1)
    repeats, rows = arguments.repeats, []
    for shape in SMOKE if arguments.smoke else SHAPES:
        rows.append(compared(shape, trainer_class, repeats))
        print(rows[-1], flush=True)
    print(ratios_of(rows))
    facts = {k: str(v) for k, v in vars(BASE).items() if k in ("layers", "hidden", "heads", "intermediate", "block")}
    write_json(arguments.json, {"machine": machine("cpu"), "repeats": repeats, "shape": facts, "rows": rows})


if __name__ == "__main__":
    main()
