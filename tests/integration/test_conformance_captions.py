"""The conformance kit on prompts with embeddings: DanceGRPO's layouts and our own folders."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from mmrl_core.flow.embedding_shards import start_folder, write_negative, write_shard
from mmrl_core.flow.embeddings import EmbeddingIndex, texts_digest
from mmrl_core.testing.prompt_sources import PromptSourceConformance

TEXTS = [f"a picture of {n} dogs" for n in range(13)]


def caption_file(folder: Path, *parts: str) -> str:
    """A videos2caption.json whose rows name a file in each of the folders `parts`."""
    keys = {"prompt_embed": "prompt_embed_path"}
    for part in parts:
        (folder / part).mkdir()
        for number in range(len(TEXTS)):
            torch.save(torch.full((4, 8), float(number)), folder / part / f"{number}.pt")
    rows = [
        {"caption": text, **{keys.get(part, f"{part}_path"): f"{number}.pt" for part in parts}}
        for number, text in enumerate(TEXTS)
    ]
    path = folder / "videos2caption.json"
    path.write_text(json.dumps(rows))
    return str(path)


class TestFluxCaptions(PromptSourceConformance):
    component = "embedded_captions"

    @classmethod
    def make_options(cls, folder: Path) -> Mapping[str, Any]:
        return {"path": caption_file(folder, "prompt_embed", "pooled_prompt_embeds"), "skip": 1}


class TestWanCaptionsInFileOrder(PromptSourceConformance):
    component = "embedded_captions"
    shuffles = False

    @classmethod
    def make_options(cls, folder: Path) -> Mapping[str, Any]:
        return {"path": caption_file(folder, "prompt_embed", "negative_prompt_embeds"), "shuffle": False}


class TestOwnFolder(PromptSourceConformance):
    component = "embedded_captions"

    @classmethod
    def make_options(cls, folder: Path) -> Mapping[str, Any]:
        index = EmbeddingIndex(
            family="wan",
            model="wan",
            model_fingerprint="",
            dtype="float32",
            max_text_tokens=None,
            negative_prompt="",
            prompts=len(TEXTS),
            prompts_digest=texts_digest(TEXTS),
            shard_size=5,
        )
        start_folder(folder / "embeddings", index, TEXTS, overwrite=False)
        for shard in range(index.shards):
            made = [{"prompt_embeds": torch.full((4, 8), float(number))} for number in index.shard_range(shard)]
            write_shard(folder / "embeddings", index, shard, made)
        write_negative(folder / "embeddings", index, {"prompt_embeds": torch.zeros(4, 8)})
        return {"path": str(folder / "embeddings")}
