"""A tiny policy for the update's tests; those that change its adapters open one of their own."""

import pytest

from tests.grpo.policies import open_policy


@pytest.fixture(scope="session")
def policy(tiny_model_dir):
    return open_policy(tiny_model_dir)
