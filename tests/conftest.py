import pytest
import torch


@pytest.fixture
def one_thread():
    """Tiny matrices are multiplied faster by one thread than by threads that wait for each other."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)
