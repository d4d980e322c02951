"""The functions in which backbones differ, by hand."""

from dataclasses import replace

import torch

from dllm_rl.models.base import CheckpointFiles, FamilySpec, block_causal_mask, block_ranks, position_ids

MASK = torch.tensor([[False, False, True, True, True], [True, True, True, True, True]])
BLOCKS = FamilySpec(name="blocks", attention="block_causal", block_size=2, mask_id=9)


def test_positions_count_tokens_and_not_padding():
    assert position_ids(MASK).tolist() == [[0, 0, 0, 1, 2], [0, 1, 2, 3, 4]]


def test_a_block_sees_itself_and_earlier_ones():
    """Blocks of two from a row's first token: row 0 is pad pad | a b | c, row 1 is a b | c d | e."""
    place = position_ids(MASK)
    seen = block_causal_mask(MASK, *block_ranks(BLOCKS, place, place))[:, 0].int().tolist()
    assert seen[0][2:] == [[0, 0, 1, 1, 0], [0, 0, 1, 1, 0], [0, 0, 1, 1, 1]]
    assert seen[1] == [[1, 1, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 1, 0], [1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]


def test_a_block_without_a_mask_is_causal():
    """As above; the mask is 9. Row 0 is pad pad | a b | 9, row 1 is a 9 | c d | e."""
    tokens = torch.tensor([[0, 0, 1, 2, 9], [1, 9, 3, 4, 5]])
    spec = replace(BLOCKS, causal_context=True)
    seen = block_causal_mask(MASK, *block_ranks(spec, tokens, position_ids(MASK)))[:, 0].int().tolist()
    assert seen[0][2:] == [[0, 0, 1, 0, 0], [0, 0, 1, 1, 0], [0, 0, 1, 1, 1]]
    assert seen[1] == [[1, 1, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]


def test_a_family_recognizes_its_architectures():
    files = CheckpointFiles(architectures=("*ForMaskedLM", "Egg"), config_test=lambda raw: "no" not in raw)
    for names, known in ((["BertForMaskedLM"], True), (["Egg"], True), (["Eggs"], False), ([], False), (None, False)):
        assert files.match({"architectures": names}) == known, names
    assert not files.match({"architectures": ["Egg"], "no": 1})
