"""One denoising step of `Unmask`.

Rank the masked positions, commit some of them, draw their tokens, and record the log-probs of tokens and order.
docs/papers.md explains the tag [ours].
"""

from collections.abc import Iterable
from dataclasses import replace
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dllm_rl.decoding.order import (
    commit_cutoff,
    plackett_luce_logprobs,
    plackett_luce_logprobs_fixed_shape,
    set_logprobs,
    stay_masked_logprobs,
)
from dllm_rl.decoding.support import MAX_SUPPORT_IDS, filter_support, make_filter_support
from dllm_rl.models.base import Policy
from dllm_rl.models.logprobs import chunked, invert_cdf, process
from dllm_rl.rng import uniforms
from dllm_rl.samplers.canvas import (
    RANK_STREAM,
    TOKEN_STREAM,
    Canvas,
    Decision,
    StepPositions,
    StepRows,
    Written,
    block_first_step,
    put,
)
from dllm_rl.samplers.revise import packed_events, revise
from dllm_rl.samplers.rules import (
    DETERMINISTIC,
    SCORED_ORDERS,
    Commit,
    Rank,
    SoftThreshold,
    check_scores,
    draw_index,
    highest,
    order_probability,
)
from dllm_rl.types.groups import starts_group
from dllm_rl.types.rollouts import Order, Rollout, SamplingParams

LOWEST_SCORE = torch.finfo(torch.float32).min  # in place of -inf, the score of positions that are not masked
BELOW_ONE = 1 - 2.0**-24  # the largest fp32 number below 1
SLAB_ELEMENTS = {"cpu": 2**19, "cuda": 2**24}  # fp32 logits of a slab; on a CPU a slab fits in its cache


