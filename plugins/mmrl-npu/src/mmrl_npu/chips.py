"""Peak rates of Ascend chips, from the description that CANN itself installs for each of them. Imports no torch.

CANN's toolkit holds one `data/platform_config/NAME.ini` a chip, NAME as the driver reports it (`Ascend910B3`): the
number of matrix cores, the size of the block that one multiplies each cycle, and the clock. No data sheet by chip name
was found to copy a table from; a chip without such a file is unknown, and so is every chip's memory bandwidth.
"""

from __future__ import annotations

import configparser
import re
from pathlib import Path

_FOLDERS = ("*-linux/data/platform_config", "compiler/data/platform_config", "data/platform_config")


def peak_flops(toolkit: Path, chip: str, dtype: str) -> float | None:
    """Dense matrix FLOP/s of `chip` in `dtype` (`float16`, `bfloat16`), or None when CANN's file does not say.

    2 * M * N * K * cores * clock, the block M x N x K multiplied in one cycle. float32 is None: whether its products
    run on the matrix cores depends on the operator's precision mode.
    """
    if dtype not in ("float16", "bfloat16") or not re.fullmatch(r"[\w-]+", chip):
        return None
    file = next((f for folder in _FOLDERS for f in sorted(toolkit.glob(f"{folder}/{chip}.ini"))), None)
    if file is None:
        return None
    described = configparser.ConfigParser(strict=False, interpolation=None)
    described.read_string(file.read_text(encoding="utf-8", errors="replace"))
    if not (described.has_section("SoCInfo") and described.has_section("AICoreSpec")):
        return None
    chip_facts, core = described["SoCInfo"], described["AICoreSpec"]
    if dtype == "bfloat16" and chip_facts.get("support_bf16") != "1":
        return None
    cores = _number(chip_facts.get("cube_core_cnt") or chip_facts.get("ai_core_cnt"))
    factors = [cores, *(_number(core.get(name)) for name in ("cube_m_size", "cube_n_size", "cube_k_size", "cube_freq"))]
    product = 2.0e6  # a product and a sum; the clock is in MHz
    for factor in factors:
        if not factor:
            return None
        product *= factor
    return product


def _number(text: str | None) -> int | None:
    return int(text) if text is not None and text.strip().isdigit() else None
