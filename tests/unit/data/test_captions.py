"""The prompt source `embedded_captions`: the videos2caption.json layouts, and our own folders."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mmrl_core.data.captions import EmbeddedCaptionsSource
from mmrl_core.data.options import EmbeddedCaptionsOptions
from mmrl_core.errors import DataError
from mmrl_core.flow.embeddings import load_conditions

FLUX = {
    "prompt_embed_path": ("prompt_embed", (6, 8)),
    "pooled_prompt_embeds_path": ("pooled_prompt_embeds", (4,)),
    "text_ids": ("text_ids", (3,)),
}
WAN = {
    "prompt_embed_path": ("prompt_embed", (6, 8)),
    "negative_prompt_embeds_path": ("negative_prompt_embeds", (6, 8)),
}


def layout(folder: Path, keys: dict[str, tuple[str, tuple[int, ...]]], count: int = 12) -> Path:
    """The files as the preprocessing scripts of DanceGRPO leave them."""
    rows: list[dict[str, Any]] = []
    for number in range(count):
        row: dict[str, Any] = {"caption": f"caption {number}"}
        for key, (name, shape) in keys.items():
            (folder / name).mkdir(parents=True, exist_ok=True)
            torch.save(torch.full(shape, number + 0.5, dtype=torch.bfloat16), folder / name / f"{number}.pt")
            row[key] = f"{number}.pt"
        rows.append(row)
    path = folder / "videos2caption.json"
    path.write_text(json.dumps(rows, indent=4))
    return path


def opened(path: Path | str, seed: int = 0, **options: Any) -> EmbeddedCaptionsSource:
    source = EmbeddedCaptionsSource(EmbeddedCaptionsOptions(path=str(path), **options), seed)
    source.prepare()
    return source


def test_flux_layout(tmp_path: Path) -> None:
    source = opened(layout(tmp_path, FLUX))
    assert len(source) == 12
    seen = set()
    for index in range(12):
        prompt = source.prompt(index)
        number = int((prompt.text or "").split()[1])
        seen.add(number)
        loaded = load_conditions(prompt.columns["embeddings"])
        assert {name: tuple(t.shape) for name, t in loaded.items()} == {
            "prompt_embeds": (6, 8),
            "pooled_prompt_embeds": (4,),
        }
        assert all(bool((tensor == number + 0.5).all()) for tensor in loaded.values())
        assert prompt.origin == f"{tmp_path}/videos2caption.json: row {number}"
    assert seen == set(range(12))


def test_wan_layout_has_a_negative_prompt_and_nothing_pooled(tmp_path: Path) -> None:
    layout(tmp_path, WAN)
    prompt = opened(tmp_path, shuffle=False).prompt(15)  # the folder is as good as the file; the second epoch
    assert prompt.text == "caption 3"
    assert set(load_conditions(prompt.columns["embeddings"])) == {"prompt_embeds", "negative.prompt_embeds"}


def test_skip_and_limit_choose_rows_before_shuffling(tmp_path: Path) -> None:
    path = layout(tmp_path, FLUX)
    held_out = opened(path, limit=4, shuffle=False)
    train = opened(path, skip=4)
    assert [held_out.prompt(i).text for i in range(4)] == [f"caption {n}" for n in range(4)]
    assert {train.prompt(i).text for i in range(8)} == {f"caption {n}" for n in range(4, 12)}
    with pytest.raises(DataError, match="skip 12 leaves nothing of 12 prompts"):
        opened(path, skip=12)


def test_digest_follows_the_embeddings(tmp_path: Path) -> None:
    path = layout(tmp_path / "a", FLUX)
    before = opened(path).digest()
    assert opened(layout(tmp_path / "b", FLUX)).digest() == before, "the place matters"
    torch.save(torch.zeros(60, 8), tmp_path / "a" / "prompt_embed" / "5.pt")
    assert opened(path).digest() != before


def rows_of(path: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads(path.read_text())
    return rows


def without_caption(path: Path) -> None:
    path.write_text(json.dumps([{**row, "caption": " "} if n == 7 else row for n, row in enumerate(rows_of(path))]))


def without_pooled(path: Path) -> None:
    rows = rows_of(path)
    del rows[7]["pooled_prompt_embeds_path"]
    path.write_text(json.dumps(rows))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda p: (p.parent / "prompt_embed" / "7.pt").unlink(), ["row 7", "prompt_embed/7.pt", "No such file"]),
        (without_caption, ["row 7", "'caption' must be a text"]),
        (without_pooled, ["row 7", "no column 'pooled_prompt_embeds_path'"]),
        (lambda p: (p.parent / "prompt_embed" / "0.pt").write_bytes(b"PK"), ["row 0", "prompt_embeds", "weights_only"]),
        (lambda p: p.write_text("[]"), ["no prompts"]),
        (lambda p: p.write_text("[{]"), ["videos2caption.json:1"]),
        (lambda p: p.write_text('[{"caption": "a"}]'), ["row 0", "no column 'prompt_embed_path'"]),
        (lambda p: p.write_text('[{"caption": "a", "prompt_embed_path": 3}]'), ["row 0", "must be the name of a .pt"]),
        (lambda p: p.unlink(), ["no such file"]),
    ],
)
def test_what_is_wrong_is_named_before_the_first_step(
    tmp_path: Path, damage: Callable[[Path], Any], words: list[str]
) -> None:
    path = layout(tmp_path, FLUX)
    damage(path)
    with pytest.raises(DataError) as caught:
        opened(path)
    for word in words:
        assert word in str(caught.value)


def test_a_folder_without_anything(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no index\.json"):
        opened(tmp_path)
