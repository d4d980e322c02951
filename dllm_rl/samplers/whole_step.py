"""A step of `unmask` as one compiled graph of fixed shapes, for batches of few rows, where a GPU waits for its host.

Every step runs all rows and a full block. Positions that it does not choose do not change. The host reads nothing
inside a step. Each number of rows, length of completion and 64 columns of width has a separate graph. Eager steps have
other shapes (`choose`): uncompiled, this step took 1.14 to 1.41 times their processor time on a CPU, because the head
then runs at written positions too.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple, no_type_check

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Int
from torch import Tensor

from dllm_rl.device import send
from dllm_rl.models.base import Policy, position_ids
from dllm_rl.models.forward.blocks import has_uncompiled
from dllm_rl.models.order import commit_cutoff, draw_index, draw_logprobs_of_rows, left_logprobs
from dllm_rl.models.support import KEPT_IDS
from dllm_rl.rng import uniforms
from dllm_rl.samplers.cache import Cache, KeysAndValues, attention_bias
from dllm_rl.samplers.canvas import TIES, TOKENS, BlockQueue, Canvas
from dllm_rl.samplers.choose import Choose, Drawn, add_gumbel, propose_and_rank
from dllm_rl.samplers.records import Commit
from dllm_rl.samplers.rules import check_last_step

COLUMNS = 64  # the canvas is padded to a multiple of these, because each width has separate graphs
GRAPHS = 128  # largest number in a process
Past = list[tuple[Tensor, Tensor]]  # keys and values of each layer
WRITTEN = ("masked", "unmask_step", "logprobs")  # fields of the canvas, in addition to the recorded ones


class StepConstants(NamedTuple):
    """Inputs that are the same in all steps of a batch."""

    attention_mask: Bool[Tensor, "B T"]
    columns: Int[Tensor, "B L"]  # of the completions' positions
    seeds: Int[Tensor, " B"]
    block_size: int  # of the largest block


class StepState(NamedTuple):
    """Tensors that a step replaces."""

    tokens: Int[Tensor, "B T"]
    records: dict[str, Tensor]  # the canvas's fields in WRITTEN, and the records of features
    # Keys and values of the columns outside the window. Empty: the step runs all columns and returns them. None: the
    # sampler has no cache, and every step runs all columns.
    past: Past | None


class WholeSteps:
    """The padded tokens and, with a cache, the stored keys and values. `take` advances all rows by one step."""

    def __init__(
        self, choose: Choose, cache: Cache | None, queue: BlockQueue, seeds: Int[Tensor, " B"], block_size: int
    ) -> None:
        """Raise ValueError for settings without fixed shapes, or that cannot be captured."""
        policy, canvas = choose.policy, choose.canvas
        check_fixed_shapes(cache, choose.commit, choose.change is not None)
        check_captured(policy, canvas, cache)
        self.choose = choose
        self.canvas = canvas
        self.queue = queue
        self.block_size = block_size
        self.cache = cache
        self.first_place = queue.sizes.cumsum(-1) - queue.sizes
        width = canvas.tokens.shape[1]
        # A cache's windows have one width: the last block is filled up, and the first one may begin a column earlier.
        behind = 0 if cache is None else block_size + canvas.bounds[-1][0] - width
        shift = int(policy.spec.shift)
        padding = (shift + -(width + behind + shift) % COLUMNS, behind)
        self.shown = slice(padding[0], padding[0] + width)
        self.tokens = F.pad(canvas.tokens, padding, value=policy.pad_id)
        attention_mask = F.pad(canvas.attention_mask, padding, value=False)
        largest = min(block_size, canvas.columns.shape[1])
        self.constants = StepConstants(attention_mask, canvas.columns + padding[0], seeds, largest)
        self.past: Past | None = None if cache is None else []
        self.block = -1
        self.step = 0  # in the block
        if choose.sampling_params.filters:
            size = (*canvas.masked.shape, min(KEPT_IDS + 1, policy.vocab_size))
            canvas.noted["log_mass"] = torch.zeros_like(canvas.logprobs)
            canvas.noted["ids"] = torch.full(size, -1, dtype=torch.int32, device=seeds.device)
        if choose.has_order_logprob:
            canvas.noted["order"] = torch.zeros_like(canvas.logprobs)
            if choose.noisy:
                canvas.noted["draw"] = torch.zeros_like(canvas.columns)

    def take(self) -> Int[Tensor, " C"] | None:
        """Advance the open rows. Return the rows whose block is now complete, or None when every block was.

        Raise ValueError where the commit rule leaves a block's last step empty.
        """
        rows, blocks = where = self.queue.next_rows()
        if not len(rows):
            return None
        num_masked = self.queue.masked[where]
        steps_left = self.queue.steps[where].clamp(min=1)
        begin, width, is_full = self._window(int(blocks[0]))
        host = torch.zeros(5, len(self.queue.clock), dtype=torch.long)  # rows that do not take part have a size of 0
        host[0] = begin
        host[1:, rows] = torch.stack(
            [self.first_place[where], self.queue.sizes[where], steps_left, self.queue.clock[rows]]
        )
        (numbers,) = send(self.tokens.device, host)
        records = {name: getattr(self.canvas, name) for name in WRITTEN} | self.canvas.noted
        past: Past | None = [] if is_full and self.cache is not None else self.past
        state = StepState(self.tokens, records, past)
        try:
            state, committed = compiled()(self.choose, self.constants, state, numbers, width)
        except torch._dynamo.exc.FailOnRecompileLimitHit as error:
            varied = "the number of rows, the prompts' width or max_new_tokens changes too often"
            raise ValueError(
                f"compile_step=True has compiled {GRAPHS} graphs: {varied}; set compile_step=False"
            ) from error
        self.canvas.forwards += 1
        # The next replay of a graph overwrites this replay's outputs.
        self.tokens = state.tokens.clone()
        self.canvas.tokens = self.tokens[:, self.shown]
        for name in WRITTEN:
            setattr(self.canvas, name, state.records[name].clone())
        self.canvas.noted = {name: state.records[name].clone() for name in self.canvas.noted}
        if is_full and state.past is not None:
            self.past = [(keys.clone(), values.clone()) for keys, values in state.past]
        # If the host knows the number, it does not wait for the device to count.
        count_on_host = self.choose.commit.count
        count = committed.cpu()[rows] if count_on_host is None else count_on_host(num_masked, steps_left)
        check_last_step(self.choose.commit.name, steps_left, num_masked, count)
        return self.queue.record(where, count)

    def _window(self, block: int) -> tuple[int, int, bool]:
        """Return the first column that this step runs, the number of columns, and whether the columns are all."""
        width = self.tokens.shape[1]
        if self.cache is None:
            return 0, width, True
        self.step = 0 if block != self.block else self.step + 1
        self.block = block
        shift = self.choose.policy.spec.shift  # a shifted family reads a block's first state one column to its left
        begin = self.shown.start + self.canvas.bounds[block][0] - shift
        refresh = self.cache.refresh
        return begin, self.block_size + shift, self.step == 0 or (refresh is not None and self.step % refresh == 0)


def check_fixed_shapes(cache: Cache | None, commit: Commit, records_confidence: bool = False) -> None:
    """Raise ValueError for a cache or a commit rule whose steps have no fixed shapes."""
    why = None
    if commit.revises:
        why = f"commit={commit.name}, which rewrites: take a rule that does not"
    elif commit.reads:
        why = f"commit={commit.name}, which reads {' and '.join(sorted(commit.reads))}: take threshold"
    elif cache is not None and cache.kind == "prefix":
        why = "prefix_cache(), which runs all that follows a block: take dual_cache()"
    elif records_confidence:
        why = "confidence_radius, which it does not record: leave it at None"
    if why:
        raise ValueError(f"compile_step=True does not go with {why}, or set compile_step=False")


def check_captured(policy: Policy, canvas: Canvas, cache: Cache | None) -> None:
    """Raise ValueError for a policy or prompts that a graph does not support."""
    why = None
    if policy.records_experts:
        why = "records no experts: leave out router_replay"
    elif canvas.open is not None:
        why = "does not go with open positions, whose number differs from batch to batch: leave it out"
    elif has_uncompiled(policy.module):
        why = "cannot capture quantised experts, which run one by one: sample with unquantised weights"
    elif cache is not None and not keeps_keys(policy, canvas):
        why = f"with cache={cache} needs keys and values, which {type(policy.module).__name__} does not keep"
    if why:
        raise ValueError(f"compile_step=True {why}, or set compile_step=False")


@torch.no_grad()
def keeps_keys(policy: Policy, canvas: Canvas) -> bool:
    """Return whether a forward of one column leaves its keys and values in its cache."""
    past = KeysAndValues(config=policy.module.config)
    one = torch.ones_like(canvas.attention_mask[:1, :1])
    policy.encode(canvas.tokens[:1, :1], one, position_ids(one), cache=past, use_cache=True)
    return past.get_seq_length() == 1


@functools.cache
def compiled() -> Callable[..., tuple[StepState, Tensor]]:
    """Return the compiled step. One function serves all samplers of the process."""
    run = torch.compile(_step, mode="reduce-overhead", dynamic=False, fullgraph=True)
    limit = max(GRAPHS, torch._dynamo.config.recompile_limit)
    return torch._dynamo.config.patch(recompile_limit=limit)(run)


@no_type_check  # torch.compile cannot trace the tests' type checks
def _step(
    choose: Choose, constants: StepConstants, state: StepState, numbers: Int[Tensor, "5 B"], width: int
) -> tuple[StepState, Int[Tensor, " B"]]:
    """Return the state after a step, and the number of committed positions of each row.

    Args:
        choose: Rank, commit rule and sampling parameters.
        constants: Inputs that are the same in all steps.
        state: State before the step.
        numbers: The window's first column; and each row's first place in its block, the block's size, the steps left,
            and the steps that the row has taken part in.
        width: Columns of the window.
    """
    policy = choose.policy
    tokens = state.tokens
    records = state.records
    past = state.past
    begin, first_place, sizes, steps_left, clock = numbers.unbind()
    slot = torch.arange(constants.block_size, device=tokens.device)
    # The slots after a smaller block are other places, all distinct, which do not change.
    place = (first_place[:, None] + slot) % constants.columns.shape[1]
    column = constants.columns.gather(1, place)
    masked = records["masked"].gather(1, place) & (slot < sizes[:, None])
    if past is None:
        hidden = policy.hidden(tokens, constants.attention_mask)
        at = column
    else:
        first = begin[:, None] if past else 0
        hidden, past = _cached_states(policy, constants.attention_mask, state, begin[0], width)
        at = (column - first - int(policy.spec.shift)).clamp(0, hidden.shape[1] - 1)
    hidden = hidden.gather(1, at[:, :, None].expand(-1, -1, hidden.shape[-1])).flatten(0, 1)

    drawn_at = [each.expand_as(place).flatten() for each in (constants.seeds[:, None], clock[:, None], place)]
    uniform, ties = (uniforms(*drawn_at, stream=stream) for stream in (TOKENS, TIES))
    scores, flat = propose_and_rank(policy, hidden, uniform, ties, choose.sampling_params, choose.rank)
    drawn = Drawn(*(values.unflatten(0, place.shape) for values in flat.tensors()))
    scores = scores.view_as(drawn.logprobs)
    scores = scores.masked_fill(~masked, -torch.inf)
    offered = add_gumbel(scores, ties.view_as(scores)) if choose.noisy else scores
    chosen = choose.commit(offered, masked, steps_left.clamp(min=1)) & masked

    new = {"masked": torch.zeros_like(masked), "unmask_step": clock[:, None].expand_as(place)}
    new |= {"logprobs": drawn.logprobs}
    if drawn.log_mass is not None:
        new |= {"log_mass": drawn.log_mass, "ids": drawn.support}
    if choose.has_order_logprob and choose.noisy:
        new["draw"] = draw_index(offered, masked, chosen)
        new["order"] = draw_logprobs_of_rows(scores, new["draw"], masked, chosen)
    records = records | {name: _put(records[name], place, values, chosen) for name, values in new.items()}
    if choose.has_order_logprob and not choose.noisy:
        stayed = masked & ~chosen
        row = torch.arange(len(scores), device=scores.device)[:, None].expand_as(scores).flatten()
        at = slot.expand_as(scores).flatten()
        cutoff = commit_cutoff(scores.masked_fill(~chosen, torch.inf).flatten(), row, at, row, at, len(scores))
        # Generated code would sum the normalizer in another order and miss ties: the scores' normalizer is used.
        left_behind = left_logprobs(policy, hidden, *cutoff, choose.sampling_params, flat.normalizer)
        total = records["order"].gather(1, place) + left_behind.view_as(scores)
        records["order"] = _put(records["order"], place, total, stayed)
    return StepState(_put(tokens, column, drawn.tokens, chosen), records, past), chosen.sum(-1)


@no_type_check
def _put(whole: Tensor, place: Tensor, values: Tensor, chosen: Tensor) -> Tensor:
    """Return `whole` (B, L, ...) with the chosen of the values (B, S, ...) at their places (B, S)."""
    wide = (..., *[None] * (whole.dim() - 2))
    place = place[wide].expand(*place.shape, *whole.shape[2:])
    return whole.scatter(1, place, torch.where(chosen[wide], values.to(whole.dtype), whole.gather(1, place)))


@no_type_check
def _cached_states(
    policy: Policy, attention_mask: Bool[Tensor, "B T"], state: StepState, begin: Tensor, width: int
) -> tuple[Tensor, Past]:
    """Return the hidden states of the window, and `state.past`. If `state.past` is empty, return the hidden states of
    all columns, and the keys and values outside the window.
    """
    tokens = state.tokens
    past = state.past
    inside = begin + torch.arange(width, device=tokens.device)
    outside = torch.arange(tokens.shape[1] - width, device=tokens.device)
    outside = outside + width * (outside >= begin)
    positions = position_ids(attention_mask)
    every = torch.arange(tokens.shape[1], device=tokens.device)
    fresh, seen = (inside, torch.cat([outside, inside])) if past else (every, every)
    bias = attention_bias(policy, tokens, attention_mask, positions, fresh, seen)
    keys_and_values = KeysAndValues(config=policy.module.config)
    for layer, (keys, values) in zip(keys_and_values.layers, past, strict=False):
        layer.lazy_initialization(keys, values)
        layer.keys, layer.values = keys, values
    options = {"cache": keys_and_values, "use_cache": True}
    hidden = policy.encode(tokens[:, fresh], bias, positions[:, fresh], **options)
    if not past:
        past = [(layer.keys[:, :, outside], layer.values[:, :, outside]) for layer in keys_and_values.layers]
    return hidden, past
