"""build.yaml: what is accepted, and what an error says."""

from __future__ import annotations

from pathlib import Path

import pytest

from lutest.reader.errors import ConfigError
from lutest.runs.configuration import load_config, parse_config


def test_all_options(tmp_path: Path) -> None:
    path = tmp_path / "build.yaml"
    path.write_text(
        """
sources: [runs/*.parquet, more]
output: out.duckdb
columns:
  prefill_ms: [vision, llm]
  decode_ms: generation
  tier: {constant: low}
  top_k: {constant: 8}
time_unit: s
quantiles: [0.5, 0.95, 0.99]
kv_bins: [0, 100, 200]
prompt_bins: 4
cleaning: {outliers: none, k: 2.5}
"""
    )
    config = load_config(path)
    assert config.output_path == tmp_path / "out.duckdb"
    assert config.columns["prefill_ms"].alternatives == (("vision", "llm"),)
    assert config.columns["top_k"].constant == "8"
    assert config.columns["total_ms"].alternatives[-1] == ("T_total",)
    assert config.milliseconds == 1000.0
    assert config.quantiles == (0.5, 0.95, 0.99)
    assert (config.kv_bins, config.prompt_bins) == ((0, 100, 200), 4)
    assert (config.cleaning.outliers, config.cleaning.k) == ("none", 2.5)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"quantile": [0.5]}, ["`quantile`", "`quantiles`"]),
        ({"cleaning": {"outlier": "iqr"}}, ["`outlier`", "`outliers`"]),
        ({"columns": {"prefil_ms": "x"}}, ["`prefil_ms`", "`prefill_ms`"]),
        ({"columns": {"prefill_ms": 3}}, ["columns.prefill_ms", "constant"]),
        ({"columns": {"tier": ["a", "b"]}}, ["columns.tier", "sum"]),
        ({"quantiles": [0.5, 0.95, 1.0]}, ["1.0", "between 0 and 1"]),
        ({"quantiles": [0.5, 0.99]}, ["0.95"]),
        ({"time_unit": "minutes"}, ["minutes", "ms"]),
        ({"kv_bins": 0}, ["kv_bins", "0"]),
        ({"prompt_bins": [5, 5]}, ["prompt_bins", "increasing"]),
        ({"cleaning": {"k": -1}}, ["cleaning.k", "-1"]),
        ({"cleaning": {"k": float("nan")}}, ["cleaning.k", "nan"]),
        ({"sources": 5}, ["sources"]),
        ([1, 2], ["mapping"]),
        ({1: 2}, ["1", "names"]),
    ],
)
def test_error_names_option_value_and_way_out(content: object, words: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        parse_config(content, where="some.yaml")
    message = str(error.value)
    assert message.startswith("some.yaml: ")
    assert "\n" not in message
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "empty"),
        ("sources: [a", "not valid YAML"),
        ("output: x.duckdb", "`sources` is missing"),
        ("sources: a", "`output` is missing"),
        ("sources: a\noutput: b\noutput: c", "stands twice"),
        ("a: &a [x]\nb: *a", "aliases"),
        ("sources: !!python/object/apply:os.system ['true']", "not valid YAML"),
        ("[" * 5000, "not valid YAML"),
    ],
)
def test_bad_yaml_is_one_line_with_the_file(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "build.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=words) as error:
        load_config(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_and_binary_configuration(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read"):
        load_config(tmp_path / "none.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="UTF-8"):
        load_config(tmp_path / "binary.yaml")
