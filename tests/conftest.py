"""What holds for all tests of a process: one thread for what is small, one trace of the small model, no collecting of what stays.

Threads that wait for each other's parts of small work spin, and take from the processes of other tests what they need.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # of torch, which is imported later
os.environ.setdefault("TVM_THREAD_POOL_SPIN_COUNT", "0")


def pytest_collection_finish() -> None:
    """What modules hold is there to stay: do not look through it again at every collection."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def _traced_once() -> Iterator[None]:
    """The small model is loaded once, whoever asks for it; tests of loading itself do not ask here."""
    from tests import tiny

    with tiny.traced_once():
        yield
