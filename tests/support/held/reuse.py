"""The study of replay: its tables and findings, and its numbers on the first page."""

from statistics import mean

from dllm_rl.tasks.sudoku.solver import SPLITS
from held import DOCS, STUDIES, stored
from recipes.studies import reuse
from recipes.studies.latin_limit import limit
from recipes.studies.paired import interval, markdown
from recipes.studies.reuse import (
    BOTH,
    COLUMNS,
    COMPARED,
    EXACT,
    FIVE,
    FIVE_BOTH,
    FIVE_BOTH_TIS,
    FIVE_TIS,
    GRPO,
    MANY,
    NO_BOXES,
    NO_CAP,
    RAFT,
    RAFT_NO_BOXES,
    ROUNDS,
    TASKS,
    THEN,
    Claim,
)

PAGE, README, METHOD = f"{STUDIES}/reuse.md", "README.md", f"{DOCS}/method.md"
RUNS = {(run["task"], run["key"], run["seed"]): run for run in stored("reuse")}
CLAIMS = reuse.claim_rows(RUNS)
LEAST = f"{len(reuse.CLAIMS) * 2 / 2**10:.3f}"  # of Holm's p: all ten differences have one sign


def apart(task, arm, against, of="full"):
    values = Claim("", task, arm, against, of).differences(RUNS)
    assert len(values) == 10
    return interval(values)


def rate(task, arm, column="full@1"):
    return interval([run[column] for run in reuse.runs_of(RUNS, task, arm)])


def tables():
    yield PAGE, markdown(reuse.rate_rows(RUNS))
    for name in TASKS:
        yield PAGE, markdown(reuse.arm_rows(RUNS, name))
    yield PAGE, markdown(CLAIMS)
    shown = sum(float(each["Holm's p"]) < 0.05 for each in CLAIMS)
    yield (
        PAGE,
        f"{len(CLAIMS)} [claims](#claims-stated-before-the-runs) were committed before the runs of ten fresh seeds;",
    )
    yield PAGE, f"Holm's correction over all {len(CLAIMS)}, at least {LEAST}; {shown} are below 0.05"
    yield PAGE, markdown(reuse.winner_rows(RUNS))
    for name in TASKS:
        best = reuse.best_rates(RUNS, name)
        for (task, arm, seed), run in RUNS.items():
            if task == name and seed in reuse.SEEDS and arm in reuse.arms_of(TASKS[name], reuse.FIRST):
                assert run["arm"] == arm and run["rates"] == best


def budgets():
    used: dict[tuple[str, str], list[int]] = {}
    for (task, _, seed), run in RUNS.items():
        if seed in reuse.SEEDS:
            rows = sum(value for name, value in run.items() if name.startswith("used, "))
            used.setdefault((task, run["arm"]), []).append(rows)
    means = {each: mean(rows) for each, rows in used.items()}
    yield PAGE, f"long, used {means.pop(('countdown', ROUNDS)):,.0f} on Countdown, and no other arm more than 84,000"
    assert min(map(min, used.values())) >= reuse.BUDGET and max(means.values()) <= 84_000


def past_the_ends():
    yield PAGE, markdown(reuse.beyond_rows(RUNS))
    more = apart("noisy", reuse.trial(GRPO, 1.25e-4), reuse.trial(RAFT, 6.25e-5), "full@1")
    raft = apart("countdown", RAFT, reuse.trial(GRPO, 2e-3))
    yield PAGE, f"GRPO solves {more} more than RAFT with replay at temperature 1, and on Countdown RAFT with replay is "
    yield PAGE, f"RAFT with replay is {raft} above GRPO."
    wide = apart("noisy", reuse.trial(GRPO, 1.25e-4), reuse.trial(BOTH, 6.25e-5), "full@0")
    told = (
        f"GRPO is above GRPO with replay on noisy by {wide}, no longer {apart('noisy', GRPO, BOTH, 'full@0')}, and on "
    )
    yield PAGE, f"{told}Countdown GRPO with replay is {apart('countdown', BOTH, reuse.trial(GRPO, 2e-3))} above GRPO"
    edges = {
        name
        for name in TASKS
        for arm, rate in reuse.best_rates(RUNS, name).items()
        if rate in (reuse.GRIDS[arm][0], reuse.GRIDS[arm][-1])
    }
    assert edges == {"rare", "never", "noisy", "countdown"}


def grids():
    yield PAGE, markdown(reuse.grid_rows(RUNS))
    (texts, solved), (texts_2, solved_2) = (
        [rate("latin", f"{arm}, grids counted", f"{of}@1.5") for of in ("texts", "full")] for arm in (RAFT, BOTH)
    )
    yield PAGE, f"as GRPO at temperature 1 ({texts}), and solves {solved}; GRPO with replay writes {texts_2}"
    yield PAGE, f"GRPO with replay writes {texts_2} and solves {solved_2}."
    grids = [grid for split in SPLITS.values() for grid in split]
    task = TASKS["latin"].base.eval_task
    left, used = {task[i].fields["puzzle"] for i in range(400)}, 0
    fit = {g: {p for p in left if all(c in ("0", d) for c, d in zip(p, g, strict=True))} for g in grids}
    while left:  # greedy
        left -= max(fit.values(), key=lambda puzzles: len(puzzles & left))
        used += 1
    yield PAGE, f"there are {len(grids)} grids, all among the labels, and {used} of them solve all test puzzles"


