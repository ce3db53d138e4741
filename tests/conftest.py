import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread(request):
    """Multiply the tiny matrices of fits by one thread: several would wait for each other."""
    if request.node.get_closest_marker("fits") is None:
        yield
        return
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)
