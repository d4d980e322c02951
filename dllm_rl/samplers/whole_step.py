"""A step of `Unmask` as one compiled graph of fixed shapes, for batches of few rows, where a GPU waits for its host.

Every step runs all rows and a full block; positions that it does not sample do not change. The host reads nothing
inside a step. A separate graph is compiled for each number of rows, completion length and padded width
(WIDTH_MULTIPLE). Without compilation `Unmask` uses the step in `choose`. The step in this module, uncompiled on a CPU,
took 1.14 to 1.41 times as much processor time, because it also runs the head at written positions.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple, no_type_check

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Int
from torch import Tensor

from dllm_rl.decoding.order import commit_cutoff, draw_index, plackett_luce_logprobs_fixed_shape, stay_masked_logprobs
from dllm_rl.decoding.support import MAX_SUPPORT_IDS
from dllm_rl.device import copy_to_device
from dllm_rl.models.base import Policy, position_ids
from dllm_rl.models.forward.blocks import has_uncompiled
from dllm_rl.rng import uniforms
from dllm_rl.samplers.cache import Cache, attention_bias, empty_cache
from dllm_rl.samplers.canvas import RANK_STREAM, TOKEN_STREAM, BlockTracker, Canvas
from dllm_rl.samplers.choose import Drawn, StepSampler, add_gumbel, draw_and_rank
from dllm_rl.samplers.rules import Commit, check_last_step

WIDTH_MULTIPLE = 64  # the canvas is padded to a multiple of it, so that batches of similar width share graphs
MAX_GRAPHS = 128  # largest number of graphs in a process
Past = list[tuple[Tensor, Tensor]]  # keys and values of each layer
CANVAS_FIELDS = ("masked", "unmask_step", "logprobs")  # fields of the canvas that a step replaces


class StepConstants(NamedTuple):
    """Inputs that are the same in all steps of a batch."""

    attention_mask: Bool[Tensor, "B T"]
    columns: Int[Tensor, "B L"]  # column of each position of the completions
    seeds: Int[Tensor, " B"]
    block_size: int  # size of the largest block


class StepState(NamedTuple):
    """Tensors that a step replaces."""

    tokens: Int[Tensor, "B T"]
    records: dict[str, Tensor]  # the CANVAS_FIELDS, and the records of features
    # Keys and values of the columns outside the window. Empty: the step runs all columns and returns them. None: the
    # sampler has no cache, and every step runs all columns.
    past: Past | None


class CompiledStepSampler:
    """Sampler of compiled steps: `run_step` advances all rows by one step.

    It stores the padded tokens and, with a cache, the keys and values.
    """

    def __init__(
        self,
        step_sampler: StepSampler,
        cache: Cache | None,
        tracker: BlockTracker,
        seeds: Int[Tensor, " B"],
        block_size: int,
    ) -> None:
        """Raise ValueError for settings whose steps have no fixed shapes, or that a graph does not support."""
        policy, canvas = step_sampler.policy, step_sampler.canvas
        check_fixed_shapes(cache, step_sampler.commit, step_sampler.confidence_change is not None)
        check_supported(policy, canvas, cache)
        self.step_sampler = step_sampler
        self.canvas = canvas
        self.tracker = tracker
        self.block_size = block_size
        self.cache = cache
        self.first_offset = tracker.sizes.cumsum(-1) - tracker.sizes
        width = canvas.tokens.shape[1]
        # With a cache all windows have the same width: the last block is padded on the right, and the window of the
        # first block may begin one column to the left of the canvas.
        padding_right = 0 if cache is None else block_size + canvas.bounds[-1][0] - width
        shift = int(policy.spec.shift)
        padding = (shift + -(width + padding_right + shift) % WIDTH_MULTIPLE, padding_right)
        self.canvas_columns = slice(padding[0], padding[0] + width)
        self.tokens = F.pad(canvas.tokens, padding, value=policy.pad_id)
        attention_mask = F.pad(canvas.attention_mask, padding, value=False)
        largest_block = min(block_size, canvas.columns.shape[1])
        self.constants = StepConstants(attention_mask, canvas.columns + padding[0], seeds, largest_block)
        self.past: Past | None = None if cache is None else []
        self.block = -1
        self.step = 0  # step in the current block
        if step_sampler.sampling_params.filters:
            size = (*canvas.masked.shape, min(MAX_SUPPORT_IDS + 1, policy.vocab_size))
            canvas.records["log_mass"] = torch.zeros_like(canvas.logprobs)
            canvas.records["ids"] = torch.full(size, -1, dtype=torch.int32, device=seeds.device)
        if step_sampler.has_order_logprob:
            canvas.records["order"] = torch.zeros_like(canvas.logprobs)
            if step_sampler.adds_gumbel:
                canvas.records["draw"] = torch.zeros_like(canvas.columns)

    def run_step(self) -> Int[Tensor, " C"] | None:
        """Run one step. Return the rows whose block is now complete, or None if there was no row left to run.

        Raise ValueError if the commit rule writes nothing in the last step of a block.
        """
        rows, blocks = self.tracker.next_rows()
        if not len(rows):
            return None
        num_masked = self.tracker.num_masked[rows, blocks]
        steps_left = self.tracker.steps_left[rows, blocks].clamp(min=1)
        begin, width, runs_all_columns = self._window(int(blocks[0]))
        # The five numbers per row of `_step`. Rows that do not take part have a block size of 0.
        host_numbers = torch.zeros(5, len(self.tracker.row_steps), dtype=torch.long)
        host_numbers[0] = begin
        host_numbers[1:, rows] = torch.stack(
            [
                self.first_offset[rows, blocks],
                self.tracker.sizes[rows, blocks],
                steps_left,
                self.tracker.row_steps[rows],
            ]
        )
        (numbers,) = copy_to_device(self.tokens.device, host_numbers)
        records = {name: getattr(self.canvas, name) for name in CANVAS_FIELDS} | self.canvas.records
        past: Past | None = [] if runs_all_columns and self.cache is not None else self.past
        state = StepState(self.tokens, records, past)
        try:
            state, committed, has_nan_scores = compiled()(self.step_sampler, self.constants, state, numbers, width)
        except torch._dynamo.exc.FailOnRecompileLimitHit as error:
            raise ValueError(
                f"compile_step=True has compiled {MAX_GRAPHS} graphs: the number of rows, the prompts' width or "
                "max_new_tokens changes too often; set compile_step=False"
            ) from error
        self.canvas.forwards += 1
        self.step_sampler.has_nan_scores |= has_nan_scores
        # The outputs are copied, because the next replay of the graph overwrites them.
        self.tokens = state.tokens.clone()
        self.canvas.tokens = self.tokens[:, self.canvas_columns]
        for name in CANVAS_FIELDS:
            setattr(self.canvas, name, state.records[name].clone())
        self.canvas.records = {name: state.records[name].clone() for name in self.canvas.records}
        if runs_all_columns and state.past is not None:
            self.past = [(keys.clone(), values.clone()) for keys, values in state.past]
        # If the rule has a `count`, the host does not wait for the device to count.
        count_on_host = self.step_sampler.commit.count
        count = committed.cpu()[rows] if count_on_host is None else count_on_host(num_masked, steps_left)
        check_last_step(self.step_sampler.commit.name, steps_left, num_masked, count)
        return self.tracker.record((rows, blocks), count)

    def _window(self, block: int) -> tuple[int, int, bool]:
        """Return the first column of this step's window, its width, and whether the step runs all columns."""
        width = self.tokens.shape[1]
        if self.cache is None:
            return 0, width, True
        self.step = 0 if block != self.block else self.step + 1
        self.block = block
        # With `spec.shift` the state one column to the left predicts the block's first token: this column runs too.
        shift = self.step_sampler.policy.spec.shift
        begin = self.canvas_columns.start + self.canvas.bounds[block][0] - shift
        refresh = self.cache.refresh
        return begin, self.block_size + shift, self.step == 0 or (refresh is not None and self.step % refresh == 0)


