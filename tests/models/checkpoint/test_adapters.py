"""Adapters: nothing changes at first, peft reads them, they merge, resume and quantize; bases in few bits."""

import copy
import json
import re
from dataclasses import replace
from functools import partial

import peft
import pytest
import torch
import transformers
from emulated import int3_emulated
from layouts import checkpoint, published
from refusals import refuses
from repetitions import few, slow
from safetensors.torch import load_file
from simulated_cuda import SimulatedCuda
from tiny_recipe import with_changes

from dllm_rl import grpo, load_policy, quantized_copy, train
from dllm_rl.algorithms.correctors import Aligned, QaRL
from dllm_rl.algorithms.optimizers import AdamW8bit
from dllm_rl.checkpoints import checkpoint as checkpoints
from dllm_rl.models.checkpoint.adapters import check_peft_config, load_adapter, save_adapter
from dllm_rl.models.checkpoint.loading import base_of_adapter
from dllm_rl.models.lora import LoraLinear, adapted_layers, add_lora
from dllm_rl.models.lora_settings import Lora
from dllm_rl.models.merge import merge_lora, merged_copy, merged_tensors
from dllm_rl.models.tiny import tiny_llama, tiny_masked_lm
from dllm_rl.monitoring.json_lines import current_rows
from dllm_rl.quantization.rollout_policy import sync_weights
from dllm_rl.quantization.schemes import Float8WeightOnly, Int4WeightOnly, Int8WeightOnly

pytestmark = pytest.mark.usefixtures("no_rehearsal")

FAMILIES = {
    "llada": 14, "illada": 14, "llada_moe": 8, "llada2": 14, "dream": 14, "sdar": 14, "sdar_moe": 8,
    "rnd1": 8, "stable_diffcoder": 14, "a2d_qwen2": 14, "a2d_blocks": 14, "nemotron": 14, "nemotron_ar": 14,
    "bert": 12, "roberta": 12, "esm2": 12, "modernbert": 8, "llama": 14, "qwen3": 14, "smollm2": 14,
}  # fmt: skip


