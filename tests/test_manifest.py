"""Digests of a folder: what is checked, what is not, and what a quick check leaves unread."""

import json
import os
from pathlib import Path

import pytest
from refusals import refuses

from dllm_rl import manifest


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def test_a_manifest_holds_size_and_sha256_of_every_file_but_the_card(tmp_path):
    (tmp_path / "part").mkdir()
    (tmp_path / "part" / "abc").write_bytes(b"abc")
    (tmp_path / manifest.CARD).write_text("edited by users")
    manifest.write(tmp_path, step=1, processes=2, versions={})
    # FIPS 180-4's example of one block.
    digest = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert manifest.read(tmp_path)["files"] == {"part/abc": {"size": 3, "sha256": digest}}
    (tmp_path / manifest.CARD).write_text("edited again")
    (tmp_path / ".hidden").touch()
    manifest.verify(tmp_path)
    (tmp_path / "stranger").touch()
    refuses(r"stranger is not in manifest\.json; move it elsewhere", lambda: manifest.verify(tmp_path))
    (tmp_path / "stranger").unlink()
    (tmp_path / "part" / "abc").unlink()
    refuses("part/abc is missing", lambda: manifest.verify(tmp_path))


def test_a_quick_check_leaves_the_rest_of_large_files_unread(tmp_path):
    big = tmp_path / "big.safetensors"
    big.write_bytes(bytes(3 << 20))
    manifest.write(tmp_path, step=1, processes=1, versions={})
    flip(big, at=2 << 20)
    manifest.verify(tmp_path, quick=True)
    refuses("its SHA-256 differs", lambda: manifest.verify(tmp_path))
    flip(big, at=8)
    refuses("its first MiB differs", lambda: manifest.verify(tmp_path, quick=True))
    flip(big, at=8)
    os.truncate(big, 3 << 19)
    refuses(f"damaged: {3 << 19} bytes, not {3 << 20}", lambda: manifest.verify(tmp_path, quick=True))


@pytest.mark.parametrize("lacks", ["files", "step", "format"])
def test_a_manifest_that_lacks_a_field_is_refused(tmp_path, lacks):
    manifest.write(tmp_path, step=1, processes=1, versions={})
    fields = {name: value for name, value in manifest.read(tmp_path).items() if name not in (lacks, "sha256")}
    (tmp_path / manifest.NAME).write_text(json.dumps(fields | {"sha256": manifest._own_digest(fields)}))
    refuses(rf"manifest\.json has no '{lacks}'", lambda: manifest.verify(tmp_path))
