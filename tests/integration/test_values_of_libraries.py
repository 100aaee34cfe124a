"""DataFrames, Arrow tables and tensors: equal at the other end, and copied no more often than needed."""

from __future__ import annotations

from typing import Any

import pytest

import shoal
from shoal.objects.serialization import deserialize, serialize

pytestmark = pytest.mark.usefixtures("local")


@shoal.remote
def same(value: Any) -> Any:
    return value


def test_data_frames() -> None:
    pandas, numpy = pytest.importorskip("pandas"), pytest.importorskip("numpy")
    rows = 50_000
    frame = pandas.DataFrame(
        {
            "number": numpy.arange(rows),
            "text": [f"row {i}" for i in range(rows)],
            "kind": pandas.Categorical(["u", "v"] * (rows // 2)),
            "time": pandas.date_range("2026", periods=rows, freq="s", tz="UTC"),
            "maybe": pandas.array([None, 1] * (rows // 2), dtype="Int64"),
        },
        index=pandas.RangeIndex(5, 5 + rows, name="at"),
    )
    pandas.testing.assert_frame_equal(shoal.get(same.remote(frame)), frame)
    pandas.testing.assert_frame_equal(shoal.get(shoal.put(frame)), frame)
    assert serialize(frame).buffers


def test_arrow_tables_and_small_slices_of_large_ones() -> None:
    arrow = pytest.importorskip("pyarrow")
    table = arrow.table({"n": range(500_000), "s": [f"row {i}" for i in range(500_000)]})
    assert shoal.get(same.remote(table)).equals(table)
    array = table.column("n").chunk(0)
    parts = [
        table.slice(1000, 5), table.slice(0, 0), table.slice(7, 3).to_batches()[0], table.column("s").slice(9, 4),
        array.slice(20, 6), arrow.array(["a", None, "b"] * 100_000).slice(1, 2),
        arrow.array(["x", "y"] * 100_000).dictionary_encode().slice(5, 3),
    ]  # fmt: skip
    for part in parts:
        packed = serialize(part)
        assert packed.flat_size < 20_000, type(part)
        got = deserialize(packed.flatten())
        assert type(got) is type(part)
        assert got.equals(part)
        got.validate(full=True)


def test_tensors_travel_as_their_memory() -> None:
    torch = pytest.importorskip("torch")
    values = torch.arange(1_000_000, dtype=torch.float32)
    packed = serialize(values)
    assert len(packed.pickled) < 1000
    assert [buffer.nbytes for buffer in packed.buffers] == [4_000_000]
    got = shoal.get(same.remote(values))
    assert torch.equal(got, values)
    got += 1  # its own memory
    assert torch.equal(shoal.get(shoal.put(values)), values)
    for other in (
        values.reshape(1000, 1000).T, values[::2], values.to(torch.bfloat16), torch.tensor(7), torch.empty(0, 3),
        values > 5, torch.complex(values, values), values[10:20],
    ):  # fmt: skip
        back = deserialize(serialize(other).flatten())
        assert back.dtype == other.dtype
        assert back.shape == other.shape
        assert torch.equal(back, other)
    assert serialize(values[10:20]).flat_size < 1000


def test_tensors_that_share_memory_share_it_afterwards() -> None:
    torch = pytest.importorskip("torch")
    values = torch.zeros(100_000)
    first, second = shoal.get(same.remote([values, values.view(100, 1000)]))
    first[5] = 1
    assert second[0, 5] == 1


def test_modules_gradients_and_what_travels_torchs_way() -> None:
    torch = pytest.importorskip("torch")
    model = torch.nn.Sequential(torch.nn.Linear(200, 200), torch.nn.ReLU(), torch.nn.Linear(200, 2))
    back = shoal.get(same.remote(model))
    for mine, theirs in zip(back.parameters(), model.parameters(), strict=True):
        assert torch.equal(mine, theirs)
        assert mine.requires_grad
    back(torch.ones(3, 200)).sum().backward()
    leaf = torch.ones(3, requires_grad=True)
    assert deserialize(serialize(leaf).flatten()).requires_grad
    sparse = torch.eye(50).to_sparse()
    assert torch.equal(deserialize(serialize(sparse).flatten()).to_dense(), sparse.to_dense())
    assert torch.equal(deserialize(serialize((leaf * 2).detach()).flatten()), torch.full((3,), 2.0))


def test_a_tensor_need_not_be_copied_by_who_promises_not_to_write(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    values = torch.arange(100_000)
    flat = serialize(values).flatten()
    monkeypatch.setenv("SHOAL_ENABLE_ZERO_COPY_TORCH_TENSORS", "1")
    one, other = deserialize(flat), deserialize(flat)
    assert torch.equal(one, values)
    assert one.data_ptr() == other.data_ptr()
