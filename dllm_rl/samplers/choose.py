"""One denoising step of `unmask`.

Rank the masked positions, commit some of them, draw their tokens, and record the log-probs of tokens and order.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from dllm_rl.models.base import Policy
from dllm_rl.models.logprobs import chunked, invert, process
from dllm_rl.models.order import block_first_step, commit_cutoff, draw_index, drawn_logprobs, left_logprobs
from dllm_rl.models.soft_threshold import set_logprobs
from dllm_rl.models.support import kept_part, kept_set
from dllm_rl.samplers.canvas import TIES, TOKENS, Canvas, Choice, Decision, Drawn, RolloutField, Turn
from dllm_rl.samplers.confidences import ConfidenceChange
from dllm_rl.samplers.records import Commit, Rank, has_order_logprob, order_probability
from dllm_rl.samplers.revise import KINDS, packed_events, revise
from dllm_rl.samplers.rules import check_last_step, softness
from dllm_rl.types import Order, SamplingParams

SLAB = {"cpu": 2**19, "cuda": 2**24}  # fp32 logits reduced together; on a CPU they should stay in its cache


class Choose:
    """Sample one denoising step: `choose(turn, states)` ranks the positions, commits some and draws their tokens.

    Tokens are drawn before ranking only if the rank or the commit rule reads them, or if greedy decoding makes them
    free.
    """

    def __init__(
        self,
        policy: Policy,
        canvas: Canvas,
        sampling_params: SamplingParams,
        rank: Rank,
        commit: Commit,
        confidence_radius: int | None = None,
    ) -> None:
        """Raise ValueError when the rank and the commit rule cannot be combined."""
        needs = rank.reads
        self.policy = policy
        self.canvas = canvas
        self.sampling_params = sampling_params
        self.rank = rank
        self.commit = commit
        greedy = sampling_params.temperature == 0
        # A rank of only the state delays the draw until the positions are chosen; the likeliest tokens cost nothing.
        self.draws_first = "tokens" in needs or (greedy and "logits" in needs) or "replaceable" in commit.reads
        self.by_draws = not greedy and ("tokens" in needs or "replaceable" in commit.reads)
        if commit.revises:
            canvas.events = []
        self.noisy = rank.order == "plackett_luce"
        if self.noisy and not has_order_logprob(rank, commit):
            raise ValueError(
                f"commit={commit.name} cannot use rank=plackett_luce's noisy scores; use schedule or late_schedule"
            )
        self.soft = softness(commit.function) if commit.order == "soft_threshold" else None
        if self.soft is not None and not has_order_logprob(rank, commit):
            raise ValueError(
                f"commit=soft_threshold makes its probabilities of max_prob's scores, and rank={rank.name} has others; "
                "use rank=max_prob"
            )
        self.order_probability = order_probability(rank, commit, greedy=greedy)
        self.has_order_logprob = has_order_logprob(rank, commit, greedy=greedy)
        self.change = None
        if confidence_radius is not None:
            self.change = ConfidenceChange(canvas, rank, commit, confidence_radius)

    def __call__(self, turn: Turn, states: Float[Tensor, "K D"]) -> Choice:
        """Raise ValueError where the commit rule leaves a block's last step empty."""
        params = self.sampling_params
        drawn: Drawn | None = None
        if self.draws_first:
            scores, drawn = propose_and_rank(
                self.policy, states, turn.uniforms(TOKENS), turn.uniforms(TIES), params, self.rank
            )
        else:
            scores = rank_only(self.policy, states, turn.uniforms(TIES), params, self.rank)
        offered = turn.spread(add_gumbel(scores, turn.uniforms(TIES)) if self.noisy else scores)
        decision = self.decide(turn, offered, drawn)
        if self.change is not None:
            self.change.record(turn, offered, decision.chosen)
        picked = turn.among(decision.chosen, int(decision.num_chosen.sum()))
        if drawn is None:
            drawn = propose(self.policy, states[picked], turn.uniforms(TOKENS, picked), params)
        else:
            drawn = drawn.at(picked)
        if drawn.log_mass is not None and drawn.support is not None:
            turn.notes.update(log_mass=(picked, drawn.log_mass, 0), ids=(picked, drawn.support, -1))
        if self.has_order_logprob:
            turn.notes.update(self.order_notes(turn, states, scores, offered, decision.chosen, picked))
        return Choice(decision, picked, drawn)

    def order_notes(
        self, turn: Turn, states: Tensor, scores: Tensor, offered: Tensor, chosen: Tensor, picked: Tensor
    ) -> dict[str, tuple[Tensor | None, Tensor, int]]:
        """Return the log-probs of the order (`models.order`) as records of the turn.

        By `confidence`, each position that stays masked has the log-prob that its draw ranks after the row's picked
        ones. With `plackett_luce`, each picked position has the log-prob and the index of its draw. With
        `soft_threshold`, each picked position has its share of the set's log-prob.
        """
        if self.soft is not None:
            tau, temperature = self.soft
            logps = set_logprobs(scores, turn.row, picked, chosen.shape[1], tau=tau, temperature=temperature)
            return {"order": (picked, logps, 0)}
        if self.noisy:
            nth = draw_index(offered, turn.masked, chosen)[turn.row, turn.place]
            logps = drawn_logprobs(scores, turn.row, nth, picked, chosen.shape[1])
            return {"order": (picked, logps, 0), "draw": (picked, nth[picked], 0)}
        left = turn.among(~chosen, len(scores) - len(picked))
        places = (turn.row[picked], turn.place[picked], turn.row[left], turn.place[left])
        cutoff = commit_cutoff(scores[picked], *places, len(turn.rows))
        # The head runs again, because the picked positions are known only now.
        logps = left_logprobs(self.policy, states[left], *cutoff, self.sampling_params)
        if (before := self.canvas.noted.get("order")) is not None:  # a position may stay masked in several steps
            logps = before[turn.where(left)] + logps
        return {"order": (left, logps, 0)}

    def rollout_fields(self) -> dict[str, RolloutField]:
        """Return the features' records so far, as fields of a `Rollout`, for the completion's places."""
        canvas = self.canvas
        noted = canvas.noted
        drawn = self.soft is not None or self.noisy  # the positions are drawn, not only ranked
        rank = self.rank.function if drawn and self.has_order_logprob else None
        first = block_first_step(canvas.unmask_step, canvas.block)
        library = None if drawn else self.rank.library
        name = None if library is None else library.__name__
        soft = self.soft if self.has_order_logprob else None
        order = Order(first, name, noted.get("order"), rank, noted.get("draw"), soft, self.order_probability)
        kept = kept_part(noted["log_mass"], noted["ids"]) if "ids" in noted else None
        events = None
        if canvas.events is not None:
            events = packed_events(canvas.events, canvas.masked.shape, depends_on_tokens=self.by_draws)
        change = None if self.change is None else self.change.total
        return {"order": order, "filter_support": kept, "events": events, "confidence_change": change}

    def decide(self, turn: Turn, scores: Float[Tensor, "R L"], drawn: Drawn | None) -> Decision:
        """Return the commit rule's decision. Raise ValueError where it leaves a block's last step empty."""
        inputs = {"steps": turn.steps} if "steps" in self.commit.reads else {}
        if "uniforms" in self.commit.reads:
            inputs["uniforms"] = turn.spread(turn.uniforms(TIES).float())
        if self.commit.revises:
            tokens = None if drawn is None else drawn.tokens
            (kind,) = self.commit.reads & KINDS
            return revise(turn, scores, tokens, self.canvas.tokens, partial(self.commit.function, **inputs), kind)
        chosen = self.commit(scores, turn.masked, turn.left, **inputs) & turn.masked
        # If the host knows the number, it does not wait for the device to count.
        known = self.commit.count
        count = chosen.sum(-1).cpu() if known is None else known(turn.num_masked, turn.steps_left)
        check_last_step(self.commit.name, turn.steps_left, turn.num_masked, count)
        return Decision(chosen, num_chosen=count, committed=count)


