"""Tiny policies, and one thread for them."""

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
def shared_policy(tiny_model_dir):
    """The tiny Llama in float32, with adapters that do something. Tests leave it as it was."""
    return open_policy(tiny_model_dir)


@pytest.fixture
def policy(tiny_model_dir):
    """One of its own for a test that changes it."""
    return open_policy(tiny_model_dir)
