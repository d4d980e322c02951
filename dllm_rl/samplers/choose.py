"""One denoising step of `Unmask`.

Rank the masked positions, commit some of them, draw their tokens, and record the log-probs of tokens and order.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from dllm_rl.decoding.order import (
    block_first_step,
    commit_cutoff,
    draw_index,
    plackett_luce_logprobs,
    stay_masked_logprobs,
)
from dllm_rl.decoding.soft_threshold import set_logprobs
from dllm_rl.decoding.support import filter_support, make_filter_support
from dllm_rl.models.base import Policy
from dllm_rl.models.logprobs import chunked, invert_cdf, process
from dllm_rl.samplers.canvas import (
    RANK_STREAM,
    TOKEN_STREAM,
    Canvas,
    CommitDecision,
    Drawn,
    RolloutField,
    StepPlan,
    StepWrites,
)
from dllm_rl.samplers.confidences import ConfidenceChange
from dllm_rl.samplers.revise import packed_events, revise
from dllm_rl.samplers.rules import (
    REWRITES,
    Commit,
    FunctionRank,
    Rank,
    SoftThreshold,
    check_last_step,
    has_order_logprob,
    order_probability,
)
from dllm_rl.types import Order, SamplingParams

SLAB_ELEMENTS = {"cpu": 2**19, "cuda": 2**24}  # fp32 logits of a slab; on a CPU a slab fits in its cache


class StepSampler:
    """Sampler of one denoising step. A call ranks the positions, commits some and draws their tokens.

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
        self.policy = policy
        self.canvas = canvas
        self.sampling_params = sampling_params
        self.rank = rank
        self.commit = commit
        greedy = sampling_params.temperature == 0
        reads_tokens = "tokens" in rank.reads or "replaceable" in commit.reads
        # If False, only the tokens of the chosen positions are drawn. Greedy tokens cost nothing where the head runs.
        self.draws_first = reads_tokens or (greedy and "logits" in rank.reads)
        self.depends_on_tokens = reads_tokens and not greedy
        if commit.revises:
            canvas.events = []
        self.adds_gumbel = rank.adds_gumbel
        if self.adds_gumbel and not commit.takes_highest:
            raise ValueError(
                f"commit={commit.name} cannot use the noisy scores of {rank.name}; use Schedule() or LateSchedule()"
            )
        self.soft_threshold_params = None  # tau and temperature
        if isinstance(commit, SoftThreshold):
            self.soft_threshold_params = (float(commit.tau), float(commit.temperature))
        if self.soft_threshold_params is not None and not has_order_logprob(rank, commit):
            raise ValueError(
                f"commit=SoftThreshold(...) needs the scores of MaxProb(), and rank={rank.name} has other scores; use "
                "rank=MaxProb()"
            )
        self.order_probability = order_probability(rank, commit, greedy=greedy)
        self.has_order_logprob = has_order_logprob(rank, commit, greedy=greedy)
        self.has_nan_scores = canvas.masked.new_zeros(())  # on the device, so that a step does not wait for it
        self.confidence_change = None
        if confidence_radius is not None:
            self.confidence_change = ConfidenceChange(canvas, rank, commit, confidence_radius)

    def __call__(self, plan: StepPlan, states: Float[Tensor, "K D"]) -> StepWrites:
        """Run one step of the plan, from the hidden states of its K positions.

        Raise ValueError if the commit rule writes nothing in the last step of a block.
        """
        params = self.sampling_params
        rank_uniforms = plan.uniforms(RANK_STREAM)
        drawn: Drawn | None = None
        if self.draws_first:
            scores, drawn = draw_and_rank(
                self.policy, states, plan.uniforms(TOKEN_STREAM), rank_uniforms, params, self.rank
            )
        else:
            scores = rank_positions(self.policy, states, rank_uniforms, params, self.rank)
        commit_scores = plan.scatter_to_rows(add_gumbel(scores, rank_uniforms) if self.adds_gumbel else scores)
        self.has_nan_scores |= commit_scores.isnan().any()
        decision = self.decide(plan, commit_scores, drawn)
        if self.confidence_change is not None:
            self.confidence_change.record(plan, commit_scores, decision.chosen)
        chosen = plan.positions_in(decision.chosen, int(decision.num_chosen.sum()))
        if drawn is None:
            drawn = draw_tokens(self.policy, states[chosen], plan.uniforms(TOKEN_STREAM, chosen), params)
        else:
            drawn = drawn.at(chosen)
        if drawn.log_mass is not None and drawn.support is not None:
            plan.records.update(log_mass=(chosen, drawn.log_mass, 0), ids=(chosen, drawn.support, -1))
        if self.has_order_logprob:
            plan.records.update(self.order_records(plan, states, scores, commit_scores, decision.chosen, chosen))
        return StepWrites(decision, chosen, drawn)

    def order_records(
        self,
        plan: StepPlan,
        states: Tensor,
        scores: Tensor,
        commit_scores: Tensor,
        chosen_mask: Tensor,
        chosen: Tensor,
    ) -> dict[str, tuple[Tensor | None, Tensor, int]]:
        """Return the log-probs of the order (`decoding.order`) as records of the plan.

        Under `Confidence`, each position that stays masked has the log-prob that its draw ranks below the chosen ones.
        Under `PlackettLuce`, each chosen position has the log-prob and the index of its draw. Under `SoftThreshold`,
        each chosen position has its share of the log-prob of the set. `chosen` are the indices of the positions of
        `chosen_mask`.
        """
        width = chosen_mask.shape[1]
        if self.soft_threshold_params is not None:
            tau, temperature = self.soft_threshold_params
            logps = set_logprobs(scores, plan.row_index, chosen, width, tau=tau, temperature=temperature)
            return {"order": (chosen, logps, 0)}
        if self.adds_gumbel:
            draws = draw_index(commit_scores, plan.masked, chosen_mask)[plan.row_index, plan.offset]
            logps = plackett_luce_logprobs(scores, plan.row_index, draws, chosen, width)
            return {"order": (chosen, logps, 0), "draw": (chosen, draws[chosen], 0)}
        stay_masked = plan.positions_in(~chosen_mask, len(scores) - len(chosen))
        cutoff = commit_cutoff(
            scores[chosen],
            plan.row_index[chosen],
            plan.offset[chosen],
            plan.row_index[stay_masked],
            plan.offset[stay_masked],
            num_steps=len(plan.rows),
        )
        # The head runs a second time, because the chosen positions are known only now.
        logps = stay_masked_logprobs(self.policy, states[stay_masked], *cutoff, self.sampling_params)
        if (earlier := self.canvas.records.get("order")) is not None:  # a position may stay masked in several steps
            logps = earlier[plan.rows_and_offsets(stay_masked)] + logps
        return {"order": (stay_masked, logps, 0)}

    def check_scores(self) -> None:
        """Raise ValueError if the rank returned NaN although the model did not. The host waits for the device."""
        if self.has_nan_scores & self.canvas.logprobs.isfinite().all():
            raise ValueError(
                f"rank={self.rank.name} returned NaN, which has no place in an order; return numbers: the logits of "
                "suppressed tokens are -inf, and 0 * -inf is NaN"
            )

    def rollout_fields(self) -> dict[str, RolloutField]:
        """Return the optional records so far as fields of a `Rollout`, for the completions' positions (B, L)."""
        canvas = self.canvas
        records = canvas.records
        draws_positions = self.soft_threshold_params is not None or self.adds_gumbel
        is_custom = type(self.rank).__module__ != Rank.__module__ or isinstance(self.rank, FunctionRank)
        order = Order(
            block_first_step=block_first_step(canvas.unmask_step, canvas.block),
            rank_name=None if is_custom or draws_positions else self.rank.name,
            logprobs=records.get("order"),
            rank_function=self.rank if draws_positions and self.has_order_logprob else None,
            draw_index=records.get("draw"),
            soft_threshold_params=self.soft_threshold_params if self.has_order_logprob else None,
            probability=self.order_probability,
        )
        support = make_filter_support(records["log_mass"], records["ids"]) if "ids" in records else None
        events = None
        if canvas.events is not None:
            events = packed_events(canvas.events, canvas.masked.shape, depends_on_tokens=self.depends_on_tokens)
        change = None if self.confidence_change is None else self.confidence_change.total
        return {"order": order, "filter_support": support, "events": events, "confidence_change": change}

    def decide(self, plan: StepPlan, scores: Float[Tensor, "R L"], drawn: Drawn | None) -> CommitDecision:
        """Return the commit rule's decision. Raise ValueError if it writes nothing in the last step of a block."""
        inputs = {"steps": plan.total_steps} if "steps" in self.commit.reads else {}
        if "uniforms" in self.commit.reads:
            inputs["uniforms"] = plan.scatter_to_rows(plan.uniforms(RANK_STREAM).float())
        if self.commit.revises:
            tokens = None if drawn is None else drawn.tokens
            (kind,) = self.commit.reads.intersection(REWRITES)
            return revise(plan, scores, tokens, self.canvas.tokens, self.commit, kind, **inputs)
        chosen = self.commit(scores, plan.masked, plan.steps_left_on_device, **inputs) & plan.masked
        # If the host knows the number of chosen positions, it does not wait for the device to count them.
        count = self.commit.count
        num_chosen = chosen.sum(-1).cpu() if count is None else count(plan.num_masked, plan.steps_left)
        check_last_step(self.commit.name, plan.steps_left, plan.num_masked, num_chosen)
        return CommitDecision(chosen, num_chosen=num_chosen, net_unmasked=num_chosen)


