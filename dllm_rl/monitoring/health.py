"""A step's mismatch in one word, and why."""

MILD, STRONG = 0.95, 0.70  # ESS that AIS reports early in training, and late where nothing is corrected [digest]
BACKWARDS = 0.005  # largest contribution of a sign of A, averaged over tokens, that still passes for noise [ours]
SIGNS = {"positive": "A>0", "negative": "A<0"}


def health(metrics: dict[str, float]) -> tuple[str, str] | None:
    """(word, reason) of a step; None without mismatch metrics.

    strong, mild  ESS of the raw ratios old / rollout over all rows is below STRONG, below MILD.
    backfiring    a contribution C = -(r - 1) A of the step's updates, for one sign of A, against the learner's start or
        against the rollout, is above BACKWARDS: ratios moved against their advantages. K1 and K3 can stay flat
        meanwhile (VeXact [digest]). On 4x4 Sudoku (60 steps of two updates, seed 0) it was said at none of 120 steps
        unquantised and at FP8, which ended at 0.585, and at 30 of 60 with five levels and no corrector, which ended at
        0.12 [ours]. Said before a low ESS, which the reason then names too.
    healthy       none of these.
    """
    ess = metrics.get("rollout_corr/ess")
    if ess is None:
        return None
    moved = {n: v for n, v in metrics.items() if n.startswith("off_policy/") and "/contribution_" in n}
    worst = max(moved, key=moved.__getitem__, default="")
    highest = moved.get(worst, 0.0)
    word = "strong" if ess < STRONG else "mild" if ess < MILD else "healthy"
    bound = {"strong": f" below {STRONG}", "mild": f" below {MILD}"}.get(word, "")
    reasons = [f"ESS {ess:.3g}{bound}"]
    if moved:
        _, base, sign, *_ = worst.replace("contribution_", "").split("/")
        against = {"old": "the step's start", "rollout": "the rollout"}[base]
        if highest > BACKWARDS:
            word = "backfiring"
            reasons.insert(0, f"C {highest:+.2g} ({SIGNS[sign]}, against {against}) above {BACKWARDS}")
        else:
            reasons.append(f"C at most {highest:+.2g} ({SIGNS[sign]}, against {against})")
    return word, ", ".join(reasons)


PATIENCE = 20  # steps in a row without a group whose rewards differ


def flat_for(steps: int) -> str:
    return (
        f"in the last {steps} steps the rewards of every group were equal, which teaches nothing: see whether the "
        "grader tells completions apart, or take easier problems or more generations"
    )
