"""The plan of a recipe: every check that needs no weights, counts exact, memory as the parts say."""

import json
import math
import re
from dataclasses import replace
from functools import partial

import pytest
import torch
import transformers
from as_timed import as_timed
from layouts import stock
from repetitions import few
from tiny_recipe import tiny_recipe, with_changes

from dllm_rl import TIS, Lora, NoCorrection, grpo_recipe, tiny_masked_lm, train
from dllm_rl.algorithms.optimizers import AdamW, AdamW8bit
from dllm_rl.config import from_command_line
from dllm_rl.likelihoods.estimators import ELBO, OneStep, Trajectory
from dllm_rl.models.checkpoint.loading import CONFIGS, load_config
from dllm_rl.quantization.schemes import FakeQuantize, Float8Dynamic, Float8WeightOnly
from dllm_rl.samplers import Unmask
from dllm_rl.samplers.autoregress import Autoregress
from dllm_rl.tasks import Countdown
from dllm_rl.training.dry_run import duration
from dllm_rl.training.dry_run import plan as dry_run
from dllm_rl.training.dry_run.duration import PEAK_FLOPS
from dllm_rl.training.dry_run.memory import (
    Memory,
    PlannedStep,
    copy_bytes,
    count_quantized,
    num_weights,
    step_memory,
    token_layers,
)
from dllm_rl.training.dry_run.plan import meta_policy, plan
from dllm_rl.training.policies import call_model_function
from recipes import llada_8b, sudoku_tiny

# (recipe, parameters, quantized layers). 8,015,581,184 is LLaDA-8B's published count; the others are sums by hand of
# embeddings, attention, feed-forward, experts, routers and norms.
HIDDEN, WIDE = 2048, 157184 * 2048
MOE = 2 * WIDE + HIDDEN + 16 * (4 * HIDDEN**2 + 2 * 128 + 2 * HIDDEN + 64 * HIDDEN + 64 * 3 * HIDDEN * 1024)
LLADA2 = (
    2 * WIDE + HIDDEN + 20 * (HIDDEN * 24 * 128 + HIDDEN**2 + 2 * 128 + 2 * HIDDEN)
    + 3 * HIDDEN * 5120 + 19 * (256 * HIDDEN + 257 * 3 * HIDDEN * 512)
)  # fmt: skip
QWEN = 2 * 151936 * 4096 + 4096 + 36 * (2 * 4096**2 + 2 * 4096 * 1024 + 3 * 4096 * 12288 + 2 * 4096 + 2 * 128)
DREAM = 2 * 152064 * 3584 + 3584 + 28 * (2 * 3584**2 + 2 * 3584 * 512 + 3584 + 2 * 512 + 3 * 3584 * 18944 + 2 * 3584)
A2D = 151936 * 1024 + 1024 + 28 * (3 * 2 * 1024**2 + 3 * 1024 * 3072 + 2 * 1024 + 2 * 128)  # tied; 16 and 2 * 8 heads
LLADA, GEMMA = "GSAI-ML/LLaDA-8B-Instruct", "google/diffusiongemma-26B-A4B-it"
REAL = {
    LLADA: (8_015_581_184, 32 * 7),
    "Dream-org/Dream-v0-Instruct-7B": (DREAM, 28 * 7),
    "inclusionAI/LLaDA-MoE-7B-A1B-Instruct": (MOE, 16 * (4 + 2 * 64)),
    "inclusionAI/LLaDA2.0-mini": (LLADA2, 20 * 4 + 3 + 19 * (3 + 2 * 256)),
    "Qwen/Qwen3-8B": (QWEN, 36 * 7),
    "dllm-hub/Qwen3-0.6B-diffusion-mdlm-v0.1": (A2D, 28 * 7),
    # Its hub page says 25.8 billion. Layers: text (values of the five full ones are keys), routers, experts, images.
    GEMMA: (25_823_778_864, 30 * (4 + 3 + 1 + 2 * 128) - 5 + 27 * 7),
}
ALL_WEIGHTS = {
    "lora": None,
    "dtype": "float32",
    "bf16": True,
    "optim": AdamW8bit(),
    "gradient_checkpointing": True,
    "learning_rate": 1e-6,
}


