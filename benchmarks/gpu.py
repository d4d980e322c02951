"""What a GPU makes of all this: a queue of measurements, each in a process of its own, each written as it ends.

    python -m benchmarks.gpu --queue runs/gpu --minutes 8.5          on a GPU: what is missing, for so long
    python -m benchmarks.gpu --queue runs/rehearsal --rehearse       the same at toy size, on a CPU

A part leaves FOLDER/NAME.json, and NAME-rows.json as it goes. What has ended is skipped. A part that failed says why
there, and runs again when its file is deleted. A part that was cut off starts again, and `run` goes on where it was. In
order, with the minutes that it took: on an H100 or H200, or in brackets at toy size on two cores of a CPU:

    fp8 or bf16   (0.6)  both compiled, in turns: a denoising step of 48, 8, 24, 96, 1 rows of LLaDA-8B's shapes
    products      (0.3)  FP8 products of these shapes: torchao's kernels, a scale a row or a matrix; and bf16's
    step FP8       3     steps of recipes/llada_8b.py by `train`, a quarter of its sampler's, on random weights
    step bf16     (0.3)  the same with bf16 rollouts, compiled, too
    run sums       3.7   benchmarks/gpu_run.py, which takes the pretrained weights: FP8 and bf16, and the sync's time
    whole step N  (0.8)  steps as one graph (`compile_step`) of bf16 and FP8 weights; 1, 8, 64 rows, as `sampler N` has
    sync           0.3   a fresh copy's weights, quantized in place
    plan           3     what the dry run says that a step takes at most, and what the allocator says that it took
    sampler N      2.5   plain, exact, cached, FP8, eager and then all of it compiled; 64, 8, 1 rows; LLaDA-8B's shapes
    learner        0.6   a step with adapters, gradient checkpointing off and on; all weights, if bitsandbytes is there
    mismatch      (0.3)  trained small weights under real FP8 kernels: causes, as `dllm-rl doctor` names them
    long          (0.3)  the sampler's ways at 256 tokens
    experts       (0.2)  a forward of a mixture's FP8 copy, expert by expert, against its 16-bit weights
    roofline       0.3   products in bf16 and FP8, and copying: what the other parts are held against
    tests          1.5   pytest -m gpu
    run countdown  4.1   benchmarks/gpu_run.py
"""

import argparse
import gc
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch._dynamo.utils import counters
from torchao.float8.inference import Float8MMConfig
from torchao.quantization import PerRow, PerTensor
from torchao.quantization.quantize_.common import KernelPreference
from torchao.quantization.quantize_.workflows.float8.float8_tensor import Float8Tensor, QuantizeTensorToFloat8Kwargs

from benchmarks import gpu_run
from benchmarks import sampler as samplers
from benchmarks.measure import (
    Varied,
    host_and_kernels,
    machine,
    operations_of_a_token,
    seconds_and_peak,
    table,
    trained,
)
from benchmarks.presets import PRESETS, make
from dllm_rl.algorithms.optimizers import AdamW, AdamW8bit
from dllm_rl.decoding.prompts import encode, prompt_ids
from dllm_rl.doctor.mismatch import diagnose
from dllm_rl.files import read_json, remove, write_json
from dllm_rl.likelihoods.estimators import OneStep
from dllm_rl.likelihoods.views import each_view
from dllm_rl.models.forward.blocks import compile_blocks
from dllm_rl.models.lora import add_lora
from dllm_rl.models.lora_settings import Lora
from dllm_rl.models.tiny import tiny_llama, tiny_moe
from dllm_rl.monitoring.plots import read_metrics
from dllm_rl.quantization import schemes
from dllm_rl.quantization.rollout_policy import quantized_copy, sync_weights
from dllm_rl.samplers.cache import DualCache, PrefixCache
from dllm_rl.samplers.unmask import Unmask
from dllm_rl.training.dry_run.duration import PEAK_FLOPS
from dllm_rl.training.dry_run.memory import PlannedStep, step_memory
from dllm_rl.training.dry_run.plan import meta_policy
from dllm_rl.training.trainer import train
from dllm_rl.types.rollouts import Prompts
from recipes.llada_8b import recipe_of
from recipes.sudoku_unique import recipe as main_job

