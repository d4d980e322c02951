"""Iterative unmasking as in LLaDA: blocks from left to right, a few positions of a block per step."""

from collections.abc import Callable

import torch
from jaxtyping import Bool, Int
from torch import Generator, Tensor

from dllm_rl.device import send
from dllm_rl.models.base import Policy
from dllm_rl.rng import row_seeds, uniforms
from dllm_rl.samplers.cache import Cache
from dllm_rl.samplers.canvas import BlockQueue, make_canvas
from dllm_rl.samplers.propose import order_logprobs, propose, propose_and_rank, rank_only
from dllm_rl.samplers.rules import (
    commit_inputs,
    confidence,
    name_of,
    order_has_law,
    rank_inputs,
    rank_name,
    schedule,
    share,
)
from dllm_rl.samplers.states import States
from dllm_rl.types import Prompts, Rollout, SamplingParams


@torch.no_grad()
def unmask(
    policy: Policy,
    prompts: Prompts,
    generator: Generator,
    *,
    max_new_tokens: int,
    num_steps: int | None = None,
    block_size: int | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    suppress: tuple[int, ...] = (),
    rank: Callable = confidence,
    commit: Callable = schedule,
    cache: Cache | None = None,
    approximate_early_exit: bool = False,
    watch: Callable[[Rollout], None] | None = None,
) -> Rollout:
    """Complete every prompt `group_size` times by iterative unmasking (LLaDA, arXiv 2502.09992, algorithm 5 [paper]).

    max_new_tokens  masked positions appended to each prompt; may be 0 where every prompt has open positions
    num_steps       steps of the whole completion, split equally over blocks; None: one per position. Adaptive commit
                    rules ignore num_steps
    block_size      positions open at once; None: all, or a block-causal policy's own. The last block may be shorter,
                    and so may a block-causal policy's first: its blocks count from the prompt's start
    temperature     of the categorical distribution; 0 takes the likeliest token
    top_k           only the k likeliest tokens are sampled; None: all
    top_p           only the smallest set of likeliest tokens with this probability is sampled; None: all
    rank            which positions come first, on untempered fp32 log-probabilities, see `rules`
    commit          how many positions a step writes, see `rules`. `remask`, `edit`: no likelihood (`Rollout.revised`)
    suppress        token ids that are never sampled; the mask token never is
    cache           see `cache`; None recomputes every position in every step
    approximate_early_exit  full attention only: a row ends with the block of its end token. Masks after the end token
                    stay in the input, never sampled; the recorded log-probs stay exact. Block-causal rows always end so
    watch           called with the current rollout after every step

    Infilling (full attention only): a row's completion is its open positions, then the appended ones; blocks count
    these alone. Rows may differ in their open positions.

    A row depends on its prompt, its seed and the weights only; batching changes at most the last bits of a sum.
    Finished rows leave the batch; rows of similar length run together (`length_buckets`). With `schedule` the host
    waits for the device at most once per forward; other rules also wait for the number of chosen positions. Raises
    ValueError for a causal policy, a completion that does not fit, or rules, blocks and caches that do not go together.
    """
    spec, group, device = policy.spec, prompts.group_size, policy.device
    needs, block_size = rank_inputs(rank), _check(policy, prompts, max_new_tokens, block_size, cache)
    revising = commit_inputs(commit)
    if prompts.open is not None:
        _check_infilling(policy, prompts, max_new_tokens, cache, approximate_early_exit)
    assert spec.mask_id is not None, "a diffusion model has a mask token"
    sampling_params = SamplingParams(temperature, top_k, top_p, (*suppress, spec.mask_id))
    # A rank of the state alone leaves the drawing of tokens to when it is known where; the likeliest come for free.
    draws_first = "tokens" in needs or (temperature == 0 and "logits" in needs) or "changed" in revising
    lawful = order_has_law(rank, commit) and temperature > 0  # else the order does not depend on what is drawn
    ends = spec.attention == "block_causal" or approximate_early_exit

    canvas = make_canvas(
        policy, prompts, max_new_tokens, block_size, block_aligned=cache is not None and cache.kind == "block"
    )
    queue = BlockQueue(
        canvas.block, num_steps, in_step=cache is not None, masked=None if prompts.open is None else canvas.masked
    )
    canvas.rank = rank_name(rank)
    canvas.revised = bool(revising)
    check_suppress(policy, sampling_params)
    states_of = States(policy, canvas, cache, queue.steps)
    seeds = (row_seeds(generator, prompts.num_rows) if prompts.seeds is None else prompts.seeds).to(device)

    while len((turn := queue.turn())[0]):
        (rows, blocks), (num_masked, steps_left) = turn, queue.left(*turn)
        # All that a step needs of the host's bookkeeping, in one copy that nothing waits for.
        host = (rows, blocks, steps_left, queue.clock[rows], queue.shares[turn])
        on_device, open_block, left, clock, steps = send(device, *host)
        columns, seed = canvas.columns[on_device], seeds[on_device]
        inside = canvas.block[on_device] == open_block[:, None]
        masked, num_places = canvas.masked[on_device] & inside, num_masked
        if revising:
            written, num_places = inside & (canvas.unmask_step[on_device] >= 0), queue.sizes[turn]
        r, c = _places(masked | written if revising else masked, int(num_places.sum()))
        # The first state of all is the same for every completion of a prompt: one forward serves the group.
        alike = group if canvas.forwards == 0 else 1
        states, experts = states_of(rows, int(blocks[0]), num_places, r, columns[r, c], alike=alike)
        canvas.forwards += 1
        ties = uniforms(seed[r], clock[r], c, stream=1)
        scores = torch.full(masked.shape, -torch.inf, device=device)
        if draws_first:
            draws = uniforms(seed[r], clock[r], c, stream=0)
            scores[r, c], *drawn = propose_and_rank(policy, states, draws, ties, sampling_params, rank)
        else:
            scores[r, c] = rank_only(policy, states, ties, sampling_params, rank)

        if revising:
            another = torch.zeros_like(masked)
            if draws_first:
                another[r, c] = drawn[0] != canvas.tokens[on_device[r], columns[r, c]]
            offered = {"written": written, "changed": written & another, "steps": steps}
            flipped = commit(scores, masked, left, **{name: offered[name] for name in revising})
            again = flipped & written & ("written" in revising)
            chosen = flipped & (masked | offered["changed"]) & ~again
            committed, num_chosen, reopened = torch.stack([chosen & masked, chosen, again]).sum(-1).cpu()
        else:
            chosen = commit(scores, masked, left) & masked
            committed = num_chosen = share(num_masked, steps_left) if commit is schedule else chosen.sum(-1).cpu()
            reopened = torch.zeros_like(committed)
        _check_last(commit, steps_left, masked=num_masked, committed=committed, reopened=reopened)
        if revising:
            where, place = _places(again, int(reopened.sum()))
            canvas.reopen(on_device[where], place, spec.mask_id)
        picked = _places(chosen[r, c][None], int(num_chosen.sum()))[1]
        if lawful:
            stayed = _places(~chosen[r, c][None], len(r) - int(committed.sum()))[1]
            order = order_logprobs(
                policy, states, sampling_params, scores=scores[r, c], rows=r, places=c, committed=picked, left=stayed
            )
            canvas.leave(on_device[r[stayed]], c[stayed], order)
        r, c, states = r[picked], c[picked], states[picked]
        if draws_first:
            drawn = [x[picked] for x in drawn]
        else:
            drawn = list(propose(policy, states, uniforms(seed[r], clock[r], c, stream=0), sampling_params))
        canvas.write(on_device[r], c, clock[r], *drawn)
        if experts is not None:
            canvas.route(on_device[r], c, experts[picked])

        held = ((num_chosen > 0) | ("written" in revising)) if revising else None
        complete = queue.record(rows, blocks, committed - reopened, held)
        if ends and len(complete):
            queue.drop(canvas.end(complete, spec.eos_ids))
        if watch is not None:
            watch(canvas.rollout(sampling_params, policy.version))
    return canvas.rollout(sampling_params, policy.version)


