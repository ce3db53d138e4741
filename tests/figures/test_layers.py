import numpy as np
import pytest

from lightning_basin.figures.layers import plot_layers
from tests.runs import records, without_layers
from tests.whole_records import basin_record, layer_record


def values(ax):
    return ax.collections[0].get_array()


def test_map_of_lost_rank_has_a_row_for_each_layer_in_percent_of_what_it_could_have():
    ax = plot_layers(records())
    assert [label.get_text() for label in ax.get_yticklabels()] == ["fc1", "fc2", "head"]
    # 8 rows, 12 parameters: 8 directions at most.
    assert np.allclose(values(ax)[0], [37.5, 37.5, 62.5, 100.0])


def test_map_of_duplicates_counts_inputs():
    assert values(plot_layers(records(), quantity="duplicated_activations")).tolist() == [
        [0, 0, 0, 0],
        [0, 0, 0, 1],
        [0, 0, 1, 2],
    ]


def test_of_many_layers_a_part_is_named():
    layers = {f"layer{i}": layer_record(gradient_rank=i % 8) for i in range(300)}
    ax = plot_layers([basin_record(layers, step=i) for i in range(3)])
    assert values(ax).shape == (300, 3)
    assert 30 <= len(ax.get_yticklabels()) <= 40


def test_what_cannot_be_drawn_is_refused():
    with pytest.raises(ValueError, match="no values of layers"):
        plot_layers(without_layers())
    with pytest.raises(ValueError, match="quantity must be among"):
        plot_layers(records(), quantity="rank")
