"""A tiny policy for the update's tests; those that change its adapters open one of their own."""

import pytest
import torch

from tests.grpo.policies import open_policy


@pytest.fixture(autouse=True, scope="package")
def one_thread():
    """Tiny products gain nothing from a second thread, and lose much where the cores are busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def policy(tiny_model_dir):
    return open_policy(tiny_model_dir)