E4M3 = schemes.FakeQuantize(weight="e4m3", activation="e4m3")

Row = dict[str, Any]
WIDE = {"hidden_size": 2048, "num_layers": 6, "intermediate_size": 5504}
SECONDS = 400  # of a part on a GPU that does not go on where it was; what takes longer is stopped and said so
GRACE = 20  # seconds from SIGTERM to SIGKILL


def roofline(rehearse: bool, device: str) -> Iterable[Row]:
    size, place = 256 if rehearse else 8192, torch.device(device)
    yield {"what": f"{size}^3 product, bf16", "TFLOP/s": samplers.matmul_flops(place, torch.bfloat16, size) / 1e12}
    if place.type == "cuda" and torch.cuda.get_device_capability() >= (8, 9):
        a = torch.randn(size, size, device=place).to(torch.float8_e4m3fn)
        b = torch.randn(size, size, device=place).to(torch.float8_e4m3fn).t()
        ones = torch.ones(size, 1, device=place), torch.ones(1, size, device=place)
        product = partial(torch._scaled_mm, a, b, *ones, out_dtype=torch.bfloat16)
        yield {"what": f"{size}^3 product, FP8, a scale a row", "TFLOP/s": 2 * size**3 / _best(product) / 1e12}
    big = torch.zeros(2 ** (20 if rehearse else 31), dtype=torch.uint8, device=place)
    yield {"what": "copy, read and write", "GB/s": 2 * big.numel() / _best(big.clone, device) / 1e9}


def _best(run: Callable[[], Any], device: str = "cuda") -> float:
    return seconds_and_peak(run, device, repeats=5)["seconds"]


def _shape(rehearse: bool, batch: int) -> samplers.Shape:
    return replace(samplers.PRESETS["tiny" if rehearse else "llada-8b"], batch=min(batch, 4) if rehearse else batch)


def _prompts(policy: Any, shape: samplers.Shape) -> Prompts:
    ids = torch.randint(3, shape.vocabulary, (shape.batch, shape.prompt), generator=torch.Generator().manual_seed(1))
    return Prompts.from_ids(ids.tolist(), pad_id=policy.pad_id)


def _sampled(policy: Any, shape: samplers.Shape, **options: Any) -> Callable[[], Any]:
    settings = {"max_new_tokens": shape.new, "diffusion_steps": shape.steps, "block_size": shape.block, **options}
    return partial(Unmask(**settings), policy, _prompts(policy, shape), torch.Generator())


def _timed(
    what: str, run: Callable[[], Any], device: str, tokens: int, warm: Callable[[], Any] | None = None, **more: Any
) -> Row:
    """warm: what is run before, so that kernels are chosen and compiled; None: the same; timed twice then."""
    (warm or run)()
    found = seconds_and_peak(run, device, repeats=1 if warm else 2)
    return {"what": what, **more, "seconds": found["seconds"], "tokens/s": tokens / found["seconds"]} | {
        "peak GiB": found["peak_mib"] / 1024
    }


