"""Batch-invariant arithmetic, its settings put back, and a difference of one ulp traced to its layer."""

import json
import os
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from emulated import int3_emulated
from repetitions import few
from simulated_cuda import SimulatedCuda
from tiny_recipe import tiny_recipe

from dllm_rl.algorithms.correctors import Aligned
from dllm_rl.diagnostics.batch_invariance import check_bitwise_equal
from dllm_rl.likelihoods.estimators import Trajectory
from dllm_rl.models.forward.batch_invariance import BatchInvariantOps, batch_invariant, prepare_workspace
from dllm_rl.models.tiny import tiny_llama, tiny_masked_lm
from dllm_rl.quantization.rollout_policy import quantized_copy
from dllm_rl.samplers.rules import MaxProb
from dllm_rl.samplers.sampler import FunctionSampler
from dllm_rl.samplers.unmask import Unmask
from dllm_rl.tasks.sudoku import Sudoku
from dllm_rl.training.trainer import train
from dllm_rl.types.rollouts import Prompts
from dllm_rl.types.scoring import Logprobs

small = {"characters": "1234.=", "hidden_size": 32, "num_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
MODELS = {
    "masked_lm": partial(tiny_masked_lm, **small),
    "llada": partial(tiny_llama, **small, causal=False),
}


def settings():
    return (
        torch.get_float32_matmul_precision(),
        torch.are_deterministic_algorithms_enabled(),
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction,
        torch.backends.cudnn.allow_tf32,
        torch.backends.cudnn.deterministic,
        torch.get_num_threads(),
        torch.overrides._get_current_function_mode_stack(),
    )


def test_settings_are_made_and_put_back_whatever_happens():
    torch.set_float32_matmul_precision("medium")
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    before = settings()
    with pytest.raises(KeyError), batch_invariant():
        assert settings()[:6] == ("highest", True, False, False, True, 1)
        raise KeyError("planted")
    assert settings() == before
    torch.set_float32_matmul_precision("highest")
    torch.set_num_threads(threads)


def test_on_a_gpu_the_workspace_is_settled_before_the_first_product(monkeypatch):
    """torch asks for CUBLAS_WORKSPACE_CONFIG once, at the first product; set inside the block it comes too late."""
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    with SimulatedCuda():
        torch.ones(2, 2, device="cuda")  # the GPU is in use already, as importing torchao leaves it
        prepare_workspace()
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
        x = torch.ones(2, 2, device="cuda") @ torch.ones(2, 2, device="cuda")
        with batch_invariant():
            F.linear(x, x)
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    with SimulatedCuda():
        x = torch.ones(2, 2, device="cuda") @ torch.ones(2, 2, device="cuda")
        for late in (None, ":16:8"):
            if late:
                monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", late)
            with pytest.raises(ValueError, match="export CUBLAS_WORKSPACE_CONFIG=:4096:8 before"), batch_invariant():
                pass
        assert not torch.are_deterministic_algorithms_enabled()
    with SimulatedCuda(), batch_invariant():  # a process that was started with the setting
        F.linear(x.cpu(), x.cpu())
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    prepare_workspace()
    assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ, "there is no GPU"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(96, 96), (8, 96), (9, 512)])
def test_a_row_of_a_product_does_not_depend_on_how_many_there_are(shape, dtype):
    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randn(n, shape[1], generator=generator).to(dtype) for n in (70, shape[0]))
    with batch_invariant():
        whole = F.linear(x, w)
        for rows in (1, 2, 3, 15, 64, 65):
            assert torch.equal(F.linear(x[:rows], w), whole[:rows])
            assert torch.equal(torch.addmm(torch.zeros(shape[0]).to(dtype), x[:rows], w.T), whole[:rows])
    torch.testing.assert_close(whole, F.linear(x, w), rtol=2e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-3)


def test_attention_row_by_row_is_the_attention():
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(3, 2, 5, 8, generator=generator) for _ in range(3))
    mask = torch.rand(3, 1, 5, 5, generator=generator) > 0.3
    mask[..., 0] = True
    expected, scores = F.scaled_dot_product_attention(q, k, v, mask), q @ k.mT
    with batch_invariant():
        torch.testing.assert_close(F.scaled_dot_product_attention(q, k, v, mask), expected)
        whole = F.scaled_dot_product_attention(q, k, v)
        assert torch.equal(whole[:1], F.scaled_dot_product_attention(q[:1], k[:1], v[:1]))
        torch.testing.assert_close(torch.matmul(q, k.mT), scores)
        q.requires_grad_()
        F.scaled_dot_product_attention(q, k, v).sum().backward()
    assert q.grad.isfinite().all()


