"""A step of `Unmask` as one compiled graph of fixed shapes, for batches of few rows, where a GPU waits for its host.

It compiles `choose.StepSampler`, which `unmask.RaggedSteps` runs too. A compiled step runs all rows and a full block,
and with it the head at written positions; positions that it does not sample do not change. The host reads nothing
inside a step. A separate graph is compiled for each number of rows, completion length and padded width
(WIDTH_MULTIPLE).
"""

import functools
from collections.abc import Callable
from typing import no_type_check

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Int
from torch import Tensor

from dllm_rl.device import copy_to_device
from dllm_rl.models.base import Policy, in_eval_mode, position_ids
from dllm_rl.models.cache import TokenCache
from dllm_rl.models.forward.blocks import has_uncompiled
from dllm_rl.samplers.cache import Cache, attention_bias
from dllm_rl.samplers.canvas import BlockTracker, Canvas, StepPositions, StepRows, Written
from dllm_rl.samplers.choose import StepSampler
from dllm_rl.samplers.rules import Commit

WIDTH_MULTIPLE = 64  # the canvas is padded to a multiple of it, so that batches of similar width share graphs
MAX_GRAPHS = 128  # largest number of graphs in a process
Past = list[Tensor]  # of a `ColumnCache`: keys and values of each layer


class CompiledSteps:
    """The steps of a canvas, compiled: a call advances all rows by one step. With a cache, it has keys and values."""

    def __init__(self, step_sampler: StepSampler, cache: Cache | None, tracker: BlockTracker, block_size: int) -> None:
        """Pad the canvas. Raise ValueError for settings whose steps have no fixed shapes, or that a graph does not
        support.
        """
        policy, canvas = step_sampler.policy, step_sampler.canvas
        check_fixed_shapes(cache, step_sampler.commit)
        check_supported(policy, canvas, cache)
        self.step_sampler = step_sampler
        self.cache = cache
        self.first_offset = tracker.sizes.cumsum(-1) - tracker.sizes
        self.sizes = tracker.sizes
        self.num_slots = min(block_size, canvas.columns.shape[1])
        # With `spec.shift` the state one column to the left predicts the block's first token: this column runs too.
        self.shift = int(policy.spec.shift)
        width = canvas.written.tokens.shape[1]
        # With a cache all windows have the same width: the last block is padded on the right, and the window of the
        # first block may begin one column to the left of the canvas.
        right = 0 if cache is None else block_size + canvas.bounds[-1][0] - width
        left = self.shift + -(width + right + self.shift) % WIDTH_MULTIPLE
        tokens = F.pad(canvas.written.tokens, (left, right), value=policy.pad_id)
        canvas.written = canvas.written._replace(tokens=tokens)
        canvas.attention_mask = F.pad(canvas.attention_mask, (left, right), value=False)
        canvas.columns = canvas.columns + left
        self.window_starts = [start + left - self.shift for start, _ in canvas.bounds]
        self.window_width = tokens.shape[1] if cache is None else block_size + self.shift
        self.past: Past | None = None if cache is None else []
        self.block: int | None = None  # of the last step
        self.step_in_block = 0

    def run(self, step: StepRows) -> tuple[Int[Tensor, " R"], None]:
        """Run a step of these rows. Return the number of positions that each wrote; None: the rule does not rewrite."""
        canvas, commit = self.step_sampler.canvas, self.step_sampler.commit
        block = int(step.blocks[0])  # with a cache all rows are in the same block
        self.step_in_block = 0 if block != self.block else self.step_in_block + 1
        self.block = block
        refresh = None if self.cache is None else self.cache.refresh
        if self.cache is not None and (self.step_in_block == 0 or (refresh and self.step_in_block % refresh == 0)):
            self.past = []
        # The five numbers per row of `_step`. Rows that do not take part have a block size of 0.
        numbers = torch.zeros(5, len(self.sizes), dtype=torch.long)
        numbers[0] = 0 if self.cache is None else self.window_starts[block]
        at = (step.rows, step.blocks)
        numbers[1:, step.rows] = torch.stack([self.first_offset[at], self.sizes[at], step.steps_left, step.row_steps])
        (numbers,) = copy_to_device(canvas.columns.device, numbers)
        try:
            with in_eval_mode(self.step_sampler.policy.module):
                written, past, num_chosen = compiled()(
                    self.step_sampler, canvas.written, self.past, numbers, self.num_slots, self.window_width
                )
        except torch._dynamo.exc.FailOnRecompileLimitHit as error:
            raise ValueError(
                f"compile_step=True has compiled {MAX_GRAPHS} graphs: the number of rows, the prompts' width or "
                "max_new_tokens changes too often; set compile_step=False"
            ) from error
        canvas.forwards += 1
        # The outputs are copied, because the next replay of the graph overwrites them.
        canvas.written = written.copy()
        if past and not self.past:
            self.past = [x.clone() for x in past]
        # If the rule has a `count`, the host does not wait for the device to count.
        if commit.count is None:
            return num_chosen.cpu()[step.rows], None
        return commit.number_to_choose(step.num_masked, step.steps_left), None


def check_fixed_shapes(cache: Cache | None, commit: Commit) -> None:
    """Raise ValueError for a cache or a commit rule whose steps have no fixed shapes."""
    conflict = None
    if commit.revises:
        conflict = f"commit={commit.name}, which rewrites: use a rule that does not rewrite"
    elif commit.reads:
        conflict = f"commit={commit.name}, which reads {' and '.join(sorted(commit.reads))}: use Threshold"
    elif cache is not None and cache.kind == "prefix":
        conflict = "PrefixCache(), which runs all columns after a block: use DualCache()"
    if conflict:
        raise ValueError(f"compile_step=True cannot be combined with {conflict}, or set compile_step=False")


