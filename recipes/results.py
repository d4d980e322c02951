"""The tables of README.md and results.md, from results.json, and the list of examples, from their docstrings.

`python -m recipes.studies --write` writes them.
"""

import ast
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from dllm_rl.files import read_json
from recipes.studies.paired import interval, markdown

STORED = Path(__file__).with_suffix(".json")
STUDIES = STORED.with_name("studies")
RATES = "solve rate before -> after (quantized net)"
EXPERTS = "sudoku_unique --layout llada_moe"
SUDOKU = {  # recipe -> the corrector of its stored runs
    "sudoku_unique": "none",
    "sudoku_unique --layout autoregressive": "AIS",
    "sudoku_unique --layout llada": "AIS",
    "sudoku_unique --layout diffusion_gemma": "none",
}

EXAMPLES = {  # by what they are about
    "your data": "chats_then_rl infill_digits own_task reward_service turns d1_prompts",
    "a model of your own": "own_module own_block_module own_cache attention_window",
    "likelihoods": "own_estimator estimator_right score_texts bounds control_variates coupled_grpo fork_grpo "
    "informed_masking just_grpo_fast",
    "losses, corrections, loops": "own_loss own_corrector correctors_elsewhere own_loop own_doctor detached_loss "
    "replay trees unequal_groups paired_study",
    "samplers, orders, formats, engines": "own_order own_engine quantized_engines few_levels sampler_at_once "
    "noisy_order learned_order rewriting_rule sglang_confidence generate_alone",
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


def span(numbers: Sequence[float], digits: int = 3) -> str:
    """The least and the greatest."""
    return f"{min(numbers):.{digits}f} to {max(numbers):.{digits}f}"


def minutes(seconds: Sequence[float], on: str) -> str:
    return f"{span([each / 60 for each in seconds], 1)}, {on}"


def end(rates: str) -> float:
    """Of "0.270 -> 0.882 (0.882)" the rate after RL, without that of the quantized net."""
    return float(rates.split(" (")[0].split()[-1])


def numbers_of(study: str, arm: str, column: str) -> list[float]:
    """A column of the runs of an arm, as a study stores them."""
    stored = read_json((STUDIES / study).with_suffix(".json"))
    return [run[column] for run in (stored if isinstance(stored, list) else stored["runs"]) if run["arm"] == arm]


def overview(found: Mapping[str, Any]) -> str:
    """What each recipe needs, how long it takes, and where it ends."""
    rows = []
    core, threads, unknown = "one core", "two threads", "not timed"
    extra = '`pip install -e ".[{}]"`'.format

    def row(recipe: str, what: str, time: str, ends: str, *needs: str) -> None:
        needed = ", ".join(("a CPU", *needs))
        script, _, options = recipe.partition(" ")
        row = {
            "recipe": f"`{script}.py{' ' * bool(options)}{options}`",
            "what it is": what,
            "needs": needed,
            "minutes": time,
        }
        rows.append(row | {"solved at the end": ends})

    def sudoku_like(recipe: str, what: str) -> None:
        runs = [run for run in found["sudoku"] if run["recipe"] == recipe]
        time = minutes([float(run["seconds in all"]) for run in runs], threads)
        row(recipe, what, time, span([end(run[RATES]) for run in runs]))

    def pretrained_like(recipe: str, what: str, *needs: str) -> None:
        runs = [run for run in found["pretrained"] if run["recipe"].endswith(recipe)]
        time = minutes([sum(map(float, run["seconds"].split("+"))) for run in runs], core)
        row(recipe, what, time, span([end(run[RATES]) for run in runs]), *needs)

    rates = found["one_file"]["solve rate before -> after, seeds 0, 1, 2"]
    ends = span([*map(end, rates)])
    what = "[a whole training step in one file](one_file.py), with only the model and the puzzles from the library"
    row("one_file", what, "0.8, one core", ends)
    ends = span(found["latin_sudoku"]["rows"][0]["after"])
    what = "[RL teaches what no label says](results.md#latin-squares-and-a-reward-that-knows-the-boxes)"
    row("latin_sudoku", what, "about 1, one core", ends)
    job = "results.md#the-main-job-rollouts-in-four-bits-with-and-without-a-correction"
    what = f"[what four-bit rollouts cost, and what a correction brings back]({job})"
    arms = [
        mean(numbers_of("quantized/orders_trained", f"random: {arm}", "after"))
        for arm in ("unquantized", "nvfp4", "nvfp4, tis")
    ]
    row("quantized_sudoku", what, "3 to 4.5, two cores", "{:.3f}, {:.3f} and {:.3f}, by arm".format(*arms))
    time = minutes(found["sudoku_tiny"]["seconds"], core)
    ends = interval(found["sudoku_tiny"]["after"])
    row("sudoku_tiny", "[puzzles with many right answers](results.md#sudoku-and-countdown)", time, ends)
    sudoku_like("sudoku_unique", "puzzles with one right answer")
    sudoku_like("sudoku_unique --layout autoregressive", "the same with an autoregressive model")
    sudoku_like("sudoku_unique --layout llada", "the same in LLaDA's layout")
    sudoku_like("sudoku_unique --layout diffusion_gemma", "the same in DiffusionGemma's layout")
    ends = span(found[EXPERTS]["after"])
    row(EXPERTS, "the same with 8 experts, 2 per token, in LLaDA-MoE's layout", unknown, ends)
    time = minutes(
        [float(run["seconds, two threads, idle machine"].split(",")[0]) for run in found["countdown"]], threads
    )
    ends = span([end(run["accuracy before -> after"]) for run in found["countdown"]])
    row("countdown_tiny", "Countdown: numbers make a target", time, ends)
    what = "LLaDA's layout with rollouts by llama.cpp in `Q8_0`"
    ends = span(found["llama_cpp_sudoku"]["Q8_0, 1800 steps: after"])
    row("engines/llama_cpp_sudoku", what, "7.7 to 9.0, one core", ends, extra("llamacpp"))
    measured = "not stored; [60 steps](../docs/vllm.md#what-was-measured)"
    row("engines/vllm_sudoku", "the autoregressive model with rollouts by vLLM", unknown, measured, extra("vllm"))
    what = "`sudoku_tiny` with async RL: rollouts are made while the learner trains"
    row("async_sudoku", what, unknown, "not stored; [study](studies/late/README.md)", extra("ray"))
    antibodies = "[pretrained](results.md#pretrained-models): AntiBERTy fills in antibody loops"
    pretrained_like("antibody_cdr3", antibodies, "a download of 97 MB")
    gguf = ("`pip install gguf`", "a download of 93 MB")
    pretrained_like("smollm2_arithmetic", "pretrained: SmolLM2-135M, autoregressive, adds numbers", *gguf)
    what = "pretrained: SmolLM2-135M, made a diffusion model by `smollm2_diffusion_sft.py` first"
    pretrained_like("smollm2_diffusion", what, *gguf)
    return markdown(rows)


def sudoku(found: Mapping[str, Any]) -> str:
    rows = []

    def row(name: str, corrector: str, rates: Mapping[str, str]) -> None:
        rows.append({"recipe": f"`{name}`", "corrector": corrector, **rates})

    for name, corrector in SUDOKU.items():
        row(name, corrector, by_seed([rates_of(run) for run in found["sudoku"] if run["recipe"] == name]))
    experts, cpp = found[EXPERTS], found["llama_cpp_sudoku"]
    row(EXPERTS, "AIS", arrows(experts["before"], experts["after"]))
    row("engines/llama_cpp_sudoku", "AIS", arrows(cpp["before"], cpp["Q8_0, 1800 steps: after"]))
    row("countdown_tiny", "none", by_seed([rates_of(run, "accuracy before -> after") for run in found["countdown"]]))
    return markdown(rows)


def pretrained(found: Mapping[str, Any]) -> str:
    rows, names = [], dict.fromkeys(run["recipe"] for run in found["pretrained"])
    for name in names:
        runs = [run for run in found["pretrained"] if run["recipe"] == name]
        rates = dict.fromkeys((f"seed {seed}" for seed in range(5)), "-")
        rates |= by_seed([*map(rates_of, runs)])
        rows.append({"recipe": name, "corrector": "AIS", **rates})
    return markdown(rows)


def examples() -> str:
    """Every file of `examples`, with the first paragraph of its docstring."""
    folder, rows = STORED.with_name("examples"), []
    for about, names in EXAMPLES.items():
        for name in names.split():
            docstring = ast.get_docstring(ast.parse((folder / f"{name}.py").read_text())) or ""
            said = re.sub(r" \(docs/[\w/.-]+\)", "", docstring.split("\n\n")[0].replace("\n", " "))
            rows.append({"about": about, "example": f"[{name}.py]({name}.py)", "what it shows": said})
    if missing := {path.stem for path in folder.glob("*.py")} - set(" ".join(EXAMPLES.values()).split()):
        raise ValueError(f"EXAMPLES lacks {', '.join(sorted(missing))}")
    return markdown(rows)


def page_tables() -> dict[str, str]:
    found = read_json(STORED)
    recipe = found["latin_sudoku"]["rows"][0]
    return {
        "all recipes": overview(found),
        "Latin squares": latin_squares([recipe]),
        "Sudoku": sudoku(found),
        "pretrained models": pretrained(found),
        "examples": examples(),
    }
