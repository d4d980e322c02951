"""The study of mismatch, and what other pages say of it."""

import re
from statistics import mean

from held import DOCS, STUDIES, by_arm, row, runs_of, span_of, stored, tables_of
from recipes.smollm2_diffusion import recipe as converted
from recipes.studies import engines, engines_ar, fp8_sums, lengths, paired, rates

PAGE = f"{STUDIES}/mismatch.md"
PS = "Holm's p"
DIFFERENCE = "difference, 95 %"


def two_digits(cell):
    """Of the studies whose seeds are stored with two digits: the cell with its numbers so."""
    return re.sub(r"\d\.\d{3,}", lambda number: f"{float(number[0]):.2f}", cell)


def p_value(cell):
    return "<0.01" if float(cell) < 0.005 else two_digits(cell)


def rounded_runs(name):
    """The stored rates of each arm, rounded to two digits, as runs."""
    runs = {}
    for each in stored(name)["arms"]:
        runs |= {(each["arm"], seed): {"after": float(rate)} for seed, rate in enumerate(each["each seed"].split(", "))}
    return runs


def tables_with_two_digits():
    _, claims, _, _, _, causal, *_ = tables_of(PAGE)
    for told, found in zip(claims, stored("mismatch")["contrasts"], strict=True):
        yield PAGE, row(told["claim"], two_digits(found[DIFFERENCE]), p_value(found[PS]))
    arms, contrasts = (stored("mismatch_ar")[part] for part in ("arms", "contrasts"))
    apart = [
        "- | -",
        *(f"{two_digits(each[DIFFERENCE])} to {each['less']} | {p_value(each[PS])}" for each in contrasts),
    ]
    for told, found, difference in zip(causal, arms, apart, strict=True):
        rest = (two_digits(found[column]) for column in ("mean abs log-ratio", "ESS"))
        yield PAGE, row(told["arm"], two_digits(found["after"]), difference, *rest)


def the_first_study():
    arms, runs = {each["arm"]: each for each in stored("mismatch")["arms"]}, rounded_runs("mismatch")
    none = arms["one: none"]
    apart, ess, order = (two_digits(none[column]) for column in ("mean abs log-ratio", "ESS", "same order"))
    yield PAGE, f"Mean |log ratio| is {apart} nats and ESS {ess}. The learner agrees on {order} of the positions"
    yield PAGE, f"one warmed-up model: {two_digits(arms['start']['after'])} (ten seeds)"
    yield PAGE, f"AIS's mean lambda is {two_digits(arms['one: AIS alarm']['lambda'])},"
    undone = paired.share(runs, "two: none", "two: none, no clip", "two: unquantized")
    gap = "of the gap to unquantized rollouts with that clip"
    yield PAGE, f"A dual clip at 1.2 alone undoes {undone} (Fieller's interval) {gap}"
    undone = paired.share(runs, "one: TIS", "one: none", "one: unquantized")
    yield PAGE, f"it undoes {undone} of the harm"
    harm = [paired.paired(runs, f"{order}: unquantized", f"{order}: none") for order in ("random", "one")]
    more = two_digits(paired.interval([a - b for a, b in zip(*harm, strict=True)]))
    yield PAGE, f"in random order lose {more} more against unquantized ones in their own order"
    for arm, against, sentence in (
        ("one: TIS shuffled", "one: none", "between shuffled weights and none ({})"),
        ("one: TIS", "one: lambda 0.5", "TIS beats a fixed lambda of 0.5 by {}"),
        ("left: TIS", "left: none", "Left half first, TIS adds {} (five seeds)"),
    ):
        yield PAGE, sentence.format(two_digits(paired.interval(paired.paired(runs, arm, against))))