class Drawn(NamedTuple):
    """Tokens drawn at K positions.

    Attributes:
        tokens: Token ids.
        logprobs: Log-probs under the sampling distribution, in nats.
        normalizer: Log-sum-exp of the logits that the rank reads. If the rank reads no normalizer: of the logits from
            which the token was drawn.
        log_mass: First result of `filter_support`. None without top_k and top_p.
        support: Second result of `filter_support`.
    """

    tokens: Int[Tensor, " K"]
    logprobs: Float[Tensor, " K"]
    normalizer: Float[Tensor, " K"]
    log_mass: Float[Tensor, " K"] | None = None
    support: Int[Tensor, "K C"] | None = None


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
    ) -> None:
        """Prepare the canvas's records. Raise ValueError when the rank and the commit rule cannot be combined."""
        self.policy = policy
        self.canvas = canvas
        self.sampling_params = sampling_params
        self.rank = rank
        self.commit = commit
        greedy = sampling_params.temperature == 0
        self.rank_reads, self.commit_reads = rank.reads, commit.reads  # read once: a compiled step cannot read them
        self.reads_uniforms = rank.adds_gumbel or "uniforms" in self.rank_reads | self.commit_reads
        reads_tokens = "tokens" in self.rank_reads or "replaceable" in self.commit_reads
        # If False, only the tokens of the chosen positions are drawn. Greedy tokens cost nothing where the head runs.
        self.draws_first = reads_tokens or (greedy and "logits" in self.rank_reads)
        self.depends_on_tokens = reads_tokens and not greedy
        # Whether tokens are drawn from the logits that ranked, if these fit in a chunk. A custom rank may change them.
        self.keeps_logits = rank in DETERMINISTIC.values()
        if commit.revises:
            canvas.events = []
        if rank.adds_gumbel and not commit.takes_highest:
            raise ValueError(
                f"commit={commit.name} cannot use the noisy scores of {rank.name}; use a rule with `count`, such as "
                "Schedule()"
            )
        check_scores(rank, commit)
        self.order_probability = order_probability(rank, commit, greedy=greedy)
        self.has_order_logprob = canvas.prompts.reads_order and self.order_probability in SCORED_ORDERS
        self.soft_threshold_params = None  # tau and temperature
        if isinstance(commit, SoftThreshold):
            self.soft_threshold_params = (float(commit.tau), float(commit.temperature))
            if order_probability(rank, commit) not in SCORED_ORDERS:
                raise ValueError(
                    f"commit=SoftThreshold(...) needs the scores of MaxProb(), and rank={rank.name} has other scores; "
                    "use rank=MaxProb()"
                )
        records: dict[str, Tensor] = {}
        logprobs = canvas.written.logprobs
        if sampling_params.filters:
            size = (*logprobs.shape, min(MAX_SUPPORT_IDS + 1, policy.vocab_size))
            records["log_mass"] = torch.zeros_like(logprobs)
            records["support_ids"] = torch.full(size, -1, dtype=torch.int32, device=logprobs.device)
        if self.has_order_logprob:
            records["order_logprobs"] = torch.zeros_like(logprobs)
            if rank.adds_gumbel:
                records["draw_index"] = torch.zeros_like(canvas.columns)
        canvas.written = canvas.written._replace(**records)

    def __call__(
        self,
        at: StepPositions,
        hidden: Float[Tensor, "K D"],
        written: Written,
        host_rows: StepRows | None = None,
    ) -> Decision:
        """Run one step: change `written`, and return what the commit rule decided.

        A compiled step calls this too. It has fixed shapes: the K positions are all that a block may have, those that
        are not masked do not change, and the host knows nothing of the step.

        Args:
            at: The K positions.
            hidden: Their hidden states.
            written: Tensors of the canvas.
            host_rows: What the host knows of the step's rows. None (default): nothing, as in a compiled step.
        """
        policy, params = self.policy, self.sampling_params
        key = (at.seed, at.row_steps, at.offset)
        rank_uniforms = uniforms(*key, stream=RANK_STREAM) if self.reads_uniforms else None
        if rank_uniforms is not None and not self.rank.adds_gumbel:  # scores are fp32, in which larger ones are 1
            rank_uniforms = rank_uniforms.clamp(max=BELOW_ONE)
        draws_first = self.draws_first or host_rows is None
        first_uniforms = (rank_uniforms, uniforms(*key, stream=TOKEN_STREAM) if draws_first else None)
        kept: list[Tensor] | None = [] if self.keeps_logits and not draws_first else None
        ranked = (self.rank, self.rank_reads)
        scores, drawn = rank_and_draw(policy, hidden, params, ranked, first_uniforms, kept, at.offset)
        assert scores is not None, "there is a rank"
        if host_rows is not None and self.canvas.forwards == 1:
            self.check_rank(hidden, at.offset, scores)
        noisy_scores = scores
        if self.rank.adds_gumbel:  # Gumbel noise, from uniform numbers in [0, 1)
            assert rank_uniforms is not None, "a rank with noise reads uniform numbers"
            noisy_scores = (scores - rank_uniforms.clamp(min=1e-300).log().neg().log()).float()
        commit_scores = at.to_grid(noisy_scores)
        if host_rows is None:
            commit_scores = commit_scores.masked_fill(~at.masked, -torch.inf)
        written.has_nan_scores.logical_or_(commit_scores.isnan().any())
        decision = self.decide(at, commit_scores, rank_uniforms, drawn, host_rows, written.contradicts)
        places, keep = decision.places, decision.keep
        rows, offsets, steps = at.canvas_row[places], at.offset[places], at.row_steps[places]
        if written.order_logprobs is not None:
            draws = None
            if written.draw_index is not None:
                draws = draw_index(commit_scores, at.masked, decision.chosen)
                put(written.draw_index, rows, offsets, draws[at.row_index, at.offset][places], keep)
            scored, logps, is_scored = self.order_logprobs(at, hidden, decision, scores, drawn, draws)
            place = (at.canvas_row[scored], at.offset[scored])
            # A position may stay masked in several steps, whose log-probs are added.
            put(written.order_logprobs, *place, written.order_logprobs[place] + logps, is_scored)
        if drawn is None:  # the tokens of the chosen positions alone
            states = places if kept else hidden[places]
            token_uniforms = uniforms(at.seed[places], steps, offsets, stream=TOKEN_STREAM)
            _, drawn = rank_and_draw(policy, states, params, uniforms=(None, token_uniforms), kept=kept)
            assert drawn is not None
        else:
            drawn = Drawn._make(None if values is None else values[places] for values in drawn)
        if decision.remasked is not None:
            self.canvas.remask(*(x[decision.remasked] for x in (at.canvas_row, at.offset, at.row_steps)))
        put(written.tokens, rows, at.column[places], drawn.tokens, keep)
        put(written.masked, rows, offsets, written.masked.new_zeros(()), keep)
        put(written.unmask_step, rows, offsets, steps, keep)
        put(written.logprobs, rows, offsets, drawn.logprobs, keep)
        if written.log_mass is not None and written.support_ids is not None:
            assert drawn.log_mass is not None and drawn.support is not None, "top_k and top_p have a support"
            put(written.log_mass, rows, offsets, drawn.log_mass, keep)
            put(written.support_ids, rows, offsets, drawn.support, keep)
        if self.canvas.events is not None:
            self.canvas.events.append((rows, offsets, steps, drawn.tokens, drawn.logprobs))
        return decision

    def check_rank(
        self, hidden: Float[Tensor, "K D"], positions: Int[Tensor, " K"], scores: Float[Tensor, " K"]
    ) -> None:
        """Raise ValueError if a custom rank that is declared deterministic gives other scores when called again."""
        base = getattr(self.rank, "base_rank", self.rank)
        if not base.is_custom or base.order != "deterministic":
            return
        ranked = (self.rank, self.rank_reads)
        again, _ = rank_and_draw(self.policy, hidden, self.sampling_params, ranked, positions=positions)
        assert again is not None, "there is a rank"
        if not again.isclose(scores, rtol=1e-3, atol=1e-3, equal_nan=True).all():
            raise ValueError(
                f"rank={base.name} is declared deterministic, but gave different scores when called again with the "
                "same inputs: take `uniforms` for random numbers and declare order='independent', or declare 'unknown'"
            )

    def decide(
        self,
        at: StepPositions,
        scores: Float[Tensor, "R L"],
        rank_uniforms: Float[Tensor, " K"] | None,
        drawn: Drawn | None,
        host_rows: StepRows | None,
        contradicts: Bool[Tensor, ""],
    ) -> Decision:
        """Return the commit rule's decision. Set `contradicts` if it contradicts what the rule declares."""
        commit = self.commit
        inputs = {"steps": at.total_steps} if "steps" in self.commit_reads else {}
        if "uniforms" in self.commit_reads:
            assert rank_uniforms is not None, "they are drawn if the rule reads them"
            inputs["uniforms"] = at.to_grid(rank_uniforms.float())
        if self.canvas.events is not None:
            assert host_rows is not None, "a compiled step does not rewrite"
            differs = None if drawn is None else drawn.tokens != self.canvas.written.tokens[at.canvas_row, at.column]
            return revise(at, host_rows, scores, commit, inputs, differs, contradicts)
        chosen = commit.choose(contradicts, scores, at.masked, at.steps_left, **inputs) & at.masked
        if host_rows is None:
            num_chosen = chosen.sum(-1)
            places = torch.arange(len(at.offset), device=chosen.device)
            return Decision(chosen, places, num_chosen, keep=chosen[at.row_index, at.offset])
        # If the host knows the number of chosen positions, it does not wait for the device to count them.
        if commit.count is None:
            num_chosen = chosen.sum(-1).cpu()
        else:
            num_chosen = commit.number_to_choose(host_rows.num_masked, host_rows.steps_left)
        return Decision(chosen, at.indices_of(chosen, int(num_chosen.sum())), num_chosen)

    def order_logprobs(
        self,
        at: StepPositions,
        hidden: Float[Tensor, "K D"],
        decision: Decision,
        scores: Float[Tensor, " K"],
        drawn: Drawn | None,
        draws: Int[Tensor, "R L"] | None,
    ) -> tuple[Int[Tensor, " C"], Float[Tensor, " C"], Bool[Tensor, " C"] | None]:
        """Return indices among the K positions, the log-probs of the order there, and which to keep (None: all).

        Under `Confidence`, each position that stays masked has the log-prob that its draw ranks below the chosen ones.
        Under `PlackettLuce`, each chosen position has the log-prob of its draw; `draws` has the draws' indices. Under
        `SoftThreshold`, each chosen position has its share of the log-prob of the set.
        """
        chosen, places, keep = decision.chosen, decision.places, decision.keep
        num_rows, width = chosen.shape
        if self.soft_threshold_params is not None:
            tau, temperature = self.soft_threshold_params
            return places, set_logprobs(scores, at.row_index, places, width, tau=tau, temperature=temperature), keep
        if draws is not None:
            position_draws = draws[at.row_index, at.offset]
            if keep is None:
                return places, plackett_luce_logprobs(scores, at.row_index, position_draws, places, width), keep
            masked = at.masked[at.row_index, at.offset]
            slots = (scores.masked_fill(~masked, -torch.inf), position_draws, masked, keep)  # as many in each row
            logps = plackett_luce_logprobs_fixed_shape(*(values.view(num_rows, -1) for values in slots))
            return places, logps.flatten(), keep
        stay_masked, chosen_scores, stays = places, scores, None
        if keep is None:
            stay_masked, chosen_scores = at.indices_of(~chosen, len(scores) - len(places)), scores[places]
        else:
            stays, chosen_scores = (at.masked & ~chosen)[at.row_index, at.offset], scores.masked_fill(~keep, torch.inf)
        assert drawn is not None, "`Confidence` reads tokens"
        chosen_at, stay_at = ((at.row_index[i], at.offset[i]) for i in (places, stay_masked))
        cutoff = commit_cutoff(chosen_scores, *chosen_at, *stay_at, num_steps=num_rows)
        # The head runs a second time, because the chosen positions are known only now. The normalizer of the scores is
        # reused: generated code would sum it again in another order, and miss ties.
        normalizer = drawn.normalizer[stay_masked]
        logps = stay_masked_logprobs(self.policy, hidden[stay_masked], *cutoff, self.sampling_params, normalizer)
        return stay_masked, logps, stays

    def rollout(self) -> Rollout:
        """Return the rollout so far."""
        canvas, written = self.canvas, self.canvas.written
        draws_positions = self.soft_threshold_params is not None or self.rank.adds_gumbel
        order = Order(
            block_first_step=block_first_step(written.unmask_step, canvas.block),
            rank_name=None if self.rank.is_custom or draws_positions else type(self.rank).__name__,
            logprobs=written.order_logprobs,
            rank_function=self.rank if draws_positions and self.has_order_logprob else None,
            draw_index=written.draw_index,
            soft_threshold_params=self.soft_threshold_params if self.has_order_logprob else None,
            probability=self.order_probability,
        )
        support = events = None
        if written.log_mass is not None and written.support_ids is not None:
            support = make_filter_support(written.log_mass, written.support_ids)
        if canvas.events is not None:
            events = packed_events(canvas.events, written.masked.shape, depends_on_tokens=self.depends_on_tokens)
        optional = {"order": order, "filter_support": support, "events": events}
        return canvas.rollout(self.sampling_params, self.policy.weights_version, **optional)


