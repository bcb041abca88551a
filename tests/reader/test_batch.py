"""table.batch: the numbers of Entry over arrays."""

from __future__ import annotations

import math
import pickle
from functools import partial

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lutest import ArgumentError, NoDecodeDataError, UnknownKeyError
from lutest.reader.table import LatencyTable
from tests.synthetic import NO_DECODE, QUANTILES, make_figures

TABLE = LatencyTable(make_figures())
BATCH = TABLE.batch
CHUNK = 10_000  # more than a batch works on at a time
WITH_DECODE = [number for number, key in enumerate(TABLE.keys) if key != NO_DECODE]

levels = st.sampled_from(QUANTILES)
lengths = st.one_of(st.integers(0, 900), st.integers(0, 131_072), st.sampled_from([0, 40, 400, 801, 2047, 2048]))
rows = st.lists(
    st.tuples(st.sampled_from(WITH_DECODE), lengths, lengths.map(lambda n: max(n, 1)), st.floats(1.0, 1e7)), min_size=1
)


@given(rows, levels, st.booleans())
def test_batch_is_scalar(drawn: list[tuple[int, int, int, float]], q: float, with_prompt: bool) -> None:
    ids, prompts, tokens, budgets = (np.array(column) for column in zip(*drawn, strict=True))
    entries = [TABLE[TABLE.keys[i]] for i in ids]
    given_prompts = [int(p) if with_prompt else None for p in prompts]
    prompt = prompts if with_prompt else None
    cases = list(zip(entries, given_prompts, map(int, tokens), map(float, budgets), strict=True))
    near = partial(pytest.approx, rel=1e-9)
    assert BATCH.prefill_ms(ids, prompt, q) == near([e.prefill_ms(p, q) for e, p, _, _ in cases])
    assert BATCH.decode_step_ms(ids, tokens, q) == near([e.decode_step_ms(n, q) for e, _, n, _ in cases])
    assert BATCH.decode_ms(ids, prompt, tokens, q) == near([e.decode_ms(p, n, q) for e, p, n, _ in cases])
    assert BATCH.total_ms(ids, prompt, tokens, q) == near([e.total_ms(p, n, q) for e, p, n, _ in cases])
    within = [e.p_within(budget, p) for e, p, _, budget in cases]
    assert BATCH.p_within(ids, budgets, prompt) == pytest.approx(within, abs=1e-9)
    assert BATCH.expected_total_ms(ids, prompt, "vqa") == near([e.expected_total_ms(p, "vqa") for e, p, _, _ in cases])
    most = BATCH.max_output_tokens(ids, budgets, prompt, q)
    for (entry, p, _, budget), n in zip(cases, most.tolist(), strict=True):  # a total that equals it may go either way
        assert n == entry.max_output_tokens(budget, p, q) or entry.total_ms(p, max(n, 1), q) == near(budget)


def test_more_elements_than_a_chunk() -> None:
    chance = np.random.default_rng(0)
    count = 2 * CHUNK + 77
    ids, prompts, tokens = (
        chance.choice(WITH_DECODE, count),
        chance.integers(0, 900, count),
        chance.integers(1, 99, count),
    )
    totals = BATCH.total_ms(ids, prompts, tokens, 0.95)
    for place in (*chance.integers(0, count, 200), 0, CHUNK - 1, CHUNK, count - 1):
        entry = TABLE[TABLE.keys[ids[place]]]
        expected = entry.total_ms(int(prompts[place]), int(tokens[place]), 0.95)
        assert totals[place] == pytest.approx(expected, rel=1e-12)


