"""Attribute the training-inference mismatch to causes, by ablation.

A chain of policies leads from the learner to the rollout policy. Each differs from the previous one in one thing, a
possible cause. The changes of the log-probs from one policy to the next add up to log_mismatch, in nats. The policies
in between compute logits in fp32, so that 16-bit heads are a cause of their own.
"""

import copy
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from rich.console import Console
from rich.table import Table
from torch import Generator, Tensor

from dllm_rl.algorithms.mismatch import mismatch_metrics
from dllm_rl.diagnostics.batch_invariance import layer_outputs
from dllm_rl.likelihoods.estimators import Causal, Trajectory, recorded
from dllm_rl.likelihoods.views import each_view
from dllm_rl.models.base import Policy
from dllm_rl.quantization.linear import dequantized_weight
from dllm_rl.quantization.rollout_policy import locate_parameter, quantized_copy, quantized_layers
from dllm_rl.samplers.choose import order_agreement
from dllm_rl.screen import escape_controls, literal
from dllm_rl.types.groups import group_sizes
from dllm_rl.types.rollouts import Prompts, Rollout
from dllm_rl.types.scoring import Views

ADVICE = {
    "precision": "give both sides one dtype for weights, rotary tables and logits",
    "head precision": "compute logits in fp32 on both sides (float32_head=True)",
    "quantized weights": "if unquantized rollouts learn more, keep more bits, or correct (TIS, exact likelihood)",
    "quantized activations": "if unquantized rollouts learn more, quantize weights alone, "
    "or correct (TIS, exact likelihood)",
    "stale weights": "call sync_weights after every update",
    "cache or sampler": "refresh the cache more often, or treat it as off-policy with a corrector",
    "padding": "the model attends to padding or counts it in positions: pass the attention mask on",
    "batch shape": "kernels depend on the batch's shape: set zero_mismatch=True, or accept it as noise",
}
ORDER_ADVICE = (
    "weights of tokens do not correct it; in small models with answers of 16 tokens a cost in reward was not shown, "
    "and is not excluded; to correct INT4 rollouts by weights, compare an order that does not depend on the weights "
    "(rank=RandomOrder(); recipes/studies/quantized/README.md)"
)
NUM_LAYERS = 5  # in a report
PADDING = 3  # columns that are added on the left to measure the effect of padding


@dataclass(frozen=True)
class Cause:
    """The differences d of log-probs that one cause explains.

    Mean and max of |d|, k3 = mean(rho - 1 - log rho) in nats with rho = exp(d), and the effective sample size.
    """

    name: str
    mean_abs: float
    max_abs: float
    k3: float
    ess: float

    @property
    def advice(self) -> str:
        return ADVICE.get(self.name, "")


@dataclass(frozen=True)
class Report:
    """The full mismatch by cause, and the layers with the largest mismatch."""

    scheme: str
    num_tokens: int
    total: Cause
    causes: tuple[Cause, ...]  # by mean |d|
    layers: tuple[tuple[str, float], ...]  # by relative error of their outputs
    # Shares of first-step positions, and of prompts, whose order is the learner's; log-probs do not show the order.
    order: tuple[float, float] | None = None

    @property
    def worst(self) -> float:
        """Return the mean |d| of the full mismatch, or of the largest cause if it is larger, in nats."""
        return max(self.total.mean_abs, self.causes[0].mean_abs)

    @property
    def verdict(self) -> str:
        first = self.causes[0]
        order = ""
        if self.order is not None and self.order[1] < 1:
            moved = f"{1 - self.order[1]:.0%} of the prompts begin in another order than the learner's own"
            order = f" Order: {moved}; {ORDER_ADVICE}."
        if self.worst < 1e-5:
            return f"No mismatch worth a correction: mean |d| is {self.worst:.1e} nats.{order}"
        share = f"mean |d| {first.mean_abs:.2g} of {self.worst:.2g} nats in all"
        return f"Mostly {first.name}: {share}. To do: {first.advice}.{order}"


@dataclass(frozen=True)
class Comparison:
    """Two policies to compare, and the rollout that both score.

    Args:
        policy: Policy of the learner.
        rollout_policy: Policy that sampled.
        config: Quantization of the rollout policy; None: none.
        rollout: Rollout to score.
        views: Masks under which it is scored.
        score: Function (policy, rollout, views) -> log-probs (B, T) in nats.
    """

    policy: Policy
    rollout_policy: Policy
    config: Any
    rollout: Rollout
    views: Views
    score: Callable[..., Tensor]

    def logprobs(self, policy: Policy) -> Float[Tensor, "B T"]:
        """Return the rollout's log-probs under a policy."""
        return self.score(policy, self.rollout, self.views)