SMALL = {"characters": "abc", "hidden_size": 32, "num_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}


def batch(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.randint(3, 38, (2, 9), generator=torch.Generator().manual_seed(seed))
    return tokens, torch.ones_like(tokens, dtype=torch.bool)


def stir(policy, std: float = 0.1) -> None:
    """Make the adapters matter: B is zero at first."""
    generator = torch.Generator().manual_seed(7)
    for layer in adapted_layers(policy.module).values():
        layer.lora_B.weight.data.normal_(0, std, generator=generator)


@pytest.mark.repeated(first_only=True)
@pytest.mark.parametrize("family", few(FAMILIES, ["llada2", "dream", "modernbert"], ["llada", "sdar_moe"]))
def test_adapters_of_every_family(tmp_path, family):
    folder = checkpoint(tmp_path / "base", family)
    policy, plain = load_policy(folder), load_policy(folder)
    state = torch.random.get_rng_state()
    add_lora(policy, Lora(r=4))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert len(adapted_layers(policy.module)) == FAMILIES[family]
    assert {n.rpartition(".")[2] for n, p in policy.module.named_parameters() if p.requires_grad} == {"weight"}
    assert all(".lora_" in n for n, p in policy.module.named_parameters() if p.requires_grad)
    base = plain.logits(*batch())
    assert torch.equal(policy.logits(*batch()), base)  # B is zero
    stir(policy)
    moved, reference = policy.logits(*batch()), policy.reference()
    assert (moved - base).abs().max() > 0.1
    assert torch.equal(reference.logits(*batch()), base)
    assert reference.module is policy.module  # no second copy
    assert torch.equal(policy.logits(*batch()), moved)  # and the adapters are back

    merged = copy.copy(policy)
    merged.module = merged_copy(policy.module)
    torch.testing.assert_close(merged.logits(*batch()), moved, rtol=0, atol=1e-4)
    whole = dict(merged.module.named_parameters(remove_duplicate=False)) | dict(
        merged.module.named_buffers(remove_duplicate=False)
    )
    found = dict(merged_tensors(policy.module))
    assert found.keys() == whole.keys()
    assert all(torch.equal(found[name], whole[name]) for name in found)

    policy.save_pretrained(tmp_path / "merged")  # an ordinary checkpoint in the family's own layout
    assert torch.equal(load_policy(tmp_path / "merged").logits(*batch()), merged.logits(*batch()))
    assert load_file(tmp_path / "merged/model.safetensors").keys() <= load_file(folder / "model.safetensors").keys()

    save_adapter(policy, tmp_path / "adapter")
    load_adapter(plain, tmp_path / "adapter")
    assert torch.equal(plain.logits(*batch()), moved)
    merge_lora(plain)
    assert torch.equal(plain.logits(*batch()), merged.logits(*batch()))
    assert all(p.requires_grad for p in plain.module.parameters())


def test_adapters_name_only_a_base_that_is_given(tmp_path):
    """The weights of a policy may have changed since its folder was read, so that the folder is not their base."""
    folder = checkpoint(tmp_path / "base", "llada")
    policy = load_policy(folder)
    base = policy.logits(*batch())
    for weight in policy.module.parameters():
        weight.data.mul_(1.5)
    add_lora(policy, Lora(r=4))
    save_adapter(policy, tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"base_model_name_or_path=None names no base; open the base, and call "):
        load_policy(tmp_path / "adapter")
    save_adapter(policy, tmp_path / "named", base=str(folder))
    assert torch.equal(load_policy(tmp_path / "named").logits(*batch()), base)


def test_merged_weight_by_hand():
    policy = tiny_llama(
        characters="ab", causal=False, hidden_size=8, num_layers=1, num_attention_heads=2, intermediate_size=8
    )
    before = policy.module.model.layers[0].self_attn.q_proj.weight.detach().clone()
    add_lora(policy, Lora(r=2, alpha=6.0, targets=("q_proj",)))
    (layer,) = adapted_layers(policy.module).values()
    layer.lora_A.weight.data = torch.eye(2, 8)
    layer.lora_B.weight.data = torch.arange(16.0).view(8, 2)
    expected = before.clone()
    expected[:, :2] += 3.0 * torch.arange(16.0).view(8, 2)  # alpha / r = 3, and A picks the first two inputs
    assert torch.equal(dict(merged_tensors(policy.module))["model.layers.0.self_attn.q_proj.weight"], expected)
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(layer(x), x @ expected.T, rtol=0, atol=1e-4)


def test_the_adapters_sum_is_rounded_once():
    """1 + 2^-8 (1 + 2^-10) is above the middle of two bf16 numbers; its second summand alone rounds to 2^-8, a tie."""
    layer = LoraLinear(torch.nn.Linear(1, 1).bfloat16(), Lora(r=1, alpha=1.0), torch.Generator())
    layer.base_layer.weight.data.fill_(1.0)
    layer.lora_A.weight.data.fill_(1.0)
    layer.lora_B.weight.data.fill_(2**-8 * (1 + 2**-10))
    assert layer.merged().dtype == torch.bfloat16 and layer.merged().item() == 1 + 2**-7


def test_a_starts_uniform_between_the_bounds_of_its_inputs():
    layer = LoraLinear(torch.nn.Linear(64, 4), Lora(r=64), torch.Generator().manual_seed(0))
    a = layer.lora_A.weight * 64**0.5
    assert a.abs().max() <= 1 and a.min() < -0.99 and a.max() > 0.99
    assert abs(a.mean()) < 0.03 and abs(a.square().mean() - 1 / 3) < 0.03


def test_the_reference_leaves_out_adapters_of_the_head_too():
    """A masked model's head has a layer before its projection, which its full path names."""
    policy, (tokens, mask) = tiny_masked_lm(**SMALL), (torch.tensor([[3, 4]]), torch.ones(1, 2))
    before = policy.logits(tokens, mask.bool())
    add_lora(policy, Lora(r=2, targets=("lm_head.dense",)))
    stir(policy)
    assert list(adapted_layers(policy.module)) == ["lm_head.dense"]
    assert torch.equal(policy.reference().logits(tokens, mask.bool()), before)
    assert (policy.logits(tokens, mask.bool()) - before).abs().max() > 0.01


def test_adapters_left_out_twice_come_back_after_both():
    policy = tiny_llama(causal=False, **SMALL)
    add_lora(policy, Lora(r=2))
    active = lambda: {layer.active for layer in adapted_layers(policy.module).values()}  # noqa: E731
    tokens = torch.tensor([[3, 4]])
    reference = policy.reference().reference()
    layer = next(iter(adapted_layers(policy.module).values()))
    seen = []
    layer.register_forward_hook(lambda *_: seen.append(active()))
    reference.logits(tokens, torch.ones_like(tokens).bool())
    assert seen == [{False}] and active() == {True}


@pytest.mark.repeated(first_only=True)
@pytest.mark.parametrize("family", ["llama", "dream"])
def test_peft_opens_what_we_save_and_we_what_it_saves(tmp_path, family):
    peft = pytest.importorskip("peft")
    policy = load_policy(checkpoint(tmp_path / "base", family))
    add_lora(policy, Lora(r=4, alpha=8.0))
    stir(policy)
    save_adapter(policy, tmp_path / "ours")
    bare = load_policy(tmp_path / "base")
    base = bare.logits(*batch())
    wrapped = peft.PeftModel.from_pretrained(copy.deepcopy(bare.module), tmp_path / "ours")
    other = copy.copy(bare)
    other.module = wrapped.get_base_model()
    torch.testing.assert_close(other.logits(*batch()), policy.logits(*batch()), rtol=0, atol=1e-5)
    wrapped.save_pretrained(tmp_path / "theirs")
    load_adapter(bare, tmp_path / "theirs")
    assert torch.equal(bare.logits(*batch()), policy.logits(*batch()))
    # peft's folder by itself opens as a checkpoint: the base that it names, merged
    path = tmp_path / "theirs/adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": str(tmp_path / "base")}))
    merged = load_policy(tmp_path / "theirs")
    torch.testing.assert_close(merged.logits(*batch()), policy.logits(*batch()), rtol=0, atol=1e-4)
    assert (base - merged.logits(*batch())).abs().max() > 1e-2


