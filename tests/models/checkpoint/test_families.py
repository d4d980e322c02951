"""Checkpoints in their published layouts: no remote code; right attention, shift and padding; written back."""

import copy
import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from layouts import LAYERS, MASK, ORIGINAL, STOCK, checkpoint, llada, llada2, llada_moe, published, tokenizer, write
from repetitions import few
from safetensors.torch import load_file

from dllm_rl import Prompts, Trajectory, Unmask, load_policy, make_policy
from dllm_rl.models.checkpoint import families, rope
from dllm_rl.models.checkpoint.families import register_family
from dllm_rl.models.checkpoint.loading import find_eos_ids
from dllm_rl.models.convert import as_causal, diffusion_from_causal
from dllm_rl.samplers.rules import MaxProb

EVERY = [*ORIGINAL, *STOCK]


@pytest.fixture(scope="module")
def policies(tmp_path_factory):
    """Each family's tiny policy, opened once."""
    opened = {}

    def get(family: str):
        if family not in opened:
            opened[family] = load_policy(checkpoint(tmp_path_factory.mktemp(family), family))
        return opened[family]

    return get


def tensors(directory) -> dict:
    return {k: v for file in directory.glob("*.safetensors") for k, v in load_file(file).items()}


def ids(length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 38, (1, length), generator=torch.Generator().manual_seed(seed))


def ones(tokens: torch.Tensor) -> torch.Tensor:
    return torch.ones_like(tokens, dtype=torch.bool)


@pytest.mark.repeated(every=4)
@pytest.mark.parametrize("dtype", few([torch.float32, torch.bfloat16], [torch.bfloat16]))
@pytest.mark.parametrize("family", ORIGINAL)
def test_the_original_layout_comes_back_bit_for_bit(tmp_path, family, dtype):
    source = published(tmp_path / "source", family, dtype=dtype)
    code = 'raise SystemExit("the checkpoint\'s own code was run")\n'
    (source / "modeling.py").write_text(code)
    load_policy(source, dtype="auto").save_pretrained(tmp_path / "saved")
    before, after = tensors(source), tensors(tmp_path / "saved")
    assert before.keys() - after.keys() == ({"lm_head.weight"} if family.startswith(("a2d", "illada")) else set())
    assert all(before[k].dtype == after[k].dtype and torch.equal(before[k], after[k]) for k in after)
    assert json.loads((tmp_path / "saved/config.json").read_text()) == json.loads((source / "config.json").read_text())
    assert (tmp_path / "saved/modeling.py").read_text() == code


def test_a_head_apart_from_the_embedding_is_saved_although_the_config_ties_them(tmp_path):
    config, state = ORIGINAL["a2d_qwen3"]()
    state["lm_head.weight"] = state["lm_head.weight"].flip(0)
    source = write(tmp_path / "source", config, state)
    load_policy(source).save_pretrained(tmp_path / "saved")
    before, after = tensors(source), tensors(tmp_path / "saved")
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)


@pytest.mark.repeated
@pytest.mark.parametrize("family", STOCK)
def test_a_stock_checkpoint_comes_back_bit_for_bit(tmp_path, family):
    source = checkpoint(tmp_path / "source", family)
    load_policy(source).save_pretrained(tmp_path / "saved")
    before, after = tensors(source), tensors(tmp_path / "saved")
    assert before.keys() - after.keys() <= {"bert.pooler.dense.weight", "cls.seq_relationship.bias"} | aliases(family)
    assert all(torch.equal(before[k], after[k]) for k in after)


@pytest.mark.parametrize("family", ORIGINAL)
@pytest.mark.repeated
def test_what_other_tools_save_is_reopened_with_the_familys_attention_and_shift(tmp_path, policies, family):
    """`Trainer.save_model` calls the module's own save_pretrained, which writes the stock class's layout."""
    policy = policies(family)
    policy.module.save_pretrained(tmp_path / "stock")
    policy.tokenizer.save_pretrained(tmp_path / "stock")
    tokens = ids(13)
    expected = policy.logits(tokens, ones(tokens))
    reopened = load_policy(tmp_path / "stock")
    reopened.save_pretrained(tmp_path / "again")
    for other in (reopened, load_policy(tmp_path / "again"), make_policy(policy.module, policy.tokenizer)):
        for fact in (
            "name",
            "attention",
            "shift",
            "block_size",
            "causal_context",
            "float32_rope",
            "mask_id",
            "eos_ids",
        ):
            assert getattr(other.spec, fact) == getattr(policy.spec, fact), fact
        assert torch.equal(other.logits(tokens, ones(tokens)), expected)


