"""A checkpoint's files: shards, parts of tensors, an index that leads out of the folder."""

import json

import pytest
import torch
from layouts import checkpoint
from safetensors.torch import load_file, save_file

from dllm_rl import load_policy
from dllm_rl.models.checkpoint.tensors import INDEX, misfits, read_tensors, renamed, write_tensors


def tensors(directory) -> dict:
    return {k: v for file in directory.glob("*.safetensors") for k, v in load_file(file).items()}


@pytest.mark.parametrize("family", ["llada_tied", "llada2", "sdar_moe", "smollm2"])
def test_shards_hold_what_one_file_held(tmp_path, family):
    source = checkpoint(tmp_path / "source", family)
    policy = load_policy(source)
    policy.save_pretrained(tmp_path / "saved", max_shard_size=8000)
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
    policy.save_pretrained(saved)  # one file replaces the shards
    assert [f.name for f in saved.glob("*.safetensors")] == ["model.safetensors"]


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
    with pytest.raises(ValueError, match="which is no file of the folder"):
        load_policy(folder)


def test_names_and_misfits_by_hand():
    pairs = (("a.blocks.*.ff", "b.layers.*.mlp"), ("a.head", "head"))
    assert renamed("a.blocks.12.ff.weight", pairs) == "b.layers.12.mlp.weight"
    assert renamed("a.head", pairs) == "head" and renamed("a.heads.weight", pairs) == "a.heads.weight"
    one, two = torch.zeros(1), torch.zeros(2)
    assert misfits({"x": one, "y": one, "z": one}, {"x": one, "y": two, "w": one}) == ["w", "y", "z"]
