"""build.yaml: what is accepted, and what an error says."""

from __future__ import annotations

from pathlib import Path

import pytest

from lutest.reader.errors import ConfigError
from lutest.runs.configuration import BuildConfig, load_config, parse_config, resolve_config, with_options


def test_all_options(tmp_path: Path) -> None:
    path = tmp_path / "build.yaml"
    path.write_text(
        """
sources: [runs/*.parquet, more]
output: out.duckdb
columns:
  prefill_ms: [vision, llm]
  decode_ms: generation
  gpu: {constant: H100}
  n_gpus: tensor_parallel
key: [gpu, {n_gpus: category}, users]
time_unit: s
quantiles: [0.5, 0.95, 0.99]
cleaning: {outliers: none, k: 2.5}
"""
    )
    config = load_config(path)
    assert config.output_path == tmp_path / "out.duckdb"
    assert config.columns["prefill_ms"].alternatives == (("vision", "llm"),)
    assert config.key == (("gpu", None), ("n_gpus", "category"), ("users", None))
    assert config.columns["gpu"].constant == "H100"
    assert config.columns["n_gpus"].alternatives == (("tensor_parallel",),)
    assert config.columns["users"].alternatives == (("users",),)
    assert "top_k" not in config.columns
    assert config.columns["total_ms"].alternatives[-1] == ("T_total",)
    assert config.milliseconds == 1000.0
    assert config.quantiles == (0.5, 0.95, 0.99)
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
        ({"key": []}, ["`key`", "1 to 8"]),
        ({"key": list("abcdefghi")}, ["`key`", "1 to 8"]),
        ({"key": ["gpu", "GPU"]}, ["GPU", "twice"]),
        ({"key": ["gpu", 3]}, ["`key`", "3", "names of columns"]),
        ({"key": {"gpu": "level"}}, ["key.gpu", "level", "category, number"]),
        ({"key": "Workload"}, ["Workload", "my_Workload"]),
        ({"key": "key_id"}, ["key_id"]),
        ({"key": "timed"}, ["timed"]),
        ({"key": ["Model"]}, ["`Model`", "columns: {model: Model}"]),
        ({"key": ["gpu"], "columns": {"tier": "size"}}, ["`tier`", "gpu"]),
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
        ("sources: [a", "not valid YAML"),
        ("sources: a\noutput: b\noutput: c", "stands twice"),
        ("time_unit: 'm\u202es'", "m.u202es"),
        ("a: \x07", "not valid YAML"),
        ("a: &a [x, *a]", "unknown option"),
        ("sources: !!python/object/apply:os.system ['true']", "not valid YAML"),
        ("[" * 700, "not valid YAML"),
    ],
)
def test_bad_yaml_is_one_line_with_the_file(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "build.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=words) as error:
        load_config(path)
    assert str(path) in str(error.value)
    assert str(error.value).isprintable()


def test_missing_and_binary_configuration(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read"):
        load_config(tmp_path / "none.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="UTF-8"):
        load_config(tmp_path / "binary.yaml")


def test_options_may_be_left_out_where_arguments_give_them(tmp_path: Path) -> None:
    path = tmp_path / "build.yaml"
    path.write_text("# nothing but comments\n")
    assert load_config(path) == BuildConfig(base=tmp_path)


def test_a_folder_is_no_configuration(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"is a folder.* without --config"):
        load_config(tmp_path)


def test_single_options_win_over_the_file(tmp_path: Path) -> None:
    path = tmp_path / "build.yaml"
    path.write_text("output: a.duckdb\ncolumns: {tier: size, prefill_ms: ttft}\ncleaning: {outliers: none, k: 2}\n")
    config = with_options(path, ["columns.tier.constant=low", "cleaning.k=2.5", "quantiles=[0.5, 0.95, 0.99]"])
    assert config.columns["tier"].constant == "low"
    assert config.columns["prefill_ms"].alternatives == (("ttft",),)
    assert (config.cleaning.outliers, config.cleaning.k) == ("none", 2.5)
    assert config.quantiles == (0.5, 0.95, 0.99)
    assert config.output_path == tmp_path / "a.duckdb"
    assert with_options(None, ["key=[gpu, {n_gpus: category}]"]).key == (("gpu", None), ("n_gpus", "category"))


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("columns.tier", "NAME=VALUE"),
        ("=low", "NAME=VALUE"),
        ("columns..constant=low", "NAME=VALUE"),
        ("quantile=[0.5]", "did you mean `quantiles`"),
        ("key=[a", "the option key: not valid YAML"),
        ("columns.tier.konstant=low", r"columns\.tier"),
    ],
)
def test_an_option_that_cannot_be_set_is_named_on_one_line(option: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as error:
        with_options({"key": "tier"}, [option])
    assert "\n" not in str(error.value)


def test_whatever_a_caller_gives_is_resolved(tmp_path: Path) -> None:
    path = tmp_path / "build.yaml"
    path.write_text("time_unit: s\n")
    default = BuildConfig(time_unit="us")
    assert resolve_config(None) == BuildConfig()
    assert resolve_config(None, default) is default
    assert resolve_config(default) is default
    assert resolve_config(path, default).time_unit == "s"
    assert resolve_config({"time_unit": "ns"}, default).time_unit == "ns"
