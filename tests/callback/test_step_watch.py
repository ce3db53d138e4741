import torch
from torch import nn

from lightning_basin.callback.step_watch import StepWatch


def sizes_of_global_tables():
    tables = vars(torch.nn.modules.module).items()
    return {name: len(table) for name, table in tables if name.startswith("_global_") and isinstance(table, dict)}


def test_watching_modules_leaves_nothing_in_the_tables_of_torch():
    module, before = nn.Sequential(nn.Linear(2, 2), nn.MSELoss()), sizes_of_global_tables()
    with StepWatch() as watch, watch.modules(module):
        module[0](torch.ones(3, 2))
        assert sizes_of_global_tables() != before
    assert sizes_of_global_tables() == before
