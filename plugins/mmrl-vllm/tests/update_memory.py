"""Run as a program: anonymous memory while new weights stream into a running engine. Prints one JSON object.

python update_memory.py FOLDER
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from mmrl_core.contracts import Bucket
from mmrl_core.testing.stage import Rank
from mmrl_core.testing.tiny import byte_tokenizer, tiny_recipe

MIB = 1 << 20
BUCKET = 16 * MIB
UPDATES = 4


def anonymous() -> int:
    """Bytes of this process's memory that no file backs."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no RssAnon: this is not Linux")


class Watch:
    """The most anonymous memory within a block."""

    def __enter__(self) -> Watch:
        self.peak, self._stop = anonymous(), threading.Event()
        self._thread = threading.Thread(target=self._look)
        self._thread.start()
        return self

    def _look(self) -> None:
        while not self._stop.is_set():
            self.peak = max(self.peak, anonymous())
            time.sleep(0.0005)

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


def stream(shapes: list[tuple[str, torch.Size]], seed: int) -> Iterator[Bucket]:
    """Fresh tensors in buckets of BUCKET bytes or one tensor, as a sharded backend gathers them."""
    generator = torch.Generator().manual_seed(seed)
    bucket, size = [], 0
    for name, shape in shapes:
        tensor = torch.empty(shape).normal_(0, 0.02, generator=generator)
        bucket.append((name, tensor))
        size += tensor.nbytes
        del tensor
        if size >= BUCKET:
            yield bucket
            bucket, size = [], 0
    if bucket:
        yield bucket


def main(folder: Path) -> None:
    tokenizer = byte_tokenizer()
    config = LlamaConfig(
        vocab_size=24_576,
        hidden_size=512,
        intermediate_size=2048,
        num_hidden_layers=16,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = LlamaForCausalLM(config)
    shapes = [(name, parameter.shape) for name, parameter in model.named_parameters()]
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    del model
    recipe = tiny_recipe(folder / "model", folder / "run", rollout={"name": "vllm", "kv_cache_mb": 64})
    with Rank.join("cpu", folder) as rank:
        engine = rank.cast(recipe).engine(None)
        engine.update_weights(stream(shapes, 0), 0)  # what is allocated once
        peaks, kept = [], [anonymous()]
        for version in range(1, UPDATES + 1):
            before = anonymous()
            with Watch() as watch:
                engine.update_weights(stream(shapes, version), version)
            peaks.append(watch.peak - before)
            kept.append(anonymous())
        engine.close()
    sizes = [shape.numel() * 4 for _, shape in shapes]
    print(json.dumps({"model": sum(sizes), "largest": max(sizes), "bucket": BUCKET, "peaks": peaks, "kept": kept}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
