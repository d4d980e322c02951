"""Supervised fine-tuning against enumeration of masks, transformers' own loss, and rows that stand alone."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path

import pytest
import torch
from own_module import own_policy
from runs import assert_same_weights, metrics_of
from tiny_recipe import SIZES, tiny_recipe

from dllm_rl.algorithms.optimizers import linear_decay
from dllm_rl.cli.report import report_command
from dllm_rl.cli.run_recipe import main
from dllm_rl.config import from_command_line
from dllm_rl.distributed.collectives import make_accelerator
from dllm_rl.models.base import encode_block_causal
from dllm_rl.models.lora import lora_d1
from dllm_rl.models.policy import load_policy
from dllm_rl.models.tiny import tiny_llama, tiny_masked_lm
from dllm_rl.supervised.examples import (
    Shown,
    check_packing,
    example,
    hidden_states,
    lay_out,
    pack,
    read_examples,
    show,
    weighted_loss,
)
from dllm_rl.supervised.recipe import SFT
from dllm_rl.supervised.train import add_gradients, fine_tune, held_out_loss, read_datasets, rows_of_step, sft
from dllm_rl.training.loop import train

ROOT = Path(__file__).parents[2]
PAD, MASK, EOS, ONE, TWO, THREE, FOUR, DOT, EQUALS = range(9)
ROWS = [{"prompt": f"{a}{b}=", "completion": f"{b}{a}"[: 1 + (a < b)]} for a, b in product("1234", repeat=2)]
CHAT = "{% for m in messages %}{{ '' if m.role == 'user' else '=' }}{{ m.content }}<eos>.{% endfor %}"
CHAT += "{% if add_generation_prompt %}={% endif %}"


def tiny_sft(directory=None, **changes):
    base = SFT(
        name="tiny",
        model=partial(tiny_masked_lm, **SIZES),
        dataset=ROWS,
        train_batch_size=4,
        num_steps=4,
        max_length=16,
        output_dir=None if directory is None else str(directory),
        report_to=None,
    )
    return replace(base, **changes)


def dream_like():
    """A bidirectional model that predicts each token from the state before it."""
    policy = tiny_llama(causal=False, **SIZES)
    policy.spec = replace(policy.spec, shift=True)
    return policy


def block_causal():
    policy = tiny_llama(causal=False, **SIZES)
    encode = partial(encode_block_causal, block_size=2)
    policy.spec = replace(policy.spec, name="toy", attention="block_causal", block_size=2, encode=encode)
    return policy


MODELS = {
    "masked": lambda: tiny_masked_lm(**SIZES),
    "llada": lambda: tiny_llama(causal=False, **SIZES),
    "dream": dream_like,
    "causal": lambda: tiny_llama(causal=True, **SIZES),
}


def laid(policy, shown, rows=None):
    rows = rows or [[i] for i in range(len(shown))]
    return lay_out(shown, rows, pad_id=policy.pad_id, device=policy.device)


def logp(policy, tokens, place):
    """log p of each token at a place, by the bare module."""
    logits = policy.module(torch.tensor([tokens]), position_ids=positions_of(policy, len(tokens))).logits[0, place]
    return logits.index_fill(0, torch.tensor([MASK]), -torch.inf).log_softmax(-1)


def positions_of(policy, length):
    first = policy.module.config.pad_token_id + 1 if "Roberta" in type(policy.module).__name__ else 0
    return torch.arange(length)[None] + first


def test_the_diffusion_loss_by_enumeration_of_masks():
    """Over t and masks, two tokens' loss is the mean of -log p of each, with the other hidden and with it seen, / 2."""
    policy = tiny_masked_lm(**SIZES)
    row = {"prompt": "3=", "completion": "12"}
    one = example(tiny_sft(completion_length=2), policy, row)
    assert one.tokens.tolist() == [THREE, EQUALS, ONE, TWO] and one.learned.tolist() == [False, False, True, True]
    found = 0.0
    for t in (0.25, 0.75):  # an integral of what is linear in t, from its two midpoints
        for pattern in product((True, False), repeat=2):
            uniforms = torch.tensor([[0.0 if hidden else 1.0 for hidden in pattern]])
            shown, total = show([one], torch.tensor([t]), uniforms, causal=False)
            share = t ** sum(pattern) * (1 - t) ** (2 - sum(pattern))
            found += share / 2 * weighted_loss(policy, laid(policy, shown)).item() / total
    both, first, second = [THREE, EQUALS, MASK, MASK], [THREE, EQUALS, MASK, TWO], [THREE, EQUALS, ONE, MASK]
    logps = logp(policy, both, 2)[ONE] + logp(policy, both, 3)[TWO]
    logps = logps + logp(policy, first, 2)[ONE] + logp(policy, second, 3)[TWO]
    assert found == pytest.approx(-logps.item() / 4, rel=1e-5)


