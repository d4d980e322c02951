"""Policies that cannot be trained as they are: refused in one line, or trained and resumed as they were."""

import json
from dataclasses import replace

import pytest
import torch
import transformers
from refusals import refuses
from torch import nn
from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, quantize_
from transformers.utils.quantization_config import QuantizationMethod

from dllm_rl import (
    Autoregress,
    FakeQuantize,
    Float8WeightOnly,
    Int8WeightOnly,
    Lora,
    Prompts,
    grpo,
    load_policy,
    make_policy,
    quantized_copy,
    sft,
    tiny_masked_lm,
)
from dllm_rl.decoding.prompts import encode
from dllm_rl.models.base import FamilySpec, copied, frozen_names
from dllm_rl.models.lora import add_lora
from dllm_rl.models.tiny import char_tokenizer, tiny_llama
from dllm_rl.tasks.base import Problem
from dllm_rl.testing import check_policy

DIGITS = "0123456789="
ROWS = [{"prompt": f"{a}{b}=", "answer": f"{b}{a}"} for a in "123456" for b in "123456"]
OPTIONS = {"max_new_tokens": 2, "train_batch_size": 4, "num_generations": 4, "save_steps": 2, "lr_schedule_steps": 4}


def reward(completions, answer, **columns):
    return [sum(x == y for x, y in zip(*pair, strict=False)) / 2 for pair in zip(completions, answer, strict=True)]


@pytest.fixture(scope="module")
def causal_policy():
    return tiny_llama(characters=DIGITS, causal=True, hidden_size=32, num_layers=1)


def small(**fields):
    return tiny_llama(characters=DIGITS, causal=False, hidden_size=32, num_layers=1, **fields)


@pytest.mark.parametrize("ids", [[[]], [[], [3, 4]], [[3], [], [3, 4, 5]]])
def test_a_causal_model_needs_a_token_before_the_first_that_it_samples(causal_policy, ids):
    prompts = Prompts.from_ids(ids, pad_id=0, num_generations=2)
    with pytest.raises(ValueError, match=f"row {2 * ids.index([])} has no token"):
        Autoregress(max_new_tokens=2)(causal_policy, prompts, torch.Generator())
    refuses("prompt=''", lambda: encode(causal_policy, [Problem(prompt="1="), Problem(prompt="")]))


@pytest.mark.parametrize(
    ("pad", "mask", "eos", "name"),
    [
        ("<pad>", 2, 2, "mask_id"),
        ("<pad>", 2, [1, 2], "mask_id"),
        ("<mask>", 1, 2, "pad_token_id"),
        ("<eos>", 2, 2, "mask_id"),
        ("[PAD]", 1, 2, "pad_token_id"),
        ("[PAD]", 14, 2, "mask_token_id"),
    ],
)
def test_ids_that_coincide_or_lie_outside_are_refused(pad, mask, eos, name):
    tokenizer = char_tokenizer(DIGITS)
    tokenizer.add_special_tokens({"pad_token": pad})
    tokenizer.mask_token = None
    config = transformers.LlamaConfig(
        **{"vocab_size": 14, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1},
        **{"num_attention_heads": 2, "is_causal": False, "pad_token_id": 0, "bos_token_id": None},
        **{"eos_token_id": eos, "mask_token_id": mask},
    )
    module = transformers.LlamaForCausalLM(config)
    refuses(name, lambda: make_policy(module, tokenizer))
    refuses(name, lambda: grpo(module, ROWS, reward, processing_class=tokenizer))
    if name != "mask_token_id":
        policy = small()
        spec = replace(policy.spec, mask_id=mask, eos_ids=tuple(eos if isinstance(eos, list) else [eos]))
        refuses(name, lambda: make_policy(policy.module, tokenizer, spec))


