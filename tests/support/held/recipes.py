"""recipes/README.md: what each recipe reached."""

from statistics import mean

from dllm_rl.tasks.sudoku.solver import completions
from held import stored
from recipes.studies import few_clues
from recipes.studies.paired import interval

PAGE = "recipes/README.md"
RESULTS = stored("recipes/results")
SOLVED = "solve rate before -> after (quantized net)"


def item(name, *cells):
    return f"- {name}: {'; '.join(cells)}"


def seeds_of(part, recipe):
    return [each for each in RESULTS[part] if each["recipe"] == recipe]


def rates_of(each):
    """Solve rates before and after, as they are stored."""
    return each[SOLVED].split(" (")[0].split(" -> ")


def arrows(pairs, bold):
    return ", ".join(f"{before}→**{after}**" if bold else f"{before}→{after}" for before, after in pairs)


def the_main_job():
    for arm in RESULTS["latin_sudoku"]["rows"]:
        rates = [(f"{b:.3f}", f"{a:.3f}") for b, a in zip(arm["before"], arm["after"], strict=True)]
        ess = f"{mean(arm['ESS']):.3f}; {min(arm['least ESS']):.3f}"
        cells = (f"{mean(arm['mismatch']):.3f}", ess, arrows(rates, arm["rollouts"].startswith("FP8")))
        yield PAGE, item(arm["rollouts"], *cells)
        if arm["rollouts"].startswith("FP8"):
            mismatch, ess, solved = cells
            link = "(docs/method.md#do-i-need-an-importance-sampling-correction)"
            told = f"nats, [ESS]{link} {ess.replace('; ', ' (least ')}), solved {solved}."
            yield "README.md", f"mean abs log-ratio {mismatch} {told}"


def sudoku_with_one_solution():
    for recipe, name, bold, seconds in (
        ("sudoku_unique", "sudoku_unique", True, "65, 66; 117 beside other work"),
        ("sudoku_tiny_ar", "sudoku_tiny_ar (autoregressive)*", False, "86 to 101"),
        ("sudoku_tiny_llada", "sudoku_tiny_llada (LLaDA's layout)*", False, "86 to 123"),
        ("renoise_sudoku", "renoise_sudoku (DiffusionGemma's layout)", True, "98 to 135"),
    ):
        runs = seeds_of("sudoku", recipe)
        took = sorted(int(run["seconds in all"]) for run in runs)
        told = [int(word) for word in seconds.replace(",", "").replace(";", "").split() if word.isdigit()]
        assert len(runs) == 3 and (told == took or told == [took[0], took[-1]])
        yield PAGE, item(name, arrows(map(rates_of, runs), bold), seconds)
    experts = RESULTS["sudoku_tiny_moe"]
    pairs = [
        (f"{before:.3f}", f"{after:.3f}") for before, after in zip(experts["before"], experts["after"], strict=True)
    ]
    yield PAGE, item("sudoku_tiny_moe (8 experts, 2 per token)*", arrows(pairs, False))
    cpp = RESULTS["llama_cpp_sudoku"]
    pairs = zip(cpp["before"], cpp["Q8_0, 1800 steps: after"], strict=True)
    pairs = [(f"{before:.3f}", f"{after:.3f}") for before, after in pairs]
    yield PAGE, item("engines/llama_cpp_sudoku, `Q8_0`*", arrows(pairs, True))


def supervised_alone():
    supervised = RESULTS["sudoku_unique_longer"]["supervised only, about 90 CPU seconds"]
    learned = [float(rates_of(run)[1]) for run in seeds_of("sudoku", "sudoku_unique")]
    assert all(alone > after for alone, after in zip(supervised, learned, strict=True))
    longer = RESULTS["sudoku_unique_longer"]["600 steps, 86 to 92 s"]
    assert all(abs(alone - after) < 0.01 for alone, after in zip(supervised, longer, strict=True))
    told = "{:.3f}, {:.3f}, {:.3f}; 600 reach as much".format(*supervised)
    yield PAGE, f"Supervised training alone beats these 360 steps of RL on `sudoku_unique` ({told})"


def countdown():
    runs = RESULTS["countdown"]
    took = sorted(int(run["seconds, two threads, idle machine"].split(",")[0]) for run in runs)
    rates = arrows((run["accuracy before -> after"].split(" -> ") for run in runs), True)
    yield PAGE, item("countdown_tiny", rates, f"{took[0]} to {took[-1]}")


def pretrained():
    for recipe, name in (("antibody_cdr3", "antibody_cdr3*"), ("smollm2_arithmetic", "smollm2_arithmetic*")):
        runs = seeds_of("pretrained", recipe)
        took = sorted(int(run["seconds"]) for run in runs)
        yield PAGE, item(name, arrows(map(rates_of, runs), True), f"{took[0]} to {took[-1]}")
    runs = seeds_of("pretrained", "smollm2_diffusion_sft, then smollm2_diffusion")
    words = [run[SOLVED].replace(";", "").split() for run in runs]
    (start,), after = {each[1] for each in words}, [each[4] for each in words]
    first, then = zip(*(map(int, run["seconds"].split(" + ")) for run in runs), strict=True)
    told = f"{start}→{', '.join(after)}"
    took = f"{first[0]} + {min(then)} to {max(then)}"
    yield PAGE, item("smollm2_diffusion* (after SFT; seeds 0 to 4)", told, took)
    gains = [float(rate) - float(start) for rate in after]
    yield PAGE, f"over three seeds, as claimed, the gain is not significant: {interval(gains[:3])}."


def antibody_loops():
    """Naturalness and likeness of the loops, of the pretrained model and of each seed."""
    rows = RESULTS["antibody_loops"]
    before, *after = (float(each["pseudo-log-likelihood, nats a residue"]) for each in rows)
    assert min(after) > before
    before, *after = (f"{float(each['identity of pairs']):.2f}" for each in rows)
    told = f"shared {before} of their residues before, and {min(after)} to {max(after)} after."
    yield "recipes/studies/LOG.md", f"AntiBERTy's loops stayed likely; two loops {told}"


def memory_of_real_models():
    """Estimates of the dry run, which were stored."""
    fits = {each["recipe"]: each["fits 80 / 96 / 141 / 192 GB"].split(" / ") for each in RESULTS["memory_gb"]}
    least = {recipe: (80, 96, 141, 192)[cells.index("yes")] for recipe, cells in fits.items()}
    larger = {recipe for recipe, size in least.items() if size > 80 and not recipe.startswith("the same")}
    assert {recipe.split()[0] for recipe in larger} == {"llada_8b_sudoku_full", "diffusion_gemma_countdown"}
    assert {least[recipe] for recipe in larger} == {141}
    yield PAGE, "(all weights, on one GPU) and `diffusion_gemma_countdown` 141 GB."


def puzzles_of_the_main_job():
    """Counts of the task: nothing trained."""
    puzzles = few_clues.puzzles()
    right = f"{mean(len(completions(puzzle)) for puzzle in puzzles):.0f}"
    yield "recipes/studies/few_clues.md", f"fills {len(puzzles)} test puzzles ({len(set(puzzles))} distinct) greedily"
    yield PAGE, f"with one to three clues and {right} right answers on average"
    yield "recipes/studies/few_clues.md", f"one to three clues has {right} right answers a puzzle on average."
