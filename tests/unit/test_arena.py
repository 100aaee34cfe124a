from __future__ import annotations

import errno
import gc
import os
import subprocess
import sys
import threading
from collections.abc import Iterator

import numpy as np
import pytest

from shoal.objects import memory
from shoal.objects.arena import MIB, PAGE_BYTES, POPULATE_BYTES, Arena, Warmer
from shoal.objects.serialization import deserialize, serialize

CAPACITY = 32 * MIB


@pytest.fixture
def arena() -> Iterator[Arena]:
    arena = Arena.create(CAPACITY)
    yield arena
    arena.close()


def mappings() -> int:
    with open("/proc/self/maps") as maps:
        return sum("shoal-arena" in line for line in maps)


def allocated_bytes(arena: Arena) -> int:
    return os.fstat(arena.fd).st_blocks * 512


def test_making_and_opening_one_maps_and_allocates_nothing() -> None:
    before = mappings()
    arena = Arena.create(1 << 40)
    other = Arena.open(arena.path, 1 << 40)
    assert mappings() == before
    assert allocated_bytes(arena) == 0
    other.view(0, 8)[:] = b"somebody"
    assert mappings() == before + 1
    assert allocated_bytes(arena) == PAGE_BYTES
    other.close()
    arena.close()
    assert mappings() == before


def test_two_doors_see_the_same_bytes(arena: Arena) -> None:
    other = Arena.open(arena.path, CAPACITY)
    arena.view(4096, 5)[:] = b"hello"
    assert bytes(other.view(4096, 5)) == b"hello"
    other.close()


def test_an_unrelated_process_opens_it_by_path(arena: Arena) -> None:
    arena.view(64, 5)[:] = b"hello"
    script = (
        "import sys; from shoal.objects.arena import Arena\n"
        "arena = Arena.open(sys.argv[1], int(sys.argv[2])); view = arena.view(64, 5)\n"
        "assert bytes(view) == b'hello'; view[:] = b'olleh'\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", script, arena.path, str(CAPACITY)]
    subprocess.run(command, check=True, timeout=30, env=environment)
    assert bytes(arena.view(64, 5)) == b"olleh"


def test_a_forked_process_uses_it_by_descriptor(arena: Arena) -> None:
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            inherited = Arena(arena.fd, CAPACITY, arena.path)
            inherited.view(128, 3)[:] = b"abc"
            status = 0
        finally:
            os._exit(status)
    assert os.waitpid(pid, 0)[1] == 0
    assert bytes(arena.view(128, 3)) == b"abc"


def test_opening_the_wrong_thing_says_so(arena: Arena) -> None:
    with pytest.raises(ValueError, match=f"{CAPACITY} bytes; {CAPACITY + 1} were expected"):
        Arena.open(arena.path, CAPACITY + 1)
    with pytest.raises(FileNotFoundError):
        Arena.open(f"/proc/{os.getpid()}/fd/999999", CAPACITY)
    with pytest.raises(ValueError, match="positive"):
        Arena.create(0)


