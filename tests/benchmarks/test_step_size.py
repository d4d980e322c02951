"""How much code a default step enters: it may become less, and not more."""

from benchmarks import step_size


def test_a_default_step_enters_no_more_than_it_did():
    found = step_size.of_a_step()
    assert 100 < len(found) <= 200 and 20 < len(step_size.by_file(found)) <= 35


def test_few_functions_take_a_recipe_or_many_parameters():
    found = step_size.parameters_of_functions()
    assert found[next(where for where in found if where.endswith(" step_memory"))] == ["step"]
    assert 10 < sum("recipe" in names for names in found.values()) <= 50
    # Public functions, whose parameters are settings, and the class that lm-eval makes of its options.
    many = {where.split()[-1] for where, names in found.items() if len(names) > 6}
    public = {"grpo_recipe", "evaluate", "diagnose", "load_policy", "tiny_llama", "tiny_moe", "tiny_diffusion_gemma"}
    assert many == public | {"policy_loss", "__init__"}
