"""Nasty inputs: runs, files and configurations, valid ones changed at random, for the fuzz tests."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random

import duckdb

__all__ = [
    "FIELDS",
    "FILE_NAMES",
    "HOSTILE_TIER",
    "NESTED",
    "TEXTS",
    "WRITERS",
    "damaged",
    "good_run",
    "json_line",
    "yaml_text",
]

HOSTILE_TIER = "'; DROP TABLE prefill; --"
FIELDS = (
    "tier", "top_k", "num_blocks", "prompt_tokens", "output_tokens", "prefill_ms", "decode_ms", "decode_steps_ms",
    "total_ms", "workload", "sample_id", "accuracy", "device", "num_active_blocks", "T_vision_total", "T_LLM_prefill",
    "T_LLM_decode", "T_decode_per_step", "total_sequence_length", "actual_vision_tokens", "actual_text_tokens",
)  # fmt: skip
HOSTILE_NAMES = ('a"b', "a'b; DROP TABLE runs; --", "row", "c0", "source_id", "Tier", "", " tier", "tier\n", "$1", "*")
NUMBERS = (
    "0", "-0.0", "1", "-1", "2", "3", "4.0", "2.5", "1e308", "-1e308", "1e309", "1e400", "5e-324", "1e-7", "1e-6",
    "999999999", "1e9", "1000000001", "2147483648", "9223372036854775808", "18446744073709551616", "NaN", "Infinity",
    "-Infinity", "9" * 400, "9" * 5000, "0.1", "1E5", "12345678901234567890.5",
)  # fmt: skip
TEXTS = (
    "", " ", "low", "LOW", "12", " 12 ", "1_000", "0x10", "1e3", "nan", "inf", "-inf", "NULL", "null", "true", "None",
    HOSTILE_TIER, '"; DROP TABLE runs; --', "a|b", "a\nb", "a\rb", "tab\t", "\u2028", "\ufeff", "\u202e", "na\u00efve",
    "\u6c49", "\U0001f600", "e\u0301", "%s{}$1?", "\\", "x" * 300, "1,5", "١٢", "[1, 2]", "[1, null]", "{}", "\x1b[31m",
)  # fmt: skip
NESTED = "[" * 100_000 + "]" * 100_000
STEP_TEXTS = (
    "[]", "[1.5]", "[10, 11.5]", "[[10], [11.5]]", "[[10, 10.1], [11]]", "[[], [1]]", "[[]]", "[null, 1]", "[1, [2]]",
    "[[1], 2]", "[NaN, 1]", "[1e308, 1e308]", "[-1, 1]", "[0, 0]", '["1", 2]', "[true, 1]", "[{}, 1]", "[[[1]], 2]",
    "[1e400, 2]", "[5e-324, 1]", "[1e-7, 2]",
)  # fmt: skip
RAW = (*NUMBERS, *map(json.dumps, TEXTS), *STEP_TEXTS, "null", "true", "false", "{}", '{"a": null, "a": [[]]}',
       '"\\u0000"', '"\\ud800"', '{"per_sample_results": []}')  # fmt: skip
FILE_NAMES = (
    "it's", 'double"quote', "a;b", "new\nline", "[ab]", "star*", "what?", "{a,b}", "$HOME", "~user", "%41", "-dash",
    "a b", "\u6c49\u5b57", "\U0001f600", "back\\slash", "e\u0301", "x" * 200, "a.json", "tab\t", "\u202eright", "key=1",
    "bytes\udcff",
)  # fmt: skip


def good_run(random: Random) -> dict[str, object]:
    """A run that nothing is wrong with, of one of four keys."""
    output_tokens = random.choice((1, 2, 3, 3, 5, 9))
    run: dict[str, object] = {
        "tier": random.choice(("low", HOSTILE_TIER)),
        "top_k": 4,
        "num_blocks": random.choice((12, 16)),
        "prompt_tokens": random.randrange(50, 400),
        "output_tokens": output_tokens,
        "prefill_ms": round(random.uniform(40, 60), 4),
    }
    if random.random() < 0.5:
        run["decode_ms"] = round(random.uniform(9, 11) * (output_tokens - 1), 4)
    else:
        run["decode_steps_ms"] = [round(random.uniform(9, 11), 4) for _ in range(output_tokens - 1)]
    return run


def json_line(random: Random, broken: bool = True) -> bytes:
    """JSON of one run with up to three fields changed, on one line; its bytes too where it may be broken."""
    members = [(json.dumps(name), json.dumps(value)) for name, value in good_run(random).items()]
    for _ in range(random.randrange(4)):
        name = json.dumps(random.choice(FIELDS if random.random() < 0.9 else HOSTILE_NAMES))
        value = random.choice(RAW) if random.random() < 0.99 else NESTED[:500] + NESTED[-500:]
        place = random.randrange(len(members))
        match random.randrange(4):
            case 0:
                members[place] = (members[place][0], value)
            case 1:
                members.pop(place)
            case 2:
                members.insert(place, (name, value))
            case _:
                members = [member for member in members if member[0] != name]
                members.append((name, value))
        if not members:
            break
    text = "{" + ", ".join(f"{name}: {value}" for name, value in members if broken or len(value) < 4000) + "}"
    if not broken:
        return text.encode()
    line = text.encode("utf-16" if random.random() < 0.01 else "utf-8")
    if random.random() < 0.2:
        line = damaged(random, line)
    return line.replace(b"\n", b" ")


def _json_lines(random: Random, runs: int) -> bytes:
    return b"\n".join(json_line(random) for _ in range(runs))


def _json(random: Random, runs: int) -> bytes:
    """A JSON file of so many runs, in one of the known layouts, all of its syntax valid."""
    lines = [json_line(random, broken=False).decode() for _ in range(runs)]
    lines = [line if random.random() < 0.98 else random.choice(RAW[:20]) for line in lines]
    lines = [line if len(line) < 4000 else "null" for line in lines]
    if random.random() < 0.3:
        return ("[" + ",\n".join(lines) + "]").encode()
    raw = [value for value in RAW if len(value) < 4000 and "ud800" not in value and "u0000" not in value]
    header = [f"{json.dumps(name)}: {random.choice(raw)}" for name in random.sample(FIELDS, random.randrange(4))]
    before = random.randrange(len(header) + 1)
    members = [*header[:before], f'"per_sample_results": [{", ".join(lines)}]', *header[before:]]
    text = "{" + ", ".join(members) + "}"
    return (text if random.random() < 0.5 else f"[{text}]").encode("utf-8-sig" if random.random() < 0.5 else "utf-8")


def _csv(random: Random, runs: int) -> bytes:
    """A CSV file of so many runs, one on a line, with any text in its cells and sometimes a cell too many."""
    names = list(FIELDS[:9]) + random.sample(list(HOSTILE_NAMES[:7]), 2)
    cells = [*NUMBERS[:-4], *TEXTS, *STEP_TEXTS]
    cells = [cell for cell in cells if "\n" not in cell and "\r" not in cell]
    stream = io.StringIO()
    writer = csv.writer(stream, delimiter=random.choice(",;\t"), lineterminator="\n")
    writer.writerow(names)
    for _ in range(runs):
        run = good_run(random)
        row = [str(run.get(name, "")) for name in names]
        for _ in range(random.randrange(4)):
            row[random.randrange(len(names))] = random.choice(cells)
        if random.random() < 0.02:
            row = [*row, "more"] if random.random() < 0.5 else row[:-1]
        writer.writerow(row)
        if random.random() < 0.02:
            stream.seek(stream.tell() - 1)
            stream.write(' "after"x\n')
    return stream.getvalue().encode("utf-8-sig" if random.random() < 0.5 else "utf-8")


def _sql(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def _texts(values: Sequence[str]) -> str:
    return f"[{', '.join(map(_sql, values))}, NULL]"


_SCALAR_TYPES = (
    "VARCHAR", "DOUBLE", "FLOAT", "BIGINT", "INTEGER", "UTINYINT", "HUGEINT", "BOOLEAN", "DECIMAL(18, 3)", "DATE",
    "TIMESTAMP", "TIMESTAMPTZ", "TIME", "BLOB", "UUID", "DOUBLE[]", "STRUCT(a INTEGER)", "MAP(VARCHAR, INTEGER)",
)  # fmt: skip
_STEP_TYPES = ("DOUBLE[]", "DOUBLE[][]", "FLOAT[]", "BIGINT[]", "DECIMAL(18, 3)[]", "VARCHAR", "VARCHAR[]", "DOUBLE",
               "STRUCT(a DOUBLE)[]", "BOOLEAN[]", "DOUBLE[][][]")  # fmt: skip


def _parquet(random: Random, path: Path, runs: int) -> None:
    """Write a Parquet file of so many runs, with columns of any types and any values that these can hold."""
    texts = (*NUMBERS[:-4], *TEXTS)
    columns = []
    for name in (*FIELDS[:9], *random.sample(HOSTILE_NAMES[:5], 2)):
        if random.random() < (0.6 if name == "decode_steps_ms" else 0.1):
            continue
        if name == "decode_steps_ms":
            kind = random.choice(_STEP_TYPES)
            value = f"TRY_CAST(pick({_texts(STEP_TEXTS)}) AS {kind})"
        else:
            kind = random.choice(_SCALAR_TYPES) if random.random() < 0.3 else ""
            kind = kind or ("VARCHAR" if name == "tier" else "DOUBLE")
            good = [str(good_run(random).get(name, 3)) for _ in range(8)]
            chosen = f"if(random() < 0.9, pick({_texts(good)}), pick({_texts(texts)}))"
            value = f"TRY_CAST({chosen} AS {kind})"
        columns.append(f'{value} AS "{name.replace(chr(34), chr(34) * 2)}"')
    with duckdb.connect() as connection:
        connection.execute("SET threads = 1")
        connection.execute(f"SELECT setseed({random.random()})")
        connection.execute("CREATE MACRO pick(l) AS l[1 + floor(random() * len(l))::INTEGER]")
        connection.execute(
            f"COPY (SELECT {', '.join(columns)} FROM range({runs})) TO {_sql(str(path))} (FORMAT parquet)"
        )


def _written(content: Callable[[Random, int], bytes]) -> Callable[[Random, Path, int], None]:
    def write(random: Random, path: Path, runs: int) -> None:
        path.write_bytes(content(random, runs))

    return write


# ending → writes a file of so many runs, all of which can be told apart whatever stands in them
WRITERS: dict[str, Callable[[Random, Path, int], None]] = {
    "jsonl": _written(_json_lines),
    "json": _written(_json),
    "csv": _written(_csv),
    "parquet": _parquet,
}

_BYTES = (b"\xff", b"\x00", b"\xc3", b"\xed\xa0\x80", b"\xef\xbb\xbf", b"\xff\xfe", b'"', b"'", b"[", b"]", b"{", b"}",
          b",", b":", b"\\", b"\\u", b"\\u0000", b"1e", b"-", b"NaN", b"null", b"\r", b"/*", b"\x1a")  # fmt: skip


def damaged(random: Random, content: bytes) -> bytes:
    """Content with bytes flipped, cut out, put in, doubled or cut off."""
    changed = bytearray(content)
    for _ in range(random.choice((1, 1, 1, 2, 3, 8))):
        place = random.randrange(len(changed) + 1)
        match random.randrange(6):
            case 0 if place < len(changed):
                changed[place] ^= 1 << random.randrange(8)
            case 1:
                del changed[place : place + random.choice((1, 2, 5, 50))]
            case 2:
                changed[place:place] = random.choice(_BYTES)
            case 3:
                changed[place:place] = changed[place : place + random.choice((1, 5, 50))]
            case 4:
                changed[place:] = b"" if random.random() < 0.5 else changed[place : len(changed) - 1]
            case _:
                end = random.randrange(len(changed) + 1)
                changed[place:place] = changed[min(place, end) : max(place, end)][:200]
    return bytes(changed)


_YAML_VALUES = (
    "low", "12", "-1", "0", "1e400", ".nan", ".inf", "-.inf", "null", "~", "true", "yes", "2024-99-99", "2024-01-01",
    "1:2:3", "0x" + "f" * 5000, "0b", "0x", "9" * 5000, '""', '"\\n"', '"a\\0b"', "'it''s'", "[]", "{}", "[[[]]]",
    "[a, b]", "{constant: 3}", "{constant: low}", "{constant: .nan}", "{constant: {a: 1}}", "[0.5, 0.95]", "[0.5]",
    "[0.5, 0.95, 0.99]", "[0.95, 0.5, 0.5]", "[.nan]", "[1, 5, 9]", "[9, 1]", "&a [*a]", "*a", "&b b", "<<", "!!int ''",
    "!!float ''", "!!bool x", "!!timestamp x", "!!binary x", "!!set [a]", "!!omap [a]", "!!python/object:os.system x",
    "!!python/name:os.system", "!!null x", "!local x", "|\n  text", ">\n  text", "? [a]\n: b", "{? {a: b} : c}", "%TAG",
    "'; DROP TABLE runs; --", "'\"; DROP TABLE runs; --'", "\"f:'\"", "[prefill_ms, T_total]", "\t", "@", "`",
    "{<<: {a: 1}}", "iqr", "none", "s", "us", "1e-300", "1e300",
    "tier", "[tier, top_k]", "[gpu, {n: category}]", "[model, {top_k: number}]", "{tier: number, num_blocks: null}",
    "[[tier]]",
    "[" * 400 + "]" * 400, "{a: " * 400 + "}" * 400, "x" * 2000,
    "\u2028", "\x07",
)  # fmt: skip
_YAML_NAMES = (
    "sources", "output", "key", "columns", "time_unit", "quantiles", "cleaning", "key: {tier",
    "cleaning: {outliers", "source", '"a\\nb"', "1", "null", "<<", "? ", "!!int ''", "x" * 3000, "&a x", "[a]", "- a",
)  # fmt: skip


def yaml_text(random: Random) -> bytes:
    """A build configuration with some options changed, columns among them."""
    lines = ["sources: runs.jsonl", "output: table.duckdb"]
    for _ in range(random.randrange(4)):
        value = random.choice(_YAML_VALUES)
        match random.randrange(4):
            case 0:
                lines.append(f"{random.choice(_YAML_NAMES)}: {value}")
            case 1:
                lines[random.randrange(len(lines))] = f"{random.choice(_YAML_NAMES[:8])}: {value}"
            case 2:
                lines.append(f"columns:\n  {random.choice(FIELDS)}: {value}\n  tier: {random.choice(_YAML_VALUES)}")
            case _:
                lines.append(f"cleaning:\n  {random.choice(('k', 'outliers', 'j'))}: {value}")
    text = "\n".join(lines) + "\n"
    content = text.encode(random.choice(("utf-8", "utf-8", "utf-8", "utf-8-sig", "utf-16", "latin-1")), "replace")
    return damaged(random, content) if random.random() < 0.2 else content