def test_a_model_made_causal_or_diffusion_is_reopened_as_what_it_became(tmp_path):
    autoregressive = load_policy(published(tmp_path / "ar", "nemotron_ar"))
    autoregressive.tokenizer.add_special_tokens({"mask_token": "<mask>"})
    autoregressive.save_pretrained(tmp_path / "masked")
    diffusion = diffusion_from_causal(tmp_path / "masked")
    assert (diffusion.spec.name, diffusion.spec.attention) == ("shifted_diffusion_lm", "full")
    causal = as_causal(load_policy(published(tmp_path / "both", "nemotron")))
    causal.save_pretrained(tmp_path / "causal", stock=True)
    reopened = load_policy(tmp_path / "causal")
    assert (reopened.spec.attention, reopened.spec.shift) == ("causal", True)
    tokens = ids(9)
    assert torch.equal(reopened.logits(tokens, ones(tokens)), causal.logits(tokens, ones(tokens)))


def test_a_stock_copy_of_a_family_that_is_not_registered_is_refused(tmp_path):
    policy = load_policy(published(tmp_path / "source", "dream"))
    policy.module.config.diffusion_family = "mine"
    policy.save_pretrained(tmp_path / "stock", stock=True)
    with pytest.raises(ValueError, match=r"diffusion_family='mine' is not a known family.*register_family"):
        load_policy(tmp_path / "stock")


def aliases(family: str) -> set[str]:
    """Heads that stock masked models tie to their embeddings, so that saving leaves them out."""
    return {
        "bert": {"cls.predictions.decoder.weight", "cls.predictions.decoder.bias"},
        "roberta": {"lm_head.decoder.weight", "lm_head.decoder.bias"},
        "esm2": {"lm_head.decoder.weight"},
        "esm1b": {"lm_head.decoder.weight"},
        "esm_plain": {"lm_head.decoder.weight"},
        "modernbert": {"decoder.weight"},
    }.get(family, set())


@pytest.mark.repeated(every=4)
@pytest.mark.parametrize(
    ("family", "attention", "shift", "block"),
    [
        ("llada", "full", False, None),
        ("illada", "full", False, None),
        ("llada_moe", "full", False, None),
        ("llada2", "block_causal", False, 32),
        ("dream", "full", True, None),
        ("sdar", "block_causal", False, 4),
        ("sdar_moe", "block_causal", False, 4),
        ("rnd1", "full", True, None),
        ("stable_diffcoder", "block_causal", False, 4),
        ("a2d_qwen2", "full", False, None),
        ("a2d_qwen3", "full", False, None),
        ("a2d_blocks", "block_causal", False, 4),
        ("nemotron", "block_causal", False, 8),
        ("nemotron_ar", "causal", True, None),
        ("bert", "full", False, None),
        ("roberta", "full", False, None),
        ("esm2", "full", False, None),
        ("esm1b", "full", False, None),
        ("esm_plain", "full", False, None),
        ("modernbert", "full", False, None),
        ("llama", "causal", True, None),
        ("qwen3", "causal", True, None),
        ("smollm2", "causal", True, None),
    ],
)
def test_what_a_family_is(policies, family, attention, shift, block):
    policy = policies(family)
    assert (policy.spec.attention, policy.spec.shift, policy.spec.block_size) == (attention, shift, block)
    assert policy.spec.mask_id == (None if attention == "causal" else MASK)
    assert policy.spec.eos_ids == (2,)
    assert policy.spec.max_length == {"roberta": 62, "esm2": 62, "esm1b": 62, "esm_plain": 62, "llada2": 128}.get(
        family, 64
    )


@pytest.mark.repeated(every=5)
@pytest.mark.parametrize("family", EVERY)
def test_padding_on_either_side_changes_nothing(policies, family):
    policy, tokens = policies(family), ids(11)
    alone = policy.logits(tokens, ones(tokens))
    for left, right in ((5, 0), (0, 3), (2, 4)):
        padded = torch.nn.functional.pad(tokens, (left, right), value=1)
        mask = torch.nn.functional.pad(ones(tokens), (left, right))
        both, masks = torch.cat([padded, ids(padded.shape[1], 1)]), torch.cat([mask, ones(padded)])
        got = policy.logits(both, masks)[:1, left : left + 11]
        torch.testing.assert_close(got, alone, rtol=1e-5, atol=5e-5)


