"""Checkpoints that would hang, read outside their folder, or answer noise: each is refused in one line."""

import json

import pytest
import torch
from refusals import refuses
from safetensors.torch import load_file, save_file
from small_checkpoints import SIZES, edit
from sorting import Mini
from transformers import PreTrainedModel

from dllm_rl import load_policy
from dllm_rl.decoding.prompts import prompt_ids
from dllm_rl.evaluation.evaluate import evaluate
from dllm_rl.models.checkpoint import loading
from dllm_rl.models.checkpoint.loading import load_config
from dllm_rl.models.load import load_weights
from dllm_rl.models.merge import merged_state_dict
from dllm_rl.models.tiny import tiny_llama, tiny_masked_lm
from dllm_rl.rng import generator_for
from dllm_rl.samplers import Autoregress, Unmask
from dllm_rl.types.rollouts import Prompts


@pytest.mark.parametrize("number", [10**7, -1, "many", 1.5])
def test_a_number_of_layers_that_no_tensors_hold_is_refused_in_one_line(folder, number):
    edit(folder, num_hidden_layers=number)
    with pytest.raises(ValueError) as said:
        load_policy(folder)
    assert "\n" not in str(said.value) and str(folder) in str(said.value)


def test_layers_beyond_any_model_are_refused_before_one_is_built_from_a_config_alone(folder):
    """What --dry_run makes. Building ten million layers would never end."""
    edit(folder, num_hidden_layers=10**7)
    refuses(r"num_hidden_layers=1e\+07 is more than 1000000; correct config\.json", lambda: load_config(folder))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("hidden_size", 10**9),
        ("hidden_size", -5),
        ("vocab_size", 10**12),
        ("intermediate_size", 10**10),
        ("num_attention_heads", 0),
        ("hidden_act", "no such function"),
        ("is_causal", "x"),
    ],
)
def test_a_config_that_the_tensors_cannot_have_is_refused_in_one_line(folder, field, value):
    edit(folder, **{field: value})
    with pytest.raises(ValueError, match=r"checkpoint: damaged, or not the model that its config\.json") as said:
        load_policy(folder)
    assert "\n" not in str(said.value)


def test_positions_are_not_counted_from_outside_the_vocabulary(tmp_path):
    tiny_masked_lm(**SIZES).save_pretrained(tmp_path)
    edit(tmp_path, pad_token_id=-5)
    refuses("pad_token_id=-5 is outside the vocabulary", lambda: load_policy(tmp_path))


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("num_labels", 30_000_000, r"num_labels=3e\+07 is more than 1000000"),
        ("num_labels", 10**11, "is more than 1000000"),
        ("layer_norm_eps", float("nan"), "layer_norm_eps=nan is not finite"),
        ("rms_norm_eps", float("inf"), "rms_norm_eps=inf is not finite"),
        ("rope_parameters", {"long_factor": [1.0, float("nan")]}, "long_factor=nan is not finite"),
    ],
)
def test_numbers_of_a_config_are_bounded_before_a_model_is_made(folder, field, value, said, monkeypatch):
    """transformers would make a list of 30 million labels; a NaN would be computed with, in silence."""
    monkeypatch.setattr(loading, "class_and_config", lambda *_: pytest.fail("a config would be made"))
    edit(folder, **{field: value})
    refuses(f"{said}; correct config", lambda: load_policy(folder))


def test_a_list_may_have_no_upper_end(folder):
    edit(folder, time_step_limit=[0.0, float("inf")])
    load_policy(folder)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.complex64, torch.float8_e4m3fn])
@pytest.mark.parametrize("which", [slice(None), slice(1)])
def test_weights_are_not_cast_from_what_they_cannot_be(folder, dtype, which):
    state = load_file(folder / "model.safetensors")
    for name in sorted(state)[which]:
        state[name] = state[name].to(dtype)
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    refuses(r"has dtype \w+, but weights have F64, F32, F16, BF16; convert it", lambda: load_policy(folder))


def test_weights_of_a_custom_module_are_not_cast_either(tmp_path):
    policy = tiny_masked_lm(**SIZES)
    save_file(
        {name: x.detach().long() for name, x in merged_state_dict(policy.module).items()},
        tmp_path / "model.safetensors",
    )
    refuses("do not fit", lambda: load_weights(policy, tmp_path))


