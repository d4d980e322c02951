"""Replay: an update also learns from good answers of earlier steps.

A bounded store holds the completions whose reward was above their group's mean. Each step draws some of them and adds
them to its samples. A replayed row keeps the log-probs of the weights that sampled it, so that the corrector sees how
far the learner has moved since. Every process has the whole store and takes its share of the drawn rows.

The setting `replay=Replay(...)` is another method: it trains on right answers by supervised updates, without ratios.

python -m recipes.examples.replay
"""

from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from dllm_rl import TIS, Float8WeightOnly, Rollout, StepFeature, Trajectory, main, tiny_masked_lm
from dllm_rl.distributed.collectives import gather_objects
from dllm_rl.models.tensor_bytes import deserialize, record_from_json, record_to_json, serialize
from dllm_rl.rng import generator_for
from dllm_rl.step.samples import Samples
from recipes.sudoku_unique import recipe as base


@dataclass(frozen=True)
class Stored:
    """Rows of earlier steps, oldest first: the rollout, and reward, advantage and step of each row."""

    rollout: Rollout
    rewards: Tensor
    advantages: Tensor
    steps: Tensor

    def rows(self, keep):
        return Stored(self.rollout.rows(keep), self.rewards[keep], self.advantages[keep], self.steps[keep])

    @staticmethod
    def concatenate(parts, *, pad_id):
        tensors = [[getattr(part, name) for part in parts] for name in ("rewards", "advantages", "steps")]
        return Stored(Rollout.concatenate([p.rollout for p in parts], pad_id=pad_id), *map(torch.cat, tensors))


class ReplayRows(StepFeature):
    max_staleness = 2**31  # a stored row may be of any earlier step

    def __init__(self, *, capacity, num_rows, seed=0):
        self.capacity, self.num_rows, self.seed = capacity, num_rows, seed
        self.stored = self.next_stored = None

    def after_rollout(self, context, samples, step):
        if not context.settings.likelihood.exact_for_sampler:
            raise ValueError("Replay needs log-probs that the sampler recorded: use likelihood=Trajectory()")
        accelerator, pad_id = context.accelerator, context.policy.pad_id
        begin = sum(samples.counts[: accelerator.process_index])
        good = samples.local(samples.advantages > 0, accelerator).nonzero()[:, 0]
        rows = good.cpu() + begin
        new = Stored(
            samples.rollout.rows(good).to("cpu"),
            samples.rewards[rows],
            samples.advantages[rows],
            torch.full_like(rows, step),
        )
        parts = [part for part in (self.stored, *gather_objects([new], accelerator)) if part is not None]
        every = Stored.concatenate(parts, pad_id=pad_id)
        last = torch.arange(len(every.steps))[-self.capacity :]
        self.next_stored = every.rows(last)  # kept in `learn`: a step that fails is repeated after a resume

        number = accelerator.num_processes
        count = 0 if self.stored is None else min(self.num_rows, len(self.stored.steps)) // number * number
        if not count:
            return samples, {"replay/rows": 0.0}
        generator = generator_for(self.seed, "replay", step)
        drawn = self.stored.rows(torch.randperm(len(self.stored.steps), generator=generator)[:count])
        mine = torch.arange(count).chunk(number)[accelerator.process_index]
        replayed = Samples(
            drawn.rollout.rows(mine).to(accelerator.device),
            torch.arange(count),  # a group of its own: the advantage is that of its step
            drawn.rewards,
            drawn.advantages,
            torch.ones(count, dtype=torch.double),
            (count // number,) * number,
        )
        ages = (step - drawn.steps).double()
        metrics = {"replay/rows": float(count), "replay/age": ages.mean().item(), "replay/age_max": ages.max().item()}
        return samples.concatenate(replayed, pad_id=pad_id), metrics

    def learn(self, context, optimizer):
        self.stored = self.next_stored

    def state(self, context):
        if self.stored is None:
            return None
        tensors = {"rewards": self.stored.rewards, "advantages": self.stored.advantages, "steps": self.stored.steps}
        return serialize(tensors, {"rollout": record_to_json(self.stored.rollout, "rollout", tensors)})

    def load_state(self, context, state):
        tensors, header = deserialize(state)
        rollout = record_from_json(header["rollout"], tensors, base.sampler.rank)
        self.stored = Stored(rollout, *(tensors[name] for name in ("rewards", "advantages", "steps")))


recipe = base.replace(
    name="replay",
    model=partial(tiny_masked_lm, characters="1234.="),
    rollout_quantization=Float8WeightOnly(),
    likelihood=Trajectory(include_order=False),
    corrector=TIS(),
    eval_task=replace(base.eval_task, size=100),
    train_batch_size=8,
    num_steps=25,
    evaluation={"steps": 0},
)

if __name__ == "__main__":
    main(recipe, features=(ReplayRows(capacity=256, num_rows=32),))
