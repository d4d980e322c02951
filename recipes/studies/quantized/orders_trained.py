"""Does TIS pay in training where the order of unmasking does not depend on the weights? Claims before the runs.

orders.py says, exactly, that in such an order TIS removes most of the bias of quantized rollouts, and under `MaxProb`
little. Here 4x4 Sudoku (sudoku_unique.py) is trained for 60 steps of one update, 16 cells in four steps, each scored.
Ten paired seeds (0 to 9) start from one warmed-up model each. Parts, each with its arms, claims, and Holm's correction:

nvfp4     random order: unquantized, NVFP4 rollouts (weights alone), with TIS, with TIS whose weights go to other tokens
          (what its weights do by their size alone), and without a corrector at half the rate (does TIS only tame a
          step that is too large?)
orders    the same but the half rate, left to right and under `MaxProb`
formats   random order: FP8, FP8 with inputs and INT4 (groups of 32), each without a corrector, with TIS and permuted

Rates: 1e-3 in random order and 5e-4 under `MaxProb`, which int4_orders.py tuned for each of its arms (unquantized,
INT4, INT4 with TIS); left to right takes 1e-3 without tuning. Two runs of a pilot say that 2e-3 breaks NVFP4 with and
without TIS. So permuted weights have TIS's rate.

Evaluated on 400 test puzzles: the learner, and the weights that sampled, made of the learner once more ("copy").
`after` and `quantized` are greedy in `MaxProb` order; `sampled` and `quantized, sampled` are at temperature 1 in the
order of training, whose expected reward the gradient is of; `sampled, max_prob` is at temperature 1 in `MaxProb` order.

The claims, two-sided, by flipping the signs of ten seeds, each greedily and at temperature 1 in the order of training:

nvfp4, the learner (6 claims): TIS is above no corrector; above its permuted weights; above half the rate.
nvfp4, the copy (4): with TIS the copy is above the copy without a corrector; without one the copy is above the learner.
orders (6): left to right TIS is above no corrector, and above its permuted weights; what TIS gains over its permuted
weights is more in random order than under `MaxProb`.
formats (12): for each format TIS is above no corrector, and above its permuted weights.
the order by itself (2, of the unquantized arms): random order ends above `MaxProb`, both evaluated in `MaxProb` order,
greedily and at temperature 1.

Known before the runs: int4_orders.json (seeds 0 to 9, INT4 for 180 steps: TIS 0.040 above no corrector in random order,
greedy; unquantized random order 0.141 above `MaxProb`), int4_orders_controls.json, and a pilot of NVFP4 with seeds 10
and 11: in random order without a corrector 0.655 and 0.672, greedy, with TIS 0.728 and 0.748, permuted 0.573 and 0.677,
and nearly the same differences at temperature 1; under `MaxProb` 0.338 and 0.512, 0.485 and 0.573, 0.568 and 0.552.

    python -m recipes.studies.quantized.orders_trained [--parts nvfp4]
        run what is missing, orders_trained.json, the tables
    python -m recipes.studies.quantized.orders_trained --report         run nothing
    python -m recipes.studies.quantized.orders_trained --draw
        the mean curves of the part nvfp4

The runs of the part formats are of a later commit than those of nvfp4, in which nothing of them changed.

Seven runs of a commit before rewards were in float64 (five arms of seed 0, two of seed 1) were repeated on
the code of the others, so that all runs of the part nvfp4 are of one commit and one processor.
"""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from dllm_rl import (
    NVFP4,
    TIS,
    FakeQuantize,
    Float8WeightOnly,
    Int4WeightOnly,
    LeftToRight,
    MaxProb,
    NoCorrection,
    RandomOrder,
    Rank,
    Scheme,
)
from dllm_rl.files import read_json, replacing, write_json
from dllm_rl.monitoring.plots import default_style, read_metrics
from dllm_rl.quantization.rollout_policy import quantized_copy
from recipes.studies.controls import Permuted
from recipes.studies.late.late_rollouts import QUIET
from recipes.studies.paired import (
    Results,
    Study,
    arm_rows,
    by_arm,
    claimed_rows,
    half_width,
    interval,
    keep,
    load,
    markdown,
    paired,
    restore_runs,
    result_path,
    run_missing,
    sampled_solve_rate,
    train_one,
    verdict,
)
from recipes.studies.quantized.orders import NAMES
from recipes.sudoku_unique import recipe

