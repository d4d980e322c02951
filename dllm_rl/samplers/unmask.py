"""Iterative unmasking as in LLaDA: fill blocks from left to right, a few positions of a block per step.

docs/papers.md explains the tag [paper].
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Generator, Tensor

from dllm_rl.device import copy_to_device
from dllm_rl.models.base import FamilySpec, Policy, length_buckets
from dllm_rl.records import option
from dllm_rl.rng import row_seeds
from dllm_rl.samplers.cache import Cache, CachedForward
from dllm_rl.samplers.canvas import (
    BlockTracker,
    StepPositions,
    StepRows,
    make_canvas,
    positions_of,
)
from dllm_rl.samplers.choose import StepSampler
from dllm_rl.samplers.rules import Commit, MaxProb, Rank, Schedule, steps_per_block
from dllm_rl.samplers.sampler import Sampler
from dllm_rl.samplers.whole_step import CompiledSteps
from dllm_rl.types.rollouts import Prompts, Rollout, SamplingParams


class Unmask(Sampler):
    """Complete prompts by iterative unmasking.

    Use it for masked-diffusion policies; use `Autoregress` for causal policies, and `Renoise` for models whose noise is
    random tokens. Apart from rounding, a row depends only on its prompt, its seed and the weights, not on the other
    rows of its batch.

    Infilling (full attention only): a row's completion consists of the positions inside its prompt that are to be
    filled in, and of the appended positions. Blocks count only these positions. Rows may differ in the positions to
    fill in.

    Finished rows leave the batch, and rows of similar length run together (`models.base.length_buckets`);
    with compile_step all rows run in every step. With commit=Schedule() (the default) the host waits for the device at
    most once per forward. With other rules it also waits for the number of chosen positions.

    Args:
        max_new_tokens: Number of masked positions appended to each prompt. 0 is allowed only for prompts with positions
            to fill in.
        diffusion_steps: Number of steps per completion, divided equally between blocks, at least one each. Of adaptive
            commit rules it limits the edits alone. None: one step per position.
        block_size: Number of positions of a block; a step writes positions of one block. None: all positions, or the
            block size of a block-causal policy. The last block may be shorter, and so may the first one of a
            block-causal policy, whose blocks are counted from the prompt's start.
        temperature: Temperature of the token draw. 0 takes the likeliest token.
        top_k: Sample only from the k likeliest tokens. None: all.
        top_p: Sample only from the smallest set of likeliest tokens with this probability. None: all.
        suppress: Tokens that are never sampled, as ids or as texts of the vocabulary, such as "<eos>" if a completion
            must have a fixed length. The mask token is always excluded.
        rank: Function that scores positions; the highest scores come first. `samplers.rules` explains its inputs.
        commit: Rule that chooses the positions that a step writes, see `samplers.rules`. The rules of `samplers.revise`
            also rewrite tokens, and record each rewrite.
        cache: BlockCache(), PrefixCache() or DualCache(). None recomputes every position in every step.
        approximate_early_exit: End a row after the block with its end token (full attention only). The completion lacks
            the tokens after this block, so its probability is not that of a full completion. The log-prob of each
            written token is still that of its draw. Block-causal rows always end after this block.
        compile_step: Run each step as one compiled graph, or as two with a cache. It makes batches of few rows faster,
            on a GPU as CUDA graphs. It cannot be combined with PrefixCache(), positions to fill in, or rules that
            rewrite. It rounds differently: if two tokens are nearly tied, the choice may differ from the one made
            without compile_step.

    Source: LLaDA, arXiv 2502.09992, algorithm 5 [paper].
    """

    diffusion_steps: int | None = option(default=None, at_least=1)
    block_size: int | None = option(default=None, at_least=1)
    temperature: float = option(default=0.0, at_least=0)
    top_k: int | None = option(default=None, at_least=1)
    top_p: float | None = option(default=None, above=0, at_most=1)
    suppress: tuple[str | int, ...] = ()
    rank: Rank = MaxProb()
    commit: Commit = Schedule()
    cache: Cache | None = None
    approximate_early_exit: bool = False
    compile_step: bool = False

    def check(self) -> None:
        SamplingParams(self.temperature, self.top_k, self.top_p)  # checks them

    @torch.no_grad()
    def __call__(
        self,
        policy: Policy,
        prompts: Prompts,
        generator: Generator,
        *,
        on_step: Callable[[Rollout], bool | None] | None = None,
    ) -> Rollout:
        """Complete the prompts.

        Args:
            policy: Masked-diffusion policy, with full or block-causal attention.
            prompts: Left-padded prompts, one row for each completion. The positions of `prompts.infill_mask` are filled
                in too.
            generator: Generator that draws one seed per row. It is not used if `prompts.seeds` is set.
            on_step: Function that is called with the current rollout after every step. If it returns True, sampling
                ends there: positions that are still masked are not in `completion_mask`. None: no call.

        Returns:
            Rollout with the rows of the prompts: tokens, the step that wrote each token, and log-probs at commit in
            nats.

        Raises:
            ValueError: The policy is causal or has no mask token, a completion does not fit, the rank, commit rule,
                blocks and cache cannot be combined, or the rank or the commit rule contradicts what it declares.
        """
        spec = policy.spec
        block_size = _checked_block_size(policy, prompts, self.max_new_tokens, self.block_size, self.cache)
        assert spec.mask_id is not None, "a diffusion model has a mask token"
        suppress = check_fits(policy, prompts, self.max_new_tokens, (*self.suppress, spec.mask_id))
        sampling_params = SamplingParams(self.temperature, self.top_k, self.top_p, suppress)
        if prompts.infill_mask is None or not prompts.infill_mask.any(-1).all():  # a row has no blanks
            check_number_of_steps(self)
        if prompts.infill_mask is not None:
            _check_infilling(policy, prompts, self.max_new_tokens, self.cache, self.approximate_early_exit)
        if prompts.seeds is None:
            prompts = replace(prompts, seeds=row_seeds(generator, len(prompts.tokens)))
        block_aligned = self.cache is not None and self.cache.kind == "block"
        canvas = make_canvas(policy, prompts, self.max_new_tokens, block_size, block_aligned=block_aligned)
        step_sampler = StepSampler(policy, canvas, sampling_params, self.rank, self.commit)
        # With a cache, no row begins its next block before all rows have finished this one.
        tracker = BlockTracker(canvas, self.diffusion_steps, wait_for_all_rows=self.cache is not None)
        run_step: Callable[[StepRows], tuple[Tensor, Tensor | None]]
        if self.compile_step:
            run_step = CompiledSteps(step_sampler, self.cache, tracker, block_size).run
        else:
            run_step = RaggedSteps(step_sampler, self.cache, tracker).run
        rows_end_early = spec.attention == "block_causal" or self.approximate_early_exit
        while (step := tracker.next_rows()) is not None:
            net_unmasked, stays_open = run_step(step)  # ranks the positions, picks some, draws and writes their tokens
            chose_none = net_unmasked == 0
            if chose_none.any() and (chose_none & (step.steps_left == 1) & (step.num_masked > 0)).any():
                raise ValueError(
                    f"commit={self.commit.name} chose nothing in the last step of a block, where it must choose a "
                    "position: does it need the scores of another rank?"
                )
            complete_rows = tracker.record(step, net_unmasked, stays_open)
            if rows_end_early and len(complete_rows):
                tracker.finish_rows(canvas.mark_finished(complete_rows, spec.eos_ids))
            if on_step is not None and on_step(step_sampler.rollout()):
                break
        written = canvas.written
        has_nan_scores = written.has_nan_scores & written.logprobs.isfinite().all()
        is_nan, contradicts = torch.stack([has_nan_scores, written.contradicts]).tolist()  # the host waits once
        if is_nan:
            raise ValueError(
                f"rank={self.rank.name} returned NaN, which has no place in an order; return numbers: the logits of "
                "suppressed tokens are -inf, and 0 * -inf is NaN"
            )
        if contradicts:
            raise ValueError(self.commit.contradiction())
        return step_sampler.rollout()


def check_number_of_steps(sampler: Sampler, spec: FamilySpec | None = None, prompt_length: int = 0) -> None:
    """Raise ValueError if a sampler has more steps than tokens although each writes one, or fewer than blocks.

    Not for prompts with blanks, whose number differs by row: a row with fewer blanks than steps ends early.

    Args:
        sampler: Sampler. Those that do not unmask as `Unmask` does have no such steps.
        spec: Spec of the policy, by which blocks are counted. None: they are not counted.
        prompt_length: Tokens of the prompt. In a block-causal model they may begin the completion's first block.
    """
    if not isinstance(sampler, Unmask) or type(sampler).__call__ is not Unmask.__call__:
        return
    if sampler.diffusion_steps is None:
        return
    length, steps, count = sampler.max_new_tokens, sampler.diffusion_steps, sampler.commit.count
    if count is not None and 0 < length < steps and count(torch.tensor([length]), torch.tensor([steps])) > 0:
        raise ValueError(
            f"diffusion_steps={steps} is more than the {length} tokens of a completion, and a step writes at least "
            f"one; use at most {length}"
        )
    if spec is not None and length and (size := sampler.block_size or spec.block_size):
        num_begun = prompt_length % size if spec.attention == "block_causal" else 0
        steps_per_block(steps, [size] * -(-(num_begun + length) // size))


class RaggedSteps:
    """The steps of a canvas that are not compiled: rows of similar length run together, in a forward of their own."""

    def __init__(self, step_sampler: StepSampler, cache: Cache | None, tracker: BlockTracker) -> None:
        self.step_sampler = step_sampler
        canvas, policy = step_sampler.canvas, step_sampler.policy
        # Every step calls the model. Without a cache every step also computes the padding. With a cache only a block's
        # first step does, so that the cost of the calls counts more.
        num_forwards = 1 if cache is None else int(tracker.steps_left.max())
        width = canvas.written.tokens.shape[1]
        self.buckets = length_buckets(canvas.starts, width, policy.device, forwards=num_forwards)
        self.bucket_of_row = torch.zeros_like(canvas.starts)
        self.caches = []
        for number, bucket in enumerate(self.buckets):
            self.bucket_of_row[bucket.rows] = number
            attention_mask = canvas.attention_mask[:, bucket.start :]
            self.caches.append(None if cache is None else CachedForward(policy, cache, attention_mask))

    def run(self, step: StepRows) -> tuple[Int[Tensor, " R"], Bool[Tensor, " R"] | None]:
        """Run a step of these rows. Return `Decision.net_unmasked` and `stays_open`."""
        canvas = self.step_sampler.canvas
        at = positions_of(canvas, step)
        if len(self.buckets) == 1:
            hidden = self._forward(0, step, step.rows, at.row_index, at.column)
        else:
            hidden = self._forward_buckets(step, at)
        canvas.forwards += 1
        decision = self.step_sampler(at, hidden, canvas.written, step)
        return decision.net_unmasked, decision.stays_open

    def _forward_buckets(self, step: StepRows, at: StepPositions) -> Float[Tensor, "K D"]:
        """Run each bucket separately, and return the states in the order of the step's positions."""
        row_buckets = self.bucket_of_row[step.rows]  # on the host
        numbers = row_buckets.unique().tolist()
        bucket_rows = [(row_buckets == number).nonzero()[:, 0] for number in numbers]
        row_in_bucket = torch.empty_like(step.rows)
        for rows in bucket_rows:
            row_in_bucket[rows] = torch.arange(len(rows))
        position_buckets = row_buckets.repeat_interleave(step.num_positions)
        bucket_positions = [(position_buckets == number).nonzero()[:, 0] for number in numbers]
        row_in_bucket, *bucket_positions = copy_to_device(at.row_index.device, row_in_bucket, *bucket_positions)
        joined: Tensor | None = None
        for number, rows, positions in zip(numbers, bucket_rows, bucket_positions, strict=True):
            row, column = row_in_bucket[at.row_index[positions]], at.column[positions]
            hidden = self._forward(number, step, step.rows[rows], row, column)
            if joined is None:
                joined = hidden.new_empty(len(at.row_index), hidden.shape[1])
            joined[positions] = hidden
        assert joined is not None, "a step has rows"
        return joined

    def _forward(
        self, number: int, step: StepRows, rows: Int[Tensor, " r"], row: Int[Tensor, " K"], column: Int[Tensor, " K"]
    ) -> Float[Tensor, "K D"]:
        """Run the rows of bucket `number`, and return the states. `row` has each position's index in `rows`."""
        policy, canvas = self.step_sampler.policy, self.step_sampler.canvas
        run, copies = rows, None
        if canvas.forwards == 0:  # all completions of a prompt are still the same: one row is run for each group
            run, copies = canvas.prompts.shared_rows(rows)
            if len(run) == len(rows):
                copies = None
        cached, first_column = self.caches[number], self.buckets[number].start
        tokens = canvas.written.tokens[:, first_column:]
        if cached is None:
            (index,) = copy_to_device(tokens.device, run)
            hidden = policy.hidden(tokens[index], canvas.attention_mask[index, first_column:])
        else:  # all rows are in the same block
            begin, end = (bound - first_column for bound in canvas.bounds[int(step.blocks[0])])
            hidden, first_state = cached.advance(tokens, rows, (begin, end), run=run, copies=copies)
            first_column += first_state
        if copies is not None:
            row = copies.to(row.device)[row]
        return hidden[row, (column - first_column).clamp(min=0)]


