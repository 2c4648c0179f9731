"""Empty CANN libraries, so that the real torch_npu can be imported where no CANN is.

    python npu_stub_libraries.py UNPACKED_WHEEL OUTPUT

Every symbol that the wheel's libraries want and nobody has, and every function of the runtime that they look up by name
later, becomes a function that returns 0, that is: success, and nothing done. Shapes and dtypes of fake tensors need no
more; nothing can be computed.
"""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

SONAMES = (
    "libascendcl.so",
    "libhccl.so",
    "libacl_op_compiler.so",
    "libge_runner.so",
    "libgraph.so",
    "libacl_tdt_channel.so",
)
"""Libraries that torch_npu is linked with, or opens. Each gets all the symbols: which one is asked for which is not
written anywhere."""
_HANDLE = "movq $1,(%rdi)"
ANSWERS = {
    "aclrtGetDeviceCount": "movl $1,(%rdi)",
    "aclrtGetDevice": "movl $0,(%rdi)",
    "aclrtCreateStream": _HANDLE,
    "aclrtCreateStreamWithConfig": _HANDLE,
    "aclrtCreateContext": _HANDLE,
    "aclrtGetCurrentContext": _HANDLE,
}
"""What functions store for their caller on a machine with one NPU: numbers, or a handle that is not null."""
RETURNS = {"aclGetCompileoptSize": 8}
"""Functions that return something else than a status."""
_LOOKED_UP = re.compile(rb"\x00((?:acl|aclrt|aclprof|aclmdl|Hccl)[A-Z][A-Za-z0-9]+)(?=\x00)")
"""Names of the runtime among the strings of a library. Those of single operators (aclnn...) are elsewhere."""
_NOT_OURS = ("Py", "_Py", "__gmon", "_ITM", "__cxa_finalize")
_SYSTEM = (
    "libc.so.6",
    "libm.so.6",
    "libstdc++.so.6",
    "libgcc_s.so.1",
    "libpthread.so.0",
    "ld-linux-x86-64.so.2",
    "librt.so.1",
    "libdl.so.2",
)
_SYSTEM_FOLDERS = ("/lib/x86_64-linux-gnu", "/usr/lib/x86_64-linux-gnu", "/lib64", "/usr/lib64")


def build(wheel: Path, output: Path) -> int:
    """Write the libraries into `output` and return the number of symbols. Needs nm and gcc.

    Args:
        wheel: the folder into which a wheel of torch-npu was unpacked.
    """
    output.mkdir(parents=True, exist_ok=True)
    theirs = [wheel / "torch_npu/lib" / f"lib{name}.so" for name in ("torch_npu", "tensorpipe", "npu_profiler")]
    theirs = [file for file in [*theirs, *wheel.glob("torch_npu/_C*.so")] if file.exists()]
    wanted = set().union(*(_symbols(file, "--undefined-only") for file in theirs))
    found = set().union(*(_symbols(file, "--defined-only") for file in [*theirs, *_torch_libraries(), *_system()]))
    wanted |= {name.decode() for name in _LOOKED_UP.findall(theirs[0].read_bytes())}
    missing = sorted({s for s in wanted - found if not s.startswith(_NOT_OURS)} | set(ANSWERS))
    lines = [".text"]
    for symbol in missing:
        lines += [f'.globl "{symbol}"', f'.type "{symbol}",@function', f'"{symbol}":']
        lines += [f"  {ANSWERS[symbol]}"] if symbol in ANSWERS else []
        lines += [f"  movl ${RETURNS.get(symbol, 0)},%eax", "  ret"]
    lines.append('.section .note.GNU-stack,"",@progbits')
    for name in SONAMES:
        _library(output, name, "\n".join(lines) + "\n")
    return len(missing)


def _library(output: Path, name: str, assembly: str) -> None:
    source = output / f"{name}.s"
    source.write_text(assembly, encoding="utf-8")
    command = ["gcc", "-shared", "-fPIC", "-nostdlib", "-o", str(output / name), f"-Wl,-soname,{name}", str(source)]
    subprocess.run(command, check=True, capture_output=True, text=True)


def _symbols(file: Path, kind: str) -> set[str]:
    done = subprocess.run(["nm", "-D", kind, str(file)], check=True, capture_output=True, text=True)
    return {line.split()[-1].split("@")[0] for line in done.stdout.splitlines() if line.split()}


def _torch_libraries() -> list[Path]:
    spec = importlib.util.find_spec("torch")
    assert spec is not None
    assert spec.origin is not None
    return [f for f in sorted((Path(spec.origin).parent / "lib").glob("*.so*")) if f.is_file()]


def _system() -> list[Path]:
    candidates = [[Path(folder) / name for folder in _SYSTEM_FOLDERS] for name in _SYSTEM]
    return [next(file for file in files if file.exists()) for files in candidates if any(f.exists() for f in files)]


if __name__ == "__main__":
    print(build(Path(sys.argv[1]), Path(sys.argv[2])))
