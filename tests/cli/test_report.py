"""`dllm-rl report`: what a page of runs holds, and that no text of a run steers it."""

import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from tiny_recipe import tiny_recipe

from dllm_rl.cli import main as cli
from dllm_rl.cli.report import (
    OWN,
    STEPS,
    Told,
    differences,
    replayed,
    report,
    results,
    seconds_of,
    told,
    validated,
    written,
)
from dllm_rl.monitoring.plots import headline, read_summary
from dllm_rl.training import train

HOSTILE = "</script><img src=x onerror=alert(1)>&\"'\x1b\u202e"
SHORT = {"num_steps": 3, "warmup_steps": 4, "eval_steps": 2, "log_completions_steps": 2}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """One with tokens and one that has not ended, as a kill would leave it."""
    one = tmp_path_factory.mktemp("one")
    two = tmp_path_factory.mktemp("two")
    train(tiny_recipe(one, **SHORT))
    train(tiny_recipe(two, **SHORT | {"seed": 1, "learning_rate": 1e-3}))
    (two / "summary.json").unlink()
    return one, two


def test_the_best_validation_is_told_with_the_last_and_how_many_there_were():
    rows = [{"step": step, "eval/solve_rate": rate} for step, rate in ((59, 0.25), (119, 0.5), (179, 0.375))]
    run = Told("a<b", [{"step": 1}, *rows], [], [], {})
    said = "a<b, validation: best solve rate: 0.500 (step 120), the highest of 3, which flatters it; the last: 0.375"
    assert validated(run) == f"{said} (step 180)."
    assert validated(replace(run, rows=rows[:1])) == "", "one is no choice"
    assert said.replace("<", "&lt;") in results([run])


def test_the_time_of_a_run_that_has_not_ended_is_that_of_its_steps():
    rows = [{"step": 0, "time/rollout": 2.0, "time/update": 1.0}, {"step": 1, "time/rollout": 3.0, "reward": 0.5}]
    run = Told("a", rows, [], [], {})
    assert seconds_of(run) == {"rollout": 5.0, "update": 1.0}
    assert seconds_of(replace(run, summary={"stages": {"rollout": 7.0}})) == {"rollout": 7.0}


class Markup(HTMLParser):
    """Counts tags, and checks that they are closed in order."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.open, self.text = {}, [], []
        self.feed(page)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags[tag] = self.tags.get(tag, 0) + 1
        if tag not in ("meta", "input", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_startendtag(self, tag, attributes):
        self.tags[tag] = self.tags.get(tag, 0) + 1

    def handle_data(self, data):
        self.text.append(data)


def data_of(page):
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)[1])


def test_the_command_writes_one_page_that_needs_no_other(runs, tmp_path, capsys):
    out = tmp_path / "both.html"
    assert cli.main(["report", *map(str, runs), "--out", str(out)]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said == [f"{runs[0]}/training.png", f"{runs[1]}/training.png", str(out)]
    page = out.read_text()
    assert not re.search(r"""(src|href)=["'](?!#)|@import|url\((?!#)""", page), "nothing is fetched"
    assert "default-src 'none'" in page
    found = Markup(page)
    assert found.tags["svg"] == found.tags["figure"] >= 12 and found.tags["table"] == 2
    for title in ("Reward", "Mismatch health", "Lambda of AIS", "Clipped tokens", "Memory", "Warm-up", "Gradient norm"):
        assert f'aria-label="{title}"' in page
    assert "prefers-color-scheme: dark" in page and "@media print" in page and "focus-visible" in page


def test_one_run_says_its_result_and_its_settings(runs):
    page = report([told(runs[0])])
    assert "tiny, seed 0: solve rate 0.000 → 0.000 on 8 held-out problems" in page
    text = Markup(page).text
    assert "corrector" in text and "beta" not in text, "beta is at its default"
    assert cli.main(["report", str(runs[0])]) == 0 and (runs[0] / "report.html").read_text() == page


def test_what_differs_between_recipes(runs):
    text = Markup(report([told(run) for run in runs])).text
    place = text.index("learning_rate")
    assert text[place : place + 3] == ["learning_rate", "0.0005", "0.001"] and "seed" in text
    assert not {"corrector", *OWN} & set(text[text.index("What differs between the recipes") :])
    assert "not ended" in " ".join(text), "what is known of it is in its checkpoint"


def test_every_curve_is_named_and_a_narrow_screen_knows_each_cells_column(runs):
    page = report([told(run) for run in runs])
    for drawing in re.findall(r"<figure>.*?</figure>", page, re.S):
        title = re.search('aria-label="(.*?)"', drawing)[1]
        assert (drawing.count('class="key"') == 2) == (title != "Where the time goes"), title
    assert '<td data-name="seed">1</td>' in page and "attr(data-name)" in page


