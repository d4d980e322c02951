"""What bears its final name is whole; what a failed block wrote is gone."""

import errno
import os
import stat

import pytest

from dllm_rl.files import flush, read_json, remove, replacing, write_text
from dllm_rl.screen import line_of


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
@pytest.mark.parametrize("folder", [False, True])
def test_a_block_that_raises_leaves_what_was_there_and_nothing_beside_it(tmp_path, folder, error):
    path = tmp_path / "kept"
    inside = "part" if folder else ""

    def write(text, fault=None):
        with replacing(path) as partial:
            if folder:
                partial.mkdir()
            (partial / inside).write_text(text)
            if fault is not None:
                raise fault

    write("old")
    with pytest.raises(error):
        write("new", error())
    assert [item.name for item in tmp_path.iterdir()] == ["kept"] and (path / inside).read_text() == "old"
    write("new")
    assert [item.name for item in tmp_path.iterdir()] == ["kept"] and (path / inside).read_text() == "new"


@pytest.mark.parametrize("text", [b"{", b"\xff"])
def test_what_is_no_json_is_named(tmp_path, text):
    (tmp_path / "state.json").write_bytes(text)
    with pytest.raises(ValueError, match=r"state\.json is damaged: it is not JSON"):
        read_json(tmp_path / "state.json")


def test_a_link_is_removed_and_what_it_points_at_stays(tmp_path):
    (tmp_path / "runs").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "runs")
    remove(tmp_path / "link")
    assert [item.name for item in tmp_path.iterdir()] == ["runs"]


def test_a_full_disk_names_the_file_and_what_to_do(tmp_path):
    with pytest.raises(OSError) as raised, replacing(tmp_path / "summary.json"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert line_of(raised.value) == f"{tmp_path / 'summary.json'}: No space left on device; free disk space"
    assert raised.value.errno == errno.ENOSPC and not list(tmp_path.iterdir())


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF])
def test_a_file_system_without_fsync_of_folders_is_written(tmp_path, monkeypatch, number):
    kinds = []

    def fsync(handle):
        kinds.append(stat.S_ISDIR(os.fstat(handle).st_mode))
        if kinds[-1]:
            raise OSError(number, "no")

    monkeypatch.setattr(os, "fsync", fsync)
    write_text(tmp_path / "a" / "b.txt", "x")
    assert (tmp_path / "a" / "b.txt").read_text() == "x" and kinds == [False, True]
    assert not flush(tmp_path) and flush(tmp_path / "a" / "b.txt")


def test_another_error_of_fsync_is_an_error(tmp_path, monkeypatch):
    def fsync(handle):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match="Input/output error"):
        flush(tmp_path)
