"""The longest test files run first, so that two processes share the rest; caches are this run's own."""

import os
import tempfile
from collections.abc import Iterator

import pytest

LONGEST = ("test_demo_claim.py", "test_end_to_end.py")


def pytest_make_parametrize_id(val: object, argname: str) -> str | None:
    """Name data after its parameter (pytest numbers them): an id says which case it is, and is the same in every process."""
    if isinstance(val, bytes) or (isinstance(val, str) and not val.isprintable()):
        return argname
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name not in LONGEST)  # stable: all else keeps its order


@pytest.fixture(scope="session", autouse=True)
def _own_cache() -> Iterator[None]:
    """Indexes of sets go to a folder of this run, not to the user's."""
    if "MAE_BENCH_CACHE" in os.environ:
        yield
        return
    with tempfile.TemporaryDirectory() as folder:
        os.environ["MAE_BENCH_CACHE"] = folder
        yield
        del os.environ["MAE_BENCH_CACHE"]
