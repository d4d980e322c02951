"""recipes/README.md: what each recipe reached."""

from statistics import mean, stdev

from dllm_rl.tasks.sudoku.solver import completions
from held import row, runs_of, stored
from recipes import countdown_tiny
from recipes.studies import few_clues, revise
from recipes.studies.paired import interval, sign_flip

PAGE = "recipes/README.md"
RESULTS = stored("recipes/results")
SOLVED = "solve rate before -> after (quantized net)"


def seeds_of(part, recipe):
    return [each for each in RESULTS[part] if each["recipe"] == recipe]


def rates_of(each):
    """Solve rates before and after, as they are stored."""
    return each[SOLVED].split(" (")[0].split(" -> ")


def arrows(pairs, bold):
    return ", ".join(f"{before}→**{after}**" if bold else f"{before}→{after}" for before, after in pairs)


def one_file():
    assert "47 to 51 CPU seconds a run" in RESULTS["one_file"]["note"]
    yield PAGE, "It takes 47 to 51 CPU seconds. Solve rate"
    rates = ", ".join(
        run.replace(" -> ", "→") for run in RESULTS["one_file"]["solve rate before -> after, seeds 0, 1, 2"]
    )
    yield PAGE, f"before→after 100 RL steps, seeds 0, 1, 2: {rates}."


def the_main_job():
    for arm in RESULTS["latin_sudoku"]["rows"]:
        rates = [(f"{b:.3f}", f"{a:.3f}") for b, a in zip(arm["before"], arm["after"], strict=True)]
        ess = f"{mean(arm['ESS']):.3f}; {min(arm['least ESS']):.3f}"
        cells = (f"{mean(arm['mismatch']):.3f}", ess, arrows(rates, arm["rollouts"].startswith("FP8")))
        yield "README.md", row(arm["rollouts"], *cells)


def sudoku_with_one_solution():
    for recipe, name, bold, seconds in (
        ("sudoku_unique", "sudoku_unique", True, "65, 66; 117 beside other work"),
        ("sudoku_tiny_ar", "sudoku_tiny_ar (autoregressive)*", False, "86 to 101"),
        ("sudoku_tiny_llada", "sudoku_tiny_llada (LLaDA's layout)*", False, "86 to 123"),
        ("renoise_sudoku", "renoise_sudoku (DiffusionGemma's layout)", True, "98 to 135"),
    ):
        runs = seeds_of("sudoku", recipe)
        (steps,) = {run["warm-up, RL steps"].split(", ")[1] for run in runs}
        took = sorted(int(run["seconds in all"]) for run in runs)
        told = [int(word) for word in seconds.replace(",", "").replace(";", "").split() if word.isdigit()]
        assert len(runs) == 3 and (told == took or told == [took[0], took[-1]])
        yield PAGE, row(name, arrows(map(rates_of, runs), bold), steps, seconds)
    experts = RESULTS["sudoku_tiny_moe"]
    pairs = [
        (f"{before:.3f}", f"{after:.3f}") for before, after in zip(experts["before"], experts["after"], strict=True)
    ]
    yield PAGE, f"| sudoku_tiny_moe (8 experts, 2 per token)* | {arrows(pairs, False)} | 180 | |"
    cpp = RESULTS["llama_cpp_sudoku"]
    pairs = zip(cpp["before"], cpp["Q8_0, 1800 steps: after"], strict=True)
    pairs = [(f"{before:.3f}", f"{after:.3f}") for before, after in pairs]
    yield PAGE, f"| engines/llama_cpp_sudoku, `Q8_0`* | {arrows(pairs, True)} | 1800 | |"
    edits = [run["after"] for (arm, _), run in runs_of("revise").items() if arm == "edits, 4"]
    assert revise.study.num_steps == 100
    yield (
        PAGE,
        f"sudoku_revise (edits, four steps) reached {interval(edits)} in ten runs of [a study](studies/revise.md)",
    )


def standard_errors():
    """Of a share of n problems: the root of p (1 - p) / n, largest at one half."""

    def error(share, n):
        return (share * (1 - share) / n) ** 0.5

    yield PAGE, f"A solve rate's standard error is {error(0.1, 400):.3f} to {error(0.5, 400):.3f}."
    rates = [float(each["solve rate"]) for each in RESULTS["antibody_loops"]]
    told = f"{error(0.1, 40):.2f} to {error(0.5, 40):.2f}"
    assert all(0.1 < rate < 0.9 for rate in rates)
    yield PAGE, f"(40 loops per row, standard error of a solve rate {told})"


