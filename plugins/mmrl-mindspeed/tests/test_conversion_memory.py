"""A conversion holds little of the model: anonymous memory peaks under two shards of the output and 300 MB."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from mmrl_mindspeed import layout
from mmrl_mindspeed.architecture import architecture
from safetensors.torch import save_file

CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 16000,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 20,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}
"""700 MB in bfloat16."""


def write_large_model(folder: Path) -> int:
    """Several files; returns the number of bytes."""
    arch = architecture(CONFIG, "")
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    weight_map, total = {}, 0
    pattern = torch.arange(1 << 20, dtype=torch.int32).to(torch.int16)
    for i, weight in enumerate(layout.weights(arch, pipeline_parallel=1)):
        tensors = {}
        for name in weight.sources:
            shape = layout.source_shape(name, arch)
            size = torch.Size(shape).numel()
            tensors[name] = pattern.repeat(size // len(pattern) + 1)[:size].view(torch.bfloat16).reshape(shape).clone()
        file = f"model-{i:05d}.safetensors"
        save_file(tensors, folder / file)
        total += sum(t.nbytes for t in tensors.values())
        weight_map.update(dict.fromkeys(tensors, file))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return total


def peak_of(*arguments: str) -> int:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "conversion_memory", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return int(done.stdout.splitlines()[-1])


def test_anonymous_memory_stays_below_two_shards_and_300_mb(tmp_path: Path) -> None:
    hf, mcore, dcp, back = (str(tmp_path / name) for name in ("hf", "mcore", "dcp", "back"))
    total = write_large_model(Path(hf))
    shard = total / 8
    limit = 2 * shard + 300e6
    assert limit < total, "a conversion that holds the model would pass"
    peaks = {
        "mcore": peak_of(hf, mcore, "--to", "mcore", "--tensor-parallel", "4", "--pipeline-parallel", "2"),
        "dcp": peak_of(mcore, dcp, "--to", "dcp"),
        "hf": peak_of(dcp, back, "--to", "hf", "--shard-gb", str(shard / 2**30)),
    }
    assert all(peak < limit for peak in peaks.values()), (peaks, limit)