def the_bonus():
    assert TASKS["countdown"].base.entropy_coeff == 0
    (bonus,) = {task.base.entropy_coeff for name, task in TASKS.items() if name != "countdown"}
    yield PAGE, f"the policy gradient has the entropy bonus of `sudoku_tiny` ({bonus})"
    grpo, raft, both, plain, both_plain = (f"{arm}, grids counted" for arm in reuse.COUNTED)
    pairs = ((both_plain, plain), (both, grpo), (raft, plain))
    without, with_it, by_raft = (apart("latin", *pair) for pair in pairs)
    assert all(min(Claim("", "latin", *pair).differences(RUNS)) > 0 for pair in pairs)
    yield PAGE, f"GRPO with replay is {without} above GRPO at equal diversity, with it {with_it} in these runs,"
    yield PAGE, f"and RAFT with replay is {by_raft} above GRPO without it (all on ten of ten seeds)."
    yield PAGE, f"without the bonus solves {apart('latin', plain, grpo, 'full@1')} more (no difference is shown,"
    answers, others = (rate("latin", arm, "answers@1") for arm in (plain, grpo))
    yield PAGE, f"fewer different answers ({answers}, with it {others});"
    less = apart("latin", plain, grpo).removeprefix("-")
    yield PAGE, f"at equal diversity it is {less} below GRPO with it."


def above(task, arm, against, of="full"):
    """The difference of two arms, and that the claim of it held: its p is the least that 22 claims can have."""
    (claim,) = [
        each for each in reuse.CLAIMS if (each.task, each.arm, each.against, each.of) == (task, arm, against, of)
    ]
    (found,) = [row for row in CLAIMS if (row["stated before the runs"], row["task"]) == (claim.text, claim.task)]
    assert found["Holm's p"] == LEAST and found["above 0"] in ("10 of 10", "0 of 10")
    return apart(task, arm, against, of)


def common_answers():
    gain, raft = above("latin", BOTH, GRPO), above("latin", RAFT, GRPO)
    few = " and ".join(apart("latin", arm, GRPO, "few") for arm in (BOTH, RAFT))
    found = f"GRPO with replay solves {gain} more than GRPO, RAFT with replay {raft}, and in four steps (not claimed)"
    yield PAGE, f"{found} {few}."
    grpo_too = apart("latin", f"{reuse.BOTH_PLAIN}, grids counted", f"{RAFT}, grids counted")
    yield PAGE, f"GRPO with replay is {above('latin', BOTH, RAFT)} above RAFT; without its [entropy bonus]"
    yield PAGE, f"(#is-it-the-entropy-bonus) {grpo_too}, which is not shown."
    lost = apart("latin", MANY, GRPO).removeprefix("-")
    yield PAGE, f"loses {lost} (not claimed; it is {above('latin', BOTH, MANY)} below GRPO with replay)"
    best = [
        max(mean(run[f"distinct@{t:g}"] for run in reuse.runs_of(RUNS, "latin", arm)) for t in reuse.TEMPERATURES)
        for arm in (GRPO, RAFT, BOTH)
    ]
    yield PAGE, "GRPO {:.3f}, RAFT with replay {:.3f}, GRPO with replay {:.3f};".format(*best)
    own = [
        interval(
            [
                max(RUNS["latin", arm, seed][f"distinct@{t:g}"] for t in reuse.TEMPERATURES)
                - max(RUNS["latin", GRPO, seed][f"distinct@{t:g}"] for t in reuse.TEMPERATURES)
                for seed in reuse.SEEDS
            ]
        )
        for arm in (BOTH, RAFT)
    ]
    yield PAGE, f"its own best temperature, GRPO with replay {own[0]} above GRPO, RAFT with replay {own[1]}."
    boxes, without = above("latin", RAFT, RAFT_NO_BOXES), rate("latin", RAFT_NO_BOXES)
    yield PAGE, f"is {boxes} above the same with a reward without boxes, which solves {without} at temperature 1."
    problems = TASKS["latin"].base.eval_task
    exact = f"{float(limit([problems[i].fields['puzzle'] for i in range(100)])):.3f}"  # those solved at temperature 1
    yield PAGE, f"Exact probabilities of the labels solve {exact} of the same 100 puzzles"
    yield (
        METHOD,
        f"in equal computation, GRPO with replay was {gain} above GRPO at equal diversity",
    )
    shown = {"GRPO, reward without boxes (unplanned)": NO_BOXES, "GRPO": GRPO}
    shown |= {arm: arm for arm in (RAFT, BOTH)}
    yield README, f"| labels' exact probabilities | {exact} | |"
    for text, arm in shown.items():
        more = f" {apart('latin', arm, GRPO)} |" if arm != GRPO else " |"
        yield README, f"| {text} | {rate('latin', arm)} |{more}"


