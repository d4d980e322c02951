"""benchmarks/README.md, and the speeds that other pages repeat."""

import re

from held import DOCS, stored

PAGE, RESULTS = "benchmarks/README.md", "benchmarks/results"


def on_an_h100():
    parts = stored(f"{RESULTS}/gpu-h100")["parts"]
    speeds = {batch: {r["what"]: r["tokens/s"] for r in parts[f"sampler {batch}"]["rows"]} for batch in (1, 8)}
    for name in speeds[1]:
        if not name.endswith(", compiled") and name not in ("prefix cache", "FP8, dual cache"):
            found = [speeds[batch].get(name + suffix) for batch in (1, 8) for suffix in ("", ", compiled")]
            cells = ", ".join(f"{speed:.0f}" for speed in found if speed is not None)
            note = " (approximate)" if name.endswith("cache") and "FP8" not in name else ""
            yield "benchmarks/README.md", f"- {name}{note}: {cells}"
    parts = stored(f"{RESULTS}/gpu")["parts"]["sampler"]["rows"]
    seconds = {(each["what"], each["batch"]): each["seconds"] for each in parts}
    plain = "plain: the published algorithm"
    found = [f"{seconds['exact', batch] / seconds[plain, batch]:.2f}" for batch in (1, 8)]
    found += [f"{speeds[batch][plain] / speeds[batch]['exact']:.2f}" for batch in (1, 8)]
    told = "at 8B on an H200 {} of it for one row and {} for 8, on an H100 {} and {}."
    yield "docs/results-and-limits.md", told.format(*found)
    ratio = speeds[8]["FP8, compiled"] / speeds[8]["exact, compiled"]
    yield "docs/train.md", f"compiled FP8 as fast as compiled bf16 ({ratio:.2f} times)."
    fp8 = {each["what"]: each["seconds"] for each in stored(f"{RESULTS}/gpu")["parts"]["fp8"]["rows"]}
    ratio = fp8["bf16, exact"] / fp8["FP8 products, compiled"]
    yield "docs/train.md", f"On an H200 compiled FP8 was {ratio:.2f} times as fast as eager bf16."
    ratio = speeds[8]["exact, compiled"] / speeds[8]["exact"]
    yield "docs/train.md", f"compiled bf16 was {ratio:.2f} times as fast as eager"


def a_run_on_an_h200():
    parts = stored(f"{RESULTS}/gpu-h200")["parts"]
    speeds, nats, ess = [], [], []
    for task in ("sums", "countdown"):
        rows = {r["what"].split()[-1]: r for r in parts[f"run {task}"]["rows"]}
        for arm, each in rows.items():
            cells = [f"{each[when] + 1e-9:.3f}" for when in ("before", "after")]
            cells.append(f"{each['mean abs d, nats']:.3f}")
            yield PAGE, f"- {task}, {arm}: {', '.join(cells)}, {each['ESS']:.3f}, {each['least ESS']:.3f}"
        ess.append(f"{rows['FP8']['ESS']:.3f}")
        nats.append([f"{rows[arm]['mean abs d, nats']:.3f}" for arm in ("FP8", "bf16")])
        speeds.append([rows["FP8"][name] / rows["bf16"][name] for name in ("rollout, s a step", "step, s")])
    yield f"{DOCS}/method.md", f"`Float8Dynamic` [{', '.join(ess)}](../benchmarks/README.md#a-run-on-one-h200)"
    (rollout, step), (rollout_2, step_2) = speeds
    yield PAGE, f"FP8 rollouts take {rollout:.2f} of the time on sums, {rollout_2:.2f} on Countdown;"
    yield PAGE, f"whole steps, because of the sync, {step:.2f} and {step_2:.2f} times as long."
    yield f"{DOCS}/train.md", f"FP8 made steps of SmolLM2-135M {step:.2f} to {step_2:.2f} times as long."
    (_, bf16), (_, bf16_2) = nats
    yield "recipes/studies/mismatch.md", f"Compiled bf16 rollouts on an H200 had [{bf16} and {bf16_2}]"


def one_h200():
    parts = {name: part["rows"] for name, part in stored(f"{RESULTS}/gpu")["parts"].items()}
    speed = {(each["what"], each["batch"]): f"{each['tokens/s']:,.0f}" for each in parts["sampler"]}
    many = [speed[way, 64] for way in ("exact", "plain: the published algorithm", "dual cache")]
    told = "the exact sampler writes {} tokens a second, the published algorithm {}, the dual cache {}."
    yield PAGE, told.format(*many)
    above = {(each["what"], each["batch"]): each["peak GiB"] for each in parts["sampler"]}["exact", 64]
    yield f"{DOCS}/evaluate.md", f"above them, of LLaDA-8B, {above:.1f} GiB for 64 rows of 192 tokens"
    fp8 = {each["what"]: each["tokens/s"] for each in parts["fp8"]}
    of = {name: f"{speed / fp8['bf16, exact']:.2f}" for name, speed in fp8.items()}
    eager = [f"{of[f'FP8 {what}, eager']}" for what in ("products", "weights")]
    yield f"{DOCS}/train.md", f"eager, they have {' and '.join(eager)} of eager bf16's speed"


