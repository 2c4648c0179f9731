"""Weight formats: what is recognised, read and written, what is refused, and that nothing half-written remains."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch import Tensor

from mmrl_core.checkpoint import conversion
from mmrl_core.checkpoint.conversion import Conversion, convert
from mmrl_core.checkpoint.dcp_format import DcpFormat
from mmrl_core.checkpoint.format_options import HuggingFaceOptions
from mmrl_core.checkpoint.formats import detect_format, open_weights
from mmrl_core.checkpoint.hf_format import HuggingFaceFormat
from mmrl_core.checkpoint.initial_weights import load_initial
from mmrl_core.checkpoint.matching import Wanted
from mmrl_core.checkpoint.model_files import wanted_by
from mmrl_core.cli.main import main
from mmrl_core.contracts import WeightSource
from mmrl_core.errors import CheckpointError, ModelError, PluginError
from mmrl_core.testing.tiny import tiny_language_model

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def some_tensors() -> dict[str, Tensor]:
    """Every kind of dtype, an odd number of bytes first, an empty one, a scalar."""
    generator = torch.Generator().manual_seed(3)
    return {
        "a.mask": torch.rand(3, generator=generator) > 0.5,
        "a.weight": torch.randn(5, 7, generator=generator),
        "a.bias": torch.randn(7, generator=generator).bfloat16(),
        "b.weight": torch.randn(11, 3, generator=generator).half(),
        "b.count": torch.tensor(2**40 + 1),
        "b.empty": torch.zeros(0, 4),
        "c.weight": torch.randn(64, 64, generator=generator, dtype=torch.float64),
    }


def hf_folder(folder: Path, tensors: dict[str, Tensor], files: int = 1) -> Path:
    """As transformers writes it, with an index when there are several files."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "mine", "dtype": "float32"}))
    if files == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    names = list(tensors)
    weight_map = {}
    for i in range(files):
        mine = {n: tensors[n] for n in names[i::files]}
        file = f"model-{i + 1:05d}-of-{files:05d}.safetensors"
        save_file(mine, folder / file)
        weight_map.update(dict.fromkeys(mine, file))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def job(source: Path, target: Path, word: str, **changes: Any) -> Conversion:
    values: dict[str, Any] = {
        "source_format": None,
        "options": HuggingFaceOptions() if word == "hf" else None,
        "model": None,
        "dtype": None,
        "verify": True,
    }
    return Conversion(source=source, target=target, target_format=word, **{**values, **changes})


def quiet(what: str, done: int, total: int) -> None:
    assert 0 <= done <= total


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(
        t.dtype == right[n].dtype and t.shape == right[n].shape and torch.equal(t, right[n]) for n, t in left.items()
    )


# ------------------------------------------------------------------------------------------------------ there and back