STORED = Path(__file__).with_suffix(".json")  # every run
STYLES = {  # of the pictures
    "unquantized": {"color": "#2f9e6e", "linestyle": ":", "marker": "^"},
    "uncorrected": {"color": "#d9772b", "linestyle": "--", "marker": "s"},
    "corrected": {"color": "#3b7dd8", "linestyle": "-", "marker": "o"},
}
CURVES = STORED.with_name("orders_trained_curves.json")  # by arm and metric: a list of steps for each seed
PICTURE = Path(__file__).parents[1] / "quantized_sudoku.png"
RANKS: dict[str, Rank] = {"random": RandomOrder(), "left_to_right": LeftToRight(), "max_prob": MaxProb()}
RATES = {"random": 1e-3, "left_to_right": 1e-3, "max_prob": 5e-4}
FORMATS: dict[str, Scheme | None] = {
    "unquantized": None,
    "nvfp4": NVFP4(),
    "fp8": Float8WeightOnly(dequantized=True),
    "fp8 with inputs": FakeQuantize(weight="e4m3", activation="e4m3"),
    "int4": Int4WeightOnly(),
}
CORRECTORS = {"": NoCorrection(), ", tis": TIS(), ", permuted": Permuted(corrector=TIS())}
IN_FOUR = {"diffusion_steps": 4}
HALF = "random: nvfp4 at half the rate"


def arms_of(order: str, *formats: str) -> dict[str, dict[str, Any]]:
    """By name the arms of an order: unquantized without a corrector, others with each of `CORRECTORS`."""
    shared = {"sampler": recipe.sampler.replace(**IN_FOUR, rank=RANKS[order]), "learning_rate": RATES[order]}
    return {
        f"{order}: {name}{corrector}": {
            **shared, "rollout_quantization": FORMATS[name], "corrector": CORRECTORS[corrector]
        }
        for name in formats
        for corrector in (CORRECTORS if FORMATS[name] else ("",))
    }  # fmt: skip


RANDOM = arms_of("random", "unquantized", "nvfp4")
PARTS: dict[str, dict[str, dict[str, Any]]] = {
    "nvfp4": RANDOM | {HALF: RANDOM["random: nvfp4"] | {"learning_rate": RATES["random"] / 2}},
    "orders": arms_of("left_to_right", "unquantized", "nvfp4") | arms_of("max_prob", "unquantized", "nvfp4"),
    "formats": arms_of("random", "fp8", "fp8 with inputs", "int4"),
}
COLUMNS = ("after", "sampled", "sampled, max_prob", "quantized", "quantized, sampled")
STUDY = Study(
    name="orders-trained",
    base=recipe.replace(**QUIET, eval_sampler=recipe.eval_sampler.replace(**IN_FOUR)),
    arms={name: arm for arms in PARTS.values() for name, arm in arms.items()},
    against={},
    metrics={"ess": "rollout_corr/ess", "reward": "reward"},
    seeds=10,
    num_steps=60,
)
Claims = Mapping[str, Sequence[float]]
BOTH = {"greedy": ("after", "quantized"), "temperature 1": ("sampled", "quantized, sampled")}  # of learner and copy


def run_evaluated(study: Study, root: Path, num_steps: int, name: str, seed: int) -> None:
    """Train one arm of a seed, and evaluate it at temperature 1, too; leaves `root`/results/....json."""
    kept, policy = train_one(study, root, num_steps, name, seed)
    if policy is None:
        kept |= dict.fromkeys(COLUMNS, 0.0)
    else:
        own, scheme = study.arms[name]["sampler"], study.arms[name]["rollout_quantization"]
        recipe = replace(study.base, seed=seed)
        kept["sampled"] = sampled_solve_rate(policy, recipe, own)
        kept["sampled, max_prob"] = sampled_solve_rate(policy, recipe, own.replace(rank=MaxProb()))
        copy = quantized_copy(policy, scheme) if scheme else policy
        kept["quantized, sampled"] = sampled_solve_rate(copy, recipe, own) if scheme else kept["sampled"]
    keep(root, kept)


