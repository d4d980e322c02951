"""The tables of README.md beside this file, from results/, and of docs/likelihoods.md, from the dry run's plan.

`python -m recipes.studies --write` writes them.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.measure import operations_of_a_token
from dllm_rl.files import read_json
from dllm_rl.likelihoods.estimators import ELBO, Coupled, LikelihoodEstimator, OneStep, Trajectory
from dllm_rl.quantization.schemes import Float8Dynamic
from dllm_rl.training.dry_run.duration import PEAK_FLOPS, stage_seconds
from dllm_rl.training.dry_run.memory import PlannedStep
from dllm_rl.training.dry_run.plan import meta_policy
from recipes.llada_8b import recipe_of
from recipes.studies.paired import markdown

RESULTS = Path(__file__).parent / "results"
BLOCK_WEIGHTS = 32 * (4 * 4096**2 + 3 * 4096 * 12288)  # of LLaDA-8B


def stored(name: str) -> Any:
    return read_json(RESULTS / f"{name}.json")


def run_on_a_gpu() -> str:
    rows = []
    for task in ("sums", "countdown"):
        for run in stored("gpu-h200")["parts"][f"run {task}"]["rows"]:
            rates = {f"accuracy {when}": f"{run[when] + 1e-9:.3f}" for when in ("before", "after")}
            row = {"task": task, "rollouts": run["what"].split()[-1]} | rates
            row |= {"mean abs log-ratio, nats": f"{run['mean abs d, nats']:.3f}", "ESS": f"{run['ESS']:.3f}"}
            row["least ESS"] = f"{run['least ESS']:.3f}"
            seconds = {"seconds of a rollout": "rollout, s a step", "seconds of a step": "step, s"}
            rows.append(row | {head: f"{run[name]:.3f}" for head, name in seconds.items()})
    return markdown(rows)


def sampler_on_a_gpu() -> str:
    """Tokens a second; of two ways of the stored ones the page says nothing."""
    parts, rows = stored("gpu-h100")["parts"], []
    speeds = {batch: {r["what"]: r["tokens/s"] for r in parts[f"sampler {batch}"]["rows"]} for batch in (1, 8)}
    for way in ("plain: the published algorithm", "exact", "dual cache", "FP8"):
        row = {"sampler": f"{way} (approximate)" if "cache" in way else way}
        for batch in (1, 8):
            for head, suffix in (("eager", ""), ("compiled", ", compiled")):
                speed = speeds[batch].get(way + suffix)
                row[f"batch {batch}, {head}"] = "-" if speed is None else f"{speed:.0f}"
        rows.append(row)
    return markdown(rows)


def sampler_on_an_h200() -> str:
    """Tokens a second, eager, and the memory beside the weights, of the ways that the other GPU's table has."""
    found = {(row["what"], row["batch"]): row for row in stored("gpu")["parts"]["sampler"]["rows"]}
    rows = []
    for way in ("plain: the published algorithm", "exact", "dual cache"):
        row = {"sampler": f"{way} (approximate)" if "cache" in way else way}
        row |= {f"batch {batch}": f"{found[way, batch]['tokens/s']:,.0f}" for batch in (1, 8, 64)}
        rows.append(row | {f"GiB, batch {batch}": f"{found[way, batch]['peak GiB']:.1f}" for batch in (1, 8, 64)})
    return markdown(rows)


def step_on_an_h200() -> str:
    """Seconds of a training step, whose rewards were all equal, and all of the run's memory."""
    (found,) = stored("gpu")["parts"]["step"]["rows"]
    stages = ("rollout", "scoring", "update", "sync")
    row = {"seconds of the step": f"{found['step, s']:.1f}"}
    row |= {f"{stage}": f"{found[f'{stage}, s']:.1f}" for stage in stages}
    return markdown([row | {"GiB, weights included": f"{found['peak GiB, all']:.1f}"}])


