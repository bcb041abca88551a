"""The build configuration: ``build.yaml`` read, checked, and turned into plain values."""

from __future__ import annotations

import difflib
import json
import math
import os
import reprlib
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import yaml

from lutest.reader.errors import ConfigError
from lutest.reader.names import KEY_COLUMNS
from lutest.tablefile.schema import refuse_key_names

DEFAULT_CONFIG = Path("tables/build.yaml")
TIME_UNITS_MS = {"s": 1e3, "ms": 1.0, "us": 1e-3, "ns": 1e-6}
OUTLIER_METHODS = ("iqr", "none")
KINDS = ("category", "number")

KeyNames: TypeAlias = tuple[tuple[str, str | None], ...]  # each column and its kind; None: told by the data

DEFAULT_KEY: KeyNames = (("tier", "category"), ("top_k", "number"), ("num_blocks", "number"))
COUNTED = ("top_k", "num_blocks")  # key columns that count something: whole, and at least 1


@dataclass(frozen=True)
class ColumnRule:
    """Where a column of the runs comes from.

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
_COLUMNS: dict[str, ColumnRule] = {
    name: ColumnRule(alternatives)
    for name, alternatives in {
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
        "started_ms": (("started_ms",), ("started_at",), ("start_timestamp",)),
        "accuracy": (("accuracy",),),
        "vision_tokens": (("vision_tokens",), ("actual_vision_tokens",)),
        "text_tokens": (("text_tokens",), ("actual_text_tokens",)),
        "device": (("device",),),
        "model": (("model",),),
    }.items()
}
_KEY_COLUMNS = {"num_blocks": ColumnRule((("num_active_blocks",), ("num_blocks",)))}  # others: the field of their name
_SUMMABLE = ("prompt_tokens", "output_tokens", "prefill_ms", "decode_ms", "total_ms", "vision_tokens", "text_tokens")
# columns of the runs as they are read, beside those of a table's file
_OWN_NAMES = (
    *("decode_steps_ms", "started_ms", "key_id", "timed", "clamped"),
    *("one_pass", "total_given", "step_positions", "run_hash"),
)


# the first of them on purpose, the others where a tag does not fit its value
_BAD_YAML = (yaml.YAMLError, ValueError, RecursionError, LookupError, TypeError, AttributeError)
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 80


def _default_columns(key: KeyNames) -> dict[str, ColumnRule]:
    return {**{name: _KEY_COLUMNS.get(name, ColumnRule(((name,),))) for name, _ in key}, **_COLUMNS}


@dataclass(frozen=True)
class Cleaning:
    """How outliers are told: Tukey fences ``k`` interquartile ranges out on the log scale, or ``none``."""

    outliers: str = "iqr"
    k: float = 3.0


@dataclass(frozen=True)
class BuildConfig:
    """A checked build configuration; the attributes are the options of ``build.yaml``.

    `columns` has a rule for each canonical column and for each column of `key`.
    """

    sources: tuple[str, ...] = ()
    output: str = ""
    key: KeyNames = DEFAULT_KEY
    columns: dict[str, ColumnRule] = field(default_factory=lambda: _default_columns(DEFAULT_KEY))
    time_unit: str = "ms"
    quantiles: tuple[float, ...] = (0.5, 0.95)
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


Config: TypeAlias = str | os.PathLike[str] | Mapping[str, object] | BuildConfig


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
    return with_options(path, ())


def resolve_config(config: Config | None, default: BuildConfig | None = None) -> BuildConfig:
    """Read what a caller gives: a file, nested mappings, a configuration, or none for the default."""
    if config is None:
        return default or BuildConfig()
    if isinstance(config, BuildConfig):
        return config
    return parse_config(config) if isinstance(config, Mapping) else load_config(config)


def with_options(config: str | os.PathLike[str] | Mapping[str, object] | None, options: Sequence[str]) -> BuildConfig:
    """Configuration with single options set anew.

    Parameters
    ----------
    config : path, mapping or None
        Where the other options come from.
    options : sequence of str
        Such as ``columns.tier.constant=low``: the names down to the option, and its value in YAML.

    Raises
    ------
    ConfigError
        The file cannot be read, or an option is unknown or not valid.
    """
    content: Any = config or {}
    where, base = "configuration", Path()
    if config is not None and not isinstance(config, Mapping):
        content, where, base = _read(Path(config)), str(config), Path(config).parent
    for option in options:
        path, is_set, text = option.partition("=")
        *parents, name = path.split(".")
        if not is_set or not all((*parents, name)):
            raise _fail("options", f"cannot set {_shown(option)}: write NAME=VALUE, such as columns.tier.constant=low")
        content = inner = dict(content) if isinstance(content, Mapping) else {}
        for parent in parents:
            held = inner.get(parent)
            inner[parent] = dict(held) if isinstance(held, Mapping) else {}
            inner = inner[parent]
        inner[name] = _parse_yaml(text, f"the option {_named(path)}")
    return parse_config(content, where=where, base=base)


def config_of_meta(meta: Mapping[str, str]) -> BuildConfig:
    """Configuration by which a table reads runs: the key, columns and time unit that it was built with itself."""
    built = json.loads(meta.get("build_config", "{}"))
    kinds = {column["name"]: column["kind"] for column in json.loads(meta[KEY_COLUMNS])}
    key = tuple(kinds.items())
    return BuildConfig(key=key, columns=_stored_columns(built, key), time_unit=built.get("time_unit", "ms"))


def config_of_build(meta: Mapping[str, str]) -> BuildConfig:
    """The configuration that a table was built with, but for its sources and output."""
    built = json.loads(meta["build_config"])
    key = tuple((name, kind) for name, kind in built["key"])
    return BuildConfig(
        key=key,
        columns=_stored_columns(built, key),
        time_unit=built["time_unit"],
        quantiles=tuple(built["quantiles"]),
        cleaning=Cleaning(**built["cleaning"]),
    )


def _stored_columns(built: Mapping[str, Any], key: KeyNames) -> dict[str, ColumnRule]:
    columns = _default_columns(key)
    for name, rule in built.get("columns", {}).items():
        if name in columns:
            columns[name] = ColumnRule(tuple(map(tuple, rule["alternatives"])), rule["constant"])
    return columns


def parse_config(content: object, *, where: str = "configuration", base: Path | None = None) -> BuildConfig:
    """Check a configuration given as nested mappings; options left out have their defaults."""
    options = _mapping(content, where, "the configuration")
    _known(options, ("sources", "output", "key", "columns", "time_unit", "quantiles", "cleaning"), where, "option")
    default = BuildConfig()
    cleaning = _mapping(options.get("cleaning", {}), where, "`cleaning`")
    _known(cleaning, ("outliers", "k"), where, "option of `cleaning`")
    key = _key(options["key"], where) if "key" in options else default.key
    return BuildConfig(
        sources=_sources(options.get("sources", []), where),
        output=_text(options.get("output", ""), where, "output"),
        key=key,
        columns=_columns(options.get("columns", {}), key, where),
        time_unit=_choice(options.get("time_unit", default.time_unit), tuple(TIME_UNITS_MS), where, "time_unit"),
        quantiles=_quantiles(options.get("quantiles", list(default.quantiles)), where),
        cleaning=Cleaning(
            outliers=_choice(cleaning.get("outliers", "iqr"), OUTLIER_METHODS, where, "cleaning.outliers"),
            k=_positive(cleaning.get("k", 3.0), where, "cleaning.k"),
        ),
        base=base or Path(),
    )


class _Loader(yaml.SafeLoader):
    """The safe loader, refusing keys that stand twice: one of the two would be lost without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for place, name in enumerate(names):
            if name in names[:place]:
                raise yaml.YAMLError(f"`{_named(name)}` stands twice, in line {node.start_mark.line + 1} and below")
        return super().construct_mapping(node, deep=deep)


