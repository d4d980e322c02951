"""What a quantized copy's other order costs the gradient: the page's tables and sentences."""

from collections import Counter
from itertools import product
from statistics import mean, median

from held import STUDIES, by_arm, stored
from recipes.studies import int4_orders, int4_orders_controls
from recipes.studies import order_flips_controls as controls
from recipes.studies.order_flips import ORDERS, SEEDS, Model, alone_rows, bias, claim_rows, copy_rows, order_rows, over
from recipes.studies.paired import arm_rows, interval, markdown, paired

PAGE = f"{STUDIES}/order_flips.md"


def flipped_orders():
    models = stored("order_flips")
    assert [model["seed"] for model in models] == list(SEEDS)
    for rows in (order_rows, claim_rows, copy_rows, alone_rows):
        yield PAGE, markdown(rows(models))
    share, left, lost = claim_rows(models)
    assert min(float(claim["Holm's p of a difference"]) for claim in (share, left)) > 0.05, "neither is shown"
    exact = ("max_prob", "INT4", "exact")
    shares = [1 - bias(model, *exact, "no flips") / bias(model, *exact) for model in models]
    above = sum(each > 0.5 for each in shares)
    yield PAGE, f"the share is {share['found, 95 %']}, above a half in {above} of 10 models"
    flips = [model["flips"]["INT4"] for model in models]
    yield PAGE, f"from {min(flips):.3f} to {max(flips):.3f} of the steps flip"
    few = [model for model in models if model["flips"]["INT4"] < 0.1]
    assert all(each > 0.5 for each, flip in zip(shares, flips, strict=True) if flip >= 0.1)
    yield PAGE, f"in the {10 - len(few)} models in which a tenth of the steps or more flip, it is above a half in all"
    parts = [bias(model, "plackett_luce 0.1", "INT4", "exact") / bias(model, *exact) for model in models]
    yield PAGE, f"its bias is {mean(parts):.1f} in the mean over models, {median(parts):.1f} in the median."
    without = over(models, lambda model: bias(model, *exact, "no flips"))
    yield PAGE, f"Over all models the bias falls from {over(models, lambda model: bias(model, *exact))} to {without}"
    yield PAGE, f"it costs {lost['found, 95 %']} of reward"
    noisy = over(models, lambda model: bias(model, "plackett_luce 0.1", "INT4", "exact"))
    yield PAGE, f"its bias is {noisy}"
    less = sum(bias(model, "plackett_luce 0.1", "INT4", "exact") < bias(model, *exact) / 2 for model in models)
    yield PAGE, f"below half of max_prob's in {less} of 10 models"

    def apart(model: Model, weights: str) -> float:
        return bias(model, "max_prob", "INT4", weights) - bias(model, "random", "INT4", weights)

    tis, none = ([apart(model, weights) for model in models] for weights in ("tis", "none"))
    yield PAGE, f"with TIS it has {interval(tis)} less bias than `MaxProb`, without weights {interval(none)}"
    cost = over(models, lambda model: model["reward"]["max_prob"] - model["reward"]["random"])
    yield PAGE, f"costs {cost} of reward"
    assert mean(tis) > 0

    def biases(weights: str) -> dict[str, float]:
        return {order: mean(bias(model, order, "INT4", weights) for model in models) for order in ORDERS}

    assert biases("none")["plackett_luce 0.1"] > biases("none")["max_prob"], "larger without weights"
    assert max(value for order, value in biases("answer").items() if order != "max_prob") < 1e-6, "unbiased"
    assert abs(biases("answer")["max_prob"] - biases("tis")["max_prob"]) < 0.01, "as biased"
    assert max(model["flips"]["kernel"] for model in models) == 0


