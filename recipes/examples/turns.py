"""Two turns with a tool: write an expression, read its value from a calculator, and write the final expression.

`TwoTurns` works with any tool that maps text to text. The policy is trained on its own tokens of both turns, and not on
the tool's. `Rollout.first_step` says when the tool's and the second turn's columns come onto the canvas, so that
`Trajectory` hides them from the steps of the first turn.

python -m recipes.examples.turns
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Generator

from dllm_rl import TIS, Float8WeightOnly, MaxProb, Prompts, Recipe, Trajectory, Unmask, main, option
from dllm_rl.decoding.prompts import encode
from dllm_rl.decoding.texts import decode, full_texts
from dllm_rl.decoding.tokens import text_ids
from dllm_rl.groups import Evaluation
from dllm_rl.models.tiny import tiny_masked_lm
from dllm_rl.rng import generator_for, row_seeds
from dllm_rl.samplers.sampler import Sampler
from dllm_rl.tasks import Countdown, Problem, Reward
from dllm_rl.tasks.countdown.expressions import evaluate
from dllm_rl.types.batch_record import BatchRecord


class TwoTurns(Sampler):
    """Complete the prompts, call a tool on each completion, and continue after the tool's text.

    Args:
        turn: Sampler of each turn.
        tool: Function of the text of the first turn. Its result is cut to `tool_length` tokens.
        tool_length: Number of columns of the tool's text; shorter texts are padded.
    """

    turn: Unmask
    tool: Callable[[str], str]
    tool_length: int = option(at_least=1)

    def check(self):
        total = 2 * self.turn.max_new_tokens + self.tool_length
        if self.max_new_tokens != total:
            raise ValueError(f"max_new_tokens={self.max_new_tokens} must be {total}: two turns and the tool's text")

    @torch.no_grad()
    def __call__(self, policy, prompts, generator):
        seeds = row_seeds(generator, len(prompts.tokens)) if prompts.seeds is None else prompts.seeds
        first = self.turn(policy, replace(prompts, seeds=seeds), generator)
        ids = [text_ids(policy, self.tool(text))[: self.tool_length] for text in decode(policy, first)]
        answers = Prompts.from_ids(ids, pad_id=policy.pad_id)  # left-padded
        answers = answers.padded(self.tool_length - answers.tokens.shape[1], pad_id=policy.pad_id).to(policy.device)
        # With the same seeds, the draws of the second turn would repeat those of the first.
        seeds = torch.cat([row_seeds(generator_for(seed, "second turn"), 1) for seed in seeds.tolist()])
        tokens = torch.cat([first.tokens, answers.tokens], 1)
        attention_mask = torch.cat([first.attention_mask, answers.attention_mask], 1)
        second = self.turn(policy, Prompts(tokens, attention_mask, prompts.group, seeds), generator)
        return joined(first, second)


def joined(first, second):
    """Return the rollout of both turns. The second's steps continue those of the first."""
    if first.events is not None:
        raise ValueError("turn.commit rewrites tokens, which TwoTurns does not join; use a rule that does not")
    steps = first.unmask_step.amax(-1, keepdim=True) + 1  # (B, 1): rows may differ
    second = second.rows(torch.arange(len(steps), device=steps.device), slice(first.tokens.shape[1], None))

    def later(step):
        return torch.where(step < 0, step, step + steps)

    order = replace(second.order, block_first_step=later(second.order.block_first_step))
    first_step = steps.expand(second.tokens.shape)
    second = replace(second, unmask_step=later(second.unmask_step), order=order, first_step=first_step)
    first = replace(first, first_step=torch.zeros_like(first.unmask_step), forwards=first.forwards + second.forwards)
    return BatchRecord.merge_records(
        [first, second], lambda pair: pair[0] if pair[0].dim() == 1 else torch.cat(pair, 1)
    )


def calculator(text):
    """Return the value of an expression in brackets, or [?]. `evaluate` parses the text within limits, without eval."""
    result = evaluate(text)
    return "[?]" if result is None else f"[{result}]"


class LastTurn(Countdown):
    """Countdown; the reward grades the second turn. No end token is sampled, so each turn has `width` characters."""

    name, version = "last-turn", "1"

    def reward(self, problem, completion):
        graded = super().reward(problem, completion[self.width :])
        draft = super().reward(problem, completion[: self.width])
        return Reward(graded.value, graded.parsed, {**graded.breakdown, "draft_accuracy": draft.breakdown["accuracy"]})


def taught(*, seed=0, steps=400, dry_run=False):
    """A model after supervised steps on both turns: solutions, and solutions after a draft and its value."""
    sizes = {"hidden_size": 64, "num_layers": 2, "intermediate_size": 192}
    policy = tiny_masked_lm(characters="0123456789+-(),>= []?", seed=seed, **sizes)
    if not dry_run:
        from dllm_rl.distributed.collectives import OneProcess  # here: --help would wait for it
        from dllm_rl.supervised.examples import solution_examples
        from dllm_rl.supervised.trainer import SupervisedTrainer

        trainer = SupervisedTrainer(policy=policy, processes=OneProcess(), like_rollouts=True)
        optimizer = torch.optim.AdamW(policy.module.parameters())
        for step in range(steps):
            generator = generator_for(seed, "lesson", step)
            examples = solution_examples(policy, lesson(generator), max_new_tokens=task.width)
            trainer.step(optimizer, examples, generator, learning_rate=2e-3, place=f"step {step}")
    return policy


def lesson(generator):
    """32 problems as first turns, and 32 as second turns after a draft. A draft that is right is repeated."""
    problems = [task[i] for i in torch.randint(len(task), (64,), generator=generator).tolist()]
    for i in range(32):
        a, b, c = (problems[i].fields["numbers"][k] for k in torch.randperm(3, generator=generator).tolist())
        signs = ["+-"[k] for k in torch.randint(2, (2,), generator=generator).tolist()]
        draft = f"{a}{signs[0]}{b}{signs[1]}{c}".ljust(task.width)
        is_right = evaluate(draft) == problems[i].fields["target"]
        prompt = problems[i].prompt + draft + calculator(draft)
        problems[i] = Problem(prompt, solution=draft if is_right else problems[i].solution)
    return problems


small = partial(LastTurn, count=3, max_number=10, max_target=20, operators="+-", numbers_weight=0.5)
task = small(split="train")
turn = Unmask(max_new_tokens=task.width, diffusion_steps=3, rank=MaxProb(), suppress=(0, 2))  # <pad> and <eos>
two_turns = TwoTurns(max_new_tokens=2 * task.width + 5, turn=turn, tool=calculator, tool_length=5)

recipe = Recipe(
    name="two-turns",
    model=partial(taught, steps=400),
    task=task,
    validation_task=small(split="validation", size=200),
    eval_task=small(split="test", size=400),
    sampler=two_turns.replace(turn=turn.replace(temperature=1.0)),
    eval_sampler=two_turns,
    likelihood=Trajectory(),
    rollout_quantization=Float8WeightOnly(),
    corrector=TIS(),
    train_batch_size=8,
    num_steps=25,
    learning_rate=1e-3,
    evaluation=Evaluation(steps=20),
)

if __name__ == "__main__":
    summary = main(recipe)
    if summary.get("checkpoint"):
        problems = [recipe.eval_task[i] for i in range(5)]
        prompts = encode(summary.policy, problems, num_generations=1)
        rollout = recipe.eval_sampler(summary.policy, prompts, Generator())
        print("prompt, first turn, [value], second turn:", *full_texts(summary.policy, rollout), sep="\n")
