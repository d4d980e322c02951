"""A rank with weights of its own: GRPO trains the order in which positions are written, beside the tokens.

A linear layer on the learner's hidden states is added to the likeliest token's log-probability. `PlackettLuce` draws
the positions by these scores, so that the order has a probability, and `Trajectory()` gives the layer its gradient. A
feature takes the layer's optimizer step with the learner's, and stores the layer in each checkpoint.

python -m recipes.examples.learned_order
"""

from dataclasses import replace
from functools import partial

import torch

from dllm_rl import PlackettLuce, Rank, StepFeature, Trajectory, main, tiny_masked_lm
from dllm_rl.distributed.collectives import sum_gradients
from dllm_rl.models.tensor_bytes import deserialize, serialize
from recipes.sudoku_unique import recipe as base

WIDTH = 96  # of the hidden states of `tiny_masked_lm`
head = torch.nn.Linear(WIDTH, 1, bias=False)
torch.nn.init.zeros_(head.weight)  # the first order is that of the likeliest tokens


class Learned(Rank):
    """The likeliest token's log-probability plus the head's output."""

    order = "deterministic"  # of the canvas and the weights: no random number, no drawn token

    def __call__(self, logits, normalizer, hidden):
        return logits.amax(-1) - normalizer + head(hidden.to(head.weight))[:, 0].to(logits.device)


class LearnOrder(StepFeature):
    """Train `head` by SGD, whose only state are the weights."""

    def __init__(self, learning_rate):
        self.optimizer = torch.optim.SGD(head.parameters(), lr=learning_rate)

    def after_rollout(self, context, samples, step):
        head.to(context.accelerator.device)
        self.optimizer.zero_grad()
        return samples, {"order/head_norm": head.weight.norm().item()}

    def learn(self, context, optimizer):
        sum_gradients(head, context.accelerator)  # the loss is divided by the counts of all processes
        self.optimizer.step()

    def state(self, context):
        return serialize({"weight": head.weight.detach()}, {})

    def load_state(self, context, state):
        tensors, _ = deserialize(state)
        head.load_state_dict(tensors)


rank = PlackettLuce(temperature=1.0, base_rank=Learned())
recipe = base.replace(
    name="learned_order",
    model=partial(tiny_masked_lm, characters="1234.="),
    sampler=replace(base.sampler, rank=rank),
    likelihood=Trajectory(),
    eval_task=replace(base.eval_task, size=100),
    train_batch_size=8,
    num_steps=25,
    evaluation={"steps": 0},
)

if __name__ == "__main__":
    main(recipe, features=(LearnOrder(learning_rate=1.0),))