@pytest.mark.parametrize("files", [1, 3])
def test_through_dcp_and_back_every_dtype_is_bit_equal(
    tmp_path: Path, files: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = some_tensors()
    source = hf_folder(tmp_path / "hf", own, files)
    convert(job(source, tmp_path / "dcp", "dcp"), quiet)
    state = {n: torch.zeros_like(t) for n, t in own.items()}
    dcp.load(state, checkpoint_id=tmp_path / "dcp")  # PyTorch's own reader
    assert same(state, own)
    monkeypatch.setattr(conversion, "wanted_by", lambda model: wanted(own))
    convert(job(tmp_path / "dcp", tmp_path / "back", "hf", options=HuggingFaceOptions(shard_gb=1e-6)), quiet)
    index = json.loads((tmp_path / "back/model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in own.values())
    found: dict[str, Tensor] = {}
    for file in set(index["weight_map"].values()):
        found.update(load_file(tmp_path / "back" / file))  # safetensors' own reader
    assert same(found, own)
    assert set(index["weight_map"]) == set(own)


def wanted(tensors: dict[str, Tensor]) -> list[Wanted]:
    return [Wanted(names=(n,), shape=tuple(t.shape)) for n, t in tensors.items()]


@pytest.mark.parametrize("tied", [True, False])
def test_a_model_of_transformers_goes_through_dcp(tmp_path: Path, tied: bool) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = tiny_language_model(tmp_path / "model", architecture="qwen2", tie_word_embeddings=tied)
    convert(job(model, tmp_path / "dcp", "dcp"), quiet)
    convert(job(tmp_path / "dcp", tmp_path / "back", "hf", dtype=torch.bfloat16), quiet)
    assert detect_format(tmp_path / "back", "") == "hf"
    assert json.loads((tmp_path / "back/config.json").read_text())["dtype"] == "bfloat16"
    loaded, own = (AutoModelForCausalLM.from_pretrained(f) for f in (tmp_path / "back", model))
    assert all(torch.equal(p, q.bfloat16()) for p, q in zip(loaded.parameters(), own.parameters(), strict=True))
    assert AutoTokenizer.from_pretrained(tmp_path / "back")("12+3").input_ids
    with torch.no_grad():
        for parameter in loaded.parameters():
            parameter.zero_()
    load_initial(loaded, str(model), lambda name: name)  # training starts from a Hugging Face folder too
    assert all(torch.equal(p, q.bfloat16()) for p, q in zip(loaded.parameters(), own.parameters(), strict=True))


def test_a_checkpoint_of_a_run_needs_the_models_config_and_leaves_its_optimizer(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = tiny_language_model(tmp_path / "model")
    weights = AutoModelForCausalLM.from_pretrained(model).state_dict()
    state = {"model": {"model": weights}, "optimizer": {"state": {n: {"exp_avg": t} for n, t in weights.items()}}}
    dcp.save(state, checkpoint_id=tmp_path / "step" / "backend")
    with pytest.raises(ModelError, match=r"none came with these weights. Name the original .* with --model"):
        convert(job(tmp_path / "step", tmp_path / "hf", "hf"), quiet)
    convert(job(tmp_path / "step", tmp_path / "hf", "hf", model=model), quiet)
    assert same(load_file(tmp_path / "hf/model.safetensors"), load_file(model / "model.safetensors"))
    source = open_weights(tmp_path / "step", wanted=wanted_by(model))
    assert torch.equal(source.read("model.norm.weight"), weights["model.norm.weight"])


# ------------------------------------------------------------------------------------------------- what is recognised


def test_folders_are_recognised(tmp_path: Path) -> None:
    own = {"w": torch.zeros(2)}
    hf = hf_folder(tmp_path / "hf", own)
    pipeline = tmp_path / "pipeline"
    pipeline.mkdir()
    (pipeline / "model_index.json").write_text("{}")
    shutil.copytree(hf, pipeline / "transformer")
    (pipeline / "transformer/model.safetensors").rename(pipeline / "transformer/diffusion_pytorch_model.safetensors")
    assert (detect_format(hf, ""), detect_format(pipeline, "")) == ("hf", "hf")
    assert list(open_weights(pipeline).names()) == ["w"]
    (pipeline / "transformer_2").mkdir()
    with pytest.raises(ModelError, match=r"two networks; name one of them: .*transformer or .*transformer_2"):
        open_weights(pipeline)
    dcp.save(own, checkpoint_id=hf)
    with pytest.raises(ModelError, match=r"here could be of several formats: hf, dcp; say which one it is"):
        detect_format(hf, "here")
    assert list(open_weights(hf, "dcp").names()) == ["w"]
    with pytest.raises(ModelError, match=r"\(hf, dcp.*\)"):
        open_weights(tmp_path)
    with pytest.raises(PluginError, match="no weight format called 'gguf'"):
        open_weights(hf, "gguf")


# -------------------------------------------------------------------------------------------------------------- damage


def missing(folder: Path) -> None:
    (folder / "model-00002-of-00003.safetensors").unlink()


def cut(folder: Path) -> None:
    file = folder / "model-00001-of-00003.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


def cut_header(folder: Path) -> None:
    (folder / "model-00001-of-00003.safetensors").write_bytes(b"\x10\x00")


def other_names(folder: Path) -> None:
    save_file({"x": torch.zeros(1)}, folder / "model-00003-of-00003.safetensors")


def no_index(folder: Path) -> None:
    (folder / "model.safetensors.index.json").unlink()


def bad_index(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text("{}")


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (missing, r"index.json names files that are not there: model-00002-of-00003.safetensors"),
        (cut, r"model-00001-of-00003.safetensors is damaged or incomplete"),
        (cut_header, r"model-00001-of-00003.safetensors is damaged or incomplete"),
        (other_names, r"model-00003-of-00003.safetensors does not hold a.bias, which the index says it has"),
        (no_index, r"model-00001-of-00003.safetensors has no index beside it"),
        (bad_index, r"index.json cannot be read: KeyError"),
    ],
)
def test_damaged_folders_are_refused_before_anything_is_written(
    tmp_path: Path, damage: Callable[[Path], None], said: str
) -> None:
    source = hf_folder(tmp_path / "hf", some_tensors(), 3)
    damage(source)
    with pytest.raises(ModelError, match=said):
        convert(job(source, tmp_path / "out" / "dcp", "dcp"), quiet)
    assert not (tmp_path / "out").exists()


def test_a_dcp_folder_that_was_cut_short(tmp_path: Path) -> None:
    dcp.save(some_tensors(), checkpoint_id=tmp_path / "dcp")
    (data,) = (tmp_path / "dcp").glob("*.distcp")
    data.write_bytes(data.read_bytes()[:-1])
    with pytest.raises(ModelError, match=r"__0_0.distcp has [\d,]+ bytes of at least [\d,]+: it was cut short"):
        open_weights(tmp_path / "dcp")


# ----------------------------------------------------------------------------------------------------------- conversion


def test_nothing_is_overwritten_and_nothing_half_written_remains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = hf_folder(tmp_path / "hf", some_tensors())
    with pytest.raises(CheckpointError, match=r"hf exists; nothing is overwritten"):
        convert(job(source, source, "dcp"), quiet)

    def stops(what: str, done: int, total: int) -> None:
        raise KeyboardInterrupt

    for word in ("hf", "dcp"):
        with pytest.raises(KeyboardInterrupt):
            convert(job(source, tmp_path / "out", word), stops)
    monkeypatch.setattr(conversion.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 10))  # type: ignore[attr-defined]
    with pytest.raises(CheckpointError, match=r"0.0 GiB to write, but .* has 0.0 GiB free"):
        convert(job(source, tmp_path / "out", "dcp"), quiet)
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]


def test_digests_are_stored_and_what_differs_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import hashlib

    own = some_tensors()
    source = hf_folder(tmp_path / "hf", own)
    convert(job(source, tmp_path / "one", "hf"), quiet)
    stored = json.loads((tmp_path / "one/mmrl_weights.json").read_text())["weights"]
    raw = own["a.weight"].numpy().tobytes()
    assert stored["a.weight"] == {"dtype": "float32", "shape": [5, 7], "sha256": hashlib.sha256(raw).hexdigest()}

    class Wrong(DcpFormat):
        def write(self, source: WeightSource, folder: Path, **others: Any) -> None:
            super().write(source, folder, **others)
            (data,) = folder.glob("*.distcp")
            content = data.read_bytes()
            at = content.index(own["c.weight"].numpy().tobytes()) + 8
            data.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])

    with monkeypatch.context() as patch:
        patch.setattr(conversion, "load_format", lambda word: {"hf": HuggingFaceFormat, "dcp": Wrong}[word])
        with pytest.raises(CheckpointError, match=r"(?s)is not what was converted:\n  different \(1\): c.weight"):
            convert(job(source, tmp_path / "two", "dcp"), quiet)
        assert not (tmp_path / "two").exists()
    save_file({**own, "a.weight": own["a.weight"] + 1}, tmp_path / "one/model.safetensors")
    with pytest.raises(CheckpointError, match=r"the source is not what was converted:\n  different \(1\): a.weight"):
        convert(job(tmp_path / "one", tmp_path / "three", "dcp"), quiet)