def recipe_of(model: str = LLADA):
    if model != GEMMA:
        return llada_8b.recipe_of("countdown", model)
    puzzles = partial(Countdown, count=3, prompt_format="text")
    given = {"sampler_options": {"diffusion_steps": 16}, "num_generations": 4, "rollout_batch_size": 8}
    return grpo_recipe(model, puzzles(), eval_dataset=puzzles(split="test"), **given, lora=Lora())


def job_8b():
    return as_timed(recipe_of())


def memory(recipe, policy):
    return step_memory(PlannedStep(recipe, policy, 256))


def test_a_dry_run_gives_no_lessons(monkeypatch):
    """The recipe's model is made by a function that also trains it for 400 steps."""
    lessons = []
    monkeypatch.setattr(sudoku_tiny, "learn", lambda policy, steps, *_: lessons.append(steps))
    policy = meta_policy(sudoku_tiny.recipe)
    assert lessons == []
    trained = call_model_function(sudoku_tiny.recipe.model, 0)
    assert lessons == [400] and num_weights(policy.module) == sum(map(torch.numel, trained.module.parameters()))


@pytest.mark.parametrize("name", few(REAL, ["Dream-org/Dream-v0-Instruct-7B"], [LLADA]))
def test_every_model_runs_dry(name, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = from_command_line(recipe_of(name), ["--dry_run", "--rollout_quantization", "Float8WeightOnly"])
    train(recipe)
    parameters, layers = REAL[name]
    printed = capsys.readouterr().out
    assert f"parameters            {parameters:,}\n" in printed
    assert f"quantized layers      {layers} with" in printed
    assert "trainable parameters" in printed
    assert "fits                  24 GB: " in printed
    assert not list(tmp_path.iterdir())  # a dry run leaves nothing behind


def rollout_bytes(recipe, policy):
    return copy_bytes(PlannedStep(recipe, policy, 256))


def test_llada_8b_to_the_parameter(monkeypatch):
    recipe = job_8b()
    full = meta_policy(replace(recipe, lora=None))
    assert num_weights(full.module) == 8_015_581_184
    assert all(p.is_meta for p in full.module.parameters())
    layers, weights, kept = count_quantized(PlannedStep(recipe, full, 256))
    assert (layers, weights) == (224, 32 * (4 * 4096**2 + 3 * 4096 * 12288))
    assert sorted(kept) == ["lm_head", "model.embed_tokens"]
    assert rollout_bytes(replace(recipe, lora=None), full) == weights + 2 * (8_015_581_184 - weights)
    # Adapters, and a quantized copy of two of the 32 layers.
    adapted, parameters, trainable = shallow(recipe, monkeypatch)
    attention, ahead = 4 * 128 * (4096 + 4096), 3 * 128 * (4096 + 12288)
    assert trainable == 2 * (attention + ahead)
    layers, weights, kept = count_quantized(PlannedStep(recipe, adapted, 256))
    assert (layers, weights) == (14, 2 * (4 * 4096**2 + 3 * 4096 * 12288))
    others = parameters - weights
    assert rollout_bytes(recipe, adapted) == weights  # the other layers are frozen, and shared with the learner
    assert rollout_bytes(replace(recipe, bf16=True, dtype="float32"), adapted) == weights + 2 * others
    assert sorted(kept) == ["lm_head", "model.embed_tokens"]
    held = replace(recipe, rollout_quantization=Float8WeightOnly(dequantized=True))
    assert rollout_bytes(held, adapted) == 2 * weights
    rounded = replace(recipe, rollout_quantization=FakeQuantize(activation="int8"))
    assert rollout_bytes(rounded, adapted) == 4 * weights  # products in fp32


def shallow(recipe, monkeypatch, *, layers=2):
    """The recipe's policy with few layers and words, so that its plan takes seconds; and numbers of parameters."""
    small = {"n_layers": layers, "embedding_size": 4096, "vocab_size": 4096}
    raw = load_config("GSAI-ML/LLaDA-8B-Instruct") | small
    monkeypatch.setattr(dry_run, "load_config", lambda _: raw)
    policy = meta_policy(recipe)
    policy.spec = replace(policy.spec, mask_id=7)
    return policy, num_weights(policy.module), sum(p.numel() for p in policy.module.parameters() if p.requires_grad)


def test_what_is_held_is_counted_by_hand(monkeypatch):
    recipe = job_8b()
    policy, parameters, trainable = shallow(recipe, monkeypatch)
    held = memory(recipe, policy).persistent
    assert held["weights"] == pytest.approx(2 * parameters, rel=1e-5)
    assert held["adapters"] == held["gradients"] == 4 * trainable
    assert held["optimizer"] == pytest.approx(8 * trainable, rel=1e-5)
    assert "reference" not in held  # the policy itself, adapters left out
    full = from_command_line(recipe, ["--lora", "none", "--dtype", "float32", "--bf16"])
    policy, *_ = shallow(full, monkeypatch)
    held = memory(full, policy).persistent
    assert held["weights"] == pytest.approx(4 * parameters, rel=1e-5) and held["reference"] == 4 * parameters
    rounded = count_quantized(PlannedStep(full, policy, 256))[1]
    assert held["rollout copy"] == rounded + 2 * (parameters - rounded)  # FP8 weights, and the others in bf16
    assert held["gradients"] == pytest.approx(4 * parameters, rel=1e-5)
    assert held["optimizer"] == pytest.approx(8 * parameters, rel=1e-5)
    eight = memory(replace(full, optim=AdamW8bit(), beta=0.0), policy)
    assert (
        eight.persistent["optimizer"] == pytest.approx(2 * parameters, rel=0.02) and "reference" not in eight.persistent
    )
    small = from_command_line(recipe, ["--base_quantization", "nf4", "--lora.r", "16"])
    policy, *_ = shallow(small, monkeypatch)
    blocks = 2 * (4 * 4096**2 + 3 * 4096 * 12288)
    expected = blocks * 0.5625 + 2 * (parameters - blocks)
    assert memory(small, policy).persistent["weights"] == pytest.approx(expected, rel=1e-4)


def test_each_way_to_save_memory_saves_it(monkeypatch):
    recipe = job_8b()
    one_view = ELBO(num_samples=1)
    base = replace(
        recipe, likelihood=one_view, gradient_checkpointing=False, rollout_batch_size=None, micro_batch_size=12
    )
    policy, *_ = shallow(base, monkeypatch, layers=3)

    def peaks(**changes):
        changed = with_changes(base, **changes)
        policy.gradient_checkpointing = changed.gradient_checkpointing
        return memory(changed, policy).peaks

    plain, recomputed = peaks(), peaks(gradient_checkpointing=True)
    tokens = 12 * 512
    # Two layers' activations, 200 to 400 KB a token each, against one layer's and three inputs of 8 KB a token.
    assert 2 * 200e3 * tokens < plain["update"] - recomputed["update"] + 250e3 * tokens
    assert recomputed["update"] < plain["update"] - 150e3 * tokens
    assert peaks(likelihood=OneStep())["update"] < plain["update"] - 4 * 512 * 2 * 200e3  # 8 prompts: 8 rows
    assert peaks(micro_batch_size=6)["update"] < plain["update"] - 6 * 512 * 2 * 200e3
    assert peaks(rollout_batch_size=6)["rollout"] < plain["rollout"]


# The peaks that the allocator counted in a step of the same shapes on tensors without data, and the GPU that fits.
COUNTED = {
    LLADA: (54.4, 80),
    "all weights": (108.6, 141),
    "Dream-org/Dream-v0-Instruct-7B": (53.5, 80),
    "inclusionAI/LLaDA-MoE-7B-A1B-Instruct": (30.3, 80),
    "inclusionAI/LLaDA2.0-mini": (55.3, 80),
    "Qwen/Qwen3-8B": (36.4, 80),
}


def counted(name: str):
    """The recipe whose peak was counted."""
    if name == "all weights":
        return with_changes(recipe_of(), **ALL_WEIGHTS)
    recipe = recipe_of(name)
    if name == "inclusionAI/LLaDA2.0-mini":
        return replace(recipe, likelihood=Trajectory(num_segments=8), gradient_checkpointing=True)
    if name == "Qwen/Qwen3-8B":
        longer = {"sampler": recipe.sampler.replace(max_new_tokens=512), "num_generations": 8, "micro_batch_size": 8}
        return with_changes(recipe, **longer, gradient_checkpointing=True)
    return recipe


@pytest.mark.slow
@pytest.mark.parametrize("name", COUNTED)
def test_the_estimate_is_near_a_count_of_live_tensors(name):
    recipe = counted(name)
    lora = recipe.lora and replace(recipe.lora, dropout=0.05)
    recipe = replace(recipe, rollout_quantization=Float8Dynamic(), lora=lora)  # as counted
    gigabytes, size = COUNTED[name]
    peak = memory(recipe, meta_policy(recipe)).peak
    assert peak / 1e9 == pytest.approx(gigabytes, rel=0.13)
    assert peak <= dry_run.USABLE_SHARE * size * 1e9


@pytest.mark.slow
def test_the_gpus_that_a_plan_fits(monkeypatch):
    monkeypatch.setattr(dry_run, "step_memory", lambda _: Memory({"weights": 1}, {"update": peak}))
    recipe = job_8b()
    for peak, said in (
        (21 * 10**9, "24 GB: yes, 48 GB: yes, 80 GB: yes, 96 GB: yes, 141 GB: yes, 192 GB: yes"),
        (72 * 10**9, "24 GB: no, 48 GB: no, 80 GB: yes, 96 GB: yes, 141 GB: yes, 192 GB: yes"),
        (80 * 10**9, "24 GB: no, 48 GB: no, 80 GB: no, 96 GB: yes, 141 GB: yes, 192 GB: yes"),
        (173 * 10**9, "24 GB: no, 48 GB: no, 80 GB: no, 96 GB: no, 141 GB: no, 192 GB: no"),
    ):
        text = plan(recipe)
        assert f"fits                  {said}" in text
        assert ("to reduce memory" in text) == (peak > 21 * 10**9)


@pytest.mark.slow
def test_a_plan_names_only_remedies_that_the_recipe_lacks(monkeypatch):
    monkeypatch.setattr(dry_run, "step_memory", lambda _: Memory({"weights": 1}, {"update": 10**12}))

    def remedies(recipe):
        return plan(recipe).split("to reduce memory      ")[1].split("\n")[0]

    smaller = "a smaller --micro_batch_size or --rollout_batch_size"
    full = with_changes(recipe_of(), **ALL_WEIGHTS)
    assert full.gradient_checkpointing and full.optim == AdamW8bit()
    assert remedies(full) == f"{smaller}, or --lora.r 16, or on several GPUs --shard_size 0 --optim AdamW"
    adapters = job_8b()
    small = replace(adapters, lora=replace(adapters.lora, r=16, alpha=8), optim=AdamW8bit())
    rest = "--base_quantization nf4, or on several GPUs --shard_size 0 --optim AdamW"
    assert remedies(small) == f"{smaller}, or --gradient_checkpointing, or {rest}"
    assert remedies(adapters).count("or --") == 5  # --rollout_batch_size, checkpointing, rank, base, optimizer
    assert "or --lora.r 16 --lora.alpha 8, or" in remedies(adapters)  # alpha / rank stays
    assert (adapters.lora.r, adapters.lora.alpha) == (128, 64)
    shared = remedies(recipe_of(GEMMA))  # refuses both: its encoder and decoder share weights
    assert "--gradient_checkpointing" not in shared and "--base_quantization" not in shared
    assert "--base_quantization" not in remedies(tiny_recipe("x", lora=small.lora))  # not loaded from a checkpoint
    workers = {"rollout_workers": 1, "torch_compile": False}
    for changes in ({"async_save": True}, workers, {"sft_warmup_steps": 1}):
        assert "--base_quantization" not in remedies(with_changes(small, **changes))
    best = {"metric_for_best_model": "solve_rate", "load_best_model_at_end": True}
    assert "--shard_size" not in remedies(with_changes(small, **best))
    # Unquantized, a sharded learner of adapters has a full copy to sample with: nothing is saved.
    assert "--shard_size" not in remedies(replace(small, rollout_quantization=None))
    monkeypatch.setenv("WORLD_SIZE", "8")
    sharded = replace(full, optim=AdamW(), shard_size=0)
    assert remedies(sharded) == f"{smaller}, or --lora.r 16"
    sharded = replace(small, optim=AdamW(), shard_size=0)  # bitsandbytes' weights cannot be sharded
    assert remedies(sharded) == f"{smaller}, or --gradient_checkpointing"


def test_a_small_model_is_planned_from_itself(tmp_path, capsys):
    recipe = tiny_recipe(tmp_path, dry_run=True)
    train(replace(recipe, max_retained_graphs=3))
    made, out = recipe.model().module, capsys.readouterr().out
    assert f"parameters            {sum(p.numel() for p in made.parameters()):,}\n" in out
    assert "autograd graphs kept  3 of scoring's 3 forwards, which the first update does not run again" in out
    train(replace(recipe, max_retained_graphs=2))
    assert "autograd graphs kept  2 of scoring's 3 forwards" in capsys.readouterr().out
    train(replace(recipe, max_retained_graphs=0))
    assert "autograd graphs kept  none: an update runs every forward again, one at a time\n" in capsys.readouterr().out


def test_the_plan_of_drawn_steps_says_between_which_costs_they_are(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(duration, "PEAK_FLOPS", 1e6)  # of seconds, and not of microseconds
    every = tiny_recipe(tmp_path, dry_run=True, corrector=NoCorrection(), likelihood=Trajectory(include_order=False))
    drawn = replace(every, likelihood=every.likelihood.replace(variance_growth=0.1))
    train(every)
    plain = capsys.readouterr().out.splitlines()
    train(drawn)
    lines = capsys.readouterr().out.splitlines()
    (line,) = (line for line in lines if line.startswith("steps drawn"))
    assert "with variance_growth=0.1 from 0.15 to 3 row-forwards score a completion" in line
    assert [each for each in lines if each != line] == plain  # planned are all steps
    whole = sum(float(x.split()[1]) for x in plain if x.startswith(("  scoring ", "  update ")) and " s at " in x)
    low, high = (float(found) for found in re.search(r"from (\S+) s to (\S+) s, in proportion", line).groups())
    assert low == pytest.approx(0.05 * whole, abs=0.1) and high == pytest.approx(whole, abs=0.2) and low > 1


@pytest.fixture
def one_layer(monkeypatch):
    """What is refused is refused whatever a model's depth."""
    one = {"n_layers": 1, "num_hidden_layers": 1}
    monkeypatch.setattr(dry_run, "load_config", lambda name: load_config(name) | one)


@pytest.mark.usefixtures("one_layer")
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": "no/such/place"}, r"is neither a folder nor a hub id \(owner/name\)"),
        (
            {"sampler": Autoregress(max_new_tokens=64)},
            "sampler=Autoregress is not for 'full' attention; use Unmask",
        ),
        ({"model": "Qwen/Qwen3-8B"}, "is for full or block_causal attention"),
    ],
)
def test_recipes_that_cannot_run(changes, words):
    with pytest.raises(ValueError, match=words):
        plan(with_changes(job_8b(), **changes))


