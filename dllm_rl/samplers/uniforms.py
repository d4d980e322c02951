"""Random numbers that are a function of (row seed, step, position): no state, so no row can disturb another's."""

from jaxtyping import Float, Int
from torch import Tensor

GAMMA = 0x9E3779B97F4A7C15 - 2**64  # the odd 64-bit constants of SplitMix64, as signed integers
FIRST = 0xBF58476D1CE4E5B9 - 2**64
SECOND = 0x94D049BB133111EB - 2**64


def uniforms(
    seeds: Int[Tensor, " K"], steps: Int[Tensor, " K"], positions: Int[Tensor, " K"], *, stream: int
) -> Float[Tensor, " K"]:
    """Uniforms in [0, 1), fp64 with 53 random bits, the same on every device and for every batch.

    Two rounds of SplitMix64 (Steele, Lea, Flood 2014): the seed with the step and the stream, then with the position.
    `positions` count from the first token of the completion, so that padding changes nothing. [ours]
    """
    state = _mix(seeds + (2 * steps + stream + 1) * GAMMA)
    bits = _shift(_mix(state + (positions + 1) * GAMMA), 11)
    return bits.double() * 2.0**-53


def _mix(x: Int[Tensor, " K"]) -> Int[Tensor, " K"]:
    """SplitMix64's finaliser; products wrap around at 64 bits."""
    x = (x ^ _shift(x, 30)) * FIRST
    x = (x ^ _shift(x, 27)) * SECOND
    return x ^ _shift(x, 31)


def _shift(x: Int[Tensor, " K"], bits: int) -> Int[Tensor, " K"]:
    """Shift right and fill with zeros: on signed integers `>>` would fill with the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
