"""Tiny policies for the sampler's tests, which never change the adapters."""

import pytest
import torch

from tests.grpo.policies import open_policy
from tests.tiny import make_tiny_model


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


@pytest.fixture(scope="session")
def windowed_policy(tmp_path_factory):
    directory = tmp_path_factory.mktemp("windowed") / "model"
    return open_policy(make_tiny_model(directory, "mistral", sliding_window=6))
