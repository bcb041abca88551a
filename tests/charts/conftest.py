"""A table with names that a page must not take for markup."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.charts.strange import build_strange_table


@pytest.fixture(scope="session")
def strange_table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_strange_table(tmp_path_factory.mktemp("strange <b>"))
