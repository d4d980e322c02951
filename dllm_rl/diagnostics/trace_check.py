"""Check a trace: replay it under a policy, and compare the log-probs.

In this file, d = recorded - replayed log-prob of a token, in nats.
"""

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from rich.table import Table
from torch import Generator, Tensor

from dllm_rl.diagnostics.traces import has_logprobs
from dllm_rl.likelihoods.estimators import Causal, Trajectory, recorded
from dllm_rl.likelihoods.views import each_view, row_chunks
from dllm_rl.models.base import Policy
from dllm_rl.samplers.choose import rank_and_draw
from dllm_rl.samplers.rules import DETERMINISTIC, Rank
from dllm_rl.screen import NARROW, literal
from dllm_rl.types.rollouts import Rollout

MAX_PARTS = 6  # rows of the table for steps, and for positions; each is a range
CHECKS = ("steps", "block", "mask", "order")
CAUSES = "other weights (stale, quantized), tokens, temperature, top_k or top_p, or of a neighboring position"


@dataclass(frozen=True)
class Part:
    """Differences of some tokens: their mean and largest |d|, in nats."""

    name: str
    num_tokens: int
    mean_abs: float
    max_abs: float


@dataclass(frozen=True)
class Fault:
    """Something in a trace that no sampler can have done: the number of tokens, and a text with the first place."""

    kind: str
    count: int
    text: str


@dataclass(frozen=True)
class TraceReport:
    """The result of `check_trace`.

    Attributes:
        num_rows: Completions of the trace.
        num_compared: Completions whose log-probs were compared; the others have a fault.
        bound: Largest mean |d| that rounding may cause, in nats.
        total: Differences of all compared tokens. NaN if there is nothing to compare.
        parts: Differences by step, and by position in the completion.
        faults: What is impossible in the trace, by kind: steps, block, mask, order or nonfinite.
        unchecked: Kinds of faults that were not checked, and why.
    """

    num_rows: int
    num_compared: int
    bound: float
    total: Part
    parts: tuple[Part, ...] = ()
    faults: tuple[Fault, ...] = ()
    unchecked: tuple[tuple[str, str], ...] = ()

    @property
    def differs(self) -> bool:
        """Whether the mean |d| is above the bound. False without log-probs to compare."""
        return self.total.mean_abs > self.bound

    @property
    def ok(self) -> bool:
        return not self.faults and not self.differs

    @property
    def verdict(self) -> str:
        """The result of the check in one line."""
        findings = [f"{fault.kind}: {fault.text}" for fault in self.faults]
        if self.differs:
            findings.append(f"logprobs: mean |d| {self.total.mean_abs:.3g} nats, above {self.bound:g}: {CAUSES}")
        elif self.total.num_tokens:
            findings.append(
                f"sampled and replayed log-probs agree: mean |d| {self.total.mean_abs:.2g} nats, bound {self.bound:g}"
            )
        else:
            findings.append("log-probs were not compared")
        return "; ".join(findings)


@torch.no_grad()
def check_trace(
    policy: Policy, rollout: Rollout, *, bound: float = 0.02, micro_batch_size: int | None = None
) -> TraceReport:
    """Replay a trace under a policy; report whether its steps are possible and whether its log-probs are the policy's.

    Call it for a trace of an engine (`read_trace`) before you train on its rollouts. It computes one forward per step,
    and a second one to check the order of a deterministic rank.

    Args:
        policy: Policy with the weights that sampled.
        rollout: Rollout or trace to check.
        bound: Largest mean |d| in nats that formats and kernels of the engine may cause. It is also the tolerance for
            the order.
        micro_batch_size: Completions per forward. None (default): all.

    Raises:
        ValueError: The trace has a token that the policy lacks, or is longer than the policy allows.
    """
    rollout = rollout.to(policy.device)
    _check_fits(policy, rollout)
    faults, unchecked, replayable = _check_steps(policy, rollout)
    selected = _select_rows(rollout, replayable)
    report = TraceReport(len(rollout.tokens), int(replayable.sum()), bound, _part("all", torch.zeros(0)))
    if selected is not None:
        has_policy_order = torch.ones_like(replayable)[replayable]
        rank = None if selected.order is None else DETERMINISTIC.get(selected.order.rank_name or "")
        if rank is not None and selected.order is not None and selected.order.probability == "deterministic":
            worse = _worse_choices(policy, selected, rank, bound, micro_batch_size)
            text = f"rank={rank.name} of this model would have written another position of the block first"
            faults += _faults([("order", worse, text)])
            has_policy_order = ~worse.any(-1)
        elif policy.spec.attention != "causal":
            unchecked.append(("order", "any order is possible" if rollout.order else "not recorded"))
        if has_logprobs(selected):
            report = _compare(policy, selected, report, faults, has_policy_order, micro_batch_size)
    return replace(report, faults=tuple(faults), unchecked=tuple(unchecked))


