"""How much code a default step enters: it may become less, and not more."""

from benchmarks import step_size


def test_a_default_step_enters_no_more_than_it_did():
    found = step_size.of_a_step()
    assert 100 < len(found) <= 324 and 30 < len(step_size.by_file(found)) <= 59
