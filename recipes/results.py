"""The tables of README.md beside this file, from results.json: `python -m recipes.studies --write` writes them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from dllm_rl.files import read_json
from recipes.studies.paired import markdown

STORED = Path(__file__).with_suffix(".json")
RATES = "solve rate before -> after (quantized net)"
SUDOKU = {  # recipe -> what it is, and the corrector of its stored runs
    "sudoku_unique": ("masked diffusion", "none"),
    "sudoku_tiny_ar": ("autoregressive", "AIS"),
    "sudoku_tiny_llada": ("LLaDA's layout", "AIS"),
    "renoise_sudoku": ("DiffusionGemma's layout", "none"),
}


def by_seed(pairs: Sequence[str]) -> dict[str, str]:
    return {f"seed {seed}": pair for seed, pair in enumerate(pairs)}


def arrows(before: Sequence[float], after: Sequence[float]) -> dict[str, str]:
    return by_seed([f"{b:.3f}→{a:.3f}" for b, a in zip(before, after, strict=True)])


def rates_of(run: Mapping[str, Any], of: str = RATES) -> str:
    """A run's rates before and after, without that of the quantized net."""
    rates = run[of].split(" (")[0].removeprefix("supervised: ")
    return rates.replace("; then RL: ", "→").replace(" -> ", "→")


def latin_squares(arms: Sequence[Mapping[str, Any]]) -> str:
    rows = []
    for arm in arms:
        row = {"rollouts": arm["rollouts"], "mean abs(log rho), nats": f"{mean(arm['mismatch']):.3f}"}
        row |= {"ESS": f"{mean(arm['ESS']):.3f}", "least ESS": f"{min(arm['least ESS']):.3f}"}
        rows.append(row | arrows(arm["before"], arm["after"]))
    return markdown(rows)


def shortest_to_longest(times: Sequence[str]) -> str:
    """Of "485 + 833" and "485 + 421": "485 + 421 to 833". The first part is the same in all runs."""
    firsts, numbers = zip(*(time.rpartition("+ ")[::2] for time in times), strict=True)
    first = f"{firsts[0]}+ " if firsts[0] else ""
    return f"{first}{min(numbers, key=int)} to {max(numbers, key=int)}"


def sudoku(found: Mapping[str, Any]) -> str:
    rows = []

    def row(name: str, what: str, corrector: str, rates: Mapping[str, str], seconds: str = "-") -> None:
        rows.append({"recipe": f"`{name}`", "what it is": what, "corrector": corrector, **rates, "seconds": seconds})

    for name, (what, corrector) in SUDOKU.items():
        runs = [run for run in found["sudoku"] if run["recipe"] == name]
        row(name, what, corrector, by_seed([*map(rates_of, runs)]), ", ".join(run["seconds in all"] for run in runs))
    experts, cpp = found["sudoku_tiny_moe"], found["llama_cpp_sudoku"]
    row("sudoku_tiny_moe", "8 experts, 2 per token", "AIS", arrows(experts["before"], experts["after"]))
    rates = arrows(cpp["before"], cpp["Q8_0, 1800 steps: after"])
    row("engines/llama_cpp_sudoku", "rollouts by llama.cpp in `Q8_0`", "AIS", rates)
    runs = found["countdown"]
    seconds = ", ".join(run["seconds, two threads, idle machine"].split(",")[0] for run in runs)
    rates = by_seed([rates_of(run, "accuracy before -> after") for run in runs])
    row("countdown_tiny", "numbers and a target", "none", rates, seconds)
    return markdown(rows)


def pretrained(found: Mapping[str, Any]) -> str:
    rows, names = [], dict.fromkeys(run["recipe"] for run in found["pretrained"])
    for name in names:
        runs = [run for run in found["pretrained"] if run["recipe"] == name]
        rates = dict.fromkeys((f"seed {seed}" for seed in range(5)), "-")
        rates |= by_seed([*map(rates_of, runs)])
        rows.append(
            {
                "recipe": name,
                "corrector": "AIS",
                **rates,
                "seconds": shortest_to_longest([run["seconds"] for run in runs]),
            }
        )
    return markdown(rows)


def page_tables() -> dict[str, str]:
    found = read_json(STORED)
    recipe, *five_levels = found["latin_sudoku"]["rows"]
    return {
        "Latin squares": latin_squares([recipe]),
        "Latin squares at five levels": latin_squares([recipe, *five_levels]),
        "Sudoku": sudoku(found),
        "pretrained models": pretrained(found),
    }
