"""The shipped runs, and the tables built from them once for all tests."""

from __future__ import annotations

from pathlib import Path

import duckdb
import pandas as pd
import pytest

from lutest.build import build

RUNS = Path(__file__).parent.parent / "tables" / "runs"


@pytest.fixture(scope="session")
def direct_runs() -> Path:
    return RUNS / "direct.parquet"


@pytest.fixture(scope="session")
def subtraction_runs() -> Path:
    return RUNS / "subtraction.parquet"


@pytest.fixture(scope="session")
def direct_frame(direct_runs: Path) -> pd.DataFrame:
    with duckdb.connect() as connection:
        return connection.execute("SELECT * FROM read_parquet(?)", [str(direct_runs)]).df()


@pytest.fixture(scope="session")
def direct_table(tmp_path_factory: pytest.TempPathFactory, direct_runs: Path) -> Path:
    return build(runs=direct_runs, output=tmp_path_factory.mktemp("direct") / "direct.duckdb").output


@pytest.fixture(scope="session")
def subtraction_table(tmp_path_factory: pytest.TempPathFactory, subtraction_runs: Path) -> Path:
    return build(runs=subtraction_runs, output=tmp_path_factory.mktemp("subtraction") / "s.duckdb").output