def test_what_safetensors_cannot_hold_is_said(tmp_path: Path) -> None:
    class Complex(WeightSource):
        where = "there"

        def names(self) -> Sequence[str]:
            return ["z"]

        def shape(self, name: str) -> tuple[int, ...]:
            return (1,)

        def dtype(self, name: str) -> torch.dtype:
            return torch.complex64

        def read(self, name: str) -> Tensor:
            raise AssertionError("read before it was checked")

    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"there: z is torch.complex64, which safetensors files cannot hold"):
        HuggingFaceFormat(HuggingFaceOptions()).write(Complex(), tmp_path, model=tmp_path, progress=lambda a, b: None)
    assert [p.name for p in tmp_path.iterdir()] == ["config.json"]


# -------------------------------------------------------------------------------------------------------------- command


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = hf_folder(tmp_path / "hf", some_tensors())
    assert main(["convert", str(source), str(tmp_path / "dcp"), "--to", "dcp", "--verify"]) == 0
    assert "dcp: 7 tensors, 0.00 GiB, hf -> dcp in " in capsys.readouterr().out
    again = ["convert", str(source), str(tmp_path / "again"), "--to", "hf"]
    assert main([*again, "--shard-gb", "0.000001", "--dtype", "bfloat16"]) == 0
    assert len(list((tmp_path / "again").glob("*.safetensors"))) > 1
    assert open_weights(tmp_path / "again").dtype("c.weight") == torch.bfloat16
    assert open_weights(tmp_path / "again").dtype("b.count") == torch.int64
    for arguments, status, said in (
        ([*again], 1, "again exists"),
        (
            ["convert", str(source), str(tmp_path / "x"), "--to", "hf", "--shard-gb", "0"],
            2,
            "--shard-gb 0: Input",
        ),
        (["convert", str(source), str(tmp_path / "x"), "--to", "dcp", "--shard-gb", "1"], 1, "takes: no options"),
        (["convert", str(source), str(tmp_path / "x"), "--to", "nothing"], 1, "no weight format called 'nothing'"),
        (["convert", str(tmp_path / "y"), str(tmp_path / "x"), "--to", "hf"], 1, "no such folder"),
    ):
        assert main(arguments) == status, arguments
        assert said in capsys.readouterr().err
    assert not (tmp_path / "x").exists()
