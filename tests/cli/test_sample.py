"""Watching completions: plain data, the terminal's view, the command."""

import io
import json
from dataclasses import replace

import pytest
import torch
from rich.console import Console
from tiny_recipe import SIZES

from dllm_rl.cli import main as cli
from dllm_rl.cli import sample
from dllm_rl.decoding.prompts import encode
from dllm_rl.decoding.texts import written_logprobs, written_tokens
from dllm_rl.models.tiny import tiny_diffusion_gemma, tiny_llama, tiny_masked_lm
from dllm_rl.rng import generator_for
from dllm_rl.samplers import Renoise, Unmask
from dllm_rl.samplers.sampler import FunctionSampler
from dllm_rl.samplers.with_settings import sampler_with
from dllm_rl.tasks.base import Problem
from dllm_rl.types.rollouts import Rollout


@pytest.fixture(scope="module")
def policy():
    return tiny_masked_lm(**SIZES | {"characters": "1234.=<>&"}, head_std=0.3)


@pytest.fixture(scope="module")
def checkpoint(policy, tmp_path_factory):
    directory = tmp_path_factory.mktemp("checkpoint")
    policy.save_pretrained(directory)
    return str(directory)


def rollout_by_hand() -> Rollout:
    """Ids of char_tokenizer("1234.=<>&"): "1" is 3, "2" is 4, "<" is 9; <pad> 0, <mask> 1, <eos> 2. Prompt "12";
    the completion "<", masked, "1", with steps 1, none, 0."""
    return Rollout(
        tokens=torch.tensor([[3, 4, 9, 1, 3]]),
        attention_mask=torch.ones(1, 5, dtype=torch.bool),
        completion_mask=torch.tensor([[False, False, True, False, True]]),
        unmask_step=torch.tensor([[-1, -1, 1, -1, 0]]),
        logprobs=torch.tensor([[0.0, 0.0, 0.5, 0.0, 0.25]]).clamp(min=1e-9).log()
        * torch.tensor([[0.0, 0.0, 1.0, 0.0, 1.0]]),
        group=torch.arange(1),
        forwards=2,
    )


def test_tell_by_hand(policy):
    record = sample.to_record(policy, rollout_by_hand(), ["12"], seconds=0.5)
    (row,) = record["rows"]
    assert (row["prompt"], row["completion"]) == ("12", "<1")
    assert [(t["text"], t["step"], round(t["probability"], 6)) for t in row["tokens"]] == [
        ("<", 1, 0.5),
        ("<mask>", -1, 1.0),
        ("1", 0, 0.25),
    ]
    assert (record["num_tokens"], record["forwards"], record["tokens_per_second"]) == (2, 2, 4.0)


def test_a_rate_is_of_tokens_and_nothing_is_fresh_after_a_step_that_wrote_nothing(policy):
    later = replace(rollout_by_hand(), forwards=3)
    assert sample.to_record(policy, later, ["12"], seconds=0.5)["tokens_per_second"] == 4.0
    console = Console(record=True, width=40, force_terminal=True, color_system="truecolor")
    console.print(sample.render(policy, later, ["12"]))
    assert "\x1b[2m12\x1b[0m<\x1b[2m░\x1b[0m1" in console.export_text(styles=True)


def test_frame_dims_what_is_masked_and_lights_what_is_fresh(policy):
    console = Console(record=True, width=40, force_terminal=True, color_system="truecolor")
    console.print(sample.render(policy, rollout_by_hand(), ["12"]))
    text = console.export_text(styles=True)
    assert "\x1b[2m12\x1b[0m\x1b[1;93m<\x1b[0m\x1b[2m░\x1b[0m1" in text
    assert "step 2, 1 masked" in text