@pytest.mark.repeated(every=4)
@pytest.mark.parametrize("family", [family for family in ORIGINAL if family != "nemotron_ar"])
def test_what_is_sampled_is_scored_as_sampled(policies, family):
    policy, generator = policies(family), torch.Generator().manual_seed(0)
    prompts = Prompts.from_ids([[3, 4, 5, 6, 7], [8]], pad_id=policy.pad_id, num_generations=2)
    rollout = Unmask(max_new_tokens=12, diffusion_steps=6, temperature=1.0, rank=MaxProb())(policy, prompts, generator)
    scored = Trajectory().logprobs(policy, rollout, Trajectory().draw_views(rollout, generator))
    assert rollout.logprobs[rollout.completion_mask].max() < 0
    torch.testing.assert_close(scored, rollout.logprobs, rtol=0, atol=1e-5)


ALIKE = ("llada_tied", "sdar_moe", "a2d_qwen3", "roberta", "llama", "smollm2")  # each as one that is tested


@pytest.mark.repeated(every=4)
@pytest.mark.parametrize("family", [family for family in EVERY if family not in ALIKE])
@pytest.mark.parametrize("left", few([0, 3], [3]))
def test_who_sees_whom(policies, family, left):
    """Change each token in turn: the states that move are exactly those whose attention reaches it."""
    policy = policies(family)
    block, length = policy.spec.block_size, 40 if family == "llada2" else 10
    tokens = torch.nn.functional.pad(ids(length), (left, 0), value=1)
    tokens[0, left + 8] = MASK  # in the second block of 8
    mask = torch.nn.functional.pad(torch.ones(1, length, dtype=torch.bool), (left, 0))
    base = policy.spec.encode(policy.module, tokens, mask, (mask.long().cumsum(-1) - 1).clamp(min=0))[0]
    for key in range(0, length, 3):
        changed = tokens.clone()
        changed[0, left + key] = 3 + (tokens[0, left + key] - 2) % 35
        states = policy.spec.encode(policy.module, changed, mask, (mask.long().cumsum(-1) - 1).clamp(min=0))[0]
        moved = ((states - base).abs().amax(-1) > 1e-6)[left:].tolist()
        sees = {
            "full": lambda q, k: True,
            "causal": lambda q, k: k <= q,
            "block_causal": lambda q, k: k // block <= q // block,
            "nemotron": lambda q, k: k <= q or k // block == q // block == 1,
        }[family if family == "nemotron" else policy.spec.attention]
        assert moved == [sees(q, key) for q in range(length)], key