def test_each_row_counts_alike_and_hides_what_lies_below_its_level():
    rows = [{"prompt": "3=", "completion": "12"}, {"prompt": "4=", "completion": "3"}]
    policy = tiny_masked_lm(**SIZES)
    examples = [example(tiny_sft(), policy, row) for row in rows]
    uniforms = torch.tensor([[0.1, 0.6, 0.4], [0.9, 0.2, 0.0]])
    shown, total = show(examples, torch.tensor([0.5, 0.25]), uniforms, causal=False)
    assert total == 2
    assert shown[0].weight.tolist() == pytest.approx([0, 0, 1 / 1.5, 0, 1 / 1.5])
    assert shown[1].weight.tolist() == pytest.approx([0, 0, 0, 1 / 0.5])
    assert [one.hidden.tolist() == (one.weight > 0).tolist() for one in shown] == [True, True]


def test_the_causal_loss_is_that_of_transformers():
    policy = tiny_llama(causal=True, **SIZES)
    examples = read_examples(tiny_sft(), policy, ROWS[:5], "dataset")
    shown, total = show(examples, torch.ones(5), torch.zeros(5, 9), causal=True)
    layout = laid(policy, shown)
    labels = layout.tokens.masked_fill(layout.weight == 0, -100)
    mask = (layout.segment > 0).long()
    expected = policy.module(input_ids=layout.tokens, attention_mask=mask, labels=labels).loss
    found = weighted_loss(policy, layout) / total
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert labels[0].tolist() == [-100, -100, -100, ONE, EOS, -100]


@pytest.mark.parametrize(
    ("row", "settings", "expected"),
    [
        ({"text": "12"}, {}, "1+ 2+ e+"),
        ({"prompt": "1=", "completion": "2"}, {}, "1 = 2+ e+"),
        ({"prompt": "1=", "completion": "2", "text": None}, {"completion_only_loss": False}, "1+ =+ 2+ e+"),
        ({"prompt": "1=", "completion": "2"}, {"completion_length": 4}, "1 = 2+ e+ e+ e+"),
        ({"messages": "u1 a2 u3 a4"}, {}, "1 e . = 2+ e+ . 3 e . = 4+ e+"),
        ({"messages": "u1 a2 u3"}, {}, "1 e . = 2+ e+"),
        ({"messages": "u1 a2"}, {"assistant_only_loss": False}, "1+ e+ .+ =+ 2+ e+"),
        ({"prompt": "u1 a2 u3", "completion": "a4"}, {}, "1 e . = 2 e . 3 e . = 4+ e+"),
    ],
)
def test_what_is_learned_of_each_kind_of_row(row, settings, expected):
    def turns(text):
        role = {"u": "user", "a": "assistant"}
        return [{"role": role[word[0]], "content": word[1:]} for word in text.split()]

    chat = "messages" in row or " " in row.get("prompt", "")
    row = {name: turns(value) if chat and value else value for name, value in row.items()}
    policy = tiny_masked_lm(**SIZES)
    policy.tokenizer.chat_template = CHAT
    one = example(tiny_sft(**settings), policy, row)
    names = {EOS: "e", ONE: "1", TWO: "2", THREE: "3", FOUR: "4", DOT: ".", EQUALS: "="}
    shown = [names[token] + "+" * mine for token, mine in zip(one.tokens.tolist(), one.learned.tolist(), strict=True)]
    assert " ".join(shown) == expected


def test_a_causal_model_does_not_learn_its_first_token():
    policy = tiny_llama(causal=True, **SIZES)
    one = example(tiny_sft(completion_length=8), policy, {"text": "12"})
    assert one.tokens.tolist() == [ONE, TWO, EOS] and one.learned.tolist() == [False, True, True]


