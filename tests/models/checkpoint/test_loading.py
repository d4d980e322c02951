"""What a checkpoint's own config says after saving, and a model that is not on the machine."""

import json
import shutil
import socket
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from io import StringIO
from logging import Logger, getLogger
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.errors import RepositoryNotFoundError
from huggingface_hub.utils import filter_repo_objects
from layouts import checkpoint, published
from refusals import refuses
from transformers.utils import logging

from dllm_rl import load_policy, make_policy
from dllm_rl.models.checkpoint import loading
from dllm_rl.models.checkpoint.adapters import save_adapter
from dllm_rl.models.checkpoint.tensors import INDEX, read_tensors, write_tensors
from dllm_rl.models.convert import as_causal
from dllm_rl.models.load import load_weights
from dllm_rl.models.lora import add_lora
from dllm_rl.models.lora_settings import Lora
from dllm_rl.models.tiny import tiny_llama


def test_the_dtype_is_written_under_the_name_that_the_config_has(tmp_path):
    """Newer configs say `dtype`: one that went on saying float32 would have bf16 weights opened in fp32."""
    source = published(tmp_path / "source", "llada")
    fields = json.loads((source / "config.json").read_text())
    fields["dtype"] = fields.pop("torch_dtype")
    (source / "config.json").write_text(json.dumps(fields))
    load_policy(source, dtype=torch.bfloat16).save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert saved["dtype"] == "bfloat16" and "torch_dtype" not in saved


def test_a_copy_ends_its_completions_as_the_checkpoint_does(tmp_path):
    """End tokens may stand in generation_config.json alone, which is saved with the weights."""
    source = published(tmp_path / "source", "llada")
    text = json.dumps({"eos_token_id": [5, 7]})
    (source / "generation_config.json").write_text(text)
    load_policy(source).save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / "generation_config.json").read_text() == text
    assert {5, 7} <= {*load_policy(tmp_path / "saved").spec.eos_ids}


@pytest.mark.parametrize("family", ["llada", "dream", "sdar", "nemotron"])
@pytest.mark.repeated(first_only=True)
def test_and_so_does_a_copy_in_the_layout_of_the_stock_class(tmp_path, family):
    source = published(tmp_path / "source", family)
    (source / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 7]}))
    policy = load_policy(source)
    policy.save_pretrained(tmp_path / "stock", stock=True)
    policy.module.save_pretrained(tmp_path / "module")
    policy.tokenizer.save_pretrained(tmp_path / "module")
    made = make_policy(policy.module, policy.tokenizer)
    copies = [load_policy(tmp_path / name) for name in ("stock", "module")]
    if policy.spec.is_also_causal:
        as_causal(policy).save_pretrained(tmp_path / "causal")
        copies.append(load_policy(tmp_path / "causal"))
    assert {5, 7} <= {*policy.spec.eos_ids}
    assert [copied.spec.eos_ids for copied in (made, *copies)] == [policy.spec.eos_ids] * (1 + len(copies))


@pytest.mark.parametrize("rows", [36, 42])
@pytest.mark.parametrize("family", ["llada", "llada_tied", "llada_moe", "llada2", "dream", "sdar", "nemotron_ar"])
@pytest.mark.repeated(every=7)
def test_a_resized_vocabulary_is_opened_again(tmp_path, family, rows):
    source = published(tmp_path / "source", family)
    fields = json.loads((source / "config.json").read_text())
    if family != "nemotron_ar":
        fields["mask_token_id"] = 30  # within the smaller vocabulary
    if family == "llada_tied":
        del fields["embedding_size"]
    (source / "config.json").write_text(json.dumps(fields))
    policy = load_policy(source)
    with torch.random.fork_rng(devices=[]):
        policy.module.resize_token_embeddings(rows, mean_resizing=False)
    policy.save_pretrained(tmp_path / "saved")
    saved = load_policy(tmp_path / "saved")
    batch = torch.arange(3, 12)[None], torch.ones(1, 9, dtype=torch.bool)
    assert saved.vocab_size == saved.logits(*batch).shape[-1] == rows
    assert torch.equal(saved.logits(*batch), policy.logits(*batch))


@pytest.mark.parametrize("shown", [True, False])
def test_a_load_leaves_what_transformers_shows_as_it_was(tmp_path, monkeypatch, shown):
    """Whether it succeeds or fails. During a load, its own thread shows errors alone."""
    set_bars = {True: logging.enable_progress_bar, False: logging.disable_progress_bar}
    before = logging.is_progress_bar_enabled()
    logger, folder = logging.get_logger("transformers.modeling_utils"), published(tmp_path, "llada")
    (handler,) = getLogger("transformers").handlers

    def messages():
        monkeypatch.setattr(handler, "stream", StringIO())
        logger.warning("a warning")
        logger.error("an error")
        return [line.removeprefix("[transformers] ") for line in handler.stream.getvalue().splitlines()]

    try:
        set_bars[shown]()
        load_policy(folder)
        assert messages() == ["a warning", "an error"] and logging.is_progress_bar_enabled() == shown
        with pytest.raises(KeyError), loading.quiet_progress():
            assert messages() == ["an error"] and not logging.is_progress_bar_enabled()
            with ThreadPoolExecutor(1) as pool:
                assert pool.submit(messages).result() == ["a warning", "an error"]
            raise KeyError
        assert messages() == ["a warning", "an error"] and logging.is_progress_bar_enabled() == shown
    finally:
        set_bars[before]()


