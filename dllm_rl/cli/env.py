"""`dllm-rl env`: the facts of the machine that a report of a problem needs. No path and no host name."""

import json
import os
import platform
import subprocess
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, metadata, requires, version
from typing import Any

from packaging.requirements import Requirement

import dllm_rl

PACKAGES = ("torch", "transformers", "torchao", "accelerate", "bitsandbytes", "peft", "safetensors", "datasets")


def environment() -> dict[str, Any]:
    """Versions, devices, cores, memory, and requirements that are not met. None: absent or unknown."""
    unmet = extras = None
    try:
        needs = requires("dllm_rl") or []
        unmet = lacks(needs)
        extras = {extra: lacks(needs, extra) for extra in metadata("dllm_rl").get_all("Provides-Extra") or []}
    except PackageNotFoundError:  # the source tree on PYTHONPATH
        pass
    return {
        "dllm_rl": dllm_rl.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "versions": {package: installed(package) for package in PACKAGES},
        **devices(),
        "driver": driver(),
        "cores": os.cpu_count(),
        "usable_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gb": memory_gb(),
        "unmet": unmet,
        "extras": extras,
    }


def memory_gb() -> float | None:
    """The machine's memory; a container's limit may be lower."""
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1)
    except (AttributeError, ValueError, OSError):  # a system without sysconf, or without these names
        return None


def devices() -> dict[str, Any]:
    """What torch computes on; `cpu` is the instruction set that torch uses there."""
    try:
        import torch
    except (ImportError, OSError) as error:  # a broken installation is what a report is for
        unknown = dict.fromkeys(("device", "cuda", "cpu", "threads"))
        return {**unknown, "gpus": [], "torch_error": str(error).splitlines()[0]}
    gpus = []
    for i in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(i)
        memory = round(gpu.total_memory / 1e9, 1)
        gpus.append({"name": gpu.name, "memory_gb": memory, "capability": f"{gpu.major}.{gpu.minor}"})
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return {
        "device": accelerator.type if accelerator else "cpu",
        "gpus": gpus,
        "cuda": torch.version.cuda,
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
    }


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def lacks(needs: list[str], extra: str = "") -> list[str]:
    """The requirements that are not met, of the package itself or of one extra."""
    found = []
    for need in map(Requirement, needs):
        always = need.marker is None or need.marker.evaluate({"extra": ""})
        wanted = need.marker is None or need.marker.evaluate({"extra": extra})
        # An extra that consists of others requires dllm_rl; the others are in the list themselves.
        if not wanted or (extra and always) or need.name.replace("-", "_") == "dllm_rl":
            continue
        here = installed(need.name)
        # nightly builds of torch are prereleases
        if here is None or not need.specifier.contains(here, prereleases=True):
            found.append(f"{need.name}{need.specifier}" + (f" (here is {here})" if here else ""))
    return found


def driver() -> str | None:
    """The version of NVIDIA's driver, also where torch is a build without CUDA."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        # a driver that hangs must not hang the report
        done = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.partition("\n")[0].strip() or None


def lines(found: dict[str, Any]) -> list[str]:
    rows = _rows(found, ("dllm_rl", "python", "system"))
    rows += _rows(found["versions"], found["versions"], absent="not installed")
    rows.append(("device", found["device"] or f"unknown: torch cannot be imported: {found['torch_error']}"))
    for gpu in found["gpus"]:
        rows.append(("gpu", f"{gpu['name']}, {gpu['memory_gb']} GB, compute capability {gpu['capability']}"))
    unused = " (torch is a build without CUDA)" if found["driver"] and found["device"] and not found["cuda"] else ""
    rows.append(("cuda", (found["cuda"] or "none") + unused))
    rows += _rows(found, ("driver",), absent="none")
    rows += _rows(found, ("cpu", "cores", "usable_cores", "threads", "memory_gb"))
    if found["extras"] is None:
        rows.append(("extras", "unknown: dllm_rl is not installed, only on the path"))
    for need in found["unmet"] or ():
        rows.append(("UNMET", need))
    for extra, needs in (found["extras"] or {}).items():
        rows.append((f"[{extra}]", f"missing: {', '.join(needs)}" if needs else "complete"))
    return [f"{name:<14}{value}" for name, value in rows]


def _rows(facts: dict[str, Any], names: Iterable[str], *, absent: str = "unknown") -> list[tuple[str, Any]]:
    return [(name, facts[name] or absent) for name in names]


def env_command(*, as_json: bool) -> None:
    found = environment()
    print(json.dumps(found, indent=1) if as_json else "\n".join(lines(found)))