@pytest.mark.parametrize(
    ("config", "generation", "ends"),
    [(2, [2, 3], (2, 3)), ([2, 4], 3, (2, 4, 3)), (None, [5, 2], (5, 2)), (3, None, (3, 2))],
)
def test_end_ids_are_those_of_the_opened_checkpoint(tmp_path, config, generation, ends):
    module = tiny_llama(characters=DIGITS, causal=True, hidden_size=16, num_layers=1).module
    module.config.eos_token_id = config
    module.generation_config.eos_token_id = generation
    policy = make_policy(module, char_tokenizer(DIGITS))
    policy.save_pretrained(tmp_path)
    assert policy.spec.eos_ids == load_policy(tmp_path).spec.eos_ids == ends


@pytest.mark.parametrize("scheme", [Float8WeightOnly(), Int8WeightOnly(), FakeQuantize(weight="int4")])
def test_a_quantized_copy_is_not_saved(tmp_path, scheme):
    policy = small()
    copy = quantized_copy(policy, scheme)
    refuses("quantization=", lambda: copy.save_pretrained(tmp_path / "new"))
    assert not (tmp_path / "new").exists()
    policy.save_pretrained(tmp_path / "old")
    before = {file.name: file.read_bytes() for file in (tmp_path / "old").iterdir()}
    refuses("quantization=", lambda: copy.save_pretrained(tmp_path / "old"))
    assert before == {file.name: file.read_bytes() for file in (tmp_path / "old").iterdir()}


@pytest.mark.parametrize("options", [{}, {"lora": Lora()}, {"lora": Lora(r=8), "beta": 0.1}])
@pytest.mark.repeated(first_only=True)
def test_adapters_that_a_run_did_not_add_are_refused(tmp_path, options):
    policy = small()
    add_lora(policy, Lora(r=8))
    with pytest.raises(ValueError, match="merge_lora"):
        grpo(policy, ROWS, reward, num_steps=2, output_dir=str(tmp_path / "run"), **OPTIONS, **options)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_run_with_frozen_weights_resumes_to_the_same_weights(tmp_path):
    def policy():
        made = small()
        for name, weight in made.module.named_parameters():
            weight.requires_grad_("layers.0.mlp" in name)
        return made

    def run(name, steps, **options):
        folder = tmp_path / name
        return grpo(policy(), ROWS, reward, num_steps=steps, output_dir=str(folder), **OPTIONS, **options).policy

    whole = run("whole", 2)
    run("cut", 1)
    resumed = run("cut", 2, resume_from_checkpoint="latest")
    for (name, a), b in zip(whole.module.named_parameters(), resumed.module.parameters(), strict=True):
        assert torch.equal(a, b) and a.requires_grad == b.requires_grad == ("layers.0.mlp" in name)
    state = json.loads((tmp_path / "cut" / "checkpoints" / "step-000002" / "state.json").read_text())
    assert state["frozen"] == frozen_names(policy().module)
    with pytest.raises(ValueError, match="requires_grad"):
        grpo(
            small(),
            ROWS,
            reward,
            num_steps=3,
            resume_from_checkpoint="latest",
            output_dir=str(tmp_path / "cut"),
            **OPTIONS | {"lr_schedule_steps": 4},
        )


@pytest.mark.slow
def test_supervised_training_with_frozen_weights_resumes_to_the_same_weights(tmp_path):
    rows = [{"prompt": row["prompt"], "completion": row["prompt"][0]} for row in ROWS]

    def run(name, steps, **options):
        policy = small()
        for path, weight in policy.module.named_parameters():
            weight.requires_grad_("lm_head" in path)
        settings = {"max_length": 8, "report_to": None, "lr_schedule_steps": 4, "output_dir": str(tmp_path / name)}
        return sft(policy, rows, num_steps=steps, train_batch_size=4, **settings, **options).policy

    whole = run("whole", 2)
    run("cut", 1)
    resumed = run("cut", 2, resume_from_checkpoint="latest")
    for (name, a), b in zip(whole.module.named_parameters(), resumed.module.parameters(), strict=True):
        assert torch.equal(a, b) and b.requires_grad == ("lm_head" in name)


class Encoder(nn.Module):
    def __init__(self, stack):
        super().__init__()
        self.embed = nn.Embedding(14, 32)
        self.place = nn.Embedding(64, 32)

        def layer():
            return nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)

        self.blocks = nn.TransformerEncoder(layer(), 2) if stack else nn.ModuleList(layer() for _ in range(2))
        self.head = nn.Linear(32, 14)