def test_no_legend_leaves_its_picture(runs, monkeypatch):
    plt = pytest.importorskip("matplotlib.pyplot")
    plt.close("all")
    monkeypatch.setattr(plt, "close", lambda figure: None)
    names = [
        "update",
        "warm-up",
        "rollout",
        "scoring",
        "evaluation",
        "sync",
        "reward",
        "waiting",
        "checkpoint",
        "gradients",
    ]
    report([replace(told(runs[0]), summary={"stages": dict.fromkeys(names, 1.0)})])
    seen = 0
    for figure in map(plt.figure, plt.get_fignums()):
        for legend in filter(None, [*figure.legends, *(axis.get_legend() for axis in figure.axes)]):
            box = legend.get_window_extent()
            assert box.x0 >= 0 and box.x1 <= figure.bbox.x1 and box.y0 >= 0 and box.y1 <= figure.bbox.y1
            seen += 1
    monkeypatch.undo()
    plt.close("all")
    assert seen >= 4


def test_completions_are_there_to_be_replayed(runs):
    groups = data_of(report([told(run) for run in runs]))["groups"]
    assert [group["title"] for group in groups] == [f"{run.name}, step {step}" for run in runs for step in (1, 3)]
    for group in groups:
        assert {token["step"] for row in group["rows"] for token in row["tokens"]} == {0, 1, 2}
        assert all("reward" in row["facts"] and "advantage" in row["facts"] for row in group["rows"])


def test_a_long_run_shows_some_steps_first_and_last_among_them(runs):
    run = told(runs[0])
    many = replace(run, completions=[run.completions[0] | {"step": step} for step in range(0, 500, 5)])
    many.completions[1].pop("prompt")  # damaged, at a step that is not shown
    titles = [group["title"] for group in written(many, many=False)]
    assert len(titles) == STEPS and titles[0] == "step 1" and titles[-1] == "step 496"


def test_a_run_of_sft_is_compared_with_its_own_defaults(runs):
    recipe = {"dataset": "rows.jsonl", "max_length": 1024, "packing": True, "eval_batch_size": 32}
    text = Markup(differences([replace(told(runs[0]), summary={"recipe": recipe})])).text
    assert text == ["setting", "value", "dataset", "rows.jsonl", "packing", "True"]


@pytest.mark.filterwarnings("error::UserWarning")
def test_no_text_of_a_run_is_markup(runs):
    run = told(runs[0])
    row = {"step": 0, "prompt": HOSTILE, "completion": HOSTILE, "reward": 1.0, "parts": {HOSTILE: 1.0}}
    row |= {"advantage": 0.0, "mismatch": None, "tokens": [{"id": 1, "text": HOSTILE, "step": 0, "probability": 1.0}]}
    summary = run.summary | {"recipe": run.recipe | {"name": HOSTILE, "likelihood": HOSTILE, HOSTILE: HOSTILE}}
    hostile = replace(run, label=HOSTILE, completions=[row], summary=summary)
    for page in (report([hostile]), report([hostile, run])):
        found = Markup(page)
        assert "img" not in found.tags and found.tags["script"] == 2
        assert "\x1b" not in page and "\u202e" not in page
    (row,) = data_of(report([hostile]))["groups"][0]["rows"]
    for text in (row["prompt"], row["tokens"][0]["text"]):
        assert text.startswith("</script><img src=x") and text.endswith("\u241b\ufffd")


def test_without_steps_a_completion_is_shown_at_once():
    row = {"prompt": [{"role": "user", "content": "ask"}], "completion": "said", "reward": 0.5, "advantage": None}
    made = replayed(row | {"mismatch": 0.25})
    assert made["prompt"] == "ask" and made["tokens"][0]["text"] == "said"
    assert made["facts"] == "reward 0.5 · advantage - · mismatch +0.25 nats"


def test_what_is_no_run_is_refused_in_one_line(tmp_path, capsys):
    assert cli.main(["report", str(tmp_path)]) == 2
    assert f"error: {tmp_path} is no run's folder: it has no metrics.jsonl" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("completions.jsonl", '{"step": 0}\n'),
        ("completions.jsonl", '{"step": 0, "prompt": 1, "completion": 2, "reward": "x", "advantage": 0}\n'),
        (
            "completions.jsonl",
            '{"step": 0, "prompt": "", "completion": "", "reward": NaN, "advantage": 0, "mismatch": 0, '
            '"tokens": [{"id": 1, "text": "", "step": 0, "probability": NaN}]}\n',
        ),
        ("summary.json", '{"eval_before": [], "recipe": 3}'),
        ("metrics.jsonl", '{"step": 1' + "0" * 400 + ', "reward": 1}\n'),
    ],
)
def test_what_is_damaged_is_refused_in_one_line(tmp_path, capsys, name, content):
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "reward": 1.0, "grad_norm": {}, "rollout_corr/ess": "x"}\n')
    (tmp_path / name).write_text(content)
    assert cli.main(["report", str(tmp_path)]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1 and not (tmp_path / "report.html").exists()


def test_a_run_of_which_little_is_left_is_drawn(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "reward": 1.0, "grad_norm": null}\n{"step": 4}\n')
    page = report([told(tmp_path)])
    assert Markup(page).tags["svg"] == 2 and 'id="data"' not in page and "None are stored" in page
    (tmp_path / "metrics.jsonl").write_text("")
    assert Markup(report([told(tmp_path)])).tags["svg"] == 1


def test_the_headline_of_a_run(runs):
    assert headline(read_summary(runs[0])) == "tiny, seed 0: solve rate 0.000 → 0.000 on 8 held-out problems"
    assert headline(read_summary(runs[1])) == "tiny, seed 1: solve rate 0.000 → not ended" and headline({})
