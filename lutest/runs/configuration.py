"""The build configuration: ``build.yaml`` read, checked, and turned into plain values."""

from __future__ import annotations

import difflib
import math
import os
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from lutest.reader.errors import ConfigError

__all__ = ["DEFAULT_COLUMNS", "DEFAULT_CONFIG", "BuildConfig", "Cleaning", "ColumnRule", "load_config", "parse_config"]

DEFAULT_CONFIG = Path("tables/build.yaml")
TIME_UNITS_MS = {"s": 1e3, "ms": 1.0, "us": 1e-3, "ns": 1e-6}
OUTLIER_METHODS = ("iqr", "none")
MAX_BINS = 1000


@dataclass(frozen=True)
class ColumnRule:
    """Where a canonical column comes from.

    Attributes
    ----------
    alternatives : tuple of tuple of str
        Each alternative is a sum of fields; the first one whose fields are all present in a run is taken.
    constant : str or None
        The value for every run, as text; set for a constant only.
    """

    alternatives: tuple[tuple[str, ...], ...] = ()
    constant: str | None = None


# Canonical names first, then those of the profiler that writes one JSON object per configuration.
DEFAULT_COLUMNS: dict[str, ColumnRule] = {
    name: ColumnRule(alternatives)
    for name, alternatives in {
        "tier": (("tier",),),
        "top_k": (("top_k",),),
        "num_blocks": (("num_active_blocks",), ("num_blocks",)),
        "prompt_tokens": (
            ("prompt_tokens",),
            ("total_sequence_length",),
            ("actual_vision_tokens", "actual_text_tokens"),
        ),
        "output_tokens": (("output_tokens",),),
        "prefill_ms": (("prefill_ms",), ("T_vision_total", "T_LLM_prefill")),
        "decode_ms": (("decode_ms",), ("T_LLM_decode",)),
        "decode_steps_ms": (("decode_steps_ms",), ("T_decode_per_step",)),
        "total_ms": (("total_ms",), ("T_total",)),
        "workload": (("workload",), ("dataset",)),
        "sample_id": (("sample_id",),),
        "accuracy": (("accuracy",),),
        "vision_tokens": (("vision_tokens",), ("actual_vision_tokens",)),
        "text_tokens": (("text_tokens",), ("actual_text_tokens",)),
        "device": (("device",),),
        "model": (("model",),),
    }.items()
}
SUMMABLE = ("prompt_tokens", "output_tokens", "prefill_ms", "decode_ms", "total_ms", "vision_tokens", "text_tokens")


@dataclass(frozen=True)
class Cleaning:
    """How outliers are told: Tukey fences ``k`` interquartile ranges out on the log scale, or ``none``."""

    outliers: str = "iqr"
    k: float = 3.0


@dataclass(frozen=True)
class BuildConfig:
    """A checked build configuration; the attributes are the options of ``build.yaml``."""

    sources: tuple[str, ...] = ()
    output: str = ""
    columns: dict[str, ColumnRule] = field(default_factory=lambda: dict(DEFAULT_COLUMNS))
    time_unit: str = "ms"
    quantiles: tuple[float, ...] = (0.5, 0.95)
    kv_bins: int | tuple[int, ...] = 16
    prompt_bins: int | tuple[int, ...] = 8
    cleaning: Cleaning = field(default_factory=Cleaning)
    base: Path = field(default_factory=Path)

    @property
    def output_path(self) -> Path:
        """Output, relative to the folder of the configuration file."""
        return self.base / self.output

    @property
    def milliseconds(self) -> float:
        """Milliseconds in one unit of the sources' times."""
        return TIME_UNITS_MS[self.time_unit]


