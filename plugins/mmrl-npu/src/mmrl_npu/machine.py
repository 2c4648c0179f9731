"""What of Ascend is on this machine, from files and environment variables alone. Imports no torch and no CANN."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

INSTALLATION = "/usr/local/Ascend"
"""Where CANN, NNAL and the driver are installed for all users."""
HOMES = ("ASCEND_HOME_PATH", "ASCEND_TOOLKIT_HOME")
"""Set by the toolkit's set_env.sh to the folder of the toolkit in use."""
MANAGEMENT_NODES = ("/dev/davinci_manager", "/dev/devmm_svm", "/dev/hisi_hdc")
"""Device nodes that every process on an NPU needs, beside the NPU's own."""
_SCRIPTS = ("cann/set_env.sh", "ascend-toolkit/set_env.sh")  # from CANN 8.5 on the first


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Where to look. Tests put a folder in the place of the file system and a dict in that of the environment."""

    root: Path = Path("/")
    environment: Mapping[str, str] = field(default_factory=lambda: os.environ)
    distributions: Mapping[str, str] | None = None
    """Versions of installed Python packages by name; None: those of this interpreter."""

    def path(self, absolute: str) -> Path:
        """An absolute path, below `root`."""
        return self.root / absolute.lstrip("/")

    def version_of(self, distribution: str) -> str | None:
        """The installed version of a Python package, or None."""
        if self.distributions is not None:
            return self.distributions.get(distribution)
        try:
            return importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            return None

    def command(self, name: str) -> str | None:
        """Where a command is on the search path, or None."""
        folders = self.environment.get("PATH", os.defpath).split(os.pathsep)
        return shutil.which(name, path=os.pathsep.join(str(self.path(folder)) for folder in folders if folder))

    # ------------------------------------------------------------------------------------------------- what is here

    def sign_of_ascend(self) -> str | None:
        """The first thing found that only an Ascend machine or container has, or None."""
        for variable in HOMES:
            if self.environment.get(variable):
                return f"{variable} is set"
        for path in (INSTALLATION, *MANAGEMENT_NODES):
            if self.path(path).exists():
                return f"{path} exists"
        if self.command("npu-smi"):
            return "npu-smi is installed"
        return "torch_npu is installed" if self.version_of("torch-npu") else None

    def npus(self) -> list[int]:
        """Numbers of the NPUs whose device nodes are here."""
        names = (re.fullmatch(r"davinci(\d+)", node.name) for node in self.path("/dev").glob("davinci*"))
        return sorted(int(name[1]) for name in names if name)

    def toolkit(self) -> Path | None:
        """The folder of the CANN toolkit that the environment names, below `root`; None when set_env.sh was not
        sourced."""
        home = next((value for name in HOMES if (value := self.environment.get(name))), None)
        return None if home is None else self.path(home)

    def toolkit_script(self) -> str | None:
        """The set_env.sh of an installed toolkit, or None."""
        homes = [INSTALLATION, f"{self.environment.get('HOME', '')}/Ascend"]
        scripts = [f"{home}/{script}" for home in homes for script in _SCRIPTS]
        return next((script for script in scripts if self.path(script).is_file()), None)

    def toolkit_version(self) -> str | None:
        """For example 8.3.RC1, from the toolkit's install.info; None when it is not known."""
        home = self.toolkit()
        files = sorted(home.glob("*-linux/ascend_toolkit_install.info")) if home is not None else []
        return _first(files, r"^version\s*=\s*(\S+)")

    def nnal_version(self) -> str | None:
        """Of the acceleration library NNAL (ATB), or None."""
        file = self.path(f"{INSTALLATION}/nnal/atb/latest/version.info")
        return _first([file] if file.is_file() else [], r"^\s*Ascend-cann-atb\s*:\s*(\S+)")

    def driver_version(self) -> str | None:
        """Of the driver on the host, or None where its files are not visible."""
        file = self.path(f"{INSTALLATION}/driver/version.info")
        return _first([file] if file.is_file() else [], r"^[Vv]ersion\s*=\s*(\S+)")

    def loaded_libraries(self) -> str:
        """The memory map of this process, which names every shared library in it; empty where there is none."""
        maps = self.path("/proc/self/maps")
        return maps.read_text(encoding="utf-8", errors="replace") if maps.exists() else ""


def here() -> Machine:
    """The machine this process runs on."""
    return Machine()


def _first(files: list[Path], pattern: str) -> str | None:
    for file in files:
        found = re.search(pattern, file.read_text(encoding="utf-8", errors="replace"), re.MULTILINE)
        if found:
            return found[1]
    return None