def notes_on_sudoku_with_one_solution():
    after = [float(rates_of(run)[1]) for run in seeds_of("sudoku", "sudoku_unique, in bf16")]
    plain = RESULTS["sudoku_one_thread"]["sudoku_unique in fp32, seeds 0 to 4, paired with bf16"]
    apart = [half - single for half, single in zip(after, plain, strict=True)]
    error = stdev(apart) / len(apart) ** 0.5
    assert len(apart) == 5
    yield PAGE, f"The solve rate differs by {mean(apart):.3f} (standard error {error:.3f}, five paired seeds)."
    supervised = RESULTS["sudoku_unique_longer"]["supervised only, about 90 CPU seconds"]
    runs = seeds_of("sudoku", "sudoku_unique")
    learned = [float(rates_of(run)[1]) for run in runs]
    assert all(alone > after for alone, after in zip(supervised, learned, strict=True))
    told = [f"{a:.3f}, {b:.3f} and {c:.3f}" for a, b, c in (supervised, learned)]
    yield PAGE, f"on all three seeds**: {told[0]} against {told[1]} ("
    least = min(int(run["seconds in all"]) for run in runs)
    yield PAGE, f"It takes about 90 CPU seconds; RL takes at least {least} s on two threads, about {2 * least} CPU"


def countdown():
    runs = RESULTS["countdown"]
    took = sorted(int(run["seconds, two threads, idle machine"].split(",")[0]) for run in runs)
    rates = arrows((run["accuracy before -> after"].split(" -> ") for run in runs), True)
    yield PAGE, f"Accuracy, seeds 0, 1, 2: {rates}, in {took[0]} to {took[-1]} s on a shared machine."
    task = countdown_tiny.recipe.eval_task
    problems = {(*sorted(task[i].fields["numbers"]), task[i].fields["target"]) for i in range(len(task))}
    yield PAGE, f"{len(task)} test problems, {len(problems)} distinct."


def pretrained():
    for recipe, name in (("antibody_cdr3", "antibody_cdr3*"), ("smollm2_arithmetic", "smollm2_arithmetic*")):
        runs = seeds_of("pretrained", recipe)
        took = sorted(int(run["seconds"]) for run in runs)
        yield PAGE, row(name, arrows(map(rates_of, runs), True), f"{took[0]} to {took[-1]}")
    runs = seeds_of("pretrained", "smollm2_diffusion_sft, then smollm2_diffusion")
    words = [run[SOLVED].replace(";", "").split() for run in runs]
    (start,), after = {each[1] for each in words}, [each[4] for each in words]
    first, then = zip(*(map(int, run["seconds"].split(" + ")) for run in runs), strict=True)
    told = f"{start}→{', '.join(after)}"
    took = f"{first[0]} + {min(then)} to {max(then)}"
    yield PAGE, row("smollm2_diffusion* (after SFT; seeds 0 to 4)", told, took)
    gains = [float(rate) - float(start) for rate in after]
    yield PAGE, f"Over three seeds, as claimed, it is not significant: {interval(gains[:3])}."
    yield PAGE, f"the gain is {interval(gains)} (Student's t; exact p {sign_flip(gains):.2f})."


def antibody_loops():
    columns = ("", "solve rate", "pseudo-log-likelihood, nats a residue", "distinct", "identity of pairs")
    for each in RESULTS["antibody_loops"]:
        yield PAGE, row(*(each[column] for column in columns))


def memory_of_real_models():
    """Estimates of the dry run, which were stored."""
    found = {each["recipe"]: each for each in RESULTS["memory_gb"]}
    for recipe, name in (
        ("llada_8b_sudoku (adapters), and its like", "llada_8b_sudoku, _countdown, _gsm8k"),
        ("the same, `--gradient_checkpointing`", "with `--gradient_checkpointing`"),
        (
            "llada_8b_sudoku_full (fp32 weights, bf16 products, 8-bit AdamW)",
            "llada_8b_sudoku_full (fp32 weights, 8-bit AdamW)",
        ),
        ("the same with `--optim adamw`, without one", "with `--optim AdamW`"),
        ("dream_7b_countdown", "dream_7b_countdown"),
        ("qwen3_8b_gsm8k (recomputed blocks)", "qwen3_8b_gsm8k (gradient checkpointing)"),
        ("llada_moe_gsm8k", "llada_moe_gsm8k"),
        ("llada2_mini_gsm8k (recomputed blocks)", "llada2_mini_gsm8k (gradient checkpointing)"),
        ("tiny_a2d_gsm8k", "tiny_a2d_gsm8k"),
        ("diffusion_gemma_countdown", "diffusion_gemma_countdown (26 billion weights, 16-bit, adapters)"),
    ):
        fits = found[recipe]["fits 80 / 96 / 141 / 192 GB"].split(" / ")
        least = (80, 96, 141, 192)[fits.index("yes")]
        yield PAGE, row(name, found[recipe]["most, in which stage"], least)


def puzzles_of_the_main_job():
    """Counts of the task: nothing trained."""
    puzzles = few_clues.puzzles()
    right = f"{mean(len(completions(puzzle)) for puzzle in puzzles):.0f}"
    yield PAGE, f"The {len(puzzles)} held-out puzzles are {len(set(puzzles))} different ones"
    yield "recipes/studies/few_clues.md", f"fills {len(puzzles)} test puzzles ({len(set(puzzles))} distinct) greedily"
    yield PAGE, f"Puzzles have one to three clues and {right} right answers on average."
    yield "recipes/studies/few_clues.md", f"one to three clues has {right} right answers a puzzle on average."
