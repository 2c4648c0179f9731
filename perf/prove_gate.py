"""Shows that the gate fires on what it must find, and on nothing else. Run it on the machine whose gate is in question.

    python perf/prove_gate.py --planted         # +15 % time in each phase, +3 % memory in another: must name them
    python perf/prove_gate.py --equal 20        # this checkout against its own commit: must be silent

Each run is `mmrl perf gate` on one combination. Exit status 1 when one of them says the wrong thing.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from pathlib import Path

from mmrl_core.perf.decide import CERTAIN_MEMORY, CERTAIN_TIME
from mmrl_core.perf.jobs import PHASES
from mmrl_core.perf.machine import REPOSITORY

PLANTED = Path(__file__).resolve().parent / "planted"


def main() -> int:
    """0 when every run said what it must."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--planted", action="store_true", help="plant time and memory in each phase in turn")
    parser.add_argument("--equal", type=int, default=0, metavar="N", help="compare equal code so many times")
    parser.add_argument("--only", default="cpu+fsdp2+hf+text", metavar="PATTERN", help="the combination")
    arguments = parser.parse_args()
    wrong = 0
    for i, phase in enumerate(PHASES if arguments.planted else ()):
        other = PHASES[(i + 2) % len(PHASES)]
        plant = {"PLANTED_TIME": f"{phase}={CERTAIN_TIME}", "PLANTED_MEMORY": f"{other}={CERTAIN_MEMORY}"}
        status, output = gate(arguments.only, plant)
        found = {what: fired(output, *what) for what in ((phase, "time"), (other, "memory"))}
        good = status == 1 and all(found.values())
        wrong += not good
        report(f"planted: {phase} x {CERTAIN_TIME} time, {other} x {CERTAIN_MEMORY} memory", good, output)
    for number in range(arguments.equal):
        status, output = gate(arguments.only, {})
        wrong += status != 0
        report(f"equal code, {number + 1} of {arguments.equal}", status == 0, output)
    return 1 if wrong else 0


def gate(only: str, plant: dict[str, str]) -> tuple[int, str]:
    """Run it; what is planted acts on the working tree and not on the commit. Exit status and output."""
    path = os.pathsep.join([str(PLANTED), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path, "PLANTED_IN": str(REPOSITORY), **plant}
    command = [sys.executable, "-m", "mmrl_core.cli.main", "perf", "gate", "--base", "HEAD", "--only", only]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


def fired(output: str, phase: str, kind: str) -> bool:
    """Whether the gate says so of this phase."""
    return re.search(rf"^FIRED: \S+: {phase} .* times the {kind}$", output, re.MULTILINE) is not None


def report(what: str, good: bool, output: str) -> None:
    """One line, and what was said when it was wrong."""
    said = re.findall(r"^FIRED: \S+: (.*)$", output, re.MULTILINE) or ["silent"]
    print(f"{time.strftime('%H:%M:%S')}  {'ok   ' if good else 'WRONG'}  {what}: {'; '.join(said)}", flush=True)
    if not good:
        print(output, flush=True)


if __name__ == "__main__":
    sys.exit(main())