def replayed(
    policy: Policy, rollout: Rollout, *, micro_batch_size: int | None = None
) -> tuple[Float[Tensor, "B T"], Float[Tensor, "B T"]]:
    """Return each position's log-prob as the rollout recorded it, and as a replay under the policy gives it, in nats.

    If the rollout has the log-prob of its order, both include it.
    """
    exact = Causal() if policy.spec.attention == "causal" else Trajectory()
    views = exact.draw_views(rollout, Generator().manual_seed(0))
    return recorded(rollout, views), exact.logprobs(policy, rollout, views, micro_batch_size=micro_batch_size)


def _check_fits(policy: Policy, rollout: Rollout) -> None:
    largest, width = int(rollout.tokens[rollout.attention_mask].max()), int(rollout.attention_mask.sum(-1).max())
    if largest >= policy.vocab_size:
        raise ValueError(f"tokens has id {largest}, the model {policy.vocab_size} ids; give the model that sampled")
    if outside := [token for token in rollout.sampling_params.suppress if not 0 <= token < policy.vocab_size]:
        raise ValueError(
            f"suppress has id {outside[0]}, the model {policy.vocab_size} ids; give the model that sampled"
        )
    if policy.spec.max_length is not None and width > policy.spec.max_length:
        raise ValueError(
            f"a row has {width} tokens, the model {policy.spec.max_length} positions; give the model that sampled"
        )


def _select_rows(rollout: Rollout, keep: Bool[Tensor, " B"]) -> Rollout | None:
    """Return the marked rows, with their steps renumbered without gaps. Return None if no row is marked."""
    if not keep.any():
        return None
    if not keep.all():
        rollout = rollout.rows(keep.nonzero()[:, 0])
    if rollout.events is not None or rollout.renoised is not None:
        return rollout
    # A replay depends only on the order of the steps, and a step number of 10^9 would need 10^9 views.
    step = rollout.unmask_step.clone()
    firsts = None if rollout.order is None else rollout.order.block_first_step.clone()
    for row, mask in enumerate(rollout.completion_mask):
        step[row] = torch.where(mask, torch.searchsorted(step[row][mask].unique(), step[row]), -1)
        if firsts is not None:
            blocks = [mask & (firsts[row] == first) for first in firsts[row][mask].unique()]
            for members in blocks:
                firsts[row, members] = step[row, members].min()
    order = None if rollout.order is None or firsts is None else replace(rollout.order, block_first_step=firsts)
    return replace(rollout, unmask_step=step, order=order)


def _check_steps(policy: Policy, rollout: Rollout) -> tuple[list[Fault], list[tuple[str, str]], Bool[Tensor, " B"]]:
    """Return faults of the steps, (kind, reason) of what was not checked, and which rows can be replayed."""
    completion, step = rollout.completion_mask, rollout.unmask_step
    nothing = torch.zeros_like(completion)
    checks: list[tuple[str, Bool[Tensor, "B T"], str]] = []  # kind, tokens at fault, text
    unchecked: list[tuple[str, str]] = []
    masks = nothing if policy.spec.mask_id is None else completion & (rollout.tokens == policy.spec.mask_id)
    checks.append(("mask", masks, "the mask token is left in the completion"))
    if rollout.events is not None or rollout.renoised is not None:
        unchecked += [("steps", "the sampler rewrites tokens"), ("block", "the sampler rewrites tokens")]
        return _faults(checks), unchecked, ~masks.any(-1)
    negative = completion & (step < 0)
    checks.append(("steps", negative, "a token of the completion has no step"))
    checks.append(("steps", ~completion & (step >= 0), "a position outside the completion has a step"))
    beyond = nothing if not rollout.forwards else completion & (step >= rollout.forwards)
    checks.append(("steps", beyond, f"a step is beyond the {rollout.forwards} forwards of the trace"))
    early = nothing
    if rollout.order is None:
        unchecked.append(("block", "not recorded" if policy.spec.attention != "causal" else "a causal model has none"))
    else:
        early, late = (tokens & ~negative.any(-1, keepdim=True) for tokens in _out_of_turn(rollout))
        checks.append(("block", early, "a token was written before its block's turn"))
        checks.append(("block", late & ~early, "a token was written after the next block had begun"))
        early = early | late
    unusable = masks | negative | early
    missing = _after_a_gap(rollout) & ~unusable.any(-1, keepdim=True)
    checks.append(("steps", missing, "the steps before it are missing"))
    if policy.spec.attention == "causal":
        before = step.masked_fill(~completion, -1).cummax(-1).values.roll(1, -1)
        before[:, 0] = -1
        checks.append(("order", completion & (step <= before), "a causal model writes from left to right"))
    return _faults(checks), unchecked, ~unusable.any(-1)