def load_config(path: str | os.PathLike[str]) -> BuildConfig:
    """Read a YAML build configuration.

    Parameters
    ----------
    path : path
        The file; sources and output inside are relative to its folder.

    Raises
    ------
    ConfigError
        The file cannot be read, or an option is unknown or not valid.
    """
    path = Path(path)
    where = str(path) if str(path).isprintable() else repr(str(path))
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ConfigError(f"{where}: cannot read the build configuration: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{where}: not UTF-8 at byte {error.start}; save the build configuration as UTF-8") from error
    try:
        content = yaml.load(text, Loader=_StrictLoader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(f"{where}: not valid YAML: {reason}") from error
    if content is None:
        raise ConfigError(f"{where}: is empty; it needs at least `sources` and `output`")
    config = parse_config(content, where=where, base=path.parent)
    for name in ("sources", "output"):
        if not getattr(config, name):
            raise ConfigError(f"{where}: `{name}` is missing")
    return config


def parse_config(content: object, *, where: str = "configuration", base: Path | None = None) -> BuildConfig:
    """Check a configuration given as nested mappings; options left out have their defaults."""
    options = _mapping(content, where, "the configuration")
    names = ("sources", "output", "columns", "time_unit", "quantiles", "kv_bins", "prompt_bins", "cleaning")
    _known(options, names, where, "option")
    default = BuildConfig()
    cleaning = _mapping(options.get("cleaning", {}), where, "`cleaning`")
    _known(cleaning, ("outliers", "k"), where, "option of `cleaning`")
    return BuildConfig(
        sources=_sources(options.get("sources", []), where),
        output=_text(options.get("output", ""), where, "output"),
        columns=_columns(options.get("columns", {}), where),
        time_unit=_choice(options.get("time_unit", default.time_unit), tuple(TIME_UNITS_MS), where, "time_unit"),
        quantiles=_quantiles(options.get("quantiles", list(default.quantiles)), where),
        kv_bins=_bins(options.get("kv_bins", default.kv_bins), where, "kv_bins"),
        prompt_bins=_bins(options.get("prompt_bins", default.prompt_bins), where, "prompt_bins"),
        cleaning=Cleaning(
            outliers=_choice(cleaning.get("outliers", "iqr"), OUTLIER_METHODS, where, "cleaning.outliers"),
            k=_positive(cleaning.get("k", 3.0), where, "cleaning.k"),
        ),
        base=base or Path(),
    )


class _StrictLoader(yaml.SafeLoader):
    """The safe loader, refusing what has no place in a configuration: aliases (billion laughs), tags, repeated keys."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError(f"aliases are not allowed, in line {self.line + 1}")
        tag = getattr(self.current_event, "tag", None)  # None where none is written
        if tag is not None:
            raise yaml.YAMLError(f"tags such as {_named(tag)} are not allowed, in line {self.line + 1}")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        names: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in names:
                    raise yaml.YAMLError(f"`{_named(key.value)}` stands twice, in line {key.start_mark.line + 1}")
                names.add(key.value)
        return super().construct_mapping(node, deep=deep)


def _fail(where: str, message: str) -> ConfigError:
    return ConfigError(f"{where}: {message}")


def _shown(value: object) -> str:
    """A value on one short line."""
    try:
        return f"{' '.join(repr(value).split()):.80}"
    except ValueError:  # Python writes no integers of thousands of digits
        return "a number of thousands of digits"


def _named(name: str) -> str:
    """A name on one short line."""
    return f"{name if name.isprintable() else repr(name):.80}"


def _mapping(value: object, where: str, what: str) -> Mapping[str, object]:
    if not isinstance(value, Mapping):
        raise _fail(where, f"{what} must be a mapping of options to values, not {_shown(value)}")
    for key in value:
        if not isinstance(key, str):
            raise _fail(where, f"{what} has the key {_shown(key)}; keys are names")
    return value


def _known(options: Mapping[str, object], names: Sequence[str], where: str, what: str) -> None:
    for name in options:
        if name not in names:
            nearest = difflib.get_close_matches(name, names, n=1, cutoff=0.0)[0]
            raise _fail(where, f"unknown {what} `{_named(name)}`; did you mean `{nearest}`? Known: {', '.join(names)}")


def _text(value: object, where: str, name: str) -> str:
    if not isinstance(value, str):
        raise _fail(where, f"`{name}` must be text, not {_shown(value)}")
    return value


def _choice(value: object, allowed: Sequence[str], where: str, name: str) -> str:
    if value is None:
        value = "none"  # YAML users write `none`, and some write null
    if not isinstance(value, str) or value not in allowed:
        raise _fail(where, f"`{name}` is {_shown(value)}; it must be one of {', '.join(allowed)}")
    return value


def _number(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def _positive(value: object, where: str, name: str) -> float:
    number = _number(value)
    if number is None or number <= 0:
        raise _fail(where, f"`{name}` is {_shown(value)}; it must be a number above 0")
    return number


def _sources(value: object, where: str) -> tuple[str, ...]:
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, list) or not all(isinstance(item, str) and item for item in values):
        raise _fail(where, f"`sources` must be a path, or a list of paths, folders and globs, not {_shown(value)}")
    return tuple(values)


def _quantiles(value: object, where: str) -> tuple[float, ...]:
    if not isinstance(value, list) or not value:
        raise _fail(where, f"`quantiles` must be a list such as [0.5, 0.95], not {_shown(value)}")
    levels = set()
    for item in value:
        level = _number(item)
        if level is None or not 0 < level < 1:
            raise _fail(where, f"`quantiles` holds {_shown(item)}; each must lie between 0 and 1, such as 0.95")
        levels.add(round(level, 10))
    missing = {0.5, 0.95} - levels
    if missing:
        raise _fail(where, f"`quantiles` must hold 0.5 and 0.95, for the tables rest on them; add {sorted(missing)}")
    return tuple(sorted(levels))


def _bins(value: object, where: str, name: str) -> int | tuple[int, ...]:
    if isinstance(value, list):
        edges = [item for item in value if isinstance(item, int) and not isinstance(item, bool) and 0 <= item < 2**31]
        if len(edges) != len(value) or not edges or edges != sorted(set(edges)):
            raise _fail(where, f"`{name}` must be a number of bins or increasing whole edges, not {_shown(value)}")
        return tuple(edges)
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MAX_BINS:
        raise _fail(
            where, f"`{name}` is {_shown(value)}; it must be a whole number from 1 to {MAX_BINS}, or a list of edges"
        )
    return value


def _columns(value: object, where: str) -> dict[str, ColumnRule]:
    columns = dict(DEFAULT_COLUMNS)
    given = _mapping(value, where, "`columns`")
    _known(given, tuple(DEFAULT_COLUMNS), where, "canonical column")
    for name, rule in given.items():
        columns[name] = _column_rule(name, rule, where)
    return columns


def _column_rule(name: str, rule: object, where: str) -> ColumnRule:
    if isinstance(rule, str) and rule:
        return ColumnRule(((rule,),))
    if isinstance(rule, list) and rule and all(isinstance(item, str) and item for item in rule):
        if len(rule) > 1 and name not in SUMMABLE:
            raise _fail(where, f"`columns.{name}` is a sum of fields; only these can be: {', '.join(SUMMABLE)}")
        return ColumnRule((tuple(rule),))
    if isinstance(rule, Mapping) and set(rule) == {"constant"}:
        constant = rule["constant"]
        if isinstance(constant, str) or (_number(constant) is not None and name != "decode_steps_ms"):
            return ColumnRule(constant=str(constant))
    raise _fail(
        where,
        f"`columns.{name}` must be a field name, a list of fields to add up, or {{constant: value}}, "
        f"not {_shown(rule)}",
    )