def test_a_table_of_positions_may_be_of_integers(tmp_path):
    """Older checkpoints of BERT have one, which is no weight."""
    tiny_masked_lm(**SIZES).save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    state["roberta_prelayernorm.embeddings.position_ids"] = torch.arange(9)[None]
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    load_policy(tmp_path)


@pytest.mark.parametrize("number", [500, 2**31, 2**32 - 1])
def test_an_id_outside_the_vocabulary_is_refused_where_it_is_met(folder, number):
    file = folder / "tokenizer.json"
    fields = json.loads(file.read_text())
    fields["model"]["vocab"]["1"] = number
    file.write_text(json.dumps(fields))
    policy = load_policy(folder)
    # Older versions of tokenizers cannot read the largest id themselves.
    said = f"the tokenizer gives the id {number}, outside the vocabulary of|WordLevel error: Missing"
    refuses(rf"'1\+1='.*({said})", lambda: prompt_ids(policy, "1+1="))


def test_padding_outside_the_vocabulary_is_refused(folder):
    tokenizer = load_policy(folder).tokenizer
    tokenizer.add_special_tokens({"pad_token": "<none>"})
    tokenizer.save_pretrained(folder)
    refuses(r"pad_token_id=15 is outside the vocabulary of 15 tokens; set its pad_token", lambda: load_policy(folder))


@pytest.mark.parametrize("field", ["intermediate_size", "vocab_size"])
def test_memory_is_not_taken_for_more_than_the_files_hold(folder, field, monkeypatch):
    """A machine with room for it would go on to fill it; one without raises when it asks for it."""
    monkeypatch.setattr(PreTrainedModel, "from_pretrained", lambda *a, **k: pytest.fail("memory would be taken"))
    edit(folder, **{field: 10**7})
    refuses(r"config.json describes [\d,]+ parameters, but the files have [\d,]+ numbers", lambda: load_policy(folder))


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
@pytest.mark.parametrize("content", [b"", b"[1, 2", b"[]", b"\xff" * 9, (2**62).to_bytes(8, "little") + b"{}"])
def test_a_file_that_is_something_else_is_refused_in_one_line(folder, name, content):
    (folder / name).write_bytes(content)
    with pytest.raises(ValueError) as said:
        load_policy(folder)
    assert "\n" not in str(said.value) and str(folder) in str(said.value)


def test_what_the_tokenizers_library_cannot_read_is_refused_in_one_line(folder):
    file = folder / "tokenizer.json"
    fields = json.loads(file.read_text()) | {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "*"}}}
    file.write_text(json.dumps(fields))
    refuses(r"damaged, or not the model|the tokenizer was tried on short texts: Exception", lambda: load_policy(folder))


def test_pickled_weights_are_not_run(folder, tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "written"), "w"))

    (folder / "model.safetensors").unlink()
    torch.save({"w": Evil()}, folder / "pytorch_model.bin")
    refuses(r"UnpicklingError|no file named", lambda: load_policy(folder))
    assert not (tmp_path / "written").exists()


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_are_refused(folder, number):
    state = load_file(folder / "model.safetensors")
    name = sorted(state)[-1]
    state[name].view(-1)[-1] = number
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    refuses(rf"{name} has NaN or infinite numbers; the checkpoint is damaged", lambda: load_policy(folder))


def test_a_model_that_computes_nan_is_not_evaluated():
    policy = tiny_masked_lm(**SIZES)
    with torch.no_grad():
        for parameter in policy.module.parameters():
            parameter.fill_(1e30)  # finite, but nothing that it computes is
    refuses("log-probabilities are not finite", lambda: evaluate(policy, Mini(), Unmask(max_new_tokens=2), limit=2))


@pytest.mark.parametrize("causal", [False, True])
def test_suppressed_tokens(causal):
    policy, sampler = tiny_llama(causal=causal, **SIZES), Autoregress if causal else Unmask
    prompts = Prompts.from_ids([[3, 4]], pad_id=0)

    def sample(suppress):
        return sampler(max_new_tokens=2, temperature=1.0, suppress=suppress)(policy, prompts, generator_for(0))

    refuses(f"suppress .* all {policy.vocab_size} tokens", lambda: sample(tuple(range(policy.vocab_size))))
    refuses("suppress=99 is not one of the 15 token ids", lambda: sample((99,)))
    left = {5} if causal else {5, policy.spec.mask_id}
    rollout = sample(tuple(set(range(policy.vocab_size)) - left))
    assert rollout.tokens[0, 2:].tolist() == [5, 5]