def test_pack_fills_rows_up_to_the_capacity():
    assert pack([3, 5, 2, 4, 1], 6) == [[1, 4], [3, 2], [0]]


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("settings", [{"packing": True}, {"micro_batch_size": 3}], ids=str)
def test_the_layout_does_not_change_the_gradient(kind, settings):
    policy, accelerator = MODELS[kind](), make_accelerator()
    check_packing(policy)
    examples = read_examples(tiny_sft(), policy, ROWS, "dataset")
    gradients, losses, paddings = [], [], []
    for recipe in (tiny_sft(), tiny_sft(**settings)):
        policy.module.zero_grad()
        loss, (padding, _) = add_gradients(recipe, policy, examples, accelerator, "masks", 0)
        losses.append(loss)
        paddings.append(padding.item())
        gradients.append({name: p.grad.clone() for name, p in policy.module.named_parameters() if p.grad is not None})
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=1e-6)
    assert gradients[0].keys() == gradients[1].keys() and gradients[0]
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-4, atol=1e-6)
    assert paddings[0] > 0 and losses[0] > 0


def test_a_block_sees_the_blocks_before_it_without_masks():
    policy = block_causal()
    with pytest.raises(ValueError, match="packing=True does not go with 'toy'"):
        check_packing(policy)
    one = example(tiny_sft(completion_length=2), policy, {"text": "12"})
    tokens = torch.cat([one.tokens, torch.tensor([THREE, FOUR])])
    hidden = torch.tensor([True, False, True, True])
    shown = Shown(tokens, hidden, hidden.float())
    logps = policy.logits(torch.tensor([[MASK, TWO]]), torch.ones(1, 2, dtype=torch.bool))[0, 0]
    later = policy.logits(torch.tensor([[ONE, TWO, MASK, MASK]]), torch.ones(1, 4, dtype=torch.bool))[0]
    gone = torch.tensor([MASK])
    expected = [logps.index_fill(0, gone, -torch.inf).log_softmax(-1)[ONE]]
    expected += [later[i].index_fill(0, gone, -torch.inf).log_softmax(-1)[t] for i, t in ((2, THREE), (3, FOUR))]
    torch.testing.assert_close(weighted_loss(policy, laid(policy, [shown])), -sum(expected), rtol=1e-5, atol=1e-6)


def test_a_module_that_cannot_keep_sequences_apart_is_refused(tmp_path):
    with pytest.raises(ValueError, match="packing=True: Own takes no mask of four axes"):
        fine_tune(tiny_sft(tmp_path / "run", model=own_policy(), packing=True))
    assert not (tmp_path / "run").exists()

    def deaf(module, tokens, attention_mask, positions, **cache):
        return module.base_model(tokens, position_ids=positions).last_hidden_state

    policy = tiny_llama(causal=False, **SIZES)
    policy.spec = replace(policy.spec, encode=deaf)
    with pytest.raises(ValueError, match="see each other; leave packing off"):
        check_packing(policy)


@pytest.mark.parametrize("lora", [None, partial(lora_d1, r=4)], ids=["weights", "lora"])
def test_a_run_that_was_stopped_and_resumed_is_the_same_bit_for_bit(tmp_path, lora):
    options = {"lora": lora, "eval_steps": 2, "packing": True, "gradient_checkpointing": True}
    straight = fine_tune(tiny_sft(tmp_path / "straight", **options))

    def stopping(step, num_steps):
        if step == 1 and not (tmp_path / "parts/checkpoints/step-000002").exists():
            os.kill(os.getpid(), signal.SIGUSR1)
        return linear_decay(step, num_steps)

    def schedule(step, num_steps):
        return linear_decay(step, num_steps)

    stopping.__name__ = schedule.__name__
    recipe = tiny_sft(tmp_path / "parts", **options)
    with pytest.raises(SystemExit) as stopped:
        fine_tune(replace(recipe, lr_schedule=stopping))
    assert stopped.value.code == 128 + signal.SIGUSR1
    resumed = fine_tune(replace(recipe, lr_schedule=schedule, resume_from_checkpoint="latest"))
    assert_same_weights(straight, resumed)
    assert metrics_of(tmp_path / "straight") == metrics_of(tmp_path / "parts")
    assert straight["eval_after"] == resumed["eval_after"] and straight["eval_before"] == resumed["eval_before"]