def encoded(module, tokens, attention_mask, positions, **kept):
    states = module.embed(tokens) + module.place(positions)
    if isinstance(module.blocks, nn.TransformerEncoder):
        return module.blocks(states, src_key_padding_mask=~attention_mask)
    for block in module.blocks:
        states = block(states, src_key_padding_mask=~attention_mask)
    return states


@pytest.mark.parametrize("stack", [False, True])
def test_torchs_own_encoder_layers(stack):
    torch.manual_seed(0)
    spec = FamilySpec(
        **{"name": "own", "attention": "full", "mask_id": 1, "eos_ids": (2,), "vocab_size": 14, "max_length": 64},
        **{"encode": encoded, "head": lambda module, hidden: module.head(hidden)},
        lora_targets=("linear1", "linear2"),
    )
    policy = make_policy(Encoder(stack), char_tokenizer(DIGITS), spec)
    tokens = torch.arange(12)[None].repeat(2, 1)
    mask = torch.ones_like(tokens, dtype=torch.bool)
    mask[1, :3] = False
    adapted = copied(policy)
    add_lora(adapted, Lora(r=2))
    check_policy(policy)
    with torch.no_grad():
        plain = policy.logits(tokens, mask)
        torch.testing.assert_close(adapted.logits(tokens, mask)[mask], plain[mask], rtol=1e-5, atol=1e-5)
        last = adapted.module.get_submodule("blocks.layers.1.linear2" if stack else "blocks.1.linear2")
        last.lora_B.weight.copy_(torch.linspace(-1, 1, 64).view(32, 2))  # a norm behind it removes equal numbers
        assert not torch.allclose(adapted.logits(tokens, mask)[mask], plain[mask], atol=1e-3)
        for scheme in (Float8WeightOnly(), Int8WeightOnly()):
            rounded = quantized_copy(policy, scheme).logits(tokens, mask)[mask]
            assert not torch.equal(rounded, plain[mask])
            torch.testing.assert_close(rounded, plain[mask], rtol=0.1, atol=0.1)
    refuses("MultiheadAttention", lambda: add_lora(copied(policy), Lora(targets=("out_proj",))))


def test_an_empty_prompt_beside_others_of_a_diffusion_model_is_the_prompt_alone():
    policy = tiny_masked_lm(characters=DIGITS, head_std=0.3)
    tokens = torch.tensor([[0, 0, 1, 1], [5, 6, 1, 1]])
    mask = torch.tensor([[False, False, True, True], [True] * 4])
    with torch.no_grad():
        together = policy.logits(tokens, mask)[0, 2:]
        alone = policy.logits(tokens[:1, 2:], mask[:1, 2:])[0]
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("train_with", [grpo, sft], ids=["grpo", "sft"])
@pytest.mark.parametrize("quantization", ["nf4", "int8"])
@pytest.mark.repeated
def test_a_base_in_few_bits_without_adapters_is_frozen_and_not_trained(tmp_path, quantization, train_with):
    pytest.importorskip("bitsandbytes")
    small().save_pretrained(tmp_path / "base")
    policy = load_policy(tmp_path / "base", quantization=quantization)
    assert len(frozen_names(policy.module)) == len([*policy.module.parameters()])
    policy.module.get_input_embeddings().requires_grad_(True)  # as transformers leaves it
    rows = ROWS if train_with is grpo else [{"prompt": row["prompt"], "completion": row["answer"]} for row in ROWS]
    arguments = (reward,) if train_with is grpo else ()
    with pytest.raises(ValueError, match="lora=None with a base in bitsandbytes' 4 or 8 bits"):
        train_with(policy, rows, *arguments, num_steps=1, report_to="none", output_dir=str(tmp_path / "run"))


def quantized_by_torchao(module, config):
    quantize_(module, config())
    return module


