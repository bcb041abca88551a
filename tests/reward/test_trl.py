"""The reward form of TRL: its calling convention, and GRPO steps of the real trainer on a tiny model."""

from __future__ import annotations

import functools
import math
import pickle
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from lutest import load
from lutest.reader.errors import ArgumentError, LutestWarning
from lutest.reader.figures import Key
from lutest.reader.table import LatencyTable
from lutest.reward.latency import LatencyReward
from lutest.reward.rollout import Columns
from lutest.reward.terms import Weights
from lutest.reward.trl import TRLReward
from tests.synthetic import make_figures

TABLE = LatencyTable(make_figures())
BATCH: dict[str, Any] = {
    "prompts": ["p", "p", "p", "p"],
    "completions": ["a b", "use low 8 16", "c", "d"],
    "completion_ids": [[1, 2], [1, 2, 3, 4], [5], [6, 7, 8]],
    "tier": ["low", "medium", None, "ultra"],
    "top_k": [4, 8, None, 8],
    "num_blocks": [12, 16, None, 16],
    "prompt_tokens": [50, 300, 300, 300],
    "budget_ms": [40.0, 90.0, 90.0, 90.0],
}


class Log:
    """What TRL passes as log_metric and log_extra."""

    def __init__(self) -> None:
        self.metrics: dict[str, float] = {}
        self.extra: dict[str, list[object]] = {}

    def log_metric(self, name: str, value: float) -> None:
        assert name not in self.metrics
        self.metrics[name] = value

    def log_extra(self, column: str, values: list[object]) -> None:
        self.extra[column] = values


def choose_words(text: str) -> list[str] | None:
    """The three words after the first "use"; None where there is no such word."""
    words = text.split()
    return words[words.index("use") + 1 :][:3] if "use" in words else None


def length_reward(completions: list[str], **_: object) -> list[float]:
    return [float(len(completion)) for completion in completions]


def test_one_reward_or_none_for_each_completion() -> None:
    rewards = TRLReward(LatencyReward(TABLE))(**BATCH, trainer_state=object(), environments=None, answer=["x"] * 4)
    judge = LatencyReward(TABLE).judge
    expected = []
    for i in range(4):
        outcome = judge({name: values[i] for name, values in BATCH.items()})
        expected.append(None if outcome is None else outcome.reward)
    assert rewards == expected
    assert rewards[2] is None
    assert [type(reward) for reward in rewards if reward is not None] == [float] * 3


def test_the_length_is_that_of_the_completion_ids() -> None:
    log = Log()
    TRLReward(LatencyReward(TABLE))(**BATCH, output_tokens=[50] * 4, log_extra=log.log_extra)
    totals = [TABLE["low", 4, 12].total_ms(50, 2, 0.95), TABLE["medium", 8, 16].total_ms(300, 4, 0.95)]
    assert log.extra["latency_ms"] == [*totals, None, None]
    assert log.extra["latency_decided_by"] == ["total", "total", None, "unknown"]
    TRLReward(LatencyReward(TABLE, length_from="unknown"))(**BATCH, log_extra=log.log_extra)
    assert log.extra["latency_ms"][0] == TABLE["low", 4, 12].prefill_ms(50, 0.95)


def test_columns_may_have_other_names_and_ids_may_be_left_out() -> None:
    named = {"tier": "level", "top_k": "experts", "budget_ms": "limit"}
    batch = {named.get(name, name): values for name, values in BATCH.items() if name != "completion_ids"}
    columns = Columns({"tier": "level", "top_k": "experts"}, budget_ms="limit", output_tokens="n")
    rewards = TRLReward(LatencyReward(TABLE, columns=columns))(**batch, n=[2, 4, 1, 3])
    assert rewards == TRLReward(LatencyReward(TABLE))(**BATCH)