@pytest.mark.parametrize("family", ["dream", "rnd1", "llama"])
def test_a_shifted_head_is_hidden(policies, family):
    """logits at t are the module's own at t-1; the first token has only its own state."""
    policy, tokens = policies(family), ids(9)
    raw = policy.module(input_ids=tokens).logits
    got = policy.logits(tokens, ones(tokens))
    torch.testing.assert_close(got[:, 1:], raw[:, :-1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got[:, 0], raw[:, 0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["llada", "bert", "roberta", "esm2", "esm1b", "esm_plain", "modernbert"])
def test_an_unshifted_head_is_the_modules(policies, family):
    policy, tokens = policies(family), ids(9)
    got = policy.logits(tokens, ones(tokens))
    torch.testing.assert_close(got, policy.module(input_ids=tokens).logits, rtol=1e-5, atol=1e-5)
    marked = torch.zeros_like(tokens, dtype=torch.bool)
    marked[0, [2, 5]] = True
    torch.testing.assert_close(policy.logits(tokens, ones(tokens), marked), got[0, [2, 5]], rtol=1e-5, atol=1e-5)


@pytest.mark.repeated(every=4)
@pytest.mark.parametrize("num_masks", [0, 1, 5, 8])
@pytest.mark.parametrize("family", ["bert", "esm2", "esm1b", "esm_plain"])
def test_masked_logits_are_those_of_transformers(policies, family, num_masks):
    """Also with padding, which ESM's scale of the visible tokens leaves out."""
    policy, tokens = policies(family), ids(9)
    tokens[0, :num_masks] = MASK
    expected = policy.module(input_ids=tokens, attention_mask=ones(tokens).long()).logits
    padded = torch.nn.functional.pad(tokens, (4, 0), value=1)
    for given, mask in ((tokens, ones(tokens)), (padded, torch.nn.functional.pad(ones(tokens), (4, 0)))):
        torch.testing.assert_close(policy.logits(given, mask)[:, -9:], expected, rtol=1e-5, atol=5e-5)


@pytest.mark.repeated
@pytest.mark.parametrize("length", [1, 2, 9])
@pytest.mark.parametrize("given", [[], [5]])
def test_esm_completes_a_prompt_of_masks_alone(policies, given, length):
    """transformers itself divides by the number of visible tokens there: its logits are NaN."""
    policy = policies("esm2")
    tokens = torch.full((1, length), MASK)
    assert policy.module(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits.isnan().all()
    zeros = policy.module(
        inputs_embeds=torch.zeros(1, length, policy.module.config.hidden_size),
        position_ids=torch.arange(length)[None],
        attention_mask=torch.ones_like(tokens),
    )
    torch.testing.assert_close(policy.logits(tokens, ones(tokens)), zeros.logits, rtol=1e-5, atol=1e-5)
    prompts = Prompts.from_ids([given], pad_id=policy.pad_id, num_generations=2)
    rollout = Unmask(max_new_tokens=length, temperature=1.0)(policy, prompts, torch.Generator().manual_seed(0))
    scored = Trajectory().logprobs(policy, rollout, Trajectory().draw_views(rollout, torch.Generator()))
    torch.testing.assert_close(scored, rollout.logprobs, rtol=0, atol=1e-5)


def test_llada_rotates_in_fp32_whatever_its_dtype(tmp_path, monkeypatch):
    policy = load_policy(published(tmp_path, "llada", dtype=torch.bfloat16), dtype="auto")
    seen = []
    plain = rope.sdpa_attention_forward
    monkeypatch.setattr(
        rope,
        "sdpa_attention_forward",
        lambda m, q, k, v, *a, **kw: seen.append((m, q, k)) or plain(m, q, k, v, *a, **kw),
    )
    inputs = {}
    for name, layer in policy.module.named_modules():
        if name.endswith(("layers.0.self_attn.q_proj", "layers.0.self_attn.k_proj")):
            layer.register_forward_hook(lambda m, a, out, name=name[-6]: inputs.__setitem__(name, out))
    tokens = ids(30)
    policy.logits(tokens, ones(tokens))
    angle = torch.arange(30)[:, None] / 500000.0 ** (torch.arange(0, 8, 2) / 8)
    cos, sin = angle.cos().repeat(1, 2), angle.sin().repeat(1, 2)
    for name, got in zip("qk", seen[0][1:], strict=True):
        x = inputs[name].float().unflatten(-1, (-1, 8)).transpose(1, 2)
        turned = x * cos + torch.cat([-x[..., 4:], x[..., :4]], -1) * sin
        assert got.dtype == torch.bfloat16
        assert torch.equal(got, turned.bfloat16())


def test_fp32_rotation_changes_bf16_logits_only(tmp_path):
    tokens = ids(40)
    for dtype, same in ((torch.float32, True), (torch.bfloat16, False)):
        policy = load_policy(published(tmp_path / str(dtype), "llada", dtype=dtype), dtype="auto")
        stock = copy.copy(policy)
        stock.module = type(policy.module)(copy.deepcopy(policy.module.config)).to(dtype).eval()
        stock.module.set_attn_implementation("sdpa")
        stock.module.load_state_dict(policy.module.state_dict())
        assert torch.equal(policy.logits(tokens, ones(tokens)), stock.logits(tokens, ones(tokens))) == same


def test_block_size_can_be_chosen(tmp_path):
    folder = published(tmp_path, "sdar")
    assert load_policy(folder).spec.block_size == 4
    chosen = load_policy(folder, block_size=8)
    assert chosen.spec.block_size == 8
    chosen.save_pretrained(tmp_path / "saved")
    assert load_policy(tmp_path / "saved").spec.block_size == 8
    chosen.save_pretrained(tmp_path / "stock", stock=True)
    assert load_policy(tmp_path / "stock").spec.block_size == 8
    assert load_policy(tmp_path / "stock", block_size=2).spec.block_size == 2
    published_alike = published(tmp_path / "a2d", "a2d_qwen3")  # bd3lm and mdlm have the same config
    assert load_policy(published_alike, block_size=32).spec.attention == "block_causal"
    with pytest.raises(ValueError, match=r"block_size=8 is for block-causal models, but llada has full attention"):
        load_policy(published(tmp_path / "llada", "llada"), block_size=8)


def test_a_tokenizer_of_the_checkpoints_own_is_built_from_its_files(tmp_path):
    """As Dream's: vocab.json, merges.txt, and a class that only remote code has."""
    config, state = ORIGINAL["dream"]()
    folder = write(tmp_path, config | {"mask_token_id": 30}, state)
    (folder / "tokenizer.json").unlink()
    vocabulary = {chr(97 + i): i for i in range(26)} | {"ab": 26, "Ġ": 27}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\na b\n")
    special = {"28": {"content": "<|endoftext|>", "special": True}, "30": {"content": "<|mask|>", "special": True}}
    special |= {"29": {"content": "<|im_end|>", "special": True}}
    config = {
        "tokenizer_class": "DreamTokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_dream.DreamTokenizer", None]},
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "mask_token": "<|mask|>",
        "added_tokens_decoder": special,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    policy = load_policy(folder)
    encoded = policy.tokenizer("cab<|mask|>b<|im_end|>")["input_ids"]
    assert encoded == [2, 26, 30, 1, 29]
    assert policy.tokenizer.decode(encoded) == "cab<|mask|>b<|im_end|>"
    assert policy.spec.eos_ids == (2, 28, 29)  # the config's, the tokenizer's, the end of a turn
    assert policy.pad_id == 28
    policy.save_pretrained(tmp_path / "saved")
    assert load_policy(tmp_path / "saved").tokenizer("cab<|mask|>")["input_ids"] == [2, 26, 30]


@pytest.mark.parametrize("family", [family for family in families.FAMILIES if family.files.end_tokens])
def test_the_token_that_ends_a_turn_ends_a_completion(family):
    named, token = tokenizer(), {"llada": "<|eot_id|>", "llada_moe": "<|role_end|>", "llada2": "<|role_end|>"}
    named.add_tokens([token.get(family.name, "<|im_end|>")], special_tokens=True)
    config = SimpleNamespace(eos_token_id=2, vocab_size=40)
    assert find_eos_ids(config, named, family) == (2, 39)
    config.vocab_size = 39  # a token without a row of the embedding is never drawn
    assert find_eos_ids(config, named, family) == (2,)


def test_end_tokens_of_the_generation_config(tmp_path):
    folder = published(tmp_path, "llada")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 2, 400]}))
    assert load_policy(folder).spec.eos_ids == (2, 5)


