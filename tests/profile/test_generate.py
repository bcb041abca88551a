"""Recording of generate(): on a stand-in that needs nothing, and on real models where transformers is installed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import duckdb
import pytest

from lutest.profile.generate import record_generate
from lutest.profile.recorder import Recorder
from lutest.reader.errors import ArgumentError

KEY = ("low", 2, 4)
END = 0


class Tokens:
    """Token ids of one request or more, with as much of a tensor as is needed."""

    def __init__(self, rows: list[list[int]]) -> None:
        self.rows = rows

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.rows), len(self.rows[0])

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        return SimpleNamespace(tolist=lambda: self.rows[index])


class StandInModule:
    """Hooks as torch modules have them."""

    def __init__(self) -> None:
        self.before: list[Callable[..., None]] = []
        self.after: list[Callable[..., None]] = []

    def _register(self, hooks: list[Callable[..., None]], hook: Callable[..., None]) -> Any:
        hooks.append(hook)
        return SimpleNamespace(remove=lambda: hooks.remove(hook))

    def register_forward_pre_hook(self, hook: Callable[..., None]) -> Any:
        return self._register(self.before, hook)

    def register_forward_hook(self, hook: Callable[..., None]) -> Any:
        return self._register(self.after, hook)

    def __call__(self, work: Callable[[], None]) -> None:
        for hook in self.before:
            hook(self, ())
        work()
        for hook in self.after:
            hook(self, (), None)


class StandInModel(StandInModule):
    """Makes the tokens that it is given, one in a pass."""

    generation_config = SimpleNamespace(eos_token_id=[END, 99])

    def __init__(self, output: list[int]) -> None:
        super().__init__()
        self.vision = StandInModule()
        self.output = output
        self.passes = len(output)
        self.sequences = 1

    def generate(self, **arguments: Any) -> Tokens:
        for number in range(self.passes):
            self(lambda first=number == 0: self.vision(lambda: None) if first else None)  # type: ignore[misc]
        given = arguments["input_ids"].rows[0] if "input_ids" in arguments else []
        return Tokens([given + self.output] * self.sequences)


def recorded(folder: Path) -> dict[str, Any]:
    """The one run of a folder."""
    with duckdb.connect() as connection:
        cursor = connection.execute("SELECT * FROM read_parquet(?)", [str(folder / "*.parquet")])
        (row,) = cursor.fetchall()
        return dict(zip((column[0] for column in cursor.description or ()), row, strict=True))


@pytest.mark.parametrize(("output", "ends"), [([5, 6, END], True), ([5, 6, 7], False), ([99], True)])
def test_one_pass_is_the_prefill_and_each_further_one_a_step(output: list[int], ends: bool, tmp_path: Path) -> None:
    model = StandInModel(output)
    with Recorder(tmp_path, model="a model") as recorder:
        returned = record_generate(recorder, KEY, model, input_ids=Tokens([[3, 4, 5, 6]]))
    assert returned.rows == [[3, 4, 5, 6, *output]]
    run = recorded(tmp_path)
    assert run["output_tokens"] == len(output) == len(run["decode_steps_ms"]) + 1
    assert run["prompt_tokens"] == 4
    assert run["ends_with_eos"] == ends
    assert run["vision_ms"] == 0
    assert run["total_ms"] == pytest.approx(run["prefill_ms"] + run["decode_ms"], abs=1e-4)  # no gaps
    assert not model.before


def test_the_vision_tower_has_its_own_time(tmp_path: Path) -> None:
    model = StandInModel([5, END])
    with Recorder(tmp_path, model="a model") as recorder:
        record_generate(
            recorder,
            KEY,
            model,
            vision_tower=model.vision,
            prompt_tokens=40,
            vision_tokens=30,
            input_ids=Tokens([[3, 4]]),
        )
    run = recorded(tmp_path)
    assert 0 < run["vision_ms"] < run["prefill_ms"]
    assert (run["prompt_tokens"], run["vision_tokens"], run["text_tokens"]) == (40, 30, 10)
    assert run["total_ms"] == pytest.approx(run["prefill_ms"] + run["decode_ms"], abs=1e-4)
    assert not model.vision.before
    assert not model.vision.after


def test_without_input_ids_the_output_is_new_tokens_only(tmp_path: Path) -> None:
    model = StandInModel([5, 6])
    with Recorder(tmp_path, model="a model") as recorder:
        record_generate(recorder, KEY, model, prompt_tokens=12, inputs_embeds="…")
        with pytest.raises(ArgumentError, match="give prompt_tokens"):
            record_generate(recorder, KEY, model, inputs_embeds="…")
    assert (recorded(tmp_path)["prompt_tokens"], recorded(tmp_path)["output_tokens"]) == (12, 2)


def test_what_cannot_be_told_apart_is_refused_and_leaves_no_hooks(tmp_path: Path) -> None:
    with Recorder(tmp_path, model="a model") as recorder:
        for passes in (1, 2, 4):  # assisted decoding, a pass too many
            model = StandInModel([5, 6, 7])
            model.passes = passes
            with pytest.raises(ArgumentError, match=f"3 tokens in {passes} forward passes"):
                record_generate(recorder, KEY, model, input_ids=Tokens([[3, 4]]))
            assert not model.before
        model = StandInModel([5, 6, 7])
        model.sequences = 2
        with pytest.raises(ArgumentError, match="2 sequences"):
            record_generate(recorder, KEY, model, input_ids=Tokens([[3, 4]]))
        assert recorder.n_recorded == 0


def test_a_real_language_model(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.OlmoeConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_experts=4,
        num_experts_per_tok=2,
        pad_token_id=1,
        eos_token_id=None,
        bos_token_id=None,
    )
    model = transformers.OlmoeForCausalLM(config).eval()
    prompt = torch.tensor([[5, 6, 7, 8, 9]])
    options = {"input_ids": prompt, "attention_mask": torch.ones_like(prompt), "do_sample": False, "max_new_tokens": 6}
    with Recorder(tmp_path / "long", model="OLMoE") as recorder:
        output = record_generate(recorder, KEY, model, **options)
    assert torch.equal(output, model.generate(**options))
    run = recorded(tmp_path / "long")
    assert (run["prompt_tokens"], run["output_tokens"], run["ends_with_eos"]) == (5, 6, False)
    assert len(run["decode_steps_ms"]) == 5
    assert min(run["decode_steps_ms"]) > 0

    end = int(output[0, 7])  # the third new token is made the end, unless it came before
    with Recorder(tmp_path / "short", model="OLMoE") as recorder:
        output = record_generate(recorder, KEY, model, **options, eos_token_id=end, return_dict_in_generate=True)
    run = recorded(tmp_path / "short")
    assert run["output_tokens"] == output.sequences.shape[1] - 5 <= 3
    assert run["ends_with_eos"]


def test_a_real_vision_language_model(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    image_token = 49
    model = transformers.LlavaForConditionalGeneration(
        transformers.LlavaConfig(
            vision_config=transformers.CLIPVisionConfig(
                hidden_size=16,
                intermediate_size=16,
                num_hidden_layers=2,
                num_attention_heads=2,
                image_size=16,
                patch_size=8,
            ),
            text_config=transformers.LlamaConfig(
                vocab_size=50,
                hidden_size=32,
                intermediate_size=32,
                num_hidden_layers=2,
                num_attention_heads=2,
                pad_token_id=1,
                eos_token_id=None,
                bos_token_id=None,
            ),
            image_token_index=image_token,
        )
    ).eval()
    tower = next(module for name, module in model.named_modules() if name.endswith("vision_tower"))
    prompt = torch.tensor([[image_token] * 4 + [5, 6, 7]])
    with Recorder(tmp_path, model="LLaVA") as recorder:
        record_generate(
            recorder,
            KEY,
            model,
            vision_tower=tower,
            vision_tokens=4,
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            pixel_values=torch.rand(1, 3, 16, 16),
            do_sample=False,
            max_new_tokens=3,
        )
    run = recorded(tmp_path)
    assert 0 < run["vision_ms"] < run["prefill_ms"]
    assert (run["prompt_tokens"], run["vision_tokens"], run["text_tokens"]) == (7, 4, 3)
    assert (run["output_tokens"], len(run["decode_steps_ms"])) == (3, 2)