def sampled(policy, lengths=(5, 16, 3)):
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(3, policy.vocab_size, (n,), generator=generator).tolist() for n in lengths]
    prompts = Prompts.from_ids(ids, pad_id=policy.pad_id, num_generations=2)
    return Unmask(max_new_tokens=8, diffusion_steps=3, temperature=1.0, rank=MaxProb())(policy, prompts, generator)


@pytest.mark.parametrize(("model", "dtype"), [("masked_lm", torch.bfloat16), ("llada", torch.float32)])
@pytest.mark.parametrize("attention", few(["sdpa", "eager"], ["sdpa"]))
def test_ragged_rollouts_are_scored_bit_for_bit_however_they_are_cut(model, attention, dtype):
    policy, estimator = MODELS[model](), Trajectory()
    policy.module.to(dtype).set_attn_implementation(attention)
    with batch_invariant():
        rollout = sampled(policy)
        noise = estimator.draw_views(rollout, torch.Generator())
        for size in (None, 2):
            old = estimator.logprobs(policy, rollout, noise, micro_batch_size=size)
            assert torch.equal(old, rollout.logprobs)
            check(rollout, noise, old, rollout.logprobs, policy, policy)
        some = torch.tensor([0, 1, 4, 5])
        part = estimator.logprobs(policy, rollout.rows(some), noise.rows(some))
        assert torch.equal(part, rollout.logprobs[some])


def check(rollout, noise, old, sampled, policy, rollout_policy) -> None:
    logps = Logprobs(
        old_logprobs=old, old_view_logprobs=old[None], rollout_logprobs=sampled, reference_logprobs=None, views=noise
    )
    check_bitwise_equal(policy, rollout_policy, rollout, logps)


LAYERS = {
    "masked_lm": ["encoder.layer.0.attention.self.value", "lm_head.dense"],
    "llada": ["model.layers.0.input_layernorm", "model.embed_tokens"],
}


@pytest.mark.repeated
@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize("model", MODELS)
def test_one_ulp_in_one_layer_is_caught_with_its_name(model, index):
    policy = MODELS[model]()
    other, estimator = quantized_copy(policy, None), Trajectory()
    name = next(n for n, _ in other.module.named_modules() if n.endswith(LAYERS[model][index]))
    weight = other.module.get_submodule(name).weight.data
    # One unit in the last place of every element: of a single one it may round away.
    weight.copy_(weight.nextafter(torch.full_like(weight, torch.inf)))
    with batch_invariant():
        rollout = sampled(other)
        noise = estimator.draw_views(rollout, torch.Generator())
        old = estimator.logprobs(policy, rollout, noise)
        sampled_logps = estimator.logprobs(other, rollout, noise)
        row, position = (rollout.completion_mask & (old != sampled_logps)).nonzero()[0].tolist()
        expected = f"row {row}, position {position} .*the hidden states first differ at {name}$"
        with pytest.raises(RuntimeError, match=expected) as caught:
            check(rollout, noise, old, sampled_logps, policy, other)
    ours, theirs = old[row, position].item(), sampled_logps[row, position].item()
    assert f"learner {ours:.9g}, rollout {theirs:.9g} nats" in str(caught.value)


def test_a_difference_that_no_layer_makes_is_said_to_be_so():
    policy, estimator = MODELS["llada"](), Trajectory()
    rollout = sampled(policy)
    noise = estimator.draw_views(rollout, torch.Generator())
    old = estimator.logprobs(policy, rollout, noise)
    recorded = old.clone()
    recorded[1, -1] += 0.5
    expected = r"1 of 48 log-probs differ, the first at row 1, position 23 .*no layer differs"
    with pytest.raises(RuntimeError, match=expected):
        check(rollout, noise, old, recorded, policy, policy)


class Ragged(Sudoku):
    """Prompts of unequal lengths: some lose their first cells."""

    def __getitem__(self, index):
        problem = super().__getitem__(index)
        return replace(problem, prompt=problem.prompt[index % 4 :])


def zero_recipe(tmp_path, **changes):
    settings = {"micro_batch_size": 8, "num_steps": 20, "rollout_quantization": None, "zero_mismatch": True}
    return tiny_recipe(tmp_path / "run", task=Ragged(split="train", clues=(10, 12)), **{**settings, **changes})


def logged(tmp_path, name):
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    return [line[name] for line in lines if name in line]


