"""The small checkout of the tests serves the benchmarks as well."""

import importlib.util
from pathlib import Path

import pytest

_path = Path(__file__).resolve().parents[1] / "tests" / "conftest.py"
_spec = importlib.util.spec_from_file_location("compendium_test_fixtures", _path)
_module = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_module)
small_checkout, checkout = _module.small_checkout, _module.checkout


@pytest.fixture
def warm_parent() -> dict[str, str]:
    """No shared parent: a batch that is measured starts its own."""
    return {}