def rank_and_draw(
    policy: Policy,
    hidden: Float[Tensor, "K D"] | Int[Tensor, " K"],
    sampling_params: SamplingParams,
    rank_and_reads: tuple[Rank | None, frozenset[str]] = (None, frozenset()),
    uniforms: tuple[Tensor | None, Tensor | None] = (None, None),
    kept: list[Tensor] | None = None,
    positions: Int[Tensor, " K"] | None = None,
) -> tuple[Float[Tensor, " K"] | None, Drawn | None]:
    """Score K positions, draw a token at each of them, or both.

    The head runs in chunks of the K positions, and each chunk in slabs: parts of it that fit in a CPU's cache.

    Args:
        policy: Policy whose head is run.
        hidden: Hidden states of the positions, or their indices in `kept[0]`.
        sampling_params: Settings of the sampling distribution.
        rank_and_reads: Rank that scores, and its `reads`, which a compiled step cannot read. None (default): no scores.
        uniforms: Random numbers (K,) of the rank, and of the draw. None: no draw; the rank must not read tokens then.
        kept: Empty list, which receives the logits if they fit in one chunk; or a list with these logits, in place of
            the head. None (default): logits are not kept.
        positions: Places of the positions in their completions. None: the rank must not read them.

    Returns:
        The scores, at least LOWEST_SCORE, and the draws.
    """
    (rank, reads), (rank_uniforms, token_uniforms) = rank_and_reads, uniforms
    available = {"uniforms": rank_uniforms, "hidden": hidden, "positions": positions}
    inputs = {name: x for name, x in available.items() if name in reads and x is not None}
    if rank is not None and token_uniforms is None and not reads & {"logits", "normalizer"}:  # needs no head
        return scores_of(rank, inputs), None
    params, mask_id = sampling_params, policy.spec.mask_id
    is_untempered = params.temperature in (0, 1) and not params.filters
    slab_elements = SLAB_ELEMENTS.get(hidden.device.type, SLAB_ELEMENTS["cuda"])
    if kept:
        slab_elements //= 2  # because a slab of them is copied
    slab_rows = max(1, slab_elements // policy.vocab_size)
    if token_uniforms is not None:
        inputs["token_uniforms"] = token_uniforms
    computed = kept[0] if kept else None

    def run_chunk(hidden_chunk: Tensor, *chunk_inputs: Tensor) -> tuple[Tensor, ...]:
        slabs: Iterable[Tensor]
        if computed is not None:
            slabs = (computed[places] for places in hidden_chunk.split(slab_rows))
        else:
            chunk_logits = policy.head(hidden_chunk)
            for token in {*params.suppress} - {mask_id}:
                chunk_logits[:, token] = -torch.inf
            if kept is not None and len(hidden) <= len(chunk_logits):
                kept.append(chunk_logits)
            slabs = chunk_logits.split(slab_rows)
        outputs = []
        for slab_logits, *slab_inputs in zip(slabs, *(x.split(slab_rows) for x in chunk_inputs), strict=True):
            logits = slab_logits.float()
            given = dict(zip(inputs, slab_inputs, strict=True))
            drawn: tuple[Tensor, ...] = ()
            if "token_uniforms" in given:
                mask_logits = logits[:, mask_id].clone()
                logits[:, mask_id] = -torch.inf
                draws = _draw_from_logits(logits, given["token_uniforms"], params)
                logits[:, mask_id] = mask_logits
                if "normalizer" in reads:
                    # The rank's normalizer includes the mask token, as in the published algorithms. If the draw was
                    # untempered, its log-sum-exp is reused.
                    normalizer = draws.normalizer.logaddexp(mask_logits) if is_untempered else logits.logsumexp(-1)
                    draws = draws._replace(normalizer=normalizer)
                given |= {"tokens": draws.tokens, "normalizer": draws.normalizer}
                drawn = tuple(values for values in draws if values is not None)
            elif "normalizer" in reads:
                given["normalizer"] = logits.logsumexp(-1)
            given["logits"] = logits
            scores: tuple[Tensor, ...] = ()
            if rank is not None:
                scores = (scores_of(rank, {name: given[name] for name in reads}),)
            outputs.append((*scores, *drawn))
        return tuple(torch.cat(slab_outputs) for slab_outputs in zip(*outputs, strict=True))

    outputs = chunked(run_chunk, hidden, *inputs.values(), policy=policy)
    drawn = outputs if rank is None else outputs[1:]
    return None if rank is None else outputs[0], Drawn(*drawn) if drawn else None


def scores_of(rank: Rank, inputs: dict[str, Tensor]) -> Float[Tensor, " K"]:
    """Return the scores of positions. A custom rank gets copies, because it may write into them, but of the logits,
    which nothing reads after it.
    """
    if getattr(rank, "base_rank", rank).is_custom:
        inputs = {name: x if name == "logits" else x.clone() for name, x in inputs.items()}
    return rank(**inputs).float().clamp(min=LOWEST_SCORE)


def _draw_from_logits(logits: Tensor, uniforms: Tensor, sampling_params: SamplingParams) -> Drawn:
    """Draw one token per row of `logits` from the sampling distribution."""
    sampling_params = replace(sampling_params, suppress=())  # suppressed ids are already at -inf
    support: tuple[Tensor, ...] = ()
    if sampling_params.filters:
        unfiltered = process(logits, replace(sampling_params, support="unfiltered"))
        logits = process(logits, sampling_params)
        support = filter_support(unfiltered, logits)
    else:
        logits = process(logits, sampling_params)
    if sampling_params.temperature == 0:
        best, tokens = logits.max(-1)  # with ties the first token
        normalizer = logits.sub(best[:, None]).exp_().sum(-1).log_().add_(best)
        return Drawn(tokens, best - normalizer, normalizer, *support)
    peak = logits.amax(-1, keepdim=True)
    mass = logits.sub(peak).exp_()
    normalizer = mass.sum(-1).log_().add_(peak[:, 0])
    tokens = invert_cdf(mass, uniforms)
    return Drawn(tokens, logits.gather(-1, tokens[:, None])[:, 0] - normalizer, normalizer, *support)


@torch.no_grad()
def order_agreement(policy: Policy, rollout: Rollout) -> dict[str, tuple[Tensor, Tensor]]:
    """Compare the positions that `policy` would commit in the rollout's first step with those that were committed.

    The ranks `MaxProb`, `Margin` and `Entropy` depend only on the canvas and the weights. If the policy chooses other
    positions, the recorded order has probability 0 under it, and importance weights of the tokens do not correct this
    [ours].

    Returns:
        (sum, count) pairs: order_agreement, the share of committed positions that the policy chooses too, and
        order_agreement_rows, the share of prompts for which both choose the same positions. Empty if the rollout's rank
        is not one of the three, or if its commit rule rewrites tokens.
    """
    order, mask_id = rollout.order, policy.spec.mask_id
    if order is None or order.rank_name not in DETERMINISTIC or mask_id is None or rollout.events is not None:
        return {}  # the order of RandomOrder and Confidence is not a function of the canvas and the weights
    rank = DETERMINISTIC[order.rank_name]
    first_rows = starts_group(rollout.group)  # all completions of a prompt begin with the same canvas
    masked = rollout.completion_mask[first_rows]
    in_first_block = order.block_first_step[first_rows] == 0
    committed = rollout.unmask_step[first_rows] == 0
    tokens = rollout.tokens[first_rows].masked_fill(masked, mask_id)
    attention_mask = rollout.attention_mask[first_rows]
    if rollout.first_step is not None:  # the first canvas has no columns of later turns
        attention_mask = attention_mask & (rollout.first_step[first_rows] == 0)
    states = policy.hidden(tokens, attention_mask)[in_first_block]
    scores = torch.full(in_first_block.shape, -torch.inf, device=in_first_block.device)
    first_scores, _ = rank_and_draw(policy, states, rollout.sampling_params, (rank, rank.reads))
    assert first_scores is not None, "there is a rank"
    scores[in_first_block] = first_scores
    chosen = highest(scores, in_first_block, count=committed.sum(-1)) & in_first_block
    has_commit = committed.any(-1)
    is_same = (chosen == committed).all(-1) & has_commit
    return {
        "order_agreement": ((chosen & committed).sum(), committed.sum()),
        "order_agreement_rows": (is_same.sum(), has_commit.sum()),
    }