def test_shapes_broadcast() -> None:
    ids = BATCH.key_ids([["low"], ["medium"]], [4, 8, 8], 12)
    assert ids.shape == (2, 3)
    assert BATCH.total_ms(ids, 100, [5, 6, 7], 0.95).shape == (2, 3)
    assert BATCH.total_ms(ids[:, :1, None], 100, np.arange(1, 5)).shape == (2, 1, 4)
    assert BATCH.total_ms(0, 100, 5).shape == ()
    assert BATCH.max_output_tokens(ids, [[500.0], [900.0]]).shape == (2, 3)
    assert BATCH.p_within(ids, [[500.0], [900.0]]).shape == (2, 3)
    assert BATCH.expected_total_ms(ids[:, :1, None], [50, 60], "web").shape == (2, 1, 2)
    assert BATCH.total_ms(ids[:0], 100, 5).shape == (0, 3)
    assert BATCH.max_output_tokens(ids[:0], 100.0, 5).shape == (0, 3)
    with pytest.raises(ArgumentError, match=r"do not broadcast: \(2, 3\), \(\), \(2,\)"):
        BATCH.total_ms(ids, 100, [5, 6])


def test_all_integer_kinds_and_whole_floats() -> None:
    expected = BATCH.total_ms(WITH_DECODE, 200, 100, 0.95).tolist()
    for kind in (np.uint8, np.int16, np.uint64, np.float32, np.float64):
        ids = np.array(WITH_DECODE, dtype=np.int16)[::-1][::-1]
        assert BATCH.total_ms(ids, kind(200), np.array([100], dtype=kind), 0.95).tolist() == expected


def test_key_ids_take_columns_in_order_or_by_name() -> None:
    expected = list(range(12))
    tiers, top_ks, blocks = zip(*TABLE.keys, strict=True)
    assert BATCH.key_ids(tiers, top_ks, blocks).tolist() == expected
    assert BATCH.key_ids(np.array(tiers, dtype=object), top_ks, blocks).tolist() == expected
    assert BATCH.key_ids(num_blocks=blocks, tier=tiers, top_k=np.array(top_ks, dtype=float)).tolist() == expected
    assert BATCH.key_ids("low", top_k=[4, 8], num_blocks=12).tolist() == [4, 6]
    assert BATCH.key_ids("low", 4, 12).dtype == np.int64
    with pytest.raises(ArgumentError, match="allowed: a value for each of tier, top_k, num_blocks"):
        BATCH.key_ids("low", 4)
    with pytest.raises(ArgumentError, match="tier has dtype int64; allowed: names"):
        BATCH.key_ids([0, 1], 4, 12)
    with pytest.raises(ArgumentError, match="top_k has dtype <U1; allowed: numbers"):
        BATCH.key_ids("low", "4", 12)
    with pytest.raises(ArgumentError, match="do not broadcast"):
        BATCH.key_ids(["low"] * 2, [4] * 3, 12)


@pytest.mark.parametrize(
    "unknown",
    [("huge", 4, 12), ("low", 5, 12), ("low", 4, 13), ("low", 99, 12), ("low", -1, 12), ("low", 4.5, 12)],
)
def test_unknown_keys_raise_or_are_nan(unknown: tuple[str, float, int]) -> None:
    with pytest.raises(
        UnknownKeyError, match=rf"tier='{unknown[0]}', top_k={unknown[1]}, num_blocks={unknown[2]} was not"
    ):
        BATCH.key_ids([unknown[0]], [unknown[1]], [unknown[2]])
    ids = BATCH.key_ids([unknown[0], "low"], [unknown[1], 4], [unknown[2], 12], missing="nan")
    assert ids.tolist() == [-1, 4]
    entry = TABLE["low", 4, 12]
    for answer, known in (
        (BATCH.prefill_ms(ids, 50), entry.prefill_ms(50)),
        (BATCH.prefill_ms(ids), entry.prefill_ms()),
        (BATCH.decode_step_ms(ids, 50), entry.decode_step_ms(50)),
        (BATCH.decode_ms(ids, 50, 5), entry.decode_ms(50, 5)),
        (BATCH.total_ms(ids, 50, 5, 0.95), entry.total_ms(50, 5, 0.95)),
        (BATCH.total_ms(ids, 50, [1, 5], 0.95), entry.total_ms(50, 5, 0.95)),
    ):
        assert math.isnan(answer[0])
        assert answer[1] == pytest.approx(known, rel=1e-12)
    assert BATCH.max_output_tokens(ids, 500.0).tolist() == [-1, entry.max_output_tokens(500.0)]


