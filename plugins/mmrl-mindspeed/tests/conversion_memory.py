"""A program of its own: `mmrl convert` with the same arguments, watching the process's anonymous memory.

Prints the peak in bytes.
"""

from __future__ import annotations

import sys
import threading
import time
from pathlib import Path

from mmrl_core.cli.main import main


def anonymous() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) << 10


class Peak(threading.Thread):
    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.value = 0
        self.on = True

    def run(self) -> None:
        while self.on:
            self.value = max(self.value, anonymous())
            time.sleep(0.002)


def run() -> None:
    peak = Peak()
    peak.start()
    status = main(["convert", *sys.argv[1:]])
    peak.on = False
    peak.join()
    print(peak.value)
    sys.exit(status)


if __name__ == "__main__":
    run()
