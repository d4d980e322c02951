"""The site of docs/site: its pages are there, its reference is whole, its quickstart runs; all without mkdocs."""

import dataclasses
import importlib.util
import json
import math
import re
import runpy
import subprocess
import sys
import threading
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
import yaml
from layouts import checkpoint
from markdown.extensions.toc import slugify
from readme import README, example
from servers import TOKEN, running
from tiny_recipe import made_of

import dllm_rl
from dllm_rl.config import from_command_line
from dllm_rl.groups import GROUPED
from dllm_rl.samplers.rules import FunctionRank
from dllm_rl.testing import check_corrector, check_order
from dllm_rl.training.cautions import cautions
from dllm_rl.training.dry_run.plan import USABLE_SHARE, plan
from recipes.llada_8b import recipe_of
from recipes.quantized_sudoku import recipe as main_job
from recipes.studies.likelihoods.surrogates import UniformSteps

DOCS = Path(__file__).parents[1] / "docs"
EXAMPLES = DOCS.parent / "recipes" / "examples"
STAGES = ("rollout", "scoring", "update")
hooks = importlib.util.module_from_spec(importlib.util.spec_from_file_location("hooks", DOCS / "site" / "hooks.py"))
hooks.__spec__.loader.exec_module(hooks)


def pages(nav):
    for entry in nav:
        value = entry if isinstance(entry, str) else next(iter(entry.values()))
        yield from [value] if isinstance(value, str) else pages(value)


def test_every_page_has_its_place_and_every_place_its_page():
    nav = yaml.safe_load((DOCS / "site" / "mkdocs.yml").read_text())["nav"]
    root = DOCS.parent
    written = [root / "README.md", root / "benchmarks" / "README.md", DOCS / "quickstart.ipynb"]
    written += [path for folder in (DOCS, root / "recipes") for path in folder.rglob("*.md")]
    assert sorted(pages(nav)) == sorted([*map(hooks.place, written), *hooks.reference()])


def test_the_notebook_is_a_page_with_what_its_cells_printed():
    page = hooks.notebook()
    assert page.startswith("# Quickstart\n") and "```python\nfrom dllm_rl import" in page
    assert re.search(r"```text\n[^`]*held-out reward: 0.0 -> 1.0", page)


def test_every_public_name_is_in_the_reference_once():
    listed = re.findall(r"^::: (\S+)$", "\n".join(hooks.reference().values()), re.MULTILINE)
    modules, _, names = zip(*[name.rpartition(".") for name in listed], strict=True)
    elsewhere = [name for found in hooks.ELSEWHERE.values() for name in found]
    assert sorted(names) == sorted([*dllm_rl.__all__, *elsewhere])
    assert all(map(hasattr, map(importlib.import_module, modules), names))


def test_the_public_names_are_few():
    assert len(dllm_rl.__all__) <= 93


def test_what_is_public_says_what_it_is():
    assert not [name for name in dllm_rl.__all__ if not (getattr(dllm_rl, name).__doc__ or "").strip()]


def test_the_table_of_a_recipes_fields_is_whole():
    rows = hooks.recipe_fields().splitlines()[2:]
    listed = [row.split("`")[1] for row in rows]
    assert [name for name in listed if "." not in name] == [field.name for field in dataclasses.fields(dllm_rl.Recipe)]
    assert {path for path in GROUPED.values() if not path.startswith("optim.")} <= set(listed)
    assert all(len(re.findall(r"(?<!\\)\|", row)) == 4 for row in rows)
    assert "| `num_generations` | `8` | completions per prompt (G) |" in rows
    assert hooks.recipe_fields() in hooks.reference()["reference/training.md"]


def test_links_lead_to_where_files_lie_in_the_site():
    root = DOCS.parent
    for source, link, becomes in [
        ("docs/train.md", "[a](../README.md)", "[a](index.md)"),
        ("docs/train.md", "[a](../README.md#x)", "[a](index.md#x)"),
        ("docs/train.md", "[a](models.md#b)", "[a](models.md#b)"),
        ("docs/train.md", "[a](https://x.org/b)", "[a](https://x.org/b)"),
        ("README.md", "![a](recipes/latin_sudoku.png)", "![a](repository/recipes/latin_sudoku.png)"),
        ("README.md", "[a](docs/models.md)", "[a](models.md)"),
        ("README.md", "see [a](docs), [b](docs/trl.md)", "see a, [b](trl.md)"),
        ("README.md", "[![a](recipes/ess.png)](docs/x.jsonl)", "[![a](repository/recipes/ess.png)](x.jsonl)"),
    ]:
        assert hooks.relinked(link, root / source) == becomes
    outside = hooks.linked(sorted(DOCS.rglob("*.md")))
    assert root / "README.md" in outside and root / "recipes" / "latin_sudoku.png" in outside
    assert not [path for path in outside if path.is_relative_to(DOCS)] and len(outside) == len(set(outside))


