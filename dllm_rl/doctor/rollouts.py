"""Do the sampler and quantized copies of the model write what the learner scores?"""

import math
from typing import Any

import torch

from dllm_rl.decoding.texts import decode
from dllm_rl.diagnostics.trace_check import check_trace, replayed
from dllm_rl.doctor.mismatch import (
    ADVICE,
    Comparison,
    batch_shape_difference,
    measure,
    worst_layers,
)
from dllm_rl.doctor.subject import Finding, Subject, bits_of, is_stock
from dllm_rl.likelihoods.estimators import Causal, Trajectory
from dllm_rl.monitoring.health import MILD, STRONG
from dllm_rl.quantization.rollout_policy import quantized_copy
from dllm_rl.quantization.schemes import (
    Float8Dynamic,
    Float8WeightOnly,
    Int4Packed,
    Int4WeightOnly,
    Int8Dynamic,
    Int8WeightOnly,
    Scheme,
    check_scheme,
)
from dllm_rl.samplers.choose import order_agreement
from dllm_rl.screen import escape_controls, line_of

FOUR_BITS = ("Int4WeightOnly", "Int4Packed", "NVFP4", "MXFP4")
# Options of a recipe that correct the rollouts of four bits, by the model's attention.
EXACT = "--likelihood Trajectory --likelihood.num_segments none --corrector TIS"
CORRECTION = dict.fromkeys(("full", "block_causal"), f"--sampler.rank RandomOrder {EXACT}")
CORRECTION |= {"encoder_decoder": EXACT, "causal": "--corrector TIS"}
SCHEMES = (
    Float8WeightOnly(),
    Float8Dynamic(),
    Int8WeightOnly(),
    Int8Dynamic(),
    Int4WeightOnly(),
    Int4Packed(),
)
# Mean |difference of log-probs| in nats that rounding may cause between a sampler's forward and a replay, by the bits
# of the weights: 16 bits round to 3 digits, 32 bits to 7, and a log-prob adds up thousands of products.
REPLAY_BOUND = {16: 0.02, 32: 1e-3, 64: 1e-3}
RATIO_BOUND = 1.1  # a ratio outside [1 / 1.1, 1.1] has used up half of PPO's clip range of 0.2 by rounding alone
# Share of tokens outside of it. One in a hundred that is off by a tenth changes the ESS by 0.0001; more of them act as
# a mismatch that no setting of the run explains.
RATIO_SHARE = 0.01


def sampler_section(subject: Subject) -> Finding:
    """Complete prompts, show a completion, and replay the steps of the others: the log-probs must be the recorded."""
    policy, prompts = subject.policy, subject.prompts
    rollout, seconds = subject.sampled
    bound = REPLAY_BOUND[bits_of(policy)]
    report = check_trace(policy, rollout, bound=bound)
    greedy = subject.sampler.greedy()(policy, prompts.rows(torch.tensor([0])), subject.generator("greedy"))
    prompt = policy.tokenizer.decode(prompts.tokens[0, prompts.attention_mask[0]].tolist(), skip_special_tokens=False)
    shown = (
        f"prompt:      {escape_controls(prompt)}",
        f"at temp. 0:  {escape_controls(decode(policy, greedy)[0])}",
        f"at temp. 1:  {escape_controls(decode(policy, rollout)[0])}",
    )
    numbers = {
        "rows": report.num_rows,
        "tokens": report.total.num_tokens,
        "forwards": rollout.forwards,
        "seconds_per_forward": seconds,
        "replay_abs_mean": report.total.mean_abs,
        "replay_abs_max": report.total.max_abs,
        "faults": {fault.kind: fault.count for fault in report.faults},
    }
    line = f"{report.num_rows} completions, {rollout.forwards} forwards of {seconds:.3g} s; {report.verdict}"
    if report.ok:
        advice = "read the completions: if they are not answers, rewards will be near 0, so train supervised first"
        return Finding("ok", line, advice, "", numbers, shown)
    if not report.differs and all(fault.kind == "order" for fault in report.faults):
        advice = (
            "positions that are nearly tied change places with the batch's shape: a ratio of the order is then noise"
        )
        return Finding("look", line, advice, "order", numbers, shown)
    advice = "the learner scores other log-probs than the sampler recorded: do not train with this model; report it"
    return Finding("wrong", line, advice, "replay", numbers, shown)


