"""`dllm-rl env`: what a report of a problem needs to know of the machine: no path, no host's name."""

import os
import platform
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, metadata, requires, version
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

PACKAGES = ("torch", "transformers", "torchao", "accelerate", "bitsandbytes", "peft", "safetensors", "datasets")


def environment() -> dict[str, Any]:
    """Versions, devices, cores, memory, and what is missing. None where something is not there or cannot be told."""
    found = {
        "dllm_rl": own_version(),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "versions": {package: installed(package) for package in PACKAGES},
        **devices(),
        "driver": driver(),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "usable_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gb": memory(),
    }
    try:
        needs = requires("dllm_rl") or []
        extras = metadata("dllm_rl").get_all("Provides-Extra") or []
    except PackageNotFoundError:  # the source tree on PYTHONPATH
        return found | {"unmet": None, "extras": None}
    return found | {"unmet": lacks(needs), "extras": {extra: lacks(needs, extra) for extra in extras}}


def devices() -> dict[str, Any]:
    """What torch computes on."""
    try:
        import torch
    except (ImportError, OSError) as error:
        return {"device": None, "gpus": [], "cuda": None, "threads": None, "torch_error": str(error).splitlines()[0]}
    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return {
        "device": accelerator.type if accelerator else "cpu",
        "gpus": [
            {"name": gpu.name, "memory_gb": round(gpu.total_memory / 1e9, 1), "capability": f"{gpu.major}.{gpu.minor}"}
            for gpu in gpus
        ],
        "cuda": torch.version.cuda,
        "threads": torch.get_num_threads(),
    }


def own_version() -> str:
    import dllm_rl

    return dllm_rl.__version__


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def lacks(needs: list[str], extra: str = "") -> list[str]:
    """Requirements that are not met: those of an extra, which always hold left out, or, without one, those."""
    found = []
    for need in map(Requirement, needs):
        always = need.marker is None or need.marker.evaluate({"extra": ""})
        wanted = (
            always if not extra else not always and need.marker is not None and need.marker.evaluate({"extra": extra})
        )
        if not wanted or need.name.replace("-", "_") == "dllm_rl":  # an extra that is made of others, which are listed
            continue
        here = installed(need.name)
        if here is None:
            found.append(f"{need.name}{need.specifier}")
        elif not need.specifier.contains(here, prereleases=True):
            found.append(f"{need.name}{need.specifier} (here is {here})")
    return found


def driver() -> str | None:
    """The version of NVIDIA's driver, also where torch is a build that does not use it."""
    if shutil.which("nvidia-smi") is None:
        return None
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return next(iter(done.stdout.split("\n")), "").strip() or None


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def memory() -> float | None:
    """The machine's memory, GB; a container's limit may be lower."""
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1)
    except (AttributeError, OSError, ValueError):
        return None


def lines(found: dict[str, Any]) -> list[str]:
    """The same as plain lines, a fact each."""
    rows = [("dllm_rl", found["dllm_rl"]), ("python", found["python"]), ("system", found["system"])]
    rows += [(name, here or "not installed") for name, here in found["versions"].items()]
    rows.append(("device", found["device"] or f"unknown: torch cannot be imported: {found['torch_error']}"))
    rows += [
        ("gpu", f"{gpu['name']}, {gpu['memory_gb']} GB, compute capability {gpu['capability']}")
        for gpu in found["gpus"]
    ]
    unused = " (torch is a build without CUDA)" if found["driver"] and found["device"] and not found["cuda"] else ""
    rows.append(("cuda", (found["cuda"] or "none") + unused))
    rows.append(("driver", found["driver"] or "none"))
    rows.append(("cpu", found["cpu"]))
    rows.append(("cores", f"{found['cores']}, of which {found['usable_cores']} may be used"))
    rows.append(("threads", "unknown" if found["threads"] is None else str(found["threads"])))
    rows.append(("memory", "unknown" if found["memory_gb"] is None else f"{found['memory_gb']} GB"))
    if found["extras"] is None:
        rows.append(("extras", "unknown: dllm_rl is not installed, only on the path"))
    else:
        rows += [("UNMET", need) for need in found["unmet"]]
        rows += [
            (f"[{extra}]", f"missing: {', '.join(needs)}" if needs else "complete")
            for extra, needs in found["extras"].items()
        ]
    return [f"{name:<14}{value}" for name, value in rows]


def env_command(*, as_json: bool) -> None:
    import json

    found = environment()
    print(json.dumps(found, indent=1) if as_json else "\n".join(lines(found)))
