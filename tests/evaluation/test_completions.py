"""Rows of stored completions."""

import pytest
import torch
from tiny_recipe import SIZES

from dllm_rl.evaluation.completions import fingerprint, make_row
from dllm_rl.models.tiny import tiny_masked_lm
from dllm_rl.quantization.rollout_policy import quantized_copy
from dllm_rl.quantization.schemes import fake_quantize
from dllm_rl.tasks.base import Problem


def test_a_field_that_is_named_blank_is_refused_only_beside_a_blank():
    fields = {"blank": "mine"}
    with pytest.raises(ValueError, match="field 'blank' of the problem has a name that stored completions need"):
        make_row(Problem("a_", fields=fields, blank="_"), "b", {})
    assert make_row(Problem("a", fields=fields), "b", {})["blank"] == "mine"


def test_a_fingerprint_tells_layers_of_equal_weights_apart():
    policy = tiny_masked_lm(**SIZES)
    # The inputs alone are rounded: every weight is the learner's.
    rounded = quantized_copy(policy, fake_quantize(weight=None, activation="int8"))
    assert all(map(torch.equal, rounded.module.parameters(), policy.module.parameters()))
    assert fingerprint(rounded) != fingerprint(policy)
