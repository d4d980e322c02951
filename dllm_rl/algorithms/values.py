"""Value model: a baseline for each denoising step, and advantages by GAE over the steps.

docs/papers.md explains the tags [paper] and [ours].
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from dllm_rl.records import Record, option


class ValueModel(Record):
    """A value head: two layers on the learner's hidden states that predict a completion's advantage at each step.

    Use it as `value_model` if a completion takes several denoising steps and early steps already decide its reward. The
    tokens of a step then get the advantage minus the value before the step (see `generalized_advantages`), in place of
    one advantage for all tokens of a row. The value is the mean over the completion's positions, masked or not, so that
    it does not depend on the tokens that the step draws. The head initially predicts 0, with which gae_lambda=1 gives
    GRPO's update. Its gradient does not reach the learner.

    Scoring costs one more forward per view, and groups of equal rewards are trained on too. It logs value/loss and
    value/explained_variance.

    Args:
        gae_lambda: Lambda of GAE, in [0, 1]. 1 subtracts the value, which adds no bias. Below 1, a step's advantage
            also uses the values of later steps: it has less variance, but the head's errors bias it. Default: 0.95.
        hidden_size: Width of the hidden layer, at least 1. Default: 64.
        learning_rate: Learning rate of the head's AdamW for layers of 64 inputs, above 0. For layers of n inputs it is
            multiplied by 64 / n. Default: 1e-2.

    Source: TraceRL's value model, arXiv 2509.06949 [paper], is a second network that predicts the reward; the head on
    the learner's states, and the prediction of GRPO's advantage, are [ours].
    """

    gae_lambda: float = option(default=0.95, at_least=0, at_most=1)
    hidden_size: int = option(default=64, at_least=1)
    learning_rate: float = option(default=1e-2, above=0)


def generalized_advantages(
    advantages: Float[Tensor, " B"],
    values: Float[Tensor, "N B"],
    is_step: Bool[Tensor, "N B"],
    *,
    gae_lambda: float,
) -> Float[Tensor, "N B"]:
    """Compute the advantage of each denoising step by GAE, with the row's advantage as the reward of its last step.

        delta_n = V_(n+1) - V_n,   of the last step: A - V_n;   A_n = delta_n + lambda A_(n+1)

    With lambda = 1, A_n = A - V_n; with values of 0, A_n = lambda^(steps after n) A. Future steps are not discounted
    (gamma = 1).

    Args:
        advantages: Advantage of each row (B,).
        values: Value before each step (N, B).
        is_step: Which rows have which steps (N, B). The others are skipped.
        gae_lambda: Lambda in [0, 1].

    Returns:
        Advantages (N, B); 0 where a row has no step.

    Source: GAE, arXiv 1506.02438; over the steps of a trace, TraceRL, arXiv 2509.06949 [paper].
    """
    next_value = advantages
    next_advantage = torch.zeros_like(advantages)
    result = torch.zeros_like(values)
    for step in reversed(range(len(values))):
        advantage = next_value - values[step] + gae_lambda * next_advantage
        result[step] = torch.where(is_step[step], advantage, 0)
        next_value = torch.where(is_step[step], values[step], next_value)
        next_advantage = torch.where(is_step[step], advantage, next_advantage)
    return result