@pytest.mark.parametrize("lora", [None, Lora(r=4)], ids=["weights", "lora"])
@pytest.mark.parametrize("family", ["llada", "esm2", "qwen3"])
@pytest.mark.repeated(first_only=True)
def test_transformers_opens_what_was_trained(tmp_path, family, lora):
    """The policy that `grpo` returned and the run's checkpoint are written as the same stock folder."""
    base = checkpoint(tmp_path / "base", family)
    settings = {"max_new_tokens": 4, "num_steps": 1, "warmup_steps": 0, "learning_rate": 0.1, "report_to": "none"}
    settings |= {"train_batch_size": 1, "num_generations": 4}
    rows = [{"prompt": text} for text in ("ab", "cd", "ef")]

    def reward(completions):
        return [float(sum(map(ord, text)) % 7) for text in completions]

    summary = grpo(str(base), rows, reward, lora=lora, output_dir=str(tmp_path / "run"), **settings)
    folders = {"policy": summary.policy, "checkpoint": load_policy(summary["checkpoint"])}
    for name, policy in folders.items():
        policy.save_pretrained(tmp_path / name, stock=True)
    states = [load_file(tmp_path / name / "model.safetensors") for name in folders]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    kind = transformers.AutoModelForMaskedLM if family == "esm2" else transformers.AutoModelForCausalLM
    model = kind.from_pretrained(tmp_path / "policy", dtype="float32").eval()
    tokens, mask = batch()
    with torch.no_grad():
        opened = model(tokens, attention_mask=mask.long()).logits
        trained = summary.policy.logits(tokens, mask)
    if summary.policy.spec.shift:
        opened, trained = opened[:, :-1], trained[:, 1:]  # the state at t-1 predicts the token at t
    torch.testing.assert_close(opened, trained, rtol=0, atol=1e-4)
    assert (load_policy(base).logits(tokens, mask) - summary.policy.logits(tokens, mask)).abs().max() > 0.1
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "policy").get_vocab() == policy.tokenizer.get_vocab()


@pytest.mark.slow
def test_peft_loads_a_run_s_adapters_into_the_base_of_transformers(tmp_path):
    """docs/export.md, "With peft"."""
    base = checkpoint(tmp_path / "base", "dream")
    rows = [{"prompt": text} for text in ("ab", "cd", "ef")]
    settings = {"max_new_tokens": 4, "num_steps": 2, "warmup_steps": 0, "learning_rate": 0.1, "report_to": "none"}

    def reward(completions):
        return [float(sum(map(ord, text)) % 7) for text in completions]

    summary = grpo(str(base), rows, reward, lora=Lora(r=4), output_dir=str(tmp_path / "run"), **settings)
    load_policy(base).save_pretrained(tmp_path / "stock", stock=True)
    stock = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "stock", dtype="float32")
    opened = peft.PeftModel.from_pretrained(stock, f"{summary['checkpoint']}/adapter").eval()
    tokens, mask = batch()
    with torch.no_grad():
        logits = opened(tokens, attention_mask=mask.long()).logits
        trained = summary.policy.logits(tokens, mask)
    assert summary.policy.spec.shift  # the state at t-1 predicts the token at t
    torch.testing.assert_close(logits[:, :-1], trained[:, 1:], rtol=0, atol=1e-4)
    assert (load_policy(base).logits(tokens, mask) - trained).abs().max() > 0.1