def test_a_step_that_fails_saves_the_last_finished_one(tmp_path, monkeypatch):
    """RL's way of saving is SFT's: the checkpoint holds what a run of so many steps ends with."""

    def failing(recipe, policy, chosen, accelerator, key, step):
        if step == 2:
            raise KeyError("a fault")
        return add_gradients(recipe, policy, chosen, accelerator, key, step)

    recipe = tiny_sft(tmp_path / "run", num_steps=3, save_steps=100)
    with monkeypatch.context() as patched, pytest.raises(KeyError, match="a fault") as raised:
        patched.setattr("dllm_rl.supervised.train.add_gradients", failing)
        fine_tune(recipe)
    assert raised.value.__notes__[0].startswith("process 0: the step after step 2 failed; fix the cause and continue")
    assert sorted(path.name for path in (tmp_path / "run/checkpoints").glob("step-*")) == ["step-000000", "step-000002"]
    resumed = fine_tune(replace(recipe, resume_from_checkpoint="latest"))
    assert_same_weights(fine_tune(replace(recipe, output_dir=str(tmp_path / "whole"))), resumed)


def test_lora_trains_adapters_alone(tmp_path):
    model = tiny_masked_lm(**SIZES)
    policy = fine_tune(tiny_sft(tmp_path, model=model, lora=partial(lora_d1, r=4))).policy
    state = {name.replace(".base_layer", ""): value for name, value in policy.module.state_dict().items()}
    for name, value in model.module.state_dict().items():
        assert torch.equal(state[name], value)
    assert any(value.any() for name, value in state.items() if "lora_B" in name)
    assert (tmp_path / "checkpoints/step-000004/adapter/adapter_model.safetensors").exists()


@pytest.mark.parametrize("kind", ["masked", "causal"])
def test_it_learns_and_rl_starts_from_its_checkpoint(tmp_path, kind):
    settings = {"num_steps": 60, "train_batch_size": 14, "learning_rate": 1e-2, "eval_dataset": ROWS[:4]}
    settings |= {"output_dir": str(tmp_path / "sft"), "max_length": 16, "report_to": None}
    summary = sft(MODELS[kind](), ROWS, **settings)
    assert summary["eval_after"]["loss"] < 0.5 * summary["eval_before"]["loss"]
    assert (tmp_path / "sft/training.png").stat().st_size > 1000
    page = report_command([tmp_path / "sft"], None)[-1].read_text()
    assert f"{summary['eval_before']['loss']:.3f} → {summary['eval_after']['loss']:.3f} loss" in page
    rows = metrics_of(tmp_path / "sft")
    assert rows[-1]["epoch"] == pytest.approx(60 * 14 / 16) and rows[-1]["loss"] < rows[0]["loss"]
    if kind == "masked":
        recipe = tiny_recipe(tmp_path / "rl", model=summary["checkpoint"], num_steps=1)
        first = load_policy(summary["checkpoint"]).module.state_dict()
        assert train(recipe)["checkpoint"].endswith("step-000001")
        start = load_policy(tmp_path / "rl/checkpoints/step-000000").module.state_dict()
        assert all(torch.equal(value, start[name]) for name, value in first.items())


def test_the_held_out_loss_does_not_depend_on_its_batches():
    policy, accelerator = tiny_masked_lm(**SIZES), make_accelerator()
    examples = read_examples(tiny_sft(), policy, ROWS, "dataset")
    recipes = [tiny_sft(eval_batch_size=n, packing=packing) for n, packing in ((3, False), (64, False), (64, True))]
    found = [held_out_loss(recipe, policy, examples, accelerator) for recipe in recipes]
    assert found == pytest.approx([found[0]] * 3, rel=1e-5) and found[0] > 1


@pytest.mark.parametrize("kind", MODELS)
def test_packing_under_autocast_rounds_and_no_more(kind):
    policy, accelerator = MODELS[kind](), make_accelerator()
    examples = read_examples(tiny_sft(), policy, ROWS, "dataset")
    losses = [
        add_gradients(tiny_sft(bf16=True, packing=packing), policy, examples, accelerator, "masks", 0)[0].item()
        for packing in (False, True)
    ]
    exact = add_gradients(tiny_sft(), policy, examples, accelerator, "masks", 0)[0].item()
    assert losses == pytest.approx([exact, exact], rel=0.02) and exact not in losses


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path):
    found = []
    words = ["--num_steps", "3", "--train_batch_size", "8", "--eval_steps", "2", "--report_to", "none"]
    words += ["--packing", "--micro_batch_size", "2"]
    for name, launcher in (("one", ["--cpu"]), ("two", ["--config_file", "recipes/accelerate/cpu_2.yaml"])):
        command = [sys.executable, "-m", "accelerate.commands.launch", *launcher, "recipes/sft_tiny.py", *words]
        command += ["--output_dir", str(tmp_path / name)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        found.append(metrics_of(tmp_path / name))
    assert len(found[0]) == 3 and "eval/loss" in found[0][1]
    for a, b in zip(*found, strict=True):
        assert a == pytest.approx(b, rel=2e-3, abs=2e-5)


def test_an_epoch_shows_every_row_once():
    steps = [rows_of_step(10, 4, 0, step) for step in range(5)]
    seen = [i for step in steps for i in step]
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10)) and seen[:10] != seen[10:]