def add_gumbel(scores: Float[Tensor, "*K"], uniforms: Float[Tensor, "*K"]) -> Float[Tensor, "*K"]:
    """Add Gumbel noise, made of uniforms of which one may be 0, to scores."""
    return (scores - uniforms.clamp(min=1e-300).log().neg().log()).float()


def propose(
    policy: Policy, hidden: Float[Tensor, "K D"], uniforms: Float[Tensor, " K"], sampling_params: SamplingParams
) -> Drawn:
    """Draw a token for each of K positions."""

    def one(logits: Tensor, u: Tensor) -> tuple[Tensor, ...]:
        logits[:, policy.spec.mask_id] = -torch.inf
        return _draw(logits, u, sampling_params).tensors()

    return Drawn(*_slabs(policy, one, sampling_params, hidden, uniforms))


def propose_and_rank(
    policy: Policy,
    hidden: Float[Tensor, "K D"],
    uniforms: Float[Tensor, " K"],
    ties: Float[Tensor, " K"],
    sampling_params: SamplingParams,
    rank: Rank,
) -> tuple[Float[Tensor, " K"], Drawn]:
    """Return the rank's score of each position, and the result of `propose`."""
    needs = rank.reads
    mask_id = policy.spec.mask_id
    same = sampling_params.temperature in (0, 1) and not sampling_params.filters

    def one(logits: Tensor, u: Tensor, v: Tensor, h: Tensor | None = None) -> tuple[Tensor, ...]:
        mask = logits[:, mask_id].clone()
        logits[:, mask_id] = -torch.inf
        drawn = _draw(logits, u, sampling_params)
        logits[:, mask_id] = mask
        if "normalizer" in needs:
            # With the mask token, as in the published algorithms; `same` reuses the log-sum-exp of the draw.
            drawn = drawn._replace(normalizer=drawn.normalizer.logaddexp(mask) if same else logits.logsumexp(-1))
        offered = {"logits": logits, "normalizer": drawn.normalizer, "tokens": drawn.tokens, "uniforms": v, "hidden": h}
        return rank(**{name: offered[name] for name in needs}).float(), *drawn.tensors()

    states = (hidden,) if "hidden" in needs else ()
    scores, *drawn = _slabs(policy, one, sampling_params, hidden, uniforms, ties, *states)
    return scores, Drawn(*drawn)