def quantized_section(subject: Subject) -> Finding:
    """Sample with a quantized copy for each scheme, and measure its mismatch with the model.

    - ok: The ESS of tokens is at least MILD (0.95), the bound of AIS for rollouts that need no correction, and the ESS
      of completions at least STRONG (0.70).
    - look: It is below. The scheme works, and costs something.
    - wrong: A log-prob is not finite, or the scheme raised an error.
    """
    policy = subject.policy
    _, own_seconds = subject.sampled
    found: dict[str, dict[str, Any]] = {}
    shown = [
        "d: difference of the log-probs of copy and model, in nats; ESS: effective sample size of the tokens and of "
        f"whole completions, 1 if copy and model agree, ok from {MILD} and {STRONG} on",
        "same order: share of the prompts in whose first step both write the same positions; seconds of a forward, "
        f"{own_seconds:.3g} unquantized",
        f"{'':16}  verdict  mean |d|  ESS tokens  ESS compl.  same order  s/forward",
    ]
    for scheme in SCHEMES if subject.schemes is None else subject.schemes:
        # A scheme of the user's own has a name of theirs, which is not for the report.
        name = type(scheme).__name__ if type(scheme).__module__ == Scheme.__module__ else "own scheme"
        try:
            check_scheme(scheme, policy.device, next(policy.module.parameters()).dtype)
        except ValueError as error:
            if subject.schemes is not None:
                raise
            found[name] = {"verdict": "not run"}
            shown.append(f"{name:16}  not run: {line_of(error)}")
            continue
        if policy.device.type == "cuda":
            torch.cuda.empty_cache()  # of the scheme before
        try:
            numbers = measured_scheme(subject, scheme)
        except (ValueError, RuntimeError) as error:  # one scheme must not hide the others
            found[name] = {"verdict": "wrong", "error": type(error).__name__}
            shown.append(f"{name:16}  wrong    {line_of(error)}")
            continue
        found[name] = numbers
        order = "-" if numbers["same_order"] is None else f"{numbers['same_order']:.2f}"
        shown.append(
            f"{name:16}  {numbers['verdict']:7}  {numbers['abs_mean']:8.4f}  {numbers['ess_tokens']:10.4f}  "
            f"{numbers['ess_completions']:10.3f}  {order:>10}  {numbers['seconds_per_forward']:.3g}"
        )
        layers = ", ".join(f"{layer} {error:.1%}" for layer, error in numbers["worst_layers"][:3])
        shown.append(f"{'':16}  largest errors of outputs: {layers}")
    return judge_schemes(
        found, {"schemes": found, "seconds_per_forward": own_seconds}, tuple(shown), policy.spec.attention
    )


def judge_schemes(
    found: dict[str, dict[str, Any]], numbers: dict[str, Any], shown: tuple[str, ...], attention: str
) -> Finding:
    """Return the verdict of the worst scheme, and name those that can be used as they are."""
    by_verdict: dict[str, list[str]] = {}
    for name, each in found.items():
        by_verdict.setdefault(each["verdict"], []).append(name)
    fine, low, wrong = (by_verdict.get(verdict, []) for verdict in ("ok", "look", "wrong"))
    line = "; ".join(
        f"{what}: {', '.join(names)}"
        for what, names in (("as the model", fine), ("low ESS", low), ("failed", wrong))
        if names
    )
    if not line:
        return Finding("look", "no scheme runs on this device", "sample unquantized", "none", numbers, shown)
    advice = []
    if wrong:
        advice.append(f"do not sample with {' or '.join(wrong)}")
    if low:
        unquantized = "sample unquantized (--rollout_quantization none)"
        instead = f"take {' or '.join(fine)}, or {unquantized}" if fine else unquantized
        advice.append(f"rollouts of {' and '.join(low)} differ much from the model's own: {instead}")
        if four_bits := [name for name in low if name in FOUR_BITS]:
            advice.append(
                f"if you need {' or '.join(four_bits)}, compare no correction with these options of the training "
                f"command, which are slow for many denoising steps: {CORRECTION[attention]} (docs/mismatch.md)"
            )
        if eight_bits := [name for name in low if name not in FOUR_BITS]:
            advice.append(
                f"if you need {' or '.join(eight_bits)}, train a hundred steps with it and a hundred with "
                "--rollout_quantization none, and compare eval/reward"
            )
    verdict = "wrong" if wrong else "look" if low else "ok"
    return Finding(verdict, line, "; ".join(advice), "error" if wrong else "low ESS" if low else "", numbers, shown)  # type: ignore[arg-type]


