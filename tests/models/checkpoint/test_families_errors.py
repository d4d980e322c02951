"""What a user can get wrong with a checkpoint: one line that names the field, what was found, the remedy."""

import json
from types import SimpleNamespace

import pytest
import torch
from layouts import (
    MASK,
    checkpoint,
    dream,
    illada,
    llada,
    llada2,
    llada_moe,
    nemotron,
    published,
    sdar,
    tokenizer,
    write,
)
from safetensors.torch import load_file, save_file

from dllm_rl import Autoregress, Prompts, Unmask, load_policy
from dllm_rl.models.checkpoint.families import DREAM, ILLADA, LLADA, LLADA2, LLADA_MOE, NEMOTRON, SDAR, find_family
from dllm_rl.models.checkpoint.loading import find_mask_id, load_tokenizer
from dllm_rl.models.policy import make_policy
from dllm_rl.models.tiny import tiny_llama, tiny_masked_lm


def refused(words: str, call, *args, **kwargs) -> None:
    with pytest.raises(ValueError) as error:
        call(*args, **kwargs)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def edit(folder, **fields):
    config = json.loads((folder / "config.json").read_text()) | fields
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_an_unknown_architecture_lists_the_known_ones_and_how_to_add_one(tmp_path):
    folder = edit(published(tmp_path, "llada"), architectures=["FooDiffusion"], auto_map={})
    refused("architectures='FooDiffusion' is not known; known are ", load_policy, folder)
    refused("LLaDAModelLM", load_policy, folder)
    refused("pass a FamilySpec to register_family", load_policy, folder)


def test_a_diffusion_gemma_that_transformers_does_not_have_is_refused(tmp_path):
    folder = published(tmp_path, "llada")
    edit(folder, architectures=["DiffusionGemmaForImages"], model_type="diffusion_gemma", auto_map={})
    said = "architectures='DiffusionGemmaForImages' is not a DiffusionGemmaForBlockDiffusion that transformers"
    refused(f"model_type='diffusion_gemma' with {said}", load_policy, folder)


def test_remote_code_is_never_run(tmp_path):
    folder = edit(
        published(tmp_path, "llada"), architectures=["FooForCausalLM"], auto_map={"AutoModel": "modeling.Foo"}
    )
    (folder / "modeling.py").write_text("raise SystemExit('ran')")
    refused(
        "'FooForCausalLM' is not known and its config asks for remote code (auto_map), which is never run",
        load_policy,
        folder,
    )


def test_remote_tokenizer_without_files(tmp_path):
    folder = published(tmp_path, "dream")
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "Odd", "auto_map": {"AutoTokenizer": ["a.Odd", None]}})
    )
    refused("tokenizer_class='Odd' asks for remote code, which is never run; add a tokenizer.json", load_policy, folder)


