"""benchmarks/README.md, and the speeds that other pages repeat."""

import math
import re

from held import DOCS, row, stored, tables_of

PAGE, RESULTS = "benchmarks/README.md", "benchmarks/results"
LESS = ("length buckets, prompts of 40 to 260, {}", "FP8 weights dequantized once, batch {}")


def on_an_h100():
    parts = stored(f"{RESULTS}/gpu-h100")["parts"]
    speeds = {batch: {r["what"]: r["tokens/s"] for r in parts[f"sampler {batch}"]["rows"]} for batch in (1, 8)}
    for name in speeds[1]:
        if not name.endswith(", compiled"):
            found = [speeds[batch].get(name + suffix) for batch in (1, 8) for suffix in ("", ", compiled")]
            cells = " | ".join("" if speed is None else f"{speed:.0f}" for speed in found).replace("  ", " ").strip()
            note = " (approximate)" if name.endswith("cache") and "FP8" not in name else ""
            yield "benchmarks/README.md", f"| {name}{note} | {cells}"
    ratio = speeds[8]["FP8, compiled"] / speeds[8]["exact, compiled"]
    yield "docs/quantization.md", f"as fast as compiled bf16 ({ratio:.2f} times on an H100,"


def a_run_on_an_h200():
    parts = stored(f"{RESULTS}/gpu-h200")["parts"]
    speeds, chances, ess = [], [], []
    for task in ("sums", "countdown"):
        rows = {r["what"].split()[-1]: r for r in parts[f"run {task}"]["rows"]}
        for arm, each in rows.items():
            quantized = f"{each['quantized']:.3f}" if arm == "FP8" else ""
            cells = (f"{each['before'] + 1e-9:.3f}", f"{each['after'] + 1e-9:.3f}", quantized)
            mismatch = (f"{each['mean abs d, nats']:.3f}", f"{each['max abs d, nats']:.2f}")
            yield PAGE, row(f"{task}, {arm}", *mismatch, f"{each['ESS']:.3f}", f"{each['least ESS']:.3f}")
            yield PAGE, row(f"{task}, {arm}", *cells, f"{each['completions']:,}").replace("|  |", "| |")
            times = (each[f"{name}, s a step"] for name in ("rollout", "reward", "scoring", "update", "sync"))
            yield PAGE, row(f"{task}, {arm}", *(f"{seconds:.3f}" for seconds in (*times, each["step, s"])))
        ess.append(f"{rows['FP8']['ESS']:.3f}")
        after, n = [rows[arm]["after"] for arm in ("FP8", "bf16")], rows["FP8"]["problems"]
        half = 1.96 * math.sqrt(sum(p * (1 - p) / n for p in after))
        chances.append((abs(after[0] - after[1]), half))
        speeds.append([rows["FP8"][name] / rows["bf16"][name] for name in ("rollout, s a step", "step, s")])
    (rollout, step), (rollout_2, step_2) = speeds
    yield PAGE, f"on sums they take {rollout:.2f} of the time, on Countdown {rollout_2:.2f}."
    yield PAGE, f"on sums they take {step:.2f} times as long, on Countdown {step_2:.2f} times."
    steps = f"but its steps take {step:.2f} to {step_2:.2f} times as long"
    yield f"{DOCS}/quantization.md", f"in {rollout:.2f} to {rollout_2:.2f} of bf16's time, {steps}"
    yield (
        f"{DOCS}/mismatch.md",
        f"FP8 products](../benchmarks/README.md#a-run-on-one-h200): {' and '.join(ess)} on average",
    )
    (sums, half), (countdown, half_2) = chances
    said = f"(sums {sums:.2f}, 95 % interval ±{half:.2f}; Countdown {countdown:.2f} ±{half_2:.2f})"
    yield PAGE, said
    yield PAGE, f"8B weights took {parts['sync']['rows'][0]['sync, s']:.2f} s in the same minutes"


