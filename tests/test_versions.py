"""Which commit a number was computed with, against git itself."""

import shutil
import subprocess

import pytest

from dllm_rl import versions


def git(folder, *words):
    names = ("-c", "user.name=a", "-c", "user.email=a@b")
    done = subprocess.run(["git", *names, *words], cwd=folder, check=True, capture_output=True, text=True)
    return done.stdout.strip()


@pytest.fixture
def package(tmp_path):
    """A package at the top of a checkout with one commit."""
    if shutil.which("git") is None:
        pytest.skip("there is no git program")
    folder = tmp_path / "dllm_rl"
    folder.mkdir()
    (folder / "code.py").write_text("one = 1\n")
    (tmp_path / "README.md").write_text("text\n")
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-q", "-m", "first")
    versions.commit.cache_clear()
    return folder


def test_a_checkout_has_its_head(package):
    head = git(package, "rev-parse", "HEAD")
    (package.parent / "README.md").write_text("other text\n")  # is no code
    (package / "mine.py").write_text("two = 2\n")  # git does not know it
    assert versions.commit(package) == head and len(head) == 40


def test_changed_code_is_told(package):
    (package / "code.py").write_text("one = 2\n")
    assert versions.commit(package) == git(package, "rev-parse", "HEAD") + "+"


def test_it_is_that_of_the_code_that_was_imported(package):
    before = versions.commit(package)
    (package / "code.py").write_text("one = 2\n")
    git(package, "commit", "-q", "-a", "-m", "second")
    assert versions.commit(package) == before != git(package, "rev-parse", "HEAD")


def test_the_checkout_of_another_project_says_nothing(package):
    """As an environment inside somebody's repository."""
    inside = package.parent / ".venv" / "nobody"
    inside.mkdir(parents=True)
    assert versions.commit(inside) is None


def test_no_git_program(package, monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert versions.commit(package) is None


def test_pip_wrote_it_down(tmp_path, monkeypatch):
    """Of `pip install git+ADDRESS`: what the standard of direct_url.json says."""
    versions.commit.cache_clear()

    class Installed:
        def read_text(self, name):
            assert name == "direct_url.json"
            return '{"url": "u", "vcs_info": {"vcs": "git", "commit_id": "abc", "requested_revision": "main"}}'

    monkeypatch.setattr(versions, "distribution", lambda name: Installed())
    assert versions.commit(tmp_path / "dllm_rl") == "abc"


def test_a_wheel_says_nothing(tmp_path, monkeypatch):
    versions.commit.cache_clear()
    monkeypatch.setattr(versions, "distribution", lambda name: type("Wheel", (), {"read_text": lambda *_: None})())
    assert versions.commit(tmp_path / "dllm_rl") is None


def test_the_whole_list():
    found = versions.versions()
    assert found["dllm_rl"] and found["torch"] and "dllm_rl_commit" in found
    if shutil.which("git") and (versions.PACKAGE.parent / ".git").exists():
        assert found["dllm_rl_commit"].rstrip("+") == git(versions.PACKAGE, "rev-parse", "HEAD")
