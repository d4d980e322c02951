"""What an untrusted checkpoint cannot do before a library opens it; what is refused is refused in one line."""

import io
import json
import logging
import math
import os
from functools import partial
from pathlib import Path
from shutil import copytree

import pytest
from refusals import refuses
from safetensors.torch import load_file, save_file
from small_checkpoints import SIZES, edit

from dllm_rl import load_policy
from dllm_rl.decoding.prompts import prompt_ids
from dllm_rl.models.checkpoint.adapters import load_adapter, save_adapter
from dllm_rl.models.checkpoint.loading import build_empty, checkpoint_folder, without_implementation_fields
from dllm_rl.models.load import load_weights
from dllm_rl.models.lora import add_lora
from dllm_rl.models.lora_settings import Lora
from dllm_rl.models.tiny import tiny_masked_lm


@pytest.fixture(scope="module")
def model():
    """What refused adapters and weights are not loaded into."""
    return tiny_masked_lm(**SIZES)


@pytest.fixture(scope="module")
def saved_adapters(tmp_path_factory):
    policy, directory = tiny_masked_lm(**SIZES), tmp_path_factory.mktemp("adapters")
    add_lora(policy, Lora(r=2))
    save_adapter(policy, directory)
    return directory


@pytest.fixture
def adapters(saved_adapters, tmp_path):
    return copytree(saved_adapters, tmp_path / "adapters")


NAMES = ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "generation_config.json"]


def test_a_file_that_may_not_be_read_is_named(folder, monkeypatch):
    """safetensors says of it that there is no such file."""

    def forbidden(path, *arguments, **options):
        if path.name == "model.safetensors":
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, *arguments, **options)

    opened = Path.open
    monkeypatch.setattr(Path, "open", forbidden)
    refuses(r"Permission denied.*model\.safetensors", lambda: load_policy(folder), PermissionError)


@pytest.mark.repeated(every=4)
@pytest.mark.parametrize("name", [*NAMES, "extra.json"])
@pytest.mark.parametrize("make", [os.mkfifo, Path.mkdir, lambda path: path.symlink_to("/dev/zero")])
def test_what_is_no_regular_file_is_refused_before_it_is_opened(folder, name, make, model):
    (folder / name).unlink(missing_ok=True)
    make(folder / name)
    for read in (load_policy, checkpoint_folder, partial(load_weights, model)):
        with pytest.raises(ValueError, match=f"{name} is not a regular file; fetch the checkpoint again"):
            read(folder)


def test_links_to_regular_files_are_opened(folder):
    blobs = folder.with_name("blobs")
    folder.rename(blobs)
    folder.mkdir()
    for path in blobs.iterdir():
        (folder / path.name).symlink_to(path)
    load_policy(folder)


def test_weights_that_another_tool_quantized_are_refused(folder):
    edit(folder, quantization_config={"quant_method": "gptq", "bits": 4})
    refuses(r"config\.json has a quantization_config; give the checkpoint in", lambda: load_policy(folder))


@pytest.mark.parametrize("name", ["attn_implementation", "_attn_implementation", "experts_implementation"])
def test_a_config_does_not_choose_the_code_that_computes(folder, name, model):
    usual = model.module.config._attn_implementation
    raw = edit(folder, **{name: "owner/kernel"})
    for module in (load_policy(folder).module, build_empty(raw)):
        assert module.config._attn_implementation == usual
        assert "owner/kernel" not in str(vars(module.config))


def test_a_nested_config_does_not_choose_it_either():
    assert without_implementation_fields({"text_config": [{"attn_implementation": "a/b", "x": 1}]}) == {
        "text_config": [{"x": 1}]
    }


def test_messages_of_transformers_cannot_steer_the_terminal(folder, monkeypatch):
    handler = logging.getLogger("transformers").handlers[0]
    written = io.StringIO()
    monkeypatch.setattr(handler, "stream", written)
    monkeypatch.setattr(handler, "flush", written.flush)
    logging.getLogger("transformers.models").error("a model of type %s", "x\x1b[31m")
    edit(folder, model_type="llama\x1b[31m")
    load_policy(folder)
    assert "\x1b" not in written.getvalue() and "␛[31m" in written.getvalue()
    logging.getLogger("transformers.models").error("pad_token_id is %s, which is wrong", "9" * 5000)
    last = written.getvalue().splitlines()[-1]
    assert len(last) <= 400 and "pad_token_id is 999" in last and last.endswith("999, which is wrong")


def test_a_template_that_fails_is_refused_where_it_is_used(folder):
    """It may be made for other messages, and plain text needs none."""
    (folder / "chat_template.jinja").write_text("{{ a.b.c")
    policy = load_policy(folder)
    others = ("{{ raise_exception('roles must alternate') }}", "{{ 1 + messages }}", "{{ ''.__class__.__mro__ }}")
    for template in (policy.tokenizer.chat_template, *others):
        policy.tokenizer.chat_template = template
        assert prompt_ids(policy, "1+1=")
        with pytest.raises(ValueError, match=r"^chat_template does not write these messages: [^\n]*$"):
            prompt_ids(policy, [{"role": "user", "content": "1+1="}])


def test_adapters_of_integers_are_refused(adapters, model):
    file = adapters / "adapter_model.safetensors"
    save_file({name: tensor.long() for name, tensor in load_file(file).items()}, file)
    with pytest.raises(ValueError, match=r"has dtype torch\.int64, which is not an adapter.s; save the adapters again"):
        load_adapter(model, adapters)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("r", "4"), ("r", 10**9), ("r", None), ("lora_alpha", []), ("lora_dropout", True)),
        *(("lora_alpha", 10**400), ("lora_alpha", math.nan), ("lora_alpha", math.inf), ("lora_dropout", math.nan)),
    ],
)
def test_adapters_of_other_types_are_refused(adapters, model, name, value):
    config = json.loads((adapters / "adapter_config.json").read_text())
    (adapters / "adapter_config.json").write_text(json.dumps(config | {name: value}))
    problem = "no adapter tensor has a dimension of size " if value == 10**9 else ""
    refuses(rf"adapter_config\.json is damaged: {problem}{name}=", lambda: load_adapter(model, adapters))


def test_adapters_that_are_not_there_are_missed(tmp_path, model):
    with pytest.raises(ValueError, match=r"gone: the adapters are missing; give the folder of saved ones"):
        load_adapter(model, tmp_path / "gone")


@pytest.mark.parametrize("value", [5, -0.5])
def test_a_share_of_dropout_that_is_none_names_its_file(adapters, model, value):
    config = json.loads((adapters / "adapter_config.json").read_text())
    (adapters / "adapter_config.json").write_text(json.dumps(config | {"lora_dropout": value}))
    with pytest.raises(ValueError, match=rf"lora_dropout={value} is not in \[0, 1\); correct adapter_config\.json"):
        load_adapter(model, adapters)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_adapters_that_are_not_finite_are_refused(adapters, model, value):
    file = adapters / "adapter_model.safetensors"
    state = load_file(file)
    name = sorted(state)[-1]
    state[name].view(-1)[0] = value
    save_file(state, file)
    refuses(rf"{name} has NaN or infinite numbers; use earlier adapters", lambda: load_adapter(model, adapters))


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_adapters_that_are_something_else_are_refused(adapters, model, name):
    (adapters / name).write_bytes(b"[1, 2")
    refuses("the adapters are damaged", lambda: load_adapter(model, adapters))
