"""The other studies: estimators, orders, experts, edits, renoising."""

from statistics import mean

from dllm_rl.records import describe
from held import STUDIES, row, runs_of, span_of, stored, tables_of
from recipes.studies import distillation, estimators, experts, fast, order, paired, renoising, revise, some_steps

HOLM = "Holm's p"


def estimator_tables():
    page, found = f"{STUDIES}/estimators.md", stored("estimators")
    yield page, estimators.told(found["measured"])
    rows = {each["estimator"].strip("`"): each for each in found["measured"]}
    plain, coupled, eubo = rows["ELBO(4), plain"], rows["Coupled(2)"], rows["EUBO on Coupled(2)"]
    p, elbo, spread = found["log_p"], found["elbo"], found["log_ratio_std"]
    yield page, f"{found['completions']} completions, {found['draws']} draws of masks ({found['gradient_draws']} for"
    yield page, f"Mean log p is {p} nats, the any-order ELBO {elbo}, the true log-ratio's standard deviation {spread}."
    four = [rows[name] for name in rows if name.startswith("ELBO(4)") or name == "Coupled(2)"]
    errors = sorted(float(each["ratio error"]) for each in four)
    span = f"{errors[0]:.2f} to {errors[-1]:.2f} nats"
    yield page, f"the log-ratio's error ({span}) nearly equals its spread ({spread})."
    cosines = [rows[f"ELBO(4), {kind}"]["cosine"] for kind in ("antithetic", "plain", "stratified")]
    yield page, f"cosine {cosines[0]} and {coupled['cosine']}, others {cosines[2]} to {cosines[1]}."
    assert 0.45 < float(eubo["std"]) / float(coupled["std"]) < 0.55 and float(eubo["cosine"]) > float(coupled["cosine"])
    below, lower = (eubo[column].removeprefix("-") for column in ("bias, log p", "bias, ELBO"))
    yield page, "on `Coupled(2)` the upper bound has half the ELBO's noise and a better gradient."
    yield (
        page,
        f"With four masks `EUBO` is no bound: it lies {lower} nats below the ELBO, and {below} below log p of",
    )
    assert plain["forwards"] == "4.00"


def orders():
    page = f"{STUDIES}/order.md"
    apart, claims = {}, {}
    for task, study in order.STUDIES.items():
        results = runs_of(f"order_{task}")
        yield page, paired.tables(study, results)
        assert all({claim.arm, claim.against} <= set(study.arms) for claim in study.contrasts)
        for name, changes in study.arms.items():
            assert ("include_order=False" in describe(changes["likelihood"])) == name.endswith("tokens alone")
            assert type(changes["sampler"]) is type(study.base.sampler)
        for arm in ("noisy", "random"):
            apart[task, arm] = paired.interval(paired.paired(results, arm, "max_prob"))
        claims[task] = paired.contrast_rows(study, results)
        assert all(float(each[HOLM]) > 0.05 for each in claims[task])
    noisy, less = apart["sudoku", "noisy"], apart["countdown", "noisy"].removeprefix("-")
    yield page, f"beats `MaxProb` by {noisy} on Sudoku (not significant), and loses to it by {less} on Countdown,"
    yield page, f"where five seeds cannot give an exact p below {2 / 2**5:.2f}."
    rand, behind = apart["sudoku", "random"], apart["countdown", "random"].removeprefix("-")
    yield page, f"random order beats `MaxProb` by {rand} on Sudoku. On Countdown we saw no difference (it is behind"
    yield page, f"(it is behind by {behind})."
    yield f"{STUDIES}/league.md", f"random order beats `MaxProb` by {rand} on Sudoku"


def routers():
    page, results, spans = f"{STUDIES}/experts.md", runs_of("experts"), []
    (table,) = tables_of(page)
    for arm, told in zip(experts.study.arms, table, strict=True):
        values = [results[arm, seed]["after"] for seed in range(3)]
        seeds, against = ", ".join(f"{value:.3f}" for value in values), experts.study.against.get(arm)
        gain = f"+{paired.interval(paired.paired(results, arm, against))}" if against else "-"
        yield page, row(told["rollout"], seeds, f"{mean(values):.3f}", gain)
        if against:
            spans.append(paired.paired(results, arm, against))
    fp8, int3 = map(span_of, spans)
    yield page, f"**We saw no difference in solve rate** ({fp8} under FP8, {int3} under three bits)."
    found = stored("recipes/results")["sudoku_tiny_moe"]
    yield page, f"({', '.join(f'{rate:.3f}' for rate in found['before'])} of 400 held-out puzzles)"


