"""Check of a trace: replay it under a policy, compare the log-probs, and say what explains a difference.

d = recorded - replayed log-prob of a token, in nats. docs/engines.md has the command.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from rich.table import Table
from torch import Generator, Tensor

from dllm_rl.diagnostics.traces import has_logprobs
from dllm_rl.likelihoods.estimator import LikelihoodEstimator, recorded
from dllm_rl.likelihoods.estimators import causal, trajectory
from dllm_rl.likelihoods.views import each_view, row_chunks
from dllm_rl.models.base import Policy
from dllm_rl.models.logprobs import process
from dllm_rl.samplers.choose import rank_positions
from dllm_rl.samplers.records import RANKS, Rank, as_rank
from dllm_rl.screen import NARROW, literal
from dllm_rl.types import Rollout, SamplingParams

MAX_PARTS = 6  # ranges of steps and of positions in the table
MAX_TOKENS = 1024  # from which an explanation is fitted
MAX_LOGITS = 2**25  # numbers of their logits
MIN_TOKENS = 4  # fewer tokens explain nothing
FITS = 0.25  # an explanation fits if it leaves at most this share of the mean |d|, and at most the bound
SMALL = 1e-3  # or this, in nats, with a smaller bound
TOP_P = (*(i / 20 for i in range(1, 20)), 0.975, 0.99, 0.995)  # beside the value that the largest d shows
CHECKS = ("steps", "block", "mask", "order")


@dataclass(frozen=True)
class Part:
    """Differences of some tokens: their mean and largest |d|, in nats."""

    name: str
    num_tokens: int
    mean_abs: float
    max_abs: float


@dataclass(frozen=True)
class Fault:
    """Something that no sampler can have done: how many tokens, and what, with the first place."""

    kind: str
    count: int
    text: str


@dataclass(frozen=True)
class Explanation:
    """A possible cause of the differences, and the mean |d| in nats that it leaves."""

    kind: str
    setting: str
    mean_abs: float


@dataclass(frozen=True)
class TraceReport:
    """The result of `check_trace`.

    Attributes:
        num_rows: Completions of the trace.
        num_compared: Completions that were replayed; the others have a fault of steps, block, mask or order.
        bound: Largest mean |d| that rounding may cause, in nats.
        total: Differences of all compared tokens. NaN if there is nothing to compare.
        parts: The same by step and by position of the completion.
        faults: What cannot be, by kind: steps, block, mask, order or nonfinite.
        explanations: What was tried if the mean |d| is above the bound; the smallest remainder comes first.
        unchecked: Kinds that were not checked, and why.
    """

    num_rows: int
    num_compared: int
    bound: float
    total: Part
    parts: tuple[Part, ...] = ()
    faults: tuple[Fault, ...] = ()
    explanations: tuple[Explanation, ...] = ()
    unchecked: tuple[tuple[str, str], ...] = ()

    @property
    def differs(self) -> bool:
        """Whether the mean |d| is above the bound. False without log-probs to compare."""
        return self.total.mean_abs > self.bound

    @property
    def cause(self) -> str | None:
        """The kind of the best explanation: temperature, filters, shift or, if none fits, weights. None: no cause."""
        if not self.differs:
            return None
        best = self.explanations[0] if self.explanations else None
        return best.kind if best is not None and self.fits(best) else "weights"

    def fits(self, explanation: Explanation) -> bool:
        """Return whether an explanation leaves so little that it can be the cause."""
        return explanation.mean_abs <= min(FITS * self.total.mean_abs, max(self.bound, SMALL))

    @property
    def ok(self) -> bool:
        return not self.faults and not self.differs

    @property
    def verdict(self) -> str:
        """What the trace is, in one line."""
        said = [f"{fault.kind}: {fault.text}" for fault in self.faults]
        if self.differs:
            size = f"mean |d| {self.total.mean_abs:.3g} nats"
            if self.cause == "weights":
                why = "other weights (stale, quantized) or other tokens; no temperature, filter or shift explains them"
            else:
                best = self.explanations[0]
                why = f"{EXPLAINED[best.kind].format(best.setting)}, which leaves {best.mean_abs:.2g}"
            said.append(f"{self.cause}: {size}: {why}")
        elif self.total.num_tokens:
            said.append(f"log-probs agree: mean |d| {self.total.mean_abs:.2g} nats, bound {self.bound:g}")
        else:
            said.append("log-probs were not compared")
        return "; ".join(said)


EXPLAINED = {
    "temperature": "the log-probs are those of temperature {}",
    "filters": "the log-probs are those of {}",
    "shift": "the log-probs stand {}",
}


@torch.no_grad()
def check_trace(
    policy: Policy, rollout: Rollout, *, bound: float = 0.02, micro_batch_size: int | None = None
) -> TraceReport:
    """Replay a trace under a policy, and report whether its steps are possible and its log-probs the policy's.

    Call it for a trace of an engine (`read_trace`) before you train on its rollouts. It costs a forward for each step;
    a second one to check the order of a deterministic rank, or to explain a difference.

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
    good = _rows(rollout, replayable)
    report = TraceReport(len(rollout.tokens), int(replayable.sum()), bound, _part("all", torch.zeros(0)))
    if good is not None:
        is_order = torch.ones_like(replayable)[replayable]
        rank = None if good.order is None else DETERMINISTIC.get(good.order.rank_name or "")
        if rank is not None and good.order is not None and good.order.probability == "deterministic":
            worse = _worse_choices(policy, good, rank, bound, micro_batch_size)
            text = f"rank={rank.name} of this model would have written another position of the block first"
            faults += _faults([("order", worse, text)])
            is_order = ~worse.any(-1)
        elif policy.spec.attention != "causal":
            unchecked.append(("order", "any order is possible" if rollout.order else "not recorded"))
        if has_logprobs(good):
            report = _compare(policy, good, report, faults, is_order, micro_batch_size)
    return replace(report, faults=tuple(faults), unchecked=tuple(unchecked))