def test_a_file_of_json_lines_from_the_command_line(tmp_path, monkeypatch):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    words = ["--dataset", str(file), "--output_dir", str(tmp_path / "run"), "--num_steps", "1", "--adam_beta1", "0.8"]
    recipe = from_command_line(tiny_sft(), words)
    assert recipe.dataset == str(file) and recipe.adam_beta1 == 0.8
    monkeypatch.setattr("sys.argv", ["sft.py", *words])
    summary = main(tiny_sft())
    assert summary["eval_rows"] == 1 and summary["recipe"]["dataset"].startswith("15 rows, ")
    with pytest.raises(ValueError, match="dataset='14 rows"):
        changed = tiny_sft(tmp_path / "run", dataset=ROWS[1:], num_steps=1, adam_beta1=0.8)
        fine_tune(replace(changed, resume_from_checkpoint="latest"))
    assert len(read_datasets(recipe).dataset) == 15


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dataset": [{"a": "1"}] * 3}, "dataset: row 0: has no columns messages, prompt and completion, or text"),
        ({"dataset": [{"text": ""}] * 3}, "dataset: row 0: has nothing to learn"),
        ({"dataset": []}, "dataset is empty"),
        ({"dataset": ROWS[:1]}, "dataset has 1 row, and one is to be held out"),
        ({"max_length": 3}, "all of 15 rows are longer than max_length=3"),
        ({"max_length": 65}, "max_length=65 is more than the model's 64 positions"),
        ({"completion_length": 1}, "its completion has 2 tokens, more than completion_length=1"),
        ({"dataset": [{"messages": [{"role": "user", "content": "1"}]}] * 3}, "has no chat template"),
    ],
)
def test_what_cannot_be_shown_is_refused_before_anything_is_written(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        fine_tune(tiny_sft(tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


def test_longer_rows_are_left_out_and_counted():
    said = []
    policy = tiny_masked_lm(**SIZES)
    kept = read_examples(tiny_sft(max_length=5), policy, ROWS, "dataset", say=said.append)
    assert len(kept) == 10 and said == ["dataset: 6 of 16 rows are longer than max_length=5 and left out"]


def test_another_kind_of_run_is_not_resumed(tmp_path):
    fine_tune(tiny_sft(tmp_path, num_steps=1))
    with pytest.raises(ValueError, match="differs from the checkpoint's None; resume with the same recipe"):
        train(tiny_recipe(tmp_path, name="tiny", resume_from_checkpoint="latest"))


def test_a_template_that_rewrites_what_came_before_is_refused():
    policy = tiny_masked_lm(**SIZES)
    policy.tokenizer.chat_template = "{{ messages | length }}" + CHAT
    turns = [{"role": role, "content": "1"} for role in ("user", "assistant", "user", "assistant")]
    with pytest.raises(ValueError, match="does not write message 1 as the continuation"):
        example(tiny_sft(), policy, {"messages": turns})


def test_padding_states_are_finite():
    policy = tiny_llama(causal=True, **SIZES)
    shown = [Shown(torch.full((n,), ONE), torch.zeros(n, dtype=torch.bool), torch.ones(n)) for n in (2, 3, 4)]
    states = hidden_states(policy, laid(policy, shown, [[0, 1], [2]]), packed=True)
    assert states.isfinite().all()


def test_each_step_hides_other_tokens():
    policy, accelerator = tiny_masked_lm(**SIZES), make_accelerator()
    examples = read_examples(tiny_sft(), policy, ROWS, "dataset")
    losses = [add_gradients(tiny_sft(), policy, examples, accelerator, "masks", step)[0].item() for step in (0, 1, 1)]
    assert losses[0] != losses[1] == losses[2]