def gains(results: Results, tis: str, others: Mapping[str, str]) -> dict[str, list[float]]:
    """By claim TIS less other arms (what they are -> arm), greedily and at temperature 1, of the learner."""
    return {
        f"{tis} is above {claim}, {how}": paired(results, tis, other, learner)
        for claim, other in others.items()
        for how, (learner, _) in BOTH.items()
    }


def beside(arm: str) -> dict[str, str]:
    return {"no corrector": arm, "its permuted weights": f"{arm}, permuted"}


def families(results: Results) -> dict[str, Claims]:
    """By family of claims what `claimed_rows` takes."""
    nvfp4, copy = "random: nvfp4", {}
    for how, (learner, quantized) in BOTH.items():
        copy[f"the copy with TIS is above the copy without, {how}"] = paired(results, f"{nvfp4}, tis", nvfp4, quantized)
        copy[f"without a corrector the copy is above the learner, {how}"] = [
            run[quantized] - run[learner] for (arm, _), run in sorted(results.items()) if arm == nvfp4
        ]
    orders = gains(results, "left_to_right: nvfp4, tis", beside("left_to_right: nvfp4"))
    for how, (column, _) in BOTH.items():
        apart = (paired(results, f"{order}: nvfp4, tis", f"{order}: nvfp4, permuted", column) for order in RANKS)
        random, _, max_prob = apart
        orders[f"TIS gains more over its permuted weights in random order than under MaxProb, {how}"] = [
            a - b
            for a, b in zip(random, max_prob, strict=False)  # equally many in a whole study
        ]
    formats: dict[str, list[float]] = {}
    for name in ("fp8", "fp8 with inputs", "int4"):
        formats |= gains(results, f"random: {name}, tis", beside(f"random: {name}"))
    return {
        "nvfp4, the learner": gains(results, f"{nvfp4}, tis", beside(nvfp4) | {"half the rate": HALF}),
        "nvfp4, the copy": copy,
        "orders": orders,
        "formats": formats,
        "the order by itself": {
            f"unquantized, random order is above MaxProb, {how}": paired(
                results, "random: unquantized", "max_prob: unquantized", column
            )
            for how, column in {"greedy": "after", "temperature 1": "sampled, max_prob"}.items()
        },
    }


NEEDS = {"orders": ("nvfp4", "orders"), "formats": ("formats",), "the order by itself": ("nvfp4", "orders")}


def whole_seeds(results: Results, part: str) -> int:
    """How many seeds have all arms of a part."""
    return sum(all((arm, seed) in results for arm in PARTS[part]) for seed in range(STUDY.seeds))


WORDS = {  # of arms and claims, in tables
    "random: ": "",
    "left_to_right: ": "left to right, ",
    "max_prob: ": "`MaxProb`, ",
    "under MaxProb": "under `MaxProb`",
    "above MaxProb": "above `MaxProb`",
    "unquantized, random": "own rollouts: random",
    "unquantized": "own rollouts",
    "nvfp4": "NVFP4",
    "fp8 with inputs": "FP8, inputs too",
    "fp8": "FP8",
    "int4": "INT4",
    "its permuted weights": "shuffled TIS",
    "permuted": "shuffled TIS",
    " at half the rate": ", half the learning rate",
    "half the rate": "half the learning rate",
    "no corrector": "no correction",
    "a corrector": "a correction",
    ", tis is above": ": TIS is better than",
    "is above the learner": "is better than the full-precision model",
    "is above": "is better than",
    ", tis": ", TIS",
}