def other_models_after_rl_countdown_and_noise():
    models = stored("order_flips_controls")
    cases = {case: controls.of_case(models, case) for case in controls.SEEDS}
    assert {case: len(each) for case, each in cases.items()} == {
        "fresh": 20,
        "after RL": 10,
        "after RL, random": 10,
        "Countdown": 10,
    }
    assert len(models) == 50, "no seed was left out"
    for rows in (controls.case_rows, controls.claim_rows, controls.noise_rows):
        yield PAGE, markdown(rows(models)).strip()

    def left(case: str, order: str, weights: str, *, distance: bool = False) -> str:
        scale = (lambda model: model["length"][order]) if distance else (lambda model: 1.0)
        return interval([bias(model, order, "INT4", weights) * scale(model) for model in cases[case]])

    found = {
        row["stated before the runs"]: (row["found, 95 %"], row["Holm's p"]) for row in controls.claim_rows(models)
    }
    less, twice = (
        {case: found[f"{case}: {claim}"] for case in controls.SEEDS}
        for claim in ("TIS leaves less bias in random order", "the bias is more than twice that without flips")
    )
    assert less["fresh"][1] == twice["fresh"][1] == "0.000"
    yield PAGE, f"In random order TIS leaves {less['fresh'][0]} less bias than under `MaxProb`, where it leaves"
    yield PAGE, f"{left('fresh', 'max_prob', 'tis')}, from {left('fresh', 'max_prob', 'none')} without it."
    yield PAGE, f"the second not (Holm's p {less['Countdown'][1]} and {twice['Countdown'][1]})."
    trained = [case for case in controls.SEEDS if case.startswith("after")]
    (missed,) = {less[case][1] for case in trained}
    yield PAGE, f"(Holm's p {missed} twice), the second is ({' and '.join(twice[case][1] for case in trained)})."
    under, random = (left("after RL", order, "tis", distance=True) for order in ("max_prob", "random"))
    yield PAGE, f"as distances TIS leaves {under} under `MaxProb` and {random} in random order (trained under"
    for row in controls.noise_rows(models):
        value, half = row["INT4 less noise, 95 %"].split("±")
        assert abs(float(value)) < float(half)


def training_in_both_orders():
    kept = stored("int4_orders")
    results = by_arm(kept["runs"])
    assert results.keys() == set(product(int4_orders.STUDY.arms, range(10)))
    rows = [row | {"rate": f"{kept['rates'][row['arm']]:g}"} for row in arm_rows(int4_orders.STUDY, results)]
    yield PAGE, markdown(rows, ("arm", "rate", "after", "ess", "reward", "difference, 95 %")).strip()
    claims = int4_orders.claim_rows(results)
    yield PAGE, markdown(claims).strip()
    lost = {row["arm"]: row["difference, 95 %"].removeprefix("-") for row in rows}
    less, cost, under, random = (claim["found, 95 %"] for claim in claims)
    costs = f"{lost['random: int4, tis']} in random order and {lost['max_prob: int4, tis']} under `MaxProb`"
    yield PAGE, f"INT4 with TIS costs {costs}: the difference is {less}."
    yield PAGE, f"shown**, {random} in {claims[3]['above 0']} seeds. Under `MaxProb` neither its gain ({under}) nor"
    yield PAGE, f"INT4's cost ({cost}) is."
    assert [float(claim["Holm's p"]) < 0.05 for claim in claims] == [False, False, False, True]
    higher = {arm: paired(results, f"random: {arm}", f"max_prob: {arm}") for arm in int4_orders.ROLLOUTS}
    assert all(min(apart) > 0 for apart in higher.values()), "in all ten seeds of every arm"
    yield PAGE, f"unquantized by {interval(higher['unquantized'])}, although"
    yield PAGE, f"Without a corrector INT4 costs {lost['random: int4']} in random order."
    rates = Counter(run["arm"].rpartition(" at ")[0] for run in kept["tuning"])
    tried = {name: {run["arm"] for run in kept["tuning"] if run["arm"].startswith(f"{name} at ")} for name in rates}
    assert tried.keys() == set(int4_orders.STUDY.arms) and {len(each) for each in tried.values()} == {3, 4}


def controls_of_the_gain_of_tis():
    kept = stored("int4_orders_controls")
    study = int4_orders_controls.STUDY
    assert by_arm(kept).keys() == set(product(study.arms, range(10)))
    results = by_arm([*kept, *stored("int4_orders")["runs"]])
    yield PAGE, markdown(arm_rows(study, results), ("arm", "after", "ess", "reward", "difference, 95 %")).strip()
    claims = int4_orders_controls.claim_rows(results)
    yield PAGE, markdown(claims).strip()
    place, step = (claim["found, 95 %"] for claim in claims)
    assert all(float(claim["Holm's p"]) < 0.05 and claim["above 0"] == "10 of 10" for claim in claims)
    yield PAGE, f"TIS ends {place} above its permuted weights and {step} above half the rate, in all ten seeds"