def test_pickled_weights_are_not_downloaded(tmp_path, monkeypatch):
    """They run code when they are opened. What is left is enough to load the model."""
    hub, cache = published(tmp_path / "hub", "llada"), tmp_path / "cache"
    for name in ("pytorch_model.bin", "model.pt", "model.pth", "model.ckpt", "model.pkl"):
        (hub / name).write_text("")

    def download(model, *, allow_patterns=None):
        assert model == "owner/name"
        cache.mkdir()
        for name in filter_repo_objects([file.name for file in hub.iterdir()], allow_patterns=allow_patterns):
            shutil.copyfile(hub / name, cache / name)
        return str(cache)

    monkeypatch.setattr(loading, "snapshot_download", download)
    load_policy("owner/name")
    assert {file.suffix for file in cache.iterdir()} == {".json", ".safetensors"}


def test_a_model_that_an_offline_machine_does_not_hold_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ValueError, match=r"model='owner/name' is not a folder, and not in the cache.* --model FOLDER"):
        load_policy("owner/name")
    (tmp_path / "models--owner--name").mkdir()  # as an interrupted download leaves it
    refuses(r"model='owner/name' is not complete in this machine's cache", lambda: load_policy("owner/name"))


@pytest.mark.parametrize("load", [loading.load_config, loading.checkpoint_folder, load_policy])
def test_a_path_that_is_missing_is_answered_with_the_folders_beside_it(tmp_path, monkeypatch, load):
    """Of the checkpoints that save_total_limit deleted, and of a run whose name has a slip."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    for step in range(1, 8):
        (tmp_path / f"out/night/checkpoints/step-{step:06d}").mkdir(parents=True)
    (tmp_path / "out/night/checkpoints/latest").write_text("step-000007\n")
    (tmp_path / "out/.hidden").mkdir()
    with pytest.raises(
        ValueError, match=r"'out/nihgt' is not a folder, and not in the cache.*; out has night; the nearest is night$"
    ):
        load("out/nihgt")
    kept = r"checkpoints has \.\.\., step-000003, .*, step-000007; the nearest is step-00000\d$"
    with pytest.raises(ValueError, match=rf"step-000000' is neither a folder nor a hub id.*{kept}"):
        load(tmp_path / "out/night/checkpoints/step-000000")
    for name in "abcdefg":
        (tmp_path / f"out/z{name}").mkdir()
    refuses(r"; out has \.\.\., zc, zd, ze, zf, zg; the nearest is night$", lambda: load("out/nights"))
    refuses(r"'nights' is neither a folder nor a hub id .*; \. has out$", lambda: load("nights"))
    refuses(r"'gone/night' is not a folder, .*, or download the model elsewhere$", lambda: load("gone/night"))


def test_a_runs_folder_is_its_newest_checkpoint(tmp_path):
    checkpoints = tmp_path / "run/checkpoints"
    for step in (3, 12):
        checkpoint(checkpoints / f"step-{step:06d}", "llama")
    (checkpoints / "latest").write_text("step-000012\n")
    newest = load_policy(checkpoints / "step-000012")
    for policy in (
        load_policy(tmp_path / "run"),
        load_weights(load_policy(checkpoints / "step-000003"), tmp_path / "run"),
    ):
        for ours, theirs in zip(policy.module.parameters(), newest.module.parameters(), strict=True):
            assert torch.equal(ours, theirs)
    assert loading.load_config(tmp_path / "run") == loading.load_config(checkpoints / "step-000012")
    assert loading.checkpoint_folder(tmp_path / "run") == checkpoints / "step-000012"
    for damaged in ("", "step-000004\n", "../checkpoints/step-000003\n", "..\n", ".\n"):
        (checkpoints / "latest").write_text(damaged)
        for load in (loading.load_config, load_policy, partial(load_weights, newest)):
            with pytest.raises(ValueError, match="run is a run's folder without a checkpoint yet; give a checkpoint"):
                load(tmp_path / "run")


@pytest.mark.parametrize("load", [loading.load_config, loading.checkpoint_folder, load_policy])
def test_without_a_network_a_hub_id_is_refused_at_the_first_try(tmp_path, monkeypatch, capsys, load):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    tries, logged = [], []
    monkeypatch.setattr(Logger, "handle", lambda logger, record: logged.append(record))

    def fail(host, *_, **__):
        tries.append(host)
        raise socket.gaierror("no network")

    monkeypatch.setattr(socket, "getaddrinfo", fail)
    refuses("model='owner/name' is not a folder, and not in the cache, and the hub cannot", lambda: load("owner/name"))
    assert len(tries) == 1 and not capsys.readouterr().err and not logged


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub whose repositories are folders, and the files that were fetched from it."""
    fetched = []
    response: Any = SimpleNamespace(headers={}, request=None)

    def download(name, *, allow_patterns):
        if not (tmp_path / name).exists():
            raise RepositoryNotFoundError("404 Client Error\nRepository Not Found", response=response)
        names = [file.name for file in (tmp_path / name).iterdir()]
        fetched.extend(f"{name}/{file}" for file in filter_repo_objects(names, allow_patterns=allow_patterns))
        return str(tmp_path / name)

    monkeypatch.setattr(loading, "snapshot_download", download)
    return tmp_path, fetched