def test_the_place_of_an_unknown_key_is_named() -> None:
    with pytest.raises(UnknownKeyError, match="element 2: tier='low', top_k=7, num_blocks=12"):
        BATCH.key_ids("low", [4, 8, 7, 5], 12)


@pytest.mark.parametrize("ids", [[-2], [12], [0, 99]])
def test_wrong_ids(ids: list[int]) -> None:
    with pytest.raises(ArgumentError, match=r"^ids holds (-2|12|99); allowed: 0 to 11, and -1"):
        BATCH.total_ms(ids, 5, 5)
    with pytest.raises(ArgumentError, match="ids has dtype float64"):
        BATCH.total_ms(np.array(ids, dtype=float), 5, 5)


@pytest.mark.parametrize("wrong", [-1, 10**12 + 1, 2.5, math.nan, math.inf, -(2**63)])
def test_wrong_tokens_are_named(wrong: float) -> None:
    for name, call in (
        ("prompt_tokens", lambda x: BATCH.prefill_ms(0, x)),
        ("prompt_tokens", lambda x: BATCH.total_ms(0, x, 5, 0.95)),
        ("prompt_tokens", lambda x: BATCH.max_output_tokens(0, 50.0, x)),
        ("output_tokens", lambda x: BATCH.decode_ms(0, 5, x)),
        ("kv_len", lambda x: BATCH.decode_step_ms(0, x)),
    ):
        with pytest.raises(ArgumentError, match=rf"^{name} holds .*; allowed: whole numbers"):
            call([3, wrong])
    with pytest.raises(ArgumentError, match="output_tokens holds 0"):
        BATCH.total_ms(0, 5, [1, 0])
    with pytest.raises(ArgumentError, match="prompt_tokens has dtype"):
        BATCH.total_ms(0, ["5"], 5)
    with pytest.raises(ArgumentError, match=r"^q is 0\.9; allowed"):
        BATCH.total_ms(0, 5, 5, 0.9)


@pytest.mark.parametrize("wrong", [0.0, -1.0, math.nan, math.inf])
def test_wrong_budgets_are_named(wrong: float) -> None:
    with pytest.raises(ArgumentError, match=r"^budget_ms holds .*; allowed: finite"):
        BATCH.max_output_tokens(0, [5.0, wrong])


def test_a_key_with_one_token_runs_only() -> None:
    ids = [TABLE.keys.index(("low", 4, 12)), TABLE.keys.index(NO_DECODE)]
    assert BATCH.total_ms(ids, 600, [5, 1], 0.95)[1] == pytest.approx(TABLE[NO_DECODE].prefill_ms(600, 0.95), rel=1e-14)
    assert BATCH.decode_ms(ids, 600, [5, 1], 0.95)[1] == 0.0
    assert BATCH.max_output_tokens(ids, [500.0, 0.001]).tolist()[1] == 0
    for call in (
        lambda: BATCH.total_ms(ids, 600, [5, 2]),
        lambda: BATCH.decode_step_ms(ids, 5),
        lambda: BATCH.max_output_tokens(ids, 1e6),
    ):
        with pytest.raises(NoDecodeDataError, match="tier='high', top_k=8, num_blocks=16: all its runs have one token"):
            call()


def test_a_batch_survives_pickling() -> None:
    other = pickle.loads(pickle.dumps(BATCH))
    assert other.total_ms(WITH_DECODE, 99, 9, 0.95).tolist() == BATCH.total_ms(WITH_DECODE, 99, 9, 0.95).tolist()