def one_h200():
    parts = {name: part["rows"] for name, part in stored(f"{RESULTS}/gpu")["parts"].items()}
    speed = {(each["what"], each["batch"]): f"{each['tokens/s']:,.0f}" for each in parts["sampler"]}
    ways = ("plain: the published algorithm", "exact", "prefix cache", "dual cache")
    names = (
        "plain: the published algorithm, fp64 softmax",
        "**exact sampler**",
        "prefix cache (approximate)",
        "dual cache (approximate)",
    )
    for way, name in zip(ways, names, strict=True):
        yield PAGE, row(name, *(speed[way, batch] for batch in (1, 8, 64)))
    above = {(each["what"], each["batch"]): each["peak GiB"] for each in parts["sampler"]}["exact", 64]
    yield f"{DOCS}/evaluate.md", f"above them {above:.1f} GiB for 64 rows of 192 tokens"
    fp8 = {each["what"]: each["tokens/s"] for each in parts["fp8"]}
    yield PAGE, f"| FP8 products (`Float8Dynamic`), eager | | {fp8['FP8 products, eager']:.0f} | |"
    yield PAGE, f"| FP8 products, compiled (bf16 above: eager) | | **{fp8['FP8 products, compiled']:.0f}** | |"
    (alone,) = (each["seconds"] for each in parts["sampler"] if (each["what"], each["batch"]) == ("exact", 1))
    bandwidth = next(each["GB/s"] for each in parts["roofline"] if "GB/s" in each)
    step, reading = 1000 * alone / 64, 16e3 / bandwidth  # milliseconds; the weights are 16 GB
    yield PAGE, f"the host is the limit ({step:.0f} ms per step; reading the weights takes {reading:.0f})"
    float8, int8 = (f"{each['sync, s']:.2f}" for each in parts["sync"])
    yield PAGE, f"A sync of 8B weights takes {float8} s (FP8) or {int8} s (int8)."
    (step_8b,) = parts["step"]
    times = [f"{step_8b[f'{stage}, s']:.3g} s" for stage in ("rollout", "scoring", "sync", "step")]
    yield PAGE, row("measured", *times, f"{step_8b['peak GiB, all']:.1f} GiB")
    yield PAGE, f"The 8 updates took {step_8b['update, s']:.1f} s"
    of = {name: f"{speed / fp8['bf16, exact']:.2f}" for name, speed in fp8.items()}
    schemes = f"{DOCS}/quantization.md"
    yield schemes, f"| {of['FP8 weights, compiled']} compiled, {of['FP8 weights, eager']} eager |"
    yield schemes, f"| {of['FP8 products, compiled']} compiled, {of['FP8 products, eager']} eager |"
    yield schemes, f"part of the {of['FP8 products, compiled']}."


EIGHT_BILLION = {
    "write": "write the checkpoint",
    "dry_run": "`--dry_run` on the folder",
    "load": "`load_policy`, bf16",
    "sample": "sample 8 tokens in 2 steps",
    "score": "forward, backward, clipping and AdamW, 16 tokens",
    "sync": "FP8 copy, and a sync",
    "save": "save adapters of rank 16 ({adapters:.1f} s), and with merged weights ({merged:.1f} s)",
    "update": "`train`: start, rehearsal, a step of 1 prompt x 2 completions x 16 tokens, evaluations, merged save",
    "resume": "resume, one more step, evaluation, merged save",
    "evaluate": "`dllm-rl evaluate` of the adapters, 2 problems",
    "export": "export to a folder of transformers; open the adapters with peft's reader",
}