def the_claims_were_stated_after_an_earlier_study():
    arms = stored("mismatch_first")["arms"]
    assert {each["seeds"] for each in arms} == {"5"} == {str(len(each["each seed"].split(", "))) for each in arms}
    yield PAGE, f"after the {5 * len(arms)} runs of [a pilot](mismatch_first.json) on seeds 0 to 4"
    after, copies = (
        {(each["setting"], each["arm"]): each[column] for each in arms} for column in ("after", "quantized")
    )
    for setting, name in (("diffusion, int3", "int3"), ("diffusion, five_level", "five levels")):
        columns = ("none", "tis", "tis-reject", "icepop", "tbpo", "aligned", "qarl")
        yield PAGE, row(name, *(after[setting, arm] for arm in columns))
        aligned, qarl = (copies[setting, arm] for arm in ("aligned", "qarl"))
        yield PAGE, f"{aligned} and {qarl} ({name})"


def rounding_as_small_as_a_kernels():
    plain, noisy = stored("kernel_noise")["arms"]
    after, against, apart = (two_digits(cell) for cell in (noisy["after"], plain["after"], noisy[DIFFERENCE]))
    nats, ess = f"{float(noisy['mean abs log-ratio']):.3f}", f"{float(noisy['ESS']):.0f}"
    told = f"({after} against {against} unquantized; mean |log ratio| {nats} nats, ESS {ess})"
    yield PAGE, f"**We saw no difference: {apart}** {told}"


def real_fp8():
    """The tables, and each seed's mean of both rates."""
    by_rate = {rate: runs_of(f"fp8_sums_{rate}") for rate in fp8_sums.STUDIES}
    assert {rate: len(runs) for rate, runs in by_rate.items()} == {"full": 60, "half": 60}
    yield PAGE, fp8_sums.told(by_rate)
    (begun,) = {run["before"] for runs in by_rate.values() for run in runs.values()}
    yield PAGE, f"in the learner's dtype), 12 steps from {begun:.2f} at 5e-4 (full)"

    def both(arm, against):
        pairs = (paired.paired(runs, arm, against) for runs in by_rate.values())
        return [mean(pair) for pair in zip(*pairs, strict=True)]

    told = {}
    for arm in ("unquantized", "TIS", "aligned", "AIS", "TBPO"):
        apart = both(arm, "none")
        told[arm] = paired.interval(apart), f"{paired.sign_flip(apart):.3f}"
        if arm == "TIS":
            assert min(apart) > 0
    cost, tis, aligned, ais, tbpo = told.values()
    yield PAGE, f"FP8 costs {cost[0]} (p {cost[1]}); TIS adds {tis[0]} ({tis[1]}, all seeds),"
    yield (
        PAGE,
        f"on an autoregressive SmolLM2 they cost {cost[0].removeprefix('-')}, and TIS added {tis[0]} ([both pooled",
    )
    costs = f"FP8 cost an autoregressive SmolLM2 {cost[0].removeprefix('-')}, and TIS added {tis[0]}"
    yield f"{DOCS}/method.md", costs
    yield PAGE, f"`Aligned()` {aligned[0]} ({aligned[1]}), AIS {ais[0]} ({ais[1]}), TBPO {tbpo[0]}."
    half = by_rate["half"]
    loss, gain = paired.paired(half, "unquantized", "none"), paired.paired(half, "TIS", "none")
    assert (sum(each > 0 for each in loss), sum(each > 0 for each in gain)) == (9, 8)
    yield PAGE, f"nine of ten seeds (p {paired.sign_flip(loss):.3f} alone)"
    yield PAGE, f"TIS gains in eight ({paired.sign_flip(gain):.3f})"


