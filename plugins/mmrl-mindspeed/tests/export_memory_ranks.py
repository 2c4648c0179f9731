"""What each rank of the export's memory test runs: `python -m export_memory_ranks FOLDER BUCKET_BYTES`.

Writes to FOLDER/RANK.json the bytes of the model, and by how many this process's anonymous memory grew at its peak
while the weights were streamed to a consumer that keeps nothing.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from conversion_memory import Peak, anonymous
from mmrl_mindspeed import weights

from mmrl_core.testing.stage import Rank


def main(folder: Path, bucket_bytes: int) -> None:
    """Export on this rank."""
    weights.BUCKET_BYTES = bucket_bytes
    with Rank.join("cpu", folder) as rank:
        backend = rank.cast(json.loads((folder / "recipe.json").read_text(encoding="utf-8"))).backend()
        size = 0
        for bucket in backend.export_weights():
            size += sum(tensor.nbytes for _, tensor in bucket)
        before = anonymous()
        peak = Peak()
        peak.start()
        for bucket in backend.export_weights():
            del bucket
        peak.on = False
        peak.join()
        said = {"model": size, "growth": peak.value - before}
        (folder / f"{rank.world.rank}.json").write_text(json.dumps(said), encoding="utf-8")
        rank.world.barrier()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
