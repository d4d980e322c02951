"""`dllm-rl doctor MODEL`: a trained model is ok in every section, and each mistake is named in its section's lines."""

import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from layouts import checkpoint
from own_module import own_policy
from safetensors.torch import load_file, save_file
from small_checkpoints import edit
from text_model import text_policy, word_tokenizer

from dllm_rl import load_policy
from dllm_rl.cli.main import main
from dllm_rl.doctor import learning, rollouts, subject
from dllm_rl.doctor import model as check
from dllm_rl.doctor.model import SECTIONS, check_model
from dllm_rl.doctor.rollouts import judge_schemes, verdict_of
from dllm_rl.doctor.text import Scores, judge, mask_candidates
from dllm_rl.models.checkpoint.adapters import adapter_state, save_adapter
from dllm_rl.models.checkpoint.loading import digest_of_checkpoint
from dllm_rl.models.lora import add_lora
from dllm_rl.models.lora_settings import Lora
from dllm_rl.quantization.schemes import Int4WeightOnly


@pytest.fixture(autouse=True)
def short_completions(monkeypatch):
    monkeypatch.setattr(subject, "NEW_TOKENS", 8)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The checkpoint of a tiny diffusion model that knows the paragraph."""
    folder = tmp_path_factory.mktemp("trained")
    text_policy().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def trained_causal(tmp_path_factory):
    """The checkpoint of a tiny autoregressive model, whose head is tied to its embedding; it knows the chat, too."""
    folder = tmp_path_factory.mktemp("causal")
    text_policy(causal=True, tied=True).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(trained, tmp_path):
    """A copy of the diffusion model, to be damaged."""
    return shutil.copytree(trained, tmp_path / "model")


@pytest.fixture
def causal_folder(trained_causal, tmp_path):
    return shutil.copytree(trained_causal, tmp_path / "causal")


def checked(folder, *sections, **options):
    """Return {section: (verdict, all that is shown)}."""
    results = check_model(lambda: load_policy(folder, dtype="auto"), sections, say=lambda line: None, **options)
    findings = {result.name: result.finding for result in results}
    return {name: (each.verdict, " ".join((each.line, each.advice, *each.shown))) for name, each in findings.items()}


def rewrite(folder, change):
    """Change the tensors of a checkpoint: `change` gets them by name."""
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file({name: x.contiguous() for name, x in state.items()}, folder / "model.safetensors", {"format": "pt"})


def test_a_trained_model_is_ok_in_every_section(trained, tmp_path, capsys):
    output = tmp_path / "report.json"
    assert main(["doctor", str(trained), "--output", str(output), "--quantization", "Int8WeightOnly"]) == 0
    shown = capsys.readouterr().out
    found = json.loads(output.read_text())
    assert {each["name"]: each["verdict"] for each in found["sections"]} == dict.fromkeys(("load", *SECTIONS), "ok")
    numbers = {each["name"]: each["numbers"] for each in found["sections"]}
    assert numbers["text"]["accuracy"] > 0.25 > 0.1 > numbers["text"]["accuracy_shuffled"]
    assert numbers["quantized"]["schemes"]["Int8WeightOnly"]["ess_tokens"] > 0.99
    assert numbers["step"]["grad_norm"] > 0 and "What is 17 + 25 ?" in shown
    for private in ("trained", "<mask>", "<eos>", "planet", "river", str(tmp_path.parent)):
        assert private not in json.dumps(found | {"sections": [each | {"name": ""} for each in found["sections"]]})


def test_wrong_mask_token(folder):
    edit(folder, mask_token_id=5)
    assert "the tokenizer's mask token '<mask>' is 1" in checked(folder, "text")["load"][1]
    word_tokenizer(mask_token=None, chat_template=None).save_pretrained(folder)
    verdict, shown = checked(folder, "text")["text"]
    assert verdict == "wrong" and "the mask token is not 5 but 1, '<mask>'" in shown


def test_wrong_shift(folder):
    edit(folder, shifted_head=True)
    verdict, shown = checked(folder, "text")["text"]
    assert verdict == "wrong" and "shift=True of this family is wrong for these weights" in shown


def test_causal_attention(folder):
    edit(folder, is_causal=True)
    verdict, shown = checked(folder, "text")["text"]
    assert verdict == "wrong" and "the attention is causal, and these weights predict text better with full" in shown


def test_a_tied_head_that_is_lost(causal_folder):
    edit(causal_folder, tie_word_embeddings=False)
    verdict, shown = checked(causal_folder, "text")["load"]
    assert verdict == "wrong" and "lm_head.weight" in shown

    def new_head(state):
        shape = state["model.embed_tokens.weight"].shape
        state["lm_head.weight"] = 0.02 * torch.randn(shape, generator=torch.Generator().manual_seed(0))

    rewrite(causal_folder, new_head)
    found = checked(causal_folder, "text")
    verdict, shown = found["text"]
    assert found["load"][0] == "ok" and verdict == "wrong" and "set tie_word_embeddings to true" in shown


def test_an_update_that_reaches_no_weight_of_the_copy(trained, monkeypatch):
    """Then the copy is that of the learner, and says nothing about the sync."""
    monkeypatch.setattr(learning, "made_up_update", lambda learner, *_: None)
    verdict, shown = checked(trained, "sync")["sync"]
    assert verdict == "wrong" and "the update did not reach the copy" in shown


def test_a_quantized_copy_that_is_not_synced(trained, monkeypatch):
    monkeypatch.setattr(learning, "sync_weights", lambda learner, copy: {})
    verdict, shown = checked(trained, "sync")["sync"]
    assert verdict == "wrong" and "the update did not reach the copy" in shown


def test_a_layer_with_nan(folder):
    def spoil(state):
        state["model.layers.0.mlp.up_proj.weight"][3, 4] = torch.nan

    rewrite(folder, spoil)
    found = checked(folder, "text", output=folder / "report.json")
    verdict, shown = found["load"]
    assert verdict == "wrong" and "model.layers.0.mlp.up_proj.weight" in shown and "text" not in found
    (section,) = json.loads((folder / "report.json").read_text())["sections"]
    assert section["reason"] == "error" and section["numbers"]["error"] == "ValueError"
    assert section["numbers"]["place"].startswith("dllm_rl.models.checkpoint.loading:")
    assert str(folder) not in json.dumps(section)


def test_adapters_on_another_base(causal_folder, tmp_path):
    policy = load_policy(causal_folder)
    add_lora(policy, Lora(r=2))
    adapters = tmp_path / "adapters"
    save_adapter(policy, adapters, base=str(causal_folder), base_digest=digest_of_checkpoint(causal_folder))
    assert checked(adapters)["load"][0] == "ok"
    rewrite(causal_folder, lambda state: state["model.norm.weight"].mul_(1.5))
    verdict, shown = checked(adapters)["load"]
    assert verdict == "wrong" and "are not those on which the adapters" in shown


def test_the_tokenizer_of_another_model(causal_folder):
    word_tokenizer(reverse=True).save_pretrained(causal_folder)
    verdict, shown = checked(causal_folder, "text")["text"]
    assert verdict == "wrong" and "put the tokenizer of this model into its folder" in shown


def test_a_resume_that_loses_a_bit(tmp_path, monkeypatch):
    load = learning.load_adapter

    def lossy(policy, folder):
        load(policy, folder)
        next(iter(adapter_state(policy).values())).view(-1)[0].add_(1)

    folder = checkpoint(tmp_path / "llada", "llada")
    monkeypatch.setattr(learning, "load_adapter", lossy)
    verdict, shown = checked(folder, "resume")["resume"]
    assert verdict == "wrong" and "these differ: adapters, logits" in shown


def test_logits_that_depend_on_the_batch(tmp_path):
    policy = load_policy(checkpoint(tmp_path / "llada", "llada"))
    encode = policy.spec.encode
    shaky = lambda module, tokens, *rest: encode(module, tokens, *rest) * (1.1 if len(tokens) > 4 else 1)  # noqa: E731
    policy.spec = replace(policy.spec, encode=shaky)
    *_, result = check_model(lambda: policy, ("batch",), say=lambda line: None)
    assert result.finding.verdict == "look" and result.finding.numbers["share_outside"] > 0.1
    assert "zero_mismatch" in result.finding.advice


LAYOUTS = [
    "llada",
    "illada",
    "llada_moe",
    "dream",
    "rnd1",
    "a2d_qwen3",
    "sdar",
    "stable_diffcoder",
    "nemotron",
    "llada2",
]


@pytest.mark.repeated(first_only=True)
@pytest.mark.parametrize("family", LAYOUTS)
def test_every_layout_passes(family, tmp_path):
    """Random weights: nothing is wrong, and nothing says that the model knows a text."""
    sections = [name for name in SECTIONS if name != "quantized"]
    found = checked(checkpoint(tmp_path / family, family), *sections)
    assert {name: verdict for name, (verdict, _) in found.items()} == {
        **dict.fromkeys(("load", *sections), "ok"),
        "text": "look",
    }


@pytest.mark.slow
def test_random_weights_with_a_tokenizer_of_english_are_not_ok(folder):
    def forget(state):
        for number, (name, x) in enumerate(sorted(state.items())):
            if x.dim() > 1:
                state[name] = 0.02 * torch.randn(x.shape, generator=torch.Generator().manual_seed(number))

    rewrite(folder, forget)
    verdict, shown = checked(folder, "text")["text"]
    assert verdict == "look" and "it tells neither this text nor its own completions from shuffled ones" in shown


@pytest.mark.slow
def test_four_bits_are_measured_and_named(trained):
    verdict, shown = checked(trained, "quantized", schemes=[Int4WeightOnly(group_size=64)])["quantized"]
    assert verdict == "look" and "low ESS: Int4WeightOnly" in shown
    assert "many denoising steps: --sampler.rank RandomOrder" in shown and "down_proj" in shown


def test_verdicts_on_schemes_by_hand():
    found = {"Float8WeightOnly": "ok", "Int8Dynamic": "look", "Int4WeightOnly": "look", "Int4Packed": "not run"}
    finding = judge_schemes({name: {"verdict": verdict} for name, verdict in found.items()}, {}, (), "full")
    assert finding.verdict == "look"
    assert finding.line == "as the model: Float8WeightOnly; low ESS: Int8Dynamic, Int4WeightOnly"
    assert "take Float8WeightOnly, or sample unquantized" in finding.advice
    assert "if you need Int4WeightOnly, compare" in finding.advice
    assert "if you need Int8Dynamic, train" in finding.advice
    causal = judge_schemes({"NVFP4": {"verdict": "look"}}, {}, (), "causal")
    assert "RandomOrder" not in causal.advice and "--corrector TIS" in causal.advice
    assert judge_schemes({"Float8WeightOnly": {"verdict": "wrong"}}, {}, (), "full").verdict == "wrong"
    fine = judge_schemes({"Float8WeightOnly": {"verdict": "ok"}}, {}, (), "full")
    assert fine == rollouts.Finding("ok", "as the model: Float8WeightOnly")
    assert judge_schemes({"Int4Packed": {"verdict": "not run"}}, {}, (), "full").verdict == "look"


def test_the_mask_is_sought_among_special_tokens():
    names = {"mask": 3, " masked": 4, "_mask": 5, "(mask": 6, "[MASK]": 7, "<eos>": 8, "<|mdm_mask|>": 90, "<mask>": 99}
    tokenizer = SimpleNamespace(mask_token_id=None, get_vocab=lambda: names)
    policy = SimpleNamespace(tokenizer=tokenizer, vocab_size=91, spec=SimpleNamespace(mask_id=None))
    assert mask_candidates(policy) == [90, 7]
    policy.spec.mask_id, tokenizer.mask_token_id = 7, 5
    assert mask_candidates(policy) == [5, 90]


@pytest.mark.parametrize(
    ("text", "shuffled", "own_gain", "verdict"),
    [
        (Scores(0.6, -1.5), Scores(0.1, -8.0), None, "ok"),
        (Scores(0.15, -4.0), Scores(0.1, -8.0), None, "look"),
        (Scores(0.01, -8.0), Scores(0.01, -8.1), 3.0, "wrong"),
        (Scores(0.01, -11.7), Scores(0.01, -11.8), 0.0, "look"),
    ],
)
def test_verdicts_on_a_text_by_hand(text, shuffled, own_gain, verdict):
    assert judge(text, shuffled, own_gain).verdict == verdict


def test_a_failed_section_hides_no_other_and_an_interrupt_keeps_what_is_known(trained, tmp_path, monkeypatch, capsys):
    def full(subject):
        raise torch.OutOfMemoryError("out of memory at \x1b[31m/home/me")

    def interrupted(subject):
        raise KeyboardInterrupt

    monkeypatch.setitem(check.SECTIONS, "text", full)
    monkeypatch.setitem(check.SECTIONS, "sync", interrupted)
    output = tmp_path / "report.json"
    words = ["--sections", "sync", "text", "resume", "batch", "--output", str(output)]
    assert main(["doctor", str(trained), *words]) == 130
    shown = capsys.readouterr().out
    assert "\nwrong  text       out of memory at ␛[31m" in shown and "\x1b" not in shown
    assert "\nok     batch" in shown and "interrupted in sync" in shown and "resume" not in shown
    sections = json.loads(output.read_text())["sections"]
    assert [(each["name"], each["verdict"]) for each in sections] == [
        ("load", "ok"),
        ("text", "wrong"),
        ("batch", "ok"),
    ]
    assert sections[1]["numbers"]["error"] == "OutOfMemoryError" and "/home" not in output.read_text()


def test_a_module_with_fewer_positions_than_its_spec_says_fails_in_its_section_alone(monkeypatch):
    monkeypatch.setattr(subject, "NEW_TOKENS", 40)

    def make():
        policy = own_policy()
        policy.spec = replace(policy.spec, max_length=None)  # the module has 40, and a prompt takes 8
        return policy

    lines = []
    results = check_model(make, ("sampler", "resume"), say=lines.append)
    assert [each.finding.verdict for each in results] == ["ok", "wrong", "ok"]
    assert any("compare vocab_size and max_length of its spec" in line for line in lines)


def test_names_of_ones_own_code_stay_out_of_the_report(tmp_path):
    output = tmp_path / "report.json"
    check_model(
        own_policy, ("quantized",), output=output, say=lambda line: None, schemes=[Int4WeightOnly(group_size=8)]
    )
    found = json.loads(output.read_text())
    assert found["model"] == {"class": "own"} and found["sections"][1]["verdict"] in ("ok", "look")
    assert "blocks." not in output.read_text() and "Own" not in output.read_text()


@pytest.mark.parametrize(
    ("tokens", "completions", "verdict"), [(0.97, 0.8, "ok"), (0.97, 0.5, "look"), (0.9, 0.8, "look")]
)
def test_both_effective_sample_sizes_must_be_high(tokens, completions, verdict):
    assert verdict_of(tokens, completions) == verdict