def eight_billion_weights():
    found = stored(f"{RESULTS}/eight-billion-cpu")
    stages = found["stages"]
    saves = {kind: stages["save"][f"save {kind}"]["seconds"] for kind in ("adapters", "merged")}
    assert found["layers"] == 32 and set(stages) == set(EIGHT_BILLION)
    for stage, name in EIGHT_BILLION.items():
        each = stages[stage]
        seconds = (f"{each[column]:.1f}" for column in ("seconds", "cpu_seconds"))
        memory = (f"{each[column]:.2f}" for column in ("own_gb", "mapped_gb"))
        yield PAGE, row(name.format(**saves), *seconds, *memory)
    yield PAGE, f"All stages together take {sum(each['seconds'] for each in stages.values()) / 60:.0f} minutes."
    lines = "\n".join(stages["dry_run"]["plan"])
    held = {name: float(re.search(rf"{name} +([\d.]+) GB", lines)[1]) for name in ("weights", "adapters", "optimi.er")}
    loaded = stages["load"]["own_gb"]
    moved = 2 * held["adapters"] + held["optimi.er"]  # the gradients are as large as the adapters
    mapped = stages["load"]["mapped_gb"] - stages["dry_run"]["mapped_gb"]
    yield PAGE, row("weights, GB", f"{held['weights']:.2f}", f"{mapped:.2f}")
    own = {stage: f"{stages[stage]['own_gb'] - loaded:.2f}" for stage in ("score", "update", "sync")}
    yield PAGE, row("adapters, gradients and AdamW's moments, GB", f"{moved:.2f}", own["score"])
    yield PAGE, row("the same and a save, GB", f"{moved + 5:.2f}", own["update"])
    yield PAGE, f"(own memory less the {loaded:.2f} GB of a process that has loaded the model)"
    # Planned with `rollout_quantization=float8_weight_only`: the copy, adapters, and the temporaries of a sync.
    yield PAGE, row("FP8 copy, adapters and a sync, GB", "8.73", own["sync"])
    last = re.search(r"the last one (\d+\.\d+)", lines)[1]
    yield PAGE, row("the run's last checkpoint, GB", f"{float(last):.2f}", "20.06")  # measured: 20,058,218,048 bytes


def the_sampler():
    timed, memory = (stored(f"{RESULTS}/{name}")["lines"] for name in ("sampler_cpu_processor", "sampler_cpu"))
    told = next(table for table in tables_of(PAGE) if "processor, s" in table[0])
    for each in told:
        way = each[""].replace("**", "")
        found = timed[way]
        share = memory.get(way, {}).get("memory_ratio")
        peak = "" if share is None else f"{100 * share:.1f} %".replace(".0 ", " ")
        cells = [f"{found['cpu_seconds']:.1f}", f"{found['speedup']:.2f}", peak, f"{100 * found['same_tokens']:.0f} %"]
        if way == "exact sampler":
            cells[1:] = (f"**{cell}**" for cell in cells[1:])
        yield PAGE, row(each[""], *cells).replace("|  |", "| |")
    trick, exact = "plain, head on open positions only", "exact sampler"
    yield PAGE, f"**One trick is all of the factor {timed[exact]['speedup']:.2f}**"
    assert timed[trick]["speedup"] > timed[exact]["speedup"]
    shares = [f"{100 * memory[way]['memory_ratio']:.1f} %" for way in (exact, trick)]
    yield PAGE, f"What the exact sampler adds is memory: {shares[0]} against {shares[1]}."
    ragged = stored(f"{RESULTS}/sampler_ragged_cpu")["lines"]["exact sampler"]["speedup"]
    yield PAGE, f"the exact sampler is {ragged:.2f} times as fast as the published one."


def against_the_published_ones():
    found = {}
    for dtype in ("float32", "bfloat16"):
        for each in stored(f"{RESULTS}/sampler-against-{dtype}")["rows"]:
            key = each["way"], dtype, each["vocabulary"], each["batch"]
            found[key] = f"{each['ratio']:.2f} ({each['bound']:.2f})"
            assert dtype == "bfloat16" or each["same tokens"] == 1
    for way in ("exact", "prefix cache", "dual cache"):
        cells = (" / ".join(found[way, "float32", size, batch] for batch in (1, 8)) for size in (16384, 126464))
        yield PAGE, row(way, *cells)
    small = " / ".join(found["exact", "bfloat16", 16384, batch] for batch in (1, 8))
    yield PAGE, row("exact, bf16, 64 tokens", small, f"{found['exact', 'bfloat16', 126464, 1]} /")