def in_words(text: str) -> str:
    for name, words in WORDS.items():
        text = text.replace(name, words)
    return text


HEADS = {
    "after": "greedy, `MaxProb` order",
    "sampled": "temperature 1, order of training",
    "sampled, max_prob": "temperature 1, `MaxProb` order",
    "quantized": "copy, greedy",
    "quantized, sampled": "copy, temperature 1",
    "ess": "ESS",
}


def arms_of_part(results: Results, part: str) -> str:
    """What each arm of a part solves."""
    rows = []
    for row in arm_rows(replace(STUDY, arms=PARTS[part]), results, COLUMNS):
        settings = STUDY.arms[row["arm"]]
        is_plain = settings["rollout_quantization"] and settings["corrector"] == NoCorrection() and row["arm"] != HALF
        rows.append({"trained on": in_words(row["arm"]) + (", no correction" if is_plain else "")})
        rows[-1] |= {head: row[name] for name, head in HEADS.items()}
    return markdown(rows)


def claims_of(claims: Claims) -> str:
    """The claims of a family, with Holm's correction over them."""
    rows = []
    for row in claimed_rows(claims):
        claim, how = in_words(row["stated before the runs"]).rsplit(", ", 1)
        rows.append({"claim": claim, "solved": how, "difference": row["found, 95 %"]})
        rows[-1] |= {"seeds above 0": row["above 0"], "p": row["Holm's p"]}
        rows[-1]["verdict"] = verdict(row)
    return markdown(rows)


def report(results: Results) -> str:
    """How much is there, and of whole parts the arms and the claims: no claim is read before the last seed."""
    seeds = {part: whole_seeds(results, part) for part in PARTS}
    lines = [f"{part}: {number} of {STUDY.seeds} seeds" for part, number in seeds.items()]
    for part in PARTS:
        if seeds[part] == STUDY.seeds:
            lines.append(f"\n{arms_of_part(results, part)}")
    for family, claims in families(results).items():
        if all(seeds[part] == STUDY.seeds for part in NEEDS.get(family, ("nvfp4",))):
            lines.append(f"{family}:\n\n{claims_of(claims)}")
    return "\n".join(lines)


def costs(results: Results) -> str:
    """What the rollouts of each format cost the learner, of which nothing was claimed, and what TIS brings back."""
    rows = []
    for arm in (
        "random: fp8",
        "random: fp8 with inputs",
        "random: int4",
        "random: nvfp4",
        "left_to_right: nvfp4",
        "max_prob: nvfp4",
    ):
        order, name = arm.split(": ")
        rows.append({"rollouts": in_words(name), "order": NAMES[order]})
        for what, more, less in (("cost", f"{order}: unquantized", arm), ("gain of TIS", f"{arm}, tis", arm)):
            for how, (learner, _) in BOTH.items():
                rows[-1][f"{what}, {how}"] = interval(paired(results, more, less, learner))
    return markdown(rows)


def page_tables() -> dict[str, str]:
    """The tables of the study, by name: the arms and the claims of the parts."""
    results = by_arm(read_json(STORED))
    claims = families(results)
    return {
        "costs": costs(results),
        "arms": arms_of_part(results, "nvfp4"),
        "claims": claims_of(claims["nvfp4, the learner"]),
        "claims of the copy": claims_of(claims["nvfp4, the copy"]),
        "arms of formats": arms_of_part(results, "formats"),
        "claims of formats": claims_of(claims["formats"]),
        "arms of orders": arms_of_part(results, "orders"),
        "claims of orders": claims_of(claims["orders"]),
        "claims of the order by itself": claims_of(claims["the order by itself"]),
    }


LABELS = {
    "unquantized": "the model samples",
    "uncorrected": "an NVFP4 copy samples",
    "corrected": "the copy samples, TIS",
}
DRAWN = {"random: unquantized": "unquantized", "random: nvfp4": "uncorrected", "random: nvfp4, tis": "corrected"}
COMPARED = {  # arm: label, color
    "random: nvfp4": ("no\ncorrection", STYLES["uncorrected"]["color"]),
    "random: nvfp4, tis": ("TIS", STYLES["corrected"]["color"]),
    "random: nvfp4, permuted": ("shuffled\nTIS", "#888888"),
    HALF: ("half\nthe rate", "#888888"),
}
SOLVED = "rewards/solve_rate/mean"  # by the rollouts of a step


