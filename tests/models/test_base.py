"""The functions in which backbones differ, by hand."""

import torch

from dllm_rl.models.base import FamilySpec, block_causal_mask, position_ids

MASK = torch.tensor([[False, False, True, True, True], [True, True, True, True, True]])


def test_positions_count_tokens_and_not_padding():
    assert position_ids(MASK).tolist() == [[0, 0, 0, 1, 2], [0, 1, 2, 3, 4]]


def test_a_block_sees_itself_and_earlier_ones():
    """Blocks of two from a row's first token: row 0 is pad pad | a b | c, row 1 is a b | c d | e."""
    seen = block_causal_mask(MASK, position_ids(MASK), 2)[:, 0].int().tolist()
    assert seen[0][2:] == [[0, 0, 1, 1, 0], [0, 0, 1, 1, 0], [0, 0, 1, 1, 1]]
    assert seen[1] == [[1, 1, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 1, 0], [1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]


def test_a_family_recognises_its_architectures():
    spec = FamilySpec(
        name="a", attention="full", architectures=("*ForMaskedLM", "Egg"), when=lambda raw: "no" not in raw
    )
    for names, known in ((["BertForMaskedLM"], True), (["Egg"], True), (["Eggs"], False), ([], False), (None, False)):
        assert spec.recognises({"architectures": names}) == known, names
    assert not spec.recognises({"architectures": ["Egg"], "no": 1})
