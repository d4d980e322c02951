"""How much code a default step enters: it may become less, and not more."""

from benchmarks import step_size


def test_a_default_step_enters_no_more_than_it_did():
    found = step_size.of_a_step()
    assert 100 < len(found) <= 324 and 30 < len(step_size.by_file(found)) <= 59


def test_few_functions_take_a_recipe_or_many_parameters():
    found = step_size.parameters_of_functions()
    assert found[next(where for where in found if where.endswith(" step_memory"))] == ["step"]
    assert 10 < sum("recipe" in names for names in found.values()) <= 50
    assert sum(len(names) > 6 for names in found.values()) <= 9
