"""Files that a run has read, changed before its resume: it is refused, whatever their sizes and dates."""

import json
import os
from pathlib import Path

import pytest
from repetitions import slow

from dllm_rl import Lora, grpo, tiny_masked_lm
from dllm_rl.groups import Teacher

pytestmark = pytest.mark.usefixtures("no_rehearsal")

ROWS = [{"prompt": f"{a}="} for a in "12345678"]
SETTINGS = {"max_new_tokens": 2, "train_batch_size": 2, "num_generations": 2, "eval_split": 2, "report_to": "none"}
SETTINGS |= {"lr_schedule_steps": 4, "num_steps": 0}


def policy(seed=0):
    return tiny_masked_lm(characters="12345678=", hidden_size=16, num_layers=1, seed=seed)


def reward(completions, **columns):
    return [float("1" in text) for text in completions]


def other_weights(folder: Path):
    """Of the same size and date."""
    file = folder / "model.safetensors"
    before = file.stat()
    policy(seed=5).save_pretrained(folder)
    assert file.stat().st_size == before.st_size
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def a_link_to_another(folder: Path):
    policy(seed=5).save_pretrained(folder.parent / "other")
    folder.rename(folder.parent / "original")
    folder.symlink_to("other")


def a_link_to_the_same(folder: Path):
    folder.rename(folder.parent / "original")
    folder.symlink_to("original")


def with_field(file, **values):
    def change(folder: Path):
        path = folder / file
        fields = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(fields | values))

    return change


CHANGES = {
    "weights": other_weights,
    "link": a_link_to_another,
    "config": with_field("config.json", layer_norm_eps=0.1),
    "end tokens": with_field("generation_config.json", eos_token_id=[4]),
    "special tokens": with_field("special_tokens_map.json", cls_token="1"),
    "the same": a_link_to_the_same,
}


@pytest.mark.parametrize(
    ("of", "change"),
    [
        ("teacher", "weights"),
        slow("teacher", "config"),
        slow("teacher", "the same"),
        slow("model", "link"),
        slow("model", "end tokens"),
        slow("model", "special tokens"),
        ("model", "the same"),
    ],
)
def test_a_teacher_or_a_base_of_adapters_that_changed_is_refused(tmp_path, of, change):
    """A link to the same files changes nothing."""
    policy().save_pretrained(tmp_path / "folder")
    model, more = (policy(), {"teacher": {"model": str(tmp_path / "folder")}})
    if of == "model":
        model, more = str(tmp_path / "folder"), {"lora": Lora(r=2)}
    settings = SETTINGS | more | {"output_dir": str(tmp_path / "run")}
    grpo(model, ROWS, reward, **settings)
    CHANGES[change](tmp_path / "folder")
    resumed = settings | {"num_steps": 1, "resume_from_checkpoint": "latest"}
    if change != "the same":
        with pytest.raises(ValueError, match=f"{of}.*: its weights, config or tokenizer are not those"):
            grpo(model, ROWS, reward, **resumed)
        resumed |= {"allow_changed": "teacher"}
    if of == "teacher" or change == "the same":
        grpo(model, ROWS, reward, **resumed)


def test_another_teacher_in_memory_is_refused(tmp_path):
    settings = SETTINGS | {"output_dir": str(tmp_path / "run")}
    grpo(policy(), ROWS, reward, teacher=Teacher(model=policy(seed=1)), **settings)
    resumed = settings | {"num_steps": 1, "resume_from_checkpoint": "latest"}
    with pytest.raises(ValueError, match=r"teacher: its weights.*, or resume with allow_changed='teacher'"):
        grpo(policy(), ROWS, reward, teacher=Teacher(model=policy(seed=2)), **resumed)
    grpo(policy(), ROWS, reward, teacher=Teacher(model=policy(seed=1)), **resumed)
