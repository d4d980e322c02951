"""Randomness: every random number is a pure function of a key, such as a seed, a step and a position."""

import hashlib
import math
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Generator, Tensor


def generator_for(*key: object) -> Generator:
    """Return a generator that is a pure function of its key, such as (seed, "rollout", step).

    A resumed run makes it again from the key, so that checkpoints contain no generator states.
    """
    digest = hashlib.sha256("/".join(map(str, key)).encode()).digest()  # Python's hash() differs between processes
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)  # a seed has 63 bits


def row_seeds(generator: Generator, num_rows: int) -> Int[Tensor, " B"]:
    """Draw one seed per row; the seed of row i does not depend on later rows."""
    return torch.randint(2**63 - 1, (num_rows,), generator=generator)


GAMMA = 0x9E3779B97F4A7C15 - 2**64  # the odd 64-bit constants of SplitMix64, as signed integers
MULTIPLIER_1 = 0xBF58476D1CE4E5B9 - 2**64
MULTIPLIER_2 = 0x94D049BB133111EB - 2**64


def uniforms(
    seeds: Int[Tensor, " K"], steps: Int[Tensor, " K"], positions: Int[Tensor, " K"], *, stream: int
) -> Float[Tensor, " K"]:
    """Compute uniform numbers in [0, 1), the same on every device and in every batch [ours].

    They are fp64 with 53 random bits, from two rounds of SplitMix64 (Steele, Lea, Flood 2014). `positions` count from
    the completion's start, so that padding changes nothing.
    """
    state = _mix(seeds + (2 * steps + (stream + 1)) * GAMMA)
    bits = (_mix(state + (positions + 1) * GAMMA) >> 11) & (2**53 - 1)  # fp64 has 53 bits
    return bits.double() * 2.0**-53


def keep_mask(
    shape: Sequence[int], *, seed: int, step: int, drop: float, device: torch.device | str
) -> Bool[Tensor, "*S"]:
    """Compute a dropout mask that is False with probability `drop` (to 2^-17), the same on every device [ours].

    It is a function of seed, step and position.
    """
    count = math.prod(shape)
    state = _mix(torch.tensor(seed) + torch.tensor(step + 1) * GAMMA)
    # Each 64-bit number decides four positions, with 16 bits for each. The state is computed on the CPU.
    bits = _mix(state + torch.arange(1, -(-count // 4) + 1, device=device) * GAMMA).view(torch.int16)[:count]
    return (bits >= min(round(drop * 2**16), 2**16 - 1) - 2**15).view(*shape)


def _mix(x: Int[Tensor, "*K"]) -> Int[Tensor, "*K"]:
    """Apply SplitMix64's finalizer; products wrap around at 64 bits."""
    # The masks fill with zeros from the left, because `>>` fills with the sign.
    x = (x ^ ((x >> 30) & (2**34 - 1))) * MULTIPLIER_1
    x = (x ^ ((x >> 27) & (2**37 - 1))) * MULTIPLIER_2
    return x ^ ((x >> 31) & (2**33 - 1))