def eight_billion_weights():
    found = stored(f"{RESULTS}/eight-billion-cpu")
    stages = found["stages"]
    assert found["layers"] == 32
    trained, evaluated = stages["update"], stages["evaluate"]
    yield PAGE, f"took {trained['seconds']:.0f} s and {trained['own_gb']:.2f} GB besides the weights' mapped file"
    yield PAGE, f"`dllm-rl evaluate` of two problems {evaluated['seconds']:.0f} s"
    lines = "\n".join(stages["dry_run"]["plan"])
    planned = {
        name: float(re.search(rf"{name} +([\d.]+) GB", lines)[1]) for name in ("weights", "adapters", "optimi.er")
    }
    moved = 2 * planned["adapters"] + planned["optimi.er"]  # the gradients are as large as the adapters
    loaded = stages["load"]["own_gb"]
    # Of a step, of a step and a save, and of the copy with adapters and a sync, planned with `Float8WeightOnly`.
    for stage, plan in (("score", moved), ("update", moved + 5), ("sync", 8.73)):
        assert abs(plan / (stages[stage]["own_gb"] - loaded) - 1) < 0.05
    mapped = stages["load"]["mapped_gb"] - stages["dry_run"]["mapped_gb"]
    assert abs(planned["weights"] / mapped - 1) < 0.05
    yield PAGE, "The dry run's memory was within 5 % of what was measured."


def the_sampler():
    timed, memory = (stored(f"{RESULTS}/{name}")["lines"] for name in ("sampler_cpu_processor", "sampler_cpu"))
    for way, found in timed.items():
        share = memory.get(way, {}).get("memory_ratio")
        if share is not None and not way.endswith("temperature 1"):
            peak = f"{100 * share:.1f} %".replace(".0 ", " ")
            told = f"- {way}: {found['cpu_seconds']:.1f}; {found['speedup']:.2f}; {peak}; "
            yield PAGE, f"{told}{100 * found['same_tokens']:.0f} %"
    trick, exact = "plain, head on open positions only", "exact sampler"
    yield PAGE, f"**One trick is all of the factor {timed[exact]['speedup']:.2f}**"
    assert timed[trick]["speedup"] > timed[exact]["speedup"]


def against_d1():
    found = stored(f"{RESULTS}/peers-cpu")
    assert "Intel(R) Xeon(R)" in found["machine"]["device"]
    assert all(each["log-probs apart, nats"] <= 1e-4 for each in found["rows"])

    def least_and_most(what, *sizes):
        ratios = [each[f"d1 / ours, {what}"] for each in found["rows"] if each["vocabulary"] in sizes]
        return f"{min(ratios):.2f} to {max(ratios):.2f}"

    small, large = 2048, 32768
    told = f"is {least_and_most('step', small)} times as fast at a vocabulary of 2,048 and "
    yield PAGE, f"{told}{least_and_most('step', large)} at 32,768."
    yield PAGE, f"Learning alone is {least_and_most('learning', small, large)} times as fast"
    theirs = least_and_most("learning, d1's masks", small, large)
    yield PAGE, f"with d1's masks, {theirs}."


def two_processes():
    rows = {each["part"]: each for each in stored(f"{RESULTS}/two-processes-cpu")["rows"]}
    yield PAGE, f"does {rows['step']['ratio']:.2f} times the work of each of two in a step of `sudoku_unique`"


def the_wait_at_a_server():
    rows = {each["requests"]: each for each in stored(f"{RESULTS}/waiting-cpu")["rows"]}
    yield f"{DOCS}/serving.md", f"at two requests within the time of one, an answer takes {rows[2.0]['mean']:.1f} times"


def the_learners_step():
    rows = stored(f"{RESULTS}/update-cpu")["published"]
    found = {(each["step"], each["arm"]): f"{each['ratio']:.2f}" for each in rows}
    steps = (
        "d1's estimator, one inner iteration",
        "d1's estimator, two inner iterations and KL",
        "ESPO's coupled masks, 4 views",
    )
    one, two, espo = (found[step, "kept graphs"] for step in steps)
    yield PAGE, f"{one} for d1's estimator with one inner iteration, {two} with two and KL, {espo} for ESPO's"
    one, two, espo = (found[step, "constant memory"] for step in steps)
    yield PAGE, f"(`--max_retained_graphs 0`) {one}, {two} and {espo}."