@pytest.mark.skipif(not hasattr(transformers, "DiffusionGemmaConfig"), reason="transformers has no DiffusionGemma")
@pytest.mark.nightly
def test_diffusion_gemma_without_its_weights():
    """3.8 billion weights of a token; a step reads the text, and then denoises the canvas 16 times."""
    recipe = recipe_of(GEMMA)
    text = plan(recipe)
    assert "DiffusionGemmaForBlockDiffusion, encoder_decoder attention" in text
    expert = 3 * 704 * 2816
    layer = 8 * expert + 3 * 2112 * 2816 + 2816 * 256 * (2 * 16 + 2 * 8)  # of 25 sliding ones
    full = layer - 2816 * 256 * (2 * 16 + 2 * 8) + 2816 * 512 * (2 * 16 + 2)  # values are the keys
    weights = sum(map(math.prod, token_layers(meta_policy(recipe))))
    head, router, conditioning = 262144 * 2816, 128 * 2816, 3 * 2112 * 2816
    assert weights == 25 * layer + 5 * full + head + 30 * router + conditioning
    tokens = 32 * (256 + 256 + 16 * 256)
    assert f"rollout          {2 * weights * tokens / (0.25 * PEAK_FLOPS):8.1f} s at 25%" in text
    with pytest.raises(ValueError, match="torch_compile=True cannot be combined with the cache of 'diffusion_gemma'"):
        plan(replace(recipe, torch_compile=True))
    wrong = replace(recipe, sampler=Unmask(max_new_tokens=256))
    with pytest.raises(ValueError, match="sampler=Unmask is not for 'encoder_decoder' attention; use Renoise"):
        plan(wrong)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"dtype": "float8"}, "'float8'"),
        ({"base_quantization": "int3"}, "'int3'"),
        (
            {"base_quantization": "nf4", "lora": None},
            "base_quantization='nf4' freezes the base model: set lora, or leave it out",
        ),
    ],
)
def test_fields_that_cannot_be(changes, words):
    with pytest.raises((ValueError, TypeError), match=words):  # the tests' type checker is asked first
        with_changes(job_8b(), **changes)


