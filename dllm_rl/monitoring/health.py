"""Decide whether a run learns: the mismatch of a step in one word, and the problems of the last steps."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean

# Bounds of the effective sample size. AIS reports 0.95 early in training, and 0.70 late without correction [digest].
MILD = 0.95
STRONG = 0.70
BACKWARDS = 0.005  # a larger C (see `health`), averaged over tokens, is not noise [ours]
SIGNS = {"positive": "A>0", "negative": "A<0"}
WINDOW = 20  # steps over which `learning_problems` looks
FEW_MIXED, SOME_MIXED = 0.1, 0.3  # shares of mixed groups below which a run does not learn, and learns slowly [ours]
SOME_TAKEN = 0.5  # share of updates that are taken, below which a run learns slowly [ours]
ALL_CUT = 0.95  # share of cut completions from which they may be the cause [ours]
CLEAR = 3.0  # standard errors by which a reward must have risen [ours]
EQUAL_GROUPS = ("frac_reward_zero_std", "dynamic_sampling/frac_reward_zero_std")  # as drawn first, and in the end
DIRECTION = "update/direction"  # cosine between advantages and changes of log-prob, measured after some updates
# Threshold of the mean of DIRECTION_WINDOW consecutive values. In six small runs of 20 or 30 steps its minimum was
# -0.22 with the right sign of the loss, and -0.37 to -0.81 with the wrong sign [ours].
BACKWARDS_MEAN = -0.25
DIRECTION_WINDOW = 3


def health(
    metrics: dict[str, float], *, direction: float = 0.0, first_ess: float | None = None
) -> tuple[str, str] | None:
    """Return (word, reason) for a step; None if nothing was measured.

    The word is the first that applies of backwards, backfiring, strong, mild, healthy. If ratios are only estimated,
    "estimated" replaces the last three, because their bounds are for exact ratios.

    Args:
        metrics: Metrics of the step.
        direction: Mean of the last DIRECTION_WINDOW values of `update/direction`. Default: 0.
        first_ess: ESS of the run's first step, if ratios are estimated. None (default): they are exact.
    """
    if direction < BACKWARDS_MEAN:
        trend = f"{DIRECTION} {direction:.2g} on average of {DIRECTION_WINDOW}"
        return (
            "backwards",
            f"worse answers become likelier, {trend}: is the sign of the loss or of the advantages wrong?",
        )
    ess = metrics.get("rollout_corr/ess")
    if ess is None:
        return None
    contributions = {
        name: value for name, value in metrics.items() if name.startswith("off_policy/") and "/contribution_" in name
    }
    largest_name = max(contributions, key=contributions.__getitem__, default="")
    largest = contributions.get(largest_name, 0.0)
    if first_ess is not None:
        verdict, bound = "estimated", f", {first_ess:.3g} in the first step"
    else:
        verdict = "strong" if ess < STRONG else "mild" if ess < MILD else "healthy"
        bound = {"strong": f" below {STRONG}", "mild": f" below {MILD}"}.get(verdict, "")
    reasons = [f"ESS {ess:.3g}{bound}"]
    if contributions:
        _, base, sign, *_ = largest_name.replace("contribution_", "").split("/")
        baseline = {"old": "the step's start", "rollout": "the rollout"}[base]
        # C = mean of -(r - 1) A over the tokens with one sign of A. If it is above 0, ratios move against their
        # advantages, which the KL estimates k1 and k3 may not show (VeXact [digest]). On 4x4 Sudoku (seed 0) 30 of 60
        # five-level steps backfire without a corrector, and none of 120 unquantized or FP8 steps [ours].
        if largest > BACKWARDS:
            verdict = "backfiring"
            reasons.insert(0, f"C {largest:+.2g} ({SIGNS[sign]}, against {baseline}) above {BACKWARDS}")
        elif first_ess is None:
            reasons.append(f"C at most {largest:+.2g} ({SIGNS[sign]}, against {baseline})")
    return verdict, ", ".join(reasons)


@dataclass(frozen=True)
class Problem:
    """Something that keeps a run from learning.

    name   what it is, in a few words; a run warns of each name and state once.
    state  what it means for the run: "not learning", "learning slowly", or "solved or stuck".
    text   what was seen, and what to do.
    """

    name: str
    state: str
    text: str


def mixed_share(metrics: Mapping[str, float]) -> float | None:
    """Return the share of a step's groups whose rewards are not all equal; the others have no advantages. None:
    unknown, as in supervised fine-tuning.
    """
    equal = [metrics[name] for name in EQUAL_GROUPS if name in metrics]
    return 1.0 - min(equal) if equal else None


def learning_problems(rows: Sequence[Mapping[str, float]]) -> list[Problem]:
    """Return what keeps a run from learning, the worst first, from the metrics of its steps so far; [] before WINDOW
    steps. Only the first and the last WINDOW rows are looked at.
    """
    recent = rows[-WINDOW:]
    if len(recent) < WINDOW:
        return []
    found = (equal_rewards(rows), no_gradient(recent), skipped_updates(recent), cut_completions(rows))
    problems = [problem for problem in found if problem]
    return sorted(problems, key=lambda problem: problem.state == "learning slowly")


def equal_rewards(rows: Sequence[Mapping[str, float]]) -> Problem | None:
    """Return the problem that few groups of the last steps have unequal rewards, unless others teach something, too."""
    recent = rows[-WINDOW:]
    shares = [share for row in recent if (share := mixed_share(row)) is not None]
    if not shares or teaches_equal_groups(recent) or (mixed := fmean(shares)) >= SOME_MIXED:
        return None
    num_idle = sum(row.get("grad_norm") == 0 for row in recent)
    groups = f"only {100 * mixed:.2g} % of the groups" if mixed else "no group"
    seen = f"in the last {WINDOW} steps {groups} had unequal rewards, and equal ones teach nothing"
    if num_idle:
        seen += f"; the gradient was 0 in {num_idle} of them"
    rewards = [row["reward"] for row in recent if "reward" in row]
    is_constant = mixed == 0 and len(rewards) == WINDOW and len(set(rewards)) == 1
    if is_constant:
        name, seen = "constant reward", f"{seen}; the mean reward was always {rewards[0]:.4g}"
        remedy = "see whether the reward function looks at the completions, or take other prompts"
    else:
        name = "few mixed groups"
        remedy = "raise the temperature, take prompts of middle difficulty (prompt_source=MixedRewardPrompts()), or "
        remedy += "grade in parts"
        remedy = remedy if mixed else f"see whether the reward function looks at the completions, {remedy}"
    if risen := has_risen(rows):
        text = f"{seen}; {risen}: stop the run if the task is solved; otherwise {remedy}"
        return Problem(name, "solved or stuck", text)
    is_dead = mixed < FEW_MIXED or 2 * num_idle >= WINDOW
    text = f"{seen}: {remedy}; if the task was solved from the start, take another one"
    return Problem(name, "not learning" if is_dead else "learning slowly", text)


def teaches_equal_groups(rows: Sequence[Mapping[str, float]]) -> bool:
    """Return whether a run also learns without mixed groups: from stored answers, or because its advantages
    compare more than a group, so that there are some in a step without a mixed group.
    """
    return any(
        row.get("replay/updates") or (mixed_share(row) == 0 and ("band/positive" in row or "band/negative" in row))
        for row in rows
    )


def no_gradient(recent: Sequence[Mapping[str, float]]) -> Problem | None:
    """Return the problem that steps which could teach something have no gradient."""
    able = [row for row in recent if "grad_norm" in row and mixed_share(row) != 0 and not row.get("replay/updates")]
    num_idle = sum(row["grad_norm"] == 0 for row in able)
    if 2 * len(able) < WINDOW or 2 * num_idle < len(able):
        return None
    seen = f"the gradient was 0 in {num_idle} of the last {len(able)} steps"
    if mixed_share(able[-1]) is not None:
        seen += " with mixed groups"
    remedy = "see clip_ratio/region_mean and trained/rollout_rs_masked_fraction, and whether the loss reads its inputs"
    return Problem("zero gradient", "not learning", f"{seen}: {remedy}")


def skipped_updates(recent: Sequence[Mapping[str, float]]) -> Problem | None:
    """Return the problem that features of the run skip most of the updates that have a gradient."""
    able = [row for row in recent if row.get("grad_norm")]
    total = sum(max(1, sum(name.startswith("grad_norm/iteration_") for name in row)) for row in able)
    skipped = round(sum(row.get("skipped_updates", 0) for row in able))
    if 2 * len(able) < WINDOW or (taken := 1 - skipped / total) >= SOME_TAKEN:
        return None
    text = f"{skipped} of the last {total} updates with a gradient were skipped: see what before_update compares"
    return Problem("skipped updates", "learning slowly" if taken >= FEW_MIXED else "not learning", text)


def cut_completions(rows: Sequence[Mapping[str, float]]) -> Problem | None:
    """Return the problem that nearly all completions are cut, if few groups are mixed, few answers are found, and the
    reward has not risen: answers of a fixed length are cut, too.
    """
    recent = rows[-WINDOW:]
    means = {
        name: fmean([row[name] for row in recent if name in row] or [math.nan])
        for name in ("completions/clipped_ratio", "parsed")
    }
    cut, parsed = means.values()
    few_mixed = equal_rewards(rows)
    if not cut >= ALL_CUT or has_risen(rows) or not (few_mixed or parsed < 0.5):
        return None
    text = (
        f"in the last {WINDOW} steps {100 * cut:.3g} % of the completions were cut at max_new_tokens: raise it, and "
        "diffusion_steps with it, unless your answers have a fixed length"
    )
    return Problem("cut completions", few_mixed.state if few_mixed else "learning slowly", text)


def has_risen(rows: Sequence[Mapping[str, float]]) -> str:
    """Say that the reward has clearly risen since the first steps; "" if it has not."""
    count = min(WINDOW, len(rows) // 2)
    first, last = ([row["reward"] for row in part if "reward" in row] for part in (rows[:count], rows[-count:]))
    if len(first) < 2 or len(last) < 2:
        return ""
    error = math.sqrt(noise(first) / len(first) + noise(last) / len(last))
    rise = fmean(last) - fmean(first)
    return f"the reward rose from {fmean(first):.3g} to {fmean(last):.3g}" if rise > CLEAR * error else ""


def noise(values: Sequence[float]) -> float:
    """Return the variance of two or more values around their trend, from the differences of neighbors."""
    return fmean((after - before) ** 2 for before, after in pairwise(values)) / 2
