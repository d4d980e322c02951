"""The study of few clues, and its numbers on other pages."""

from collections import Counter

from held import STUDIES, stored
from recipes.perfect import luckiest
from recipes.studies import few_clues
from recipes.studies.paired import interval, markdown

PAGE, RECIPES = f"{STUDIES}/few_clues.md", "recipes/README.md"
STORED = stored("few_clues")
RUNS = {(run["arm"], run["seed"]): run for run in STORED["runs"]}
CEILINGS = {int(steps): rate for steps, rate in STORED["ceiling"].items()}
ARMS = few_clues.arm_rows(RUNS, CEILINGS)
RATES = {each["arm"]: each for each in ARMS}
RL, RL_4, TAUGHT, CHOSEN, CAUSAL, OWN = (
    few_clues.RL,
    few_clues.RL_4,
    few_clues.TAUGHT,
    few_clues.CHOSEN,
    few_clues.CAUSAL,
    few_clues.OWN,
)


def begun(arm):
    """Solve rates before RL, in the arm's own number of steps, by seed."""
    return {seed: run["before"] for (name, seed), run in RUNS.items() if name == arm}


def tables():
    for rows in (ARMS, few_clues.claim_rows(RUNS, CEILINGS), few_clues.diversity_rows(RUNS)):
        yield PAGE, markdown(rows)
    two, random_ties = RATES[RL]["2"], f"{CEILINGS[2]:.3f}"
    yield RECIPES, f"Ten seeds solve {two}, where exact probabilities with ties at random solve {random_ties}"
    assert len(few_clues.of(RUNS, RL, 2)) == len(few_clues.of(RUNS, RL_4, 4)) == 10


def findings():
    differences = few_clues.claims(RUNS, CEILINGS)
    two, four = ({arm: each[steps] for arm, each in RATES.items()} for steps in ("2", "4"))
    ceiling = {steps: f"{rate:.3f}" for steps, rate in CEILINGS.items()}
    p = {each["Holm's p"] for each in few_clues.claim_rows(RUNS, CEILINGS)}
    yield PAGE, f"**All four claims hold as they were written**, on all ten seeds (Holm's p {' '.join(p)} each), **and"
    assert all(min(values) > 0 for values in differences.values())
    yield PAGE, f"**In two steps RL is above random ties**: {two[RL]} against {ceiling[2]}."
    yield PAGE, f"Supervision for the same processor time solves {two[TAUGHT]} (ten seeds)."
    yield PAGE, f"**In four steps, too, and by less**: {four[RL_4]} against {ceiling[4]}."
    before = begun(RL_4)
    gained = [rate - before[seed] for seed, rate in few_clues.of(RUNS, RL_4, 4).items()]
    start, seconds = interval(list(before.values())), RATES[RL_4]["CPU seconds"]
    yield PAGE, f"it solves {start} in four steps. RL adds {interval(gained)}, and takes {seconds} CPU seconds, twice"
    yield PAGE, f"the time of supervision, which solves {four[TAUGHT]} (ten seeds)."
    in_two, in_four = (interval(differences[f"in {n} steps RL is above supervision"]) for n in ("two", "four"))
    yield PAGE, f"by {in_two} in two steps (10 of 10 seeds) and by {in_four} in four (10 of 10 seeds)."
    other, own = few_clues.of(RUNS, RL, 4), few_clues.of(RUNS, RL_4, 4)
    above = [rate - CEILINGS[4] for rate in other.values()]
    assert min(above) > 0
    yield (
        PAGE,
        f"solve {four[RL]} when they write in four, {interval(above)} above random ties (10 of 10 seeds).",
    )
    less = interval([other[seed] - own[seed] for seed in sorted(other)])
    yield PAGE, f"the models that RL trained in four, which solve {less} less."
    yield PAGE, f"supervision solves {two[CHOSEN]} in two steps and {RATES[CHOSEN]['1']} in one (three seeds)."
    yield PAGE, f"supervision reaches {four[TAUGHT]} in four steps, and {start} after its first 400 supervised steps."
    sixteen = {arm: each["16"] for arm, each in RATES.items()}
    yield (
        PAGE,
        (
            f"In 16 steps, one cell a step, supervision solves {sixteen[TAUGHT]}, RL in four {sixteen[RL_4]} "
            f"and RL in two {sixteen[RL]}."
        ),
    )
    answers = {each["arm"]: each["answers"] for each in few_clues.diversity_rows(RUNS)}
    causal = f"{sixteen[CAUSAL]} in its 16 forwards (one seed), and keeps {answers[CAUSAL]} answers a puzzle."
    yield PAGE, f"The autoregressive model solves {causal}"
    told = {}
    for arm in (RL, RL_4):
        apart = [run["after"] - run["after_quantized"] for (name, _), run in RUNS.items() if name == arm]
        told[arm] = interval(apart), f"{max(map(abs, apart)):.3f}"
    yield PAGE, f"the learner solves {told[RL][0]} more (RL in two; a seed at most {told[RL][1]})"
    yield PAGE, f"and {told[RL_4][0]} more (RL in four; at most {told[RL_4][1]})."


def own_answers():
    """The control of a review: labels that the model wrote itself."""
    rates = {steps: list(few_clues.of(RUNS, few_clues.OWN, steps).values()) for steps in (2, 4)}
    two, four = ["{:.3f}, {:.3f} and {:.3f}".format(*rates[2]), "{:.2f}, {:.2f} and {:.2f}".format(*rates[4])]
    reached = "{:.3f}, {:.3f} and {:.3f}".format(*(few_clues.of(RUNS, RL, 2)[seed] for seed in (10, 11, 12)))
    yield PAGE, f"{two} in two steps (seeds 10, 11, 12), where RL reached {reached}; {four} in four."
    yield f"{STUDIES}/distillation.md", f"that solved {two} in two steps"
    times = Counter(few_clues.puzzles())
    lucky = {puzzle: luckiest(puzzle) for puzzle in times}
    solved, counted = Counter(), Counter()
    for puzzle, count in times.items():
        clues = 16 - puzzle.count("0")
        counted[clues] += count
        solved[clues] += count * lucky[puzzle]
    yield PAGE, f"solves {solved.total() / 400:.4f} in two steps, more than RL: of the {counted[1]} puzzles of one clue"
    assert solved[1] == 0
    yield PAGE, f"none, of those of two {solved[2] / counted[2]:.3f}, of three {solved[3] / counted[3]:.3f}."


def seconds():
    took = {arm: each["CPU seconds"] for arm, each in RATES.items()}
    yield PAGE, f"the processor time of RL in two steps ({took[TAUGHT]} against {took[RL]} CPU seconds)."
