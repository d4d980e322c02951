"""The model card of a checkpoint, and its way to the hub."""

from dataclasses import replace

import huggingface_hub
import pytest
import yaml
from tiny_recipe import ONE_PUZZLE, tiny_recipe

from dllm_rl.cli import main as cli
from dllm_rl.likelihoods.estimators import Trajectory
from dllm_rl.training.model_card import NOT_UPLOADED, card
from dllm_rl.training.trainer import train

pytestmark = pytest.mark.usefixtures("no_rehearsal")

HOSTILE = "a`b|c\n# <img src=x> \x1b[2J"


@pytest.fixture
def hub(monkeypatch):
    """What a hub is asked for; nothing leaves the machine."""
    asked = []

    class HfApi:
        def create_repo(self, repo, **options):
            asked.append((repo, options))
            return type("Url", (str,), {"repo_id": repo})(f"https://huggingface.co/{repo}")

        def upload_folder(self, **options):
            asked.append(options)
            if options["repo_id"].startswith("broken"):
                raise RuntimeError("no way")

    monkeypatch.setattr(huggingface_hub, "HfApi", HfApi)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "a token")
    return asked


def test_every_checkpoint_says_what_it_is_and_the_last_how_it_did(tmp_path, hub):
    summary = train(
        tiny_recipe(tmp_path, num_steps=2, save_steps=1, save_total_limit=9, likelihood=Trajectory(include_order=False))
    )
    first, last = ((tmp_path / f"checkpoints/step-00000{i}/README.md").read_text() for i in (1, 2))
    front = yaml.safe_load(last.split("---\n")[1])
    assert front == {"library_name": "dllm_rl", "tags": ["reinforcement-learning", "grpo", "dllm_rl"]}
    assert "1 of 2 steps of GRPO" in first and "| metric | before RL |\n" in first
    assert "2 of 2 steps of GRPO" in last and "| metric | before RL | after | after, quantized |\n" in last
    cells = [f"{summary[part]['reward']:.4g}" for part in ("eval_before", "eval_after", "eval_after_quantized")]
    assert f"| `reward` | {' | '.join(cells)} |" in last
    assert (
        "8 problems of the task `sudoku`, version `1`" in last
        and "| `eval_sampler` | `Unmask(max_new_tokens=16" in last
    )
    assert "| `rollout_quantization` | `Float8WeightOnly(dequantized=False)` |" in last
    assert "| `rollout_corr/ess` | 1 |" in last
    assert str(tmp_path) not in last, "no path of the machine"
    assert hub == [], "nothing is uploaded unasked"


def test_a_card_may_be_edited_and_deleted(tmp_path):
    train(recipe := tiny_recipe(tmp_path, num_steps=1, **ONE_PUZZLE))
    (tmp_path / "checkpoints/step-000001/README.md").write_text("mine")
    (tmp_path / "checkpoints/step-000000/README.md").unlink()
    assert cli.main(["verify", str(tmp_path)]) == 0
    train(replace(recipe, resume_from_checkpoint="latest"))  # which has no step left
    again = (tmp_path / "checkpoints/step-000001/README.md").read_text()
    assert "1 of 1 steps" in again and "| `grad_norm` | " in again


def test_hostile_names_stay_text(tmp_path):
    made = card(
        tiny_recipe(tmp_path, name=HOSTILE), step=1, evaluations={"before RL": {HOSTILE: 0.5}}, metrics={"reward": 1.0}
    )
    assert r"# `a'b\|c↵# <img src=x> ␛[2J`, seed 0" in made and r"| `a'b\|c↵# <img src=x> ␛[2J` | 0.5 |" in made
    assert "\x1b" not in made


def test_the_base_model_is_named_where_it_is_the_hubs(tmp_path):
    settings = {"step": 0, "evaluations": {}, "metrics": {}}
    made = card(tiny_recipe(tmp_path, model="GSAI-ML/LLaDA-8B-Instruct"), **settings)
    assert yaml.safe_load(made.split("---\n")[1])["base_model"] == "GSAI-ML/LLaDA-8B-Instruct"
    here = card(tiny_recipe(tmp_path, model=str(tmp_path)), **settings)
    assert (
        "base_model" not in here.split("---\n")[1]
        and f"from `{tmp_path.name}`" in here
        and str(tmp_path.parent) not in here
    )
    assert "None was taken." in here


def test_a_run_is_uploaded_where_that_is_asked_for(tmp_path, hub, capsys):
    summary = train(tiny_recipe(tmp_path, num_steps=1, push_to_hub="me/model", **ONE_PUZZLE))
    assert hub[0] == ("me/model", {"private": True, "exist_ok": True})
    assert str(hub[1]["folder_path"]) == summary["checkpoint"] and hub[1]["ignore_patterns"] == list(NOT_UPLOADED)
    assert "Uploaded:   https://huggingface.co/me/model" in capsys.readouterr().out


def test_a_run_ends_well_where_the_upload_fails(tmp_path, hub, capsys):
    assert train(tiny_recipe(tmp_path, num_steps=0, push_to_hub="broken/model", **ONE_PUZZLE))["eval_problems"] == 1
    assert "step-000000 could not be uploaded to broken/model: no way" in capsys.readouterr().out


def test_without_a_login_nothing_is_begun(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    with pytest.raises(ValueError, match=r"push_to_hub='me/model' needs a login: run `hf auth login`, or set HF_TOKEN"):
        train(tiny_recipe(tmp_path / "run", push_to_hub="me/model"))
    assert not (tmp_path / "run").exists()
