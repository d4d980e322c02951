"""When is a policy for many scaffolds worth its calls, and when is search? Claims, rules and results: scaffolds.md.

    python -m recipes.studies.scaffolds tune             instance 0, which no claim uses
    python -m recipes.studies.scaffolds study            run what is missing, then print the tables
    python -m recipes.studies.scaffolds --report         the tables of the stored runs

A run's number is 10 times the instance of the function plus the seed.
"""

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from shutil import rmtree
from statistics import fmean
from typing import Any

import torch
from torch import Generator, Tensor

from dllm_rl import Policy, load_policy, train
from dllm_rl.decoding.tokens import encode, full_texts
from dllm_rl.files import read_json, write_json
from dllm_rl.monitoring.json_lines import json_objects
from dllm_rl.rng import generator_for
from dllm_rl.tasks import Problem
from recipes import scaffolds
from recipes.elites import BUDGET, infilling, mutations
from recipes.scaffolds import LENGTH, Scaffolds, ehrlich, in_four, natural, score, taught, text_of
from recipes.studies.paired import Results, by_arm, interval, load, markdown, result_path, run_all

NUMBERS = [10 * instance + seed for instance in range(1, 6) for seed in range(5)]
TUNING = [0, 1]  # numbers of instance 0; policies, infilling and A's search, on 0 alone
HELD_OUT, OF_PRETRAINED, OF_TRAINED = 100, 32, 8  # scaffolds; samples of each of them
CALLS = 50  # of elite search, for each scaffold
LONGEST = 200  # calls of elite search up to which "one sample is worth" is counted
TOP = 10
TEMPERATURES = (1.0, 0.5, 0.1)  # of the trained policy
STORED = {"tune": Path(__file__).with_name("scaffolds_tuned.json"), "study": Path(__file__).with_suffix(".json")}

NO_LEARNING = 1e-12  # a rate that changes no weight: rounding is larger

# Tuned on instance 0: see `TRIALS`.
ONE_AT = 0.1  # the temperature of the one sample
POLICY = {"learning_rate": 3e-3}
INFILL = {"learning_rate": 1e-3, "masked": 8}
FROZEN = {"learning_rate": NO_LEARNING, "masked": 8}
ELITE = {"masked": 8, "elites": 20, "chain": "uniform"}
ELITE_OF_SCAFFOLD = {"masked": 8, "elites": 1, "first": 10, "chain": "uniform"}
GENETIC = {"mutation": 0.15}


def chain_of(instance: int, kind: str) -> Tensor:
    """(20, 20) fp64 transitions: of nature, or "uniform" over those that are feasible."""
    transitions = ehrlich(instance).transition_matrix.double()
    if kind == "natural":
        return transitions
    feasible = (transitions > 0).double()
    return feasible / feasible.sum(1, keepdim=True)


def fill(chain: Tensor, sequences: Sequence[str], generator: Generator) -> list[str]:
    """The blanks "_" drawn from the chain, given all other residues: exact, backward sums and forward draws."""
    size = len(chain)
    numbers = torch.tensor([[f"{scaffolds.RESIDUES}_".index(residue) for residue in text] for text in sequences])
    allowed = torch.cat([torch.eye(size), torch.ones(1, size)]).double()[numbers]  # (N, 32, 20)
    after = [torch.ones(len(sequences), size, dtype=torch.double)]  # of the rest of the sequence, given a residue
    for place in range(LENGTH - 1, 0, -1):
        after.insert(0, (allowed[:, place] * after[0]) @ chain.T)
        after[0] /= after[0].amax(1, keepdim=True).clamp_min(1e-300)
    rows = torch.zeros(len(sequences), LENGTH, dtype=torch.long)
    before = torch.full((len(sequences), size), 1 / size, dtype=torch.double)
    for place in range(LENGTH):
        weights = before * allowed[:, place] * after[place]
        # Residues of two parents may leave no feasible way: these positions are drawn freely, and score 0.
        weights = torch.where(weights.sum(1, keepdim=True) > 0, weights, allowed[:, place])
        rows[:, place] = torch.multinomial(weights, 1, generator=generator)[:, 0]
        before = chain[rows[:, place]]
    return [text_of(row) for row in rows]


