"""LoRA's settings."""

import pytest

from dllm_rl.models.lora import Lora, lora_d1, lora_r16


def test_named_adapters_are_those_that_were_published():
    assert lora_d1() == Lora(r=128, alpha=64.0, dropout=0.05) and lora_r16() == Lora(r=16, alpha=32.0)


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"r": 0}, "lora.r=0 must be at least 1"),
        ({"dropout": 1.0}, r"lora.dropout=1.0 must lie in \[0, 1\)"),
    ],
)
def test_settings_that_cannot_be(kwargs, words):
    with pytest.raises(ValueError, match=words):
        Lora(**kwargs)
