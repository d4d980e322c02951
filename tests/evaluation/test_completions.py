"""Rows of stored completions."""

import datetime
import decimal
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_recipe import SIZES

from dllm_rl.distributed.collectives import OneProcess
from dllm_rl.evaluation.completions import Completions, fingerprint, make_row
from dllm_rl.evaluation.evaluate import row_seeds
from dllm_rl.models.load import load_policy
from dllm_rl.models.tiny import tiny_masked_lm
from dllm_rl.quantization.rollout_policy import quantized_copy
from dllm_rl.quantization.schemes import FakeQuantize
from dllm_rl.rng import generator_for
from dllm_rl.tasks.base import Problem


def test_a_field_that_is_named_blank_is_refused_only_beside_a_blank():
    fields = {"blank": "mine"}
    with pytest.raises(ValueError, match="field 'blank' of the problem has a name that stored completions need"):
        make_row(Problem("a_", fields=fields, blank="_"), "b", {})
    assert make_row(Problem("a", fields=fields), "b", {})["blank"] == "mine"


def test_a_fingerprint_tells_layers_of_equal_weights_apart():
    policy = tiny_masked_lm(**SIZES)
    # The inputs alone are rounded: every weight is the learner's.
    rounded = quantized_copy(policy, FakeQuantize(weight=None, activation="int8"))
    assert all(map(torch.equal, rounded.module.parameters(), policy.module.parameters()))
    assert fingerprint(rounded) != fingerprint(policy)


def edit_last_number(policy):
    weight = max(policy.module.parameters(), key=torch.Tensor.numel)
    with torch.no_grad():
        weight.view(-1)[-1] += 1e-3


def edit_merges(policy):
    policy.tokenizer.add_tokens(["12"])


EDITS = {
    "the last number of a weight": edit_last_number,
    "a chat template": lambda policy: setattr(policy.tokenizer, "chat_template", "{{ messages[0]['content'] }}"),
    "a token": edit_merges,
    "a config field": lambda policy: setattr(policy.module.config, "rms_norm_eps", 0.5),
    "the mask": lambda policy: setattr(policy, "spec", replace(policy.spec, mask_id=3)),
    "blocks of 4": lambda policy: setattr(policy, "spec", replace(policy.spec, block_size=4)),
    "blocks of 8": lambda policy: setattr(policy, "spec", replace(policy.spec, block_size=8)),
    "the precision of the logits": lambda policy: setattr(policy, "float32_head", not policy.float32_head),
    "the dtype": lambda policy: policy.module.bfloat16(),
}


def test_a_fingerprint_tells_apart_whatever_changes_a_completion():
    found = {"nothing": fingerprint(tiny_masked_lm(**SIZES))}
    for name, edit in EDITS.items():
        policy = tiny_masked_lm(**SIZES)
        edit(policy)
        found[name] = fingerprint(policy)
    assert len({*found.values()}) == len(found), found


def test_a_fingerprint_is_the_same_after_a_reload_and_a_call_of_the_tokenizer(tmp_path):
    policy = tiny_masked_lm(**SIZES)
    policy.save_pretrained(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    first, second = load_policy(tmp_path / "a"), load_policy(tmp_path / "b")
    second.tokenizer(["1", "12"], padding=True, truncation=True, max_length=4)
    assert fingerprint(first) == fingerprint(second)


MADE = {"problem": 0, "sample": 0, "tokens": 1, "forwards": 2.0, "seconds": 0.5, "steps": 2}


def test_a_row_that_is_no_stored_completion_is_refused(tmp_path):
    path = tmp_path / "a.jsonl"
    for number in ("1e999", '"x"', "null", "[]"):
        row = json.dumps({"completion": "1", "evaluation": MADE}).replace('"problem": 0', f'"problem": {number}')
        path.write_text(row + "\n")
        with pytest.raises(ValueError, match="line 1: not a stored completion"):
            Completions(path, {}, OneProcess())


@pytest.mark.parametrize("stem", ["math", "base[seed=1]", "a*", "b?c", "[!x]", "{1}", "a.b+"])
def test_parts_are_merged_and_files_of_other_evaluations_stay(tmp_path, stem):
    path = tmp_path / f"{stem}.jsonl"
    others = [f"{stem}.partial.jsonl", f"{stem}.partA.jsonl", f"{stem}.part1.old.jsonl", f"{stem}x.part0.jsonl"]
    for place, name in enumerate([*others, f"{stem}.part0.jsonl", f"{stem}.part11.jsonl"]):
        row = {"completion": "1", "evaluation": MADE | {"problem": place}}
        (tmp_path / name).write_text(json.dumps(row) + "\n")
    assert sorted(Completions(path, {}, OneProcess()).rows) == [(4, 0), (5, 0)]
    assert {file.name for file in tmp_path.iterdir()} == {path.name, *others}


@pytest.mark.parametrize(
    ("value", "stored"),
    [
        (datetime.date(2026, 1, 2), "2026-01-02"),
        (decimal.Decimal("1.5"), "1.5"),
        (Path("a/b"), "a/b"),
        (b"x", "b'x'"),
        (np.ones(2), "[1. 1.]"),
        (np.float32(0.5), "0.5"),
        (torch.tensor([1]), "tensor([1])"),
        (float("nan"), "NaN"),
        ([1, float("-inf")], [1, "-Infinity"]),
        ({"when": datetime.time(1), (1, 2): 3}, {"when": "01:00:00"}),
        ("half \ud83d, \\ud83d, \ude00", "half \ud83d, \\ud83d, \ude00"),
        ({"é\udc80": (1, None)}, {"é\udc80": [1, None]}),
    ],
    ids=repr,
)
def test_a_field_is_stored_as_training_stores_it_and_is_the_same_problem_again(tmp_path, value, stored):
    problem = Problem("1", fields={"v": value})
    store = Completions(tmp_path / "a.jsonl", {}, OneProcess())
    store.append({(0, 0): make_row(problem, "2", MADE)})
    for _ in range(2):
        store = Completions(tmp_path / "a.jsonl", {}, OneProcess())
        assert store.stored_rows([(0, 0)], {0: problem})[0, 0]["v"] == stored
    with pytest.raises(ValueError, match="has another problem 0: its v is"):
        store.stored_rows([(0, 0)], {0: Problem("1", fields={"v": "other"})})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), [float("-inf")]])
def test_a_stored_number_that_is_not_finite_is_the_same_problem(tmp_path, value):
    (tmp_path / "a.jsonl").write_text(json.dumps({"v": value, "prompt": "1", "completion": "2", "evaluation": MADE}))
    store = Completions(tmp_path / "a.jsonl", {}, OneProcess())
    assert store.stored_rows([(0, 0)], {0: Problem("1", fields={"v": value})})


def test_seeds_of_a_first_sample_are_those_of_an_evaluation_with_one_sample():
    """Stored files of one sample a problem then keep their completions."""
    assert row_seeds(3, [(5, 0), (5, 1)]) == [
        generator_for(3, "evaluate", 5).initial_seed(),
        generator_for(3, "evaluate", 5, 1).initial_seed(),
    ]
