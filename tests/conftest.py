"""Fixtures that all tests share. Hubs are never asked."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from filelock import FileLock

from tests.tiny import make_tiny_model


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Tiny products gain nothing from a second thread, and lose much where the cores are busy."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory):
    """A random two-layer Llama with a character tokenizer."""
    return make_tiny_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="session")
def demo_model():
    """The demo model's name, fetched into the cache if it is not there."""
    from lowmem_grpo.policy.source import DEMO, cache_directory, fetch

    cache_directory().mkdir(parents=True, exist_ok=True)
    with FileLock(cache_directory() / "tests.lock"):  # tests run in two processes
        fetch(DEMO)
    return DEMO