@pytest.mark.parametrize(
    "change",
    [
        lambda module: quantized_by_torchao(module, Int8WeightOnlyConfig),
        lambda module: quantized_by_torchao(module, Float8WeightOnlyConfig),
        lambda module: set_weight(module, torch.float8_e4m3fn),
        lambda module: set_weight(module, torch.uint8),
        lambda module: vars(module).update(quantization_method=QuantizationMethod.GPTQ),
    ],
    ids=["int8 of torchao", "float8 of torchao", "float8", "codes", "GPTQ"],
)
def test_weights_that_another_tool_quantized_are_refused_at_the_start(tmp_path, change):
    policy = small()
    change(policy.module)
    refuses("LlamaForCausalLM has quantized weights", lambda: make_policy(policy.module, policy.tokenizer))
    with pytest.raises(ValueError, match="LlamaForCausalLM has quantized weights"):
        grpo(policy, ROWS, reward, num_steps=1, report_to="none", output_dir=str(tmp_path / "run"), **OPTIONS)


def set_weight(module, dtype):
    layer = module.model.layers[0].mlp.up_proj
    layer.weight = nn.Parameter(layer.weight.detach().to(dtype), requires_grad=False)


SPEC = {"name": "mine", "attention": "full", "vocab_size": 9, "mask_id": 8, "eos_ids": (3,)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"attention": "bidirectional"},
            "attention='bidirectional' of the spec 'mine' is not one of full",
        ),
        ({"attention": None}, "attention=None of the spec"),
        ({"attention": "block_causal"}, "block_size=None of the spec 'mine': 'block_causal' attention needs"),
        (
            {"attention": "block_causal", "block_size": 0},
            "block_size=0 of the spec 'mine' must be a whole number",
        ),
        ({"eos_ids": 1}, r"eos_ids=1 of the spec 'mine' is not a tuple of ids; write \(1,\)"),
        ({"eos_ids": ("<eos>",)}, r"eos_ids\[0\]='<eos>' of the spec 'mine' must be a whole number of at least 0"),
        ({"mask_id": -1}, "mask_id=-1 of the spec 'mine' must be a whole number of at least 0"),
        ({"max_length": 64.0}, "max_length=64.0 of the spec 'mine' must be a whole number of at least 1"),
        ({"vocab_size": True}, "vocab_size=True of the spec 'mine' must be a whole number"),
    ],
    ids=str,
)
def test_a_spec_is_checked_where_it_is_made(change, message):
    assert FamilySpec(**SPEC | {"eos_ids": [3]}).eos_ids == (3,)
    refuses(message, lambda: FamilySpec(**SPEC | change))


class Substituted(nn.Module):
    """Log-probs as MDLM returns them: the mask's is a constant, and dominates the norm."""

    def __init__(self, size, mask_id, constant, sees_all):
        super().__init__()
        self.embed, self.mix = nn.Embedding(size, 16), nn.Linear(16, size)
        self.mask_id, self.constant, self.sees_all = mask_id, constant, sees_all

    def forward(self, tokens):
        states = self.embed(tokens)
        read = states.cumsum(1) + (states.sum(1, keepdim=True) if self.sees_all else 0)
        logprobs = self.mix(read).log_softmax(-1)
        return logprobs.index_fill(-1, torch.tensor([self.mask_id]), self.constant)


@pytest.mark.parametrize("sees_all", [True, False])
@pytest.mark.parametrize("constant", [0.0, -1e6, -1e30, -torch.inf])
def test_states_with_a_large_constant_show_what_the_attention_is(constant, sees_all):
    tokenizer = char_tokenizer(DIGITS)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = Substituted(len(tokenizer), tokenizer.mask_token_id, constant, sees_all)
    spec = FamilySpec(
        name="mine",
        attention="full",
        vocab_size=len(tokenizer),
        mask_id=tokenizer.mask_token_id,
        eos_ids=(tokenizer.eos_token_id,),
        encode=lambda module, tokens, mask, positions: module(tokens),
        head=lambda module, states: states,
    )
    causal = replace(spec, attention="causal", mask_id=None)
    right, wrong = (spec, causal) if sees_all else (causal, spec)
    make_policy(module, tokenizer, right)
    with pytest.raises(ValueError, match="set the spec's attention to what its encode computes, or correct encode"):
        make_policy(module, tokenizer, wrong)