def measured_scheme(subject: Subject, scheme: Any) -> dict[str, Any]:
    """Return the verdict and the numbers of one scheme; its copy of the weights is gone afterwards."""
    policy = subject.policy
    copy = quantized_copy(policy, scheme)
    rollout, seconds = subject.sample(copy)
    recorded, learner = replayed(policy, rollout)
    mask = rollout.completion_mask
    log_mismatch = torch.where(mask, learner - recorded, 0)
    tokens = measure("all", log_mismatch, mask)
    rows = mask.any(-1, keepdim=True)
    # One weight for each completion: the product of its tokens' ratios.
    completions = measure("completions", log_mismatch.double().sum(-1, keepdim=True), rows)
    nonfinite = 1 - log_mismatch[mask].isfinite().double().mean().item()
    exact = Causal() if policy.spec.attention == "causal" else Trajectory()
    views = exact.draw_views(rollout, subject.generator("views"))
    both = Comparison(policy, copy, copy.quantization, rollout, views, exact.logprobs)
    layers = [(name if is_stock(policy) else "own layer", error) for name, error in worst_layers(both)]
    order = [(same / count).item() for same, count in order_agreement(policy, rollout).values()]
    verdict = verdict_of(tokens.ess, completions.ess)
    return {
        "verdict": "wrong" if nonfinite else verdict,
        "abs_mean": tokens.mean_abs,
        "abs_max": tokens.max_abs,
        "k3": tokens.k3,
        "ess_tokens": tokens.ess,
        "ess_completions": completions.ess,
        "completions": int(rows.sum()),
        "same_order": order[-1] if order else None,
        "nonfinite": nonfinite,
        "seconds_per_forward": seconds,
        "worst_layers": layers,
    }


def verdict_of(ess_tokens: float, ess_completions: float) -> str:
    """Return "ok" if neither effective sample size is below its bound, else "look"."""
    return "ok" if ess_tokens >= MILD and ess_completions >= STRONG else "look"


def batch_section(subject: Subject) -> Finding:
    """Score the model's own rollout in one batch and in small ones, and compare the log-probs."""
    policy = subject.policy
    rollout, _ = subject.sampled
    exact = Causal() if policy.spec.attention == "causal" else Trajectory()
    views = exact.draw_views(rollout, subject.generator("views"))
    difference = batch_shape_difference(exact.logprobs, policy, rollout, views)
    mask = rollout.completion_mask
    tokens = measure("batch shape", difference, mask)
    share = (difference[mask].abs() > math.log(RATIO_BOUND)).double().mean().item()
    numbers = {"share_outside": share, "abs_mean": tokens.mean_abs, "abs_max": tokens.max_abs, "ess": tokens.ess}
    line = f"scored in smaller batches, {share:.2%} of the tokens have a ratio outside [{1 / RATIO_BOUND:.2f}, "
    line += f"{RATIO_BOUND}]; the mean |d| is {tokens.mean_abs:.2g}, the largest {tokens.max_abs:.2g} nats"
    if share <= RATIO_SHARE:
        return Finding("ok", line, numbers=numbers)
    return Finding("look", line, ADVICE["batch shape"], "batch shape", numbers)