def replayed(
    policy: Policy, rollout: Rollout, *, include_order: bool = True, micro_batch_size: int | None = None
) -> tuple[Float[Tensor, "B T"], Float[Tensor, "B T"]]:
    """Return the contributions of each position by the record, and by a replay under the policy, in nats.

    Where the rollout recorded the log-prob of an order, both include it, unless `include_order` is False.
    """
    exact = _estimator(policy, include_order=include_order)
    views = exact.draw_views(rollout, Generator().manual_seed(0))
    return recorded(rollout, views), exact.logprobs(policy, rollout, views, micro_batch_size=micro_batch_size)


def _estimator(policy: Policy, *, include_order: bool) -> LikelihoodEstimator:
    return causal() if policy.spec.attention == "causal" else trajectory(include_order=include_order)


def _check_fits(policy: Policy, rollout: Rollout) -> None:
    largest, width = int(rollout.tokens[rollout.attention_mask].max()), int(rollout.attention_mask.sum(-1).max())
    if largest >= policy.vocab_size:
        raise ValueError(f"tokens has id {largest}, the model {policy.vocab_size} ids; give the model that sampled")
    if policy.spec.max_length is not None and width > policy.spec.max_length:
        raise ValueError(
            f"a row has {width} tokens, the model {policy.spec.max_length} positions; give the model that sampled"
        )


def _rows(rollout: Rollout, keep: Bool[Tensor, " B"]) -> Rollout | None:
    """Return the rows that can be replayed, with their steps renumbered without gaps; None without any."""
    if not keep.any():
        return None
    if not keep.all():  # the rest of a group may be missing
        rollout = replace(rollout.rows(keep.nonzero()[:, 0]), group_size=1)
    if rollout.events is not None or rollout.renoised is not None:
        return rollout
    # A replay depends only on the order of the steps, and a step of 10^9 would need as many views.
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
    """Return faults of the steps, what was not checked, and which rows can be replayed."""
    completion, step = rollout.completion_mask, rollout.unmask_step
    nothing = torch.zeros_like(completion)
    checks: list[tuple[str, Bool[Tensor, "B T"], str]] = []
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
        early, late = (found & ~negative.any(-1, keepdim=True) for found in _out_of_turn(rollout))
        checks.append(("block", early, "a token was written before its block's turn"))
        checks.append(("block", late & ~early, "a token was written after the next block had begun"))
        early = early | late
    lost = masks | negative | early
    missing = _after_a_gap(rollout) & ~lost.any(-1, keepdim=True)
    checks.append(("steps", missing, "the steps before it are missing"))
    if policy.spec.attention == "causal":
        before = step.masked_fill(~completion, -1).cummax(-1).values.roll(1, -1)
        before[:, 0] = -1
        checks.append(("order", completion & (step <= before), "a causal model writes from left to right"))
    return _faults(checks), unchecked, ~lost.any(-1)