def store_curves(root: Path) -> None:
    """Write the drawn arms' metrics of every step, of all seeds, if their folders are there."""
    folders = {arm: [root / "runs" / result_path(root, arm, seed).stem for seed in range(STUDY.seeds)] for arm in DRAWN}
    if all(folder.exists() for seeds in folders.values() for folder in seeds):
        steps = {arm: [read_metrics(folder) for folder in seeds] for arm, seeds in folders.items()}
        curves = {
            arm: {SOLVED: [[round(row[SOLVED], 5) for row in rows] for rows in runs]} for arm, runs in steps.items()
        }
        write_json(CURVES, curves)


def draw(path: Path) -> None:
    """The means of the seeds at each step, and after training each arm less the unquantized one."""
    curves, results = read_json(CURVES), by_arm(read_json(STORED))
    with replacing(path) as partial, default_style():
        from matplotlib.figure import Figure

        figure = Figure(figsize=(9, 3.8), layout="constrained")
        solved, after = figure.subplots(1, 2)
        for arm, name in DRAWN.items():
            means = torch.tensor(curves[arm][SOLVED], dtype=torch.float64).mean(0)
            style = {key: STYLES[name][key] for key in ("color", "linestyle")}
            solved.plot(range(1, len(means) + 1), means, **style, linewidth=1.6, label=LABELS[name])
        solved.set(title="Rollouts that solve their puzzle", ylabel="share", xlabel="RL step", ylim=(0, None))
        solved.grid(alpha=0.3)
        figure.legend(*solved.get_legend_handles_labels(), loc="outside lower center", ncols=len(DRAWN))
        for offset, marker, (how, (column, _)) in zip((-0.12, 0.12), "os", BOTH.items(), strict=True):
            for place, (arm, (_, color)) in enumerate(COMPARED.items()):
                apart = paired(results, arm, "random: unquantized", column)
                half = half_width(apart)
                style = {"marker": marker, "color": color, "markerfacecolor": color if marker == "o" else "white"}
                after.errorbar([place + offset], [mean(apart)], [half], **style, capsize=3)
            after.plot(
                [],
                [],
                marker=marker,
                color="gray",
                linestyle="",
                label=how,
                fillstyle="full" if marker == "o" else "none",
            )
        after.axhline(0, color=STYLES["unquantized"]["color"], linestyle=":")
        after.set_xticks(range(len(COMPARED)), [label for label, _ in COMPARED.values()], fontsize=8)
        after.set(title="Held-out puzzles solved after training", ylabel="share, minus that of own samples")
        after.grid(alpha=0.3, axis="y")
        after.legend(loc="lower left")
        figure.savefig(partial, dpi=110, format="png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("runs") / STUDY.name)
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=list(PARTS), help="none: store what is there")
    parser.add_argument("--report", action="store_true", help=f"run nothing: the tables of {STORED.name}")
    parser.add_argument("--draw", action="store_true", help=f"run nothing: draw {PICTURE.name}")
    options = parser.parse_args()
    if options.draw:
        draw(PICTURE)
        return
    root, kept = options.output_dir, read_json(STORED) if STORED.exists() else []
    if not options.report:
        restore_runs(kept, root)
        for part, seed in product(options.parts, range(STUDY.seeds)):
            runs = [(arm, seed) for arm in PARTS[part]]
            run_missing(STUDY, root, runs, num_steps=lambda _: STUDY.num_steps, workers=1, run=run_evaluated)
            write_json(STORED, list(load(root).values()))
        kept = list(load(root).values())
        write_json(STORED, kept)
        store_curves(root)
    print(report(by_arm(kept)))


if __name__ == "__main__":
    main()
