"""A step's mismatch in one word, and why."""

MILD = 0.95  # ESS that AIS reports early in training [digest]
STRONG = 0.70  # and late without correction [digest]
BACKWARDS = 0.005  # largest contribution of a sign of A, averaged over tokens, that may be noise [ours]
SIGNS = {"positive": "A>0", "negative": "A<0"}
EQUAL_REWARD_STEPS = 20  # steps in a row without a group whose rewards differ
DIRECTION = "update/direction"  # cosine of advantages and changes of log-prob, measured after some updates
# Mean of MEASURED values in a row. In six small runs of 20 or 30 steps its least was -0.22 with a loss of the right
# sign, and -0.37 to -0.81 with one of the wrong sign [ours].
BACKWARDS_MEAN = -0.25
MEASURED = 3


def health(
    metrics: dict[str, float], *, direction: float = 0.0, first_ess: float | None = None
) -> tuple[str, str] | None:
    """(word, reason) of a step: the first of backwards, backfiring, strong, mild, healthy that holds; None where
    nothing was measured. Of estimated ratios "estimated" in place of the last three, whose bounds are of exact ones.

    Args:
        direction: Mean of the last MEASURED values of `update/direction`.
        first_ess: Of estimated ratios: the ESS of the run's first step; None: the ratios are exact.
    """
    if direction < BACKWARDS_MEAN:
        trend = f"{DIRECTION} {direction:.2g} on average of {MEASURED}"
        return (
            "backwards",
            f"worse answers become likelier, {trend}: is the sign of the loss or of the advantages wrong?",
        )
    ess = metrics.get("rollout_corr/ess")
    if ess is None:
        return None
    moved = {n: v for n, v in metrics.items() if n.startswith("off_policy/") and "/contribution_" in n}
    worst = max(moved, key=moved.__getitem__, default="")
    highest = moved.get(worst, 0.0)
    if first_ess is not None:
        word, bound = "estimated", f", {first_ess:.3g} in the first step"
    else:
        word = "strong" if ess < STRONG else "mild" if ess < MILD else "healthy"
        bound = {"strong": f" below {STRONG}", "mild": f" below {MILD}"}.get(word, "")
    reasons = [f"ESS {ess:.3g}{bound}"]
    if moved:
        _, base, sign, *_ = worst.replace("contribution_", "").split("/")
        against = {"old": "the step's start", "rollout": "the rollout"}[base]
        # C = -(r - 1) A of one sign of A: ratios move against their advantages. K1 and K3 can stay flat meanwhile
        # (VeXact [digest]). On 4x4 Sudoku (seed 0) 30 of 60 five-level steps backfire without a corrector, and none
        # of 120 unquantised or FP8 steps [ours].
        if highest > BACKWARDS:
            word = "backfiring"
            reasons.insert(0, f"C {highest:+.2g} ({SIGNS[sign]}, against {against}) above {BACKWARDS}")
        elif first_ess is None:
            reasons.append(f"C at most {highest:+.2g} ({SIGNS[sign]}, against {against})")
    return word, ", ".join(reasons)