def each_arms_own_rate():
    """The tables, and that the trials chose what the text says."""
    tuning, results, more = (by_arm(stored("rates")[part]) for part in ("tuning", "runs", "equal"))
    assert (len(tuning), len(results), len(more)) == (204, 180, 70)
    yield PAGE, rates.told(results, more, rates.best(tuning))
    yield PAGE, f"Unquantized: {paired.interval([results['unquantized', seed]['after'] for seed in range(10, 20)])}."
    claims = {each["stated before the runs"]: each for each in paired.contrast_rows(rates.study, results)}
    harm, gain = claims["five levels harms"], claims["token TIS helps under five levels"]
    yield PAGE, f"five levels still harm ({harm[DIFFERENCE]}, Holm's p {harm[PS]})"
    yield PAGE, f"beats no corrector by {gain[DIFFERENCE]}, Holm's p {gain[PS]}: not significant"
    found = f"[{gain[DIFFERENCE]}](../recipes/studies/mismatch.md#at-each-arms-own-learning-rate), Holm's p {gain[PS]}"
    yield f"{DOCS}/method.md", f"At five levels fresh seeds twice showed no planned gain: {found}, and"
    ais = claims["AIS does better than TIS under five levels"]
    apart = ais[DIFFERENCE].removeprefix("-")
    yield PAGE, f"**TIS beats AIS at five levels** by {apart}, the opposite"
    best = rates.best(tuning)
    assert best.pop("five levels: AIS") == 1.25e-4 and set(best.values()) == {2.5e-4, 5e-4}


def one_rate_for_all():
    """At 2.5e-4 and 5e-4, of every format without a corrector."""
    parts = stored("rates")
    best = rates.best(by_arm(parts["tuning"]))
    runs = {(rates.at(run["arm"], best[run["arm"]]), run["seed"]): run for run in parts["runs"]}
    runs |= by_arm(parts["equal"])
    low, high = ({arm: rates.at(arm, rate) for arm in rates.ARMS} for rate in rates.EQUAL)

    def ess(at, format):
        return mean(runs[at[f"{format}: none"], seed]["ESS"] for seed in rates.TESTED_ON)

    def loss(at, format):
        """By seed: what the format costs without a corrector."""
        return paired.paired(runs, at["unquantized"], at[f"{format}: none"])

    at_one = [rates.at(f"five levels: {name}", rates.TIS_RATE) for name in ("AIS", "TIS")]
    apart = paired.paired(by_arm(parts["equal"]), *at_one)
    assert len(apart) == 10
    below = paired.interval(apart).removeprefix("-")
    yield PAGE, f"AIS is {below} below TIS (p {paired.sign_flip(apart):.3f}): the rate makes most"
    scores = {
        rate: mean(run["after"] for run in parts["tuning"] if run["arm"] == rates.at("five levels: AIS", rate))
        for rate in rates.RATES
    }
    assert max(scores, key=scores.__getitem__) == min(rates.RATES)
    yield PAGE, f"by a score of {scores[1.25e-4]:.3f} against {scores[2.5e-4]:.3f}."
    more = {}
    for format in ("int3", "five levels"):
        both = zip(loss(high, format), loss(low, format), strict=True)
        more[format] = paired.interval([at_high - at_low for at_high, at_low in both])
    cost, fewer = (paired.interval(loss(at, "int4")) for at in (high, low))
    fp8, int4, lower = (f"{ess(*which):.3f}" for which in ((high, "FP8"), (high, "int4"), (low, "int4")))
    spans = (span_of([-each for each in loss(at, "FP8")]).removeprefix("between ") for at in (low, high))
    yield PAGE, "**Under FP8 we saw no harm**: between {} at 2.5e-4, {} at 5e-4 (ESS {}).".format(*spans, fp8)
    yield PAGE, f"it loses {cost} there, although its ESS is {int4}"
    yield PAGE, f"(2.5e-4: ESS {lower}, a loss of {fewer})"
    yield PAGE, f"int3 loses {more['int3']} more at 5e-4 than at 2.5e-4, five levels {more['five levels']} more"
    higher = paired.interval(paired.paired(runs, high["unquantized"], low["unquantized"]))
    five = paired.interval(paired.paired(runs, low["five levels: none"], high["five levels: none"]))
    yield PAGE, f"It takes {higher} from unquantized rollouts and gives five levels {five}."
    fp8 = [-each for each in loss(high, "FP8")]