def check_fixed_shapes(cache: Cache | None, commit: Commit, records_confidence: bool = False) -> None:
    """Raise ValueError for a cache or a commit rule whose steps have no fixed shapes."""
    conflict = None
    if commit.revises:
        conflict = f"commit={commit.name}, which rewrites: use a rule that does not rewrite"
    elif commit.reads:
        conflict = f"commit={commit.name}, which reads {' and '.join(sorted(commit.reads))}: use Threshold"
    elif cache is not None and cache.kind == "prefix":
        conflict = "PrefixCache(), which runs all columns after a block: use DualCache()"
    elif records_confidence:
        conflict = "confidence_radius, which it does not record: leave it at None"
    if conflict:
        raise ValueError(f"compile_step=True cannot be combined with {conflict}, or set compile_step=False")


def check_supported(policy: Policy, canvas: Canvas, cache: Cache | None) -> None:
    """Raise ValueError for a policy or prompts that a graph does not support."""
    reason = None
    if policy.records_experts:
        reason = "records no experts: leave out router_replay"
    elif canvas.infill_mask is not None:
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
    past = empty_cache(policy)
    attention_mask = torch.ones_like(canvas.attention_mask[:1, :1])
    positions = position_ids(attention_mask)
    policy.encode(canvas.tokens[:1, :1], attention_mask, positions, cache=past, use_cache=True)
    return past.get_seq_length() == 1