def rank_only(
    policy: Policy,
    hidden: Float[Tensor, "K D"],
    ties: Float[Tensor, " K"],
    sampling_params: SamplingParams,
    rank: Rank,
) -> Float[Tensor, " K"]:
    """Return the scores of a rank that takes no tokens. The head runs only for a rank that takes logits."""
    needs = rank.reads
    if not needs & {"logits", "normalizer"}:
        given = {"uniforms": ties, "hidden": hidden}
        return rank(**{name: given[name] for name in needs}).float()

    def one(logits: Tensor, v: Tensor, h: Tensor | None = None) -> tuple[Tensor]:
        offered = {"logits": logits, "uniforms": v, "hidden": h}
        if "normalizer" in needs:
            offered["normalizer"] = logits.logsumexp(-1)
        return (rank(**{name: offered[name] for name in needs}).float(),)

    return _slabs(policy, one, sampling_params, hidden, ties, *([hidden] if "hidden" in needs else []))[0]


def _slabs(
    policy: Policy, one: Callable, sampling_params: SamplingParams, hidden: Tensor, *rows: Tensor
) -> tuple[Tensor, ...]:
    """Run the head in chunks, and `one` on their fp32 slabs. All suppressed ids except the mask token are at -inf."""
    size = max(1, SLAB.get(policy.device.type, SLAB["cuda"]) // policy.vocab_size)

    def chunk(h: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        raw = policy.head(h)
        for token in set(sampling_params.suppress) - {policy.spec.mask_id}:
            raw[:, token] = -torch.inf
        parts = [one(x.float(), *others) for x, *others in zip(*(r.split(size) for r in (raw, *rest)), strict=True)]
        return tuple(torch.cat(columns) for columns in zip(*parts, strict=True))

    return chunked(chunk, hidden, *rows, policy=policy)


def _draw(logits: Tensor, u: Tensor, sampling_params: SamplingParams) -> Drawn:
    """Draw tokens of the processed distribution."""
    sampling_params = replace(sampling_params, suppress=())  # they are already at -inf
    unfiltered = process(logits, replace(sampling_params, support="unfiltered"))
    logits = process(logits, sampling_params)
    kept = kept_set(unfiltered, logits) if sampling_params.filters else ()
    if sampling_params.temperature == 0:
        best, tokens = logits.max(-1)  # the first of equals
        normalizer = logits.sub(best[:, None]).exp_().sum(-1).log_().add_(best)
        return Drawn(tokens, best - normalizer, normalizer, *kept)
    peak = logits.amax(-1, keepdim=True)
    mass = logits.sub(peak).exp_()
    normalizer = mass.sum(-1).log_().add_(peak[:, 0])
    tokens = invert(mass, u)
    return Drawn(tokens, logits.gather(-1, tokens[:, None])[:, 0] - normalizer, normalizer, *kept)
