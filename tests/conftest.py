"""What all tests share."""

import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread():
    """Many small problems: more threads only wait for each other, and one thread gives the same bits everywhere."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
