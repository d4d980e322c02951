"""What is known of quantized rollouts: the page's sentences and tables, from the data of its studies."""

from collections.abc import Sequence
from statistics import median

from held import DOCS, STUDIES, by_arm, row, runs_of, stored
from held import low_bits as tuned
from held.mismatch import rounded_runs, two_digits
from recipes.studies import (
    ess,
    int4_orders,
    int4_orders_controls,
    low_bits,
    low_bits_gradients,
    order_flips,
    order_flips_controls,
    rates,
)
from recipes.studies.order_flips import bias, over
from recipes.studies.paired import contrast_rows, interval, paired

PAGE, METHOD = f"{STUDIES}/quantized_rollouts.md", f"{DOCS}/method.md"
P = "Holm's p"
MODELS, TRAINED = stored("order_flips"), runs_of("low_bits")
CASES = stored("order_flips_controls")
FRESH = order_flips_controls.of_case(CASES, "fresh")
COSINES = {}
for line in low_bits_gradients.table(stored("low_bits_gradients")).splitlines()[2:]:
    arm, _, cosine, *_ = line.strip("| ").split(" | ")
    COSINES[arm] = cosine


def left(order: str, weights: str, *part: str, of: Sequence[order_flips.Model] = MODELS) -> str:
    """The bias under INT4."""
    return over(of, lambda model: bias(model, order, "INT4", weights, *part))


def flips(copy: str, of: Sequence[order_flips.Model] = MODELS) -> str:
    return over(of, lambda model: model["flips"][copy])


def the_three_sentences():
    for page in (PAGE, METHOD):
        yield (
            page,
            (
                "**Order:** on twenty small supervised models of 4x4 Sudoku an INT4 copy in `MaxProb` order writes "
                f"another position than the learner in {flips('INT4', FRESH)} of the steps, and truncated importance "
                f"sampling (TIS) leaves a bias of {left('max_prob', 'tis', of=FRESH)} of the gradient's length, from "
                f"{left('max_prob', 'none', of=FRESH)}; in random order it leaves {left('random', 'tis', of=FRESH)}, "
                f"from {left('random', 'none', of=FRESH)} (planned; shown on Countdown too, after RL not)."
            ),
        )
        yield (
            page,
            (
                "**Gradient:** INT4 rollouts turn the first policy gradient of a pretrained diffusion model, in random "
                f"order (estimated cosine {COSINES['int4']} with that of its own rollouts), and TIS turns it back "
                f"({COSINES['int4, tis']}; of nine further claims none is shown, and after RL of one seed nothing was "
                "turned); "
                f"after training INT4 rollouts cost {tuned.COST[tuned.DIFFERENCE]}, and TIS brought back "
                f"{tuned.GAIN[tuned.DIFFERENCE]} (planned, ten seeds; greedy: at temperature 1 not)."
            ),
        )


def order():
    share, less, lost = order_flips.claim_rows(MODELS)
    value, test = "found, 95 %", "Holm's p of a difference"
    exact = ("max_prob", "INT4", "exact")
    above = sum(bias(model, *exact, "no flips") < bias(model, *exact) / 2 for model in MODELS)
    yield PAGE, f"the share is {share[value]}, above a half in {above} of 10 models (Holm's p {share[test]});"
    _, bound = lost["stated before the runs"].split(" is below ")
    yield PAGE, f"`PlackettLuce` at 0.1 removes most of it for less than {bound} of reward."
    below = sum(bias(model, "plackett_luce 0.1", "INT4", "exact") < bias(model, *exact) / 2 for model in MODELS)
    yield (
        PAGE,
        f"under `PlackettLuce` the bias is below half of `MaxProb`'s in {below} of 10 models, for {lost[value]} of",
    )
    assert min(float(share[test]), float(less[test])) > 0.05
    rows = order_flips_controls.claim_rows(CASES)
    names = ("20 fresh ones", "10 after RL in `MaxProb` order", "10 after RL in random order", "10 of Countdown")
    for name, less, twice in zip(names, rows[::2], rows[1::2], strict=True):
        yield PAGE, row(name, less[value], less["Holm's p"], twice[value], twice["Holm's p"])
    assert [each["stated before the runs"].partition(":")[0] for each in rows[::2]] == list(order_flips_controls.SEEDS)
    yield PAGE, f"AIS leaves {left('random', 'ais', of=FRESH)} in random order."
    assert max(model["flips"]["kernel"] for model in MODELS) == 0
    yield PAGE, f"FP8 flips {flips('FP8')} of the steps; another attention kernel none."
    none = [model["settings"]["max_prob, INT4, none"] for model in MODELS]
    noise, squared = median(each["noise"] / 64 for each in none), median(each["bias"] ** 2 for each in none)
    yield PAGE, f"more noise (median {noise:.2f} squared lengths) than squared bias ({squared:.2f}, `MaxProb`,"
    coarse = rounded_runs("mismatch")
    apart = two_digits(interval(paired(coarse, "random: TIS", "one: TIS")))
    less, _, under, random = int4_orders.claim_rows(by_arm(stored("int4_orders")["runs"]))
    gains = f"{random[value]} in random order ({P} {random[P]}), under `MaxProb` {under[value]} ({under[P]})."
    yield PAGE, f"TIS gains {gains}"
    yield METHOD, f"{random[value]} on Sudoku"
    runs = [*stored("int4_orders_controls"), *stored("int4_orders")["runs"]]
    place, step = int4_orders_controls.claim_rows(by_arm(runs))
    assert place[P] == step[P]
    above = f"above its permuted weights by {place[value]}, half the rate by {step[value]} ({place[P]} each;"
    yield PAGE, f"In random order it is {above}"
    yield PAGE, f"a smaller loss in random order, in training: {less[value]}."
    assert float(random[P]) < 0.05 < min(float(less[P]), float(under[P]))
    yield f"{STUDIES}/order_flips.md", f"and TIS it ended no higher in random order: {apart}."
    yield f"{STUDIES}/order_flips.md", f"AIS leaves {left('random', 'ais')}. As an order"


