import numpy as np

from lightning_basin.history.columns import History
from lightning_basin.history.page import read_page, write_data
from lightning_basin.record import LAYER_QUANTITIES
from tests.runs import write_bare_page


def deep_history(num_measurements):
    values = np.linspace(0.0, 1.0, num_measurements)
    columns = {name: np.arange(num_measurements) % 50.0 for name in LAYER_QUANTITIES} | {"log_det_gram": values}
    return History(
        name="deep",
        steps=np.arange(num_measurements),
        network={"gradient_rank": values},
        layers={f"fc{i}": columns for i in range(100)},
    )


def test_a_page_of_a_long_run_of_many_layers_holds_of_these_what_it_shows(tmp_path):
    history = deep_history(250)
    assert len(write_data(history)) < 2**20
    write_bare_page(tmp_path / "report.html", history)
    again = read_page(tmp_path / "report.html")
    for name in ("gradient_rank", "gradient_nullity", "hessian_nullity_lower", "duplicated_activations", "dead_units"):
        assert np.array_equal(again.column(name, "fc99"), history.column(name, "fc99"))
    assert "log_det_gram" not in again.layers["fc99"]


def test_a_page_of_a_shorter_run_holds_everything(tmp_path):
    write_bare_page(tmp_path / "report.html", deep_history(20))
    assert set(read_page(tmp_path / "report.html").layers["fc0"]) == set(LAYER_QUANTITIES)