def length_or_conditioning():
    results = runs_of("lengths")
    assert len(results) == 98 and {arm for arm, _ in results} == set(lengths.study.arms)
    yield PAGE, lengths.told(results)
    apart = [
        f"{mean(results[f'{name}: none', seed]['mean abs log-ratio'] for seed in range(10)):.2f}"
        for name in lengths.SHARES
    ]
    yield PAGE, f"grows to {apart[3]} nats (the others: {min(apart)} to {max(apart[:3])})"
    yield PAGE, f"by {paired.interval(paired.paired(results, '4 steps: TIS', '4 steps: none'))} at 4 steps"


def the_converted_model():
    found = stored("recipes/results")["smollm2_diffusion_ess"]
    ess, apart = found["ESS"], found["mean abs log-ratio, nats"]
    yield (
        PAGE,
        (
            f"an ESS of {min(ess):.3f} to {max(ess):.3f} under this FP8 (mean {mean(ess):.3f}, {mean(apart):.3f} nats; "
            f"[{len(ess)} steps]"
        ),
    )
    yield PAGE, f"But they are {len(ess)} of the recipe's {converted.num_steps}:"
    assert min(ess) == ess[4] and max(apart) == apart[10]
    yield PAGE, f"the ESS begins at {ess[0]:.3f} and is least at the fifth ({ess[4]:.3f}),"
    yield PAGE, f"grows from {apart[0]:.3f} to {apart[10]:.3f} nats at the eleventh"


def rollouts_by_llama_cpp():
    results = runs_of("engines")
    assert len(results) == 90

    def apart(arm, against):
        return paired.interval(paired.paired(results, arm, against))

    def of(arm, column):
        return mean(run[column] for (name, _), run in results.items() if name == arm)

    start = f"from {of('unquantized', 'before'):.3f} to {of('unquantized', 'after'):.3f} unquantized"
    mismatch = f"Q4_0: {of('Q4_0', 'mean abs log-ratio'):.2f} nats, ESS {of('Q4_0', 'ESS'):.2f}."
    yield PAGE, f"ten paired seeds, {engines.study.num_steps} steps {start}. {mismatch}"
    f32, q8, q4 = (apart(arm, "unquantized") for arm in ("F32", "Q8_0", "Q4_0"))
    yield PAGE, f"to other kernels alone (F32) by {f32}, to 8 bits by {q8} and to 4 bits by {q4}."
    yield PAGE, f"8 bits beat F32 by {apart('Q8_0', 'F32')}, 4 bits by {apart('Q4_0', 'F32')}."
    tis, less, ais = apart("Q8_0 TIS", "Q8_0"), apart("Q4_0", "Q4_0 TIS"), apart("Q4_0 TIS", "Q4_0 AIS")
    yield PAGE, f"TIS adds {tis} under 8 bits and takes {less} under 4, where it beats AIS by {ais}."
    assert {each[PS] for each in paired.contrast_rows(engines.study, results)} == {"1.000"}


def rollouts_by_llama_cpp_of_a_causal_model():
    results = runs_of("engines_ar")
    assert len(results) == 20

    def apart(arm, against):
        return paired.interval(paired.paired(results, arm, against))

    def of(arm, column):
        return mean(run[column] for (name, _), run in results.items() if name == arm)

    start = f"from {of('unquantized', 'before'):.2f} to {of('unquantized', 'after'):.3f} unquantized"
    mismatch = f"Q4_0: {of('Q4_0', 'mean abs log-ratio'):.2f} nats, ESS {of('Q4_0', 'ESS'):.2f}"
    yield PAGE, f"five paired seeds, {engines_ar.study.num_steps} steps {start}. {mismatch}"
    q8, q4, tis = apart("unquantized", "Q8_0"), apart("unquantized", "Q4_0"), apart("Q4_0 TIS", "Q4_0")
    claims = paired.contrast_rows(engines_ar.study, results)
    p, least = min(each[PS] for each in claims), len(claims) * 2 / 2**5
    yield PAGE, f"the least Holm's p that they can give is {least:.2f}."
    yield PAGE, f"beat 8 bits by {q8} and 4 bits by {q4} (Holm's p {p}). TIS adds {tis} under 4 bits."