@pytest.mark.usefixtures("one_layer")
def test_a_plan_warns_as_the_run_would():
    recipe = job_8b()
    assert "warning" not in plan(recipe)
    warned = [line for line in plan(replace(recipe, corrector=TIS())).splitlines() if line.startswith("warning: ")]
    assert len(warned) == 1 and "likelihood='OneStep' estimates the ratios" in warned[0]


@pytest.mark.usefixtures("one_layer")
def test_a_prompt_is_as_long_as_the_run_would_take_it():
    recipe = replace(job_8b(), max_prompt_length=3900)
    with pytest.raises(ValueError, match="max_new_tokens=256 after 3900 tokens exceeds the model's 4096 positions"):
        plan(recipe)


def test_the_prompt_of_a_plan_is_the_longest_of_the_rows():
    rows, nothing = [{"prompt": "1" * length} for length in (3, 17, 5)], lambda completions: [0.0 for _ in completions]
    settings = {"max_new_tokens": 4, "eval_dataset": rows}
    for changes, length in (({}, 17), ({"max_prompt_length": 9}, 9)):
        recipe = grpo_recipe(tiny_masked_lm(characters="1"), rows, nothing, **settings, **changes)
        assert f" rows x ({length} longest prompt + 4 new) tokens" in plan(recipe)