def test_the_embedding_may_have_more_rows_than_the_vocabulary():
    raw, _ = llada()
    assert families.llada(raw | {"vocab_size": 37})[1].vocab_size == raw["embedding_size"] == 40
    assert families.llada(raw | {"embedding_size": None, "vocab_size": 37})[1].vocab_size == 37


def test_shared_experts_are_as_wide_as_all_of_them():
    raw, _ = llada2()
    module, config = families.llada2(raw | {"num_shared_experts": 2})
    with torch.device("meta"):
        layer = module(config).model.layers[1]
    assert layer.mlp.shared_experts.gate_proj.weight.shape == (2 * raw["moe_intermediate_size"], raw["hidden_size"])


def test_dense_and_expert_layers_of_llada_moe_have_their_own_width():
    raw, _ = llada_moe(moe_layer_freq=[0] + [1] * (LAYERS - 1))
    _, config = families.llada_moe(raw)
    assert (config.intermediate_size, config.moe_intermediate_size, config.mlp_only_layers) == (48, 24, [0])
    _, config = families.llada_moe(raw | {"dense_intermediate_size": None})
    assert config.intermediate_size == 24


def test_another_class_name_in_a_known_layout_is_three_lines(tmp_path, monkeypatch):
    """docs/extend-model.md: a LLaDA of one's own, with another mask token."""
    config, state = ORIGINAL["llada"]()
    folder = write(tmp_path, config | {"architectures": ["MyDiffusionLM"], "mask_token_id": 7}, state)
    with pytest.raises(ValueError, match="MyDiffusionLM"):
        load_policy(folder)
    monkeypatch.setattr(families, "FAMILIES", list(families.FAMILIES))
    register_family(
        replace(families.LLADA, name="mine", files=replace(families.LLADA.files, architectures=("MyDiffusionLM",)))
    )
    mine, published_one = load_policy(folder), load_policy(published(tmp_path / "own", "llada"))
    assert mine.spec.mask_id == 7
    tokens = ids(6)
    assert torch.equal(mine.logits(tokens, ones(tokens)), published_one.logits(tokens, ones(tokens)))
