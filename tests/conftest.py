import pytest


def pytest_addoption(parser):
    parser.addoption("--first-cases", action="store_true", help="run each test in the first of its cases only")


@pytest.hookimpl(trylast=True)  # When the marks have been looked at.
def pytest_collection_modifyitems(config, items):
    if config.getoption("first_cases"):
        first = {item.nodeid.partition("[")[0]: item for item in reversed(items)}
        config.hook.pytest_deselected(
            items=[item for item in items if first[item.nodeid.partition("[")[0]] is not item]
        )
        items[:] = list(reversed(first.values()))


@pytest.fixture(autouse=True)
def seeded():
    """Draw the same numbers in a test whichever tests ran before it in its process."""
    import torch  # Here: the process that hands out the tests needs none.

    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def one_thread(request):
    """Multiply the tiny matrices of fits by one thread: several would wait for each other."""
    if request.node.get_closest_marker("fits") is None:
        yield
        return
    import torch

    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture(autouse=True)
def no_figures(request, monkeypatch):
    """Leave out report and figures, which take a second each, where a test does not look at them."""
    if request.node.get_closest_marker("fits") is None or request.node.get_closest_marker("figures") is not None:
        return
    from lightning_basin import BasinMonitor

    for argument in ("report", "figures"):
        monkeypatch.setitem(BasinMonitor.__init__.__kwdefaults__, name=argument, value=False)
