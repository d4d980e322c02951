"""Stored curves: exact where they were recorded, bounded elsewhere."""

import platform
from pathlib import Path

import torch


def environment() -> dict[str, str]:
    """What a number's last bits depend on."""
    import torchao
    import transformers

    cpu = torch.backends.cpu.get_cpu_capability()
    info = Path("/proc/cpuinfo")
    model = (
        {line for line in info.read_text().splitlines() if line.startswith(("model", "vendor", "cpu family"))}
        if info.exists()
        else set()
    )
    versions = {"torch": torch.__version__, "transformers": transformers.__version__, "torchao": torchao.__version__}
    return {
        **versions,
        "machine": platform.machine(),
        "cpu": cpu,
        "model": "; ".join(sorted(line.replace("\t", " ") for line in model)),
    }
