import pytest

from lightning_basin.layer_names import MAX_LAYER_CURVES, layer_blocks, tag
from tests.whole_records import NAMINGS


@pytest.mark.parametrize("size", [0, 1, 32])
@pytest.mark.parametrize("naming", ["flat", "sequential", "transformer"])
def test_few_layers_are_not_grouped(naming, size):
    assert layer_blocks(NAMINGS[naming](size)) == {}


@pytest.mark.parametrize("size", [33, 34, 63, 64, 65, 66, 96, 97, 128, 199, 200])
@pytest.mark.parametrize("naming", NAMINGS)
def test_blocks_hold_every_layer_once_and_in_order(naming, size):
    names = NAMINGS[naming](size)
    blocks = layer_blocks(names)
    assert 1 <= len(blocks) <= MAX_LAYER_CURVES
    assert [name for members in blocks.values() for name in members] == names


@pytest.mark.parametrize("size", [33, 64, 200])
@pytest.mark.parametrize("naming", NAMINGS)
def test_tags_of_blocks_are_names(naming, size):
    tags = [tag(block) for block in layer_blocks(NAMINGS[naming](size))]
    assert len(set(tags)) == len(tags)
    assert not [name for name in tags if name.startswith(("-", ".")) or name.endswith(("-", "."))]


def test_layers_that_share_a_number_are_one_block():
    blocks = layer_blocks(NAMINGS["transformer"](40))
    assert blocks["layers.3"] == ["layers.3.norm", "layers.3.linear"]


def test_neighbours_are_joined_where_numbers_leave_too_many():
    assert list(layer_blocks(NAMINGS["sequential"](64)))[:2] == ["0-1", "2-3"]


def test_ranges_of_one_stem_name_the_last_number_only():
    blocks = layer_blocks([f"layers.{i}.fc" for i in range(64)])
    assert next(iter(blocks)) == "layers.0-1"


def test_a_range_that_starts_at_the_root_says_so():
    assert next(iter(layer_blocks(NAMINGS["root and names without numbers"](64)))) == "root-encoder.layer_0.fc"