def _faults(found: list[tuple[str, Bool[Tensor, "B T"], str]]) -> list[Fault]:
    faults = []
    for kind, where, text in found:
        if count := int(where.sum()):
            row, column = where.nonzero()[0].tolist()
            more = f" ({count} tokens in {int(where.any(-1).sum())} rows)" if count > 1 else ""
            faults.append(Fault(kind, count, f"{text}, first in row {row}, column {column}{more}"))
    return faults


def _out_of_turn(rollout: Rollout) -> tuple[Bool[Tensor, "B T"], Bool[Tensor, "B T"]]:
    """Return tokens whose step is before the first step of their block, or not before that of the next block.

    A constant that is added to all steps of a row changes nothing here.
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
    """Return tokens of a step before which a step is missing, or step 0.

    Two rules write nothing in some steps: `origin`, whose rank is random, and `late_schedule` in the first steps of a
    block with more steps than positions, which then writes one position a step.
    """
    found = torch.zeros_like(rollout.completion_mask)
    order = rollout.order
    if order is not None and order.rank_name == "random":
        return found
    for row, mask in enumerate(rollout.completion_mask & (rollout.unmask_step >= 0)):
        used, counts = rollout.unmask_step[row][mask].unique(return_counts=True)
        before = torch.cat([used.new_tensor([-1]), used[:-1]])
        gaps = used[used - before > 1]
        if len(gaps) and order is not None and order.rank_name is not None and (counts == 1).all():
            gaps = gaps[~torch.isin(gaps, order.block_first_step[row][mask])]
        found[row] = mask & torch.isin(rollout.unmask_step[row], gaps)
    return found


# Ranks whose scores are a function of the canvas, by name.
DETERMINISTIC: dict[str, Rank] = {
    rank.__name__: as_rank(rank) for rank, order in RANKS.items() if order in ("max_prob", "deterministic")
}


def _worse_choices(
    policy: Policy, rollout: Rollout, rank: Rank, tolerance: float, micro_batch_size: int | None
) -> Bool[Tensor, "B T"]:
    """Return the tokens that a step wrote although a position with a higher score was left masked in the block."""
    assert rollout.order is not None, "the order is recorded"
    views = trajectory(include_order=False).draw_views(rollout, Generator().manual_seed(0))
    worse = torch.zeros_like(rollout.completion_mask)
    for chunk in row_chunks(rollout, views, micro_batch_size):
        part, part_views = chunk.of(rollout, views)
        assert part.order is not None, "rows keep their order"
        for number, view in enumerate(each_view(part_views)):
            left = view.masked & ~view.scored & (part.order.block_first_step <= number)
            states = view.run(policy, part, view.scored | left)
            if states is None:
                continue
            uniforms = torch.zeros(len(states.states), device=policy.device)  # these ranks do not read them
            scores = torch.full(left.shape, torch.nan, device=policy.device).flatten()
            scores[states.plan.flat_index] = rank_positions(policy, states.states, uniforms, part.sampling_params, rank)
            scores = scores.view(left.shape)
            best_left = scores.masked_fill(~left, -torch.inf).amax(-1, keepdim=True)
            worse[chunk.rows, chunk.columns] |= view.scored & (scores < best_left - tolerance)
    return worse


def _compare(
    policy: Policy,
    rollout: Rollout,
    report: TraceReport,
    faults: list[Fault],
    is_order: Bool[Tensor, " B"],
    micro_batch_size: int | None,
) -> TraceReport:
    """Add the differences of the log-probs, by step and position, and what explains them.

    Rows without `is_order` have an order that the policy does not choose. Where the other rows agree, that is their
    fault, and they are left out; else other weights have moved the order too.
    """
    record, model = replayed(policy, rollout, micro_batch_size=micro_batch_size)
    difference, mask = record - model, rollout.completion_mask
    not_finite = mask & ~difference.isfinite()
    faults += _faults([("nonfinite", not_finite, "a log-prob is not a finite number")])
    mask = mask & ~not_finite
    in_order = mask & is_order[:, None]
    if not is_order.all() and in_order.any() and difference[in_order].abs().mean() <= report.bound:
        mask, report = in_order, replace(report, num_compared=int(is_order.sum()))
    step = rollout.unmask_step if policy.spec.attention != "causal" else torch.full_like(rollout.unmask_step, -1)
    position = rollout.completion_mask.long().cumsum(-1) - 1
    parts = [*_parts("step", step, difference, mask), *_parts("position", position, difference, mask)]
    report = replace(report, total=_part("all", difference[mask]), parts=tuple(parts))
    rewrites = rollout.events is not None or rollout.renoised is not None
    if not report.differs or report.total.num_tokens < MIN_TOKENS or rewrites:
        return report
    if rollout.order is not None and rollout.order.logprobs is not None:  # an explanation does not include the order
        record, model = replayed(policy, rollout, include_order=False, micro_batch_size=micro_batch_size)
    explanations = _shifts(record, model, mask)
    explanations += _explain(policy, rollout, mask, micro_batch_size)
    return replace(report, explanations=tuple(sorted(explanations, key=lambda each: each.mean_abs)))


def _part(name: str, difference: Float[Tensor, " N"]) -> Part:
    absolute = difference.abs()
    if not len(absolute):
        return Part(name, 0, math.nan, math.nan)
    return Part(name, len(absolute), absolute.mean().item(), absolute.max().item())


def _parts(
    name: str, index: Int[Tensor, "B T"], difference: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"]
) -> list[Part]:
    """Return the differences of at most MAX_PARTS ranges of an index of equal width."""
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


def _shifts(record: Float[Tensor, "B T"], model: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"]) -> list[Explanation]:
    """Return what is left if each position has the log-prob of the token before it, or after it."""
    explanations = []
    for offset, setting in ((1, "one position too late"), (-1, "one position too early")):
        both = mask & mask.roll(-offset, -1)
        both[:, -1 if offset == 1 else 0] = False  # a roll goes around
        if both.any():
            left = (record.roll(-offset, -1) - model)[both].abs().mean().item()
            explanations.append(Explanation("shift", setting, left))
    return explanations


def _explain(
    policy: Policy, rollout: Rollout, mask: Bool[Tensor, "B T"], micro_batch_size: int | None
) -> list[Explanation]:
    """Return the best temperature and the best filters, fitted on some tokens spread over the trace."""
    limit = min(MAX_TOKENS, max(MIN_TOKENS, MAX_LOGITS // policy.vocab_size))
    chosen = mask.flatten().nonzero()[:, 0]
    chosen = chosen[:: -(-len(chosen) // limit)]
    at = torch.zeros_like(mask).flatten().index_fill(0, chosen, True).view(mask.shape)
    views = _estimator(policy, include_order=False).draw_views(rollout, Generator().manual_seed(0))
    logits, tokens, record = [], [], []
    for chunk in row_chunks(rollout, views, micro_batch_size):
        part, part_views = chunk.of(rollout, views)
        for view in each_view(part_views):
            states = view.run(policy, part, view.scored & at[chunk.rows][:, chunk.columns])
            if states is not None:
                logits.append(policy.head(states.states).float())
                tokens.append(states.tokens)
                record.append(part.logprobs.flatten()[states.plan.flat_index])
    drawn = torch.cat(logits), torch.cat(tokens), torch.cat(record)
    params = rollout.sampling_params
    explanations = [_best_temperature(*drawn, params)]
    if params.filters:
        left = (drawn[2] - _logprobs(*drawn[:2], replace(params, top_k=None, top_p=None))).abs().mean().item()
        return [*explanations, Explanation("filters", "the distribution before the recorded filters", left)]
    return [*explanations, *_best_filters(*drawn, params)]


def _logprobs(logits: Float[Tensor, "N V"], tokens: Int[Tensor, " N"], params: SamplingParams) -> Float[Tensor, " N"]:
    return process(logits, params, tokens).log_softmax(-1).gather(-1, tokens[:, None])[:, 0]


def _best_temperature(
    logits: Float[Tensor, "N V"], tokens: Int[Tensor, " N"], record: Float[Tensor, " N"], params: SamplingParams
) -> Explanation:
    """Fit the temperature from 0.05 to 20: the best of a grid, then a golden-section search around it."""

    def left(log_temperature: float) -> float:
        at = replace(params, temperature=math.exp(log_temperature))
        return (record - _logprobs(logits, tokens, at)).abs().mean().item()

    grid = torch.linspace(math.log(0.05), math.log(20), 31, dtype=torch.float64).tolist()
    best = min(grid, key=left)
    found = _golden_section(left, best - (grid[1] - grid[0]), best + (grid[1] - grid[0]))
    return Explanation("temperature", f"{math.exp(found):.3g}", left(found))


def _golden_section(f: Callable[[float], float], low: float, high: float) -> float:
    """Return the smallest point of a function that falls and then rises, to 1e-4."""
    ratio = (math.sqrt(5) - 1) / 2
    while high - low > 1e-4:
        a, b = high - ratio * (high - low), low + ratio * (high - low)
        low, high = (low, b) if f(a) <= f(b) else (a, high)
    return (low + high) / 2


def _best_filters(
    logits: Float[Tensor, "N V"], tokens: Int[Tensor, " N"], record: Float[Tensor, " N"], params: SamplingParams
) -> list[Explanation]:
    """Fit top-k, then top-p, each without the other: -d is the log of the mass that the filter left, and d at least 0.

    A filter that would have removed a drawn token explains nothing.
    """
    logp = process(logits, params).log_softmax(-1)
    drawn_logp = logp.gather(-1, tokens[:, None])
    ladder, index = logp.sort(dim=-1, descending=True, stable=True)
    mass = ladder.exp().double().cumsum(-1)
    rank = (index == tokens[:, None]).long().argmax(-1)
    target = (record[:, None] - drawn_logp).double()  # (N, 1): d
    explanations = []
    # Tokens that tie with the k-th stay too, but fp32 logits seldom tie.
    left = (target + mass.clamp(max=1).log()).abs().mean(0)
    smallest = int((logp > drawn_logp).sum(-1).max()) + 1
    k = smallest + int(left[smallest - 1 :].argmin())
    explanations.append(Explanation("filters", f"top_k={k}", left[k - 1].item()))
    shown = math.exp(-max(target.max().item(), 0.0)) * (1 - 1e-6)  # the smallest mass left is at least top_p
    best = Explanation("filters", "top_p=1", math.inf)
    before = mass - ladder.exp().double()  # of the likelier tokens
    for top_p in (*TOP_P, shown):
        kept = (before < top_p).sum(-1).clamp(min=1)
        if (rank < kept).all():
            remainder = (target[:, 0] + mass.gather(-1, kept[:, None] - 1)[:, 0].clamp(max=1).log()).abs().mean().item()
            if remainder < best.mean_abs:
                best = Explanation("filters", f"top_p={top_p:.4g}", remainder)
    return [*explanations, best] if math.isfinite(best.mean_abs) else explanations


def report_table(report: TraceReport) -> Table:
    """Return the report as a table: the log-probs, what was tried to explain them, and the checks of the steps."""
    title = f"trace of {report.num_rows} rows, {report.num_compared} replayed; d = recorded - replayed, nats"
    shown = Table(title=literal(title, style="table.title"), title_justify="left", **NARROW)
    shown.add_column("what", no_wrap=True)
    for name in ("tokens", "mean |d|", "max |d|"):
        shown.add_column(name, justify="right", no_wrap=True)
    shown.add_column("finding", overflow="fold")
    for part in (report.total, *report.parts):
        numbers = ("", "") if not part.num_tokens else (f"{part.mean_abs:.2e}", f"{part.max_abs:.2e}")
        finding = ""
        if part is report.total:
            finding = f"above {report.bound:g}" if report.differs else f"within {report.bound:g}"
            finding = finding if part.num_tokens else "not compared"
        shown.add_row(literal(part.name), str(part.num_tokens), *numbers, finding)
    for each in report.explanations:
        finding = f"{'explains' if report.fits(each) else 'does not explain'} it: {each.setting}"
        shown.add_row(each.kind, "", f"{each.mean_abs:.2e}", "", literal(finding))
    if report.cause == "weights":
        shown.add_row("weights", "", "", "", "other weights or other tokens: nothing above explains it")
    for kind in (*CHECKS, "nonfinite"):
        faults = [fault for fault in report.faults if fault.kind == kind]
        why = dict(report.unchecked).get(kind)
        for fault in faults:
            shown.add_row(kind, str(fault.count), "", "", literal(f"impossible: {fault.text}"))
        if not faults and kind in CHECKS:
            shown.add_row(kind, "", "", "", literal("possible" if why is None else f"not checked: {why}"))
    return shown


def as_json(report: TraceReport) -> dict[str, Any]:
    """Return the report as a JSON object; a number that is not finite is null."""

    def plain(value: Any) -> Any:
        if isinstance(value, tuple):
            return [plain(each) for each in value]
        if isinstance(value, float):
            return value if math.isfinite(value) else None
        return {name: plain(each) for name, each in vars(value).items()} if hasattr(value, "__dict__") else value

    return plain(report) | {"cause": report.cause, "ok": report.ok, "verdict": report.verdict}
