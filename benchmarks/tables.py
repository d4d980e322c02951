"""The tables of README.md beside this file, from results/: `python -m recipes.studies --write` writes them."""

from pathlib import Path
from typing import Any

from dllm_rl.files import read_json
from recipes.studies.paired import markdown

RESULTS = Path(__file__).parent / "results"


def stored(name: str) -> Any:
    return read_json(RESULTS / f"{name}.json")


def run_on_a_gpu() -> str:
    rows = []
    for task in ("sums", "countdown"):
        for run in stored("gpu-h200")["parts"][f"run {task}"]["rows"]:
            rates = {f"accuracy {when}": f"{run[when] + 1e-9:.3f}" for when in ("before", "after")}
            row = {"task": task, "rollouts": run["what"].split()[-1]} | rates
            row |= {"mean abs log-ratio, nats": f"{run['mean abs d, nats']:.3f}", "ESS": f"{run['ESS']:.3f}"}
            rows.append(row | {"least ESS": f"{run['least ESS']:.3f}"})
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


def page_tables() -> dict[str, str]:
    of_gpus = {"a run on a GPU": run_on_a_gpu(), "the sampler on a GPU": sampler_on_a_gpu()}
    return of_gpus | {"the sampler": sampler(), "the learner": learner()}
