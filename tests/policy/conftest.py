"""Tiny policies."""

import pytest

from tests.grpo.policies import open_policy


@pytest.fixture(scope="session")
def shared_policy(tiny_model_dir):
    """The tiny Llama in float32, with adapters that do something. Tests leave it as it was."""
    return open_policy(tiny_model_dir)


@pytest.fixture
def policy(tiny_model_dir):
    """One of its own for a test that changes it."""
    return open_policy(tiny_model_dir)
