"""In which format the rollouts of a large model are made, by GPU and by the rows of a forward."""

import json

import pytest
import torch
from tiny_recipe import tiny_recipe

from dllm_rl import Unmask, grpo_recipe, train
from dllm_rl.checkpoints.resume import check_recipe, contents_of
from dllm_rl.checkpoints.state import TrainingState
from dllm_rl.groups import Late
from dllm_rl.quantization.schemes import Float8ByGPU, Float8Dynamic
from dllm_rl.recipe import Recipe
from dllm_rl.samplers.cache import DualCache
from dllm_rl.training.rollouts_by_gpu import with_rollouts_by_gpu

ROWS = [{"prompt": f"{i}+1="} for i in range(20)]
LLADA = "GSAI-ML/LLaDA-8B-Instruct"


def nothing(completions, **_):
    return [0.0] * len(completions)


@pytest.mark.parametrize(
    ("given", "processes", "said"),
    [
        ({}, 1, "Float8Dynamic on an H100, 48 rows a process"),
        ({"dry_run": "H200"}, 2, "Float8Dynamic on an H200, 24 rows a process"),
        ({"dry_run": "A100"}, 1, "not quantized: FP8 is for an H100, an H200 or newer, and this is an A100"),
        ({"train_batch_size": 3}, 1, "not quantized: FP8 is for 24 rows a process and more, and here are 18"),
        ({}, 8, "not quantized: FP8 is for 24 rows a process and more, and here are 6"),
        ({"rollout_batch_size": 12}, 1, "Float8Dynamic on an H100, 48 rows a process"),  # a resume may change it
        ({"rollout_quantization": Float8ByGPU(min_rows=6)}, 8, "Float8Dynamic on an H100, 6 rows a process"),
        ({"torch_compile": False}, 1, "not quantized: FP8 needs torch_compile=True"),
        ({"base_quantization": "nf4"}, 1, "not quantized: the weights in nf4 sample"),
        ({"dtype": "float32"}, 1, "not quantized: FP8 needs dtype='bfloat16' or bf16=True"),
        ({"dtype": "float32", "bf16": True}, 1, "Float8Dynamic on an H100"),
        ({"sampler_options": {"cache": DualCache()}}, 1, "not quantized: with a cache a forward has few columns"),
    ],
)
def test_large_models_take_fp8_where_it_was_fast(given, processes, said):
    recipe = grpo_recipe(LLADA, ROWS, nothing, **given)
    resolved, line = with_rollouts_by_gpu(recipe, processes, is_plan=True)
    assert line.startswith(said)
    assert resolved.rollout_quantization == (Float8Dynamic() if said.startswith("Float8") else None)
    assert resolved.replace(rollout_quantization=recipe.rollout_quantization) == recipe


@pytest.mark.parametrize(("capability", "takes"), [((8, 0), False), ((8, 9), False), ((9, 0), True), ((10, 0), True)])
def test_a_run_takes_what_its_gpu_can_do(monkeypatch, capability, takes):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    resolved, line = with_rollouts_by_gpu(grpo_recipe(LLADA, ROWS, nothing), 1)
    assert resolved.rollout_quantization == (Float8Dynamic() if takes else None)
    assert "a GPU" in line


@pytest.mark.parametrize(
    ("began", "goes_on"),
    [
        (((9, 0), 1), ((8, 0), 1)),  # another GPU
        (((8, 0), 1), ((9, 0), 1)),
        (((9, 0), 1), ((9, 0), 4)),  # more processes, each with fewer rows
        (((9, 0), 4), ((10, 0), 1)),
    ],
)
def test_a_resume_never_changes_the_format_unasked(monkeypatch, began, goes_on):
    """The format that was chosen is what a checkpoint stores and a resume compares."""
    recipe = grpo_recipe(LLADA, ROWS, nothing)

    def on(launch, recipe):
        monkeypatch.setattr("dllm_rl.training.rollouts_by_gpu.gpu_of", lambda *_: ("a GPU", launch[0]))
        return with_rollouts_by_gpu(recipe, launch[1])[0]

    first, later = (on(launch, recipe) for launch in (began, goes_on))
    state = TrainingState(step=2, version=2, dtype="bfloat16", recipe=first.settings(), contents=contents_of(first))
    said = rf"^rollout_quantization={later.rollout_quantization}.* differs .* give the checkpoint's, since Float8ByGPU"
    with pytest.raises(ValueError, match=said.replace("()", r"\(\)")):
        check_recipe(later, state)
    check_recipe(on(began, recipe), state)
    check_recipe(on(goes_on, recipe.replace(rollout_quantization=first.rollout_quantization)), state)
    check_recipe(on(goes_on, recipe.replace(allow_changed="rollout_quantization")), state)


@pytest.mark.parametrize(
    "given",
    [
        {"late": Late()},
        {"rollout_quantization": None},
        {"preset": "d1"},
        {"preset": "none"},
    ],
)
def test_what_is_given_is_taken(given):
    recipe = grpo_recipe(LLADA, ROWS, nothing, **given)
    assert recipe.rollout_quantization == given.get("rollout_quantization")
    assert with_rollouts_by_gpu(recipe, 1) == (recipe, "")


def test_a_plan_is_for_a_gpu_that_is_known():
    with pytest.raises(ValueError, match=r"^dry_run='B7' must be one of False, True, 'A100', 'H100', 'H200'$"):
        grpo_recipe(LLADA, ROWS, nothing, dry_run="B7")


def test_compiled_steps_and_experts():
    steps = grpo_recipe(LLADA, ROWS, nothing, sampler=Unmask(max_new_tokens=4, compile_step=True))
    assert not steps.torch_compile
    resolved, _ = with_rollouts_by_gpu(steps, 1, is_plan=True)
    assert resolved.rollout_quantization == Float8Dynamic()
    experts = grpo_recipe("inclusionAI/LLaDA-MoE-7B-A1B-Instruct", ROWS, nothing)
    assert experts.rollout_quantization is None and not experts.torch_compile


def test_a_run_says_what_it_takes_and_a_resume_elsewhere_is_refused(tmp_path, capsys, monkeypatch):
    chosen = {"rollout_quantization": Float8ByGPU(min_rows=1), "bf16": True}
    train(tiny_recipe(tmp_path, **chosen, num_steps=1))
    said = "rollouts: not quantized: FP8 is for an H100, an H200 or newer, and this is a device without CUDA\n"
    assert said in capsys.readouterr().out
    assert json.loads((tmp_path / "summary.json").read_text())["recipe"]["rollout_quantization"] is None
    monkeypatch.setattr("dllm_rl.training.rollouts_by_gpu.gpu_of", lambda *_: ("a GPU", (9, 0)))
    monkeypatch.setattr(Recipe, "compiles_rollouts", True)
    with pytest.raises(ValueError, match=r"^rollout_quantization=Float8Dynamic\(\) differs from the ch.* None; give"):
        train(tiny_recipe(tmp_path, **chosen, num_steps=1, resume_from_checkpoint="latest"))
    assert "rollouts: Float8Dynamic on a GPU" in capsys.readouterr().out
