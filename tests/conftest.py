"""The longest test files run first, ids contain no data, and caches belong to the run."""

import os
import tempfile
from collections.abc import Iterator

import pytest

# From the longest on; .ci/pytest hands a file to a worker as one piece, in this order.
LONGEST = (
    "test_code_blocks.py",
    "test_demo_claim.py",
    "test_end_to_end.py",
    "test_runner.py",
    "test_together.py",
    "test_ranks.py",
    "test_maskrcnn.py",
    "test_upernet.py",
    "test_resumed.py",
    "test_processes.py",
    "test_launcher.py",
    "test_cli.py",
    "test_torchrun.py",
)


def pytest_make_parametrize_id(val: object, argname: str) -> str | None:
    """Name data after its parameter (pytest numbers them), so that an id is the same in every process."""
    if isinstance(val, bytes) or (isinstance(val, str) and not val.isprintable()):
        return argname
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.name, len(LONGEST)))  # stable, for all others


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