def _checked_block_size(
    policy: Policy, prompts: Prompts, length: int, block_size: int | None, cache: Cache | None
) -> int:
    """Return the block size in effect. Raise ValueError as documented in `Unmask`."""
    attention = policy.spec.attention
    if attention == "causal":
        raise ValueError(f"policy {policy.spec.name!r} is causal; Unmask needs a diffusion model: use Autoregress")
    if attention == "encoder_decoder":
        raise ValueError(f"policy {policy.spec.name!r} has no mask token, its noise is random tokens: use Renoise")
    infilling = prompts.infill_mask is not None
    width = prompts.tokens.shape[1] + length if infilling else length
    if not infilling and not length:
        raise ValueError("max_new_tokens=0 must be at least 1, because no prompt has positions to fill in")
    size = block_size if block_size is not None else policy.spec.block_size or width
    if attention == "block_causal" and size != policy.spec.block_size:
        raise ValueError(
            f"block_size={size} is not the policy's block size, {policy.spec.block_size}; leave block_size at None"
        )
    if cache is not None:
        cache.check_attention(attention)
    return size


def _check_infilling(
    policy: Policy, prompts: Prompts, length: int, cache: Cache | None, approximate_early_exit: bool
) -> None:
    """Raise ValueError if the settings exclude infilling, or a prompt leaves nothing to fill in."""
    assert prompts.infill_mask is not None
    if policy.spec.attention != "full":
        raise ValueError(
            f"prompts have open positions, but attention is {policy.spec.attention!r} and a gap would not see the "
            "tokens after it; use a model of full attention"
        )
    if cache is not None:
        raise ValueError(
            f"cache={cache} stores the columns around a block, but open positions are not contiguous; use cache=None"
        )
    if approximate_early_exit:
        raise ValueError("approximate_early_exit would leave gaps after an end token unfilled; leave it out")
    complete_rows = (~(prompts.infill_mask & prompts.attention_mask).any(-1)).nonzero()[:, 0].tolist()
    if length == 0 and complete_rows:
        raise ValueError(f"max_new_tokens=0, and row {complete_rows[0]} has no open position: there is nothing to fill")