@pytest.mark.parametrize(("family", "positions"), [("bert", 64), ("roberta", 62)])
def test_an_assumed_prompt_fits_the_models_positions(tmp_path, family, positions):
    """A checkpoint's tokenizer, and so its prompts, are not read. RoBERTa counts positions from after its padding."""
    rows, nothing = [{"prompt": "1"}] * 4, lambda completions: [0.0 for _ in completions]
    path = str(stock(tmp_path, family))

    def planned(**settings):
        return plan(grpo_recipe(path, rows, nothing, eval_dataset=rows, **settings))

    for new, prompt in ((2, positions - 2), (positions - 1, 1)):
        assert f" rows x ({prompt} assumed prompt + {new} new) tokens" in planned(max_new_tokens=new)
    for settings in ({"max_new_tokens": positions}, {"max_new_tokens": 2, "max_prompt_length": positions - 1}):
        with pytest.raises(ValueError, match=f"exceeds the model's {positions} positions"):
            planned(**settings)


@pytest.mark.usefixtures("one_layer")
def test_a_plan_says_that_a_teacher_is_not_counted():
    recipe = job_8b()
    assert "teacher" not in plan(recipe)
    for teacher, counted in (("FOLDER", "its forwards and weights"), ("reference", "its forwards\n")):
        assert f"\nteacher               not counted: {counted}" in plan(recipe.replace(teacher={"model": teacher}))


