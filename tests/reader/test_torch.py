"""table.to_torch: the numbers of `Batch` as tensors, compiled or not, and what a model around it may do to it."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import duckdb
import numpy as np
import pandas as pd
import pytest

import lutest
from lutest import ArgumentError, LatencyTable
from tests.synthetic import NO_DECODE, QUANTILES, make_figures

torch: Any = pytest.importorskip("torch", reason="torch is not installed: `table.to_torch` needs it")

TABLE = LatencyTable(make_figures())
WITH_DECODE = [number for number, key in enumerate(TABLE.keys) if key != NO_DECODE]


def drawn(count: int = 3000) -> tuple[Any, Any, Any]:
    chance = np.random.default_rng(0)
    prompts = np.where(chance.random(count) < 0.8, chance.integers(0, 1500, count), chance.integers(0, 10**6, count))
    tokens = np.where(chance.random(count) < 0.8, chance.integers(1, 100, count), chance.integers(1, 10**6, count))
    return chance.choice(WITH_DECODE, count), prompts, tokens


def tensors(*arrays: Any) -> list[Any]:
    return [torch.as_tensor(array) for array in arrays]


@pytest.mark.parametrize("q", QUANTILES)
def test_all_verbs_answer_as_the_batch_does(q: float) -> None:
    module, batch = TABLE.to_torch(q=q), TABLE.batch
    ids, prompts, tokens = drawn()
    i, p, n = tensors(ids, prompts, tokens)
    for found, expected in (
        (module(i, p, n), batch.total_ms(ids, prompts, tokens, q)),
        (module(i, None, n), batch.total_ms(ids, None, tokens, q)),
        (module.decode_ms(i, p, n), batch.decode_ms(ids, prompts, tokens, q)),
        (module.decode_ms(i, None, n), batch.decode_ms(ids, None, tokens, q)),
        (module.prefill_ms(i, p), batch.prefill_ms(ids, prompts, q)),
        (module.prefill_ms(i), batch.prefill_ms(ids, None, q)),
    ):
        assert found.dtype == torch.float64
        np.testing.assert_allclose(found.numpy(), expected, rtol=1e-12)


def test_unknown_lengths_are_answered_as_the_batch_does() -> None:
    module, batch = TABLE.to_torch(), TABLE.batch
    ids, prompts, _ = drawn()
    budgets = np.random.default_rng(1).uniform(10.0, 3000.0, len(ids))
    i, p, b = tensors(ids, prompts, budgets)
    for prompt, given in ((None, None), (p, prompts)):
        np.testing.assert_allclose(module.p_within(i, b, prompt), batch.p_within(ids, budgets, given), atol=1e-7)
        np.testing.assert_allclose(module.expected_total_ms(i, prompt), batch.expected_total_ms(ids, given), rtol=1e-12)
    assert math.isnan(module.p_within(torch.tensor(-1), 500.0))
    assert module.p_within(i[:6].reshape(2, 3), 1e9).tolist() == [[1.0] * 3] * 2


def test_one_token_is_prefill() -> None:
    ids, prompts, _ = drawn()
    i, p = tensors(ids, prompts)
    module = TABLE.to_torch(q=0.95)
    found, expected = module(i, p, torch.ones_like(i)), module.prefill_ms(i, p)
    np.testing.assert_allclose(found.numpy(), expected.numpy(), rtol=1e-14)


def test_shapes_broadcast_and_small_integers_do() -> None:
    module = TABLE.to_torch()
    ids = torch.tensor([[0], [4]], dtype=torch.int32)
    found = module(ids, torch.tensor(100, dtype=torch.int16), torch.arange(1, 6, dtype=torch.uint8))
    assert found.shape == (2, 5)
    expected = TABLE.batch.total_ms(ids.numpy(), 100, np.arange(1, 6), 0.95)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-12)
    assert module.prefill_ms(ids, torch.tensor([[1, 2, 3]])).shape == (2, 3)
    assert module(ids[:0], torch.tensor(100), torch.tensor(5)).shape == (0, 1)


@pytest.mark.parametrize(
    ("key", "prompt", "tokens"),
    [
        (-1, 5, 5),
        (12, 5, 5),
        (-7, 5, 5),
        (10**12, 5, 5),
        (0, -1, 5),
        (0, 5, 0),
        (0, 5, -3),
        (0, 2**62, 5),
        (0, 5, 2**62),
    ],
)
def test_what_cannot_be_answered_is_nan_and_alone(key: int, prompt: int, tokens: int) -> None:
    i, p, n = tensors([key, 4], [prompt, 50], [tokens, 9])
    found = TABLE.to_torch()(i, p, n)
    assert math.isnan(found[0])
    assert found[1].item() == pytest.approx(TABLE[TABLE.keys[4]].total_ms(50, 9, 0.95), rel=1e-12)


def test_unknown_decode_is_nan_but_its_first_token_is_known() -> None:
    i, n = tensors([TABLE.keys.index(NO_DECODE)] * 2, [1, 2])
    total = TABLE.to_torch()(i, torch.tensor(600), n)
    assert total[0].item() == pytest.approx(TABLE[NO_DECODE].prefill_ms(600, 0.95), rel=1e-14)
    assert math.isnan(total[1])


def test_it_compiles_as_one_graph() -> None:
    module = TABLE.to_torch(q=0.95)
    i, p, n = tensors(*drawn(200))
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    np.testing.assert_allclose(compiled(i, p, n).numpy(), module(i, p, n).numpy(), rtol=1e-12)
    np.testing.assert_allclose(compiled(i, None, n).numpy(), module(i, None, n).numpy(), rtol=1e-12)


def test_a_model_in_half_precision_leaves_it_alone() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), TABLE.to_torch())
    i, p, n = tensors(*drawn(200))
    before = model[1](i, p, n).tolist()
    for changed in (model.to(torch.bfloat16), model.half(), copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert changed[1](i, p, n).tolist() == before
    assert list(model[1].parameters()) == []


def test_its_state_goes_into_its_like_only() -> None:
    module, other = TABLE.to_torch(q=0.95), TABLE.to_torch(q=0.95)
    i, p, n = tensors(*drawn(200))
    for buffer in other.buffers():
        buffer.zero_()
    other.load_state_dict(module.state_dict())
    assert other(i, p, n).tolist() == module(i, p, n).tolist()
    with pytest.raises(ArgumentError, match=r"12 configurations at q=0\.95, which are not .* 12 at q=0\.5"):
        TABLE.to_torch(q=0.5).load_state_dict(module.state_dict())


def test_the_quantile_is_one_of_the_table() -> None:
    with pytest.raises(ArgumentError, match=r"q is 0\.9; allowed"):
        TABLE.to_torch(q=0.9)


def test_the_device_is_where_it_lives() -> None:
    module = TABLE.to_torch("meta")
    assert {buffer.device.type for buffer in module.buffers()} == {"meta"}


@pytest.mark.parametrize("name", ["direct", "serving"])
def test_a_thousand_queries_have_one_answer_in_python_sql_batches_and_torch(
    name: str, request: pytest.FixtureRequest
) -> None:
    table = lutest.load(request.getfixturevalue(f"{name}_table"))
    chance = np.random.default_rng(1)
    known = [number for number, held in enumerate(table.figures.keys) if held.decode is not None]
    ids = chance.choice(known, 1000)
    prompts, tokens = (np.exp(chance.uniform(0.0, np.log(most), 1000)).astype(int) for most in (131_072, 32_768))
    for q in table.quantiles:
        entries = [table[table.keys[number]] for number in ids]
        answers = [e.total_ms(p, n, q) for e, p, n in zip(entries, prompts.tolist(), tokens.tolist(), strict=True)]
        np.testing.assert_allclose(table.batch.total_ms(ids, prompts, tokens, q), answers, rtol=1e-9)
        np.testing.assert_allclose(table.to_torch(q=q)(*tensors(ids, prompts, tokens)).numpy(), answers, rtol=1e-9)
        rows = [(place, *table.keys[number]) for place, number in enumerate(ids.tolist())]
        asked = pd.DataFrame(rows, columns=["place", *table.key_columns]).assign(p=prompts, n=tokens)
        with duckdb.connect() as connection:
            connection.execute(f"ATTACH '{table.path}' AS held (READ_ONLY)")
            connection.register("asked", asked)
            connection.execute("USE held")
            columns = ", ".join(table.key_columns)
            sql = f"SELECT total_ms({columns}, p, n, {q}) FROM memory.main.asked ORDER BY place"
            np.testing.assert_allclose([ms for (ms,) in connection.execute(sql).fetchall()], answers, rtol=1e-9)
