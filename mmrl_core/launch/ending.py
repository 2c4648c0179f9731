"""The end of a run: the last evaluation, the export, the summary."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from mmrl_core.grpo.run import Run
from mmrl_core.grpo.trainer import evaluate
from mmrl_core.metrics.picture import draw_progress

SUMMARY = "summary.json"


def has_ended(run: Run) -> bool:
    """Whether the run came to its end at the step that it is at: the summary is the last thing that is written, so
    that a run which died after its last step is ended when it is started again. Collective."""
    ended = False
    if run.world.is_main:
        file = run.directory / SUMMARY
        summary = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        ended = (summary.get("outcome"), summary.get("steps")) == ("finished", run.progress.step)
    return run.world.broadcast(ended)


def finish(run: Run, outcome: str) -> dict[str, Any]:
    """The summary of a run that ended well; the export and the picture."""
    rewards = run.progress.rewards
    summary: dict[str, Any] = {
        "outcome": outcome,
        "run_dir": str(run.directory),
        "steps": run.progress.step,
        "first_reward": _mean(rewards[:5]),
        "last_reward": _mean(rewards[-5:]),
        "checkpoint": str(run.store.folder / f"step_{run.progress.step:08d}"),
        "eval": None,
    }
    if outcome == "finished":
        if run.evaluator is not None and run.evaluator.spec.every:
            step, result = run.held_out or (0, None)
            if result is None or step != run.progress.step:
                result = evaluate(run, run.evaluator)
            summary["eval"] = {**result.summary(), "first": run.progress.first_evaluation}
        if run.recipe.checkpoint.export:
            target = run.directory / "export"
            export(run, target)
            summary["export"] = str(target)
    if run.world.is_main:
        metrics = run.directory / "metrics.jsonl"
        if metrics.is_file():
            picture = run.directory / "progress.png"
            draw_progress(metrics, picture)
            summary["picture"] = str(picture)
        _write(run.directory / SUMMARY, {**summary, "step_seconds": run.progress.seconds})
    return summary


def export(run: Run, target: Path) -> None:
    """Write an ordinary Hugging Face folder of the current weights. Collective."""
    weights = run.backend.export_weights()
    if run.world.is_main:
        run.policy.save_weights(target, weights)
    else:
        for _ in weights:  # every rank takes part in gathering
            pass
    run.world.barrier()


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _write(path: Path, content: dict[str, Any]) -> None:
    beside = path.with_suffix(".partial")
    beside.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    os.replace(beside, path)
