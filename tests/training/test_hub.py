"""The way of a checkpoint to the hub."""

import huggingface_hub
import pytest
from tiny_recipe import ONE_PUZZLE, tiny_recipe

from dllm_rl.training.hub import NOT_UPLOADED
from dllm_rl.training.trainer import train

pytestmark = pytest.mark.usefixtures("no_rehearsal")


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


def test_nothing_is_uploaded_unasked(tmp_path, hub):
    train(tiny_recipe(tmp_path, num_steps=0, **ONE_PUZZLE))
    assert hub == []


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
