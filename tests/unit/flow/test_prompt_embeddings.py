"""Folders of prompt embeddings, and loading one prompt's tensors."""

from __future__ import annotations

import json
import os
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from mmrl_core.errors import DataError
from mmrl_core.flow.embedding_shards import has_shard, start_folder, write_negative, write_shard
from mmrl_core.flow.embeddings import EmbeddingFolder, EmbeddingIndex, load_conditions, texts_digest

CAPTIONS = [f"prompt {n}" for n in range(7)]
INDEX = EmbeddingIndex(
    family="flux",
    model="/models/flux",
    model_fingerprint="f" * 8,
    dtype="bfloat16",
    max_text_tokens=None,
    negative_prompt="blurry",
    prompts=len(CAPTIONS),
    prompts_digest=texts_digest(CAPTIONS),
    shard_size=3,
)


def conditions(number: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(number)
    return {
        "prompt_embeds": torch.randn(5 + number % 2, 4, generator=generator).bfloat16(),
        "pooled": torch.randn(6, generator=generator).bfloat16(),
    }


def written(folder: Path, shards: range = range(3)) -> Path:
    start_folder(folder, INDEX, CAPTIONS, overwrite=False)
    for shard in shards:
        write_shard(folder, INDEX, shard, [conditions(n) for n in INDEX.shard_range(shard)])
    write_negative(folder, INDEX, conditions(99))
    return folder


def test_every_prompt_comes_back_as_it_was(tmp_path: Path) -> None:
    folder = EmbeddingFolder.open(written(tmp_path / "e"))
    assert folder.captions == tuple(CAPTIONS)
    assert folder.names == ("pooled", "prompt_embeds")
    assert [INDEX.shard_range(shard) for shard in range(INDEX.shards)] == [range(3), range(3, 6), range(6, 7)]
    for number in (6, 0, 4, 3):
        loaded = load_conditions(folder.references(number))
        expected = {**conditions(number), **{f"negative.{name}": t for name, t in conditions(99).items()}}
        assert set(loaded) == set(expected)
        for name, tensor in expected.items():
            assert loaded[name].dtype == torch.bfloat16
            assert torch.equal(loaded[name], tensor)
            assert len(pickle.dumps(loaded[name])) < 1500, "it drags its file along"


def test_the_files_are_what_the_docs_say(tmp_path: Path) -> None:
    folder = written(tmp_path / "e")
    assert sorted(path.name for path in folder.iterdir()) == [
        "index.json",
        "negative.safetensors",
        "prompts.jsonl",
        *(f"shard-0000{n}-of-00003.safetensors" for n in range(3)),
    ]
    with safe_open(folder / "shard-00001-of-00003.safetensors", framework="pt") as file:
        assert set(file.keys()) == {f"0000000{n}.{name}" for n in (3, 4, 5) for name in ("prompt_embeds", "pooled")}
    with safe_open(folder / "negative.safetensors", framework="pt") as file:
        assert set(file.keys()) == {"negative.prompt_embeds", "negative.pooled"}
    lines = [json.loads(line) for line in (folder / "prompts.jsonl").read_text().splitlines()]
    assert lines[4] == {"number": 4, "caption": "prompt 4", "shard": 1}
    index = json.loads((folder / "index.json").read_text())
    assert (index["version"], index["family"], index["dtype"], index["prompts"]) == (1, "flux", "bfloat16", 7)


def test_missing_files_are_named(tmp_path: Path) -> None:
    folder = written(tmp_path / "e", range(1, 2))
    (folder / "negative.safetensors").unlink()
    with pytest.raises(DataError, match=r"shard-00000-of-00003.*shard-00002-of-00003.*negative\.safetensors missing"):
        EmbeddingFolder.open(folder)
    assert [has_shard(folder, INDEX, n) for n in range(3)] == [False, True, False]
    with pytest.raises(DataError, match=r"no index\.json"):
        EmbeddingFolder.open(tmp_path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"dtype": "float32"}, ["the precision (dtype): 'bfloat16' -> 'float32'"]),
        ({"model_fingerprint": "other", "model": "/x"}, ["the encoders: of /models/flux -> of /x"]),
        ({"negative_prompt": ""}, ["negative_prompt): 'blurry' -> ''"]),
        ({"shard_size": 4, "max_text_tokens": 8}, ["shard_size): 3 -> 4", "max_text_tokens): None -> 8"]),
        ({"prompts_digest": texts_digest(CAPTIONS[::-1])}, ["the prompts: others"]),
    ],
)
def test_other_embeddings_are_not_mixed_in(tmp_path: Path, change: dict[str, Any], words: list[str]) -> None:
    folder = written(tmp_path / "e")
    captions = CAPTIONS[::-1] if "prompts_digest" in change else CAPTIONS
    other = replace(INDEX, **change)
    with pytest.raises(DataError) as caught:
        start_folder(folder, other, captions, overwrite=False)
    for word in [*words, "--overwrite"]:
        assert word in str(caught.value)
    start_folder(folder, INDEX, CAPTIONS, overwrite=False)
    EmbeddingFolder.open(folder)
    start_folder(folder, other, captions, overwrite=True)
    assert sorted(path.name for path in folder.iterdir()) == ["index.json", "prompts.jsonl"]


def test_the_place_of_the_model_does_not_matter(tmp_path: Path) -> None:
    folder = written(tmp_path / "e", range(0))
    start_folder(folder, replace(INDEX, model="/mnt/flux"), CAPTIONS, overwrite=False)
    assert json.loads((folder / "index.json").read_text())["model"] == "/models/flux"