def area(values: Sequence[float]) -> float:
    """The mean over the calls 1 to BUDGET of the mean of the TOP best so far; fewer calls keep their last."""
    best: list[float] = []
    total = 0.0
    for value in values[:BUDGET]:
        best = sorted([*best, value], reverse=True)[:TOP]
        total += sum(best) / TOP
    return (total + (BUDGET - len(values[:BUDGET])) * sum(best) / TOP) / BUDGET


def start_of(root: Path, number: int) -> Policy:
    """The pretrained model of a run's number: made once, the same for all arms."""
    folder = root / "starts" / str(number)
    if not folder.exists():
        taught(number // 10, seed=number % 10).save_pretrained(folder)
    return load_policy(folder)


def texts_of(
    policy: Policy, problems: Sequence[Problem], samples: int, temperature: float, *key: object
) -> list[list[str]]:
    """By problem: its samples."""
    seeds = torch.randint(2**62, (len(problems) * samples,), generator=generator_for(*key)).tolist()
    prompts = encode(policy, problems, num_generations=samples, seeds=seeds)
    sampler = in_four.replace(temperature=temperature)
    texts = full_texts(policy, sampler(policy, prompts, generator_for(*key)))
    return [texts[i : i + samples] for i in range(0, len(texts), samples)]


def scaffold_texts(task: Scaffolds) -> list[str]:
    return [task[i].prompt[0]["content"] for i in range(len(task))]


def run_policy(root: Path, number: int, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Claim A: the trained policy, the pretrained one, and elite search on held-out scaffolds."""
    instance = number // 10
    task = Scaffolds(instance, "test", HELD_OUT)
    problems = [task[i] for i in range(HELD_OUT)]
    pretrained = start_of(root, number)
    before = texts_of(pretrained, problems, OF_PRETRAINED, 1.0, number, "before")
    pretrained_scores = [score(instance, texts) for texts in before]
    folder = root / "runs" / f"policy-{number}"
    rmtree(folder, ignore_errors=True)
    held = Scaffolds(instance, "validation", 8)
    recipe = scaffolds.recipe.replace(
        **{"model": pretrained, "task": Scaffolds(instance, "train", 4000), "validation_task": held, "eval_task": held},
        **{"seed": number, "output_dir": str(folder), "eval_steps": 0, "report_to": None, "save_steps": 1000},
        **settings,
    )
    trained = train(recipe).policy
    rmtree(folder)
    ones = {}
    for temperature in TEMPERATURES:
        after = texts_of(trained, problems, OF_TRAINED, temperature, number, "after")
        ones[temperature] = fmean(fmean(score(instance, texts)) for texts in after)
    return {
        "one": ones[ONE_AT],
        **{f"one@{temperature:g}": value for temperature, value in ones.items()},
        "pretrained_one": fmean(map(fmean, pretrained_scores)),
        "pretrained_best": fmean(map(max, pretrained_scores)),
        "calls": recipe.num_steps * recipe.train_batch_size * recipe.num_generations,
    } | of_search(number, ones[ONE_AT], ELITE_OF_SCAFFOLD)


def of_search(number: int, one: float, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Elite search on the held-out scaffolds: its best after CALLS, and the calls after which it reaches `one`."""
    curve = search_scaffolds(number, **settings)
    worth = next((calls for calls, value in enumerate(curve, 1) if value >= one), LONGEST)
    return {"search": curve[CALLS - 1], "worth": worth}


def search_scaffolds(number: int, *, masked: int, elites: int, first: int, chain: str) -> list[float]:
    """The mean over the held-out scaffolds of the best value after 1 to LONGEST calls. A known sequence is no call; a
    scaffold that finds none that is new in 20 tries keeps its best."""
    instance = number // 10
    transitions, generator = chain_of(instance, chain), generator_for(number, "search")
    texts = scaffold_texts(Scaffolds(instance, "test", HELD_OUT))
    free = [[i for i, residue in enumerate(text) if residue == "_"] for text in texts]
    known: list[dict[str, float]] = [{} for _ in texts]
    tries = [0] * len(texts)
    while waiting := [i for i in range(len(texts)) if len(known[i]) < LONGEST and tries[i] < 20]:
        parents = []
        for i in waiting:
            if len(known[i]) < first:
                parents.append(texts[i])
            else:
                best = sorted(known[i], key=known[i].__getitem__, reverse=True)[:elites]
                (parent,) = mutations(best, 1, 0, generator)
                order = torch.randperm(len(free[i]), generator=generator)[:masked].tolist()
                blank = {free[i][k] for k in order}
                parents.append("".join("_" if k in blank else residue for k, residue in enumerate(parent)))
        for i, text, value in zip(waiting, *scored(instance, fill(transitions, parents, generator)), strict=True):
            tries[i] = tries[i] + 1 if text in known[i] else 0
            known[i].setdefault(text, value)
    curves = [[*known_values.values()] for known_values in known]
    return [fmean(max(values[:calls]) for values in curves) for calls in range(1, LONGEST + 1)]


def scored(instance: int, texts: list[str]) -> tuple[list[str], list[float]]:
    return texts, score(instance, texts)


def run_infilling(root: Path, number: int, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Claim B, infilling as mutation by GRPO; at the rate NO_LEARNING the same loop without learning."""
    folder = root / "runs" / f"infilling-{number}-{'-'.join(map(str, settings.values()))}"
    rmtree(folder, ignore_errors=True)
    places = {"output_dir": str(folder), "report_to": None, "save_steps": 1000}
    train(infilling(number // 10, start_of(root, number), seed=number, **places, **settings))
    values = [row["reward"] for row in json_objects(folder / "oracle.jsonl")]
    steps = len([*json_objects(folder / "metrics.jsonl")])
    rmtree(folder)
    return of_values(values) | {"steps": steps}


def of_values(values: Sequence[float]) -> dict[str, Any]:
    """What a search of one function leaves: its area, the mean of its TOP best, and the calls to the first 1."""
    top = fmean(sorted(values[:BUDGET], reverse=True)[:TOP])
    solved = next((calls for calls, value in enumerate(values[:BUDGET], 1) if value == 1), None)
    return {"area": area(values), "top": top, "solved": solved, "calls": min(BUDGET, len(values))}


def run_elites(root: Path, number: int, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Feasible elite search of one function: as infilling, with the exact chain in place of the model."""
    instance, generator = number // 10, generator_for(number, "elites")
    chain, known = chain_of(instance, settings["chain"]), dict[str, float]()
    parents = ["_" * LENGTH] * 128
    for _ in range(500):
        new = [text for text in dict.fromkeys(fill(chain, parents, generator)) if text not in known]
        known |= zip(*scored(instance, new), strict=True)
        if len(known) >= BUDGET:
            break
        best = sorted(known, key=known.__getitem__, reverse=True)[: settings["elites"]]
        parents = mutations(best, 128, settings["masked"], generator)
    return of_values([*known.values()])


def run_genetic(root: Path, number: int, settings: Mapping[str, Any]) -> dict[str, Any]:
    """pytorch-holo's genetic algorithm: 100 particles that begin as natural sequences."""
    from holo.optim import DiscreteEvolution

    instance = number // 10
    particles = natural(instance, 100, generator_for(number, "genetic")).float()
    known = dict[str, float]()

    def loss(groups: list[Tensor]) -> Tensor:
        values = ehrlich(instance)(groups[0])
        for row, value in zip(groups[0].long(), values.clamp_min(0).tolist(), strict=True):
            known.setdefault(text_of(row), value)
        return -values

    best = torch.nn.Parameter(particles[0])
    sizes = {"num_particles": 100, "survival_quantile": 0.02, "recombine_prob": 0.5}
    search = DiscreteEvolution([best], [*range(20)], mutation_prob=settings["mutation"], **sizes)
    search.state[best]["particles"] = particles
    with torch.random.fork_rng():  # it draws from the global one
        torch.manual_seed(number)
        for _ in range(500):
            search.step(loss)
            if len(known) >= BUDGET:
                break
    return of_values([*known.values()])


def run_search(root: Path, number: int, settings: Mapping[str, Any]) -> dict[str, Any]:
    return of_search(number, 1.0, settings)


Run = Callable[[Path, int, Mapping[str, Any]], dict[str, Any]]
ARMS: dict[str, tuple[Run, Mapping[str, Any]]] = {
    "policy": (run_policy, POLICY),
    "infilling": (run_infilling, INFILL),
    "no learning": (run_infilling, FROZEN),
    "elite search": (run_elites, ELITE),
    "genetic": (run_genetic, GENETIC),
}
TRIALS: dict[str, tuple[Run, Mapping[str, Any]]] = {
    **{
        f"scaffolds {chain}, {elites}, {masked}": (
            run_search,
            {"masked": masked, "elites": elites, "first": 10, "chain": chain},
        )
        for chain in ("natural", "uniform")
        for elites in (1, 3)
        for masked in (8, 12)
    },
    **{f"genetic {rate:g}": (run_genetic, {"mutation": rate}) for rate in (1 / 32, 1 / 16, 0.1, 0.15, 0.2, 0.3)},
    **{
        f"elites {chain}, {masked}": (run_elites, {"masked": masked, "elites": 20, "chain": chain})
        for chain in ("natural", "uniform")
        for masked in (4, 8, 16)
    },
    **{
        f"infilling {rate:g}, {masked}, {temperature:g}": (
            run_infilling,
            {"learning_rate": rate, "masked": masked, "temperature": temperature},
        )
        for masked, temperature, rates in (
            (8, 1.0, (NO_LEARNING, 1e-3, 3e-3)),
            (16, 1.0, (NO_LEARNING, 1e-3)),
            (8, 1.5, (NO_LEARNING, 1e-3, 3e-3)),
            (4, 1.5, (NO_LEARNING, 1e-3)),
        )
        for rate in rates
    },
    **{
        f"policy {rate:g}, {steps} x {size}": (
            run_policy,
            {"learning_rate": rate, "num_steps": steps, "train_batch_size": size},
        )
        for rate, steps, size in ((1e-3, 40, 64), (3e-3, 40, 64), (3e-3, 80, 32), (2e-3, 160, 16))
    },
}


def run_one(root: Path, arm: str, number: int) -> None:
    """A run, or a trial, whose numbers are kept as one JSON."""
    function, settings = (ARMS | TRIALS)[arm]
    began = time.process_time()
    kept = {"arm": arm, "seed": number, **settings, **function(root, number, settings)}
    path = result_path(root, arm, number)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, kept | {"cpu_s": round(time.process_time() - began, 1)})


def run_missing(root: Path, runs: Sequence[tuple[str, int]], workers: int | None) -> None:
    """Those that have left no result, in the order given; first the models that they start from."""
    done = load(root)
    missing = [run for run in runs if run not in done]
    numbers = dict.fromkeys(n for arm, n in missing if (ARMS | TRIALS)[arm][0] in (run_policy, run_infilling))
    for number in numbers:  # one by one: each number's model, then its runs
        start = [(f"start-{number}", partial(start_of, root, number))]
        run_all(start, root, 1)
        run_all(jobs_of(root, [run for run in missing if run[1] == number]), root, workers)
    run_all(jobs_of(root, [run for run in missing if run[1] not in numbers]), root, workers)


def jobs_of(root: Path, runs: Sequence[tuple[str, int]]) -> list[tuple[str, Callable[[], object]]]:
    return [(result_path(root, arm, number).stem, partial(run_one, root, arm, number)) for arm, number in runs]


def claims() -> list[tuple[str, str, str, str, str]]:
    """(claim, arm, its column, the arm against, its column) of what was stated before the runs."""
    first = "one sample of the trained policy is above "
    second = "infilling GRPO's area is above "
    return [
        (first + f"the pretrained model's best of {OF_PRETRAINED}", "policy", "one", "policy", "pretrained_best"),
        (first + f"{CALLS} calls of elite search for each scaffold", "policy", "one", "policy", "search"),
        *(
            (second + name, "infilling", "area", arm, "area")
            for name, arm in (
                ("that of the same loop without learning", "no learning"),
                ("that of feasible elite search", "elite search"),
                ("that of the genetic algorithm", "genetic"),
            )
        ),
    ]


def claim_rows(results: Results) -> list[dict[str, str]]:
    """By claim: the mean difference over instances with the interval of their means, and the runs above 0."""
    rows = []
    for claim, arm, column, against, of in claims():
        both = [n for n in NUMBERS if (arm, n) in results and (against, n) in results]
        apart = {n: results[arm, n][column] - results[against, n][of] for n in both}
        instances = sorted({n // 10 for n in both})
        means = [fmean(value for n, value in apart.items() if n // 10 == instance) for instance in instances]
        row = {"stated before the runs": claim, "runs": str(len(both))}
        row["difference, 95 %"] = interval(means) if means else "-"
        row["each instance"] = ", ".join(f"{value:.3f}" for value in means)
        rows.append(row | {"above 0": f"{sum(value > 0 for value in apart.values())} of {len(both)}"})
    return rows


def values_of(results: Results, arm: str, column: str, instance: int) -> list[float]:
    return [results[arm, n][column] for n in NUMBERS if n // 10 == instance and (arm, n) in results]


# By claim: the column of its table, and the arm and the column of the results that it shows.
SHOWN: dict[str, dict[str, tuple[str, str]]] = {
    "A": {
        "pretrained, one sample": ("policy", "pretrained_one"),
        f"pretrained, best of {OF_PRETRAINED}": ("policy", "pretrained_best"),
        "trained, one sample": ("policy", "one"),
        f"elite search, {CALLS} calls": ("policy", "search"),
        "one sample is worth, calls": ("policy", "worth"),
    },
    "B": {arm: (arm, "area") for arm in ("infilling", "no learning", "elite search", "genetic")},
}


def instance_rows(results: Results, claim: str) -> list[dict[str, str]]:
    """By instance: the mean over its seeds; last the mean over the instances with its interval."""
    shown = SHOWN[claim]
    places = {n // 10 for n in NUMBERS if all((arm, n) in results for arm, _ in shown.values())}
    means = {name: {i: fmean(values_of(results, *of, i)) for i in sorted(places)} for name, of in shown.items()}
    digits = {name: 0 if column == "worth" else 3 for name, (_, column) in shown.items()}
    rows = [
        {"instance": str(i), **{name: f"{means[name][i]:.{digits[name]}f}" for name in shown}} for i in sorted(places)
    ]
    last = {name: interval([*values.values()], digits[name]) for name, values in means.items()}
    return [*rows, {"instance": "mean, 95 %"} | last]


def picture(results: Results, path: Path) -> None:
    """By instance a dot a seed, beside it the mean: the columns of A that are scores, and the areas of B."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9.0, 3.0), layout="constrained")
    titles = {"A": "A: a held-out scaffold", "B": f"B: one function, area at {BUDGET:,} calls"}
    for axis, (claim, title) in zip(axes, titles.items(), strict=True):
        shown = [(name, of) for name, of in SHOWN[claim].items() if of[1] != "worth"]
        for place, (name, of) in enumerate(shown):
            for instance in range(1, 6):
                values = values_of(results, *of, instance)
                x = instance + 0.18 * (place - (len(shown) - 1) / 2)
                axis.plot([x] * len(values), values, ".", color=f"C{place}", markersize=4, alpha=0.5)
                axis.plot(x, fmean(values), "_", color=f"C{place}", label=name if instance == 1 else None)
        axis.set_title(title, loc="left", fontsize=10)
        axis.set_xlabel("instance of the function")
        axis.set_ylim(0, 1.05 if claim == "B" else 0.48)
        axis.grid(axis="y", alpha=0.3)
        axis.legend(fontsize=7, ncols=2, loc="upper left" if claim == "A" else "lower left")
    axes[0].set_ylabel("score")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def page_tables() -> dict[str, str]:
    results = by_arm(read_json(STORED["study"]))
    instances = {f"instances of {claim}": markdown(instance_rows(results, claim)) for claim in SHOWN}
    return instances | {"claims": markdown(claim_rows(results))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("which", nargs="?", choices=("tune", "study"), default="study")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/scaffolds_study"))
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--report", action="store_true", help="run nothing: the tables of the runs that are there")
    options = parser.parse_args()
    root, tuning = options.output_dir / options.which, options.which == "tune"
    # Seed by seed over the instances, so that a part of the runs is a part of every instance.
    numbers = TUNING if tuning else sorted(NUMBERS, key=lambda number: (number % 10, number))
    runs = [(arm, number) for number in numbers for arm in (TRIALS if tuning else ARMS)]
    if tuning:
        runs = [run for run in runs if run[1] == 0 or TRIALS[run[0]][0] in (run_elites, run_genetic)]
    if not options.report:
        run_missing(root, runs, options.workers)
    results, stored = load(root), STORED[options.which]
    if results and not options.report:
        write_json(stored, [results[run] for run in runs if run in results])
    elif not results and stored.exists():
        results = by_arm(read_json(stored))
    print(f"{len(results)} of {len(runs)} runs\n")
    if not tuning:
        for claim in SHOWN:
            print(markdown(instance_rows(results, claim)))
        print(markdown(claim_rows(results)))
        if not options.report:
            picture(results, stored.with_suffix(".png"))


if __name__ == "__main__":
    main()