def prose(page):
    """A page without its blocks of code: what looks like a heading or a link there is none."""
    return re.sub(r"^( *)```.*?^\1```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def headings(page):
    """The anchors of a page's headings, as the site and GitHub name them."""
    titles = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {slugify(re.sub(r"[`*]|\]\([^)]*\)", "", title), "-") for title in titles}


def test_every_link_leads_to_a_file_and_a_heading():
    root = DOCS.parent
    written = [root / "README.md", root / "CHANGELOG.md"]
    written += [page for folder in ("docs", "recipes", "benchmarks") for page in (root / folder).rglob("*.md")]
    broken = []
    for page in written:
        text = re.sub(r"`[^`\n]+`(?!\])", "", prose(page))
        for link in re.findall(r"\]\((?!https?:)([^)\s]+)\)", text):
            path, _, anchor = link.partition("#")
            target = (page.parent / path).resolve() if path else page
            if not target.exists() or (anchor and target.suffix == ".md" and anchor not in headings(target)):
                broken.append(f"{page.relative_to(root)}: {link}")
    assert not broken


def test_the_first_reward_is_learned_from(tmp_path, monkeypatch):
    (tmp_path / "sort_digits.py").write_text(
        example("Your first reward in ten minutes").replace("num_steps=200", "num_steps=2")
    )
    monkeypatch.chdir(tmp_path)
    made = runpy.run_path("sort_digits.py")
    assert made["summary"]["eval_problems"] == 51 and (tmp_path / "runs/sort/training.png").is_file()
    assert made["in_order"](["826=", "415="], ["268", "1"]) == [1, 1 / 3]
    names = {*re.findall(r"`([^`\n]+)`", (DOCS / "metrics.md").read_text())} - {"rollout_corr/*", "trained/*"}
    variable = re.compile(r"NAME|METRIC|STAGE|(?<=_)[IK]\b|\\\*")
    described = re.compile("|".join(variable.sub(".*", re.escape(name)) for name in names))
    lines = (tmp_path / "runs/sort/metrics.jsonl").read_text().splitlines()
    logged = {name for line in lines for name in json.loads(line)} - {"step", "warmup_step"}
    said = {name: name.replace("trained/", "rollout_corr/") for name in logged}  # the same numbers, over fewer tokens
    unsaid = {name for name, same in said.items() if not (described.fullmatch(name) or described.fullmatch(same))}
    assert len(logged) > 80 and unsaid == set()


def all_weights():
    """The options of `$ALL` of docs/large-models.md, in words."""
    return re.search(r'^    ALL="(.*)"$', (DOCS / "large-models.md").read_text(), re.MULTILINE)[1].split()


def mine(folder, monkeypatch):
    """What mine.py of docs/large-models.md leaves, with 400 problems."""
    rows = [{"prompt": [{"role": "user", "content": f"{i}"}], "answer": str(i)} for i in range(400)]
    (folder / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", folder / "cache")
    monkeypatch.chdir(folder)
    (folder / "mine.py").write_text(example("Train LLaDA-8B on one GPU"))
    return runpy.run_path("mine.py")


def test_a_script_of_ones_own_reads_the_options_of_its_launches(tmp_path, monkeypatch):
    make, tiny = dllm_rl.grpo_recipe, dllm_rl.tiny_masked_lm(characters="0123456789+=?")
    monkeypatch.setattr(
        dllm_rl, "grpo_recipe", lambda model, *given, **more: make(tiny, *given, preset="large", **more)
    )
    made = mine(tmp_path, monkeypatch)
    recipe, task = made["recipe"], made["recipe"].task
    given = from_command_line(recipe, ["--saves.steps", "10", "--resume_from_checkpoint", "latest"])  # slurm.sh's
    assert (given.saves.steps, given.resume_from_checkpoint, given.directory) == (10, "latest", "runs/mine-seed0")
    assert recipe.train_batch_size % 8 == 0 and cautions(recipe) == [] and len(task) == 360
    assert made["rows"].column_names == ["prompt", "answer"]
    assert [task.reward(task[3], text).value for text in ("It is 3", "33", "")] == [1.0, 0.0, 0.0]
    given = from_command_line(recipe, all_weights())
    assert given.lora is None and given.shard_size == 0 and cautions(given) == []


def test_chats_then_rewards_are_two_starts_of_one_file(tmp_path, monkeypatch):
    """The first start makes a valid SFT record; the second, once its checkpoint is there, a recipe without cautions."""
    both = str(EXAMPLES / "chats_then_rl.py")
    text = Path(both).read_text()
    rows = [{"prompt": [{"role": "user", "content": f"{i}"}], "answer": str(i)} for i in range(4)]
    (tmp_path / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)
    made = []
    monkeypatch.setattr(
        dllm_rl,
        "sft",
        lambda *given, **more: made.append((given, made_of(dllm_rl.SFT, model=given[0], dataset=rows, **more))),
    )
    runpy.run_path(both)
    (start, chats), first = made.pop()
    assert (start, chats) == ("GSAI-ML/LLaDA-8B-Instruct", "chats.jsonl") and first.completion_length == 256
    tuned = Path(re.search(r'TUNED = "(.+)"', text)[1])
    assert tuned == Path(first.directory) / "checkpoints" / f"step-{first.num_steps:06d}"
    tuned.mkdir(parents=True)

    def record(model, rows, reward, **settings):
        tiny = dllm_rl.tiny_masked_lm(characters="0123456789")
        made.append((model, dllm_rl.grpo_recipe(tiny, rows, reward, **settings)))

    monkeypatch.setattr(dllm_rl, "grpo", record)
    runpy.run_path(both)
    (model, second), task = made[0], made[0][1].task
    assert model == str(tuned) and second.max_new_tokens == 256 and cautions(second) == []
    assert [task.reward(task[2], text).value for text in ("It is 2.", "3")] == [1.0, 0.0]


def test_own_rows_are_evaluated(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.py").write_text(example("Your own rows"))
    result = runpy.run_path("own.py")["result"]
    kept = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    right = sum(row["completion"] == row["answer"] for row in kept)
    assert len(kept) == result.summary["n"] == 16 and result.means["accuracy"] == right / 16


@pytest.mark.parametrize(("family", "shift"), [("llada", 0), ("dream", 1)])
def test_the_loop_without_the_library_writes_what_the_sampler_writes(tmp_path, monkeypatch, family, shift):
    policy = dllm_rl.load_policy(checkpoint(tmp_path / "published", family))
    generator = torch.Generator().manual_seed(0)
    for weight in (each.data for each in policy.module.parameters() if each.ndim == 2):
        weight.copy_(torch.randn(weight.shape, generator=generator) * 0.3)
    policy.save_pretrained(tmp_path / "stock", stock=True)
    monkeypatch.chdir(tmp_path)
    text = (EXAMPLES / "generate_alone.py").read_text().replace("64, 32, 0 ", f"12, 4, {shift} ")
    Path("loop.py").write_text(text.replace("What is 17 + 25?", "3a1b"))
    made = runpy.run_path("loop.py")
    prompts = dllm_rl.Prompts.from_ids(made["prompt"].tolist(), pad_id=policy.pad_id, seeds=[0])
    rollout = dllm_rl.Unmask(max_new_tokens=12, diffusion_steps=12, block_size=4)(policy, prompts, torch.Generator())
    assert torch.equal(made["row"], rollout.tokens) and len(rollout.tokens.unique()) > 6


def test_the_index_lists_every_page():
    told = (DOCS / "index.md").read_text()
    pages = {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")} - {"index.md"}
    assert {page for page in pages if f"]({page}" not in told} == set()


def test_the_estimator_of_ones_own_keeps_its_contract_and_scores_each_token_once():
    made = runpy.run_path(str(EXAMPLES / "own_estimator.py"), run_name="__main__")
    views = made["halves"].draw_views(made["rollout"], torch.Generator())
    assert torch.equal(views.coefficients.sum(0), made["rollout"].completion_mask.float())
    assert torch.equal(views.masked, views.coefficients > 0)


def test_given_texts_are_scored():
    """The estimate is the mean over both orders of two tokens, but for the noise of its masks."""
    made = runpy.run_path(str(EXAMPLES / "score_texts.py"))
    policy, rollout = made["policy"], made["rollout"]
    tokens, masked = rollout.tokens, torch.tensor([[True, True], [False, True], [True, False]])
    canvas = tokens.repeat(3, 1)
    canvas[:, -2:][masked] = policy.spec.mask_id
    scores = policy.logits(canvas, torch.ones_like(canvas, dtype=torch.bool))[:, -2:].log_softmax(-1)
    scores = scores.gather(-1, tokens[:, -2:, None].expand(3, -1, -1))[..., 0].detach()
    bound = (scores[0].sum() + scores[1, 1] + scores[2, 0]) / 2
    assert made["nats"].shape == (1,) and abs(made["nats"].item() - bound.item()) < 0.1


def run_example(heading, folder, monkeypatch, name="example"):
    """What an example of the docs leaves, run in `folder`, with the repository's modules to import."""
    monkeypatch.syspath_prepend(DOCS.parent)
    monkeypatch.chdir(folder)
    (folder / f"{name}.py").write_text(example(heading))
    return runpy.run_path(f"{name}.py")


def in_the_guide(printed):
    """Whether docs/extend-objective.md shows these lines as what an example prints."""
    return "".join(f"    {line}\n" for line in printed.splitlines()) in (DOCS / "extend-objective.md").read_text()


@pytest.mark.parametrize(
    ("page", "name"),
    [("extend-model", "own_module"), ("extend-sampler", "own_order"), ("extend-objective", "own_estimator")],
)
def test_what_a_page_shows_of_an_example_stands_in_it(page, name):
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / f"{page}.md").read_text(), flags=re.DOTALL)
    assert [block for block in blocks if block in (EXAMPLES / f"{name}.py").read_text()]


@pytest.mark.nightly
def test_a_rank_of_ones_own_keeps_the_contract(capsys):
    made = runpy.run_path(str(EXAMPLES / "own_order.py"), run_name="__main__")
    assert capsys.readouterr().out.split() == ["deterministic", "confidence", "unknown"]
    with pytest.raises(ValueError, match="declared deterministic, but reads tokens"):
        FunctionRank(function=lambda logits, tokens: logits.gather(-1, tokens[:, None])[:, 0], order="deterministic")
    noisy = dllm_rl.PlackettLuce(temperature=0.3, base_rank=made["LogOdds"]())
    assert check_order(noisy, made["Halves"]()) == "plackett_luce"


@pytest.mark.nightly
def test_a_rule_that_rewrites_has_ratios_of_mean_one_and_some_of_its_steps_have_not(tmp_path):
    text = (EXAMPLES / "rewriting_rule.py").read_text()
    made = runpy.run_path(str(EXAMPLES / "rewriting_rule.py"))
    shares = made["shares"]
    assert shares.record < 1e-5 and abs(shares.mean_ratio - 1) < 3 * shares.ratio_error and shares.spread > 0.2
    assert shares.off < 4, "the shares that the ratio says are those of the other policy's own rollouts"
    assert shares.writings > 5, "of four tokens, one more is drawn again in the mean"
    # An order that moves with the weights, which the ratio leaves out.
    assert "import RandomOrder" in text
    (tmp_path / "jumping.py").write_text(text.replace("import RandomOrder", "import MaxProb as RandomOrder"))
    jumping = runpy.run_path(str(tmp_path / "jumping.py"))["shares"]
    assert abs(jumping.mean_ratio - 1) < 3 * jumping.ratio_error and jumping.off > 8
    # Unbiased for the sum of the logs: its exponential is no weight.
    rule = made["sampler"].replace(rank=made["RandomOrder"](), commit=partial(made["beside"], rate=0.5))
    sampled = UniformSteps(k=2)
    some = made["weighted_shares"](made["policy"], rule, [made["equals"]], likelihood=sampled)
    assert abs(some.mean_ratio - 1) > 3 * some.ratio_error


@pytest.mark.nightly
def test_an_order_of_ones_own_has_a_probability_under_plackett_luce_and_none_as_a_bare_rank():
    made = runpy.run_path(str(EXAMPLES / "noisy_order.py"))
    for shares in (made["drawn"], made["plain"]):
        assert shares.record < 1e-5 and abs(shares.mean_ratio - 1) < 3 * shares.ratio_error and shares.spread > 0.2
    assert made["drawn"].off < 4 < 8 < made["plain"].off


@pytest.mark.nightly
def test_the_doctor_takes_rows_of_ones_own(capsys):
    made = runpy.run_path(str(EXAMPLES / "own_doctor.py"))
    assert made["report"].num_tokens == 64 and 0.99 < made["report"].total.ess <= 1
    assert "quantized" in capsys.readouterr().out


@pytest.mark.nightly
def test_a_sampler_of_ones_own_keeps_the_engines_contract_and_a_greedy_one_does_not():
    made = runpy.run_path(str(EXAMPLES / "sampler_at_once.py"), run_name="__main__")
    rollout = made["AtOnce"](max_new_tokens=6)(made["policy"], made["prompts"], torch.Generator())
    assert rollout.tokens.shape == (8, 9) and rollout.unmask_step.max() == 0

    class Wrong(made["AtOnce"]):  # log-probs of another temperature
        def __call__(self, policy, prompts, generator):
            rollout = super().__call__(policy, prompts, generator)
            return dataclasses.replace(rollout, logprobs=rollout.logprobs * 1.5)

    sampler = Wrong(max_new_tokens=6, temperature=0.7)
    with pytest.raises(AssertionError, match="log-probs differ"):
        made["check_engine"](made["engine"], made["policy"], made["prompts"], sampler)


def test_a_loss_of_ones_own_is_checked_three_times(capsys):
    made = runpy.run_path(str(EXAMPLES / "own_loss.py"), run_name="__main__")
    ratio = torch.tensor([[0.0, 0.3]]).exp().log()
    value = made["SoftClip"]()(ratio, torch.tensor([2.0]), torch.ones(1, 2, dtype=torch.bool))
    moved = 0.3498588  # exp(0.3) - 1
    assert torch.allclose(value, torch.tensor([[2.0, 2 * (1 + moved / (1 + moved / 0.2))]]))
    assert in_the_guide(capsys.readouterr().out)

    class Halved(made["SoftClip"]):
        def __call__(self, log_ratio, advantages, mask):
            return super().__call__(log_ratio, advantages, mask) / 2

    with pytest.raises(AssertionError, match="on-policy"):
        made["check_corrector"](Halved())


@pytest.mark.slow
def test_a_loop_of_ones_own_learns():
    """Four of four digits right, from a quarter."""
    rewards = runpy.run_path(str(EXAMPLES / "own_loop.py"))["rewards_by_step"]
    assert rewards[0] < 0.3 and rewards[-1] > 0.9


def test_the_first_request_of_the_serving_page_fits_the_run_that_it_serves():
    text = (DOCS / "serving.md").read_text()
    assert text.index("dllm-rl serve runs/quantized-sudoku-seed0/corrected") < text.index("curl ")
    body = json.loads(re.search(r"curl .* -d '(.*)'", text)[1])
    with running(main_job.model()) as server:
        answer = server.complete(**body)
    assert body["prompt"] == main_job.eval_task[0].prompt and body["max_tokens"] == main_job.max_new_tokens
    assert answer["usage"]["prompt_tokens"] == len(body["prompt"])


def test_a_run_samples_on_a_server(tmp_path, monkeypatch):
    policy = dllm_rl.tiny_masked_lm(characters="1234=", hidden_size=32, num_layers=1)
    policy.save_pretrained(tmp_path / "model")
    monkeypatch.setenv("DLLM_RL_TOKEN", TOKEN)
    with running(dllm_rl.load_policy(tmp_path / "model"), token=TOKEN, allow_updates=True) as server:
        given = 'rows = [{"prompt": f"{a}="} for a in "1234"] * 4\n'
        given += "def reward(completions, **_):\n    return [float(text[:1] == '1') for text in completions]\n"
        text = given + example("Rollouts of a run").replace("num_steps=100", "num_steps=2")
        text = text.replace("CHECKPOINT", str(tmp_path / "model")).replace(
            "HTTPEngine()", f"HTTPEngine(url={server.url!r})"
        )
        (tmp_path / "served.py").write_text(text)
        monkeypatch.chdir(tmp_path)
        assert runpy.run_path("served.py")["sampler"].temperature == 1, "completions differ"
        assert server.batcher.policy.weights_version == 2


def test_a_loss_with_a_detached_part_has_checks_that_see_its_gradient():
    made = runpy.run_path(str(EXAMPLES / "detached_loss.py"))
    assert made["table"][0].bias < 1e-12
    of = made["FunctionCorrector"]
    made["check_corrector"](of(loss=made["capped"]))

    def twice(log_ratio, advantages, mask):  # the right value at ratio 1, and a gradient that is twice as long
        extra = made["capped"](log_ratio, advantages, mask)
        return made["with_value"](log_ratio, advantages, mask) + extra - extra.detach()

    with pytest.raises(AssertionError, match=r"the gradient must be that of NoCorrection\(\) bit for bit"):
        made["check_corrector"](of(loss=twice))
    options = {"moved": "old", "policies": ("early",), "sigmas": (0.0,), "networks": 1}
    (row,) = made["gradient_table"](of(loss=twice), **options)
    assert row.bias == pytest.approx(1)


def test_what_the_librarys_losses_do_in_these_checks():
    """Of each loss: the contract, finite differences, and the gradient at ratio 1 (docs/extend-objective.md)."""
    from dllm_rl.algorithms import losses
    from dllm_rl.algorithms.correctors import FunctionCorrector
    from dllm_rl.testing.enumeration import gradient_table
    from recipes.studies.likelihoods import surrogates

    log_ratio = torch.linspace(-0.15, 0.15, 8, dtype=torch.float64).view(2, 4).requires_grad_()  # no clip's corner
    signs, everywhere = torch.tensor([1.0, -1.0], dtype=torch.float64), torch.ones(2, 4, dtype=torch.bool)
    ours = [losses.PPOClip(), losses.GSPO(epsilon=0.2, epsilon_high=0.2), losses.CISPO(), losses.VESPO()]
    ours += [losses.Reinforce(), surrogates.BGPO(), surrogates.GDSD(), surrogates.StableDRL(), surrogates.EBPO()]
    found = {}
    for loss in ours:
        made, one = FunctionCorrector(loss=loss), loss
        if "sum_over_processes" in loss.inputs:
            one = partial(loss, sum_over_processes=lambda x: x)
        keeps, whole = True, True
        try:
            check_corrector(loss)
        except AssertionError:
            keeps = False
        try:
            torch.autograd.gradcheck(partial(one, advantages=signs, mask=everywhere), log_ratio)
        except RuntimeError:
            whole = False
        (row,) = gradient_table(made, moved="old", policies=("early",), sigmas=(0.0,), networks=1)
        found[type(loss).__name__] = keeps, whole, round(row.bias, 6)
    assert found == {
        "PPOClip": (True, True, 0),
        "GSPO": (True, False, 0),
        "BGPO": (True, False, 0),
        "StableDRL": (True, False, 0),
        "CISPO": (True, False, 0),
        "VESPO": (True, False, 0),
        "Reinforce": (True, True, 0),
        "GDSD": (False, True, 0),
        "EBPO": (False, False, 3),
    }


@pytest.mark.nightly
def test_a_corrector_of_ones_own_has_one_mark_to_pass(capsys):
    made = runpy.run_path(str(EXAMPLES / "own_corrector.py"), run_name="__main__")
    assert capsys.readouterr().out == "True False\n"
    correctors = importlib.import_module("dllm_rl.algorithms.correctors")
    for corrector, passes in (
        (correctors.TIS(level="sequence"), True),
        (correctors.TIS(cap=1e9), True),
        (correctors.TIS(cap=1e9, level="sequence"), True),
        (correctors.IcePop(), True),
        (correctors.AIS(), True),
        (correctors.TBPO(), True),
        (correctors.MIS(), False),
        (correctors.Reject(threshold=0.1), False),
    ):
        assert made["corrects"](corrector) == passes


@pytest.mark.nightly  # it checks a policy: 4 s
def test_a_block_causal_module_of_ones_own_keeps_its_contract_and_scores_what_it_sampled():
    made = runpy.run_path(str(EXAMPLES / "own_block_module.py"))
    assert (made["log_p"] - made["rollout"].logprobs).abs().max() < 1e-5 and len(made["views"].coefficients) == 2

    def without_blocks(module, tokens, attention_mask, positions):  # every token sees every other
        seen = attention_mask[:, None, None, :].expand(-1, 1, tokens.shape[1], -1)
        return made["encode"](module, tokens, seen, positions)

    wrong = dataclasses.replace(made["spec"], encode=without_blocks)
    with pytest.raises(ValueError, match="attention='block_causal' is what Blocks should have"):
        dllm_rl.make_policy(made["Blocks"](len(made["tokenizer"])), made["tokenizer"], wrong)


def test_advantages_of_ones_own_are_above_the_median_of_unequal_groups(tmp_path, monkeypatch):
    made = run_example("Write advantages", tmp_path, monkeypatch)
    rewards = torch.tensor([1.0, 5.0, 2.0, math.nan, 3.0, 7.0, 7.0, 0.25])
    group = torch.tensor([4, 4, 4, 4, 9, 9, 9, 2])
    found = made["AboveMedian"]()(rewards, group)
    assert found.tolist() == [-1, 3, 0, 0, -4, 0, 0, 0]


@pytest.mark.nightly
def test_a_reward_of_ones_own_grades_and_trains(tmp_path, monkeypatch):
    made = run_example("Your reward", tmp_path, monkeypatch)
    graded = [made["task"].reward(made["task"][3], text).value for text in ("41", "43", "14", "==")]
    assert graded == [1.1, 0.6, 0.1, 0.0]  # of "14="
    text = example("Your reward").replace("num_steps=100", "num_steps=2")
    (tmp_path / "trained.py").write_text(text.replace("grpo(model", "summary = grpo(model"))
    summary = runpy.run_path("trained.py", run_name="__main__")["summary"]
    assert summary["eval_problems"] == 6 and summary["eval_after"].keys() >= {"right", "only_digits"}


def test_a_reward_service_that_fails_in_part_teaches_nothing_of_what_it_did_not_grade():
    """Of two groups "good" completions score their length; the service breaks on "bad" ones, in two ways."""
    asked = []

    class Service(BaseHTTPRequestHandler):
        def do_POST(self):
            given = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append(given["completion"])
            self.send_response(500 if given["completion"] == "bad" else 200)
            self.end_headers()
            score = json.dumps({"score": len(given["completion"])}) if given["completion"] != "odd" else "<html>"
            self.wfile.write(score.encode())

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Service) as service:
        threading.Thread(target=service.serve_forever, daemon=True).start()
        address = f"127.0.0.1:{service.server_port}"
        made = runpy.run_path(str(EXAMPLES / "reward_service.py"))
        made["ask"].__globals__["URL"] = f"http://{address}/score"
        rewards = made["served"](["p"] * 3 + ["q"] * 2, ["good", "bad", "better", "odd", "goodness"])
        assert rewards == [4.0, 5.0, 6.0, 8.0, 8.0]  # the group's mean in the place of what is missing
        assert asked.count("bad") == asked.count("odd") == 2  # attempts
        with pytest.raises(RuntimeError, match="the service is down"):
            made["served"](["p"] * 3, ["bad", "bad", "good"])
        service.shutdown()


@pytest.mark.nightly
def test_engines_of_ones_own_keep_the_contract():
    """The example's own checks, and that the mixed copy skips the layers that it names."""
    made = runpy.run_path(str(EXAMPLES / "quantized_engines.py"), run_name="__main__")
    report = made["load_mixed"](made["policy"]).quantization_report
    skipped = [name for name in report.skipped if name.endswith("down_proj")]
    assert len(skipped) == 3 and len(report.quantized) == len(made["layers"](made["policy"].module)) - 3


@pytest.mark.nightly  # the shapes of 8 billion weights: 10 s for each plan
def test_the_plans_of_llada_8b_are_those_that_the_page_shows(tmp_path, monkeypatch, capsys):
    recipe, page = mine(tmp_path, monkeypatch)["recipe"], (DOCS / "large-models.md").read_text()
    made = {}
    for gpus, options, *numbers in re.findall(
        r"^\| (\d+) \| (.*?) \| (\d+) \| (\d+) \| ([\d.]+) \|$", page, re.MULTILINE
    ):
        words = "".join(re.findall(r"^`([^`]*)`", options)).replace("$ALL", " ".join(all_weights()))
        monkeypatch.setenv("WORLD_SIZE", gpus)
        text = made[gpus, options] = plan(from_command_line(recipe, words.split()))
        peak, *seconds, hours = estimated(text)
        rounded = [round(peak), round(sum(seconds)), pytest.approx(hours, rel=0.02)]
        assert [*map(float, numbers)] == rounded, (gpus, options)
    assert len(made) == 13
    told = page.partition("Some of its lines:\n\n")[2].partition("\n\n")[0]
    lines = [line.removeprefix("    ").removesuffix("...").rstrip() for line in told.splitlines()]
    printed = made["1", "none"] + capsys.readouterr().out
    assert len(lines) > 5 and [line for line in lines if line not in printed] == []


def estimated(text):
    """Peak (GB), seconds of each stage, and hours of a plan."""
    return [
        float(re.search(rf"^  {name} +([\d.]+) {unit}", text, re.MULTILINE)[1])
        for name, unit in (("peak", "GB"), *((stage, "s at") for stage in STAGES), ("run", "h for"))
    ]


@pytest.mark.nightly  # as above
def test_the_plans_of_llada_8b_are_those_that_the_readme_shows():
    text = README.read_text().partition("## LLaDA-8B on your GPU\n")[2].partition("\n## ")[0]
    words, rows = [], []
    for size, same, options, *numbers in re.findall(
        r"^\| (\d+) GB.*? \| (the same and )?(none|`[^`]*`).* \| (\d+) GB \| (\d+) \|$", text, re.MULTILINE
    ):
        words = [*(words if same else ()), *options.strip("`").removeprefix("none").split()]
        peak, *_, hours = estimated(plan(from_command_line(recipe_of(), words)))
        assert [round(peak), round(hours)] == [*map(int, numbers)], options
        assert peak <= USABLE_SHARE * int(size), options
        rows.append((size, f"{peak:.0f} GB", round(hours)))
    assert [size for size, *_ in rows] == ["80", "48", "32", "24", "12", "48"]
    ours, d1 = (f"{peak}, {hours} h for 1,000 steps" for _, peak, hours in (rows[0], rows[-1]))
    assert f"| {ours} | {d1};" in (DOCS / "large-models.md").read_text()


@pytest.mark.nightly  # as above
def test_the_plan_of_the_page_for_trls_users_has_its_numbers(capsys):
    peft = pytest.importorskip("peft")
    page = (DOCS / "trl.md").read_text()
    code = page.partition("```python\n")[2].partition("\nargs = ")[0]  # up to the plan, before the trainer
    names = {"grpo": dllm_rl.grpo, "LoraConfig": peft.LoraConfig, "model": "GSAI-ML/LLaDA-8B-Instruct"}
    names |= {"rows": [{"prompt": str(i)} for i in range(20)], "reward": lambda completions, **_: [0.0]}
    exec(code, names)
    printed = capsys.readouterr().out
    peak, hours = (
        float(re.search(rf"\n  {line} +([\d.]+) {unit}", printed)[1]) for line, unit in (("peak", "GB"), ("run", "h"))
    )
    assert f"# grpo: {peak:.1f} GB, {hours:.1f} h on an H100, not compiled\n" in f"{code}\n"


@pytest.mark.nightly
def test_an_estimator_is_compared_with_the_enumeration_of_all_completions(tmp_path, monkeypatch, capsys):
    """What docs/extend-objective.md says that its example prints, and which claims of its table hold for whom."""
    made = run_example("Is my estimator right?", tmp_path, monkeypatch)
    assert in_the_guide(capsys.readouterr().out)
    examples = importlib.import_module("recipes.examples.control_variates")
    of_the_elbo, in_order = {"unbiased for the ELBO", "lower bound"}, {"unbiased for the order taken"}
    for estimator, claims in (
        (dllm_rl.ELBO(num_samples=4), of_the_elbo),
        (dllm_rl.Coupled(num_samples=2), of_the_elbo),
        (examples.Controlled(), of_the_elbo),
        (examples.cross_fitted, of_the_elbo),
        (UniformSteps(k=1), in_order),
        (dllm_rl.Trajectory(), in_order | {"exact"}),
    ):
        rows = made["estimator_table"](estimator)
        known = importlib.import_module("dllm_rl.testing.enumeration").CLAIMS
        assert {claim for claim in known if not made["speaks_against"](rows, claim)} == claims, estimator


def test_a_control_variate_keeps_the_contract():
    """And the weights of a fixed coefficient have mean 1 of l(m), and 0 of the control."""
    made = runpy.run_path(str(EXAMPLES / "control_variates.py"), run_name="__main__")
    rollout, torch_generator = made["rollout"], torch.Generator().manual_seed(0)
    many = dataclasses.replace(rollout, batch_row=None).rows(torch.zeros(4000, dtype=torch.long))
    views = made["Controlled"](coefficient=0.5).draw_views(many, torch_generator)
    weight = views.coefficients[0, :, rollout.completion_mask[0]]
    assert (weight.mean(0).abs() < 4 * weight.std(0) / 4000**0.5).all() and weight.std() > 0.1

    class OfTheBatch(made["Controlled"]):
        def combine(self, scores, views):
            return of_the_batch(scores, views)

    made["check_estimator"](OfTheBatch(), made["policy"], rollout)  # as the page says, it does not see this


def test_coupled_grpo_has_its_authors_estimate():
    """(log p_i with everything masked + log p_i in the mask that hides i, over the mask's share) / 2, from the logits
    of three canvases; shares between 0.2 and 0.8; in the mean over shares and masks each token's weight is 1 1/2."""
    made = runpy.run_path(str(EXAMPLES / "coupled_grpo.py"), run_name="__main__")
    policy, rollout, estimator = made["policy"], made["rollout"], made["CoupledGRPO"]()
    views = estimator.draw_views(rollout, torch.Generator().manual_seed(0))
    start, rows = rollout.tokens.shape[1] - 6, torch.arange(len(rollout.tokens))
    everything, first, second = views.masked[:, :, start:]
    assert everything.all() and (first ^ second).all() and not views.masked[..., :start].any()
    scores = []
    for masked in (everything, first, second):
        canvas = rollout.tokens.clone()
        canvas[:, start:][masked] = policy.spec.mask_id
        logits = policy.logits(canvas, torch.ones_like(canvas, dtype=torch.bool))[:, start:].detach()
        logits[..., policy.spec.mask_id] = -torch.inf  # never drawn
        scores.append(logits.log_softmax(-1).gather(-1, rollout.tokens[:, start:, None])[..., 0])
    for row in rows:
        shares = [(0.5 / views.coefficients[n, row][views.masked[n, row]]).tolist() for n in (1, 2)]
        share = shares[0][0] if shares[0] else 1 - shares[1][0]
        assert shares[0] == pytest.approx([share] * len(shares[0]))
        assert shares[1] == pytest.approx([1 - share] * len(shares[1]))
        hidden = torch.where(first[row], scores[1][row] / share, scores[2][row] / (1 - share))
        found = estimator.logprobs(policy, rollout, views)[row, start:]
        torch.testing.assert_close(found, (scores[0][row] + hidden) / 2)
    many = dataclasses.replace(rollout, batch_row=None).rows(torch.zeros(4000, dtype=torch.long))
    coefficients = estimator.draw_views(many, torch.Generator().manual_seed(1)).coefficients[..., start:]
    shares = 0.5 / coefficients[1][coefficients[1] > 0]
    assert 0.199 < shares.min() < 0.21 and 0.79 < shares.max() < 0.801
    weight = coefficients.sum(0)
    assert (weight.mean(0) - 1.5).abs().max() < 4 * weight.std() / 4000**0.5


def test_an_attention_mask_of_ones_own_keeps_the_contract_and_hides_what_is_outside():
    """A window as wide as the row is no window; under a narrow one no token's log-prob depends on the far ones."""
    made = runpy.run_path(str(EXAMPLES / "attention_window.py"), run_name="__main__")
    policy, rollout, windowed = made["policy"], made["rollout"], made["Windowed"]

    def scores(estimator, seen):
        views = estimator.draw_views(seen, torch.Generator().manual_seed(0))
        return estimator.view_logprobs(policy, seen, views)

    torch.testing.assert_close(scores(windowed(width=20), rollout), scores(dllm_rl.ELBO(), rollout))
    prompt = rollout.tokens.clone()
    prompt[:, 0] = prompt[:, 1]  # each layer carries the difference `width` tokens further
    changed = (scores(windowed(), dataclasses.replace(rollout, tokens=prompt)) - scores(windowed(), rollout)).abs()
    far = 2 * policy.module.config.num_hidden_layers + 1
    assert changed[..., :far].max() > 0 and far < changed.shape[-1] and not changed[..., far:].any()


def test_one_number_per_completion_has_the_gradient_of_its_row():
    """docs/extend-objective.md: S = log mean_n exp(estimate n), as S / L at each of the L tokens of a view, under
    `GSPO` (exp of S over all tokens) and `EBPO` (exp of S), against the objective written once per row."""
    from dllm_rl.testing.enumeration import ToyPolicy, contributions
    from recipes.studies.likelihoods.surrogates import EBPO

    class LogMeanExp(dllm_rl.ELBO):
        def combine(self, scores, views):
            total = (len(scores) * views.coefficients * scores).sum(-1).logsumexp(0) - math.log(len(scores))
            scored = (views.coefficients != 0).any(0)
            return scored * (total / scored.sum(-1))[:, None]

    estimator = LogMeanExp(num_samples=2)
    toy = ToyPolicy(length=4, words=3, sharpness=1.0, generator=torch.Generator().manual_seed(0))
    rollout = toy.rollout(2)
    (weight, *_) = toy.weights
    weight.requires_grad_()
    views = estimator.draw_views(rollout, torch.Generator().manual_seed(1))
    assert not (views.coefficients != 0).any(0).all()  # some tokens are not scored
    logps = contributions(toy, rollout, views, estimator)
    advantages = torch.linspace(-1, 1, len(logps), dtype=torch.float64)
    before = logps.detach() * torch.linspace(0.9, 1.1, len(logps), dtype=torch.float64)[:, None]
    per_row = (logps - before).sum(-1)
    no_clip = {"epsilon": 100.0, "epsilon_high": 100.0}
    for loss, log_ratio in ((dllm_rl.GSPO, per_row / 4), (EBPO, per_row)):
        objective = loss(**no_clip)(logps - before, advantages, rollout.completion_mask)
        coefficients = dllm_rl.SequenceMean()(rollout.completion_mask, num_tokens=0, num_sequences=len(logps))
        found = torch.autograd.grad((coefficients * objective).sum(), weight, retain_graph=True)
        expected = torch.autograd.grad((advantages * log_ratio.exp()).mean(), weight, retain_graph=True)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


def of_the_batch(scores, views):
    total, scored = (scores * views.coefficients).sum(0), views.coefficients[0] != 0
    return total + scored * total.detach()[scored].mean()


def test_the_engine_of_ones_own_keeps_its_contract_and_without_its_sync_does_not():
    made = runpy.run_path(str(EXAMPLES / "own_engine.py"), run_name="__main__")

    class Stale(made["Mine"]):
        def sync(self, policy, rollout_policy):
            return {}

    stale = Stale()
    with pytest.raises(AssertionError, match="load and sync must pass it on"):
        made["check_engine"](stale, made["policy"], made["prompts"], made["sampler"])


def test_a_study_of_ones_own_tunes_and_runs(tmp_path):
    """Its arms and trials train, cut to a step; and so many seeds can show so many claims."""
    paired, made = (importlib.import_module(f"recipes.{name}") for name in ("studies.paired", "examples.paired_study"))
    study, trials = made.study, made.trials
    held_out = [
        {problem.prompt for problem in map(each.base.eval_task.__getitem__, range(16))} for each in (study, trials)
    ]
    assert not held_out[0] & held_out[1] and len(study.base.task) == 32
    for which, arm, seed in ((study, "soft 0.1", 0), (study, "one update", 0), (trials, "soft 0.4", 100)):
        paired.run_one(which, tmp_path / str(seed), 1, arm, seed)
    assert {arm for arm, _ in paired.load(tmp_path / "0")} == {"soft 0.1", "one update"}
    assert [paired.sign_flip([1.0] * n) * claims < 0.05 for n, claims in ((6, 1), (6, 2), (7, 2), (8, 5))] == [
        True,
        False,
        True,
        True,
    ]


@pytest.mark.nightly
def test_the_site_builds(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", str(DOCS / "site" / "mkdocs.yml")]
    done = subprocess.run([*command, "-d", str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert 'id="dllm_rl.recipe.Recipe"' in (tmp_path / "reference/training/index.html").read_text()
    samplers = (tmp_path / "reference/samplers/index.html").read_text()
    assert "<code>MaxProb()</code>" in samplers, "the default of a record's field"
    assert "&lt;eos&gt;" in samplers and "<blockquote>" not in samplers, "docstrings are text"


def test_the_drawings_are_made_by_their_script():
    root = Path(__file__).parents[1]
    pictures = runpy.run_path(str(root / "docs/site/pictures.py"))
    assert pictures["loop"]() == (root / "docs/loop.svg").read_text()
    tokens = [{"text": text, "step": step} for text, step in (("<", 1), ("2", 0))]
    drawn = pictures["sampler"]({"rows": [{"tokens": tokens}], "forwards": 2})
    cells = [
        each for each in ElementTree.fromstring(drawn).iter("{http://www.w3.org/2000/svg}text") if each.get("y") == "68"
    ]
    assert [cell.text for cell in cells] == ["<", "2"]
    assert [cell[0].get("keyTimes").split(";")[2] for cell in cells] == ["0.500", "0.250"], "of 4 s, two pauses"