def test_command_prints_json(checkpoint, capsys):
    assert (
        cli.main(["sample", checkpoint, "12.=", "3=", "--json", "--diffusion_steps", "4", "--max_new_tokens", "8"]) == 0
    )
    record = json.loads(capsys.readouterr().out)
    assert [row["prompt"] for row in record["rows"]] == ["12.=", "3="] and record["forwards"] == 4
    for row in record["rows"]:
        assert sorted(t["step"] for t in row["tokens"]) == [0, 0, 1, 1, 2, 2, 3, 3]


def test_completions_of_a_prompt_stand_together_and_follow_the_seed(checkpoint, capsys):
    def rows(seed):
        options = ["--json", "--num_generations", "2", "--max_new_tokens", "8", "--temperature", "1", "--seed", seed]
        assert cli.main(["sample", checkpoint, "12.=", "3=", *options]) == 0
        return json.loads(capsys.readouterr().out)["rows"]

    first, again, other = rows("1"), rows("1"), rows("2")
    assert [row["prompt"] for row in first] == ["12.=", "12.=", "3=", "3="]
    assert first == again and first != other


def test_command_prints_text_and_its_record_says_what_made_it(checkpoint, capsys):
    options = [
        "--temperature",
        "1",
        "--rank",
        "Confidence",
        "--commit",
        "Threshold",
        "--commit.tau",
        "0.5",
        "--cache",
        "DualCache",
    ]
    options += ["--cache.refresh", "2", "--block_size", "4", "--num_generations", "2", "--max_new_tokens", "8"]
    assert cli.main(["sample", checkpoint, "12.=", *options]) == 0
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 2 and "tokens/s" in err
    assert cli.main(["sample", checkpoint, "12.=", *options, "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert (record["checkpoint"], record["seed"], record["dtype"]) == (checkpoint, 0, "float32")
    assert "temperature=1.0" in record["sampler"] and "rank=Confidence()" in record["sampler"]
    assert "commit=Threshold(tau=0.5), cache=DualCache(refresh=2)" in record["sampler"]


def test_prompts_may_stand_on_both_sides_of_an_option(checkpoint, capsys):
    assert cli.main(["sample", checkpoint, "12.=", "--no_live", "21.=", "1.2=", "--max_new_tokens", "4"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 3
    with pytest.raises(SystemExit):
        cli.main(["sample", checkpoint, "--no_live", "12.=", "--no_such"])
    assert "unrecognized arguments: 12.= --no_such" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["stop", checkpoint, "12.="])
    assert "unrecognized arguments: 12.=" in capsys.readouterr().err


def test_command_draws_every_step(checkpoint, capsys):
    from dllm_rl.models.load import load_policy

    sample.sample_problems(load_policy(checkpoint), [Problem("12.=")], Unmask(max_new_tokens=4), seconds_per_step=0.0)
    out = capsys.readouterr().out
    assert "step 4, 0 masked" in out and "░" not in out.splitlines()[0]


def test_prompts_that_are_no_text_are_named(checkpoint, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"12\n\xff\n"), encoding="utf-8"))
    assert cli.main(["sample", checkpoint]) == 2
    assert capsys.readouterr().err == "error: standard input is not utf-8 at byte 3; convert the prompts\n"


@pytest.mark.parametrize("raw", [b"12=\r\n34=\r\n", b"12=\n34=", b"12=\r34=\r", b"\xef\xbb\xbf12=\r\n34="], ids=repr)
def test_line_ends_are_no_part_of_a_prompt(checkpoint, capsys, monkeypatch, raw):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(raw), encoding="utf-8", newline="\n"))  # as Python's
    assert cli.main(["sample", checkpoint, "--max_new_tokens", "2", "--json"]) == 0
    assert [row["prompt"] for row in json.loads(capsys.readouterr().out)["rows"]] == ["12=", "34="]


def test_a_causal_model_has_no_unmasking_options():
    with pytest.raises(ValueError, match="diffusion_steps=2 is not a setting of Autoregress"):
        policy = tiny_llama(characters="ab", causal=True)
        sampler_with(policy, None, {"max_new_tokens": 4, "diffusion_steps": 2})


