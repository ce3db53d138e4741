"""States of a monitor in checkpoints that are damaged, or written by another version."""

import copy

import pytest
import torch

from lightning_basin import BasinMonitor
from lightning_basin.checkpointed import MonitorState
from lightning_basin.monitor import _COMPARED_ON_RESUME
from tests.lightning_packages import ModelCheckpoint
from tests.training import Regressor, make_trainer, repeated_loader, steps

pytestmark = pytest.mark.usefixtures("one_thread")

DAMAGES = {
    "a field of a newer version": lambda state: state["records"][0].update(new_field=1),
    "a field that is missing": lambda state: state["records"][0].pop("gradient_rank"),
    "a layer of a newer version": lambda state: state["records"][0]["layers"]["hidden"].update(new_field=1),
    "a number that is none": lambda state: state["records"][-1].update(gradient_rank="six"),
    "a record that is none": lambda state: state["records"].append(None),
    "records that are none": lambda state: state.update(records=3),
    "a setting of a newer version": lambda state: state["settings"].update(new_setting=1),
    "no settings": lambda state: state.pop("settings"),
    "settings that are none": lambda state: state.update(settings=[1]),
    "no records": lambda state: state.pop("records"),
    "a key of a newer version": lambda state: state.update(new_key=1),
    "a step that is none": lambda state: state.update(measured_step="last"),
    "steps that are none": lambda state: state.update(skipped_steps=["a"]),
    "another probe": lambda state: state["probe"].update(inputs=torch.zeros(3, 3)),
    "a probe of another form": lambda state: state.update(probe={"images": torch.zeros(3)}),
    "a probe without inputs": lambda state: state["probe"].update(inputs=None),
    "a fingerprint that is none": lambda state: state.update(probe=None, probe_fingerprint=7),
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    saving = ModelCheckpoint(dirpath=folder, filename="saved")
    trainer = make_trainer(folder, BasinMonitor(20), saving, enable_checkpointing=True)
    trainer.fit(Regressor(), repeated_loader())
    return torch.load(folder / "saved.ckpt", weights_only=True)


def resumed(root, checkpoint):
    torch.save(checkpoint, root / "changed.ckpt")
    monitor = BasinMonitor(20)
    trainer = make_trainer(root, monitor, max_epochs=4)
    trainer.fit(Regressor(), repeated_loader(), ckpt_path=str(root / "changed.ckpt"))
    return monitor


def test_an_undamaged_state_is_gone_on_with(tmp_path, checkpoint):
    assert steps(resumed(tmp_path, checkpoint)) == [0, 4, 8, 12, 16]


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_run_with_a_damaged_state_is_resumed_with_one_warning_and_begins_anew(tmp_path, checkpoint, damage):
    changed = copy.deepcopy(checkpoint)
    damage(changed["callbacks"][BasinMonitor(20).state_key])
    with pytest.warns(UserWarning, match="begins anew: its state in the checkpoint is damaged or of another") as said:
        monitor = resumed(tmp_path, changed)
    assert len([warning for warning in said if "BasinMonitor" in str(warning.message)]) == 1
    assert steps(monitor) == [8, 12, 16]


@pytest.mark.parametrize("state", [None, 3, [], "state", {}, {1: 2}])
def test_what_is_no_state_at_all_is_refused_in_one_sentence(state):
    with pytest.raises(ValueError, match="Error: "):
        MonitorState.read(state, _COMPARED_ON_RESUME)
