"""Iterative unmasking as in LLaDA: fill blocks from left to right, a few positions of a block per step.

docs/methods.md explains the tag [paper].
"""

from collections.abc import Callable
from functools import partial

import torch
from jaxtyping import Int
from torch import Generator, Tensor

from dllm_rl.models.base import Policy
from dllm_rl.records import option
from dllm_rl.rng import row_seeds
from dllm_rl.samplers.cache import Cache
from dllm_rl.samplers.canvas import BlockTracker, make_canvas, plan_step
from dllm_rl.samplers.choose import StepSampler
from dllm_rl.samplers.infilling import check_infilling, infilling_canvas
from dllm_rl.samplers.rules import Commit, MaxProb, Rank, Schedule, check_steps
from dllm_rl.samplers.sampler import Sampler
from dllm_rl.samplers.states import SamplerForward
from dllm_rl.samplers.whole_step import CompiledStepSampler
from dllm_rl.types import Prompts, Rollout, SamplingParams


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
        diffusion_steps: Number of steps per completion, divided equally between blocks. Adaptive commit rules ignore
            it. None: one step per position.
        block_size: Number of positions of a block; a step writes positions of one block. None: all positions, or the
            block size of a block-causal policy. The last block may be shorter, and so may the first one of a
            block-causal policy, whose blocks are counted from the prompt's start.
        temperature: Temperature of the token draw. 0 takes the likeliest token.
        top_k: Sample only from the k likeliest tokens. None: all.
        top_p: Sample only from the smallest set of likeliest tokens with this probability. None: all.
        suppress: Token ids that are never sampled. The mask token is always excluded.
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
        confidence_radius: Record the change of confidence that each written token caused at masked positions within
            this distance (`Rollout.confidence_change`), for ELBO(informed_masking=...). It needs rank=Confidence() or
            MaxProb(), and cannot be combined with compile_step or rules that rewrite. None: not recorded.

    Source: LLaDA, arXiv 2502.09992, algorithm 5 [paper].
    """

    diffusion_steps: int | None = option(default=None, at_least=1)
    block_size: int | None = option(default=None, at_least=1)
    temperature: float = option(default=0.0, at_least=0)
    top_k: int | None = option(default=None, at_least=1)
    top_p: float | None = option(default=None, above=0, at_most=1)
    suppress: tuple[int, ...] = ()
    rank: Rank = MaxProb()
    commit: Commit = Schedule()
    cache: Cache | None = None
    approximate_early_exit: bool = False
    compile_step: bool = False
    confidence_radius: int | None = option(default=None, at_least=1)

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
                blocks and cache cannot be combined, or the rank returns NaN.
        """
        spec = policy.spec
        block_size = _checked_block_size(policy, prompts, self.max_new_tokens, self.block_size, self.cache)
        if prompts.infill_mask is None:
            check_steps(self.diffusion_steps, self.max_new_tokens, self.commit.count)
            block_aligned = self.cache is not None and self.cache.kind == "block"
            canvas = make_canvas(policy, prompts, self.max_new_tokens, block_size, block_aligned=block_aligned)
        else:
            check_infilling(policy, prompts, self.max_new_tokens, self.cache, self.approximate_early_exit)
            canvas = infilling_canvas(policy, prompts, self.max_new_tokens, block_size)
        sampling_params = SamplingParams(self.temperature, self.top_k, self.top_p, (*self.suppress, canvas.mask_id))
        check_suppress(policy, sampling_params)
        step_sampler = StepSampler(policy, canvas, sampling_params, self.rank, self.commit, self.confidence_radius)
        # With a cache, no row begins its next block before all rows have finished this one.
        tracker = BlockTracker(
            canvas.block, self.diffusion_steps, wait_for_all_rows=self.cache is not None, masked=canvas.masked
        )
        seeds = (row_seeds(generator, len(prompts.tokens)) if prompts.seeds is None else prompts.seeds).to(
            policy.device
        )
        forward = None if self.compile_step else SamplerForward(policy, canvas, self.cache, tracker.steps_left)
        # Runs one step. Returns the rows whose block is now complete, or None if there was no row left to run.
        run_step: Callable[[], Int[Tensor, " C"] | None]
        if forward is None:
            run_step = CompiledStepSampler(step_sampler, self.cache, tracker, seeds, block_size).run_step
        else:
            run_step = partial(_run_step, step_sampler, forward, tracker, seeds)
        rows_end_early = spec.attention == "block_causal" or self.approximate_early_exit

        def current_rollout() -> Rollout:
            fields = step_sampler.rollout_fields()
            if forward is not None:
                fields |= forward.rollout_fields()
            return canvas.rollout(sampling_params, policy.weights_version, **fields)

        while (complete_rows := run_step()) is not None:
            if rows_end_early and len(complete_rows):
                ended_rows = canvas.mark_finished(complete_rows, spec.eos_ids)
                tracker.finish_rows(ended_rows)
            if on_step is not None and on_step(current_rollout()):
                break
        step_sampler.check_scores()
        return current_rollout()


def _run_step(
    step_sampler: StepSampler, forward: SamplerForward, tracker: BlockTracker, seeds: Int[Tensor, " B"]
) -> Tensor | None:
    """Run one step. Return the rows whose block is now complete, or None if there was no row left to run."""
    canvas = step_sampler.canvas
    plan = plan_step(canvas, tracker, seeds)
    if plan is None:
        return None
    states = forward(plan)
    writes = step_sampler(plan, states)  # ranks the positions, picks some, and draws their tokens
    canvas.apply_step(plan, writes)
    return tracker.record((plan.rows, plan.blocks), writes.decision.net_unmasked, writes.decision.stays_open)


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
    check_fits(policy, prompts, length)
    return size


def check_fits(policy: Policy, prompts: Prompts, max_new_tokens: int) -> None:
    """Raise ValueError when the longest prompt and its completion exceed the model's maximum length."""
    longest = int(prompts.attention_mask.sum(-1).max())
    limit = policy.spec.max_length
    if limit is not None and longest + max_new_tokens > limit:
        advice = f"use at most {limit - longest}, or" if longest < limit else "use"
        raise ValueError(
            f"max_new_tokens={max_new_tokens} after a prompt of {longest} tokens exceeds the model's {limit} "
            f"positions; {advice} shorter prompts (a recipe's max_prompt_length)"
        )


def check_suppress(policy: Policy, sampling_params: SamplingParams) -> None:
    """Raise ValueError when a suppressed id is outside the vocabulary, or when no token remains to sample."""
    tokens = set(sampling_params.suppress)
    unknown = sorted(token for token in tokens if not 0 <= token < policy.vocab_size)
    if unknown:
        raise ValueError(f"suppress={unknown[0]} is not one of the {policy.vocab_size} token ids; leave it out")
    if len(tokens) == policy.vocab_size:
        raise ValueError(
            f"suppress and the mask token exclude all {policy.vocab_size} tokens; remove one from suppress"
        )