def add_gumbel(scores: Float[Tensor, "*K"], uniforms: Float[Tensor, "*K"]) -> Float[Tensor, "*K"]:
    """Add Gumbel noise to scores, computed from uniform numbers in [0, 1)."""
    return (scores - uniforms.clamp(min=1e-300).log().neg().log()).float()


def draw_tokens(
    policy: Policy, hidden: Float[Tensor, "K D"], uniforms: Float[Tensor, " K"], sampling_params: SamplingParams
) -> Drawn:
    """Draw a token at each of K positions."""

    def draw_slab(logits: Tensor, uniforms: Tensor) -> tuple[Tensor, ...]:
        logits[:, policy.spec.mask_id] = -torch.inf
        return _draw_from_logits(logits, uniforms, sampling_params).tensors()

    return Drawn(*_map_slabs(policy, draw_slab, sampling_params, hidden, uniforms))


def draw_and_rank(
    policy: Policy,
    hidden: Float[Tensor, "K D"],
    token_uniforms: Float[Tensor, " K"],
    rank_uniforms: Float[Tensor, " K"],
    sampling_params: SamplingParams,
    rank: Rank,
) -> tuple[Float[Tensor, " K"], Drawn]:
    """Return the rank's score of each position, and the result of `draw_tokens`."""
    mask_id = policy.spec.mask_id
    is_untempered = sampling_params.temperature in (0, 1) and not sampling_params.filters

    def score_slab(
        logits: Tensor, token_uniforms: Tensor, rank_uniforms: Tensor, hidden: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        mask_logits = logits[:, mask_id].clone()
        logits[:, mask_id] = -torch.inf
        drawn = _draw_from_logits(logits, token_uniforms, sampling_params)
        logits[:, mask_id] = mask_logits
        if "normalizer" in rank.reads:
            # The rank's normalizer includes the mask token, as in the published algorithms. If the draw was untempered,
            # its log-sum-exp is reused.
            normalizer = drawn.normalizer.logaddexp(mask_logits) if is_untempered else logits.logsumexp(-1)
            drawn = drawn._replace(normalizer=normalizer)
        inputs = {
            "logits": logits,
            "normalizer": drawn.normalizer,
            "tokens": drawn.tokens,
            "uniforms": rank_uniforms,
            "hidden": hidden,
        }
        return _scores(rank, inputs), *drawn.tensors()

    states = (hidden,) if "hidden" in rank.reads else ()
    outputs = _map_slabs(policy, score_slab, sampling_params, hidden, token_uniforms, rank_uniforms, *states)
    return outputs[0], Drawn(*outputs[1:])


def rank_positions(
    policy: Policy,
    hidden: Float[Tensor, "K D"],
    rank_uniforms: Float[Tensor, " K"],
    sampling_params: SamplingParams,
    rank: Rank,
) -> Float[Tensor, " K"]:
    """Return the scores of a rank that does not read tokens. The head runs only if the rank reads logits."""
    if not rank.reads & {"logits", "normalizer"}:
        return _scores(rank, {"uniforms": rank_uniforms, "hidden": hidden})

    def score_slab(logits: Tensor, rank_uniforms: Tensor, hidden: Tensor | None = None) -> tuple[Tensor]:
        inputs = {"logits": logits, "uniforms": rank_uniforms, "hidden": hidden}
        if "normalizer" in rank.reads:
            inputs["normalizer"] = logits.logsumexp(-1)
        return (_scores(rank, inputs),)

    states = (hidden,) if "hidden" in rank.reads else ()
    return _map_slabs(policy, score_slab, sampling_params, hidden, rank_uniforms, *states)[0]


def _scores(rank: Rank, inputs: Mapping[str, Tensor | None]) -> Float[Tensor, " K"]:
    """Return the rank's scores, with the lowest number in place of -inf, the score of positions that are not masked."""
    scores = rank(**{name: inputs[name] for name in rank.reads}).float()
    return scores.clamp(min=torch.finfo(scores.dtype).min)


def _map_slabs(
    policy: Policy, f: Callable, sampling_params: SamplingParams, hidden: Tensor, *inputs: Tensor
) -> tuple[Tensor, ...]:
    """Run the head in chunks of the K positions, and `f` on slabs: parts of a chunk that fit in a CPU's cache.

    `f` receives a slab's fp32 logits and its part of each of `inputs`. Suppressed ids except the mask token are at
    -inf.
    """
    slab_rows = max(1, SLAB_ELEMENTS.get(policy.device.type, SLAB_ELEMENTS["cuda"]) // policy.vocab_size)

    def run_chunk(hidden_chunk: Tensor, *chunk_inputs: Tensor) -> tuple[Tensor, ...]:
        logits = policy.head(hidden_chunk)
        for token in set(sampling_params.suppress) - {policy.spec.mask_id}:
            logits[:, token] = -torch.inf
        slabs = zip(*(x.split(slab_rows) for x in (logits, *chunk_inputs)), strict=True)
        outputs = [f(slab_logits.float(), *slab_inputs) for slab_logits, *slab_inputs in slabs]
        return tuple(torch.cat(slab_outputs) for slab_outputs in zip(*outputs, strict=True))

    return chunked(run_chunk, hidden, *inputs, policy=policy)


def _draw_from_logits(logits: Tensor, uniforms: Tensor, sampling_params: SamplingParams) -> Drawn:
    """Draw one token per row of `logits` from the sampling distribution."""
    sampling_params = replace(sampling_params, suppress=())  # suppressed ids are already at -inf
    unfiltered = process(logits, replace(sampling_params, support="unfiltered"))
    logits = process(logits, sampling_params)
    support = filter_support(unfiltered, logits) if sampling_params.filters else ()
    if sampling_params.temperature == 0:
        best, tokens = logits.max(-1)  # with ties the first token
        normalizer = logits.sub(best[:, None]).exp_().sum(-1).log_().add_(best)
        return Drawn(tokens, best - normalizer, normalizer, *support)
    peak = logits.amax(-1, keepdim=True)
    mass = logits.sub(peak).exp_()
    normalizer = mass.sum(-1).log_().add_(peak[:, 0])
    tokens = invert_cdf(mass, uniforms)
    return Drawn(tokens, logits.gather(-1, tokens[:, None])[:, 0] - normalizer, normalizer, *support)
