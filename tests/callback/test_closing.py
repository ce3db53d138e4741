import shlex
from types import SimpleNamespace

from lightning_basin.callback.closing import closing_words
from lightning_basin.callback.results import Results
from tests.lightning_packages import TensorBoardLogger
from tests.runs import records


def test_the_command_that_shows_the_curves_may_be_pasted_whatever_the_folder_is_called(tmp_path):
    logger = TensorBoardLogger(tmp_path, name="a run; <b>")
    session = SimpleNamespace(results=Results(records()), arguments=SimpleNamespace(prefix="basin"))
    words = closing_words(SimpleNamespace(loggers=[logger]), session, SimpleNamespace(path=None))
    (line,) = [line for line in words.splitlines() if line.startswith("The curves: ")]
    assert shlex.split(line)[-3:] == ["tensorboard", "--logdir", logger.root_dir]