def test_chat_asks_with_the_models_template(capsys):
    policy = tiny_masked_lm(**SIZES | {"characters": "1234.=<>user"})
    policy.tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<.>{% endif %}"
    )
    asked = {}

    def sampler(policy, prompts, generator, **options):
        asked["ids"] = prompts.tokens.tolist()
        return rollout_by_hand()

    own = FunctionSampler(function=sampler, max_new_tokens=3)
    sample.sample_problems(policy, [sample.to_problem("12=", chat=True, blank=None)], own)
    assert asked["ids"] == [policy.tokenizer.encode("<user>12=<.>", add_special_tokens=False)]
    with pytest.raises(ValueError, match="no chat template"):
        sample.sample_problems(tiny_masked_lm(**SIZES), [sample.to_problem("1", chat=True, blank=None)], own)


@pytest.mark.repeated(first_only=True)
@pytest.mark.parametrize(
    ("commit", "rank"),
    [
        ("Remask --commit.eta 0.2", "RandomOrder"),
        ("Origin", "RandomOrder"),
        ("EntropyBound --commit.gamma 0.5", "Entropy"),
    ],
)
def test_a_rule_gets_the_scores_that_it_is_made_for_unless_another_rank_is_asked_for(checkpoint, capsys, commit, rank):
    """The rules' docstrings say which: uniforms for Remask and Origin, entropies for EntropyBound."""

    def rows(*ranks):
        options = ["--commit", *commit.split(), *ranks, "--json", "--max_new_tokens", "8", "--temperature", "1"]
        assert cli.main(["sample", checkpoint, "12.=", *options]) == 0
        return json.loads(capsys.readouterr().out)["rows"]

    assert rows() == rows("--rank", rank)
    wrong = ["--commit", *commit.split(), "--rank", "MaxProb"]
    assert cli.main(["sample", checkpoint, "12.=", *wrong]) == 2
    assert f"(...) needs the scores of {rank}(), and rank=MaxProb has other scores" in capsys.readouterr().err


@pytest.mark.slow
def test_a_live_display_shows_prompts_whose_turn_has_not_come(capsys):
    """`Renoise` samples prompts of like lengths together: the rows of a later call have no tokens at first."""
    pytest.importorskip("transformers.models.diffusion_gemma", reason="this transformers has no DiffusionGemma")
    policy = tiny_diffusion_gemma(characters="123=", canvas_length=4, max_length=512)
    prompts = [Problem("1="), Problem("2" * 300 + "=")]
    record = sample.sample_problems(policy, prompts, Renoise(max_new_tokens=4), seconds_per_step=0.0)
    assert len(record["rows"]) == 2 and "masked" in capsys.readouterr().out


def test_a_token_that_was_not_drawn_has_no_probability():
    """An answer of DiffusionGemma's likeliest tokens: a drawn token has the probability of its draw, not of all."""
    pytest.importorskip("transformers.models.diffusion_gemma", reason="this transformers has no DiffusionGemma")
    policy = tiny_diffusion_gemma(characters="0123456789+=", canvas_length=8)
    prompts = encode(policy, [Problem("1+2="), Problem("3+4=")], seeds=[1, 2])
    rollout = Renoise(max_new_tokens=16, diffusion_steps=8)(policy, prompts, generator_for(3))
    found = written_logprobs(rollout)[rollout.completion_mask]
    recorded = (rollout.renoised.drawn, rollout.renoised.logprobs, rollout.tokens)
    drawn, logprobs, tokens = (values[rollout.completion_mask] for values in recorded)
    for value, draws, each, token in zip(found, drawn, logprobs, tokens, strict=True):
        accepted = [step for step in range(len(draws)) if draws[step] >= 0]
        if accepted and draws[accepted[-1]] == token:
            assert value == each[accepted[-1]] < 0
        else:
            assert value.isnan()
    assert found.isnan().any() and not found.isnan().all()
    rows = written_tokens(policy, rollout)
    assert {token["probability"] is None for row in rows for token in row} == {True, False}
