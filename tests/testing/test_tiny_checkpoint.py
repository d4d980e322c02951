"""Tiny checkpoints have the published layouts, and a script for 8B runs on one of them from its start to the export."""

import json

import layouts
import pytest
import torch
from safetensors.torch import load_file

from dllm_rl import Unmask, load_policy, train
from dllm_rl.config import from_command_line
from dllm_rl.decoding.chat import conversation_ids
from dllm_rl.models.checkpoint.families import FAMILIES, find_family
from dllm_rl.models.checkpoint.loading import load_config
from dllm_rl.testing import tiny_checkpoint
from dllm_rl.testing.tiny_checkpoint import LAYOUTS, SIZES
from recipes.llada_8b import recipe_of

pytestmark = pytest.mark.usefixtures("no_rehearsal")
# The layouts of tests/support, whose tensors' names are written by hand. None: transformers has the class.
BY_HAND = {name: name for name in LAYOUTS} | {"a2d": "a2d_qwen3", "diffusion_gemma": None}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A layout's checkpoint, written once."""
    made = {}

    def get(layout):
        if layout not in made:
            made[layout] = tiny_checkpoint(layout, tmp_path_factory.mktemp("tiny") / layout)
        return made[layout]

    return get


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_is_that_of_the_published_model(folder, layout):
    made, (hub_id, changes) = folder(layout), LAYOUTS[layout]
    policy, published = load_policy(made, dtype="auto"), load_config(hub_id) | changes
    family = find_family(published)
    assert (policy.spec.name, policy.spec.attention, policy.spec.shift) == (family.name, family.attention, family.shift)
    if family.files.stock_model is not None:
        config = json.loads((made / "config.json").read_text())
        differ = {name for name in config.keys() | published.keys() if config.get(name) != published.get(name)}
        assert all(name in SIZES or name.endswith(("_token_id", "vocab_size", "embedding_size")) for name in differ)
    assert {parameter.dtype for parameter in policy.module.parameters()} == {torch.bfloat16}
    if policy.spec.mask_id is not None:
        assert policy.tokenizer.decode([policy.spec.mask_id]) in (*family.files.mask_names, "<|mask|>")
    assert {policy.tokenizer.get_vocab().get(token) for token in family.files.end_tokens} <= {*policy.spec.eos_ids}
    if (other := BY_HAND[layout]) is not None:
        _, state = layouts.made(other) if other in layouts.STOCK else layouts.ORIGINAL[other]()
        tied = {"lm_head.weight"} if published.get("tie_word_embeddings") else set()
        assert load_file(made / "model.safetensors").keys() == state.keys() - tied


def test_every_family_of_published_weights_has_a_layout():
    """The others differ from one of them by a field of the config."""
    others = {"illada", "a2d_blocks", "nemotron_ar"}
    published = {family.name for family in FAMILIES if family.files.stock_model is not None}
    assert published - others <= LAYOUTS.keys()


@pytest.mark.parametrize("layout", ["llada", "sdar", "qwen3"])
def test_text_comes_back_and_a_chat_has_turns(folder, layout):
    policy = load_policy(folder(layout), dtype="auto")
    text = "What is 17 + 25?\n  Ein \u00dcbel \u2192 4"
    ids = policy.tokenizer(text)["input_ids"]
    assert policy.tokenizer.decode(ids) == text and len(ids) < len(text.encode())
    chat = [{"role": "user", "content": text}, {"role": "assistant", "content": "42"}]
    (question, _), (answer, is_answer) = conversation_ids(policy, chat, [1])[:2]
    assert is_answer and policy.tokenizer.decode(answer).startswith("42")
    assert all(len({*ids} & {*policy.spec.eos_ids}) == 1 for ids in (question, answer))
    assert len(policy.tokenizer) < load_config(folder(layout))["vocab_size"]  # as published: some ids have no token


def test_the_same_seed_writes_the_same_bytes(folder, tmp_path):
    state = torch.random.get_rng_state()
    again = tiny_checkpoint("llada", tmp_path / "new" / "again")
    assert torch.equal(torch.random.get_rng_state(), state)
    names = {path.name for path in again.iterdir()}
    assert names == {path.name for path in folder("llada").iterdir()} >= {"config.json", "tokenizer.json"}
    assert all((again / name).read_bytes() == (folder("llada") / name).read_bytes() for name in names)
    other = tiny_checkpoint("llada", tmp_path / "other", seed=1)
    assert (other / "model.safetensors").read_bytes() != (again / "model.safetensors").read_bytes()


def test_what_it_refuses(tmp_path):
    with pytest.raises(ValueError, match=r"layout='lada' is not one of llada, .*; the nearest is 'llada'"):
        tiny_checkpoint("lada", tmp_path / "new")
    (tmp_path / "notes.txt").write_text("mine")
    for path in (tmp_path, tmp_path / "notes.txt"):
        with pytest.raises(ValueError, match="exists and is not empty; give another one"):
            tiny_checkpoint("llada", path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.slow
def test_the_script_of_8b_runs_stops_goes_on_and_exports(folder, tmp_path):
    llada_8b = recipe_of(model=str(folder("llada")))
    options = [f"--output_dir={tmp_path / 'run'}", "--torch_compile=false"]
    options += [f"--{each}.max_new_tokens=32" for each in ("sampler", "eval_sampler")]
    options += [f"--{each}.diffusion_steps=8" for each in ("sampler", "eval_sampler")]
    options += ["--validation_task.size=2", "--eval_task.size=2", "--train_batch_size=1", "--saves.steps=1"]
    train(from_command_line(llada_8b, [*options, "--num_steps=1", "--lr_schedule_steps=2"]))
    more = ["--num_steps=2", "--lr_schedule_steps=2", "--resume_from_checkpoint=latest", "--allow_changed=num_steps"]
    train(from_command_line(llada_8b, [*options, *more]))
    load_policy(tmp_path / "run" / "checkpoints" / "step-000002", dtype="auto").save_pretrained(tmp_path / "export")
    config, made = (json.loads((path / "config.json").read_text()) for path in (tmp_path / "export", folder("llada")))
    assert config == made
    sampler = Unmask(max_new_tokens=8, block_size=8)
    assert len(load_policy(tmp_path / "export").complete("What is 17 + 25?", sampler=sampler)) > 0