def _read(path: Path) -> object:
    where = str(path)
    if path.is_dir():
        raise _fail(
            where, "is a folder, not a build configuration; folders of runs are sources, given without --config"
        )
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        if isinstance(error, UnicodeDecodeError):
            raise _fail(where, f"not UTF-8 at byte {error.start}; save the build configuration as UTF-8") from error
        raise _fail(where, f"cannot read the build configuration: {getattr(error, 'strerror', error)}") from error
    content = _parse_yaml(text, where)
    return {} if content is None else content


def _parse_yaml(text: str, where: str) -> object:
    try:
        return yaml.load(text, Loader=_Loader)
    except _BAD_YAML as error:
        raise _fail(where, f"not valid YAML: {str(error) or type(error).__name__}") from error


def _fail(where: str, message: str) -> ConfigError:
    """Error on one line that a terminal can show, whatever the file holds."""
    return ConfigError(_printable(f"{_named(where)}: {' '.join(message.split())}"))


def _printable(text: str) -> str:
    return "".join(character if character.isprintable() else ascii(character)[1:-1] for character in text)


def _shown(value: object) -> str:
    """A value on one short line."""
    try:
        return f"{_SHORT.repr(value):.80}"
    except ValueError:  # Python writes no integers of thousands of digits
        return "a number of thousands of digits"


def _named(name: str) -> str:
    """A name on one short line."""
    return name if name.isprintable() else repr(name)


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
            raise _fail(
                where, f"unknown {what} `{_named(name):.80}`; did you mean `{nearest}`? Known: {', '.join(names)}"
            )


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


def _key(value: object, where: str) -> KeyNames:
    """Key columns of ``[gpu, {n_gpus: category}]``, of ``{gpu: category, n_gpus: number}``, or of one name."""
    key: list[tuple[str, str | None]] = []
    for item in value if isinstance(value, list) else [value]:
        if not isinstance(item, str | Mapping):
            raise _fail(where, f"`key` holds {_shown(item)}; write names of columns, such as `key: [gpu, n_gpus]`")
        kinds = {item: None} if isinstance(item, str) else _mapping(item, where, "`key`")
        for name, kind in kinds.items():
            key.append((name, None if kind is None else _choice(kind, KINDS, where, f"key.{name}")))
    names = [name for name, _ in key]
    try:
        refuse_key_names(names)
    except ConfigError as error:
        raise _fail(where, str(error)) from None
    for name in names:
        if name.lower() in _OWN_NAMES:
            raise _fail(where, f"`{_named(name)}` cannot be a key column, for the runs have a column of that name")
        if name not in _COLUMNS and name.lower() in _COLUMNS:
            raise _fail(
                where,
                f"the key column `{name}` differs from lutest's own `{name.lower()}` in upper and lower case alone: "
                f"write `key: [{name.lower()}, …]` and `columns: {{{name.lower()}: {name}}}`",
            )
    return tuple(key)


def _columns(value: object, key: KeyNames, where: str) -> dict[str, ColumnRule]:
    columns = _default_columns(key)
    given = _mapping(value, where, "`columns`")
    _known(given, tuple(columns), where, "column")
    for name, rule in given.items():
        columns[name] = _column_rule(name, rule, where)
    return columns


def _column_rule(name: str, rule: object, where: str) -> ColumnRule:
    if isinstance(rule, str) and rule:
        return ColumnRule(((rule,),))
    if isinstance(rule, list) and rule and all(isinstance(item, str) and item for item in rule):
        if len(rule) > 1 and name not in _SUMMABLE:
            raise _fail(where, f"`columns.{name}` is a sum of fields; only these can be: {', '.join(_SUMMABLE)}")
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