def share_of_the_peak() -> str:
    """Operations a second of LLaDA-8B's forwards in rollouts, and the share of the peak of dense bf16.

    The first step of a batch runs one row of each prompt, and the others all rows. The host is the limit where 8 rows
    took at most a tenth more time than one row.
    """
    h100, h200 = stored("gpu-h100")["parts"], stored("gpu")["parts"]
    runs: list[tuple[str, str, int, int, int, float, int]] = []  # GPU, way, rows, columns, steps, seconds, prompts
    for batch in (1, 8):
        of_batch = {row["what"]: row["seconds"] for row in h100[f"sampler {batch}"]["rows"]}
        for way, what in (("bf16", "exact"), ("FP8", "FP8")):
            for how, suffix in (("eager", ""), ("compiled", ", compiled")):
                runs.append(("H100", f"{way}, {how}", batch, 192, 64, of_batch[what + suffix], batch))
    for row in h200["sampler"]["rows"]:
        if row["what"] == "exact":
            runs.append(("H200", "bf16, eager", row["batch"], 192, 64, row["seconds"], row["batch"]))
    for row in h200["fp8"]["rows"]:
        if row["what"].startswith("FP8 products"):
            way = row["what"].replace(" products", "") + ", older code"
            runs.append(("H200", way, 8, 192, 64, row["seconds"], 8))
    (step,) = h200["step"]["rows"]
    runs.append(("H200", "FP8, compiled, a training step", 48, 512, 32, step["rollout, s"], 8))
    times = {(gpu, way, rows): seconds for gpu, way, rows, *_, seconds, _ in runs}
    table = []
    for gpu, way, rows, columns, steps, seconds, prompts in sorted(runs, key=lambda run: run[:2]):
        tokens = columns * (prompts + rows * (steps - 1))
        speed = tokens * operations_of_a_token(BLOCK_WEIGHTS, columns, 4096, 32) / seconds
        row = {"GPU": gpu, "rollouts": way, "rows": str(rows), "columns": str(columns)}
        row |= {"ms a denoising step": f"{1000 * seconds / steps:.1f}", "TFLOP/s": f"{speed / 1e12:,.0f}"}
        row["of bf16's peak"] = f"{speed / PEAK_FLOPS:.2f}"
        one, eight = times.get((gpu, way, 1)), times.get((gpu, way, 8))
        is_host = one is not None and eight is not None and eight <= 1.1 * one
        row["the host is the limit"] = "yes" if is_host else "no" if one and rows > 1 else "-"
        table.append(row)
    return markdown(table)


def sampler() -> str:
    timed, memory = (stored(name)["lines"] for name in ("sampler_cpu_processor", "sampler_cpu"))
    rows = []
    for way, found in timed.items():
        if way in memory and not way.endswith("temperature 1"):
            row = {"sampler": way, "processor seconds": f"{found['cpu_seconds']:.1f}"}
            row |= {"speed-up": f"{found['speedup']:.2f}"}
            row |= {"peak memory": f"{100 * memory[way]['memory_ratio']:.1f} %"}
            rows.append(row | {"same tokens": f"{100 * found['same_tokens']:.0f} %"})
    return markdown(rows)


def learner() -> str:
    """How long the published step takes, in times of ours."""
    rows: dict[str, dict[str, str]] = {}
    for found in stored("update-cpu")["published"]:
        row = rows.setdefault(found["step"], {"step": found["step"]})
        if found["arm"] != "published":
            row[found["arm"]] = f"{found['ratio']:.2f}"
    return markdown([*rows.values()])


def peers() -> str:
    """How long d1's functions take, in times of ours: as they are, then without what only one of the two does."""
    rows = []
    for found in stored("peers-cpu")["rows"]:
        row = {"vocabulary": f"{found['vocabulary']:,}", "tokens": str(found["tokens"]), "batch": str(found["batch"])}
        names = ("step", "step, greedy", "step, d1's masks", "learning", "learning, d1's masks")
        rows.append(row | {name: f"{found[f'd1 / ours, {name}']:.2f}" for name in names})
    return markdown(rows)