def test_the_policy_may_choose_in_messages() -> None:
    batch = {name: BATCH[name][:2] for name in ("completion_ids", "prompt_tokens", "budget_ms")}
    completions = [[{"role": "assistant", "content": text}] for text in ("I use medium 8 16", "none of them")]
    reward = TRLReward(LatencyReward(TABLE, parse=choose_words))
    first, second = reward(prompts=[[], []], completions=completions, **batch)
    outcome = LatencyReward(TABLE).judge(
        {"tier": "medium", "top_k": 8, "num_blocks": 16, "prompt_tokens": 50, "budget_ms": 40.0, "output_tokens": 2}
    )
    assert outcome is not None
    assert (first, second) == (outcome.reward, None)


def test_terms_are_logged_where_log_metric_is_passed() -> None:
    log = Log()
    reward = LatencyReward(TABLE, weights=Weights(bonus=0.5, complexity=0.25))
    rewards = TRLReward(reward)(**BATCH, log_metric=log.log_metric)
    outcomes = [reward.judge({name: values[i] for name, values in BATCH.items()}) for i in (0, 1, 3)]
    for name in ("smooth_penalty", "squared_overrun", "efficiency_bonus", "complexity_penalty"):
        assert log.metrics.pop(f"latency/{name}") == pytest.approx(sum(getattr(o, name) for o in outcomes) / 3)
    latencies = [outcome.latency_ms for outcome in outcomes if outcome is not None and outcome.latency_ms is not None]
    assert log.metrics.pop("latency/ms") == pytest.approx(sum(latencies) / 2)
    over = [latency > budget for latency, budget in zip(latencies, (40.0, 90.0), strict=True)]
    assert log.metrics.pop("latency/over_limit") == sum(over) / 2
    assert log.metrics.pop("latency/unknown") == pytest.approx(1 / 3)
    assert log.metrics.pop("latency/extrapolated") == pytest.approx(1 / 3)
    assert log.metrics.pop("latency/wrong_row") == 0.0
    assert not log.metrics
    assert rewards == TRLReward(reward)(**BATCH)


def test_a_batch_without_any_configuration_logs_nothing() -> None:
    log = Log()
    nothing: dict[str, Any] = {name: [None] for name in ("tier", "top_k", "num_blocks", "budget_ms")}
    rewards = TRLReward(LatencyReward(TABLE))(prompts=["p"], completions=["a"], **nothing, log_metric=log.log_metric)
    assert rewards == [None]
    assert not log.metrics


def test_columns_that_are_not_one_value_a_completion_are_named() -> None:
    for wrong in ([40.0], 40.0, "40.0"):
        with pytest.raises(ArgumentError, match="budget_ms"):
            TRLReward(LatencyReward(TABLE))(**{**BATCH, "budget_ms": wrong})
    log = Log()
    with pytest.warns(LutestWarning, match=r"prompt_tokens is -1"):
        TRLReward(LatencyReward(TABLE))(**{**BATCH, "prompt_tokens": [50, -1, 1, 1]}, log_metric=log.log_metric)
    assert log.metrics["latency/wrong_row"] == pytest.approx(1 / 3)


def test_it_has_a_name_and_pickles() -> None:
    reward = TRLReward(LatencyReward(TABLE, parse=choose_words), name="fast_enough")
    assert (reward.__name__, TRLReward(LatencyReward(TABLE)).__name__) == ("fast_enough", "latency_reward")
    buffers: list[pickle.PickleBuffer] = []
    copy = pickle.loads(pickle.dumps(reward, protocol=5, buffer_callback=buffers.append), buffers=buffers)
    assert copy(**BATCH) == reward(**BATCH)
    assert copy.__name__ == "fast_enough"


WORDS = ["<pad>", "</s>", "<unk>", "say", "which", "use", "low", "medium", "high", "ultra"]
WORDS += [str(number) for number in range(17)]


