"""Ascend machines made of files."""

from __future__ import annotations

from pathlib import Path

from mmrl_npu.machine import MANAGEMENT_NODES, Machine

TOOLKIT = "/usr/local/Ascend/cann"
HEALTHY = {
    "ASCEND_HOME_PATH": TOOLKIT,
    "ATB_HOME_PATH": "/usr/local/Ascend/nnal/atb/latest/atb/cxx_abi_1",
    "LD_LIBRARY_PATH": f"/usr/lib:{TOOLKIT}/lib64",
    "PATH": "/usr/bin:/usr/local/bin",
}
PACKAGES = {"torch": "2.7.1+cpu", "torch-npu": "2.7.1.post2"}


class Site:
    """A machine to be taken apart: files below a folder, variables, packages."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.environment = dict(HEALTHY)
        self.packages = dict(PACKAGES)
        for node in ("/dev/davinci0", "/dev/davinci1", "/dev/davinci10", *MANAGEMENT_NODES):
            self.write(node, "")
        self.write(f"{TOOLKIT}/set_env.sh", "")
        self.write(f"{TOOLKIT}/lib64/libhccl.so", "")
        self.write(f"{TOOLKIT}/aarch64-linux/ascend_toolkit_install.info", "package_name=x\nversion=8.5.0\n")
        self.write("/usr/local/Ascend/nnal/atb/latest/version.info", "    Ascend-cann-atb : 8.5.0\n")
        self.write("/usr/local/Ascend/driver/version.info", "Version=25.5.0\n")
        self.write("/usr/lib/aarch64-linux-gnu/libjemalloc.so.2", "")
        self.write("/proc/self/maps", "7f00-7f01 r-xp /usr/lib/aarch64-linux-gnu/libjemalloc.so.2\n")
        for command in ("/usr/bin/ip", "/usr/local/bin/npu-smi"):
            self.write(command, "#!/bin/sh\n").chmod(0o755)

    def write(self, path: str, text: str) -> Path:
        """Write a file below the root."""
        file = self.root / path.lstrip("/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        return file

    def remove(self, path: str) -> None:
        """Remove a file."""
        (self.root / path.lstrip("/")).unlink()

    @property
    def machine(self) -> Machine:
        """As it is now."""
        return Machine(root=self.root, environment=self.environment, distributions=self.packages)