def peers_dllm() -> str:
    """How long dllm's sampler takes, in times of ours."""
    rows = []
    for found in stored("peers-dllm-cpu")["rows"]:
        row = {"denoising steps": str(found["steps"]), "vocabulary": f"{found['vocabulary']:,}"}
        row |= {"tokens": str(found["tokens"]), "batch": str(found["batch"])}
        rows.append(
            row | {"rollout": f"{found['dllm / ours']:.2f}", "rollout, greedy": f"{found['dllm / ours, greedy']:.2f}"}
        )
    return markdown(rows)


def peers_trl() -> str:
    """How long TRL's trainer takes, in times of ours, and the memory of both where it was measured."""
    rows, peak = [], stored("peers-trl-cpu")["peak_mib"]
    for found in stored("peers-trl-cpu")["rows"]:
        row = {"vocabulary": f"{found['vocabulary']:,}", "completions": str(4 * found["prompts"])}
        row |= {"tokens: prompt + new": f"{found['prompt']} + {found['new']}"}
        row |= {what: f"{found[f'TRL / ours, {what}']:.2f}" for what in ("step", "generation")}
        is_measured = all(found[name] == peak[name] for name in ("vocabulary", "prompts", "prompt", "new"))
        row["memory, MiB: TRL, ours"] = f"{peak['TRL']:,}, {peak['ours']:,}" if is_measured else "-"
        rows.append(row)
    return markdown(rows)


def limit() -> str:
    """A step in times of its matrix products."""
    return markdown(
        [
            {
                "step": found["arm"],
                "step / products": f"{found['ratio']:.2f}",
                "operators / products": f"{found['operators / products']:.2f}",
                "compiled step / products": f"{found['ratio, compiled']:.2f}",
            }
            for found in stored("limit-cpu")["rows"]
        ]
    )


def likelihoods() -> str:
    """Forwards and planned seconds of a step of `llada_8b`, with FP8 rollouts."""
    recipe = recipe_of()
    policy, rows = meta_policy(recipe), []
    recipe = replace(recipe, rollout_quantization=Float8Dynamic(), max_retained_graphs=0)
    estimators: dict[str, LikelihoodEstimator] = {
        "Trajectory()": Trajectory(),
        "Trajectory(num_segments=8)": Trajectory(num_segments=8),
        "ELBO(num_samples=4)": ELBO(num_samples=4),
        "Coupled(num_samples=2)": Coupled(num_samples=2),
        "OneStep()": OneStep(),
    }
    for name, estimator in estimators.items():
        step = PlannedStep(replace(recipe, likelihood=estimator), policy, 256)
        seconds, copied = stage_seconds(step), 0 if estimator.exact_for_sampler else step.num_views
        row = {"estimator": f"`{name}`", "forwards to score: learner, copy": f"{step.num_views}, {copied}"}
        row |= {"forwards of the update": f"{step.num_views}", "seconds of the rollout": f"{seconds['rollout']:.0f}"}
        row |= {"seconds to score": f"{seconds['scoring']:.1f}", "seconds of the update": f"{seconds['update']:.1f}"}
        rows.append(row | {"seconds of the step": f"{sum(seconds.values()):.0f}"})
    return markdown(rows)


def page_tables() -> dict[str, str]:
    of_gpus = {"a run on a GPU": run_on_a_gpu(), "the sampler on a GPU": sampler_on_a_gpu()}
    of_gpus |= {"the sampler on an H200": sampler_on_an_h200(), "a step on an H200": step_on_an_h200()}
    of_gpus["the share of the peak"] = share_of_the_peak()
    of_peers = {"d1": peers(), "dllm": peers_dllm(), "TRL": peers_trl(), "the step and its products": limit()}
    return of_gpus | of_peers | {"the sampler": sampler(), "the learner": learner(), "likelihoods": likelihoods()}
