"""Reading weights that a record holds, one tensor at a time."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from mmrl_core.errors import VerifyError
from mmrl_core.verify.job import STEM


class TensorFolder:
    """The safetensors files of one folder of a record. Use it in a `with` block."""

    def __init__(self, folder: Path) -> None:
        """Raises VerifyError when there are none, or they are damaged."""
        self.folder = folder
        self._stack = ExitStack()
        self._place: dict[str, Any] = {}
        whole, index = folder / f"{STEM}.safetensors", folder / f"{STEM}.safetensors.index.json"
        try:
            files = {whole.name} if whole.is_file() else set(json.loads(index.read_text())["weight_map"].values())
            for name in sorted(files):
                file = self._stack.enter_context(safe_open(folder / name, framework="pt"))
                self._place.update(dict.fromkeys(file.keys(), file))
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            raise VerifyError(f"{folder}: missing or damaged: {error}. Record it again") from error

    def __enter__(self) -> TensorFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:  # fmt: skip
        self._stack.close()

    def __contains__(self, name: str) -> bool:
        return name in self._place

    def __iter__(self) -> Iterator[str]:
        return iter(self._place)

    def shape(self, name: str) -> tuple[int, ...]:
        """Without reading the tensor."""
        return tuple(self._place[name].get_slice(name).get_shape())

    def read(self, name: str) -> Tensor:
        """One tensor, fp32."""
        tensor: Tensor = self._place[name].get_tensor(name)
        return tensor
