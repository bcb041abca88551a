"""What a build must be told, and must not, about files of load generators."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import duckdb

from lutest.reader.errors import ConfigError
from lutest.reader.names import quote
from lutest.runs.configuration import ColumnRule
from lutest.runs.sources.run_rows import field_column
from lutest.runs.sources.served import MEASURED, ServedSource

__all__ = ["check_served_columns"]

_EXAMPLES = {"tier": "low", "top_k": "8", "num_blocks": "16"}


def check_served_columns(
    connection: duckdb.DuckDBPyConnection,
    served: Iterable[ServedSource],
    columns: Mapping[str, ColumnRule],
    time_unit: str,
) -> None:
    """Check that the configuration fits the files of load generators among the sources.

    Such files carry their own units and are read into canonical fields, so the configuration has no say in either; and
    they know nothing of the configuration of the model, which it has to give.

    Parameters
    ----------
    connection : duckdb connection
        Holds ``raw_runs``.
    served : iterable of ServedSource
        The files.
    columns : mapping
        Canonical column → where it comes from.
    time_unit : str
        Unit of the sources' times.

    Raises
    ------
    ConfigError
        Times would be converted twice, a measured column is read from another field, or the key is missing.
    """
    for source in served:
        whose = f"{source.path}: a file of {source.tool}"
        if time_unit != "ms":
            raise ConfigError(
                f"{whose} has a unit of its own: give `time_unit: ms`; sources in {time_unit} need a `lutest convert` "
                "with a configuration of theirs first"
            )
        for name in MEASURED:
            rule = columns[name]
            if rule.constant is None and (name,) not in rule.alternatives:
                fields = " + ".join(rule.alternatives[0])
                raise ConfigError(
                    f"{whose} has no field {fields}: leave `columns.{name}` out; sources that need it need a "
                    "`lutest convert` with a configuration of theirs first"
                )
        missing = [name for name in _EXAMPLES if not _has(connection, source.source_id, columns[name])]
        if missing:
            constants = ", ".join(f"{name}: {{constant: {_EXAMPLES[name]}}}" for name in missing)
            raise ConfigError(
                f"{whose} does not say its {', '.join(missing)}: give constants in the configuration, such as "
                f"`columns: {{{constants}}}`; files of several configurations need one `lutest convert` each first"
            )


def _has(connection: duckdb.DuckDBPyConnection, source_id: int, rule: ColumnRule) -> bool:
    """Whether a column has a value in any run of a source; true where no run could be read at all."""
    if rule.constant is not None:
        return True
    present = " OR ".join(
        " AND ".join(f"{quote(field_column(field))} IS NOT NULL" for field in fields) for fields in rule.alternatives
    )
    found = connection.execute(
        f"SELECT count(*), count_if({present}) FROM raw_runs WHERE source_id = ? AND problem IS NULL", [source_id]
    ).fetchone()
    assert found is not None
    n_runs, n_present = found
    return bool(n_runs == 0 or n_present > 0)
