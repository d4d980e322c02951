"""The store of right answers of a run with `replay`, and the updates on them."""

from dataclasses import dataclass
from statistics import mean

import torch
from torch import Tensor

from dllm_rl.algorithms.advantages import ROUNDING
from dllm_rl.algorithms.replay import Replay
from dllm_rl.distributed.collectives import gather_objects
from dllm_rl.models.tensor_bytes import deserialize, serialize
from dllm_rl.rng import generator_for
from dllm_rl.step.context import StepContext, StepFeature
from dllm_rl.step.samples import Samples
from dllm_rl.step.settings import UpdateSettings
from dllm_rl.supervised.examples import Example
from dllm_rl.supervised.trainer import SupervisedTrainer
from dllm_rl.types.rollouts import Rollout

EMPTY_STEPS = 20  # steps without any right answer, after which the run says so
COLLAPSED = 1.5  # a group with fewer distinct completions than this, on average, has nothing to choose from


@dataclass(frozen=True)
class Answer:
    """A right answer, and the step whose rollout it is from."""

    example: Example
    step: int


class ReplayStore(StepFeature):
    """The right answers of all processes, the oldest first, equal in every process."""

    def __init__(self, replay: Replay, num_steps: int) -> None:
        self.replay = replay
        self.num_steps = num_steps  # of the run
        self.answers: list[Answer] = []  # those of the last complete step
        self.new_answers: list[Answer] = []
        self.step = 0
        self.last_metrics: dict[str, float] = {}
        self.said_collapse = False

    def after_rollout(self, context: StepContext, samples: Samples, step: int) -> tuple[Samples, dict[str, float]]:
        """Gather the step's right answers. `learn` adds them to the store."""
        rewards = samples.local(samples.rewards, context.accelerator)
        bound = self.replay.min_reward
        # A weighted sum may be a rounding below the bound. NaN, no reward, is not right.
        right = (rewards >= bound - ROUNDING * abs(bound)).nonzero()[:, 0]
        found = [Answer(example, step) for example in examples_of(samples.rollout.rows(right))]
        self.new_answers = gather_objects(found, context.accelerator)
        self.step = step
        # Before the update: its schedule may be the user's function, and an error in it must lose no update.
        self.update_settings = context.settings.update_settings(step)
        self.warn(context)
        return samples, {}

    def warn(self, context: StepContext) -> None:
        """Say once if no right answer was seen, or if the completions of a prompt are nearly all the same."""
        num_empty = min(EMPTY_STEPS, self.num_steps)
        if self.step + 1 == num_empty and not (self.answers or self.new_answers):
            lacking = "" if context.settings.num_iterations else ", and with num_iterations=0 no weight has changed"
            context.log.say(
                f"warning: replay: no completion of the first {num_empty} steps has a reward of at least "
                f"{self.replay.min_reward:g}{lacking}: lower replay.min_reward, or train with GRPO (or SFT) first"
            )
        distinct = context.log.last.get("completions/distinct_ratio")  # of the step before
        group_size = context.settings.num_generations
        bound = COLLAPSED / group_size
        if not self.said_collapse and distinct is not None and distinct < bound and group_size > 1:
            self.said_collapse = True
            context.log.say(
                f"warning: replay: completions/distinct_ratio={distinct:.2f}, so nearly all completions of a prompt "
                "are the same; if the held-out reward falls, lower replay.max_replays or replay.learning_rate, or end "
                f"such a run by the callback StopBelow('completions/distinct_ratio', {bound:.2f})"
            )

    def learn(self, context: StepContext, optimizer: torch.optim.Optimizer) -> None:
        """Add the step's right answers to the store, and take supervised steps on answers drawn from it."""
        replay, settings = self.replay, context.settings
        self.answers = [*self.answers, *self.new_answers][-replay.capacity :]
        size = len(self.answers)
        visits = self.draw(settings.seed)
        self.last_metrics = {"replay/size": float(size), "replay/updates": float(len(visits))}
        if not visits:
            return
        optimizer.zero_grad(set_to_none=True)  # the policy gradient of this step
        rate = self.update_settings.learning_rate
        if replay.learning_rate is not None:
            rate *= replay.learning_rate / settings.learning_rate
        trainer = self.trainer(context, self.update_settings)
        for k, batch in enumerate(visits):
            torch.clear_autocast_cache()  # its bf16 weights are from before the last optimizer step
            metrics = trainer.step(
                optimizer,
                [self.answers[i].example for i in batch],
                generator_for(settings.seed, "replay", self.step, k),
                learning_rate=rate,
                place=f"replay update {k} of step {self.step}",
            )
        ages = [self.step - self.answers[i].step for batch in visits for i in batch]
        self.last_metrics |= {
            "replay/loss": metrics["loss"],
            "replay/visits": len(ages) / size,
            "replay/age": mean(ages),
        }

    def draw(self, seed: int) -> list[list[int]]:
        """Draw the answers of each update of this step: an answer comes again only after all others, and at most
        `max_replays` times.
        """
        replay, size = self.replay, len(self.answers)
        count = min(replay.num_updates * replay.batch_size, replay.max_replays * size)
        generator = generator_for(seed, "replayed answers", self.step)
        passes = [torch.randperm(size, generator=generator) for _ in range(-(-count // size) if size else 0)]
        drawn = torch.cat(passes)[:count] if passes else torch.zeros(0, dtype=torch.long)
        return [batch.tolist() for batch in drawn.split(replay.batch_size) if len(batch)]

    def trainer(self, context: StepContext, settings: UpdateSettings) -> SupervisedTrainer:
        return SupervisedTrainer(
            policy=context.policy,
            processes=context.accelerator,
            micro_batch_size=settings.micro_batch_size,
            bf16=context.settings.bf16,
            like_rollouts=True,
            max_grad_norm=settings.max_grad_norm,
        )

    def rehearse(self, context: StepContext, rollout: Rollout) -> None:
        """Compute the gradient of one replay update on a rollout's rows. No weight changes."""
        count = -(-self.replay.batch_size // len(rollout.tokens))
        examples = (examples_of(rollout) * count)[: self.replay.batch_size]
        with context.arithmetic(learner=True):
            trainer = self.trainer(context, context.settings.update_settings(0))
            trainer.add_gradients(examples, generator_for(context.settings.seed, "replay rehearsal"))

    def after_update(self, context: StepContext) -> dict[str, float]:
        return self.last_metrics

    def state(self, context: StepContext) -> bytes | None:
        tensors = {
            "lengths": torch.tensor([len(answer.example.tokens) for answer in self.answers]),
            "steps": torch.tensor([answer.step for answer in self.answers]),
            "tokens": _joined([answer.example.tokens for answer in self.answers]),
            "learned": _joined([answer.example.learned for answer in self.answers]),
        }
        return serialize(tensors, {}) if self.answers else None

    def load_state(self, context: StepContext, state: bytes) -> None:
        tensors, _ = deserialize(state)
        lengths = tensors["lengths"].tolist()
        pairs = zip(tensors["tokens"].long().split(lengths), tensors["learned"].split(lengths), strict=True)
        examples = [Example(tokens, learned) for tokens, learned in pairs]
        self.answers = [
            Answer(example, step) for example, step in zip(examples, tensors["steps"].tolist(), strict=True)
        ]


def _joined(tensors: list[Tensor]) -> Tensor:
    return torch.cat(tensors) if tensors else torch.zeros(0)


def examples_of(rollout: Rollout) -> list[Example]:
    """Return the rows of a rollout as examples of supervised training: the model learns the tokens that it chose.

    Raises:
        ValueError: The rollout has several turns.
    """
    if rollout.first_step is not None:
        raise ValueError(
            "replay cannot train on rollouts of several turns: random masks would show a turn the tool's later output; "
            "use replay=None"
        )
    learned = rollout.completion_mask
    if rollout.loss_weights is not None:
        learned = learned & (rollout.loss_weights != 0)
    columns = (rollout.tokens.cpu(), learned.cpu(), rollout.attention_mask.cpu())
    return [Example(tokens[kept], chosen[kept]) for tokens, chosen, kept in zip(*columns, strict=True)]
