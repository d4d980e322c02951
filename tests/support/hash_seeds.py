"""What a program prints whose strings hash otherwise."""

import os
import subprocess
import sys


def printed_under_hash_seeds(code: str) -> set[bytes]:
    """The distinct outputs of `code` under three values of PYTHONHASHSEED."""
    printed = set()
    for seed in ("0", "1", "4242"):
        environment = os.environ | {"PYTHONHASHSEED": seed}
        command = [sys.executable, "-c", code]
        printed.add(subprocess.run(command, env=environment, capture_output=True, check=True).stdout)
    return printed