def _places(mask: Bool[Tensor, "R L"], count: int) -> tuple[Int[Tensor, " K"], Int[Tensor, " K"]]:
    """Rows and columns where `mask` holds, row by row; `count` is known: the host does not wait for the device."""
    flat = mask.flatten().nonzero_static(size=count)[:, 0]
    return flat // mask.shape[1], flat % mask.shape[1]


def _check_last(commit: Callable, steps_left: Tensor, *, masked: Tensor, committed: Tensor, reopened: Tensor) -> None:
    """Raise ValueError where a block's last step commits nothing or masks again; all are (R,), on the host."""
    last, name = steps_left == 1, name_of(commit)
    if (last & (masked > 0) & (committed == 0)).any():
        raise ValueError(
            f"commit={name} chose nothing in the last step of a block; it must choose a position by then: are the "
            "rank's scores those that it wants?"
        )
    if (last & (reopened > 0)).any():
        raise ValueError(f"commit={name} masked positions again in the last step of a block; it must not by then")


def _check(policy: Policy, prompts: Prompts, length: int, block_size: int | None, cache: Cache | None) -> int:
    """The block size in effect. Raises ValueError as documented in `unmask`."""
    attention = policy.spec.attention
    if attention == "causal":
        raise ValueError(
            f"policy is causal ({type(policy.module).__name__}); unmask needs a diffusion model: use autoregress"
        )
    width, least = (length, 1) if prompts.open is None else (prompts.open.shape[1] + length, 0)
    size = block_size if block_size is not None else policy.spec.block_size or width
    if length < least or size < 1:
        raise ValueError(f"max_new_tokens={length} and block_size={size} must both be at least 1")
    if attention == "block_causal" and size != policy.spec.block_size:
        raise ValueError(
            f"block_size={size} is not the policy's: its blocks are of {policy.spec.block_size}; "
            "leave block_size at None"
        )
    if cache is not None:
        cache.check(attention)
    check_fits(policy, prompts, length)
    return size