def edits():
    page, results = f"{STUDIES}/revise.md", runs_of("revise")
    yield page, paired.tables(revise.study, results)

    def gain(arm, forwards):
        return paired.paired(results, f"{arm}, {forwards}", f"{arm}, elbo, {forwards}")

    exact = [f"{mean(gain('edits', n)):.2f}" for n in (2, 4, 8)]
    yield page, f"`ELBO()` lost {exact[2]} to {exact[0]}."
    yield page, "`Trajectory()` beats `ELBO()` of the final grid, which ignores edits, by {}, {} and {}.".format(*exact)
    plain = [paired.interval(gain("plain", n)) for n in (2, 4, 8)]
    yield page, "In plain arms it beats `ELBO()` by as much: {}, {} and {}.".format(*plain)
    lost = [f"{mean(gain('plain', n)):.2f}" for n in (2, 4)]
    forwards = "at 2 and 4 forwards, and not clearly below at 8"
    yield "docs/method.md", f"`ELBO` ended {lost[0]} and {lost[1]} below `Trajectory()` {forwards}"
    middles_and_widths = [[float(number) for number in each.split("±")] for each in plain]
    assert [middle > width for middle, width in middles_and_widths] == [True, True, False]
    apart = []
    for n in (2, 4, 8):
        both = zip(gain("edits", n), gain("plain", n), strict=True)
        apart.append(paired.interval([edited - given for edited, given in both]))
    yield page, "We saw no difference between the two gains: {}, {} and {}.".format(*apart)
    alone = paired.interval(paired.paired(results, "plain, 8", "plain to edits, 8"))
    yield page, f"Not claimed: edits in evaluation alone took {alone} at 8 forwards."


def renoised():
    page, found = f"{STUDIES}/renoising.md", stored("renoising")
    results = {(run["arm"], run["seed"]): run for run in found["runs"]}
    yield page, paired.tables(renoising.study, results)
    for claim, sign in zip(renoising.CLAIMS[:2], ("one step by", "helps by"), strict=True):
        yield page, f"{sign} {paired.interval(paired.paired(results, claim.arm, claim.against))}**"
    before, after = (mean(results["one step", seed][when] for seed in renoising.SEEDS) for when in ("before", "after"))
    yield page, f"Its models solve {after:.3f} after training and solved {before:.3f} before."
    (steps,) = {run["num_steps"] for (arm, _), run in results.items() if arm == "exact"}
    seconds = round(steps * found["seconds of a step"]["exact"], -1)
    yield page, f"that of {steps} steps of `exact`, about {seconds:.0f} s of one thread."
    center, half = paired.interval(paired.paired(results, "exact", "bound of 0.1")).split("±")
    low, high = float(center) - float(half), float(center) + float(half)
    yield page, f"the difference is between {low:.3f} and {high:+.3f}."
    yield "recipes/renoise_sudoku.py", paired.interval(paired.paired(results, "full", "exact"))


def speed_as_a_reward():
    page, results = f"{STUDIES}/fast.md", {(run["arm"], run["seed"]): run for run in stored("fast")}
    yield page, paired.markdown(fast.frontier_rows(results))
    yield page, paired.tables(fast.study, results)
    above, more = (paired.interval(paired.paired(results, claim.arm, claim.against)) for claim in fast.CLAIMS)
    gain = paired.interval(paired.paired(results, fast.ACCURACY, fast.BEFORE))
    yield page, f"solve {above} more than before training, and {more} more than after equal steps of the accuracy"
    yield page, f"its gain is not shown ({gain})."
    before, speed = (fast.frontier_rows(results)[-1][arm].split(" in ") for arm in (fast.BEFORE, fast.SPEED))
    yield page, f"take {speed[1]} forwards instead of {before[1]}, and solve {speed[0]} instead of {before[0]}."
    yield page, f"models might solve more than {speed[0]}."


def some_of_the_steps():
    rows = stored("some_steps")["rows"]
    yield f"{STUDIES}/estimators.md", some_steps.told(rows)
    for case in {(each["steps"], each["scored"]) for each in rows}:
        ways = {each["way"]: each["cosine"] for each in rows if (each["steps"], each["scored"]) == case}
        assert max(ways, key=ways.get) == "segments", "in every row"


def a_teacher():
    page, found = f"{STUDIES}/distillation.md", stored("distillation")
    study, results = distillation.study, {(run["arm"], run["seed"]): run for run in found["runs"]}
    assert len(results) == len(distillation.ARMS) * len(distillation.SEEDS)
    seconds = found["seconds of a step"].items()
    yield page, paired.markdown([{"arm": arm, "seconds of a step": f"{each:.3f}"} for arm, each in seconds])
    yield from ((page, table) for table in distillation.tables(results).split("\n\n"))
    after, before = (
        {row["arm"]: row[when] for row in paired.arm_rows(study, results, distillation.COLUMNS)}
        for when in ("after", "before")
    )
    claims = paired.contrast_rows(study, results)
    apart = [claim["difference, 95 %"] for claim in claims]
    ps = [claim["Holm's p"] for claim in claims]
    shown, p = [float(each) < 0.05 for each in ps], ps[0]
    assert shown == [True, False, True, False, False] and apart[2].startswith("-")
    alone, reward, two = after[distillation.ALONE], after[distillation.RL], after[distillation.TWO]
    yield (
        page,
        f"From {before[distillation.ALONE]} in two steps the model's own eight-step probabilities bring it to {alone};",
    )
    yield page, f"RL with the reward by the rules reaches {reward} in about the same time."
    yield (
        page,
        f"brings nothing ({two}), and eight steps are above two by {apart[0]} (Holm's p {p}).",
    )
    yield page, f"{apart[2].removeprefix('-')} below the reward alone, in ten of ten seeds, against our claim."
    for difference, words in ((apart[1], "lies between {}"), (apart[3], "(between {})"), (apart[4], "(between {})")):
        center, half = map(float, difference.split("±"))
        yield page, words.format(f"{center - half:.3f} and {center + half:+.3f}")