def test_a_shard_of_other_embeddings_is_noticed(tmp_path: Path) -> None:
    folder = written(tmp_path / "e", range(2))
    other = replace(INDEX, dtype="float16")
    write_shard(folder, other, 2, [conditions(6)])
    with pytest.raises(DataError, match=r"shard-00002-of-00003\.safetensors: belongs to other embeddings"):
        has_shard(folder, INDEX, 2)
    with pytest.raises(DataError, match="belongs to other embeddings"):
        EmbeddingFolder.open(folder)


def test_a_torn_shard_is_noticed(tmp_path: Path) -> None:
    folder = written(tmp_path / "e")
    shard = folder / "shard-00001-of-00003.safetensors"
    shard.write_bytes(shard.read_bytes()[:-7])
    with pytest.raises(DataError, match=r"shard-00001-of-00003\.safetensors: not a whole safetensors file"):
        EmbeddingFolder.open(folder)


def test_changed_prompts_are_noticed(tmp_path: Path) -> None:
    folder = written(tmp_path / "e")
    prompts = folder / "prompts.jsonl"
    prompts.write_text(prompts.read_text().replace("prompt 4", "prompt four"))
    with pytest.raises(DataError, match=r"prompts\.jsonl: these are not the prompts"):
        EmbeddingFolder.open(folder)


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(DataError, match=r"holds 'thesis\.tex' and no index\.json"):
            start_folder(tmp_path, INDEX, CAPTIONS, overwrite=overwrite)
    assert (tmp_path / "thesis.tex").exists()


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    import socket

    folder = written(tmp_path / "e")
    name = ".shard-00002-of-00003.safetensors.partial-{}-{}"
    gone = folder / name.format(socket.gethostname(), 2**22 + 7)  # above Linux's largest process id
    alive = folder / name.format(socket.gethostname(), os.getpid())
    elsewhere = folder / name.format("another-host", 7)
    for path in (gone, alive, elsewhere):
        path.write_bytes(b"half")
    start_folder(folder, INDEX, CAPTIONS, overwrite=False)
    assert [path.exists() for path in (gone, alive, elsewhere)] == [False, True, True]


# ---------------------------------------------------------------------------------------------------------------- files


def test_torch_files(tmp_path: Path) -> None:
    whole = torch.randn(100, 8, 4)
    torch.save(whole[3], tmp_path / "a.pt")  # a view: the file holds all of it
    loaded = load_conditions({"prompt_embeds": str(tmp_path / "a.pt")})["prompt_embeds"]
    assert torch.equal(loaded, whole[3])
    assert loaded.untyped_storage().nbytes() == 8 * 4 * 4


class Harmful:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.target),)


def test_bad_embeddings_name_condition_file_and_cause(tmp_path: Path) -> None:
    folder = written(tmp_path / "e")
    shard = folder / "shard-00000-of-00003.safetensors"
    torch.save({"a": torch.ones(2)}, tmp_path / "dict.pt")
    torch.save(Harmful(tmp_path / "harmed"), tmp_path / "harmful.pt")
    torch.save(torch.tensor([[1.0, float("nan")]]), tmp_path / "nan.pt")
    torch.save(torch.zeros(0, 4), tmp_path / "empty.pt")
    (tmp_path / "torn.pt").write_bytes((tmp_path / "nan.pt").read_bytes()[:50])
    cases = {
        f"{shard}#00000004.pooled": "no tensor '00000004.pooled'",
        f"{folder}/gone.safetensors#00000004.pooled": "No such file",
        f"{tmp_path}/gone.pt": "No such file",
        f"{tmp_path}/dict.pt": "holds a dict, not one tensor",
        f"{tmp_path}/harmful.pt": "weights_only",
        f"{tmp_path}/nan.pt": r"shape \[1, 2\] holds NaN",
        f"{tmp_path}/empty.pt": r"empty tensor of shape \[0, 4\]",
        f"{tmp_path}/torn.pt": "weights_only",
        f"{folder}/index.json": "neither FILE.safetensors#KEY nor FILE.pt",
        f"{shard}": "neither",
    }
    for place, words in cases.items():
        with pytest.raises(DataError, match=words) as caught:
            load_conditions({"pooled": place})
        assert "embedding 'pooled'" in str(caught.value)
        assert place.partition("#")[0] in str(caught.value)
    assert not (tmp_path / "harmed").exists()
    with pytest.raises(DataError, match="must map"):
        load_conditions({})


def test_a_file_that_was_replaced_is_read_again(tmp_path: Path) -> None:
    folder = written(tmp_path / "e")
    reference = {"pooled": EmbeddingFolder.open(folder).references(1)["pooled"]}
    before = load_conditions(reference)["pooled"]
    write_shard(folder, INDEX, 0, [{name: t + 1 for name, t in conditions(n).items()} for n in range(3)])
    os.utime(folder / INDEX.shard_name(0), ns=(1, 1))
    assert torch.equal(load_conditions(reference)["pooled"], before + 1)


def test_more_files_than_stay_open(tmp_path: Path) -> None:
    index = replace(INDEX, prompts=30, shard_size=1, prompts_digest=texts_digest([str(n) for n in range(30)]))
    start_folder(tmp_path, index, [str(n) for n in range(30)], overwrite=False)
    for n in range(30):
        write_shard(tmp_path, index, n, [conditions(n)])
    write_negative(tmp_path, index, conditions(99))
    folder = EmbeddingFolder.open(tmp_path)
    for n in [*range(30), 3, 29]:
        assert torch.equal(load_conditions(folder.references(n))["pooled"], conditions(n)["pooled"])