def each_saving():
    found = {each["what"]: each for each in stored(f"{RESULTS}/less-work-cpu")["rows"]}
    found |= {each["what"]: each for each in stored(f"{RESULTS}/shared-prompts-cpu")["rows"]}
    assert all(each["same result"] for each in found.values())

    def told(name, *rows):
        columns = ("before, s", "now, s", "ratio")
        return row(name, *(" / ".join(f"{found[each][column]:.2f}" for each in rows) for column in columns))

    caches = [LESS[0].format(cache) for cache in ("no cache", "prefix cache", "dual cache")]
    yield PAGE, told("length buckets, 8 prompts of 40 to 260: no / prefix / dual cache", *caches)
    yield PAGE, told("FP8 weights dequantized once per sync, batch 1 / 8", *map(LESS[1].format, (1, 8)))
    once = "prompt of 256 once for 8 completions, sampling"
    yield PAGE, told("a prompt of 256 run once for 8 completions, `BlockCache()`", once)


def a_step_against_its_products():
    ratios = [each["ratio"] for each in stored(f"{RESULTS}/limit-cpu")["rows"]]
    example = "README's example / with all graphs kept / with FP8 rollouts"
    yield PAGE, row(example, " / ".join(map(str, ratios[:3])))
    yield PAGE, row("the main job without replay", ratios[3])


def the_learners_step():
    rows = stored(f"{RESULTS}/update-cpu")["published"]
    found = {(each["step"], each["arm"]): f"{each['ratio']:.2f}" for each in rows}
    for step, name in (
        ("d1's estimator, one inner iteration", "d1's estimator, one inner iteration (kept: the default)"),
        ("d1's estimator, two inner iterations and KL", "the same, two inner iterations and KL"),
        ("ESPO's coupled masks, 4 views", "ESPO's coupled masks, 4 views (kept: `--max_retained_graphs 4`)"),
    ):
        yield PAGE, row(name, found[step, "constant memory"], f"**{found[step, 'kept graphs']}**")
    last = {each["arm"]: each for each in stored(f"{RESULTS}/learner-cpu")["rows"] if each["masks"] == 16}
    constant, plain = (last[arm]["memory_against_fewest_masks"] for arm in ("constant", "plain"))
    yield PAGE, f"peaks at {constant:.2f} times the memory of one mask (all graphs kept: {plain:.0f} times)"


def late_rollouts():
    found = stored(f"{RESULTS}/late-rollouts-cpu")
    middle, ratio = found["median"], "overlapped / synchronous"
    turns = [turn[ratio] for turn in found["turns"]]
    assert (found["rounds"], found["steps"]) == (6, 10) == (len(turns), 10)
    whole = (f"{middle[key]:.3f}" for key in ("rollout", "learning", "synchronous", "overlapped"))
    spread = f"**{middle[ratio]:.3f}** ({min(turns):.3f} to {max(turns):.3f})"
    yield PAGE, row(*whole, spread, f"{middle['bound']:.3f}")
    for each in found["publishing"]:
        digits = {1: 4, 10: 4, 100: 3, 1000: 2}[each["MiB"]]
        cells = (f"{each[column]:.{digits}f}" for column in ("copy", "put", "to the worker", "read"))
        yield PAGE, row(each["MiB"], *cells)


def late_schedules():
    found = stored(f"{RESULTS}/late-schedules-cpu")
    yield PAGE, f"`max_staleness` 4, means of {found['steps']} steps"
    for run in found["runs"]:
        if not run["workers"]:
            yield PAGE, row(run["learners"], "-", run["schedule"], f"{run['step']:.2f}", "-", "-", "-", "-", 0)
            continue
        seconds = (f"{run[name]:.2f}" for name in ("step", "learning", "batch", "bound"))
        ratio = f"**{run['step / bound']:.2f}**"
        place = (run["learners"], run["workers"], f"`{run['schedule']}`")
        yield PAGE, row(*place, *seconds, ratio, f"{run['staleness']:.1f}")
        assert run["staleness"] <= 4 and run["step / bound"] > 0.95
