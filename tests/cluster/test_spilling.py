"""Objects that do not fit into shared memory go to disk and come back; nothing is lost, and nothing is left there."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

import shoal
from shoal import session
from shoal.cluster_utils import Cluster
from shoal.exceptions import ObjectLostError, ObjectStoreFullError, ShoalError

from .conftest import wait_until

MIB = 1 << 20
STORE = 80 * MIB


@shoal.remote(num_cpus=1)
def make(seed: int, size_bytes: int = 8 * MIB) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 255, size_bytes, dtype=np.uint8)


@shoal.remote(num_cpus=1)
def checksum(array: np.ndarray) -> int:
    return int(array.sum())


def expected(seed: int, size_bytes: int = 8 * MIB) -> int:
    return int(np.random.default_rng(seed).integers(0, 255, size_bytes, dtype=np.uint8).sum())


def spilled_bytes() -> int:
    from shoal.runtime import slot

    assert slot.current is not None
    return sum(node.store_spilled for node in slot.current.status().nodes)


def files_below(folder: Path) -> list[str]:
    return [name for _, _, names in os.walk(folder) for name in names]


@pytest.fixture
def places(tmp_path: Path) -> Iterator[list[Path]]:
    """A cluster with a small store and two folders to spill to; both are empty when it has ended."""
    folders = [tmp_path / "one", tmp_path / "two"]
    with shoal.init(
        "local", num_cpus=2, object_store_memory=STORE, object_spilling_directory=[str(folder) for folder in folders]
    ):
        yield folders
    assert [files_below(folder) for folder in folders] == [[], []]


def test_four_times_what_fits_is_made_used_and_gone(places: list[Path]) -> None:
    refs = [make.remote(seed) for seed in range(40)]
    order = list(range(40))
    random.Random(1).shuffle(order)
    for seed in order:
        assert int(shoal.get(refs[seed]).sum()) == expected(seed)
    assert shoal.get([checksum.remote(ref) for ref in refs]) == [expected(seed) for seed in range(40)]
    assert all(files_below(folder) for folder in places), "both folders are used"
    del refs
    assert wait_until(lambda: not any(map(files_below, places)), 20.0), "files of dropped objects stay"
    assert wait_until(lambda: spilled_bytes() == 0, 20.0)


def test_values_that_are_put_spill_as_well_and_are_told_in_the_status(places: list[Path]) -> None:
    refs = [shoal.put(np.full(8 * MIB, number, dtype=np.uint8)) for number in range(20)]
    assert wait_until(lambda: spilled_bytes() > 0, 20.0)
    for number, ref in enumerate(refs):
        assert set(shoal.get(ref)[::MIB]) == {number}


def test_what_is_being_read_stays_in_memory(places: list[Path]) -> None:
    held = shoal.get(shoal.put(np.arange(4 * MIB, dtype=np.uint64)))  # 32 of 80 MiB
    refs = [make.remote(seed) for seed in range(20)]
    assert shoal.get([checksum.remote(ref) for ref in refs]) == [expected(seed) for seed in range(20)]
    assert (held == np.arange(4 * MIB, dtype=np.uint64)).all()
    with pytest.raises(ObjectStoreFullError, match=r"being read"):
        shoal.get([shoal.put(np.zeros(40 * MIB, dtype=np.uint8)), shoal.put(np.zeros(40 * MIB, dtype=np.uint8))])


def test_a_lost_file_is_a_lost_object_that_names_it(places: list[Path]) -> None:
    refs = [make.remote(seed) for seed in range(30)]
    shoal.wait(refs, num_returns=len(refs))
    for folder in places:
        for name in os.listdir(folder):
            (folder / name).unlink()
    lost: list[str] = []
    for seed, ref in enumerate(refs):
        try:
            assert int(shoal.get(ref).sum()) == expected(seed)
        except ObjectLostError as exc:
            lost.append(str(exc))
    assert len(lost) >= 10
    assert all("cannot be read" in text for text in lost)


def test_without_a_place_to_write_everything_stays_and_the_error_says_why(tmp_path: Path) -> None:
    blocked = tmp_path / "spill"
    blocked.mkdir()
    with shoal.init("local", num_cpus=1, object_store_memory=STORE, object_spilling_directory=str(blocked)):
        blocked.rmdir()
        blocked.write_text("a file where the folder was")
        refs = [shoal.put(np.full(8 * MIB, number, dtype=np.uint8)) for number in range(9)]
        with pytest.raises(ObjectStoreFullError, match=str(blocked)):
            shoal.put(np.zeros(16 * MIB, dtype=np.uint8))
        assert [int(shoal.get(ref)[0]) for ref in refs] == list(range(9))
        blocked.unlink()  # the disk is there again: it goes on by itself
        more = [shoal.put(np.full(8 * MIB, number, dtype=np.uint8)) for number in range(10, 20)]
        assert [int(shoal.get(ref)[0]) for ref in refs + more] == [*range(9), *range(10, 20)]


def test_a_spilled_object_goes_to_another_node_from_its_file(make_cluster: Callable[..., Cluster]) -> None:
    cluster = make_cluster(initialize_head=True, head_node_args={"num_cpus": 1, "object_store_memory": STORE})
    cluster.add_node(num_cpus=1, object_store_memory=STORE, resources={"far": 1})
    cluster.wait_for_nodes()
    shoal.init(cluster.address)
    far = make.options(resources={"far": 1})
    refs = [far.remote(seed) for seed in range(24)]
    shoal.wait(refs, num_returns=len(refs), fetch_local=False)
    assert wait_until(lambda: spilled_bytes() > 8 * 8 * MIB, 20.0)
    for seed, ref in enumerate(refs):
        assert int(shoal.get(ref).sum()) == expected(seed)


def test_the_default_place_is_the_node_s_own_folder_and_goes_with_it() -> None:
    with shoal.init("local", num_cpus=1, object_store_memory=STORE) as context:
        folder = Path(context.address_info["session_dir"]) / "spill"
        refs = [make.remote(seed) for seed in range(20)]
        shoal.wait(refs, num_returns=len(refs))
        assert files_below(folder)
    assert not folder.exists()
    assert session.NodeFolder(folder.parent).logs.exists()


def test_a_place_that_cannot_be_is_told_at_the_start() -> None:
    with pytest.raises(ShoalError, match=r"cannot spill objects to 'nosuch://bucket'"):
        shoal.init("local", num_cpus=1, object_spilling_directory="nosuch://bucket")
    with pytest.raises(TypeError, match="object_spilling_directory"):
        shoal.init("local", object_spilling_directory=3)  # type: ignore[arg-type]
