import pytest

from lightning_basin import MergedInput
from lightning_basin.figures.merges import merge_stages, plot_merges
from lightning_basin.history.columns import history_of
from tests.runs import records, without_layers


def test_classes_are_those_of_the_records_stage_by_stage():
    """Input 2 becomes 0 in front of fc2, and 4 becomes both in front of head; 3 and 1 have equal outputs only."""
    stages = merge_stages(records()[3].merged_inputs, ["fc1", "fc2", "head"], 5)
    assert {name: stage.tolist() for name, stage in stages.items()} == {
        "input": [0, 1, 2, 3, 4],
        "fc1": [0, 1, 2, 3, 4],
        "fc2": [0, 1, 0, 3, 4],
        "head": [0, 1, 0, 3, 0],
        "output": [0, 1, 0, 1, 0],
    }


def test_a_class_that_merges_takes_all_of_its_inputs_along():
    merged = [MergedInput(3, 2, "a"), MergedInput(2, 0, "b")]
    assert merge_stages(merged, ["a", "b"], 4)["output"].tolist() == [0, 1, 0, 0]


def ticks(ax):
    return [label.get_text() for label in ax.get_xticklabels()]


def test_tree_names_each_layer_with_the_number_of_distinct_activations():
    assert ticks(plot_merges(records())) == ["input\n5", "fc1\n5", "fc2\n4", "head\n3", "output\n2"]
    assert ticks(plot_merges(records(), step=20)) == ["input\n5", "fc1\n5", "fc2\n5", "head\n4", "output\n4"]
    assert ticks(plot_merges(records(), step=0))[-1] == "output\n5"


def test_labels_stand_beside_their_lines_and_large_classes_are_counted():
    texts = [text.get_text() for text in plot_merges(records(), labels=["odd", "even", "odd", "even", "odd"]).texts]
    assert texts == ["3 are one", "even", "odd"] or set(texts) == {"even", "odd", "3 are one"}


def test_deep_networks_show_the_layers_where_inputs_merge():
    layers = [f"layer{i}" for i in range(40)]
    history = history_of(records())
    history = type(history)(
        name="deep",
        steps=history.steps[:1],
        network={},
        layers={layer: {} for layer in layers},
        merged_inputs=((MergedInput(1, 0, "layer7"), MergedInput(2, 0, "layer30")),),
        num_inputs=4,
    )
    assert ticks(plot_merges(history)) == ["input\n4", "layer7\n3", "layer30\n2", "output\n2"]


def test_what_cannot_be_drawn_is_refused():
    history = history_of(without_layers())
    with pytest.raises(ValueError, match="does not say which inputs merged"):
        plot_merges(type(history)(name="table", steps=history.steps, network=history.network))
    with pytest.raises(ValueError, match="one for each of 5 inputs, got 2"):
        plot_merges(records(), labels=[0, 1])
