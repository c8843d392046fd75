import sys

import pytest
import torch
from tiny_models import forget_accelerate


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """For models of a few thousand parameters: more only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def no_state_of_accelerate():
    if "accelerate" in sys.modules:
        forget_accelerate()