def check_fits(
    policy: Policy, prompts: Prompts, max_new_tokens: int, suppress: tuple[str | int, ...] = ()
) -> tuple[int, ...]:
    """Return the ids of `suppress`, whose tokens are ids or texts of the vocabulary.

    Raise ValueError if the longest completion does not fit in the model, if `suppress` has a token that the vocabulary
    lacks, or if it leaves no token to sample.
    """
    longest = int(prompts.attention_mask.sum(-1).max())
    limit = policy.spec.max_length
    if limit is not None and longest + max_new_tokens > limit:
        advice = f"use at most {limit - longest}, or" if longest < limit else "use"
        raise ValueError(
            f"max_new_tokens={max_new_tokens} after a prompt of {longest} tokens exceeds the model's {limit} "
            f"positions; {advice} shorter prompts (a recipe's max_prompt_length)"
        )
    vocabulary = policy.tokenizer.get_vocab() if str in map(type, suppress) else {}
    ids = []
    for token in suppress:
        number = vocabulary.get(token, -1) if isinstance(token, str) else int(token)
        if not 0 <= number < policy.vocab_size:
            texts = " or their texts" if isinstance(token, str) else ""
            raise ValueError(f"suppress={token!r} is not one of the {policy.vocab_size} token ids{texts}; leave it out")
        ids.append(number)
    if len(set(ids)) == policy.vocab_size:
        raise ValueError(
            f"suppress and the mask token exclude all {policy.vocab_size} tokens; remove one from suppress"
        )
    return tuple(ids)