def _faults(checks: list[tuple[str, Bool[Tensor, "B T"], str]]) -> list[Fault]:
    """Return a fault for each check that marks tokens."""
    faults = []
    for kind, where, text in checks:
        if count := int(where.sum()):
            row, column = where.nonzero()[0].tolist()
            more = f" ({count} tokens in {int(where.any(-1).sum())} rows)" if count > 1 else ""
            faults.append(Fault(kind, count, f"{text}, first in row {row}, column {column}{more}"))
    return faults


def _out_of_turn(rollout: Rollout) -> tuple[Bool[Tensor, "B T"], Bool[Tensor, "B T"]]:
    """Return two masks: tokens written before their block began, and tokens written after the next block began.

    Only differences between the steps of a row matter, so a row may count its steps from any number.
    """
    assert rollout.order is not None, "blocks are recorded"
    completion = rollout.completion_mask & (rollout.unmask_step >= 0)
    early, late = torch.zeros_like(completion), torch.zeros_like(completion)
    for row, mask in enumerate(completion):
        if not mask.any():
            continue
        step, first = rollout.unmask_step[row][mask], rollout.order.block_first_step[row][mask]
        step, first = step - step.min(), first - first.min()
        begins = torch.cat([first.unique(), first.new_tensor([2**62])])
        early[row, mask] = step < first
        late[row, mask] = step >= begins[torch.searchsorted(begins, first, right=True)]
    return early, late


def _after_a_gap(rollout: Rollout) -> Bool[Tensor, "B T"]:
    """Return the tokens of steps whose preceding step wrote nothing in their row. The first step must be step 0.

    Two rules may write nothing in a step, so their gaps are allowed: `Origin`, whose rank is random, and
    `LateSchedule` in the first steps of a block with more steps than positions, which then writes one position a step.
    """
    after_gap = torch.zeros_like(rollout.completion_mask)
    order = rollout.order
    if order is not None and order.rank_name == "RandomOrder":
        return after_gap
    for row, mask in enumerate(rollout.completion_mask & (rollout.unmask_step >= 0)):
        used, index, counts = rollout.unmask_step[row][mask].unique(return_inverse=True, return_counts=True)
        before = torch.cat([used.new_tensor([-1]), used[:-1]])
        gaps = used[used - before > 1]
        if order is not None:
            first = order.block_first_step[row][mask]
            gaps = gaps[~torch.isin(gaps, first) | torch.isin(gaps, first[counts[index] > 1])]
        after_gap[row] = mask & torch.isin(rollout.unmask_step[row], gaps)
    return after_gap


def _worse_choices(
    policy: Policy, rollout: Rollout, rank: Rank, tolerance: float, micro_batch_size: int | None
) -> Bool[Tensor, "B T"]:
    """Return the tokens that a step wrote although it left a position with a higher score masked in the block."""
    assert rollout.order is not None, "the order is recorded"
    views = Trajectory(include_order=False).draw_views(rollout, Generator().manual_seed(0))
    worse = torch.zeros_like(rollout.completion_mask)
    for chunk in row_chunks(rollout, views, micro_batch_size):
        part = chunk.rollout
        assert part.order is not None, "rows keep their order"
        for step, view in enumerate(each_view(chunk.views)):
            left_masked = view.masked & ~view.scored & (part.order.block_first_step <= step)
            states = view.run(policy, part, view.scored | left_masked)
            if states is None:
                continue
            scores = torch.full(left_masked.shape, torch.nan, device=policy.device).flatten()
            written_scores, _ = rank_and_draw(policy, states.states, part.sampling_params, (rank, rank.reads))
            assert written_scores is not None, "there is a rank"
            scores[states.plan.flat_index] = written_scores
            scores = scores.view(left_masked.shape)
            best_left = scores.masked_fill(~left_masked, -torch.inf).amax(-1, keepdim=True)
            worse[chunk.rows, chunk.columns] |= view.scored & (scores < best_left - tolerance)
    return worse