def tiny_policy() -> tuple[Any, Any]:
    """A randomly initialised model over a handful of words, and its tokenizer."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    vocabulary = {word: number for number, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
        pad_token_id=0,
        eos_token_id=1,
    )
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    return LlamaForCausalLM(config), wrapped


def train(rewards: list[Any], rows: list[dict[str, Any]], folder: Path, steps: int) -> list[dict[str, float]]:
    """What the real GRPOTrainer logs, step by step."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    model, tokenizer = tiny_policy()
    arguments = GRPOConfig(
        output_dir=str(folder),
        use_cpu=True,
        bf16=False,
        per_device_train_batch_size=8,
        num_generations=4,
        max_completion_length=6,
        max_steps=steps,
        logging_steps=1,
        learning_rate=1e-2,
        beta=0.0,
        report_to=[],
        save_strategy="no",
        seed=3,
    )
    data = Dataset.from_list(rows)
    trainer = GRPOTrainer(
        model=model, reward_funcs=rewards, args=arguments, train_dataset=data, processing_class=tokenizer
    )
    trainer.train()
    return [entry for entry in trainer.state.log_history if "reward" in entry]


@pytest.fixture(scope="module")
def shipped(request: pytest.FixtureRequest) -> LatencyTable:
    pytest.importorskip("trl", reason="TRL is not installed")
    return load(request.getfixturevalue("direct_table"))


def named(table: LatencyTable, key: Key) -> dict[str, object]:
    return dict(zip(table.key_columns, key, strict=True))


def test_grpo_on_the_columns_of_a_data_set(shipped: LatencyTable, tmp_path: Path) -> None:
    keys = [shipped.keys[0], shipped.keys[-1]]
    # three rows: two with a configuration, one without
    rows = [
        {"prompt": "say which", **named(shipped, key), "prompt_tokens": 400, "budget_ms": 1000.0, "answer": "low"}
        for key in keys
    ]
    rows.append({"prompt": "which say", **dict.fromkeys(("tier", "top_k", "num_blocks", "prompt_tokens", "budget_ms"))})
    seen: dict[str, list[Any]] = defaultdict(list)
    inner = TRLReward(LatencyReward(shipped))

    @functools.wraps(inner)
    def watched(**kwargs: Any) -> list[float | None]:
        rewards = inner(**kwargs)
        for name in ("completion_ids", "completions", "tier"):
            seen[name] += kwargs[name]
        seen["rewards"] += rewards
        return rewards

    history = train([length_reward, watched], rows, tmp_path, steps=3)
    assert len(history) == 3
    assert any(entry["grad_norm"] > 0.0 for entry in history)
    for entry in history:
        assert math.isfinite(entry["reward"])
        assert entry["latency/unknown"] == 0.0
        assert entry["latency/ms"] > 0.0
        assert entry["rewards/latency_reward/mean"] <= 0.0
    assert [reward is None for reward in seen["rewards"]] == [tier is None for tier in seen["tier"]]
    assert {None, keys[0][0], keys[1][0]} == set(seen["tier"])
    for ids, tier, reward in zip(seen["completion_ids"], seen["tier"], seen["rewards"], strict=True):
        if tier is None:
            continue
        key = keys[[key[0] for key in keys].index(tier)]
        outcome = LatencyReward(shipped, 1000.0).judge(
            {**named(shipped, key), "prompt_tokens": 400, "output_tokens": len(ids)}
        )
        assert outcome is not None
        assert outcome.latency_ms == shipped[key].total_ms(400, len(ids), 0.95)
        assert reward == outcome.reward


def test_grpo_with_a_policy_that_chooses(shipped: LatencyTable, tmp_path: Path) -> None:
    rows = [{"prompt": "say which use", "prompt_tokens": 400, "budget_ms": 1500.0}] * 4
    reward = TRLReward(LatencyReward(shipped, parse=str.split), name="choice")
    history = train([reward], rows, tmp_path, steps=2)
    for entry in history:
        # of random words, next to none is a configuration: each is penalised, none ends the run
        assert entry["latency/unknown"] > 0.5
        assert entry["rewards/choice/mean"] < -0.5
