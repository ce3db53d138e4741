import shlex
from dataclasses import replace
from types import SimpleNamespace

from lightning_basin.callback.news import closing_words, news
from lightning_basin.callback.results import Results
from tests.lightning_packages import TensorBoardLogger
from tests.runs import ZERO_LOSS_STEP, records


def said():
    made = records()
    return [list(news(record, made[:index], ZERO_LOSS_STEP)) for index, record in enumerate(made)]


def test_each_event_of_a_run_is_said_when_it_happens():
    start, zero_loss, first_merge, end = said()
    assert start == []
    assert zero_loss == ["The loss has reached zero at step 10, with a gradient rank of 8"]
    assert first_merge == [
        "Layer 'head' has begun to merge inputs at step 20: 1 of 5 have the activation of another one"
    ]
    assert end == [
        "Layer 'fc2' has begun to merge inputs at step 30: 1 of 5 have the activation of another one",
        "The bracket of the Hessian's nullity has closed at step 30: 38 of 40 directions are flat",
    ]


def test_what_stays_is_not_said_again():
    made = records()
    assert list(news(replace(made[3], step=40), made, ZERO_LOSS_STEP)) == []


def test_what_is_so_from_the_start_is_no_news():
    assert list(news(records()[3], [], None)) == []


def test_equal_inputs_are_no_merge_of_the_first_layer():
    made = records()
    layers = {name: replace(layer, duplicated_activations=int(name == "fc1")) for name, layer in made[0].layers.items()}
    assert list(news(replace(made[1], layers=layers), made[:1], None)) == []


def test_the_command_that_shows_the_curves_may_be_pasted_whatever_the_folder_is_called(tmp_path):
    logger = TensorBoardLogger(tmp_path, name="a run; <b>")
    session = SimpleNamespace(results=Results(records()), arguments=SimpleNamespace(prefix="basin"))
    words = closing_words(SimpleNamespace(loggers=[logger]), session, SimpleNamespace(path=None))
    (line,) = [line for line in words.splitlines() if line.startswith("The curves: ")]
    assert shlex.split(line)[-3:] == ["tensorboard", "--logdir", logger.root_dir]