@pytest.mark.usefixtures("one_layer")
def test_a_plan_says_that_workers_are_not_counted():
    recipe = with_changes(job_8b(), rollout_workers=2, max_staleness=1, torch_compile=False)
    text = plan(replace(recipe, rollout_quantization=None))
    assert "\nrollout workers       not counted: memory and time" in text


@pytest.mark.slow
def test_a_plan_for_eight_processes_is_one_of_an_eighth_of_the_rows(monkeypatch, capsys):
    recipe = replace(job_8b(), dry_run=True)
    rows = []

    def measured(step):
        rows.append(step.rows)
        return Memory({}, {"update": 1})

    monkeypatch.setattr(dry_run, "step_memory", measured)
    train(recipe)
    alone = capsys.readouterr().out
    assert "processes             1 assumed; put WORLD_SIZE=N in front" in alone
    monkeypatch.setenv("WORLD_SIZE", "8")
    train(recipe)
    eight = capsys.readouterr().out
    assert "processes             8 assumed" in eight and rows == [48, 6]
    for text, rollout, share, scoring, update in ((alone, 41.1, 116, 3.1, 5.8), (eight, 7.1, 84, 0.5, 0.7)):
        assert f"  rollout          {rollout:8} s at {share}% of 989 TFLOP/s\n" in text
        assert f"  scoring          {scoring:8} s at 49% of 989 TFLOP/s: the log-probabilities" in text
        assert f"  update           {update:8} s at 20% of 989 TFLOP/s\n" in text
    assert "13.9 h for num_steps=1000" in alone and "2.3 h for num_steps=1000" in eight
    monkeypatch.setenv("RANK", "1")
    train(recipe)
    assert capsys.readouterr().out == ""
    with pytest.raises(
        ValueError, match="train_batch_size=12 must be a multiple of the 8 processes; the nearest are: 8, 16"
    ):
        plan(replace(recipe, train_batch_size=12))


