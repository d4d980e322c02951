"""A view of a batch: the positions that are hidden from the model, and the positions that are scored.

`View.logprobs` scores a view in one forward, and `View.backward` differentiates it. The default view hides the masked
positions, runs the policy, and scores the rollout's tokens. A feature (`ViewFeature.apply_to`) returns another view: it
replaces the tokens that the model reads or the forward, or subclasses `View` for another scoring of the states.

K is the number of scored positions of a view.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dllm_rl.device import copy_to_device
from dllm_rl.models.base import Policy, length_buckets
from dllm_rl.models.logprobs import backward_token_logprobs, token_logprobs
from dllm_rl.types.groups import any_in_group, group_numbers, starts_group
from dllm_rl.types.rollouts import Rollout, pack_groups
from dllm_rl.types.scoring import Views, ViewTensors


class Chunk(NamedTuple):
    """Rows that go through the model together, without the columns on the left that are padding in all of them.

    Attributes:
        rows: Indices of the rows in the batch.
        columns: Columns in the batch.
        rollout: The rollout's part.
        views: The views' part.
        view_of_row: Number of the one view in which each row is scored, if denoising steps were drawn; `views` then
            has one view, and `rows` may name a row several times. None (default): all rows are scored in all views.
    """

    rows: Int[Tensor, " R"]
    columns: slice
    rollout: Rollout
    views: Views
    view_of_row: Int[Tensor, " R"] | None = None


def row_chunks(rollout: Rollout, views: Views, micro_batch_size: int | None) -> Iterator[Chunk]:
    """Split the groups that any view scores into chunks of rows of similar length.

    The forwards of a chunk have at most micro_batch_size rows. A group whose rows the model reads alike in every view
    is one row of a forward (`plan_view`), and counts as one. Another group is split only if it has more rows. If
    denoising steps were drawn, a chunk is filled with the drawn steps of any rows.
    """
    if views.inverse_chances is not None:
        yield from _chunks_of_drawn_steps(rollout, views, micro_batch_size)
        return
    is_scored = any_in_group((views.coefficients != 0).any(0).any(-1), rollout.group)
    first_column = rollout.attention_mask.long().argmax(-1)
    number = group_numbers(rollout.group)
    # The columns of a group are those of its longest row.
    first_of_group = torch.full_like(number, rollout.tokens.shape[1]).scatter_reduce(0, number, first_column, "amin")
    per_row = [is_scored, first_of_group[number], number, differs_in_group(rollout, views).any(0)]
    # The host waits for the device once.
    is_scored, first_column, number, differs = torch.stack(per_row).cpu()
    width = rollout.tokens.shape[1]
    # A row is scored at the width at which it was sampled: another width rounds differently.
    for bucket in length_buckets(first_column, width, rollout.tokens.device):
        columns = slice(bucket.start, width)
        rows = bucket.rows[is_scored[bucket.rows] != 0]
        # In a forward either all groups share their rows, or none does.
        shares_rows = not differs[rows].any() and all(view.share and view.canvas is None for view in each_view(views))
        batches = pack_groups(rows, number[rows], micro_batch_size, one_row_each=shares_rows)
        for chunk_rows in batches:  # a bucket may have nothing to score
            (device_rows,) = copy_to_device(rollout.tokens.device, chunk_rows)
            yield Chunk(device_rows, columns, rollout.rows(device_rows, columns), views.rows(device_rows, columns))


def differs_in_group(rollout: Rollout, views: Views) -> Bool[Tensor, "N B"]:
    """Return the rows that view n shows to the model otherwise than the row before, of the same group."""
    tokens, mask, masked = rollout.tokens, rollout.attention_mask, views.masked
    differs = ((tokens[1:] != tokens[:-1]) & ~masked[:, 1:]) | (masked[:, 1:] != masked[:, :-1])
    differs = differs.any(-1) | (mask[1:] != mask[:-1]).any(-1)
    return F.pad(differs, (1, 0)) & ~starts_group(rollout.group)


def alike_rows(rollout: Rollout, views: Views) -> Int[Tensor, "N B"]:
    """Return a number for each row of each view. Neighbors with one number are one row of the model's input: rows of a
    group that the view shows alike. Numbers of different views differ.
    """
    shape, device = views.masked.shape[:2], views.masked.device
    if all(view.share and view.canvas is None for view in each_view(views)):
        starts = differs_in_group(rollout, views) | starts_group(rollout.group)
    else:
        starts = torch.ones(shape, dtype=torch.bool, device=device)
    return starts.long().flatten().cumsum(0).view(shape)


def _chunks_of_drawn_steps(rollout: Rollout, views: Views, micro_batch_size: int | None) -> Iterator[Chunk]:
    """Split the pairs of a view and a row that are scored into chunks of pairs of similar length. Without a
    `micro_batch_size` a forward has at most as many rows as one view of the batch.
    """
    most = len(rollout.tokens) if micro_batch_size is None else micro_batch_size
    number, row = (views.coefficients != 0).any(-1).nonzero(as_tuple=True)
    group = alike_rows(rollout, views)[number, row]  # in ascending order, as the pairs are
    group_of_row = group_numbers(rollout.group)
    first_column = rollout.attention_mask.long().argmax(-1)
    first_of_group = torch.full_like(group_of_row, rollout.tokens.shape[1])
    first_of_group = first_of_group.scatter_reduce(0, group_of_row, first_column, "amin")
    number, row, group, first_column = torch.stack([number, row, group, first_of_group[group_of_row[row]]]).cpu()
    width = rollout.tokens.shape[1]
    for bucket in length_buckets(first_column, width, rollout.tokens.device):
        columns, pairs = slice(bucket.start, width), bucket.rows
        for chunk in pack_groups(pairs, group[pairs], most, one_row_each=True):
            n, rows, groups = copy_to_device(rollout.tokens.device, number[chunk], row[chunk], group[chunk])
            part = replace(rollout.rows(rows, columns), group=groups)
            yield Chunk(rows, columns, part, _views_of_pairs(views, n, rows, columns), n)


def _views_of_pairs(views: Views, number: Int[Tensor, " R"], row: Int[Tensor, " R"], columns: slice) -> Views:
    """Return one view, whose row r is the row `row[r]` of the view `number[r]`, cut to `columns`."""

    def pick(x: Tensor) -> Tensor:
        if x.dim() == 1:
            return x[row]
        return x[number if len(x) > 1 else torch.zeros_like(number), row][None, :, columns]

    return views.map(pick)


def num_row_forwards(rollout: Rollout, views: Views) -> int:
    """Return the number of rows that go through the model to score the drawn steps once."""
    return len(alike_rows(rollout, views)[(views.coefficients != 0).any(-1)].unique())


class ForwardPlan(NamedTuple):
    """The rows that go through the model for a view, and the indices of its K scored positions.

    Attributes:
        rows: Rows of the forward: `scored_rows`, or with `copies` the first row of each group.
        copies: For each row of the batch, the index among `rows` of the row whose states it has, because the model
            reads the same tokens in all rows of a group. None: each scored row is run.
        scored_rows: Rows with a scored position.
        state_index: Index of each scored position in the flattened states.
        flat_index: Index of each scored position in the flattened batch.
        written: Indices, among the K, of the positions scored by their token: all, without `View.stay_masked`.
        stay_masked: Indices, among the K, of the positions scored by the probability of staying masked.
    """

    rows: Int[Tensor, " R"]
    copies: Int[Tensor, " B"] | None
    scored_rows: Int[Tensor, " L"]
    state_index: Int[Tensor, " K"]
    flat_index: Int[Tensor, " K"]
    written: Int[Tensor, " M"]
    stay_masked: Int[Tensor, " J"]


class ViewStates(NamedTuple):
    """The result of a view's forward, at its K scored positions.

    Attributes:
        plan: Indices of the positions.
        states: Final hidden states.
        tokens: Tokens to score.
        support_ids: Token ids over which log-probs are normalized (`decoding.support`). None: all.
    """

    plan: ForwardPlan
    states: Float[Tensor, "K D"]
    tokens: Int[Tensor, " K"]
    support_ids: Int[Tensor, "K C"] | None


def forward(
    policy: Policy,
    plan: ForwardPlan,
    tokens: Int[Tensor, "R T"],
    attention_mask: Bool[Tensor, "R T"],
    clean: Int[Tensor, "R T"],
    read: Bool[Tensor, "R T"],
) -> Float[Tensor, "R T D"]:
    """Return the states of a view's tokens. This is the default forward.

    The forwards of features (`packed`, `replay`) also use the other arguments.

    Args:
        policy: Policy to run.
        plan: Rows of the forward.
        tokens: Tokens that the model reads.
        attention_mask: False on padding.
        clean: The rollout's tokens, without masks.
        read: Positions whose states are read or which are masked.
    """
    return policy.hidden(tokens, attention_mask)


@dataclass(frozen=True)
class View:
    """A view of some rows, which scores each position by the log-prob of its token.

    Args:
        masked: Positions that are hidden from the model.
        scored: Positions to score.
        canvas: Function of the rollout. It returns the tokens before masking, and the tokens to score. None (default):
            the rollout's tokens, for both.
        forward: Function that computes the states of the masked canvas; see `forward`.
        share: Whether a single row may be run for a group in which the model reads the same tokens in all rows.
        stay_masked: Positions that a subclass scores by the probability of staying masked, not by their token. None
            (default): no positions.
    """

    masked: Bool[Tensor, "B T"]
    scored: Bool[Tensor, "B T"]
    canvas: Callable[[Rollout], tuple[Tensor, Tensor]] | None = None
    forward: Callable[..., Tensor] = forward
    share: bool = True
    stay_masked: Bool[Tensor, "B T"] | None = None

    def logprobs(self, policy: Policy, rollout: Rollout) -> Float[Tensor, "B T"]:
        """Run one forward. Return the log-probs of the `scored` positions in nats, and 0 for the others."""
        out = torch.zeros(self.scored.numel(), device=self.scored.device)
        view_states = self.run(policy, rollout, self.scored)
        if view_states is not None:
            logps = self.logprobs_at(policy, rollout, view_states)
            out = out.to(logps.dtype).index_copy(0, view_states.plan.flat_index, logps)
        return out.view(self.scored.shape)

    def logprobs_at(self, policy: Policy, rollout: Rollout, view_states: ViewStates) -> Float[Tensor, " K"]:
        """Return the log-probs of the K positions of `view_states` in nats, differentiable."""
        _, states, tokens, support_ids = view_states
        return token_logprobs(policy, states, tokens, rollout.sampling_params, support_ids)

    def backward(self, policy: Policy, rollout: Rollout, grad_output: Float[Tensor, "B T"]) -> None:
        """Compute `logprobs(...).backward(grad_output)` in one forward and backward.

        Only the states that affect the loss are computed. If `grad_output` is 0 everywhere, no forward runs.
        """
        view_states = self.run(policy, rollout, grad_output != 0)
        if view_states is not None:
            plan, states, tokens, support_ids = view_states
            grad_output = grad_output.flatten()[plan.flat_index]
            backward_token_logprobs(policy, states, tokens, rollout.sampling_params, grad_output, support_ids)

    def inputs_and_targets(self, policy: Policy, rollout: Rollout) -> tuple[Int[Tensor, "B T"], Int[Tensor, "B T"]]:
        """Return the tokens that the model reads, and the tokens to score."""
        tokens, targets = (rollout.tokens, rollout.tokens) if self.canvas is None else self.canvas(rollout)
        if policy.spec.mask_id is not None:
            tokens = tokens.masked_fill(self.masked, policy.spec.mask_id)
        return tokens, targets

    def run(self, policy: Policy, rollout: Rollout, at: Bool[Tensor, "B T"]) -> ViewStates | None:
        """Run one forward, and return its states at the positions `at`. Without such positions, return None."""
        tokens, targets = self.inputs_and_targets(policy, rollout)
        plan = plan_view(rollout, tokens, at, self.stay_masked, share=self.share)
        if plan is None:
            return None
        rows = plan.rows
        read = (self.masked | at)[rows]
        hidden = self.forward(policy, plan, tokens[rows], rollout.attention_mask[rows], rollout.tokens[rows], read)
        hidden = hidden.flatten(0, 1)
        # A copied state has several gradients, which must be added up in one order. Those of an embedding are, on a
        # CPU and a GPU; those of indexing are not in several threads, and those of index_select not on a GPU.
        states = hidden[plan.state_index] if plan.copies is None else F.embedding(plan.state_index, hidden)
        targets = targets.flatten()[plan.flat_index]
        support_ids, record = None, rollout.filter_support
        if rollout.sampling_params.support == "rollout" and record is not None and record.ids is not None:
            support_ids = record.ids.flatten(0, 1)[plan.flat_index]
        return ViewStates(plan, states, targets, support_ids)


@dataclass(frozen=True)
class ViewFeature(ViewTensors, ABC):
    """A change of how views are scored.

    The features are in `likelihoods.order_logprobs`, `.events`, `.packed`, `.renoising`, `.replay` and `.turns`.
    """

    @abstractmethod
    def apply_to(self, view: View, number: int) -> View:
        """Apply this feature to view `number` and return the new view."""


def each_view(views: Views) -> Iterator[View]:
    """Yield the views one by one, with their features. Scoring and the update both use this function."""
    for number, masked in enumerate(views.masked):
        view = View(masked, views.coefficients[number] != 0)
        for feature in views.features:
            if isinstance(feature, ViewFeature):
                view = feature.apply_to(view, number)
        yield view


class Forward(NamedTuple):
    """One forward of scoring.

    Attributes:
        key: Number of the chunk, and of the view in it.
        number: Number of the view among all views; one per row if denoising steps were drawn.
        chunk: The rows.
        view: The view of these rows.
    """

    key: tuple[int, int]
    number: int | Int[Tensor, " R"]
    chunk: Chunk
    view: View


def each_forward(rollout: Rollout, views: Views, micro_batch_size: int | None) -> Iterator[Forward]:
    """Yield the views of each chunk."""
    for number, chunk in enumerate(row_chunks(rollout, views, micro_batch_size)):
        for n, view in enumerate(each_view(chunk.views)):
            yield Forward((number, n), n if chunk.view_of_row is None else chunk.view_of_row, chunk, view)


def plan_view(
    rollout: Rollout,
    tokens: Int[Tensor, "B T"],
    scored: Bool[Tensor, "B T"],
    stay_masked: Bool[Tensor, "B T"] | None,
    *,
    share: bool,
) -> ForwardPlan | None:
    """Make the plan of a view on the host. Return None if nothing is scored.

    Args:
        rollout: Rollout to score.
        tokens: Tokens that the model reads.
        scored: Positions to score.
        stay_masked: Positions that are scored by the probability of staying masked. None: no positions.
        share: Whether a single row may be run for a group, as in `View`.
    """
    starts = starts_group(rollout.group)
    inputs = torch.cat([tokens, rollout.attention_mask], dim=1)
    groups_are_equal = ((inputs[1:] == inputs[:-1]).all(-1) | starts[1:]).all()
    if stay_masked is None:
        stay_masked = torch.zeros_like(scored)
    # The host waits for the device once: four results return in one copy.
    on_host = torch.cat([scored.flatten(), stay_masked.flatten(), starts, groups_are_equal[None]]).cpu()
    scored_on_host, stays_on_host, starts, equal = on_host.split([scored.numel(), scored.numel(), len(starts), 1])
    flat_index = scored_on_host.nonzero()[:, 0]
    if not len(flat_index):
        return None
    scored_on_host = scored_on_host.view(scored.shape)
    scored_rows = scored_on_host.any(-1).nonzero()[:, 0]
    stays = stays_on_host[flat_index]
    written = (~stays).nonzero()[:, 0]
    device_inputs = [scored_rows, flat_index, written, stays.nonzero()[:, 0]]
    # For example, before the first step of a rollout all completions of a group are fully masked.
    if share and bool(equal) and not starts.all():
        copies, width = starts.long().cumsum(0) - 1, scored.shape[1]
        device_inputs += [copies[flat_index // width] * width + flat_index % width, starts.nonzero()[:, 0], copies]
    else:
        device_inputs += [scored_on_host[scored_rows].flatten().nonzero()[:, 0]]
    scored_rows, flat_index, written, stays, state_index, *shared = copy_to_device(scored.device, *device_inputs)
    rows, copies = shared or (scored_rows, None)
    return ForwardPlan(rows, copies, scored_rows, state_index, flat_index, written, stays)