def test_adapters_of_llada_bear_the_authors_names(tmp_path):
    policy = load_policy(published(tmp_path / "base", "llada"))
    add_lora(policy, Lora(r=4, targets=("q_proj", "down_proj")))
    save_adapter(policy, tmp_path / "adapter")
    names = load_file(tmp_path / "adapter/adapter_model.safetensors").keys()
    assert "base_model.model.model.transformer.blocks.0.q_proj.lora_A.weight" in names
    assert "base_model.model.model.transformer.blocks.1.ff_out.lora_B.weight" in names
    targets = json.loads((tmp_path / "adapter/adapter_config.json").read_text())["target_modules"]
    assert targets == [f"model.transformer.blocks.{n}.{x}" for n in (0, 1) for x in ("ff_out", "q_proj")]


def test_dropout_repeats_and_spares_what_is_not_differentiated():
    policy, again = (tiny_masked_lm(**SMALL) for _ in range(2))
    tokens, mask = torch.tensor([[3, 4, 3]]), torch.ones(1, 3, dtype=torch.bool)
    for p in (policy, again):
        add_lora(p, Lora(r=4, alpha=64.0, dropout=0.5))
        stir(p)
    with torch.no_grad():
        exact = policy.logits(tokens, mask)
        assert torch.equal(policy.logits(tokens, mask), exact)
    first, second = policy.logits(tokens, mask), policy.logits(tokens, mask)
    assert not torch.equal(first, second)
    assert not torch.equal(first, exact)
    assert torch.equal(again.logits(tokens, mask), first)
    assert torch.equal(again.logits(tokens, mask), second)
    layer = next(iter(adapted_layers(policy.module).values()))
    kept = layer.apply_dropout(torch.ones(200, 100))
    assert set(kept.unique().tolist()) == {0.0, 2.0}
    assert abs(kept.mean() - 1) < 0.03


