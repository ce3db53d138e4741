import pytest
import torch

from lightning_basin.operations.uses import Elements

TABLE = torch.arange(24).view(4, 6)  # Each element is its own position.


def elements_of(view, shape=None):
    sizes = tuple(view.shape)
    return Elements(sizes if shape is None else shape, sizes, view.stride(), view.storage_offset())


VIEWS = {
    "all": TABLE,
    "transposed": TABLE.mT,
    "rows": TABLE[1:3],
    "columns": TABLE[:, 2:5],
    "every other": TABLE[::2, 1::2],
    "repeated": TABLE[0].expand(3, -1),
    "three axes": TABLE.view(2, 2, 6).movedim(0, -1),
    "one": TABLE[2, 3],
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_positions_are_those_of_the_view(view):
    assert torch.equal(elements_of(view).positions(TABLE), view)


def test_positions_in_a_source_that_is_stored_in_another_order_are_logical_ones():
    stored = torch.zeros(6, 4).mT  # Logical position 6 i + j, stored at i + 4 j.
    assert torch.equal(elements_of(stored).positions(stored), TABLE)
    assert torch.equal(elements_of(stored[1:3]).positions(stored), TABLE[1:3])


@pytest.mark.parametrize("source", [TABLE, TABLE.mT.contiguous().mT], ids=["in order", "in another order"])
def test_rows_of_a_table_are_the_columns_of_a_matrix(source):
    sizes, rows = tuple(source.shape), torch.tensor([3, 0])
    elements = Elements((6, 2), sizes, source.stride(), 0, rows)
    assert torch.equal(elements.positions(source), TABLE[rows].mT)
    of_vector = Elements((1, 2), (24,), (1,), 0, rows)
    assert torch.equal(of_vector.positions(TABLE.flatten()), rows.view(1, 2))


@pytest.mark.parametrize("name", VIEWS)
def test_a_span_is_the_range_of_positions_that_occur_once_each(name):
    positions = VIEWS[name].flatten().sort().values
    is_range = torch.equal(positions, torch.arange(len(positions)) + positions[0])
    expected = range(int(positions[0]), int(positions[-1]) + 1) if is_range else None
    assert elements_of(VIEWS[name]).span == expected


def test_elements_are_the_same_where_their_positions_are():
    for left in VIEWS.values():
        for right in VIEWS.values():
            expected = left.shape == right.shape and torch.equal(left, right)
            assert elements_of(left).is_same(elements_of(right)) == expected
    assert elements_of(TABLE.view(4, 2, 3), (4, 6)).is_same(elements_of(TABLE))
    rows = Elements((6, 2), (4, 6), (6, 1), 0, torch.tensor([0, 3]))
    assert rows.is_same(Elements((6, 2), (4, 6), (6, 1), 0, torch.tensor([0, 3])))
    assert not rows.is_same(Elements((6, 2), (4, 6), (6, 1), 0, torch.tensor([0, 2])))
    assert not rows.is_same(Elements((6, 2), (6, 2), (2, 1), 0))


def test_parts_and_moved_axes_are_those_of_tensors():
    weight = torch.arange(48).view(4, 3, 2, 2)
    for index in range(2):
        part = elements_of(weight).part(index, 2)
        assert torch.equal(part.positions(weight), weight.chunk(2)[index])
        moved = part.moved(0, 3)
        assert torch.equal(moved.positions(weight), weight.chunk(2)[index].movedim(0, 3))
        assert torch.equal(moved.seen_as(12, 2).positions(weight), weight.chunk(2)[index].flatten(1).mT)