def other_tasks():
    raft, both = above("countdown", RAFT, GRPO), apart("countdown", BOTH, GRPO)
    yield PAGE, f"RAFT with replay solves {raft} more than GRPO. For GRPO with replay ({both}) no gain is shown."
    raft, both = (apart("rare", arm, GRPO) for arm in (RAFT, BOTH))
    yield PAGE, f"(RAFT with replay {raft}, GRPO with replay {both})"
    raft, both = (apart("rare", arm, GRPO, "few") for arm in (RAFT, BOTH))
    yield PAGE, f"both are above GRPO ({raft} and {both})."
    cap = above("rare", RAFT, NO_CAP, "full@0")
    yield PAGE, f"four replays at most end {cap} above no cap, greedy, on 10 of 10 seeds."
    yield PAGE, f"end at {rate('rare', ROUNDS)} and {rate('rare', THEN)}."
    grpo, raft = (rate("never", arm, "full@0") for arm in (GRPO, RAFT))
    yield PAGE, f"greedy, GRPO ends at {grpo}, RAFT with replay at {raft},"
    yield PAGE, f"GRPO with replay is {apart('never', BOTH, GRPO, 'few')} above GRPO)."
    assert all(mean(r[c] for r in reuse.runs_of(RUNS, "never", arm)) < 0.1 for arm in COMPARED for c in COLUMNS[:4])
    above("noisy", GRPO, RAFT, "full@1")
    above("noisy", BOTH, GRPO, "full@1")
    grpo, raft, both = (rate("noisy", arm) for arm in (GRPO, RAFT, BOTH))
    yield PAGE, f"GRPO solves {grpo}, RAFT with replay {raft} and GRPO with replay {both}."
    greedy = [rate("noisy", arm, "full@0").split("±")[0] for arm in (BOTH, GRPO)]
    yield PAGE, f"Greedy, GRPO with replay solves {greedy[0]}, and GRPO {greedy[1]}."
    wide = {
        column: [rate("noisy", reuse.trial(*at), column) for at in ((BOTH, 6.25e-5), (GRPO, 1.25e-4))]
        for column in ("full@1", "full@0")
    }
    greedy = ", ".join(each.split("±")[0] for each in wide["full@0"])
    yield README, f"it solves {wide['full@1'][0]}, GRPO {wide['full@1'][1]} (greedy {greedy}; rates tried"


def five_levels():
    lost, not_lost = above("latin", EXACT, FIVE), apart("countdown", GRPO, FIVE)
    yield (
        PAGE,
        f"they cost GRPO with exact likelihood {lost} on latin and nothing that is shown on Countdown ({not_lost}).",
    )
    back, added, elsewhere = (
        apart("latin", FIVE_TIS, FIVE),
        *(apart(task, FIVE_BOTH_TIS, FIVE_BOTH) for task in ("latin", "countdown")),
    )
    shown = f"TIS brings back {back}, which is not shown to differ from 0;"
    warm, greedy = (apart("latin", FIVE_TIS, FIVE, f"full@{temperature}") for temperature in (1, 0))
    fewer = sum(value < 0 for value in Claim("", "latin", FIVE_TIS, FIVE, "full@1").differences(RUNS))
    yield f"{DOCS}/results-and-limits.md", f"a loss not claimed ({warm.removeprefix('-')}, [five levels]"
    warm = f"at temperature 1 it solves {warm.removeprefix('-')} less (not claimed; {fewer} of 10 seeds)"
    yield PAGE, f"{shown} {warm}, and greedily {greedy} more. With replay it adds {added} and {elsewhere}."
    equal = f"[{apart('latin', FIVE_TIS, FIVE)}](../recipes/studies/reuse.md) at equal diversity"
    yield METHOD, f"{equal}."
    puzzles = [TASKS["latin"].base.eval_task[i].prompt for i in range(400)]
    yield PAGE, f"the 400 test puzzles ({len(set(puzzles))} differ) are solved greedily, and the first 100"
    yield PAGE, f"the first 100 ({len(set(puzzles[:100]))} differ) four times each"
    less = apart("latin", EXACT, GRPO).removeprefix("-")
    yield PAGE, f"GRPO with exact likelihood of every step is {less} below GRPO with two segments,"


def the_rest():
    yield PAGE, f"22 claims and ten seeds: {LEAST} is the least that Holm's p can be."
    spent = [
        (name, mean(run["seconds"] for run in runs))
        for name, task in TASKS.items()
        for arm in reuse.arms_of(task, reuse.FIRST)
        if (runs := reuse.runs_of(RUNS, name, arm))
    ]
    squares, numbers = (
        sorted(s for name, s in spent if (name == "countdown") == is_countdown) for is_countdown in (False, True)
    )
    seconds = f"{squares[0]:.0f} to {squares[-1]:.0f} CPU seconds per run"
    yield PAGE, f"took {seconds}, on Countdown {numbers[0]:.0f} to {numbers[-1]:.0f} (means of arms)."
    yield PAGE, f"all took {sum(run['seconds'] for run in RUNS.values()) / 3600:.0f} CPU hours of training"
