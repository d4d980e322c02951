"""llama.cpp in the engine's place: its file, its logits, its syncs, the contract, a run; skipped without its wheel."""

import subprocess
import sys
import warnings
from dataclasses import replace
from functools import partial
from importlib import metadata
from importlib.util import find_spec

import numpy as np
import pytest
import torch
import transformers
from tiny_recipe import SIZES, tiny_recipe

from dllm_rl import Autoregress, Unmask, make_policy, tiny_masked_lm, train
from dllm_rl.config import override
from dllm_rl.models.lora import add_lora
from dllm_rl.models.lora_settings import Lora
from dllm_rl.models.tiny import char_tokenizer, tiny_llama
from dllm_rl.testing import check_engine
from dllm_rl.types.rollouts import Prompts
from recipes.engines import llama_cpp as engine
from recipes.engines.gguf_file import as_rotated, write_gguf
from recipes.engines.llama_cpp import LlamaCpp

needs_gguf = pytest.mark.skipif(find_spec("gguf") is None, reason="the package gguf is not installed")
needs_wheel = pytest.mark.skipif(
    find_spec("xllamacpp") is None or find_spec("gguf") is None, reason="the wheel xllamacpp, or gguf, is not installed"
)
# Of logits, a difference's mean: measured 0.0001, 0.0004, 0.002 and 0.008; of old weights 0.36.
BOUNDS = {"F32": 0.0005, "F16": 0.0015, "BF16": 0.008, "Q8_0": 0.03}


def llama(causal=False, tied=False, **more):
    policy = tiny_llama(**SIZES, causal=causal, head_std=0.1)
    return policy if not more and not tied else stock(transformers.LlamaForCausalLM, causal, tied, **more)


def stock(kind, causal=False, tied=False, shift=False, **more):
    """A stock module with two queries per key, heads of another width than hidden_size / heads, and random weights."""
    tokenizer = char_tokenizer("1234.=")
    config = kind.config_class(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        is_causal=causal,
        rms_norm_eps=1e-5,
        mask_token_id=None if causal else tokenizer.mask_token_id,
        **more,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = kind(config)
        for parameter in module.parameters():
            parameter.data.normal_(0.5 if parameter.dim() == 1 else 0, 0.2)
    policy = make_policy(module, tokenizer)
    policy.spec = replace(policy.spec, shift=policy.spec.shift or shift)
    return policy


MODELS = {
    "llada": llama,
    "llada, tied, grouped queries": partial(stock, transformers.LlamaForCausalLM, tied=True),
    "dream, with biases, shifted": partial(stock, transformers.Qwen2ForCausalLM, shift=True),
    "causal": partial(llama, causal=True),
    "causal, tied, wide heads": partial(stock, transformers.LlamaForCausalLM, causal=True, tied=True, head_dim=16),
}


def rows(policy):
    """More than a batch, with padding on the left: lengths from 1 to 40."""
    tokens = torch.randint(3, 9, (21, 40), generator=torch.Generator().manual_seed(0))
    mask = torch.arange(40) >= torch.arange(0, 42, 2).clamp(max=39)[:, None]
    return tokens.masked_fill(~mask, policy.pad_id), mask


@needs_wheel
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_logits_are_the_learners(make):
    policy = make()
    tokens, mask = rows(policy)
    with torch.no_grad():
        wanted = policy.logits(tokens, mask)[mask]
        found = LlamaCpp(format="F32").load(policy).logits(tokens, mask)[mask]
    assert wanted.std() > 0.3 and (found - wanted).abs().max() < 0.02  # measured 0.0045


@needs_wheel
@pytest.mark.parametrize("format", BOUNDS)
def test_a_sync_takes_the_new_weights_adapters_merged(format):
    policy = llama()
    tokens, mask = rows(policy)
    rollout_policy = LlamaCpp(format=format, threads=1).load(policy)
    add_lora(policy, Lora(r=2))
    for name, parameter in policy.module.named_parameters():
        if ".lora_B." in name:
            parameter.data.fill_(0.02)
    policy.weights_version = 3
    with torch.no_grad():
        wanted = policy.logits(tokens, mask)[mask]
        assert (rollout_policy.logits(tokens, mask)[mask] - wanted).abs().mean() > 0.2
        assert LlamaCpp().sync(policy, rollout_policy) == {} and rollout_policy.weights_version == 3
        assert (rollout_policy.logits(tokens, mask)[mask] - wanted).abs().mean() < BOUNDS[format]


@needs_wheel
@pytest.mark.parametrize("causal", [False, True], ids=["llada", "causal"])
def test_the_contract_is_kept(causal):
    policy = llama(causal=causal)
    prompts = Prompts.from_ids([[3, 4, 5, 6], [7, 8], [4]], pad_id=policy.pad_id, num_generations=4)
    options = {"max_new_tokens": 6, "temperature": 0.7}
    sampler = Autoregress(**options) if causal else Unmask(diffusion_steps=3, **options)
    check_engine(LlamaCpp(format="F32"), policy, prompts, sampler, bound=0.005)
    check_engine(LlamaCpp(format="Q8_0"), policy, prompts, sampler, bound=0.08)


@needs_gguf
@pytest.mark.parametrize("format", ["F32", "Q8_0", "Q4_0"])
def test_the_file_holds_the_weights(tmp_path, format):
    import gguf

    policy = llama()
    write_gguf(policy, tmp_path / "a.gguf", format=format)
    read = gguf.GGUFReader(tmp_path / "a.gguf")
    held = {each.name: each for each in read.tensors}
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLADA, 2)
    state = policy.module.state_dict()
    assert len(held) == len(state) == 21
    for name, tensor in state.items():
        each = held[names.get_name(name, try_suffixes=(".weight",))]
        found = gguf.quants.dequantize(each.data, each.tensor_type)
        wanted = as_rotated(each.name, tensor, policy.module.config).numpy()
        kind = format if tensor.dim() == 2 and ".layers." in name else "F32"
        # A block's step is its largest weight / 127, or / 8: rounding is off by at most half of it, and fp16's scale.
        step = {"F32": 0, "Q8_0": 0.6 / 127, "Q4_0": 1.1 / 8}[kind] * np.abs(wanted).max()
        assert each.tensor_type.name == kind and np.abs(found - wanted).max() <= step, name