def sampler(rehearse: bool, device: str, batch: int = 8, length: int | None = None) -> Iterable[Row]:
    """Every way, eager and then compiled, which is in place; a batch of 64 is timed once, after a short run."""
    policy = samplers.random_policy(_shape(rehearse, 1), torch.device(device))
    dynamic = schemes.Float8Dynamic if device.startswith("cuda") and not rehearse else schemes.Float8WeightOnly
    fp8 = quantized_copy(policy, dynamic())
    ways = {"exact": (policy, None), "prefix cache": (policy, PrefixCache()), "dual cache": (policy, DualCache())}
    ways |= {"FP8": (fp8, None), "FP8, dual cache": (fp8, DualCache())}
    shape = _shape(rehearse, batch)
    if length and not rehearse:
        shape = replace(shape, new=length, steps=length // 2)
    plain = partial(samplers.plain, policy, _prompts(policy, shape), shape)

    def timed(name: str, run: Callable[[], Any], of: Any = policy, cache: Any = None) -> Row:
        short = _sampled(of, shape, cache=cache, diffusion_steps=shape.new // shape.block)
        return _timed(name, run, device, shape.batch * shape.new, short if batch == 64 else None, batch=batch)

    def all_ways(suffix: str = "") -> Iterable[Row]:
        return (timed(name + suffix, _sampled(of, shape, cache=cache), of, cache) for name, (of, cache) in ways.items())

    yield timed("plain: the published algorithm", plain)
    yield from all_ways()
    if not (rehearse and device.startswith("cuda")):  # the simulated device has no compiler
        torch.compiler.reset()
        for each in (policy, fp8):
            compile_blocks(each)
        yield from all_ways(", compiled")


def fp8_or_bf16(rehearse: bool, device: str) -> Iterable[Row]:
    """Rollouts of both, compiled, in turns: eight denoising steps of 512 columns, the least of three times."""
    shape = _shape(rehearse, 1)
    if not rehearse:
        shape = replace(shape, prompt=256, new=256, steps=8)
    policy = samplers.random_policy(shape, torch.device(device))
    dynamic = schemes.Float8DynamicEmulated if device == "cpu" else schemes.Float8Dynamic
    policy.module.to(torch.bfloat16)
    arms = {"FP8": quantized_copy(policy, dynamic()), "bf16": policy}
    weights = sum(p.numel() for p in policy.module.base_model.layers.parameters() if p.dim() == 2)
    columns = shape.prompt + shape.new
    of_token = operations_of_a_token(weights, columns, shape.hidden, shape.layers)
    for each in arms.values():
        compile_blocks(each)
    for rows in (4, 1) if rehearse else (48, 8, 24, 96, 1):
        runs = {name: _sampled(each, replace(shape, batch=rows)) for name, each in arms.items()}
        for run in runs.values():
            run()
        seconds = dict.fromkeys(runs, float("inf"))
        for _ in range(3):
            for name, run in runs.items():
                seconds[name] = min(seconds[name], seconds_and_peak(run, device, repeats=1)["seconds"])
        for name, run in runs.items():
            speed = of_token * rows * columns * shape.steps / seconds[name]
            ms = {"ms a step": 1000 * seconds[name] / shape.steps}
            ms |= {f"{k}, ms a step": 1000 * v / shape.steps for k, v in host_and_kernels(run, device).items()}
            row = {"what": f"{name}, compiled", "rows": rows, "columns": columns, **ms, "TFLOP/s": speed / 1e12}
            yield row | {"of bf16's peak": speed / PEAK_FLOPS, "bf16 / this": seconds["bf16"] / seconds[name]}


def products(rehearse: bool, device: str) -> Iterable[Row]:
    """A linear layer of the blocks, compiled, with the rounding of its inputs."""
    granularities = {"row": PerRow(), "matrix": PerTensor()}
    kernels = [KernelPreference.TORCH, *([KernelPreference.MSLK] if find_spec("mslk") else [])]
    shapes = [(64, 32), (64, 128)] if rehearse else [(4096, 4096), (4096, 12288), (12288, 4096)]
    count = 2 if rehearse else 20  # products for a time, whose resolution is a tenth of a millisecond
    for (inputs, outputs), tokens in product(shapes, (64,) if rehearse else (48 * 512, 8 * 512, 512)):
        x = torch.randn(tokens, inputs, device=device, dtype=torch.bfloat16)
        weight = torch.randn(outputs, inputs, device=device, dtype=torch.bfloat16)
        arms: dict[str, torch.Tensor] = {"bf16": weight}
        for (name, granularity), kernel in product(granularities.items(), kernels):
            of_inputs = QuantizeTensorToFloat8Kwargs(torch.float8_e4m3fn, granularity, kernel_preference=kernel)
            arms[f"FP8, a scale a {name}, {kernel.name}"] = Float8Tensor.from_hp(
                weight, torch.float8_e4m3fn, granularity, act_quant_kwargs=of_inputs, kernel_preference=kernel,
                mm_config=Float8MMConfig(use_fast_accum=device != "cpu"),
            )  # fmt: skip
        for name, matrix in arms.items():
            row: Row = {"what": name, "tokens": tokens, "inputs": inputs, "outputs": outputs}
            run = torch.compile(torch.nn.functional.linear, dynamic=False)

            def several(run=run, x=x, matrix=matrix) -> None:
                for _ in range(count):
                    run(x, matrix)

            try:
                with torch.no_grad():
                    several()
                    seconds = _best(several, device) / count
            except (RuntimeError, ValueError, AssertionError, NotImplementedError) as error:  # the other arms may run
                yield row | {"failed": (str(error).strip() or type(error).__name__).splitlines()[0]}
                continue
            yield row | {"TFLOP/s": 2 * tokens * inputs * outputs / seconds / 1e12, "us": 1e6 * seconds}


def whole_steps(rehearse: bool, device: str, batch: int) -> Iterable[Row]:
    """Steps as one graph: the rows to hold beside those of `sampler`, and how many graphs each took."""
    policy = samplers.random_policy(_shape(rehearse, 1), torch.device(device))
    dynamic = schemes.Float8WeightOnly if rehearse else schemes.Float8Dynamic
    fp8 = quantized_copy(policy, dynamic())
    shape = _shape(rehearse, batch)
    ways = {"exact": (policy, None), "FP8": (fp8, None), "FP8, dual cache": (fp8, DualCache())}
    for name, (of, cache) in ways.items():
        before = counters["stats"]["unique_graphs"]
        run = _sampled(of, shape, cache=cache, compile_step=True)
        row = _timed(f"{name}, whole step", run, device, shape.batch * shape.new, batch=batch)
        yield row | {"graphs": counters["stats"]["unique_graphs"] - before}


def experts(rehearse: bool, device: str) -> Iterable[Row]:
    """A mixture of LLaDA2-mini's experts, two blocks, and its FP8 copy; 2,048 tokens."""
    letters = "".join(chr(0x4E00 + i) for i in range(50))
    sizes = {"hidden_size": 32, "moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2}
    if not rehearse:
        sizes = {"hidden_size": 2048, "moe_intermediate_size": 512, "num_experts": 256, "num_experts_per_tok": 8}
    policy = tiny_moe(characters=letters, causal=False, num_layers=2, max_length=1024, **sizes)
    policy.module.to(device, torch.bfloat16)
    size = (2, 16) if rehearse else (8, 256)
    tokens = torch.randint(3, 50, size, generator=torch.Generator().manual_seed(0)).to(device)
    for name, of in {"bf16": policy, "FP8": quantized_copy(policy, schemes.Float8WeightOnly())}.items():

        def forward(of=of) -> None:
            with torch.no_grad():
                of.hidden(tokens, torch.ones_like(tokens, dtype=torch.bool))

        yield _timed(name, forward, device, tokens.numel())


def sync(rehearse: bool, device: str) -> Iterable[Row]:
    policy = samplers.random_policy(_shape(rehearse, 1), torch.device(device))
    for name in ("Float8WeightOnly", "Int8WeightOnly"):
        begin = time.perf_counter()
        copied = quantized_copy(policy, getattr(schemes, name)())
        made = time.perf_counter() - begin
        found = seconds_and_peak(partial(sync_weights, policy, copied), device, repeats=3)
        row = {"what": name, "first copy, s": made, "sync, s": found["seconds"]}
        row |= {"sync peak GiB": found["peak_mib"] / 1024}
        yield row | {"copy GiB": copied.quantization_report.bytes_after / 2**30}


def learner(rehearse: bool, device: str) -> Iterable[Row]:
    """A forward and backward of one view, and the optimizer's step, on 8 completions of 256 tokens after 128."""
    arms = {"adapters": (True, False), "adapters, checkpointing": (True, True)}
    if rehearse or find_spec("bitsandbytes"):  # the moments of 8B in fp32 do not fit
        arms["all weights"] = (False, True)
    for name, (adapters, recompute) in arms.items():
        policy, rollout = make(PRESETS["smoke" if rehearse else "8b"], device, torch.bfloat16)
        if adapters:
            add_lora(policy, Lora(r=16))
        policy.gradient_checkpointing = recompute
        trained = [p for p in policy.module.parameters() if p.requires_grad]
        kind = AdamW() if adapters or rehearse else AdamW8bit()
        optimizer = kind(trained, 1e-6, (0.9, 0.99), 0.0)
        noise = OneStep().draw_views(rollout, torch.Generator().manual_seed(0))

        def step(policy=policy, rollout=rollout, noise=noise, optimizer=optimizer) -> None:
            for view, weight in zip(each_view(noise), noise.coefficients, strict=True):
                view.backward(policy, rollout, weight)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        blocks = len(policy.module.base_model.layers)
        yield _timed(name, step, device, int(rollout.completion_mask.sum()), blocks=blocks)
        del policy, rollout, optimizer, trained, noise, step


def step(rehearse: bool, device: str, rollouts: str, folder: Path) -> list[Row]:
    """Of three steps the last: what is compiled, and what is made once, comes in the first. Rollouts: FP8 or bf16.

    FOLDER/metrics.jsonl has each step as it ends.
    """
    given: dict[str, Any] = (
        {"max_new_tokens": 8, "diffusion_steps": 2, "block_size": 8} if rehearse else {"diffusion_steps": 32}
    )
    made = samplers.random_policy(_shape(rehearse, 1), torch.device(device), characters="1234.=x\n")
    small: dict[str, Any] = {"train_batch_size": 2, "num_iterations": 2} if rehearse else {}
    few, job = replace(main_job.eval_task, size=2), recipe_of()
    scheme = schemes.Float8WeightOnly() if rehearse else schemes.Float8Dynamic()
    recipe = job.replace(
        model=made, dtype="auto", output_dir=str(folder), overwrite_output_dir=True, num_steps=3,
        saves={"steps": 3, "total_limit": 1}, evaluation={"steps": 0},
        rollout_quantization=scheme if rollouts == "FP8" else None,
        torch_compile=not rehearse, task=Varied(main_job.task, ahead=8 if rehearse else 239), validation_task=few,
        eval_task=few, sampler=job.sampler.replace(**given), eval_sampler=job.sampler.replace(**given), **small,
    )  # fmt: skip
    try:
        found = seconds_and_peak(partial(train, recipe), device, repeats=1)
    finally:
        remove(folder / "checkpoints")  # 20 GB
    steps = read_metrics(folder)
    last, gradients = steps[-1], trained(steps, recipe.train_batch_size * recipe.num_generations)
    times = {name.removeprefix("time/") + ", s": value for name, value in last.items() if name.startswith("time/")}
    row = {"what": f"rollouts in {rollouts}", "step, s": last["step_time"], **times}
    return [row | {"peak GiB, all": found["peak_mib"] / 1024, "ESS": last.get("rollout_corr/ess", 0.0), **gradients}]


def planned(rehearse: bool, device: str) -> Iterable[Row]:
    """Two steps of sudoku_unique on a wider model, 256 rows of 33 tokens: the second finds all that is held."""
    letters = "1234.=" + "".join(chr(0x4E00 + i) for i in range(100 if rehearse else 8_000))
    sizes = {"hidden_size": 64, "num_layers": 2, "intermediate_size": 128} if rehearse else WIDE
    adapters = Lora(r=16, dropout=0.05)
    arms: dict[str, Row] = {
        "all weights": {},
        "all weights, checkpointing": {"gradient_checkpointing": True},
        "adapters": {"lora": adapters},
        "adapters, checkpointing": {"lora": adapters, "gradient_checkpointing": True},
        "adapters, micro-batches of 32": {"lora": adapters, "micro_batch_size": 32},
    }
    if device.startswith("cuda") and find_spec("bitsandbytes"):
        arms["all weights, 8-bit moments"] = {"optim": AdamW8bit()}
    for name, fields in arms.items():
        fields |= {"model": partial(tiny_llama, characters=letters, causal=False, num_attention_heads=8, **sizes)}
        fields |= {"validation_task": replace(main_job.validation_task, size=4), "likelihood": OneStep()}
        fields |= {
            "eval_task": replace(main_job.eval_task, size=4),
            "warmup": {"steps": 0},
            "num_steps": 2,
            "bf16": True,
        }
        fields |= {"task": Varied(main_job.task), "train_batch_size": 4 if rehearse else 32}
        gc.collect()
        with tempfile.TemporaryDirectory() as folder:
            recipe = main_job.replace(output_dir=folder, **fields)
            policy = meta_policy(recipe)
            prompt_tokens = len(prompt_ids(policy, recipe.task[0].prompt))
            most = step_memory(PlannedStep(recipe, policy, prompt_tokens)).peaks
            found = seconds_and_peak(partial(train, recipe), device, repeats=1)
            trained(read_metrics(Path(folder)), recipe.train_batch_size * recipe.num_generations)
        row = {"what": name, "planned GiB": max(most.values()) / 2**30, "measured GiB": found["peak_mib"] / 1024}
        yield row | {"stage": max(most, key=lambda stage: most[stage])}


def mismatch(rehearse: bool, device: str) -> Iterable[Row]:
    from dllm_rl import load_policy

    with tempfile.TemporaryDirectory() as folder:
        few = {"num_steps": 2, "warmup": {"steps": 5, "eval_steps": 5}} if rehearse else {"num_steps": 60}
        recipe = main_job.replace(output_dir=folder, **few)
        summary = train(recipe)
        trained(read_metrics(Path(folder)), recipe.train_batch_size * recipe.num_generations)
        policy = load_policy(summary["checkpoint"], dtype=torch.bfloat16, device=device)
    task = main_job.eval_task
    prompts = encode(policy, [task[i] for i in range(4 if rehearse else 64)], num_generations=2)
    schemes_by_name = {"Float8WeightOnly": schemes.Float8WeightOnly(), "e4m3 emulated": E4M3}
    if device.startswith("cuda"):
        schemes_by_name["Float8Dynamic"] = schemes.Float8Dynamic()
    for name, scheme in schemes_by_name.items():
        report = diagnose(policy, scheme, prompts=prompts, sampler=main_job.sampler.replace(temperature=1.0))
        first = report.causes[0]
        row = {"what": name, "mean abs d, nats": report.total.mean_abs, "max abs d": report.total.max_abs}
        yield row | {"ESS": report.total.ess, "first cause": f"{first.name} {first.mean_abs:.2g}"}


PARTS: dict[str, Callable[[bool, str], Iterable[Row]]] = {
    "fp8 or bf16": fp8_or_bf16,
    "products": products,
    **{f"whole step {batch}": partial(whole_steps, batch=batch) for batch in (1, 8, 64)},
    "sync": sync,
    "plan": planned,
    **{f"sampler {batch}": partial(sampler, batch=batch) for batch in (64, 8, 1)},
    "learner": learner,
    "mismatch": mismatch,
    "long": partial(sampler, length=256),
    "experts": experts,
    "roofline": roofline,
}
FIRST = ("fp8 or bf16", "products", "step FP8", "step bf16", "run sums")  # what decides the format of rollouts
QUEUE = (*FIRST, *(part for part in PARTS if part not in FIRST), "tests", "run countdown")


def tests(rehearse: bool) -> list[Row]:
    """`pytest -m gpu`; its summary line."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "tests/cuda", "-n0", *["--collect-only"] * rehearse]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"pytest ended with {done.returncode}: {done.stdout.strip()[-500:]}")
    return [{"what": "pytest -m gpu", "said": (done.stdout.strip() or "passed").splitlines()[-1]}]


def run_part(part: str, rehearse: bool, device: str, folder: Path) -> Iterable[Row]:
    if part.startswith("run "):
        return gpu_run.run(folder / "run", rehearse, part.removeprefix("run "))
    if part.startswith("step "):
        return step(rehearse, device, part.removeprefix("step "), folder / part)
    return tests(rehearse) if part == "tests" else PARTS[part](rehearse, device)


def in_own_process(part: str, rehearse: bool, device: str, folder: Path, seconds: float) -> bool:
    """True once FOLDER/PART.json is there: with the part's rows, or with what it ended with."""
    found = folder / f"{part}-rows.json"
    command = [sys.executable, "-m", "benchmarks.gpu", "--part", part, "--device", device, "--queue", str(folder)]
    command += ["--rehearse"] * rehearse
    limit = seconds if rehearse or part.startswith("run ") or part == "tests" else min(seconds, SECONDS)
    begin = time.perf_counter()
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, process_group=0)
    try:
        _, said = child.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        if limit == seconds:
            return False
        said = f"stopped after {SECONDS} s"
    finally:  # also where the queue itself is stopped
        end(child)
    about = {"part": part, "rehearsal": rehearse, "machine": machine(device), "seconds": time.perf_counter() - begin}
    rows = read_json(found) if found.exists() else []
    why = {} if child.returncode == 0 else {"failed": (said.strip() or f"status {child.returncode}").splitlines()[-1]}
    write_json(folder / f"{part}.json", about | {"rows": rows} | why)
    return True


def end(child: subprocess.Popen[str]) -> None:
    """End a process and those that it started; one that has ended is left alone."""
    if child.poll() is None:
        os.killpg(child.pid, signal.SIGTERM)  # `run` saves its last step
        try:
            child.communicate(timeout=GRACE)
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)
            child.communicate()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--queue", type=Path, required=True, metavar="FOLDER", help="folder of the results")
    parser.add_argument("--minutes", type=float, default=8.5, help="after which no part goes on")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rehearse", action="store_true", help="toy sizes, to see that every part runs")
    parser.add_argument("--part", choices=QUEUE, help="this one alone, in this process")
    options = parser.parse_args()
    if options.device == "cpu" and not options.rehearse:
        print("error: no GPU is here; --rehearse runs the parts at toy size", file=sys.stderr)
        return 2
    folder = options.queue
    folder.mkdir(parents=True, exist_ok=True)
    if options.part:
        if options.device == "cpu":  # graphs as on a GPU, and no kernels: a C++ compiler takes minutes for them
            torch.compile = partial(torch.compile, backend="eager")
        rows: list[Row] = []
        (folder / f"{options.part}-rows.json").unlink(missing_ok=True)  # of an earlier try
        for row in run_part(options.part, options.rehearse, options.device, folder):
            rows.append(row)
            write_json(folder / f"{options.part}-rows.json", rows)
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # which ends the part, too
    until = time.monotonic() + 60 * options.minutes
    failed = 0
    for part in QUEUE:
        file = folder / f"{part}.json"
        left = until - time.monotonic()
        if not file.exists() and not in_own_process(part, options.rehearse, options.device, folder, left):
            print(f"{part}: out of time; run the same command again")
            return 3
        result = read_json(file)
        failed += "failed" in result
        print(f"\n{part}, {result['seconds']:.0f} s" + (f": FAILED, {result['failed']}" if "failed" in result else ""))
        if result["rows"]:
            shorter = [{k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()} for row in result["rows"]]
            names = list(dict.fromkeys(name for row in shorter for name in row))
            print(table([{name: row.get(name, "") for name in names} for row in shorter]), flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