def test_the_config_of_a_hubs_model_is_read_without_its_weights(hub):
    folder, fetched = hub
    config = {"architectures": ["DreamModel"], "model_type": "Dream"}
    for name, file, content in (
        ("owner/full", "config.json", config),
        ("owner/adapters", "adapter_config.json", {"base_model_name_or_path": "owner/full"}),
    ):
        (folder / name).mkdir(parents=True)
        (folder / name / file).write_text(json.dumps(content))
    (folder / "owner/full/model.safetensors").write_text("")
    (folder / "owner/bare").mkdir()
    local = folder / "mine"
    local.mkdir()
    (local / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "owner/full"}))

    assert loading.load_config("owner/full") == loading.load_config("owner/adapters") == config
    assert loading.load_config(local) == config
    assert set(fetched) == {
        "owner/full/config.json",
        "owner/adapters/adapter_config.json",
    }
    fetched.clear()
    assert loading.load_config("GSAI-ML/LLaDA-8B-Instruct")["n_layers"] == 32 and not fetched  # the package carries it
    refuses("model='owner/bare': its repository has no config", lambda: loading.load_config("owner/bare"))
    for load in (loading.load_config, loading.checkpoint_folder):
        with pytest.raises(ValueError, match=r"'owner/none' is not a folder, and the hub refuses it as an id \(404 C"):
            load("owner/none")
    for text in ("", "/no/folder", "plain", "../up"):
        with pytest.raises(ValueError, match="model="):
            loading.load_config(text)


@pytest.mark.repeated(first_only=True)
@pytest.mark.parametrize("family", ["llada", "bert", "llama"])
def test_a_folder_of_two_sets_of_weights_is_refused(tmp_path, family):
    """The headers of one would be checked, and the other loaded: of the index, of one file, or of adapters."""
    folder = checkpoint(tmp_path / "source", family)
    policy = load_policy(folder)
    shards, single, config = tmp_path / "shards", tmp_path / "single", tmp_path / "config"
    for copied in (shards, single, config):
        shutil.copytree(folder, copied)
    write_tensors(read_tensors(folder), shards, max_shard_size=2000)
    assert (shards / INDEX).is_file() and not (shards / "model.safetensors").exists()
    load_policy(shards)

    shutil.copy(folder / "model.safetensors", shards)
    refuses(r"model.safetensors and the files of .* are two sets of weights; delete", lambda: load_policy(shards))

    add_lora(policy, Lora(r=2))
    save_adapter(policy, single, base=str(folder))
    refuses(r"has a model's weights \(model.safetensors\) and adapters \(adapter_config", lambda: load_policy(single))
    (single / "model.safetensors").unlink()  # as some tools write adapters, with the base's config beside them
    assert torch.equal(embedding(load_policy(single)), embedding(policy))

    fields = json.loads((config / "config.json").read_text())
    (config / "config.json").write_text(json.dumps(fields | {"transformers_weights": "other.safetensors"}))
    refuses(r"transformers_weights='other.safetensors'; delete the field", lambda: load_policy(config))


@pytest.mark.repeated
@pytest.mark.parametrize("stock", [False, True])
@pytest.mark.parametrize("sizes", [(2000, 10**9), (10**9, 2000)], ids=["shards first", "one file first"])
def test_weights_are_saved_over_others_without_leaving_any(tmp_path, monkeypatch, stock, sizes):
    for seed, size in enumerate(sizes):
        monkeypatch.setattr(loading, "MAX_FILE_SIZE", size)
        policy = tiny_llama(characters="ab", causal=True, hidden_size=16, num_layers=1, seed=seed)
        policy.save_pretrained(tmp_path, stock=stock)
    assert torch.equal(embedding(load_policy(tmp_path)), embedding(policy))


def embedding(policy):
    return policy.module.get_input_embeddings().weight