def test_rows_of_a_head_are_paired_as_llama_cpp_turns_them():
    """Of a head of 6 rows, row i turns with i + 3; llama.cpp turns neighbors. Keys have heads of their own."""
    config = transformers.LlamaConfig(num_attention_heads=2, num_key_value_heads=1)
    numbers = torch.arange(12.0)[:, None]
    assert as_rotated("blk.0.attn_q.weight", numbers, config)[:, 0].tolist() == [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]
    assert as_rotated("blk.0.attn_k.weight", numbers[:6], config)[:, 0].tolist() == [0, 3, 1, 4, 2, 5]
    assert as_rotated("blk.0.attn_v.weight", numbers, config) is numbers
    assert as_rotated("blk.0.attn_q.weight", numbers, transformers.Qwen2Config()) is numbers


@pytest.mark.parametrize(("found", "said"), [("2026.11.1", "2026.11.1 is installed"), (None, "none is installed")])
def test_a_missing_or_other_wheel_is_one_line(monkeypatch, found, said):
    def version(name):
        if found is None:
            raise metadata.PackageNotFoundError(name)
        return found

    monkeypatch.setattr(engine, "version", version)
    with pytest.raises(ValueError, match=rf"needs xllamacpp {engine.PINNED}, .* {said}: pip install") as error:
        engine.library.__wrapped__()
    assert "\n" not in str(error.value)
    monkeypatch.setattr(engine, "library", engine.library.__wrapped__)
    with warnings.catch_warnings(), pytest.raises(ValueError, match="needs xllamacpp"):
        warnings.simplefilter("error", pytest.PytestUnraisableExceptionWarning)
        LlamaCpp().load(llama())  # `close` after an __init__ that raised says nothing


@needs_gguf
@pytest.mark.parametrize(
    ("make", "format", "said"),
    [
        (lambda: tiny_masked_lm(**SIZES), "F32", "cannot roll out RobertaPreLayerNormForMaskedLM"),
        (llama, "Q6_K", "has blocks of 256 weights, and model.layers.0.self_attn.q_proj.weight rows of 32"),
        (lambda: stock(transformers.LlamaForCausalLM, hidden_act="gelu"), "F32", "hidden_act='gelu'"),
    ],
    ids=["layout", "block", "activation"],
)
def test_what_llama_cpp_does_not_compute_is_refused(tmp_path, make, format, said):
    with pytest.raises(ValueError, match=said):
        write_gguf(make(), tmp_path / "a.gguf", format=format)


LASTING = """
import torch
from dllm_rl.models.tiny import tiny_llama
from recipes.engines import llama_cpp as engine
held = engine.LlamaCpp(format="Q8_0").load(tiny_llama(characters="1234.=", causal=False))
held.logits(torch.ones(1, 4).long(), torch.ones(1, 4).bool())
engine.Llama.batch = lambda *given: held  # keeps this module's names until the engine's own are gone
"""


@needs_wheel
@pytest.mark.nightly
def test_a_model_that_closes_last_ends_the_process_well():
    subprocess.run([sys.executable, "-c", LASTING], check=True)


@needs_wheel
def test_packed_rows_are_refused():
    rollout_policy = LlamaCpp().load(llama())
    with pytest.raises(ValueError, match="whole rows, one text each"):
        rollout_policy.encode(torch.ones(1, 2).long(), torch.ones(1, 1, 2, 2).bool(), torch.ones(1, 2).long())


@needs_wheel
def test_the_recipe_runs_in_another_format(
    tmp_path,
):
    from recipes.engines.llama_cpp_sudoku import recipe

    recipe = override(recipe, ["--rollout_engine.format", "F16"])
    few = tiny_recipe(tmp_path, model=partial(tiny_llama, causal=False, **SIZES), num_steps=1)
    train(replace(few, rollout_quantization=None, rollout_engine=recipe.rollout_engine))
    line = (tmp_path / "metrics.jsonl").read_text()
    mismatch = float(line.split('"rollout_corr/abs_log_ratio_mean": ')[1].split(",")[0])
    assert 0 < mismatch < 0.01 and "format='F16'" in str(recipe)
