"""Files of spilled copies: what is written is read back, the next folder takes what one refuses, nothing is left."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.exceptions import ShoalError
from shoal.node import spill_files
from shoal.node.spill_files import (
    LocalFolder,
    SpilledLostError,
    SpillFiles,
    SpillFullError,
    Spot,
    check_folder,
    open_folder,
    sweep_folder,
)


def views(*sizes: int) -> list[memoryview]:
    return [memoryview(os.urandom(size)) for size in sizes]


def read(files: SpillFiles, spot: Spot) -> bytes:
    target = bytearray(spot.size)
    files.read(spot, memoryview(target))
    return bytes(target)


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder)) if folder.exists() else []


class FullFolder(LocalFolder):
    def write(self, name: str, views: Sequence[memoryview]) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@given(sizes=st.lists(st.integers(0, 5000), min_size=1, max_size=20))
def test_a_batch_is_one_file_and_each_copy_is_found_in_it(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int]
) -> None:
    folder = tmp_path_factory.mktemp("spill") / "made when needed"
    files = SpillFiles([LocalFolder(str(folder))], "node")
    written = views(*sizes)
    spots = files.write(written, 0)
    assert len(names(folder)) == 1
    assert [read(files, spot) for spot in spots] == [bytes(view) for view in written]
    for number, spot in enumerate(spots):
        part = bytearray(spot.size // 2)
        files.read(spot, memoryview(part), spot.size - len(part))
        assert part == bytes(written[number])[spot.size - len(part) :]
    assert files.close() == []
    assert not folder.exists()


@pytest.mark.parametrize("piece", [1, 7, 1 << 20])
def test_large_copies_are_written_and_read_in_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece: int
) -> None:
    monkeypatch.setattr(spill_files, "_PIECE_BYTES", piece)
    files = SpillFiles([LocalFolder(str(tmp_path))], "node")
    written = views(1000, 3, 500)
    assert [read(files, spot) for spot in files.write(written, 0)] == [bytes(view) for view in written]


def test_a_file_goes_with_its_last_copy(tmp_path: Path) -> None:
    files = SpillFiles([LocalFolder(str(tmp_path))], "node")
    first = files.write(views(10, 20, 30), 0)
    second = files.write(views(40), 0)
    assert files.forget(first[1]) is None
    assert files.forget(first[0]) is None
    file = files.forget(first[2])
    assert file is not None
    files.remove(file)
    assert len(names(tmp_path)) == 1
    assert len(read(files, second[0])) == 40


def test_folders_take_turns_and_one_that_is_full_is_passed_over(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    files = SpillFiles([LocalFolder(str(one)), LocalFolder(str(two))], "node")
    for number in range(4):
        files.write(views(10), number)
    assert (len(names(one)), len(names(two))) == (2, 2)
    files = SpillFiles([FullFolder(str(one)), LocalFolder(str(two))], "other")
    files.write(views(10), 0)
    assert (len(names(one)), len(names(two))) == (2, 3)


def test_when_no_folder_takes_it_each_is_named_with_the_bytes(tmp_path: Path) -> None:
    files = SpillFiles([FullFolder("/first"), FullFolder("/second")], "node")
    with pytest.raises(SpillFullError, match=r"123 bytes .*/first: No space left.*/second: No space left"):
        files.write(views(100, 23), 0)


def test_a_disk_is_not_filled_to_the_last_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = 10_000
    usage = type("usage", (), {"total": 100_000, "free": free})
    monkeypatch.setattr(spill_files.shutil, "disk_usage", lambda _: usage)
    files = SpillFiles([LocalFolder(str(tmp_path))], "node")
    files.write(views(5_000), 0)
    with pytest.raises(SpillFullError, match="10000 bytes are free, 5001 are to be written"):
        files.write(views(5_001), 0)


def test_a_write_that_fails_in_the_middle_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(fd: int, data: memoryview) -> int:
        if len(data) < 20:
            raise OSError(errno.EIO, "broken")
        return real(fd, data[:10])

    real = os.write
    files = SpillFiles([LocalFolder(str(tmp_path))], "node")
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", write)
        with pytest.raises(SpillFullError, match="broken"):
            files.write(views(50), 0)
    assert names(tmp_path) == []


@pytest.mark.parametrize("damage", ["removed", "cut"])
def test_a_damaged_file_is_a_lost_copy_that_names_it(tmp_path: Path, damage: str) -> None:
    files = SpillFiles([LocalFolder(str(tmp_path))], "node")
    (spot,) = files.write(views(1000), 0)
    (name,) = names(tmp_path)
    if damage == "removed":
        (tmp_path / name).unlink()
    else:
        os.truncate(tmp_path / name, 999)
    with pytest.raises(SpilledLostError, match=name):
        read(files, spot)


def test_what_is_not_ours_in_a_folder_stays(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    files = SpillFiles([LocalFolder(str(tmp_path))], "node")
    files.write(views(10), 0)
    assert files.close() == []
    assert names(tmp_path) == ["mine"]


def test_any_place_that_fsspec_knows_will_do() -> None:
    import fsspec

    files = SpillFiles([open_folder("memory://spilled/here")], "node")
    written = views(1000, 0, 2000)
    spots = files.write(written, 0)
    assert [read(files, spot) for spot in spots] == [bytes(view) for view in written]
    memory = fsspec.filesystem("memory")
    assert len(memory.ls("/spilled/here")) == 1
    part = bytearray(10)
    files.read(spots[2], memoryview(part), 1990)
    assert part == bytes(written[2])[-10:]
    assert files.close() == []
    assert memory.ls("/spilled/here") == []
    with pytest.raises(SpilledLostError, match="memory://spilled/here"):
        read(files, spots[0])


def test_a_sweep_takes_the_files_of_one_node(tmp_path: Path) -> None:
    for prefix in ("shoal-aa", "shoal-ab"):
        SpillFiles([LocalFolder(str(tmp_path))], prefix).write(views(10), 0)
    (tmp_path / "shoal-aa.txt").write_text("mine")
    sweep_folder(str(tmp_path), "shoal-aa")
    assert names(tmp_path) == ["shoal-aa.txt", "shoal-ab-1"]
    sweep_folder(str(tmp_path / "never made"), "shoal-aa")


def test_files_of_a_file_url_are_local(tmp_path: Path) -> None:
    assert open_folder(f"file://{tmp_path}").where == str(tmp_path)


@pytest.mark.parametrize("where", ["nosuchscheme://x/y", "/proc/no/such/folder"])
def test_a_place_that_cannot_be_is_one_clear_line(where: str) -> None:
    with pytest.raises(ShoalError, match=f"cannot spill objects to '{where}'"):
        check_folder(where)