def check_supported(policy: Policy, canvas: Canvas, cache: Cache | None) -> None:
    """Raise ValueError for a policy or prompts that a graph does not support."""
    reason = None
    if canvas.infill_mask is not None:
        reason = "cannot be combined with open positions, whose number differs from batch to batch: leave it out"
    elif has_uncompiled(policy.module):
        reason = "cannot capture quantized experts, which run one by one: sample with unquantized weights"
    elif cache is not None and not fills_cache(policy, canvas):
        reason = f"with cache={cache} needs keys and values, which {type(policy.module).__name__} does not keep"
    if reason:
        raise ValueError(f"compile_step=True {reason}, or set compile_step=False")


@torch.no_grad()
def fills_cache(policy: Policy, canvas: Canvas) -> bool:
    """Return whether a forward of one column leaves its keys and values in its cache."""
    cache = policy.spec.new_cache(policy.module)
    if isinstance(cache, TokenCache):
        return False
    attention_mask = torch.ones_like(canvas.attention_mask[:1, :1])
    positions = position_ids(attention_mask)
    policy.encode(canvas.written.tokens[:1, :1], attention_mask, positions, cache=cache)
    stored = cache.tensors()
    return bool(stored) and all(x.shape[-2] == 1 for x in stored)


@functools.cache
def compiled() -> Callable[..., tuple[Written, Past | None, Tensor]]:
    """Return the compiled step. One function serves all samplers of the process."""
    run = torch.compile(_step, mode="reduce-overhead", dynamic=False, fullgraph=True)
    limit = max(MAX_GRAPHS, torch._dynamo.config.recompile_limit)
    return torch._dynamo.config.patch(recompile_limit=limit)(run)


@no_type_check  # torch.compile cannot trace the tests' type checks
def _step(
    step_sampler: StepSampler,
    written: Written,
    past: Past | None,
    numbers: Int[Tensor, "5 B"],
    num_slots: int,
    width: int,
) -> tuple[Written, Past | None, Int[Tensor, " B"]]:
    """Run the forward and `StepSampler` on a full block of all rows. Nothing that is passed changes.

    Args:
        step_sampler: Rank, commit rule, sampling parameters and canvas.
        written: Tensors of the canvas before the step.
        past: Keys and values of each layer in the columns outside the window. Empty: the step runs all columns and
            returns them. None: there is no cache, and every step runs all columns.
        numbers: Five numbers per row: the window's first column, the offset of the first position of the row's block,
            the block's size, its remaining steps, and the number of steps in which the row has taken part.
        num_slots: Number of positions of the largest block.
        width: Number of columns of the window.

    Returns:
        The tensors after the step, the keys and values, and the number of positions that each row wrote.
    """
    policy, canvas = step_sampler.policy, step_sampler.canvas
    written = written.copy()
    window_start, first_offset, sizes, steps_left, row_steps = numbers.unbind()
    slot = torch.arange(num_slots, device=numbers.device)
    # A smaller block has fewer positions than slots. Its last slots are other positions, which do not change.
    offset = (first_offset[:, None] + slot) % canvas.columns.shape[1]
    in_block = torch.zeros_like(written.masked).scatter(1, offset, slot < sizes[:, None])
    row = torch.arange(len(offset), device=numbers.device)[:, None].expand_as(offset).flatten()
    offset = offset.flatten()
    column = canvas.columns[row, offset]
    at = StepPositions(
        masked=written.masked & in_block,
        rewritable=None,
        steps_left=steps_left.clamp(min=1),
        total_steps=steps_left,  # no rule of fixed shapes reads it
        row_index=row,
        offset=offset,
        canvas_row=row,
        column=column,
        seed=canvas.seeds[row],
        row_steps=row_steps[row],
    )
    if past is None:
        hidden = policy.hidden(written.tokens, canvas.attention_mask)
    else:
        # The states are not shifted, and those of a window begin at its first column.
        column = column - int(policy.spec.shift) - (window_start[row] if past else 0)
        hidden, past = _cached_states(policy, canvas.attention_mask, written.tokens, past, window_start[0], width)
    hidden = hidden[row, column.clamp(0, hidden.shape[1] - 1)]
    decision = step_sampler(at, hidden, written)
    return written, past, decision.net_unmasked


@no_type_check
def _cached_states(
    policy: Policy,
    attention_mask: Bool[Tensor, "B T"],
    tokens: Int[Tensor, "B T"],
    past: Past,
    begin: Tensor,
    width: int,
) -> tuple[Tensor, Past]:
    """Return hidden states, and the keys and values outside the window.

    If `past` has these keys and values, only the window runs, and the hidden states are those of the window. If it is
    empty, all columns run.
    """
    inside = begin + torch.arange(width, device=tokens.device)
    outside = torch.arange(tokens.shape[1] - width, device=tokens.device)
    outside = outside + width * (outside >= begin)
    positions = position_ids(attention_mask)
    all_columns = torch.arange(tokens.shape[1], device=tokens.device)
    query_columns = inside if past else all_columns
    key_columns = torch.cat([outside, inside]) if past else all_columns
    bias = attention_bias(policy, tokens, attention_mask, positions, query_columns, key_columns)
    cache = policy.spec.new_cache(policy.module)
    if past:
        cache.set_tensors(past)
    hidden = policy.encode(tokens[:, query_columns], bias, positions[:, query_columns], cache=cache)
    if not past:
        past = [x[..., outside, :] for x in cache.tensors()]
    return hidden, past