@functools.cache
def compiled() -> Callable[..., tuple[StepState, Tensor, Tensor]]:
    """Return the compiled step. One function serves all samplers of the process."""
    run = torch.compile(_step, mode="reduce-overhead", dynamic=False, fullgraph=True)
    limit = max(MAX_GRAPHS, torch._dynamo.config.recompile_limit)
    return torch._dynamo.config.patch(recompile_limit=limit)(run)


@no_type_check  # torch.compile cannot trace the tests' type checks
def _step(
    step_sampler: StepSampler, constants: StepConstants, state: StepState, numbers: Int[Tensor, "5 B"], width: int
) -> tuple[StepState, Int[Tensor, " B"], Bool[Tensor, ""]]:
    """Return the state after a step, the number of committed positions of each row, and whether a score is NaN.

    Args:
        step_sampler: Rank, commit rule and sampling parameters.
        constants: Inputs that are the same in all steps.
        state: State before the step.
        numbers: Five numbers per row: the window's first column, the offset of the first position of the row's block,
            the block's size, its remaining steps, and the number of steps in which the row has taken part.
        width: Number of columns of the window.
    """
    policy = step_sampler.policy
    tokens = state.tokens
    records = state.records
    past = state.past
    window_start, first_offset, sizes, steps_left, row_steps = numbers.unbind()
    slot = torch.arange(constants.block_size, device=tokens.device)
    # A smaller block has fewer positions than slots. Its last slots are other positions, which do not change.
    offset = (first_offset[:, None] + slot) % constants.columns.shape[1]
    column = constants.columns.gather(1, offset)
    masked = records["masked"].gather(1, offset) & (slot < sizes[:, None])
    if past is None:
        hidden = policy.hidden(tokens, constants.attention_mask)
        hidden_column = column
    else:
        first_column = window_start[:, None] if past else 0
        hidden, past = _cached_states(policy, constants.attention_mask, state, window_start[0], width)
        hidden_column = (column - first_column - int(policy.spec.shift)).clamp(0, hidden.shape[1] - 1)
    hidden = hidden.gather(1, hidden_column[:, :, None].expand(-1, -1, hidden.shape[-1])).flatten(0, 1)

    counters = [x.expand_as(offset).flatten() for x in (constants.seeds[:, None], row_steps[:, None], offset)]
    token_uniforms = uniforms(*counters, stream=TOKEN_STREAM)
    rank_uniforms = uniforms(*counters, stream=RANK_STREAM)
    params, rank = step_sampler.sampling_params, step_sampler.rank
    scores, flat_drawn = draw_and_rank(policy, hidden, token_uniforms, rank_uniforms, params, rank)
    drawn = Drawn(*(values.unflatten(0, offset.shape) for values in flat_drawn.tensors()))
    scores = scores.view_as(drawn.logprobs)
    scores = scores.masked_fill(~masked, -torch.inf)
    commit_scores = add_gumbel(scores, rank_uniforms.view_as(scores)) if step_sampler.adds_gumbel else scores
    chosen = step_sampler.commit(commit_scores, masked, steps_left.clamp(min=1)) & masked

    new_values = {"masked": torch.zeros_like(masked), "unmask_step": row_steps[:, None].expand_as(offset)}
    new_values |= {"logprobs": drawn.logprobs}
    if drawn.log_mass is not None:
        new_values |= {"log_mass": drawn.log_mass, "ids": drawn.support}
    if step_sampler.has_order_logprob and step_sampler.adds_gumbel:
        new_values["draw"] = draw_index(commit_scores, masked, chosen)
        new_values["order"] = plackett_luce_logprobs_fixed_shape(scores, new_values["draw"], masked, chosen)
    records = records | {
        name: _scatter_chosen(records[name], offset, values, chosen) for name, values in new_values.items()
    }
    if step_sampler.has_order_logprob and not step_sampler.adds_gumbel:
        row = torch.arange(len(scores), device=scores.device)[:, None].expand_as(scores).flatten()
        flat_slot = slot.expand_as(scores).flatten()
        flat_scores = scores.masked_fill(~chosen, torch.inf).flatten()
        cutoff = commit_cutoff(flat_scores, row, flat_slot, row, flat_slot, len(scores))
        # The normalizer of the scores is reused. Generated code would sum it again in another order, and miss ties.
        order_logprobs = stay_masked_logprobs(policy, hidden, *cutoff, params, flat_drawn.normalizer)
        total = records["order"].gather(1, offset) + order_logprobs.view_as(scores)
        records["order"] = _scatter_chosen(records["order"], offset, total, masked & ~chosen)
    tokens = _scatter_chosen(tokens, column, drawn.tokens, chosen)
    return StepState(tokens, records, past), chosen.sum(-1), commit_scores.isnan().any()


