"""What a step writes: its rank orders the positions, its commit rule picks some, and each of those gets a token."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor

from dllm_rl.models.base import Policy
from dllm_rl.samplers.canvas import Canvas
from dllm_rl.samplers.propose import order_logprobs, propose, propose_and_rank, rank_only
from dllm_rl.samplers.revise import revise, revising_inputs
from dllm_rl.samplers.rules import order_has_law, rank_inputs, schedule, share
from dllm_rl.samplers.turns import Decision, Turn, check_last_step
from dllm_rl.types import SamplingParams

TOKENS = 0  # streams of random numbers: the draw of a token, and the rank's own numbers
TIES = 1


@dataclass(frozen=True)
class Choice:
    """What a step writes; indices are of the turn's K positions."""

    decision: Decision
    picked: Int[Tensor, " C"]  # positions that are written
    drawn: Sequence[Tensor]  # their tokens and log-probs (nats); with top_k or top_p also what `kept_set` gives
    # Positions left masked, and the log-prob (nats) with which the step leaves them; None: the order has no law
    left: tuple[Int[Tensor, " J"], Float[Tensor, " J"]] | None


class Choose:
    """`choose(turn, states)`: a step's choice, whichever comes first, the drawing of tokens or the ranking."""

    def __init__(
        self, policy: Policy, canvas: Canvas, sampling_params: SamplingParams, rank: Callable, commit: Callable
    ) -> None:
        """Raises ValueError when the rank or the commit rule takes what is not offered."""
        needs = rank_inputs(rank)
        self.policy = policy
        self.canvas = canvas
        self.sampling_params = sampling_params
        self.rank = rank
        self.commit = commit
        self.revising = revising_inputs(commit)
        greedy = sampling_params.temperature == 0
        # A rank of the state alone leaves the drawing to when it is known where; the likeliest tokens come for free.
        self.draws_first = "tokens" in needs or (greedy and "logits" in needs) or "changed" in self.revising
        # Without chance, or with a rank of the state alone, the order does not depend on what is drawn.
        self.has_order_law = order_has_law(rank, commit) and not greedy

    def __call__(self, turn: Turn, states: Float[Tensor, "K D"]) -> Choice:
        """Raises ValueError where the commit rule leaves a block's last step empty."""
        drawn: Sequence[Tensor] | None = None
        left = None
        if self.draws_first:
            scores, *drawn = propose_and_rank(
                self.policy, states, turn.uniforms(TOKENS), turn.uniforms(TIES), self.sampling_params, self.rank
            )
        else:
            scores = rank_only(self.policy, states, turn.uniforms(TIES), self.sampling_params, self.rank)
        decision = self.decide(turn, turn.spread(scores), drawn)
        picked = turn.among(decision.chosen, int(decision.num_chosen.sum()))
        if self.has_order_law:
            stayed = turn.among(~decision.chosen, len(scores) - len(picked))
            order = order_logprobs(self.policy, states, self.sampling_params, turn, scores, picked, stayed)
            left = (stayed, order)
        if drawn is None:
            drawn = propose(self.policy, states[picked], turn.uniforms(TOKENS, picked), self.sampling_params)
        else:
            drawn = [values[picked] for values in drawn]
        return Choice(decision, picked, drawn, left)

    def decide(self, turn: Turn, scores: Float[Tensor, "R L"], drawn: Sequence[Tensor] | None) -> Decision:
        """What the commit rule picks. Raises ValueError where it leaves a block's last step empty."""
        if self.revising:
            return revise(turn, scores, drawn, self.canvas.tokens, commit=self.commit, takes=self.revising)
        chosen = self.commit(scores, turn.masked, turn.left) & turn.masked
        # The host knows the shares of `schedule`, and does not wait for the device to count.
        known = self.commit is schedule
        count = share(turn.num_masked, turn.steps_left) if known else chosen.sum(-1).cpu()
        check_last_step(self.commit, turn, count)
        return Decision(chosen, num_chosen=count, committed=count)
