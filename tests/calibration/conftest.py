"""One table for the whole room, built from a quarter of the runs of the `cpu` preset, and half of the others."""

from __future__ import annotations

from pathlib import Path

import duckdb
import numpy as np
import pandas as pd
import pytest

import lutest
from tests.conftest import RUNS

COLUMNS = ["tier", "top_k", "num_blocks", "prompt_tokens", "output_tokens", "prefill_ms", "decode_ms"]


@pytest.fixture(scope="session")
def parts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, pd.DataFrame]:
    with duckdb.connect() as connection:
        runs = connection.execute("SELECT * FROM read_parquet(?)", [str(RUNS / "cpu-preset.parquet")]).df()
    order = np.random.default_rng(0).permutation(len(runs))
    held, others = runs.iloc[order[::4]], runs.iloc[order[1::2]]
    return lutest.build(runs=held, output=tmp_path_factory.mktemp("preset") / "table.duckdb").output, others


@pytest.fixture(scope="session")
def parent(parts: tuple[Path, pd.DataFrame]) -> Path:
    return parts[0]


@pytest.fixture(scope="session")
def others(parts: tuple[Path, pd.DataFrame]) -> pd.DataFrame:
    """Runs that the table was not built from."""
    return parts[1][COLUMNS].reset_index(drop=True)


@pytest.fixture(scope="session")
def table(parent: Path) -> lutest.LatencyTable:
    return lutest.load(parent)