def test_carried_configs_are_of_known_families():
    from dllm_rl.models.checkpoint.families import find_family
    from dllm_rl.models.checkpoint.loading import build_empty

    names = {file.stem: find_family(json.loads(file.read_text())).name for file in CONFIGS.glob("*.json")}
    assert names["GSAI-ML--LLaDA-8B-Instruct"] == names["GSAI-ML--LLaDA-1.5"] == "llada"
    assert names["inclusionAI--LLaDA2.0-mini"] == "llada2"
    nemotron = build_empty(load_config("nvidia/Nemotron-Labs-Diffusion-8B"))
    block = 2 * 4096 * 4096 + 2 * 1024 * 4096 + 3 * 4096 * 14336 + 2 * 4096
    assert sum(p.numel() for p in nemotron.parameters()) == 2 * 131072 * 4096 + 34 * block + 4096
    assert names["dllm-hub--Qwen3-0.6B-diffusion-mdlm-v0.1"] == "a2d"
    assert names["radicalnumerics--RND1-Base-0910"] == "rnd1"
    assert names["ByteDance-Seed--Stable-DiffCoder-8B-Instruct"] == "stable_diffcoder"
    assert names["google--diffusiongemma-26B-A4B-it"] == "diffusion_gemma"
    known = ("llada", "llada_moe", "llada2", "dream", "a2d", "rnd1", "stable_diffcoder", "nemotron", "causal_lm")
    known += ("diffusion_gemma",)
    assert all(v in known for v in names.values())
