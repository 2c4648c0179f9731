"""A program of its own: convert, watching the process's anonymous memory. Prints the peak in bytes.

`python -m conversion_memory SOURCE TARGET FORMAT OPTIONS`, the options as JSON.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from pathlib import Path


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


def main() -> None:
    from mmrl_core.checkpoint.conversion import Conversion, convert
    from mmrl_core.plugins import import_string, load_plugins

    source, target, word, options = sys.argv[1:]
    dotted = load_plugins().get("weight format", word).component.options
    job = Conversion(
        source=Path(source),
        target=Path(target),
        source_format=None,
        target_format=word,
        options=None if dotted is None else import_string(dotted, word)(**json.loads(options)),
        model=None,
        dtype=None,
        verify=False,
    )
    peak = Peak()
    peak.start()
    convert(job, lambda what, done, total: None)
    peak.on = False
    peak.join()
    print(peak.value)


if __name__ == "__main__":
    main()