def _check_infilling(
    policy: Policy, prompts: Prompts, length: int, cache: Cache | None, approximate_early_exit: bool
) -> None:
    """Raise ValueError where prompts with open positions cannot be filled in, or a row has nothing to fill."""
    assert prompts.open is not None
    if policy.spec.attention != "full":
        raise ValueError(
            f"prompts have open positions, but the policy's attention is {policy.spec.attention!r} and a gap would not "
            "see what follows it; use a model of full attention"
        )
    if cache is not None:
        raise ValueError(f"cache={cache} keeps what surrounds a block, but open positions lie apart; use cache=None")
    if approximate_early_exit:
        raise ValueError("approximate_early_exit would leave gaps behind an end token unfilled; leave it out")
    empty = (~(prompts.open & prompts.attention_mask).any(-1)).nonzero()[:, 0].tolist()
    if length == 0 and empty:
        raise ValueError(f"max_new_tokens=0, and prompt {empty[0]} has no open position: there is nothing to fill")


def check_fits(policy: Policy, prompts: Prompts, max_new_tokens: int) -> None:
    """Raise ValueError when the longest prompt and its completion exceed what the model can take."""
    longest, limit = int(prompts.attention_mask.sum(-1).max()), policy.spec.max_length
    if limit is not None and longest + max_new_tokens > limit:
        raise ValueError(
            f"max_new_tokens={max_new_tokens} after a prompt of {longest} tokens exceeds the model's {limit} "
            f"positions; use at most {limit - longest}, or shorter prompts (a recipe's max_prompt_length)"
        )


def check_suppress(policy: Policy, sampling_params: SamplingParams) -> None:
    """Raise ValueError when a suppressed id is no token, or no token is left to sample."""
    tokens = set(sampling_params.suppress)
    odd = sorted(token for token in tokens if not 0 <= token < policy.vocab_size)
    if odd:
        raise ValueError(f"suppress={odd[0]} is no token of the vocabulary of {policy.vocab_size}; leave it out")
    if len(tokens) == policy.vocab_size:
        raise ValueError(
            f"suppress names all {policy.vocab_size} tokens (a mask token is never sampled); leave one to sample"
        )