@no_type_check
def _scatter_chosen(target: Tensor, index: Tensor, values: Tensor, chosen: Tensor) -> Tensor:
    """Return a copy of `target` (B, L, ...) with the chosen of the values (B, S, ...) written at `index` (B, S)."""
    add_axes = (..., *[None] * (target.dim() - 2))  # as many axes as `target` has
    index = index[add_axes].expand(*index.shape, *target.shape[2:])
    return target.scatter(1, index, torch.where(chosen[add_axes], values.to(target.dtype), target.gather(1, index)))


@no_type_check
def _cached_states(
    policy: Policy, attention_mask: Bool[Tensor, "B T"], state: StepState, begin: Tensor, width: int
) -> tuple[Tensor, Past]:
    """Return hidden states, and the keys and values outside the window.

    If `state.past` has these keys and values, only the window runs, and the hidden states are those of the window. If
    it is empty, all columns run.
    """
    tokens = state.tokens
    past = state.past
    inside = begin + torch.arange(width, device=tokens.device)
    outside = torch.arange(tokens.shape[1] - width, device=tokens.device)
    outside = outside + width * (outside >= begin)
    positions = position_ids(attention_mask)
    all_columns = torch.arange(tokens.shape[1], device=tokens.device)
    query_columns = inside if past else all_columns
    key_columns = torch.cat([outside, inside]) if past else all_columns
    bias = attention_bias(policy, tokens, attention_mask, positions, query_columns, key_columns)
    keys_and_values = empty_cache(policy)
    for layer, (keys, values) in zip(keys_and_values.layers, past, strict=False):
        layer.lazy_initialization(keys, values)
        layer.keys, layer.values = keys, values
    options = {"cache": keys_and_values, "use_cache": True}
    hidden = policy.encode(tokens[:, query_columns], bias, positions[:, query_columns], **options)
    if not past:
        past = [(layer.keys[:, :, outside], layer.values[:, :, outside]) for layer in keys_and_values.layers]
    return hidden, past