def test_saved_adapters_go_on_with_the_dropout_masks_of_training(tmp_path):
    """Every layer drops inputs of its own. The seed and the number of forwards are saved, and say which come next."""
    sizes = {"characters": "ab", "causal": False, "num_layers": 2, "hidden_size": 32, "num_attention_heads": 2}
    policy, again = tiny_llama(**sizes), tiny_llama(**sizes)
    add_lora(policy, Lora(r=2, dropout=0.5, seed=3, targets=("q_proj", "v_proj")))
    x = torch.ones(4, 32)
    drop = lambda each: [layer.apply_dropout(x) for layer in adapted_layers(each.module).values()]  # noqa: E731
    first = drop(policy)
    assert len(first) == 4 and not any(torch.equal(a, b) for i, a in enumerate(first) for b in first[:i])
    save_adapter(policy, tmp_path)
    load_adapter(again, tmp_path)
    assert again.lora.seed == 3
    theirs, ours = drop(again), drop(policy)
    assert all(torch.equal(a, b) for a, b in zip(theirs, ours, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(ours, first, strict=True))


def dropping() -> LoraLinear:
    layer = LoraLinear(torch.nn.Linear(8, 4), Lora(r=2, dropout=0.5), torch.Generator().manual_seed(0))
    layer.base_layer.weight.data.copy_(torch.linspace(-1, 1, 32).view(4, 8))
    layer.base_layer.bias.data.zero_()
    layer.lora_B.weight.data.fill_(0.1)
    return layer


def test_dropout_draws_the_same_on_a_gpu_and_there_alone():
    """No mask is made on the host: nothing is copied, nothing waited for."""
    layer = dropping()
    x = torch.ones(5, 8)
    here = layer.apply_dropout(x)
    with SimulatedCuda() as cuda:
        layer.calls, x = 0, x.to("cuda")
        with cuda.phase("dropout"):
            there = layer.apply_dropout(x)
        assert cuda.waits("dropout") == 0 and there.is_cuda
        assert torch.equal(there.cpu(), here)


@pytest.mark.repeated(first_only=True)
@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_a_base_in_few_bits_is_made_on_the_device_that_was_asked_for(tmp_path, quantization, monkeypatch):
    pytest.importorskip("bitsandbytes")
    asked, load = [], transformers.LlamaForCausalLM.from_pretrained.__func__

    def spy(cls, *args, **options):
        asked.append(options["device_map"])
        return load(cls, *args, **(options | {"device_map": {"": "cpu"}}))

    monkeypatch.setattr(transformers.LlamaForCausalLM, "from_pretrained", classmethod(spy))
    folder = checkpoint(tmp_path, "llada")
    assert load_policy(folder, quantization=quantization, device="cpu").device.type == "cpu"
    load_policy(folder, quantization=quantization, device="cuda:1")
    assert asked == [{"": "cpu"}, {"": "cuda:1"}]


@pytest.mark.repeated(first_only=True)
@pytest.mark.parametrize("scheme", [Int4WeightOnly(group_size=32), Float8WeightOnly(), Int8WeightOnly()], ids=str)
def test_rollouts_of_a_base_in_four_bits_are_quantized_as_those_of_its_weights(tmp_path, scheme):
    """The codes of nf4 are packed, two to a byte in one column: they have not the layer's shape."""
    pytest.importorskip("bitsandbytes")
    folder = checkpoint(tmp_path, "llada")
    packed, plain = (load_policy(folder, quantization=each) for each in ("nf4", None))
    copies = [quantized_copy(policy, scheme) for policy in (packed, plain)]
    layers = [{name for name, each in copy.module.named_modules() if hasattr(each, "quantization")} for copy in copies]
    assert layers[0] == layers[1] and layers[0]


@pytest.mark.parametrize(
    ("family", "quantization"), [("llada2", "nf4"), ("bert", "int8"), slow("llada", "int8"), slow("qwen3", "nf4")]
)
def test_a_base_in_few_bits_trains(tmp_path, family, quantization):
    """Three AdamW steps on the adapters lower a loss; the base does not move; what is saved is the merged model."""
    pytest.importorskip("bitsandbytes")
    policy = load_policy(checkpoint(tmp_path / "base", family), quantization=quantization)
    add_lora(policy, Lora(r=4))
    bits = {
        n
        for n, layer in policy.module.named_modules()
        if type(layer).__name__.startswith("Linear") and "bit" in type(layer).__name__
    }
    assert len(bits) == FAMILIES[family]
    assert not any(layer.endswith(("lm_head", "decoder")) for layer in bits)
    tokens, mask = batch()
    start = policy.reference().logits(tokens, mask)
    assert torch.equal(policy.logits(tokens, mask), start)
    optimizer = torch.optim.AdamW([p for p in policy.module.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(3):
        loss = torch.nn.functional.cross_entropy(policy.logits(tokens, mask).flatten(0, 1).float(), tokens.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[2] < losses[0] - 0.05
    assert torch.equal(policy.reference().logits(tokens, mask), start)
    policy.save_pretrained(tmp_path / "merged")
    merged = load_policy(tmp_path / "merged")
    state = merged.module.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in merged_tensors(policy.module) if name in state)
    torch.testing.assert_close(merged.logits(tokens, mask), policy.logits(tokens, mask), rtol=0, atol=1e-4)


def test_eight_bit_weights_are_read_back_to_half_a_step(tmp_path):
    """Before the first forward, which moves rows and scales to another place, and after it."""
    pytest.importorskip("bitsandbytes")
    folder = checkpoint(tmp_path, "qwen3")
    exact = load_policy(folder).module.state_dict()
    policy = load_policy(folder, quantization="int8")
    add_lora(policy, Lora(r=4))
    for _ in range(2):
        compared = 0
        for name, found in merged_tensors(policy.module):
            if name not in exact:  # a buffer that is not saved
                continue
            step = exact[name].abs().amax(-1, keepdim=True) / 127
            if not torch.equal(found, exact[name]):
                compared += 1
                assert ((found - exact[name]).abs() <= 0.51 * step + 1e-3 * exact[name].abs()).all(), name
        assert compared == FAMILIES["qwen3"]
        policy.logits(*batch())


@pytest.mark.repeated(first_only=True)
@pytest.mark.parametrize("family", ["bert", "qwen3"])  # with and without biases
def test_a_base_in_eight_bits_computes_with_its_weights_alone(tmp_path, family):
    """Logits and gradients are those of ordinary layers with the dequantized weights, for a row with or without the
    other rows: the inputs, of which some are far above the others, are not rounded.
    """
    pytest.importorskip("bitsandbytes")
    folder = checkpoint(tmp_path / "base", family)
    policy, plain = load_policy(folder, quantization="int8"), load_policy(folder)
    table = policy.module.get_input_embeddings().weight.data
    table[5] *= 50
    plain.module.load_state_dict(dict(merged_tensors(policy.module)), strict=False)
    for each in (policy, plain, copied := copy.deepcopy(policy)):
        add_lora(each, Lora(r=4))
        stir(each)
    tokens, mask = batch()
    tokens[0, 3] = 5
    expected = plain.logits(tokens, mask)
    torch.testing.assert_close(policy.logits(tokens, mask), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(copied.logits(tokens[1:], mask[1:]), expected[1:], rtol=1e-5, atol=1e-5)
    gradients = []
    for each in (policy, plain):
        each.logits(tokens, mask).logsumexp(-1).sum().backward()
        gradients.append({name: p.grad for name, p in each.module.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() and gradients[0]
    for name, gradient in gradients[1].items():
        torch.testing.assert_close(gradients[0][name], gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.repeated(first_only=True)
def test_a_merged_base_in_eight_bits_has_the_dtype_of_its_module(tmp_path, dtype):
    pytest.importorskip("bitsandbytes")
    folder = checkpoint(tmp_path / "base", "qwen3")
    policy = load_policy(folder, dtype=dtype, quantization="int8")
    add_lora(policy, Lora(r=2))
    stir(policy)
    policy.save_pretrained(tmp_path / "merged")
    save_adapter(policy, tmp_path / "adapters", base=str(folder))
    opened, from_adapters = (load_policy(tmp_path / name, dtype="auto") for name in ("merged", "adapters"))
    copied, quantized = (quantized_copy(policy, scheme) for scheme in (None, Float8WeightOnly()))
    merge_lora(policy)
    for each in (policy, opened, from_adapters, copied, quantized):
        assert {parameter.dtype for parameter in each.module.parameters()} == {getattr(torch, dtype)}
        assert each is quantized or torch.equal(each.logits(*batch()), opened.logits(*batch()))
    assert quantized.logits(*batch()).isfinite().all()


@pytest.mark.parametrize("lora", [None, Lora(r=4)])
def test_a_quantized_rollout_is_made_and_refreshed_from_merged_weights(lora):
    policy = tiny_llama(causal=False, **SMALL)
    if lora:
        add_lora(policy, lora)
        stir(policy)
    before = {name: tensor.clone() for name, tensor in policy.module.state_dict().items()}
    rollout = quantized_copy(policy, Int8WeightOnly())
    for layer in adapted_layers(policy.module).values():
        layer.lora_B.weight.data += 0.05
    sync_weights(policy, rollout)
    plain = copy.copy(policy)
    plain.module = merged_copy(policy.module)
    expected = quantized_copy(plain, Int8WeightOnly())
    tokens, mask = torch.tensor([[3, 4, 5, 3]]), torch.ones(1, 4, dtype=torch.bool)
    assert torch.equal(rollout.logits(tokens, mask), expected.logits(tokens, mask))
    frozen = [n for n in before if ".lora_B" not in n]
    assert all(
        torch.equal(policy.module.state_dict()[n], before[n]) for n in frozen
    )  # the trained ones are not disturbed


def test_adapters_that_do_not_fit(tmp_path):
    policy = tiny_llama(causal=False, **SMALL | {"num_layers": 2})
    refuses("no adapters to leave out", policy.reference)
    refuses(r"lora.targets=\('query',\) names no linear layer", lambda: add_lora(policy, Lora(targets=("query",))))
    for names in (("q_proj", "v_porj"), ("self_attn.q_proj", "v_proj"), ("model.layers.0.mlp.up", "q_proj")):
        wrong = next(name for name in names if not name.startswith(("q_", "v_proj")))
        with pytest.raises(
            ValueError, match=rf"lora.targets=\('{re.escape(wrong)}',\) names no linear layer .* of Llama"
        ):
            add_lora(policy, Lora(targets=names))
    with pytest.raises(ValueError, match=r"lora.targets names 'lm_head', the output layer, .*; leave it out"):
        add_lora(policy, Lora(r=2, targets=("q_proj", "lm_head")))
    assert not adapted_layers(policy.module)
    add_lora(policy, Lora(r=2))
    refuses("has adapters already", lambda: add_lora(policy, Lora(r=2)))
    save_adapter(policy, tmp_path)
    refuses("do not fit", lambda: load_adapter(tiny_llama(causal=False, **SMALL), tmp_path))
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"use_dora": True}))
    refuses("use_dora=True is not supported", lambda: load_adapter(tiny_llama(causal=False, **SMALL), tmp_path))


@pytest.mark.repeated(every=4)
@pytest.mark.parametrize(
    "settings",
    [
        {"use_rslora": True},
        {"alpha_pattern": {"q_proj": 64}},
        {"rank_pattern": {"q_proj": 4}},
        {"use_dora": True},
        {"use_dora": 1},
        {"modules_to_save": ["lm_head"]},
        {"bias": "lora_only"},
        {"lora_bias": True},
        {"trainable_token_indices": [3]},
        {"layer_replication": [[0, 1], [0, 1]]},
        {"exclude_modules": ["v_proj"]},
        {"layers_to_transform": [0]},
        {"alora_invocation_tokens": [3]},
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "olora"},
        {"init_lora_weights": "gaussian"},
        {"init_lora_weights": "orthogonal"},
    ],
    ids=str,
)
def test_what_peft_computes_otherwise_is_refused(tmp_path, settings):
    """peft's own adapters: the same logits on the unchanged base, or a line that names the setting."""
    peft = pytest.importorskip("peft")
    sizes = {"hidden_size": 8, "num_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    policy, base = (tiny_llama(characters="ab", causal=False, **sizes) for _ in range(2))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"], **settings)
        wrapped = peft.get_peft_model(policy.module, config)
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.data += 0.3 * torch.randn(parameter.shape)
    wrapped.save_pretrained(tmp_path)
    (name,) = settings
    if name in ("use_rslora", "exclude_modules", "layers_to_transform") or settings[name] in ("gaussian", "orthogonal"):
        check_peft_config(config)
        load_adapter(base, tmp_path)
        tokens, mask = torch.tensor([[3, 4, 3, 4]]), torch.ones(1, 4, dtype=torch.bool)
        torch.testing.assert_close(base.logits(tokens, mask), policy.logits(tokens, mask), rtol=0, atol=1e-5)
    else:
        with pytest.raises(ValueError, match=rf"^peft_config: {name}=.* not supported"):
            check_peft_config(config)  # what a trainer asks before it trains them
        path = tmp_path / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": "none"}))
        for load in (load_policy, partial(load_adapter, base)):  # before the base is looked for
            with pytest.raises(ValueError, match=rf"^{tmp_path}: {name}=.* not supported"):
                load(tmp_path)


@pytest.mark.parametrize("method", ["IA3Config", "LoHaConfig", "VeraConfig", "PrefixTuningConfig"])
def test_adapters_of_other_methods_are_refused_by_name(tmp_path, method):
    peft = pytest.importorskip("peft")
    config = getattr(peft, method)(task_type="CAUSAL_LM")
    config.save_pretrained(tmp_path)
    name = config.peft_type.value
    for check in (load_policy, partial(load_adapter, tiny_llama(causal=False, **SMALL))):
        with pytest.raises(ValueError, match=rf"^{tmp_path}: peft_type='{name}' is not supported; only LoRA is"):
            check(tmp_path)
    refuses(rf"^peft_config: peft_type='{name}' is not supported", lambda: check_peft_config(config))


@pytest.mark.parametrize("base", ["../base", "../../somewhere/base"])
def test_a_base_above_the_working_directory_is_found_from_there_or_from_the_adapters(tmp_path, monkeypatch, base):
    """peft stores a path as it was given; a run stores that of its own folder relative to the adapters."""
    here, adapters = tmp_path / "outer" / "here", tmp_path / "elsewhere" / "run" / "adapters"
    here.mkdir(parents=True), adapters.mkdir(parents=True)
    monkeypatch.chdir(here)
    policy = tiny_llama(characters="ab", causal=True, num_layers=1, hidden_size=8, num_attention_heads=2)
    add_lora(policy, Lora(r=2))
    save_adapter(policy, adapters, base=base)
    refuses(re.escape(f"their base {base!r} is missing"), lambda: base_of_adapter(adapters))
    for root in (here, adapters):
        (root / base).mkdir(parents=True)
        assert base_of_adapter(adapters).samefile(root / base)
        (root / base).rmdir()
    for root in (here, adapters):
        (root / base).mkdir()
    refuses("as seen from the adapters and from here; give it as an absolute path", lambda: base_of_adapter(adapters))


# The loop, on the smallest Sudoku.


def recipe(tmp_path, name: str, **fields):
    from recipes.sudoku_unique import recipe_of

    base = recipe_of("llada")

    small = partial(
        tiny_llama,
        causal=False,
        hidden_size=32,
        num_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        characters=base.model.keywords["characters"],
    )
    few = {
        "model": small,
        "train_batch_size": 2,
        "num_generations": 4,
        "sft_warmup_steps": 0,
        "eval_steps": 0,
        "num_steps": 2,
    }
    few |= {
        "eval_task": replace(base.validation_task, size=8),
        "save_steps": 1,
        "save_total_limit": 9,
        "output_dir": str(tmp_path / name),
        "beta": 0.1,
    }
    return with_changes(base, **(few | fields))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        slow("full in 8 bits", {"optim": AdamW8bit()}),
        ("lora", {"lora": Lora(r=4, dropout=0.1)}),
        slow("lora after warm-up", {"lora": Lora(r=4), "sft_warmup_steps": 2, "optim": AdamW8bit()}),
        slow("qlora", {"lora": Lora(r=4)}),
    ],
)
def test_two_steps_then_resume_and_merge(tmp_path, kind, fields):
    if "8 bits" in kind or kind == "qlora":
        pytest.importorskip("bitsandbytes")
    run = recipe(tmp_path, "run", **fields)
    if kind == "qlora":
        run.model().save_pretrained(tmp_path / "base")
        run = replace(run, model=partial(load_policy, tmp_path / "base", quantization="nf4"))
    train(run)
    steps = current_rows(tmp_path / "run/metrics.jsonl")
    assert steps[0]["kl"] == 0.0  # the reference is what RL starts from, exactly
    assert steps[1]["kl"] > 0
    assert all(step["grad_norm"] > 0 for step in steps)

    folders = dict(checkpoints.list_checkpoints(tmp_path / "run/checkpoints"))
    first, last = (load_file(folders[n] / "model.safetensors") for n in (0, 2))
    moved = {name for name in first if not torch.equal(first[name], last[name])}
    assert moved
    if "lora" in kind:
        assert all(".layers." in name and "norm" not in name for name in moved)
        base = run.model() if not run.warmup.steps else load_policy(tmp_path / "run/reference")
        load_adapter(base, folders[2] / "adapter")
        merge_lora(base)
        assert all(torch.equal(base.module.state_dict()[name], tensor) for name, tensor in last.items())

    folders[2].rename(tmp_path / "before")
    train(replace(run, resume_from_checkpoint="latest"))
    again = load_file(folders[2] / "model.safetensors")
    assert again.keys() == last.keys()
    assert all(torch.equal(again[name], last[name]) for name in last)