def test_tokenizer_whose_ids_do_not_come_out_as_it_says(tmp_path):
    folder = published(tmp_path, "dream")
    config = {"added_tokens_decoder": {"7": {"content": "<eos>"}}, "auto_map": {}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    refused("token '<eos>' is 2, not 7", load_tokenizer, folder, stock=False)


@pytest.mark.repeated
@pytest.mark.parametrize("family", ["llada", "llada2", "llama", "bert"])
def test_missing_and_extra_tensors(tmp_path, family):
    file = checkpoint(tmp_path, family) / "model.safetensors"
    state = load_file(file)
    name = next(
        n
        for n in state
        if n.endswith(
            (
                "blocks.1.q_proj.weight",
                "layers.1.attention.dense.weight",
                "layer.1.attention.self.query.weight",
                "layers.1.self_attn.q_proj.weight",
            )
        )
    )
    save_file({k: v for k, v in state.items() if k != name}, file, {"format": "pt"})
    refused("missing_keys", load_policy, tmp_path)
    save_file(state | {"surplus.weight": torch.ones(2)}, file, {"format": "pt"})
    refused("unexpected_keys ['surplus.weight']", load_policy, tmp_path)


def test_no_weights_at_all(tmp_path):
    folder = published(tmp_path, "llada")
    (folder / "model.safetensors").unlink()
    refused("no model.safetensors", load_policy, folder)
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    refused("model-00001-of-00002.safetensors is listed", load_policy, folder)
    refused("is neither a folder nor a hub id (owner/name)", load_policy, tmp_path / "nowhere")


def test_mask_tokens(tmp_path):
    config, state = llada()
    refused(
        "mask_token_id=400 is outside the vocabulary of 40",
        load_policy,
        write(tmp_path / "a", config | {"mask_token_id": 400}, state),
    )
    del config["mask_token_id"]
    remedy = "of 40 tokens (the llada default 126336 belongs to a vocabulary of 126464); set mask_token_id in"
    refused(remedy, load_policy, write(tmp_path / "b", config, state))
    assert load_policy(write(tmp_path / "c", config, state, mask=True)).spec.mask_id == MASK  # the tokenizer's
    folder = write(tmp_path / "d", config | {"mask_token_id": 38}, state, mask=True)
    refused("mask_token_id=38 in the config, but the tokenizer's mask token '<mask>' is 39", load_policy, folder)


@pytest.mark.parametrize(
    ("family", "size", "found"),
    [
        (LLADA, 126464, 126336),
        (ILLADA, 155136, 5),
        (LLADA_MOE, 157184, 156895),
        (LLADA2, 157184, 156895),
        (DREAM, 152064, 151666),
        (SDAR, 151936, 151669),
        (NEMOTRON, 131072, 100),
    ],
)
def test_a_familys_mask_id_goes_with_its_own_vocabulary_alone(family, size, found):
    """126336 is a word of iLLaDA's 155,136, whose mask is 5."""
    config = SimpleNamespace(vocab_size=size)
    assert find_mask_id(config, tokenizer(), family) == found
    for other in {155136, size + 64} - {size}:
        config.vocab_size = other
        words = f"(the {family.name} default {found} belongs to a vocabulary of {size})"
        refused(words, find_mask_id, config, tokenizer(), family)
    config.mask_token_id = 5  # what the config says comes first
    assert find_mask_id(config, tokenizer(), family) == 5


def test_a_token_with_the_familys_name_for_the_mask():
    """A tokenizer that lists the token but declares no mask token knows its id better than the family does."""
    named = tokenizer()
    named.add_tokens(["<|mdm_mask|>"], special_tokens=True)
    number = named.convert_tokens_to_ids("<|mdm_mask|>")
    assert number == 39 and named.mask_token is None
    assert find_mask_id(SimpleNamespace(vocab_size=126464), named, LLADA) == number
    refused("neither in the config nor in the tokenizer", find_mask_id, SimpleNamespace(vocab_size=126464), named, SDAR)


def test_of_two_names_for_the_mask_neither_is_taken():
    """Nothing tells which of the two tokens the model was trained with. The config, or the vocabulary, may tell."""
    named = tokenizer()
    named.add_tokens(["<|mdm_mask|>", "[MDM_MASK]"], special_tokens=True)
    config = SimpleNamespace(vocab_size=64)
    refused("mask_token_id is neither in the config nor in the tokenizer", find_mask_id, config, named, LLADA)
    assert find_mask_id(SimpleNamespace(vocab_size=126464), named, LLADA) == 126336
    config.mask_token_id = named.convert_tokens_to_ids("[MDM_MASK]")
    assert find_mask_id(config, named, LLADA) == config.mask_token_id == 40


def test_a_masked_model_whose_tokenizer_has_no_mask():
    policy = tiny_masked_lm(characters="ab", hidden_size=32, num_layers=1)
    policy.tokenizer.mask_token = policy.module.config.mask_token_id = None
    refused("mask_token_id is neither in the config nor in the tokenizer", make_policy, policy.module, policy.tokenizer)


def test_the_expert_bias_of_llada_moe(tmp_path):
    folder = write(tmp_path, *llada_moe(moe_router_enable_expert_bias=True))
    refused("moe_router_enable_expert_bias=True", load_policy, folder)


@pytest.mark.parametrize(
    ("layout", "field", "value"),
    [
        (llada, "alibi", True),
        (llada, "include_bias", True),
        (illada, "layer_norm_eps", 1e-5),
        (nemotron, "sliding_window", 64),
        (llada_moe, "qk_layernorm", False),
        (llada2, "score_function", "softmax"),
    ],
)
def test_variants_that_the_stock_class_does_not_compute(tmp_path, layout, field, value):
    config, state = layout()
    folder = write(tmp_path, config | {field: value}, state)
    refused(f"{field}={value!r} is not supported for {config['architectures'][0]}; only {field}=", load_policy, folder)


# Every field that changes what the authors' own code computes, with a value that the stock class does not.
OTHERWISE = {
    llada: {
        **{"block_type": "sequential", "layer_norm_type": "default", "activation_type": "gelu", "rope": False},
        **{"alibi": True, "include_bias": True, "include_qkv_bias": True, "bias_for_layer_norm": True},
        **{"attention_layer_norm": True, "input_emb_norm": True, "scale_logits": True},
        **{"multi_query_attention": True, "block_group_size": 2},
    },
    llada_moe: {
        **{"moe_router_score_function": "sigmoid", "qk_layernorm": False, "routed_scaling_factor": 2.5},
        **{"shared_expert_intermediate_size": 48, "partial_rotary_factor": 0.5, "clip_qkv": 8.0, "router_num_group": 2},
    },
    llada2: {
        **{"score_function": "softmax", "use_bias": True, "norm_head": True, "use_rmsnorm": False},
        "use_sliding_window": True,
    },
    dream: {"use_sliding_window": True},
    sdar: {"use_sliding_window": True},
    illada: {"mlp_bias": True, "layer_norm_eps": 1e-5},
    nemotron: {"attention_bias": True, "mlp_bias": True, "sliding_window": 64},
}


@pytest.mark.parametrize("layout", OTHERWISE, ids=lambda layout: layout.__name__)
def test_every_field_that_the_stock_class_computes_otherwise_is_refused(layout):
    raw, _ = layout()
    native = find_family(raw).files.stock_model
    native(raw)
    for field, value in OTHERWISE[layout].items():
        refused(f"{field}={value!r} is not supported for {raw['architectures'][0]}", native, raw | {field: value})


def test_a_device_that_rounds_the_rows_of_a_batch_differently(monkeypatch):
    """A pretrained model was refused on a machine of 16 cores. In fp32 its states are off by 1e-5 from row to row."""
    policy = tiny_llama(characters="abcdefghij", causal=True, hidden_size=32, num_layers=1)
    exact = policy.module.get_input_embeddings().forward

    def rounded(tokens):
        rows = torch.arange(len(tokens))[:, None, None]
        return exact(tokens) * (1 + 1e-5 * rows)

    monkeypatch.setattr(policy.module.get_input_embeddings(), "forward", rounded)
    monkeypatch.setattr(policy.module.model.norm, "forward", lambda hidden: hidden)
    assert make_policy(policy.module, policy.tokenizer, policy.spec).spec == policy.spec


def test_a_model_that_hardly_sees_a_token_still_counts_as_seeing_it(monkeypatch):
    """The first position of SmolLM2-135M, with full attention, changes by 3e-5 of its norm."""
    policy = tiny_llama(characters="abcdefghij", causal=True, hidden_size=32, num_layers=1)
    weak = policy.module.model.norm.forward

    def leaks(hidden):
        return weak(hidden) + 1e-3 * hidden.mean(1, keepdim=True)

    monkeypatch.setattr(policy.module.model.norm, "forward", leaks)
    refused("changing token 7 changed", make_policy, policy.module, policy.tokenizer, policy.spec)


def test_attention_that_is_not_what_the_family_needs():
    """As with a transformers too old for is_causal=False, which would stay causal."""
    policy = tiny_llama(characters="ab", causal=False, hidden_size=32, num_layers=1)
    spec = policy.spec
    policy.module.config.is_causal = True
    refused(
        "changing token 7 did not change the first position's state; upgrade transformers (>= 5.2",
        make_policy,
        policy.module,
        policy.tokenizer,
        spec,
    )
    causal = tiny_llama(characters="ab", causal=True, hidden_size=32, num_layers=1)
    spec = causal.spec
    causal.module.config.is_causal = False
    refused(
        "changing token 7 changed the first position's state; load it as a diffusion model",
        make_policy,
        causal.module,
        causal.tokenizer,
        spec,
    )


def test_a_sampler_for_the_other_kind_of_policy():
    prompts, generator = Prompts.from_ids([[3, 4]], pad_id=0), torch.Generator()
    causal, diffusion = (tiny_llama(characters="ab", causal=c, hidden_size=32, num_layers=1) for c in (True, False))
    masked = Unmask(max_new_tokens=2, diffusion_steps=2)
    refused("Unmask needs a diffusion model: use Autoregress", masked, causal, prompts, generator)
    refused("Autoregress needs a causal one: use Unmask", Autoregress(max_new_tokens=2), diffusion, prompts, generator)


def test_unknown_quantization(tmp_path):
    refused(
        "quantization='int3' is not known; use 'nf4', 'int8' or None",
        load_policy,
        published(tmp_path, "llada"),
        quantization="int3",
    )
