"""A checkpoint's files: shards, parts of tensors, an index that leads out of the folder."""

import json
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from layouts import checkpoint
from repetitions import slow
from safetensors.torch import load_file, save_file

from dllm_rl import load_policy
from dllm_rl.models.base import FamilySpec
from dllm_rl.models.checkpoint import loading
from dllm_rl.models.checkpoint import tensors as module
from dllm_rl.models.checkpoint.tensors import (
    INDEX,
    LazyTensor,
    mismatched_tensors,
    read_tensors,
    rename_tensor,
    split_experts,
    to_original,
    write_tensors,
)


def tensors(directory) -> dict:
    return {k: v for file in directory.glob("*.safetensors") for k, v in load_file(file).items()}


@pytest.mark.parametrize("family", [slow("llada_tied"), "llada2", slow("sdar_moe"), "smollm2"])
def test_shards_hold_what_one_file_held(tmp_path, family, monkeypatch):
    monkeypatch.setattr(loading, "MAX_FILE_SIZE", 8000)
    source = checkpoint(tmp_path / "source", family)
    policy = load_policy(source)
    policy.save_pretrained(tmp_path / "saved")
    saved = tmp_path / "saved"
    assert len(list(saved.glob("*.safetensors"))) > 2
    assert tensors(saved).keys() == tensors(source).keys()
    for file in saved.glob("*.safetensors"):
        held = load_file(file).values()
        assert sum(x.nbytes for x in held) <= 8000 or len(held) == 1
    index = json.loads((saved / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in tensors(source).values())
    again = load_policy(saved)
    tokens = torch.randint(3, 38, (1, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(tokens, dtype=torch.bool)
    assert torch.equal(again.logits(tokens, mask), policy.logits(tokens, mask))
    monkeypatch.undo()
    policy.save_pretrained(saved)  # one file replaces the shards
    assert [f.name for f in saved.glob("*.safetensors")] == ["model.safetensors"]


@pytest.mark.parametrize("head", [1.0, 2.0])
def test_a_head_that_differs_from_the_embedding_is_written_although_the_config_ties_them(head):
    state = {
        name: LazyTensor((2, 2), torch.float32, partial(torch.full, (2, 2), value))
        for name, value in {"model.embed_tokens.weight": 1.0, "lm_head.weight": head}.items()
    }
    tied = SimpleNamespace(tie_word_embeddings=True)
    written = to_original(state, FamilySpec("tied", "full", mask_id=0), tied)
    assert written.keys() == state.keys() - ({"lm_head.weight"} if head == 1.0 else set())


def test_one_file_replaces_shards_and_their_index(tmp_path):
    """An index of the shards that are gone would make the folder unreadable; shards without one would not be read."""
    old, new = ({name: torch.full((2,), value) for name in "ab"} for value in (1.0, 2.0))
    for state, size, files in ((old, 8, 2), (new, 16, 1), (old, 8, 2)):
        write_tensors(state, tmp_path, max_shard_size=size)
        assert len([*tmp_path.glob("*.safetensors")]) == files and (tmp_path / INDEX).exists() == (files > 1)
        found = read_tensors(tmp_path)
        assert found.keys() == state.keys() and all(torch.equal(found[name], state[name]) for name in state)


def test_a_part_of_another_tensor_is_written_as_a_tensor_of_its_own(tmp_path):
    whole = torch.arange(12.0).view(4, 3)
    write_tensors({"whole": whole, "rows": whole[1:3]}, tmp_path, max_shard_size=10**6)
    assert torch.equal(tensors(tmp_path)["rows"], whole[1:3]) and torch.equal(tensors(tmp_path)["whole"], whole)


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/outside.safetensors", "sub/../../x", "..\\x", ".."])
def test_an_index_cannot_lead_out_of_its_folder(folder, name):
    state = load_file(folder / "model.safetensors")
    save_file(state, folder.parent / "outside.safetensors", {"format": "pt"})
    (folder / "model.safetensors").unlink()
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(state, name)}))
    with pytest.raises(ValueError, match="which is not a file of the folder"):
        load_policy(folder)


def test_names_and_misfits_by_hand():
    pairs = (("a.blocks.*.ff", "b.layers.*.mlp"), ("a.head", "head"))
    assert rename_tensor("a.blocks.12.ff.weight", pairs) == "b.layers.12.mlp.weight"
    assert rename_tensor("a.head", pairs) == "head" and rename_tensor("a.heads.weight", pairs) == "a.heads.weight"
    one, two = torch.zeros(1), torch.zeros(2)
    assert mismatched_tensors({"x": one, "y": one, "z": one}, {"x": one, "y": two, "w": one}) == ["w", "y", "z"]


def test_a_tensor_is_made_when_its_shard_is_written(tmp_path, monkeypatch):
    events = []

    def make(number):
        events.append(number)
        return torch.full((2, 3), float(number))

    state = {f"t{i}": LazyTensor((2, 3), torch.float32, partial(make, i)) for i in range(3)}
    write = module.save_file
    monkeypatch.setattr(module, "save_file", lambda *given: (events.append("write"), write(*given)))
    write_tensors(state, tmp_path, max_shard_size=48)
    assert events == [0, 1, "write", 2, "write"]
    assert {name: float(x[0, 0]) for name, x in read_tensors(tmp_path).items()} == {"t0": 0, "t1": 1, "t2": 2}


def test_a_stack_is_made_once_for_all_of_its_experts():
    stacks = {"gate_up_proj": torch.arange(24.0).view(2, 4, 3), "down_proj": torch.arange(12.0).view(2, 3, 2)}
    made = []

    def make(name):
        made.append(name)
        return stacks[name]

    state = {f"m.mlp.experts.{n}": LazyTensor(tuple(x.shape), x.dtype, partial(make, n)) for n, x in stacks.items()}
    found = split_experts(state)
    values = {name: each.make() for name, each in found.items()}
    assert made == ["gate_up_proj", "down_proj"]
    assert values["m.mlp.experts.1.up_proj.weight"].tolist() == [[18, 19, 20], [21, 22, 23]]
    assert values["m.mlp.experts.0.gate_proj.weight"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert all(tuple(values[name].shape) == each.shape for name, each in found.items())