def _compare(
    policy: Policy,
    rollout: Rollout,
    report: TraceReport,
    faults: list[Fault],
    has_policy_order: Bool[Tensor, " B"],
    micro_batch_size: int | None,
) -> TraceReport:
    """Add to a report the differences of the log-probs, by step and position.

    Rows outside of `has_policy_order` were written in another order than the policy's. They are left out, unless all
    rows are among them.
    """
    record, model = replayed(policy, rollout, micro_batch_size=micro_batch_size)
    difference, mask = record - model, rollout.completion_mask
    not_finite = mask & ~difference.isfinite()
    faults += _faults([("nonfinite", not_finite, "a log-prob is not a finite number")])
    mask = mask & ~not_finite
    in_order = mask & has_policy_order[:, None]
    mask = in_order if in_order.any() else mask
    step = rollout.unmask_step if policy.spec.attention != "causal" else torch.full_like(rollout.unmask_step, -1)
    position = rollout.completion_mask.long().cumsum(-1) - 1
    parts = [*_parts("step", step, difference, mask), *_parts("position", position, difference, mask)]
    total, num_compared = _part("all", difference[mask]), int(mask.any(-1).sum())
    return replace(report, num_compared=num_compared, total=total, parts=tuple(parts))


def _part(name: str, difference: Float[Tensor, " N"]) -> Part:
    absolute = difference.abs()
    if not len(absolute):
        return Part(name, 0, math.nan, math.nan)
    return Part(name, len(absolute), absolute.mean().item(), absolute.max().item())


def _parts(
    name: str, index: Int[Tensor, "B T"], difference: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"]
) -> list[Part]:
    """Return the differences by ranges of an index: at most MAX_PARTS ranges of equal width."""
    if not mask.any():
        return []
    last = int(index[mask].max())
    width = -(-(last + 1) // MAX_PARTS)
    parts = []
    for first in range(0, last + 1, max(width, 1)):
        end = min(first + width, last + 1)
        label = f"{name} {first}" if end == first + 1 else f"{name}s {first}-{end - 1}"
        parts.append(_part(label, difference[mask & (index >= first) & (index < end)]))
    return [part for part in parts if part.num_tokens]


def report_table(report: TraceReport) -> Table:
    """Return the report as a table: the log-probs, and the checks of the steps."""
    title = f"trace of {report.num_rows} rows, {report.num_compared} replayed; d = recorded - replayed, nats"
    table = Table(title=literal(title, style="table.title"), title_justify="left", **NARROW)
    table.add_column("what", no_wrap=True)
    for name in ("tokens", "mean |d|", "max |d|"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("finding", overflow="fold")
    for part in (report.total, *report.parts):
        numbers = ("", "") if not part.num_tokens else (f"{part.mean_abs:.2e}", f"{part.max_abs:.2e}")
        finding = ""
        if part is report.total:
            finding = f"above {report.bound:g}" if report.differs else f"within {report.bound:g}"
            finding = finding if part.num_tokens else "not compared"
        table.add_row(literal(part.name), str(part.num_tokens), *numbers, finding)
    for kind in (*CHECKS, "nonfinite"):
        faults = [fault for fault in report.faults if fault.kind == kind]
        why = dict(report.unchecked).get(kind)
        for fault in faults:
            table.add_row(kind, str(fault.count), "", "", literal(f"impossible: {fault.text}"))
        if not faults and kind in CHECKS:
            table.add_row(kind, "", "", "", literal("possible" if why is None else f"not checked: {why}"))
    return table


def as_json(report: TraceReport) -> dict[str, Any]:
    """Return the report as a JSON object; the mean and largest |d| of no tokens are null."""
    values = asdict(report) | {"ok": report.ok, "verdict": report.verdict}
    if not report.total.num_tokens:  # JSON has no NaN
        values["total"] |= {"mean_abs": None, "max_abs": None}
    return values