def diagnose(
    policy: Policy,
    config: Any = None,
    *,
    prompts: Prompts,
    sampler: Callable,
    rollout_policy: Policy | None = None,
    micro_batch_size: int | None = None,
    seed: int = 0,
) -> Report:
    """Attribute the mismatch of rollout and learner to its causes.

    Call it if a run's mismatch metrics are large. It samples completions of `prompts` as a run would, and splits
    log_mismatch = logp_learner - logp_rollout, in nats, into the parts due to each cause.

    Args:
        policy: Policy of the learner.
        config: Quantization of the rollout. None (default): the quantization of rollout_policy, or none.
        prompts: Prompts to sample.
        sampler: Sampler of the rollout, with its settings bound.
        rollout_policy: Policy that samples. Pass a run's rollout policy to detect stale weights or another precision.
            None (default): a new copy of the learner, quantized by `config`.
        micro_batch_size: Rows per forward. None (default): all rows.
        seed: Seed of the rollout. Default: 0.

    Returns:
        The causes by mean |d|, the worst layers, and a verdict with advice.

    Raises:
        ValueError: The sampler chose no token.
    """
    config = getattr(rollout_policy, "quantization", None) if config is None else config
    rollout_policy = quantized_copy(policy, config) if rollout_policy is None else rollout_policy
    exact = Causal() if policy.spec.attention == "causal" else Trajectory()
    score = partial(exact.logprobs, micro_batch_size=micro_batch_size)
    rollout = sampler(rollout_policy, prompts, Generator().manual_seed(seed))
    mask = rollout.completion_mask
    views = exact.draw_views(rollout, Generator())
    both = Comparison(policy, rollout_policy, config, rollout, views, score)

    learner = both.logprobs(policy)
    replay = both.logprobs(rollout_policy)
    sampled = recorded(rollout, views) if exact.exact_for_sampler else replay

    steps = forward_steps(both, learner, replay)
    # The replay runs without a cache: its difference from the sampler's record is due to the cache.
    steps["cache or sampler"] = torch.where(mask, replay - recorded(rollout, views), 0)
    # Padding and batch shape are measured only on the learner.
    steps["padding"] = learner - score(policy, *pad_left(rollout, views, policy.pad_id))[:, PADDING:]
    steps["batch shape"] = batch_shape_difference(score, policy, rollout, views)

    causes = [measure(name, step, mask) for name, step in steps.items()]
    shares = [(same / count).item() for same, count in order_agreement(policy, rollout).values()]
    return Report(
        scheme="none" if config is None else repr(config),
        num_tokens=int(mask.sum()),
        total=measure("all", learner - sampled, mask),
        causes=tuple(sorted(causes, key=lambda cause: cause.mean_abs, reverse=True)),
        layers=worst_layers(both),
        order=(shares[0], shares[1]) if shares else None,
    )


def forward_steps(both: Comparison, learner: Tensor, rollout: Tensor) -> dict[str, Tensor]:
    """Return how much each cause in the forward changes the log-probs, from the learner's forward to the rollout's.

    Args:
        both: Both policies and the rollout.
        learner: Log-probs under the learner's forward.
        rollout: Log-probs under the rollout's forward.
    """
    policy, rollout_policy = both.policy, both.rollout_policy
    # All forwards between the two sides have a head in fp32, so that rounding in a head is one separate cause.
    plain = with_head(in_rollout_forward(policy, rollout_policy), float32=True)
    first = learner if policy.float32_head else both.logprobs(with_head(policy, float32=True))
    last = rollout if rollout_policy.float32_head else both.logprobs(with_head(rollout_policy, float32=True))
    states = {"precision": both.logprobs(plain)}
    if both.config is not None:
        rounded_weights, quantized = operands(plain, both.config)
        states["quantized weights"] = both.logprobs(rounded_weights)
        states["quantized activations"] = both.logprobs(quantized)
    states["stale weights"] = last

    steps = {}
    before = first
    for name, after in states.items():
        steps[name] = before - after
        before = after
    steps["head precision"] = (learner - first) + (last - rollout)
    return steps


def batch_shape_difference(
    score: Callable[..., Tensor], policy: Policy, rollout: Rollout, views: Views
) -> Float[Tensor, "B T"]:
    """Return the log-probs of a rollout that is scored in one batch, minus those of one prompt per batch."""
    in_one_batch = score(policy, rollout, views, micro_batch_size=None)
    return in_one_batch - score(policy, rollout, views, micro_batch_size=max(group_sizes(rollout.group)))


