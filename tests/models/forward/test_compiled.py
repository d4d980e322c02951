"""Compiled forwards: the same numbers to rounding, few graphs, and weights synced in place."""

import cProfile
import io
import pstats
from dataclasses import replace
from functools import partial

import pytest
import torch
from layouts import checkpoint
from repetitions import few, nightly, slow
from run_outputs import metrics_of
from tiny_recipe import MOE_SIZES, tiny_recipe
from torch._dynamo.utils import counters

from dllm_rl import Prompts, load_policy, make_policy
from dllm_rl.models.base import copied, encode_base
from dllm_rl.models.forward import blocks
from dllm_rl.models.forward.blocks import compile_blocks
from dllm_rl.models.lora import add_lora
from dllm_rl.models.lora_settings import Lora
from dllm_rl.models.tiny import tiny_llama, tiny_masked_lm, tiny_moe
from dllm_rl.quantization import schemes
from dllm_rl.quantization.linear import PlainLinear
from dllm_rl.quantization.rollout_policy import quantized_copy, sync_weights
from dllm_rl.samplers import Autoregress, Unmask
from dllm_rl.samplers.cache import BlockCache, DualCache, PrefixCache
from dllm_rl.training.trainer import train

pytestmark = pytest.mark.skipif("config.getoption('other_cpu')", reason="torch captures no graph in a dispatch mode")
SIZES = {"characters": "1234.=", "hidden_size": 32, "num_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
FULL = ("llada", "illada", "llada_moe", "dream", "rnd1", "a2d_qwen2", "a2d_qwen3")
BLOCKS = ("llada2", "sdar", "sdar_moe", "stable_diffcoder", "a2d_blocks", "nemotron")
CAUSAL = ("llama", "qwen3", "smollm2", "nemotron_ar")
OTHERS = [
    *((family, None) for family in (*FULL, *BLOCKS, *CAUSAL[1:], "bert", "roberta", "modernbert")),
    ("llada", PrefixCache()),
    *((family, DualCache(refresh=3)) for family in FULL[1:]),
    *((family, BlockCache()) for family in BLOCKS if family != "sdar"),
]


@pytest.fixture(autouse=True, scope="module")
def own_cache(tmp_path_factory):
    """torch's cache of compiled code does not distinguish instruction sets. Code that a run under another
    ATEN_CPU_CAPABILITY generated, compiled for this run's wider vectors, writes past its buffers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.mktemp("compiled")))
        yield


@pytest.fixture(autouse=True)
def afresh():
    """Compiled code is kept by the code it comes from; other tests' shapes must not use up how often it may be."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def changed(policy):
    """The same policy after a change of all that it trains."""
    with torch.no_grad():
        for parameter in policy.module.parameters():
            if parameter.requires_grad:
                parameter.mul_(1.1).add_(0.01)
    policy.weights_version += 1


TOKENS = torch.arange(3, 9).repeat(2, 1)
CALL = (TOKENS, torch.ones_like(TOKENS, dtype=torch.bool))
EMULATED = schemes.Float8DynamicEmulated()


def adapted(dtype=torch.float32):
    policy = tiny_llama(**SIZES, causal=False, head_std=0.3)
    policy.module.to(dtype)
    add_lora(policy, Lora(r=2))
    changed(policy)  # B begins with zeros
    return policy


@pytest.mark.parametrize(
    ("scheme", "lora"),
    [(schemes.Float8WeightOnly(), True), slow(schemes.Float8WeightOnly(), False), slow(EMULATED, True)],
    ids=str,
)
@torch.no_grad()
def test_compiled_copies_follow_a_sync(monkeypatch, scheme, lora):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    policy = adapted() if lora else tiny_llama(**SIZES, causal=False, head_std=0.3)
    policy.module.to(torch.bfloat16)
    eager, compiled = (quantized_copy(policy, scheme) for _ in range(2))
    compile_blocks(compiled)
    for change in (lambda: None, lambda: compiled.module._apply(torch.clone), lambda: None):  # as a move to a GPU does
        change()
        before = compiled.logits(*CALL)
        torch.testing.assert_close(before, eager.logits(*CALL), rtol=0, atol=0.05)
        changed(policy)
        for copy in (eager, compiled):
            sync_weights(policy, copy)
        assert not torch.allclose(compiled.logits(*CALL), before, rtol=0, atol=0.05)
    torch.testing.assert_close(copied(compiled).logits(*CALL), compiled.logits(*CALL))


def test_a_quantized_layer_stays_itself_when_it_is_copied():
    policy = quantized_copy(tiny_llama(**SIZES, causal=False), schemes.Float8WeightOnly())
    torch.save(policy.module, file := io.BytesIO())
    file.seek(0)
    for module in (policy.module, copied(policy).module, torch.load(file, weights_only=False)):
        layers = [layer for layer in module.modules() if isinstance(layer, PlainLinear)]
        assert len(layers) == 7 * SIZES["num_layers"]
        for layer in layers:
            assert layer.plain[0].data_ptr() == layer.weight.qdata.data_ptr()
            assert layer.product is layers[0].product or layer.in_features != layers[0].in_features


@torch.no_grad()
def test_an_encode_of_ones_own_need_not_be_captured(monkeypatch):
    """Only its blocks are compiled."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    eager = tiny_llama(**SIZES, causal=False, head_std=0.3)

    def encode(module, tokens, *inputs, **options):
        return encode_base(module, tokens, *inputs, **options) * int(tokens.max() < 100)

    compiled = make_policy(copied(eager).module, eager.tokenizer, replace(eager.spec, encode=encode))
    before = graphs()
    compile_blocks(compiled)
    torch.testing.assert_close(compiled.logits(*CALL), eager.logits(*CALL))
    assert graphs() == before + 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])  # in bf16 a layer asks what the processor can do
@torch.no_grad()
def test_a_compiled_learner_and_its_reference(monkeypatch, dtype):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    policy = adapted(dtype)
    eager = copied(policy)
    compile_blocks(policy)
    for _ in range(2):  # adapters on and off in turns: neither may take the other's graph
        for ours, theirs in ((policy, eager), (policy.reference(), eager.reference())):
            torch.testing.assert_close(ours.logits(*CALL), theirs.logits(*CALL))
    policy.module.train()  # forwards without gradients drop nothing in any mode
    torch.testing.assert_close(policy.logits(*CALL), eager.logits(*CALL))


@pytest.mark.parametrize("whole", [True, False])
@torch.no_grad()
def test_a_graph_takes_plain_tensors(monkeypatch, whole):
    """No quantized tensor enters a graph, and a forward is one graph, or one that its blocks share."""
    inputs, ran = [], []

    def backend(graph, tensors):
        inputs.extend(tensors)
        return lambda *args: ran.append(graph) or graph(*args)

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    monkeypatch.setattr(blocks, "MAX_BLOCKS", 64 if whole else 0)
    policy = quantized_copy(tiny_llama(**SIZES, causal=False), schemes.Float8WeightOnly())
    compile_blocks(policy)
    policy.hidden(*CALL)
    assert len(ran) == (1 if whole else SIZES["num_layers"]) and len(set(map(id, ran))) == 1
    codes = [x for x in inputs if isinstance(x, torch.Tensor) and x.dtype == torch.float8_e4m3fn]
    assert len(codes) == 7 * (SIZES["num_layers"] if whole else 1)
    assert all(type(x) in (torch.Tensor, torch.nn.Parameter) for x in inputs if isinstance(x, torch.Tensor))


@pytest.mark.parametrize("scheme", [schemes.Float8WeightOnly(), EMULATED], ids=str)
@torch.no_grad()
def test_a_compiled_forward_has_the_bits_of_quantized_tensors(monkeypatch, scheme):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    policy = tiny_llama(**SIZES, causal=False, head_std=0.3)
    policy.module.to(torch.bfloat16)
    compiled = quantized_copy(policy, scheme)
    compile_blocks(compiled)
    states = compiled.hidden(*CALL)
    layers = [layer for layer in compiled.module.modules() if isinstance(layer, PlainLinear)]
    for layer in layers:
        layer.__class__ = torch.nn.Linear
    assert layers and torch.equal(compiled.hidden(*CALL), states)


@pytest.mark.slow
@torch.no_grad()
def test_calls_of_a_compiled_block():
    """Before forwards were one graph, a block took 475 calls in bf16, 679 and 691 in FP8."""
    num_blocks, calls = 4, {}
    policy = tiny_masked_lm(characters="12345678=", num_layers=num_blocks)
    policy.module.to(torch.bfloat16)
    for scheme in (None, schemes.Float8WeightOnly(), EMULATED):
        compiled = quantized_copy(policy, scheme)
        compile_blocks(compiled)
        for _ in range(3):
            compiled.hidden(*CALL)
        with cProfile.Profile() as profile:
            compiled.hidden(*CALL)
        calls[scheme] = pstats.Stats(profile).total_calls / num_blocks
    assert max(calls.values()) < min(1.1 * calls[None], 475 / 3)  # the counts differ a little between versions of torch


def sampled(policy, cache, prompts, width=24):
    ids = Prompts.from_ids(prompts, pad_id=policy.pad_id, num_generations=2)
    generator = torch.Generator().manual_seed(0)
    if policy.spec.attention == "causal":
        return Autoregress(max_new_tokens=width)(policy, ids, generator)
    options = {
        "block_size": policy.spec.block_size or 8,
        "diffusion_steps": min(12, width),
        "temperature": 1.0,
        "cache": cache,
    }
    return Unmask(max_new_tokens=width, **options)(policy, ids, generator)


def graphs():
    return counters["stats"]["unique_graphs"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "cache"),
    [
        ("llada", DualCache(refresh=3)),
        slow("sdar", BlockCache()),
        slow("llama", None),
        *(nightly(*pair) for pair in OTHERS),
    ],
    ids=str,
)
def test_few_graphs_serve_all_blocks_and_shapes(tmp_path, monkeypatch, family, cache):
    """Captured whole (`fullgraph`), with dynamo alone, whose kernels are eager: the tokens are the same."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    eager = load_policy(checkpoint(tmp_path, family))
    prompts = [[3, 4, 5], [6, 7, 8, 9, 10, 11, 12]]
    expected = sampled(eager, cache, prompts)
    compiled = copied(eager)
    compile_blocks(compiled)
    before = graphs()
    found = sampled(compiled, cache, prompts)
    assert torch.equal(found.tokens, expected.tokens)
    torch.testing.assert_close(found.logprobs, expected.logprobs, rtol=0, atol=1e-5)
    others = ([[3, 4], [5, 6, 7, 8, 9], [10, 11, 12]], 32), ([[3, 4, 5, 6], [7, 8], [9, 10, 11], [12, 13]], 36)
    for prompts, width in others:
        sampled(compiled, cache, prompts, width)
    whole = graphs()
    assert 1 <= whole - before <= 8
    sampled(compiled, cache, *others[0])
    assert graphs() == whole


@pytest.mark.parametrize(
    "scheme",
    few(
        ["bf16", "float8_weight_only", "int8_weight_only", "int8_dynamic", "int4_weight_only"],
        ["float8_weight_only"],
        ["bf16", "int8_dynamic"],
    ),
)
def test_every_schemes_copy_is_captured_whole(monkeypatch, scheme):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    config = getattr(schemes, scheme, lambda: None)()
    dtype = torch.bfloat16 if scheme == "bf16" else None
    policy = tiny_llama(**SIZES | {"num_layers": 1}, causal=False, head_std=0.3)
    eager, compiled = (quantized_copy(policy, config, dtype=dtype) for _ in range(2))
    compile_blocks(compiled)
    found, expected = (sampled(each, None, [[3, 4, 5], [6, 7]], width=8) for each in (compiled, eager))
    assert torch.equal(found.tokens, expected.tokens)


@pytest.mark.parametrize(("family", "cache"), [slow("tiny_moe", None), nightly("llada2", BlockCache())], ids=str)
def test_quantized_experts_split_their_block(tmp_path, monkeypatch, family, cache):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    one_layer = {"num_layers": 1, "num_experts": 4}
    policy = tiny_moe(**MOE_SIZES | one_layer) if family == "tiny_moe" else load_policy(checkpoint(tmp_path, family))
    eager, compiled = (quantized_copy(policy, schemes.Float8WeightOnly()) for _ in range(2))
    compile_blocks(compiled)
    expected, found = (sampled(copy, cache, [[3, 4, 5], [6, 7]]) for copy in (eager, compiled))
    assert torch.equal(found.tokens, expected.tokens)


@pytest.mark.nightly
@pytest.mark.parametrize("cache", [PrefixCache(), DualCache(), "autoregress"], ids=str)
def test_compiled_and_cached_tokens_are_the_eager_ones(cache):
    causal = cache == "autoregress"
    policy = tiny_llama(**SIZES, causal=causal, head_std=0.3)
    eager, compiled = (quantized_copy(policy, schemes.Float8WeightOnly()) for _ in range(2))
    compile_blocks(compiled)
    for _ in range(2):
        ours, theirs = (sampled(copy, None if causal else cache, [[3, 4, 5], [6, 7]]) for copy in (compiled, eager))
        assert torch.equal(ours.tokens, theirs.tokens)
        torch.testing.assert_close(ours.logprobs, theirs.logprobs, rtol=0, atol=1e-4)
        with torch.no_grad():
            for parameter in policy.module.parameters():
                parameter.mul_(1.1)
        policy.weights_version += 1
        for copy in (eager, compiled):
            sync_weights(policy, copy)


@pytest.mark.nightly
def test_a_run_whose_rollouts_are_compiled(tmp_path):
    model = partial(tiny_llama, causal=False, **SIZES)
    plain, compiled = (tmp_path / name for name in ("plain", "compiled"))
    train(tiny_recipe(plain, model=model, num_steps=1))
    train(tiny_recipe(compiled, model=model, num_steps=1, torch_compile=True))
    (one,), (other,) = metrics_of(plain), metrics_of(compiled)
    assert other["reward"] == one["reward"] and other["loss"] == pytest.approx(one["loss"], abs=1e-4)
    assert other["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-3)


@pytest.mark.nightly
def test_a_compiled_learner_is_differentiated_eagerly(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    model = partial(tiny_llama, causal=False, **SIZES)
    plain, compiled = (tmp_path / name for name in ("plain", "compiled"))
    given = {"model": model, "num_steps": 1, "rollout_quantization": None, "gradient_checkpointing": True}
    train(tiny_recipe(plain, **given))
    train(tiny_recipe(compiled, torch_compile=True, **given))
    (one,), (other,) = metrics_of(plain), metrics_of(compiled)
    assert other["reward"] == one["reward"] and other["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-4)
    assert other["rollout/compiled_graphs"] >= 1 and "rollout/compiled_graphs" not in one
