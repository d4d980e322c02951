"""`dllm-rl env`: what of the machine a report of a problem needs."""

import json
import sys
from importlib.metadata import PackageNotFoundError, version
from types import SimpleNamespace

import pytest
import torch
from simulated_cuda import SimulatedCuda

import dllm_rl
from dllm_rl.cli import env
from dllm_rl.cli.main import main

NEEDS = [
    "torch>=1",
    "torch>=99",
    "no-such-thing>=2; python_version > '3'",
    "einops>=99; python_version < '3'",
    'pytest>=1; extra == "test"',
    'dllm_rl[test]; extra == "dev"',
    'another-thing<3; extra == "dev"',
]
TORCH = version("torch")  # the package index's build lacks the "+cu130" of torch.__version__


@pytest.fixture
def extras(monkeypatch):
    class Metadata:
        def get_all(self, field):
            return {"Provides-Extra": ["test", "dev"]}[field]

    monkeypatch.setattr(env, "requires", lambda name: NEEDS)
    monkeypatch.setattr(env, "metadata", lambda name: Metadata())


def said(capsys, *options):
    assert main(["env", *options]) == 0
    return capsys.readouterr().out


def test_it_says_what_is_here(extras, capsys):
    found = json.loads(said(capsys, "--json"))
    assert found["dllm_rl"] == dllm_rl.__version__
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))
    assert found["versions"]["torch"] == TORCH
    assert found["device"] == "cpu" and found["gpus"] == [] and found["threads"] == torch.get_num_threads()
    assert 0 < found["usable_cores"] <= found["cores"] and found["memory_gb"] > 0
    rows = [line.split(maxsplit=1) for line in said(capsys).splitlines()]
    assert {"torch", "transformers", "torchao", "accelerate", "bitsandbytes", "peft", "cuda", "driver"} <= dict(
        rows
    ).keys()
    assert dict(rows)["torch"] == TORCH and dict(rows)["threads"] == str(found["threads"])


def test_what_is_missing_is_named(extras, capsys):
    found = json.loads(said(capsys, "--json"))
    assert found["unmet"] == [f"torch>=99 (here is {TORCH})", "no-such-thing>=2"]
    assert found["extras"] == {"test": [], "dev": ["another-thing<3"]}
    lines = said(capsys).splitlines()
    assert "[test]        complete" in lines and "[dev]         missing: another-thing<3" in lines
    assert "UNMET         no-such-thing>=2" in lines


def test_the_real_requirements_are_read(capsys):
    """Installed or only on the path, it answers."""
    found = json.loads(said(capsys, "--json"))
    assert found["extras"] is None or {"bnb", "peft", "math", "gguf"} <= found["extras"].keys()


def test_a_source_tree_that_is_not_installed_is_no_error(monkeypatch, capsys):
    def nothing(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(env, "requires", nothing)
    assert "unknown: dllm_rl is not installed, only on the path" in said(capsys)


def test_a_torch_that_cannot_be_imported_is_said(monkeypatch, extras, capsys):
    monkeypatch.setitem(sys.modules, "torch", None)
    out = said(capsys)
    assert "device        unknown: torch cannot be imported: import of torch halted" in out
    assert "threads       unknown" in out


def test_a_gpu_and_its_driver(monkeypatch, extras, capsys, tmp_path):
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho 570.1\necho 570.1\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    assert "cuda          none (torch is a build without CUDA)" in said(capsys) or torch.version.cuda
    gpu = SimpleNamespace(name="NVIDIA H200", total_memory=150_100_000_000, major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: gpu)
    with SimulatedCuda():
        found, lines = json.loads(said(capsys, "--json")), said(capsys).splitlines()
    assert found["driver"] == "570.1" and found["device"] == "cuda"
    assert found["gpus"] == [{"name": "NVIDIA H200", "memory_gb": 150.1, "capability": "9.0"}]
    assert "gpu           NVIDIA H200, 150.1 GB, compute capability 9.0" in lines and "driver        570.1" in lines
    monkeypatch.setattr(env.subprocess, "run", lambda *a, **k: (_ for _ in ()).throw(OSError("no")))
    assert env.driver() is None


@pytest.mark.parametrize("error", [ValueError, OSError, AttributeError])
def test_a_memory_that_the_system_does_not_name_is_unknown(monkeypatch, error):
    def sysconf(name):
        raise error(name)

    monkeypatch.setattr(env.os, "sysconf", sysconf)
    assert env.memory_gb() is None