@pytest.mark.slow
@pytest.mark.parametrize("steps", [20, 3], ids=["plain", "aligned"])
def test_the_main_job_logs_exactly_zero_mismatch(tmp_path, steps):
    quantized = {"rollout_quantization": int3_emulated, "corrector": Aligned()}
    train(zero_recipe(tmp_path, num_steps=steps, **({} if steps == 20 else quantized)))
    worst = logged(tmp_path, "rollout_corr/abs_log_ratio_max")
    assert len(worst) == steps and max(worst) == 0
    assert min(logged(tmp_path, "grad_norm")) > 0


@pytest.mark.parametrize("zero_mismatch", [True, False])
def test_a_run_samples_and_scores_in_batch_invariant_arithmetic_where_it_says_so(tmp_path, monkeypatch, zero_mismatch):
    seen = []
    few = {"num_steps": 1, "train_batch_size": 2, "num_generations": 2, "eval_task": Sudoku(split="test", size=1)}
    few["validation_task"] = Sudoku(split="validation", size=1)
    recipe = zero_recipe(tmp_path, zero_mismatch=zero_mismatch, **few)
    draw, sample = type(recipe.likelihood).draw_views, recipe.sampler.replace(diffusion_steps=1)

    def watched_draw(*arguments):
        seen.append(torch.are_deterministic_algorithms_enabled())
        return draw(*arguments)

    def watched_sample(policy, prompts, generator):
        seen.append(torch.are_deterministic_algorithms_enabled())
        return sample(policy, prompts, generator)

    monkeypatch.setattr(type(recipe.likelihood), "draw_views", watched_draw)
    train(replace(recipe, sampler=FunctionSampler(function=watched_sample, max_new_tokens=16)))
    assert seen == [zero_mismatch] * 4  # sampled and scored in the rehearsal, and in the step


def test_the_loop_stops_at_the_first_log_prob_that_differs(tmp_path):
    """One recorded log-prob is off by a millionth of a nat."""
    recipe = zero_recipe(tmp_path, num_steps=2)
    recipe = replace(recipe, sampler=FunctionSampler(function=partial(tampered, recipe.sampler), max_new_tokens=16))
    expected = r"zero_mismatch: 1 of \d+ log-probs differ, the first at row \d, position \d+"
    with pytest.raises(RuntimeError, match=expected):
        train(recipe)


def tampered(sampler, policy, prompts, generator):
    rollout = sampler(policy, prompts, generator)
    rollout.logprobs[3:4, -1] += 1e-6  # the rehearsal before training has one row only
    return rollout


def test_a_quantized_rollout_without_alignment_is_refused(tmp_path):
    with pytest.raises(ValueError, match="zero_mismatch=True needs rollout_quantization=None"):
        zero_recipe(tmp_path, rollout_quantization=int3_emulated)


def test_a_kernel_that_looks_at_the_batch_is_given_one_row_at_a_time(monkeypatch):
    """An attention and a product whose results depend on the number of rows: inside, every call sees one."""
    attention, product, sizes = F.scaled_dot_product_attention, torch.matmul, []

    def shaky(query, *args, **kwargs):
        sizes.append(len(query))
        return attention(query, *args, **kwargs) * (1 + 0.1 * (len(query) - 1))

    def shaky_product(a, b):
        sizes.append(len(a))
        return product(a, b) * (1 + 0.1 * (len(a) - 1))

    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(3, 2, 5, 8, generator=generator) for _ in range(3))
    mask = torch.rand(3, 1, 5, 5, generator=generator) > 0.3
    mask[..., 0] = True
    plain, bare, scores = attention(q, k, v, mask), attention(q, k, v), product(q, k.mT)
    ops = BatchInvariantOps()
    monkeypatch.setattr(F, "scaled_dot_product_attention", shaky)
    monkeypatch.setattr(torch, "matmul", shaky_product)
    call = lambda f, *args: ops.__torch_function__(f, (), args)  # noqa: E731
    torch.testing.assert_close(call(shaky, q, k, v, mask), plain)
    torch.testing.assert_close(call(shaky, q, k, v), bare)
    torch.testing.assert_close(call(shaky, q, k, v, mask[:1]), attention(q, k, v, mask[:1]))  # one mask for all rows
    torch.testing.assert_close(call(shaky_product, q, k.mT), scores)
    assert sizes == [1] * 12


@pytest.mark.parametrize("function", [F.silu, F.gelu, F.mish, torch.exp, torch.Tensor.exp, torch.log, torch.sigmoid])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_element_does_not_depend_on_its_place(function, dtype):
    """A CPU computes the last elements of a tensor, which fill no vector, in another way."""
    values = torch.rand(200, generator=torch.Generator().manual_seed(0)).to(dtype)
    with batch_invariant():
        whole = function(values)
        assert all(torch.equal(function(values[:length]), whole[:length]) for length in range(1, 200))
    torch.testing.assert_close(whole, function(values))