def pretrained():
    first, _ = contrast_rows(low_bits.STUDY, TRAINED)
    told = f"(TIS {first['difference, 95 %']} above no corrector, Holm's p {first[P]})"
    yield PAGE, f"[six seeds](low_bits.md#the-first-study-six-seeds-at-one-rate) at one rate {told}."
    after_rl = low_bits_gradients.matrices(stored("low_bits_gradients_after_rl"))
    (kept,) = (each for each in low_bits_gradients.rows_of(*after_rl) if each["arm"] == "int4")
    yield PAGE, f"after RL of one seed the cosine is {low_bits_gradients.shown(kept['cosine'])} without a corrector."
    (before,) = {run["before"] for run in tuned.RUNS.values()}
    yield PAGE, f"learner, from {before:.3f}"
    for name, measured, arm in (
        ("unquantized", None, "unquantized"),
        ("FP8", None, "FP8"),
        ("INT4, no corrector", "int4", "int4"),
        ("TIS", "int4, tis", "int4, tis"),
        ("AIS", "int4, ais", "int4, ais"),
        ("permuted weights (AIS; TIS)", "int4, permuted ais", "int4, permuted tis"),
        ("aligned forward", "int4, aligned", "int4, aligned"),
        ("half the rate", None, "int4 at half the rate"),
    ):
        cosine = COSINES[measured] if measured else "-"
        yield PAGE, row(name, cosine, tuned.level(arm), tuned.level(arm, "int4 weights"))
    cost, *gains, ais, aligned = ((each[tuned.DIFFERENCE], each[P]) for each in tuned.CLAIMS.values())
    told = "INT4 costs {} (Holm's p {});".format(*cost)
    others = ("no corrector", "its permuted weights", "half the rate")
    told += " TIS is above " + ", ".join(f"{name} by {d} ({p})" for name, (d, p) in zip(others, gains, strict=True))
    told += "; AIS by {} ({}); the aligned forward's INT4 weights by {} ({}).".format(*ais, *aligned)
    yield PAGE, told
    sampled, copies = (tuned.apart("int4, tis", "int4", column) for column in ("sampled", "quantized"))
    yield (
        PAGE,
        f"at temperature 1 TIS is {sampled} above no corrector; the INT4 weights that sampled end {copies} lower",
    )
    yield PAGE, f"what FP8 costs: {tuned.apart('unquantized', 'FP8')} (predicted:"
    earned = paired(TRAINED, "int4, tis", "int4", "reward")
    assert len(earned) == 6 and max(earned) < 0
    yield f"{STUDIES}/low_bits.md", f"its rollouts earn {interval(earned)} reward (less in all six seeds; not claimed)."


def ess_and_harm():
    found = ess.groups()
    for name, group in (
        ("lags, all bounds", "4x4 Sudoku, lags 1 to 8, all bounds"),
        ("lags, weights of tokens", "- bound: weights of tokens"),
        ("lags, no bound", "- bound: none"),
        ("lags, two-sided clip", "- bound: two-sided clip"),
        ("lag 4, TIS, ten seeds", "- one setting, ten seeds: lag 4, TIS"),
        ("formats, no lag", "4x4 Sudoku, formats, no corrector"),
    ):
        trials, aucs = found[group], ess.auc_row(found[group])
        harmed = f"{sum(trial.harmed for trial in trials)} of {len(trials)}"
        yield PAGE, row(name, harmed, aucs["ESS"], aucs["known before"], aucs["reward less the twin's"])


def toys_and_formats():
    late = {each["row"]: each["late 0.5"].split("/") for each in stored("gradients")["corrector, n = 128"]}
    none, tis, answers = late["none"], late["TIS, tokens, cap 2"], late["sequence IS, no cap"]
    yield PAGE, f"the bias is {none[0]} without a corrector, {tis[0]} with TIS, {answers[0]} with weights of answers,"
    yield PAGE, f"whose error is largest ({answers[1]} against {none[1]} and {tis[1]})."
    parts = stored("rates")
    tuning, results, more = (by_arm(parts[part]) for part in ("tuning", "runs", "equal"))
    found = rates.at_equal_rates(results, more, rates.best(tuning))
    losses = ", ".join(f"{each['minus unquantized at the same rate, 95 %']} {each['0.0005']}" for each in found)
    yield PAGE, f"minus unquantized at 5e-4: {losses}."
    shown = {each["stated before the runs"] for each in contrast_rows(rates.study, results) if float(each[P]) < 0.05}
    assert {claim for claim in shown if claim.endswith("harms")} == {"int3 harms", "five levels harms"}
    assert not [claim for claim in shown if claim.startswith("token TIS helps")]
