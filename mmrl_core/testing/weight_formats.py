"""`WeightFormatConformance`: what `mmrl convert` and `model.init_from` rely on in a weight format."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mmrl_core.checkpoint.formats import detect_format
from mmrl_core.contracts import WeightFormat, WeightSource
from mmrl_core.errors import ModelError
from mmrl_core.testing.components import ComponentConformance
from mmrl_core.testing.tiny import tiny_language_model


class Counted(WeightSource):
    """Another source that says how often it is read, and holds one tensor less on demand."""

    def __init__(self, source: WeightSource, *, without: str | None = None) -> None:
        self.source, self.without = source, without
        self.where, self.model_folder = source.where, source.model_folder
        self.reads = 0

    def names(self) -> Sequence[str]:
        return [name for name in self.source.names() if name != self.without]

    def shape(self, name: str) -> tuple[int, ...]:
        return self.source.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        return self.source.dtype(name)

    def read(self, name: str) -> Tensor:
        self.reads += 1
        return self.source.read(name)


class WeightFormatConformance(ComponentConformance):
    """Subclass it as `Test...` and name the `component`; `options` are those of writing."""

    kind = "weight format"
    needs_config = True
    """False for a format that makes sense of any tensors; True: it must refuse those that are not the config's."""

    @classmethod
    def model(cls, folder: Path) -> Path:
        """Write a small model in the format `hf` that this one can hold, and return its folder."""
        return tiny_language_model(folder / "model", architecture="qwen2", tie_word_embeddings=False)

    @classmethod
    def source(cls, folder: Path) -> Counted:
        """That model's weights."""
        from mmrl_core.checkpoint.formats import open_weights

        return Counted(open_weights(cls.model(folder), "hf"))

    @classmethod
    def format(cls) -> WeightFormat:
        """A new instance with the options."""
        cls.require_available()
        created: WeightFormat = cls.selected().create()
        return created

    @classmethod
    def written(cls, folder: Path) -> tuple[Counted, Path]:
        """(what was written, where)."""
        source, target = cls.source(folder), folder / "target"
        target.mkdir()
        cls.format().write(source, target, model=source.model_folder, progress=lambda done, total: None)
        return source, target

    def test_there_and_back_is_bit_equal(self, tmp_path: Path) -> None:
        """Names, shapes and dtypes are known without reading, and every tensor comes back bit for bit."""
        source, target = self.written(tmp_path)
        again = type(self.format()).open(target, where="there", model=source.model_folder)
        assert set(again.names()) == set(source.names())
        for name in source.names():
            own = source.source.read(name)
            assert (again.shape(name), again.dtype(name)) == (tuple(own.shape), own.dtype), name
            assert torch.equal(again.read(name), own), name
        name = source.names()[0]
        assert torch.equal(again.read(name), again.read(name)), "reading a tensor changes it"

    def test_its_folders_are_recognised_by_it_alone(self, tmp_path: Path) -> None:
        """`mmrl convert` asks every format; one that recognises others' folders makes them ambiguous."""
        _, target = self.written(tmp_path)
        assert detect_format(target, "target") == self.found().name
        empty = tmp_path / "empty"
        empty.mkdir()
        assert not type(self.format()).detect(empty)
        assert not type(self.format()).detect(tmp_path / "nowhere")

    def test_progress_ends_at_the_total(self, tmp_path: Path) -> None:
        """It grows, and what is done at the end is all."""
        source, target = self.source(tmp_path), tmp_path / "target"
        target.mkdir()
        seen: list[tuple[int, int]] = []
        model = source.model_folder
        self.format().write(source, target, model=model, progress=lambda done, total: seen.append((done, total)))
        assert seen
        assert seen == sorted(seen)
        assert seen[-1][0] == seen[-1][1]

    def test_a_folder_that_lost_a_part_is_refused_when_it_is_opened(self, tmp_path: Path) -> None:
        """Every file of some size, cut short: the user is told before anything is read or written."""
        _, target = self.written(tmp_path)
        files = [f for f in sorted(target.rglob("*")) if f.is_file() and f.stat().st_size > 20_000]
        files = [f for f in files if target / "hf" not in f.parents and f.suffix != ".json"]
        assert files, "no file holds the weights"
        for file in files:
            content = file.read_bytes()
            file.write_bytes(content[: len(content) // 2])
            with pytest.raises(ModelError, match="there"):
                type(self.format()).open(target, where="there", model=tmp_path / "model")
            file.write_bytes(content)

    def test_other_weights_are_refused_before_anything_is_read_or_written(self, tmp_path: Path) -> None:
        """A format that goes by the model's config refuses weights that are not all of it."""
        if not self.needs_config:
            pytest.skip("it holds any tensors")
        source = self.source(tmp_path)
        source.without = source.names()[-1]
        target = tmp_path / "target"
        target.mkdir()
        with pytest.raises(ModelError):
            self.format().write(source, target, model=source.model_folder, progress=lambda done, total: None)
        assert source.reads == 0
        assert list(target.iterdir()) == []