@pytest.mark.parametrize(
    "corrector", [Aligned(), pytest.param(QaRL(eps_high=0.1, neg_low=0.1, neg_high=0.1), marks=pytest.mark.slow)]
)
@pytest.mark.slow
def test_adapters_are_trained_through_the_rollouts_quantized_operands(tmp_path, corrector):
    fields = {"rollout_quantization": int3_emulated, "num_iterations": 2, "beta": 0.0, "save_total_limit": 9}
    run = recipe(tmp_path, "run", lora=Lora(r=4), corrector=corrector, **fields)
    train(run)
    steps = current_rows(tmp_path / "run/metrics.jsonl")
    assert all(step["rollout_corr/abs_log_ratio_max"] == 0 and step["grad_norm/iteration_1"] > 0 for step in steps)
    folders = dict(checkpoints.list_checkpoints(tmp_path / "run/checkpoints"))
    first, last = (load_file(folders[n] / "adapter/adapter_model.safetensors") for n in (0, 2))
    assert all(not torch.equal(first[name], last[name]) for name in first)
    # Without alignment the same adapters do see a mismatch, so that the zeros above are alignment's doing.
    train(recipe(tmp_path, "apart", lora=Lora(r=4), **fields))
    steps = current_rows(tmp_path / "apart/metrics.jsonl")
    assert all(step["rollout_corr/abs_log_ratio_max"] > 1e-3 for step in steps)
    train(replace(run, resume_from_checkpoint=str(folders[1])))
    again = load_file(folders[2] / "adapter/adapter_model.safetensors")
    assert all(torch.equal(again[name], last[name]) for name in last)


