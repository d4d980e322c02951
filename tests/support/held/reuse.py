"""The study of replay: its tables and findings, and its numbers on the first page."""

from held import STUDIES, stored
from recipes.studies import reuse
from recipes.studies.paired import interval, markdown
from recipes.studies.reuse import TASKS, Claim

PAGE, README = f"{STUDIES}/reuse.md", "README.md"
RUNS = {(run["task"], run["key"], run["seed"]): run for run in stored("reuse")}
CLAIMS = reuse.claim_rows(RUNS)


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
    for name in TASKS:
        best = reuse.best_rates(RUNS, name)
        for (task, arm, seed), run in RUNS.items():
            if task == name and seed in reuse.SEEDS:
                assert run["arm"] == arm and run["rates"] == best


def p_of(text, task):
    return next(each["Holm's p"] for each in CLAIMS if (each["stated before the runs"], each["task"]) == (text, task))


def findings():
    both, raft = ([apart(task, arm, GRPO) for task in ("latin", "rare", "countdown")] for arm in (BOTH, RAFT))
    yield (
        PAGE,
        f"**RAFT with replay** solves {raft[0]} (latin), {raft[1]} (rare) and {raft[2]} (countdown) more than GRPO",
    )
    yield PAGE, f"**GRPO with replay** {both[0]}, {both[1]} and {both[2]}."
    yield (
        PAGE,
        f"In few steps RAFT with replay solves {apart('latin', RAFT, GRPO, 'few')}, {apart('rare', RAFT, GRPO, 'few')} and {apart('countdown', RAFT, GRPO, 'few')} more.",
    )
    yield (
        PAGE,
        f"Between the two: GRPO with replay is {apart('latin', BOTH, RAFT)} above on latin, and {apart('rare', RAFT, BOTH)} below on rare.",
    )
    yield (
        PAGE,
        f"It is not the number of updates: GRPO with replay is {apart('latin', BOTH, MANY)} above GRPO with four updates",
    )
    yield PAGE, f"RAFT with replay is {apart('latin', RAFT, RAFT_NO_BOXES)} above the same without boxes in the reward"
    yield (
        PAGE,
        f"which solves {rate('latin', RAFT_NO_BOXES)} at temperature 1; exact probabilities of the labels solve {exact():.3f}",
    )
    yield PAGE, f"four replays at most end {apart('rare', RAFT, NO_CAP, 'full@0')} above no cap, greedy"
    yield (
        PAGE,
        f"GRPO solves {rate('noisy', GRPO)}, RAFT with replay {rate('noisy', RAFT)} and GRPO with replay {rate('noisy', BOTH)}",
    )
    yield (
        PAGE,
        f"Greedy, GRPO ends at {rate('never', GRPO, 'full@0')}, RAFT with replay at {rate('never', RAFT, 'full@0')}",
    )
    yield PAGE, f"Rounds of filtered answers end {apart('latin', RAFT, ROUNDS)} below RAFT with replay on latin"
    yield (
        PAGE,
        f"GRPO's loss by five levels is {apart('latin', EXACT, FIVE)} on latin and {apart('countdown', GRPO, FIVE)} on countdown; TIS adds {apart('latin', FIVE_TIS, FIVE)} and {apart('countdown', FIVE_TIS, FIVE)}; with replay it adds {apart('latin', FIVE_BOTH_TIS, FIVE_BOTH)} and {apart('countdown', FIVE_BOTH_TIS, FIVE_BOTH)}.",
    )
