"""Against a stand-in for the package, so that it runs everywhere; and against the real one where it is installed."""

import sys
import types
from dataclasses import dataclass
from random import Random
from typing import Any

import pytest
from pydantic import ValidationError

from mmrl_core.data import probes
from mmrl_core.data.options import ReasoningGymOptions
from mmrl_core.data.reasoning_gym_source import ReasoningGymSource
from mmrl_core.errors import DataError, PluginError


@dataclass
class Config:
    terms: int = 2
    seed: int | None = None
    size: int = 500

    def validate(self) -> None:
        assert self.terms > 0, "terms must be positive"


class Sums:
    def __init__(self, config: Config) -> None:
        self.config = config

    def __getitem__(self, number: int) -> dict[str, Any]:
        assert self.config.seed is not None
        if self.config.terms == 13:
            raise IndexError("unlucky")
        if self.config.terms == 14:
            return {"question": None}
        rng = Random(self.config.seed + number)
        terms = [rng.randint(0, 9) for _ in range(self.config.terms)]
        return {
            "question": f"{' + '.join(map(str, terms))} = ?",
            "answer": str(sum(terms)),
            "metadata": {"source_dataset": "sums", "source_index": number},
        }


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch) -> None:
    """`reasoning_gym.factory` with one dataset, made and refused as the real one does."""
    factory = types.ModuleType("reasoning_gym.factory")

    def create_dataset(name: str, **config: Any) -> Sums:
        made = Config(**config)
        made.validate()
        return Sums(made)

    factory.DATASETS = {"sums": (Sums, Config)}  # type: ignore[attr-defined]
    factory.create_dataset = create_dataset  # type: ignore[attr-defined]
    parent = types.ModuleType("reasoning_gym")
    parent.factory = factory  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "reasoning_gym", parent)
    monkeypatch.setitem(sys.modules, "reasoning_gym.factory", factory)


def source(seed: int = 0, **options: Any) -> ReasoningGymSource:
    made = ReasoningGymSource(ReasoningGymOptions.model_validate({"dataset": "sums", "size": 20, **options}), seed)
    made.prepare()
    return made


@pytest.mark.usefixtures("package")
def test_prompts_carry_the_entry() -> None:
    made = source(config={"terms": 3}, dataset_seed=100, system="Think.", question_template="{question} Go.")
    prompt = made.prompt(0)
    entry = prompt.columns["entry"]
    assert prompt.messages == (
        {"role": "system", "content": "Think."},
        {"role": "user", "content": entry["question"] + " Go."},
    )
    assert prompt.answer == entry["answer"] == str(sum(int(w) for w in entry["question"].split() if w.isdigit()))
    assert prompt.columns["dataset"] == entry["metadata"]["source_dataset"] == "sums"
    number = entry["metadata"]["source_index"]
    assert prompt.origin == f"reasoning_gym: sums, seed 100, question {number}"


@pytest.mark.usefixtures("package")
def test_every_question_once_an_epoch_and_resumable() -> None:
    made, again = source(seed=1), source(seed=1)
    numbers = [made.prompt(i).columns["entry"]["metadata"]["source_index"] for i in range(40)]
    assert sorted(numbers[:20]) == sorted(numbers[20:]) == list(range(20))
    assert [again.prompt(i) for i in range(25, 35)] == [made.prompt(i) for i in range(25, 35)]
    assert made.digest() == again.digest()
    digests = {made.digest(), source(seed=2).digest(), source(1, dataset_seed=1).digest(), source(1, size=21).digest()}
    assert len(digests) == 4


@pytest.mark.usefixtures("package")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dataset": "sum"}, r"no dataset called 'sum'. Did you mean 'sums'\? Known: sums"),
        ({"config": {"term": 3}}, "refuses config {'term': 3}: .*unexpected keyword argument 'term'"),
        ({"config": {"terms": 0}}, "refuses config .*terms must be positive"),
        ({"config": {"terms": 13}}, "sums, seed 0, question 0 cannot be made: IndexError: unlucky"),
        ({"config": {"terms": 14}}, "no question and answer"),
    ],
)
def test_bad_tasks(options: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        source(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"config": {"size": 3}}, "write it as the option size"),
        ({"config": {"seed": 3}}, "write it as the option dataset_seed"),
        ({"question_template": "x"}, "must contain {question}"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        ReasoningGymOptions.model_validate({"dataset": "sums", **options})


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(PluginError, match=r"pip install 'mmrl-core\[reasoning-gym\]'"):
        source()
    monkeypatch.setattr(probes.importlib.util, "find_spec", lambda name: None)
    probe = probes.reasoning_gym()
    assert not probe.available
    assert probe.cure == "pip install 'mmrl-core[reasoning-gym]'"


def test_the_probe_does_not_import_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "reasoning_gym", raising=False)
    probes.reasoning_gym()
    assert "reasoning_gym" not in sys.modules


def test_the_real_package() -> None:
    reasoning_gym = pytest.importorskip("reasoning_gym")
    made = source(dataset="chain_sum", config={"max_terms": 3}, size=8)
    score = reasoning_gym.get_score_answer_fn("chain_sum")
    for index in range(8):
        prompt = made.prompt(index)
        assert score(prompt.answer, prompt.columns["entry"]) == 1.0
    with pytest.raises(DataError, match="refuses config"):
        source(dataset="chain_sum", config={"min_terms": 9})