def measure(name: str, d: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"]) -> Cause:
    """Summarize a difference of log-probs (nats) over the marked tokens."""
    metrics = mismatch_metrics(d, mask)
    keys = ("abs_log_ratio_mean", "abs_log_ratio_max", "k3_kl", "ess")
    return Cause(name, *(metrics[f"rollout_corr/{key}"] for key in keys))


def with_head(policy: Policy, *, float32: bool) -> Policy:
    """Return a policy that shares all weights, with logits in fp32 or in the weights' dtype."""
    other = copy.copy(policy)  # shallow: the modules and their weights are shared
    other.float32_head = float32
    return other


@torch.no_grad()
def in_rollout_forward(policy: Policy, rollout_policy: Policy) -> Policy:
    """Return a copy of the learner with the rollout policy's dtypes, buffers (rotary tables) and head."""
    plain = quantized_copy(policy, None)
    plain.spec = rollout_policy.spec
    quantized = {locate_parameter(name)[0] for name, _ in quantized_layers(rollout_policy)}
    dtypes = {name: p.dtype for name, p in rollout_policy.module.named_parameters() if name not in quantized}
    distinct_dtypes = set(dtypes.values())
    for name, parameter in plain.module.named_parameters():
        if name in dtypes:
            parameter.data = parameter.data.to(dtypes[name])
        elif name in quantized and len(distinct_dtypes) == 1:  # integer codes do not show the dtype of the computation
            parameter.data = parameter.data.to(*distinct_dtypes)
    for name, buffer in rollout_policy.module.named_buffers():
        owner, _, buffer_name = name.rpartition(".")
        if buffer_name != "weight_scale":  # only quantized layers have scales
            setattr(plain.module.get_submodule(owner), buffer_name, buffer.clone())
    return plain


@torch.no_grad()
def operands(plain: Policy, config: Any) -> tuple[Policy, Policy]:
    """Return two copies of a policy: one with only its weights rounded to quantized values, and one fully quantized."""
    quantized = quantized_copy(plain, config)
    rounded = quantized_copy(plain, None)  # ordinary layers, which do not quantize their inputs
    weights = dict(rounded.module.named_parameters())
    for name, layer in quantized_layers(quantized):
        where, expert = locate_parameter(name)
        (weights[where] if expert is None else weights[where][expert]).copy_(dequantized_weight(layer))
    return rounded, quantized


def pad_left(rollout: Rollout, views: Views, pad_id: int) -> tuple[Rollout, Views]:
    """Return the same batch with PADDING more columns on the left, whose log-probs should be the same."""
    # New columns are neither masked nor scored.
    padded = views.map(lambda x: F.pad(x, (PADDING, 0)) if x.dim() == 3 else x)
    return rollout.padded(PADDING, pad_id=pad_id), padded


def worst_layers(both: Comparison) -> tuple[tuple[str, float], ...]:
    """Return the layers with the largest ||output under the learner - under the rollout|| / ||output||.

    It is measured on at most eight rows of a view.
    """
    tokens = next(each_view(both.views)).inputs_and_targets(both.policy, both.rollout)[0][:8]
    attention_mask = both.rollout.attention_mask[:8]
    rollout_outputs = layer_outputs(both.rollout_policy, tokens, attention_mask)
    errors = {}
    for name, before in layer_outputs(both.policy, tokens, attention_mask).items():
        if name in rollout_outputs:
            after = rollout_outputs[name]
            if before.shape[:2] == tokens.shape:  # outputs at padding are not used
                before, after = before[attention_mask], after[attention_mask]
            before = before.float()
            errors[name] = ((before - after.float()).norm() / before.norm().clamp(min=1e-12)).item()
    return tuple(sorted(errors.items(), key=lambda pair: pair[1], reverse=True)[:NUM_LAYERS])


def tables(report: Report) -> list[tuple[str, tuple[str, ...], list[tuple[str, ...]]]]:
    """Return (title, columns, lines) of each table that the report has numbers for."""
    title = f"log-prob mismatch over {report.num_tokens} tokens, nats; rollout: {report.scheme}"
    lines: list[tuple[str, ...]] = []
    for cause in (report.total, *report.causes):
        # A cause below a hundredth of the mismatch is not worth the work of its advice.
        advice = cause.advice if cause.mean_abs >= report.worst / 100 else ""
        sizes = f"{cause.mean_abs:.2e}", f"{cause.max_abs:.2e}", f"{cause.k3:.1e}", f"{cause.ess:.4f}"
        lines.append((cause.name, *sizes, advice))
    columns: tuple[str, ...] = ("cause", "mean |d|", "max |d|", "k3", "ESS", "to do")
    all_tables = [(title, columns, lines)]
    if report.order is not None:
        positions, prompts = report.order
        title = "order of the first step, shares that are the learner's own"
        advice = ORDER_ADVICE if prompts < 1 else ""
        all_tables.append((title, ("positions", "prompts", "to do"), [(f"{positions:.3f}", f"{prompts:.3f}", advice)]))
    lines = [(name, f"{error:.2e}") for name, error in report.layers]
    all_tables.append(("worst layers, relative error of their outputs", ("layer", "error"), lines))
    return all_tables


def write_doctor(report: Report, *, as_json: bool = False) -> None:
    """Print the report, as tables or as JSON."""
    if as_json:
        print(json.dumps(asdict(report) | {"verdict": report.verdict}, indent=2))
        return
    console = Console()
    for title, columns, lines in tables(report):
        table = Table(*columns, title=literal(title, style="table.title"), title_justify="left")
        for line in lines:
            table.add_row(*map(literal, line))
        console.print(table)
    console.print(escape_controls(report.verdict), markup=False)
