"""`mmrl data embed` on tiny pipelines: the tensors of diffusers, killed and resumed, shared by processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mmrl_core.cli import main as cli
from mmrl_core.data.captions import EmbeddedCaptionsSource
from mmrl_core.data.options import EmbeddedCaptionsOptions
from mmrl_core.errors import DataError
from mmrl_core.flow.embeddings import EmbeddingFolder, load_conditions
from mmrl_core.launch.embed_prompts import EmbedJob, default_part, embed_prompts
from mmrl_core.policies.flow.options import FlowOptions, FlowSampling
from mmrl_core.policies.flow.policy import FlowPolicy
from mmrl_core.recipe import ModelSpec
from mmrl_core.testing.tiny_pipelines import tiny_pipeline

TEXTS = ["a red dog on a beach", "ein Bär", "cats, many of them, all asleep", "x", "a red dog"]


@pytest.fixture(scope="module")
def flux(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_pipeline(tmp_path_factory.mktemp("pipelines") / "flux", "flux")


def prompts_file(folder: Path, texts: list[str]) -> str:
    path = folder / "prompts.txt"
    path.write_text("\n".join(texts), encoding="utf-8")
    return str(path)


def job(folder: Path, model: Path, texts: list[str] = TEXTS, **changes: Any) -> EmbedJob:
    values: dict[str, Any] = {"dtype": "float32", "max_text_tokens": 24, "shard_size": 2, "device": "cpu", **changes}
    return EmbedJob(prompts=prompts_file(folder, texts), output=folder / "out", model=str(model), **values)


def test_flux_embeddings_are_those_of_diffusers(tmp_path: Path, flux: Path) -> None:
    from diffusers import FluxPipeline

    seen: list[tuple[int, int]] = []
    summary = embed_prompts(
        job(tmp_path, flux, negative_prompt="blurry", batch_size=3), lambda *counts: seen.append(counts)
    )
    assert (summary.prompts, summary.embedded, summary.found, summary.shards) == (5, 5, 0, 3)
    assert (summary.missing, summary.family, summary.cut, summary.first_cut) == ((), "flux", 0, None)
    assert seen == [(0, 5), (2, 5), (4, 5), (5, 5)]
    folder = EmbeddingFolder.open(tmp_path / "out")
    assert folder.captions == tuple(TEXTS)
    pipeline = FluxPipeline.from_pretrained(flux)
    for number, text in enumerate(TEXTS):
        loaded = load_conditions(folder.references(number))
        for name, words in (("", text), ("negative.", "blurry")):
            with torch.no_grad():
                embeds, pooled, _ = pipeline.encode_prompt(prompt=words, prompt_2=words, max_sequence_length=24)
            torch.testing.assert_close(loaded[f"{name}prompt_embeds"], embeds[0], rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(loaded[f"{name}pooled_prompt_embeds"], pooled[0], rtol=1e-5, atol=1e-5)


def test_wan_embeddings_are_those_of_diffusers(tmp_path: Path) -> None:
    from diffusers import WanPipeline

    wan = tiny_pipeline(tmp_path / "wan", "wan21")
    embed_prompts(job(tmp_path, wan, texts=TEXTS[:2], negative_prompt="blurry"))
    folder = EmbeddingFolder.open(tmp_path / "out")
    pipeline = WanPipeline.from_pretrained(wan)
    for number, text in enumerate(TEXTS[:2]):
        loaded = load_conditions(folder.references(number))
        assert set(loaded) == {"prompt_embeds", "negative.prompt_embeds"}
        with torch.no_grad():
            embeds, negative = pipeline.encode_prompt(
                prompt=text, negative_prompt="blurry", do_classifier_free_guidance=True, max_sequence_length=24
            )
        torch.testing.assert_close(loaded["prompt_embeds"], embeds[0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(loaded["negative.prompt_embeds"], negative[0], rtol=1e-5, atol=1e-5)


def shards(folder: Path) -> dict[str, tuple[int, int]]:
    """Inode and time of every shard: a file that was written again has others."""
    return {
        path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in sorted(folder.glob("shard-*.safetensors"))
    }


def test_a_killed_command_goes_on(tmp_path: Path, flux: Path) -> None:
    texts = [f"prompt number {n}" for n in range(300)]
    command = [sys.executable, "-m", "mmrl_core.cli.main", "data", "embed", prompts_file(tmp_path, texts), "out"]
    command += ["--model", str(flux), "--device", "cpu", "--max-text-tokens", "24", "--shard-size", "1"]
    out = tmp_path / "out"
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    until = time.monotonic() + 120
    while len(shards(out)) < 3 and process.poll() is None and time.monotonic() < until:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    _, said = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL, said.decode()
    before = shards(out)
    assert 3 <= len(before) < 300, "it was not in the middle"
    with pytest.raises(DataError, match=r"not complete.*shard-00299-of-00300\.safetensors|not complete.* more"):
        EmbeddingFolder.open(out)

    (out / ".shard-00250-of-00300.safetensors.partial-elsewhere-1").write_bytes(b"half")
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    assert f"{300 - len(before)} prompts embedded" in done.stdout
    assert f"{len(before)} there before" in done.stdout
    after = shards(out)
    assert len(after) == 300
    assert {name: after[name] for name in before} == before, "a finished shard was computed again"
    assert EmbeddingFolder.open(out).captions == tuple(texts)

    once_more = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=240, check=False)
    assert "0 prompts embedded" in once_more.stdout
    assert shards(out) == after


def test_processes_share_the_work(tmp_path: Path, flux: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = embed_prompts(job(tmp_path, flux, shard_size=1, part=(1, 2)))
    assert (first.embedded, first.missing) == (2, tuple(f"shard-0000{n}-of-00005.safetensors" for n in (0, 2, 4)))
    index = (tmp_path / "out" / "index.json").read_bytes()
    before = shards(tmp_path / "out")
    second = embed_prompts(job(tmp_path, flux, shard_size=1, part=(0, 2)))
    assert (second.embedded, second.missing) == (3, ())
    assert (tmp_path / "out" / "index.json").read_bytes() == index
    after = shards(tmp_path / "out")
    assert {name: after[name] for name in before} == before
    assert EmbeddingFolder.open(tmp_path / "out").captions == tuple(TEXTS)
    more = embed_prompts(job(tmp_path, flux, shard_size=1, part=(6, 9)))
    assert (more.embedded, more.found, more.missing) == (0, 0, ())
    assert default_part() == (0, 1)
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert default_part() == (2, 4)


def test_prompts_come_from_tables_too(tmp_path: Path, flux: Path) -> None:
    rows = [{"text": text, "other": 1} for text in TEXTS]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    made = EmbedJob(
        prompts=str(tmp_path / "rows.jsonl"), column="text", output=tmp_path / "out", model=str(flux), device="cpu"
    )
    assert embed_prompts(made).embedded == 5
    loaded = load_conditions(EmbeddingFolder.open(tmp_path / "out").references(2))
    assert loaded["prompt_embeds"].shape[0] == 512
    assert loaded["prompt_embeds"].dtype == torch.bfloat16


def test_cut_prompts_are_counted_and_said_once(
    tmp_path: Path, flux: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    long = "two dogs and three cats in the garden of a house"
    file = prompts_file(tmp_path, ["x", f"{long} one", "y", f"{long} two", f"{long} three"])
    command = ["data", "embed", file, str(tmp_path / "out"), "--model", str(flux), "--max-text-tokens", "8"]
    with caplog.at_level("WARNING", logger="mmrl.model"):
        assert cli.main([*command, "--batch-size", "1", "--device", "cpu"]) == 0
    assert len([message for message in caplog.messages if "is cut" in message]) == 1
    said = "3 prompts were cut to 8 tokens (--max-text-tokens); the first is "
    assert f"{said}{file}:2\n" in capsys.readouterr().out


@pytest.mark.parametrize("named", [None, "blurry", "", "ugly"])
def test_a_recipe_may_name_the_stored_negative_prompt_and_no_other(
    tmp_path: Path, flux: Path, named: str | None
) -> None:
    embed_prompts(job(tmp_path, flux, texts=TEXTS[:2], negative_prompt="blurry"))
    source = EmbeddedCaptionsSource(EmbeddedCaptionsOptions(path=str(tmp_path / "out"), shuffle=False), seed=0)
    source.prepare()
    policy = FlowPolicy(FlowOptions(negative_prompt=named), ModelSpec(path=str(flux)), FlowSampling(cfg_scale=2.0))
    if named in (None, "blurry"):
        first, second = (policy.encode(source.prompt(number)) for number in range(2))
        torch.testing.assert_close(first, load_conditions(EmbeddingFolder.open(tmp_path / "out").references(0)))
        name = "negative.prompt_embeds"
        assert first[name] is second[name], "8 MB for FLUX, once for all prompts"
        return
    with pytest.raises(
        DataError, match=rf"prompt 0: model\.policy\.negative_prompt is '{named}', but .* 'blurry'\. Leave"
    ):
        policy.encode(source.prompt(0))
    unknown = replace(source.prompt(0), columns={"embeddings": source.prompt(0).columns["embeddings"]})
    with pytest.raises(DataError, match="one whose text they do not say"):
        policy.encode(unknown)


def test_what_is_wrong_is_said_plainly(
    tmp_path: Path, flux: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    embed_prompts(job(tmp_path, flux))
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a"}\n{"prompt": " "}\n')
    (tmp_path / "chat.jsonl").write_text('{"prompt": [{"role": "user", "content": "a"}]}\n')
    (tmp_path / "prompts.csv").write_text("a\n")
    (tmp_path / "fewer.txt").write_text("\n".join(TEXTS[:4]))
    (tmp_path / "empty").mkdir()
    same = ["--dtype", "float32", "--max-text-tokens", "24", "--shard-size", "2", "--device", "cpu"]
    before = shards(tmp_path / "out")
    for arguments, words in (
        (["prompts.txt", "out", "--dtype", "bfloat16", *same[2:]], ["the precision (dtype): 'float32' -> 'bfloat16'"]),
        (["fewer.txt", "out", *same], ["(prompts): 5 -> 4", "the prompts: others"]),
        (["rows.jsonl", "new"], ["rows.jsonl:2", "an empty text"]),
        (["chat.jsonl", "new"], ["chat.jsonl:1", "of type list"]),
        (["rows.jsonl", "new", "--column", "promt"], ["no column 'promt'", "Did you mean 'prompt'?"]),
        (["prompts.csv", "new"], [".txt (one a line), .parquet"]),
        (["prompts.txt", "new", "--device", "tpu"], ["no device called 'tpu'"]),
        (["prompts.txt", "new", "--family", "wan"], ["FluxTransformer2DModel", "WanTransformer3DModel"]),
        (["prompts.txt", "out", "--shard", "0/2", "--overwrite"], ["Remove OUTPUT first"]),
        (["prompts.txt", "new", "--model", "empty"], ["model_index.json"]),
    ):
        given = ["--model", str(flux)] if "--model" not in arguments else []
        assert cli.main(["data", "embed", *arguments, *given]) in (1, 2)
        said = capsys.readouterr().err
        for word in words:
            assert word in said, (arguments, said)
        assert "Traceback" not in said
    assert shards(tmp_path / "out") == before
    assert not (tmp_path / "new").exists()
    for wrong in ("2/2", "a/b", "1"):
        with pytest.raises(SystemExit):
            cli.main(["data", "embed", "prompts.txt", "new", "--model", "m", "--shard", wrong])


def test_another_models_encoders_are_noticed(tmp_path: Path, flux: Path) -> None:
    moved = tmp_path / "moved"
    os.symlink(flux, moved)
    embed_prompts(job(tmp_path, flux))
    assert embed_prompts(job(tmp_path, moved)).found == 5
    other = tiny_pipeline(tmp_path / "other", "flux")
    config = other / "text_encoder_2" / "config.json"
    config.write_text(config.read_text().replace("{", '{"dense_act_fn": "gelu", ', 1))
    with pytest.raises(DataError, match=r"the encoders: of .*flux -> of .*other"):
        embed_prompts(job(tmp_path, other))
