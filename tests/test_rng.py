"""Random numbers as functions of keys: against SplitMix64 in plain integers, and against the definition of a key."""

import hashlib

import pytest
import torch

from dllm_rl.rng import generator_for, keep_mask, row_seeds, uniforms

WORD, GAMMA = 2**64, 0x9E3779B97F4A7C15


def finaliser(x: int) -> int:
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) % WORD
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) % WORD
    return x ^ (x >> 31)


def by_hand(seed: int, step: int, position: int, stream: int) -> float:
    state = finaliser((seed + (2 * step + stream + 1) * GAMMA) % WORD)
    return (finaliser((state + (position + 1) * GAMMA) % WORD) >> 11) / 2**53


def test_uniforms_are_two_rounds_of_splitmix64():
    # SplitMix64's first two outputs from the seed 1234567, as published with its reference implementation.
    assert [finaliser((1234567 + i * GAMMA) % WORD) for i in (1, 2)] == [6457827717110365317, 3203168211198807973]
    keys = [(0, 0, 0), (5, 0, 0), (5, 1, 0), (5, 0, 1), (2**63 - 2, 31, 4095), (77, 12, 3)]
    for stream in (0, 1):
        found = uniforms(*torch.tensor(keys).T, stream=stream)
        assert found.dtype == torch.float64
        assert found.tolist() == [by_hand(*key, stream) for key in keys]


def test_uniforms_differ_by_seed_step_position_and_stream():
    grid = torch.cartesian_prod(torch.arange(20), torch.arange(20), torch.arange(20)).T
    found = torch.cat([uniforms(*grid, stream=stream) for stream in (0, 1)])
    assert len(found.unique()) == 16_000
    assert abs(found.mean() - 0.5) < 4 * (1 / 12 / 16_000) ** 0.5 and found.min() >= 0 and found.max() < 1


def test_a_mask_takes_sixteen_bits_of_a_number_for_each_place():
    """To keep with drop=0.3 is to draw at least round(0.3 * 2^16), as a number with a sign, from the lowest bits on."""
    shape, seed, step = (3, 7), 2**40 - 5, 6
    state, drawn = finaliser((seed + (step + 1) * GAMMA) % WORD), []
    for number in range(1, 7):
        bits = finaliser((state + number * GAMMA) % WORD)
        drawn += [(bits >> shift) & 0xFFFF for shift in (0, 16, 32, 48)]
    expected = [(part ^ 0x8000) >= round(0.3 * 2**16) for part in drawn[:21]]
    found = keep_mask(shape, seed=seed, step=step, drop=0.3, device="cpu")
    assert found.shape == shape and found.flatten().tolist() == expected


@pytest.mark.parametrize("drop", [0.0, 0.05, 0.5, 0.999999])
def test_a_mask_drops_its_share_and_differs_by_seed_and_step(drop):
    masks = [keep_mask((400, 250), seed=s, step=t, drop=drop, device="cpu") for s, t in ((1, 1), (2, 1), (1, 2))]
    for mask in masks:
        assert abs((~mask).double().mean() - drop) < 5 * (max(drop * (1 - drop), 1e-5) / mask.numel()) ** 0.5
    if drop == 0.5:  # independent masks agree at half of the places
        for one, other in ((0, 1), (0, 2)):
            assert abs((masks[one] == masks[other]).double().mean() - 0.5) < 5 * (0.25 / 100_000) ** 0.5
        assert abs((masks[0][:, 1:] == masks[0][:, :-1]).double().mean() - 0.5) < 5 * (0.25 / 100_000) ** 0.5


def test_a_generator_is_a_function_of_its_whole_key():
    digest = hashlib.sha256(b"3/rollout/17").digest()
    assert generator_for(3, "rollout", 17).initial_seed() == int.from_bytes(digest[:8], "big") >> 1
    keys = [(3, "rollout", 17), (4, "rollout", 17), (3, "noise", 17), (3, "rollout", 18), (3, "rollout", 17, 1)]
    assert len({generator_for(*key).initial_seed() for key in keys}) == len(keys)


def test_row_seeds_do_not_depend_on_the_rows_that_follow():
    few, many = (row_seeds(torch.Generator().manual_seed(1), n) for n in (3, 8))
    assert torch.equal(few, many[:3]) and len(many.unique()) == 8
