"""Summarize the mismatch of a step in one word, with the reason."""

# Bounds of the effective sample size. AIS reports 0.95 early in training, and 0.70 late without correction [digest].
MILD = 0.95
STRONG = 0.70
BACKWARDS = 0.005  # a larger C (see `health`), averaged over tokens, is not noise [ours]
SIGNS = {"positive": "A>0", "negative": "A<0"}
EQUAL_REWARD_STEPS = 20  # after this many steps in a row in which each group's rewards were equal, a run warns
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
