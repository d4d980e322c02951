"""Iterative unmasking as in LLaDA: blocks from left to right, a few positions of a block per step."""

from collections.abc import Callable
from functools import partial

import torch
from jaxtyping import Float, Int, Integer
from torch import Generator, Tensor

from dllm_rl.device import send
from dllm_rl.models.base import Policy
from dllm_rl.models.forward.buckets import length_buckets
from dllm_rl.models.forward.routing import Routing, of_tokens
from dllm_rl.rng import row_seeds
from dllm_rl.samplers.cache import Cache, CachedStates
from dllm_rl.samplers.canvas import BlockQueue, Canvas, Turn, make_canvas, next_turn
from dllm_rl.samplers.choose import Choose
from dllm_rl.samplers.rules import check_steps, confidence, rank_name, schedule
from dllm_rl.samplers.whole_step import WholeSteps
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
    compile_step: bool = False,
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
    commit          how many positions a step writes, see `rules`; those of `revise` also record events
    suppress        token ids that are never sampled; the mask token never is
    cache           see `cache`; None recomputes every position in every step
    approximate_early_exit  full attention only: a row ends with the block of its end token. Masks after the end token
                    stay in the input, never sampled; the recorded log-probs stay exact. Block-causal rows always end so
    compile_step    run each step as one compiled graph, with a cache as two; for few rows, on a GPU as CUDA graphs.
                    Refuses prefix_cache(), open positions and rules that rewrite. A near-tie may give another token
    watch           called with the current rollout after every step

    Infilling (full attention only): a row's completion is its open positions, then the appended ones; blocks count
    these alone. Rows may differ in their open positions.

    A row depends on its prompt, its seed and the weights only; batching changes at most the last bits of a sum.
    Finished rows leave the batch; rows of similar length run together (`length_buckets`); with compile_step all rows
    run in every step. With `schedule` the host
    waits for the device at most once per forward; other rules also wait for the number of chosen positions. Raises
    ValueError for a causal policy, a completion that does not fit, or rules, blocks and caches that do not go together.
    """
    spec = policy.spec
    block_size = _check(policy, prompts, max_new_tokens, block_size, cache)
    if prompts.open is None:
        check_steps(num_steps, max_new_tokens, commit)
    else:
        _check_infilling(policy, prompts, max_new_tokens, cache, approximate_early_exit)
    block_aligned = cache is not None and cache.kind == "block"
    canvas = make_canvas(policy, prompts, max_new_tokens, block_size, block_aligned=block_aligned)
    sampling_params = SamplingParams(temperature, top_k, top_p, (*suppress, canvas.mask_id))
    check_suppress(policy, sampling_params)
    canvas.rank = rank_name(rank)
    choose = Choose(policy, canvas, sampling_params, rank, commit)
    masked = None if prompts.open is None else canvas.masked
    queue = BlockQueue(canvas.block, num_steps, in_step=cache is not None, masked=masked)
    seeds = (row_seeds(generator, prompts.num_rows) if prompts.seeds is None else prompts.seeds).to(policy.device)
    take: Callable[[], Int[Tensor, " C"] | None]
    if compile_step:
        take = WholeSteps(choose, cache, queue, seeds, block_size).take
    else:
        take = partial(_take, choose, States(policy, canvas, cache, queue.steps), queue, seeds)
    rows_end_early = spec.attention == "block_causal" or approximate_early_exit

    while (complete := take()) is not None:
        if rows_end_early and len(complete):
            queue.drop(canvas.end(complete, spec.eos_ids))
        if watch is not None:
            watch(canvas.rollout(sampling_params, policy.version))
    return canvas.rollout(sampling_params, policy.version)


def _take(choose: Choose, states_of: "States", queue: BlockQueue, seeds: Int[Tensor, " B"]) -> Tensor | None:
    """One step of the open rows; returns the rows whose block is now complete, None when every block was."""
    canvas = choose.canvas
    if (turn := next_turn(canvas, queue, seeds)) is None:
        return None
    states, experts = states_of(turn)
    choice = choose(turn, states)
    decision = choice.decision
    if (again := decision.reopened) is not None:
        canvas.reopen(*turn.where(again), turn.clock[again])
    where = turn.where(choice.picked)
    canvas.write(*where, turn.clock[choice.picked], *choice.drawn)
    if choice.order is not None:
        canvas.order(*turn.where(choice.order[0]), *choice.order[1:])
    if experts is not None:
        canvas.route(*where, experts[choice.picked])
    return queue.record((turn.rows, turn.blocks), decision.committed, decision.held)


def _check(policy: Policy, prompts: Prompts, length: int, block_size: int | None, cache: Cache | None) -> int:
    """The block size in effect. Raises ValueError as documented in `unmask`."""
    attention = policy.spec.attention
    if attention == "causal":
        raise ValueError(f"policy {policy.spec.name!r} is causal; unmask needs a diffusion model: use autoregress")
    infilling = prompts.open is not None
    width = prompts.tokens.shape[1] + length if infilling else length
    least = 0 if infilling else 1  # open positions alone may be the whole completion
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
        wrong = f"attention is {policy.spec.attention!r} and a gap would not see what follows it"
        raise ValueError(f"prompts have open positions, but {wrong}; use a model of full attention")
    if cache is not None:
        raise ValueError(f"cache={cache} keeps what surrounds a block, but open positions lie apart; use cache=None")
    if approximate_early_exit:
        raise ValueError("approximate_early_exit would leave gaps behind an end token unfilled; leave it out")
    empty = (~(prompts.open & prompts.attention_mask).any(-1)).nonzero()[:, 0].tolist()
    if length == 0 and empty:
        raise ValueError(f"max_new_tokens=0, and prompt {empty[0]} has no open position: there is nothing to fill")


def check_fits(policy: Policy, prompts: Prompts, max_new_tokens: int) -> None:
    """Raise ValueError when the longest prompt and its completion exceed what the model can take."""
    longest = int(prompts.attention_mask.sum(-1).max())
    limit = policy.spec.max_length
    if limit is not None and longest + max_new_tokens > limit:
        fewer = f"use at most {limit - longest}, or" if longest < limit else "use"
        raise ValueError(
            f"max_new_tokens={max_new_tokens} after a prompt of {longest} tokens exceeds the model's {limit} "
            f"positions; {fewer} shorter prompts (a recipe's max_prompt_length)"
        )


def check_suppress(policy: Policy, sampling_params: SamplingParams) -> None:
    """Raise ValueError when a suppressed id is no token, or no token is left to sample."""
    tokens = set(sampling_params.suppress)
    odd = sorted(token for token in tokens if not 0 <= token < policy.vocab_size)
    if odd:
        raise ValueError(f"suppress={odd[0]} is no token of the vocabulary of {policy.vocab_size}; leave it out")
    if len(tokens) == policy.vocab_size:
        raise ValueError(f"suppress names all {policy.vocab_size} tokens (a mask is never drawn); leave one to sample")


class States:
    """Owns which rows of a canvas run together, and each bucket's keys and values, where there is a cache."""

    def __init__(self, policy: Policy, canvas: Canvas, cache: Cache | None, steps: Int[Tensor, "B N"]) -> None:
        self.policy = policy
        self.canvas = canvas
        forwards = 1 if cache is None else int(steps.max())  # over which a cached bucket's padding is spread
        self.buckets = length_buckets(canvas.starts, canvas.tokens.shape[1], policy.device, forwards=forwards)
        self.bucket = torch.zeros_like(canvas.starts)
        self.caches = []
        for number, bucket in enumerate(self.buckets):
            self.bucket[bucket.rows] = number
            seen = canvas.attention_mask[:, bucket.start :]
            self.caches.append(None if cache is None else CachedStates(policy, cache, seen))

    def __call__(self, turn: Turn) -> tuple[Float[Tensor, "K D"], Integer[Tensor, "K M E"] | None]:
        """The states of the turn's K positions, and the experts of each where recorded. Counts a forward."""
        # The first state of all is the same for every completion of a prompt: one forward serves the group.
        alike = self.canvas.prompts.group_size if self.canvas.forwards == 0 else 1
        self.canvas.forwards += 1
        owner = self.bucket[turn.rows]
        numbers = owner.unique().tolist()
        if len(numbers) == 1:
            found = self._run(numbers[0], turn, turn.rows, alike, turn.row, turn.column)
        else:
            found = self._join(numbers, owner, turn, alike)
        return found[0], found[1] if len(found) > 1 else None

    def _join(self, numbers: list[int], owner: Int[Tensor, " R"], turn: Turn, alike: int) -> list[Tensor]:
        """Run each bucket's rows apart; results are in the order of the turn's positions. `owner` is on the host."""
        members = {number: (owner == number).nonzero()[:, 0] for number in numbers}
        within = torch.empty_like(turn.rows)  # the place of each row in its bucket
        for rows in members.values():
            within[rows] = torch.arange(len(rows))
        owner_of_position = owner.repeat_interleave(turn.num_positions)
        positions = [(owner_of_position == number).nonzero()[:, 0] for number in numbers]
        within, *positions = send(turn.row.device, within, *positions)
        joined: list[Tensor] = []
        for (number, rows), here in zip(members.items(), positions, strict=True):
            found = self._run(number, turn, turn.rows[rows], alike, within[turn.row[here]], turn.column[here])
            if not joined:
                joined = [part.new_empty(len(turn.row), *part.shape[1:]) for part in found]
            for whole, part in zip(joined, found, strict=True):
                whole[here] = part
        return joined

    def _run(
        self, number: int, turn: Turn, rows: Int[Tensor, " R"], alike: int, row: Int[Tensor, " K"], column: Tensor
    ) -> list[Tensor]:
        """The states (K, D) and, if recorded, the experts (K, M, E); `row`: each position's among a bucket's `rows`."""
        block = int(turn.blocks[0])  # with a cache all rows are in the same block; without one nothing reads it
        if not self.policy.records_experts:
            hidden, first = self._forward(number, rows, block, alike)
            parts = [hidden]
        else:
            with Routing(self.policy.module) as routing:
                hidden, first = self._forward(number, rows, block, alike)
            experts = routing.experts(len(hidden))
            # A cache gives the states as they are; without one they lie at the tokens that they predict.
            parts = [hidden, of_tokens(self.policy, experts) if self.caches[number] is None else experts]
        return [part[row // alike, (column - first).clamp(min=0)] for part in parts]

    def _forward(self, number: int, rows: Tensor, block: int, alike: int) -> tuple[Float[Tensor, "r W D"], int]:
        """The states of all columns that run, and the canvas's column that the first state predicts."""
        canvas = self.canvas
        start = self.buckets[number].start
        cached = self.caches[number]
        if cached is None:
            (seen,) = send(self.policy.device, rows[::alike])
            return self.policy.hidden(canvas.tokens[seen, start:], canvas.attention_mask[seen, start:]), start
        begin, end = canvas.bounds[block]
        bounds = (begin - start, end - start)
        hidden, first = cached.advance(canvas.tokens[:, start:], rows, bounds, alike=alike)
        return hidden, first + start
