"""Rotary scaling, in the old and the new spelling: what transformers makes of it, and a refusal of all else."""

import json

import pytest
import torch
from layouts import HEAD_DIM, published
from transformers import Qwen2Config

from dllm_rl import load_policy
from dllm_rl.models.checkpoint.rope import rope_parameters

FACTORS = [1.0 + 0.5 * i for i in range(HEAD_DIM // 2)]
SCALINGS = {
    "none": None,
    "yarn": {"factor": 4},
    "yarn, in full": {"factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 16, "attention_factor": 1.5},
    "linear": {"factor": 8.0},
    "dynamic": {"factor": 2.0},
    "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16},
    "longrope": {
        "short_factor": FACTORS,
        "long_factor": [2 * f for f in FACTORS],
        "original_max_position_embeddings": 16,
    },
}


def dream_with(directory, **fields):
    folder = published(directory, "dream")
    config = json.loads((folder / "config.json").read_text()) | fields
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def spelled(kind: str, key: str) -> dict | None:
    return None if kind == "none" else {key: kind.split(",")[0]} | SCALINGS[kind]


@pytest.mark.repeated(every=3)
@pytest.mark.parametrize(("kind", "key"), [("yarn", "rope_type"), *((kind, "type") for kind in SCALINGS)])
def test_scaling_is_read_as_transformers_reads_it(tmp_path, kind, key):
    scaling = spelled(kind, key)
    policy = load_policy(dream_with(tmp_path, rope_scaling=scaling))
    raw = json.loads((tmp_path / "config.json").read_text())
    fields = {k: raw[k] for k in ("hidden_size", "num_attention_heads", "max_position_embeddings", "rope_theta")}
    theirs = Qwen2Config(**fields, rope_scaling=scaling and dict(scaling)).rope_parameters
    theirs.pop("type", None)
    assert policy.module.config.rope_parameters == theirs
    rotary, plain = policy.module.model.rotary_emb, 1e6 ** (-torch.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    expected = {"none": plain, "dynamic": plain, "linear": plain / 8, "longrope": plain / torch.tensor(FACTORS)}
    if kind in expected:  # dynamic scales nothing within the trained length
        torch.testing.assert_close(rotary.inv_freq, expected[kind])
    else:
        assert not torch.allclose(rotary.inv_freq, plain)
    # yarn: 0.1 ln(factor) + 1 on cos and sin unless it is given; longrope: sqrt(1 + ln(64/16) / ln 16)
    scale = {"yarn": 1.138629436, "yarn, in full": 1.5, "longrope": 1.224744871}
    assert rotary.attention_scaling == pytest.approx(scale.get(kind, 1.0))


def test_the_new_spelling_comes_first_and_what_is_inside_before_what_is_beside():
    raw = {"rope_theta": 10.0, "partial_rotary_factor": 0.5}
    assert rope_parameters(raw) == {"rope_type": "default", "rope_theta": 10.0, "partial_rotary_factor": 0.5}
    scaling = {"type": "linear", "factor": 2, "rope_theta": 20.0, "partial_rotary_factor": 0.25, "mscale": None}
    found = {"rope_type": "linear", "factor": 2, "rope_theta": 20.0, "partial_rotary_factor": 0.25}
    assert rope_parameters(raw | {"rope_scaling": scaling}) == found
    assert rope_parameters({"rope_parameters": found, "rope_scaling": {"type": "odd"}}) == found


@pytest.mark.parametrize(
    ("scaling", "words"),
    [
        ({"type": "su", "factor": 2.0}, "has the kind 'su', which is not known; known are default, linear"),
        ({"type": "yarn"}, "rope_scaling of the kind 'yarn' has no 'factor'; add it to config.json"),
        ({"type": "llama3", "factor": 2.0, "low_freq_factor": 1.0}, "of the kind 'llama3' has no 'high_freq_factor'"),
        ({"type": "linear", "factor": 2.0, "beta_fast": 3}, "has an unsupported field 'beta_fast'; remove it"),
        ({"factor": 2.0}, "of the kind 'default' has an unsupported field 'factor'"),
        (
            {"type": "yarn", "rope_type": "default"},
            "has both rope_type='default' and type='yarn'; remove the wrong one",
        ),
        ({"type": "linear", "factor": 0.5}, "factor=0.5; it must be a number of at least 1"),
        ({"type": "linear", "factor": "4"}, "factor='4'; it must be a number of at least 1"),
        ([4.0], "rope_scaling=[4.0] is not an object"),
    ],
)
def test_what_is_not_understood_is_refused(tmp_path, scaling, words):
    with pytest.raises(ValueError) as error:
        load_policy(dream_with(tmp_path, rope_scaling=scaling))
    assert words in str(error.value)


def test_a_config_without_a_base_of_the_frequencies(tmp_path):
    with pytest.raises(ValueError, match="rope_theta is not in the config; set"):
        load_policy(dream_with(tmp_path, rope_theta=None))
