"""Time as a property, not as a measurement: what grows with the square of a million does not end."""

from collections.abc import Iterator
from contextlib import contextmanager
from time import process_time


@contextmanager
def linear_time() -> Iterator[None]:
    """Fails where a million characters take over 5 s of processor time: a hundred times what they take on any machine,
    busy or not, and a hundredth of what a quadratic reading takes. Speed itself is measured in benchmarks/."""
    begin = process_time()
    yield
    assert process_time() - begin < 5.0
