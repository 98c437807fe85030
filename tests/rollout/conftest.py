"""Tiny policies for the sampler's tests, which never change the adapters."""

import pytest

from tests.grpo.policies import open_policy
from tests.tiny import make_tiny_model


@pytest.fixture(scope="session")
def policy(tiny_model_dir):
    return open_policy(tiny_model_dir)


@pytest.fixture(scope="session")
def windowed_policy(tmp_path_factory):
    directory = tmp_path_factory.mktemp("windowed") / "model"
    return open_policy(make_tiny_model(directory, "mistral", sliding_window=6))