def test_nobody_can_resize_the_memory_under_others(arena: Arena) -> None:
    for size in (CAPACITY // 2, CAPACITY * 2):
        with pytest.raises(OSError) as caught:
            os.ftruncate(arena.fd, size)
        assert caught.value.errno == errno.EPERM


@pytest.mark.parametrize(("offset", "size"), [(-1, 1), (0, -1), (0, CAPACITY + 1), (CAPACITY, 1), (CAPACITY - 4, 8)])
def test_bytes_outside_are_refused(arena: Arena, offset: int, size: int) -> None:
    with pytest.raises(ValueError, match="outside"):
        arena.view(offset, size)
    with pytest.raises(ValueError, match="outside"):
        arena.pinned(offset, size, list)


class TestPinned:
    def test_views_are_read_only_and_exact(self, arena: Arena) -> None:
        arena.view(64, 6)[:] = b"abcdef"
        view = arena.pinned(65, 4, list)
        assert (bytes(view), view.nbytes, view.format, view.readonly) == (b"bcde", 4, "B", True)
        with pytest.raises(TypeError):
            view[0] = 1

    @pytest.mark.parametrize("size", [0, 1, 100, 4096, 4097, 3 * MIB])
    @pytest.mark.parametrize("where", ["start", "end"])
    def test_any_size_anywhere(self, arena: Arena, size: int, where: str) -> None:
        offset = 0 if where == "start" else CAPACITY - size
        released: list[int] = []
        view = arena.pinned(offset, size, lambda: released.append(1))
        assert view.nbytes == size
        del view
        assert released == [1]

    def test_release_waits_for_the_last_derived_view(self, arena: Arena) -> None:
        arena.view(0, 800)[:] = bytes(800)
        released: list[str] = []
        view = arena.pinned(0, 800, lambda: released.append("once"))
        array = np.frombuffer(view, dtype=np.float64)
        row = array.reshape(10, 10)[3]
        part = view[5:7]
        assert not array.flags.writeable
        del view, array
        gc.collect()
        assert released == []
        del part
        assert released == []
        del row
        assert released == ["once"]
        gc.collect()
        assert released == ["once"]

    def test_each_pin_of_an_extent_counts_for_itself(self, arena: Arena) -> None:
        released: list[str] = []
        first = arena.pinned(0, 10, lambda: released.append("first"))
        second = arena.pinned(0, 10, lambda: released.append("second"))
        del first
        assert released == ["first"]
        del second
        assert released == ["first", "second"]

    def test_a_deserialized_array_holds_the_pin(self, arena: Arena) -> None:
        value = {"rows": np.arange(100_000), "name": "x"}
        flat = serialize(value)
        flat.write_into(arena.view(64, flat.flat_size))
        released: list[int] = []
        got = deserialize(arena.pinned(64, flat.flat_size, lambda: released.append(1)))
        assert np.array_equal(got["rows"], value["rows"])
        assert not got["rows"].flags.writeable
        assert got["rows"].ctypes.data % 64 == 0
        view = got["rows"][10:20]
        del got
        assert released == []
        del view
        assert released == [1]

    def test_a_value_without_buffers_releases_at_once(self, arena: Arena) -> None:
        flat = serialize(list(range(1000)))
        flat.write_into(arena.view(0, flat.flat_size))
        released: list[int] = []
        assert deserialize(arena.pinned(0, flat.flat_size, lambda: released.append(1))) == list(range(1000))
        assert released == [1]

    def test_release_in_a_garbage_collection_and_in_another_thread(self, arena: Arena) -> None:
        released: list[int] = []
        cycle: list[object] = [arena.pinned(0, 10, lambda: released.append(threading.get_ident()))]
        cycle.append(cycle)
        del cycle
        assert released == []
        thread = threading.Thread(target=gc.collect)
        thread.start()
        thread.join()
        assert len(released) == 1

    def test_a_forked_child_does_not_release_for_its_parent(self, arena: Arena) -> None:
        reader, writer = os.pipe()
        view = arena.pinned(0, 10, lambda: os.write(writer, b"released"))
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                del view
                os.write(writer, b"child ")
                status = 0
            finally:
                os._exit(status)
        assert os.waitpid(pid, 0)[1] == 0
        del view
        assert os.read(reader, 100) == b"child released"
        os.close(reader)
        os.close(writer)

    def test_interpreter_exit_with_pins_out_is_quiet(self, arena: Arena) -> None:
        script = (
            "import sys, numpy; from shoal.objects.arena import Arena\n"
            "arena = Arena.open(sys.argv[1], int(sys.argv[2]))\n"
            "array = numpy.frombuffer(arena.pinned(0, 4096, lambda: print('released')))\n"
            "class Cycle: pass\n"
            "cycle = Cycle(); cycle.me, cycle.array = cycle, array\n"
        )
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        command = [sys.executable, "-c", script, arena.path, str(CAPACITY)]
        done = subprocess.run(command, capture_output=True, timeout=30, env=environment, text=True, check=True)
        assert done.stderr == ""


class TestClose:
    def test_views_outlive_it_and_the_mapping_goes_with_them(self) -> None:
        before = mappings()
        arena = Arena.create(CAPACITY)
        released: list[int] = []
        pinned = arena.pinned(0, 16, lambda: released.append(1))
        arena.view(0, 5)[:] = b"alive"
        arena.close()
        arena.close()
        assert bytes(pinned[:5]) == b"alive"
        del pinned
        assert released == [1]
        gc.collect()
        assert mappings() == before

    def test_nothing_new_is_given(self, arena: Arena) -> None:
        arena.close()
        for use in (
            lambda: arena.view(0, 1),
            lambda: arena.pinned(0, 1, list),
            lambda: arena.warm(0, 1),
            lambda: arena.populate(0, MIB),
        ):
            with pytest.raises(ValueError, match="closed"):
                use()

    def test_no_descriptor_is_left(self) -> None:
        before = len(os.listdir("/proc/self/fd"))
        arena = Arena.create(CAPACITY)
        other = Arena.open(arena.path, CAPACITY)
        other.view(0, 1)
        other.close()
        arena.close()
        assert len(os.listdir("/proc/self/fd")) == before


class TestWarming:
    def test_warm_allocates_and_keeps_contents(self, arena: Arena) -> None:
        arena.view(MIB + 10, 5)[:] = b"hello"
        arena.warm(MIB, 2 * MIB)
        assert allocated_bytes(arena) == 2 * MIB
        assert bytes(arena.view(MIB + 10, 5)) == b"hello"

    def test_any_stretch_is_rounded_to_pages(self, arena: Arena) -> None:
        arena.warm(PAGE_BYTES + 1, PAGE_BYTES)
        assert allocated_bytes(arena) == 2 * PAGE_BYTES

    def test_old_kernels_touch_the_pages(self, arena: Arena, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(memory, "populate", lambda *_: False)
        arena.view(MIB, 5)[:] = b"hello"
        arena.warm(0, 3 * MIB - 5)
        assert allocated_bytes(arena) == 3 * MIB
        assert bytes(arena.view(MIB, 5)) == b"hello"

    def test_an_advice_that_the_kernel_does_not_know_is_no_error(self, arena: Arena) -> None:
        with memory.address_of(arena.view(0, MIB)) as address:
            assert memory.populate(address, MIB, 9999) is False
            with pytest.raises(OSError, match="cannot populate"):
                memory.populate(PAGE_BYTES, PAGE_BYTES, memory.MADV_POPULATE_READ)  # nothing is mapped there

    def test_populate_asks_once_for_each_stretch(self, arena: Arena, monkeypatch: pytest.MonkeyPatch) -> None:
        asked: list[tuple[int, int]] = []
        base = [0]

        def record(address: int, size: int, advice: int) -> bool:
            base[0] = base[0] or address
            asked.append((address - base[0], size))
            return True

        monkeypatch.setattr(memory, "populate", record)
        arena.populate(0, POPULATE_BYTES - 1)
        assert asked == []
        arena.populate(0, MIB)
        arena.populate(10, MIB - 10)
        assert asked == [(0, MIB)]
        arena.populate(3 * MIB, MIB)
        arena.populate(0, 8 * MIB)  # the gaps only
        assert asked[1:] == [(3 * MIB, MIB), (MIB, 2 * MIB), (4 * MIB, 4 * MIB)]
        arena.populate(CAPACITY - MIB - 1, MIB + 1)
        assert sum(asked[-1]) == CAPACITY

    def test_populate_gives_up_on_old_kernels(self, arena: Arena, monkeypatch: pytest.MonkeyPatch) -> None:
        asked: list[int] = []
        monkeypatch.setattr(memory, "populate", lambda *_: bool(asked.append(1)))
        arena.populate(0, MIB)
        arena.populate(8 * MIB, MIB)
        assert asked == [1]

    def test_populate_survives_a_lack_of_memory(
        self, arena: Arena, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        def refuse(*_: int) -> bool:
            raise OSError(errno.ENOMEM, "none left")

        monkeypatch.setattr(memory, "populate", refuse)
        arena.populate(0, MIB)
        assert "cannot populate" in caplog.text

    def test_populate_really_maps(self, arena: Arena) -> None:
        arena.view(0, 4 * MIB)[:] = b"x" * (4 * MIB)
        other = Arena.open(arena.path, CAPACITY)
        other.populate(0, 4 * MIB)
        assert bytes(other.view(MIB, 3)) == b"xxx"
        other.close()


class TestWarmer:
    def walk(self, warmer: Warmer, high_water: int) -> list[tuple[int, int]]:
        return list(iter(lambda: warmer.next_stretch(high_water), None))

    def test_a_quiet_node_warms_the_least_and_stops(self) -> None:
        warmer = Warmer(1 << 30)
        stretches = self.walk(warmer, 0)
        assert stretches == [(start * MIB, 4 * MIB) for start in range(0, 64, 4)]
        assert warmer.next_stretch(0) is None

    def test_it_follows_the_high_water_mark(self) -> None:
        warmer = Warmer(1 << 34)
        self.walk(warmer, 0)
        assert warmer.next_stretch(MIB) == (64 * MIB, MIB)
        assert warmer.next_stretch(MIB) is None

    def test_it_skips_what_writers_have_touched(self) -> None:
        warmer = Warmer(1 << 34)
        stretch = warmer.next_stretch(1000 * MIB + 100)
        assert stretch == (1000 * MIB, 4 * MIB)
        self.walk(warmer, 1000 * MIB)
        assert warmer.warmed == 1250 * MIB

    def test_it_is_bounded_by_the_most_and_by_the_capacity(self) -> None:
        warmer = Warmer(1 << 40)
        self.walk(warmer, 1 << 38)
        assert warmer.warmed == (1 << 38) + 512 * MIB
        small = Warmer(10 * MIB + 77)
        assert sum(size for _, size in self.walk(small, 0)) == 10 * MIB + 77
        assert small.next_stretch(10 * MIB + 77) is None


def test_copies_go_through_any_buffer() -> None:
    source = os.urandom(3 * MIB)
    target = bytearray(3 * MIB)
    memory.copy_unlocked(memoryview(target), memoryview(source).toreadonly())
    assert target == source
    with pytest.raises(BufferError), memory.address_of(memoryview(source)[::2]):
        pass