@pytest.mark.slow
def test_the_reference_of_aligned_adapters_is_the_plain_base(tmp_path):
    aligned_run = {"lora": Lora(r=4), "corrector": Aligned(), "rollout_quantization": int3_emulated}
    train(recipe(tmp_path, "run", **aligned_run, beta=0.1))
    steps = current_rows(tmp_path / "run/metrics.jsonl")
    assert all(step["rollout_corr/abs_log_ratio_max"] == 0 for step in steps)
    assert steps[0]["kl"] > 0, "the learner is quantized, the reference is not: they differ from the start"


def test_dropout_with_an_aligned_forward_is_refused_before_any_work(tmp_path):
    dropped = {"lora": Lora(r=4, dropout=0.1), "corrector": Aligned()}
    with pytest.raises(ValueError, match=r"lora.dropout=0.1: an aligned forward merges adapters; set it to 0"):
        recipe(tmp_path, "run", **dropped, rollout_quantization=int3_emulated)
    recipe(tmp_path, "run", **dropped, rollout_quantization=None)  # nothing is quantized, nothing merged


@pytest.mark.parametrize("family", ["llada", "llada2", "dream", "sdar", "nemotron", "llada_moe"])
@pytest.mark.repeated(first_only=True)
def test_what_peft_saves_of_the_stock_module_is_read(tmp_path, family):
    """Its adapters have the stock class's names, and not the original checkpoint's."""
    peft = pytest.importorskip("peft")
    source = checkpoint(tmp_path / "source", family)
    policy = load_policy(source)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "o_proj"], init_lora_weights="gaussian")
    model = peft.get_peft_model(policy.module, config)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(tmp_path / "adapter")
    opened = load_policy(source)
    tokens = torch.randint(3, 38, (2, 9), generator=generator)
    mask = torch.ones_like(tokens, dtype=torch.bool)
    expected = policy.logits(tokens, mask)
    assert not torch.allclose(opened.logits(tokens, mask), expected, atol=1e-3)
    load_adapter(opened, tmp_path / "adapter")
    torch.testing.assert_close(opened.logits(tokens, mask), expected, rtol=1e-4, atol=1e-5)
