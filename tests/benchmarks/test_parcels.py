"""What travels to a GPU machine: parts with checksums, joined there."""

import hashlib

import pytest

from benchmarks import parcels


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "some-0.1-py3-none-any.whl"
    path.write_bytes(bytes(i * i % 251 for i in range(10_001)))
    return path


@pytest.mark.parametrize("parts", [1, 2, 3])
def test_what_is_split_is_joined(file, tmp_path, parts):
    parcels.split(file, tmp_path / "parcels", parts)
    sizes = [(tmp_path / "parcels" / str(n) / "part").stat().st_size for n in range(1, parts + 1)]
    assert sum(sizes) == 10_001 and max(sizes) - min(sizes) < parts
    whole = parcels.join(tmp_path / "parcels", tmp_path / "weights")
    assert whole == tmp_path / "weights" / file.name
    assert hashlib.sha256(whole.read_bytes()).digest() == hashlib.sha256(file.read_bytes()).digest()


@pytest.mark.parametrize("missing", ["1", "2"])
def test_a_part_that_has_not_come_is_named(file, tmp_path, missing):
    folder = tmp_path / "parcels"
    parcels.split(file, folder)
    (folder / missing).rename(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=f"part {missing} of 2 is missing: send .*parcels/{missing} with the next"):
        parcels.join(folder, tmp_path / "weights")
    assert not (tmp_path / "weights").exists()
    (tmp_path / "elsewhere").rename(folder / missing)
    assert parcels.join(folder, tmp_path / "weights").read_bytes() == file.read_bytes()


def flipped(content):
    return bytes([content[0] ^ 1]) + content[1:]


@pytest.mark.parametrize("number", ["1", "2"])
@pytest.mark.parametrize(
    "damage", [flipped, lambda content: content[:-1], lambda content: content + b"x", lambda _: b""]
)
def test_a_damaged_part_is_named_and_nothing_is_joined(file, tmp_path, number, damage):
    parcels.split(file, tmp_path / "parcels")
    part = tmp_path / "parcels" / number / "part"
    part.write_bytes(damage(part.read_bytes()))
    with pytest.raises(ValueError, match=f"parcels/{number}/part has SHA-256 .* is expected: send .*/{number} again"):
        parcels.join(tmp_path / "parcels", tmp_path / "weights")
    assert not (tmp_path / "weights").exists()


def test_without_a_parcel_it_says_so(tmp_path):
    with pytest.raises(ValueError, match="has no parcel: make them with `pack`"):
        parcels.join(tmp_path, tmp_path / "weights")
