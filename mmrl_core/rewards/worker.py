"""The reward worker: `python -m mmrl_core.rewards.worker CHANNEL LIFELINE TRAINER_PID`.

Two processes: this one becomes the guard (see guard.py), its child loads one reward and scores, in its main thread.
The trainer's first message is JSON (what to load); every further one is a pickled batch of samples, which is safe
because only the trainer that started the worker holds the other end. All answers are JSON, so the trainer unpickles
nothing that a reward wrote. A closed channel ends the worker.
"""

from __future__ import annotations

import faulthandler
import json
import os
import pickle
import socket
import sys
import traceback
from typing import Any

from mmrl_core.errors import MmrlError
from mmrl_core.hookspecs import Component
from mmrl_core.plugins import Found, Selected, import_string
from mmrl_core.rewards.checks import BatchFailedError, check_results
from mmrl_core.rewards.creation import create_reward
from mmrl_core.rewards.frames import receive_frame, send_frame
from mmrl_core.rewards.guard import adopt_descendants, die_with, watch
from mmrl_core.vector_math import resolve_vector_math


def main(arguments: list[str]) -> None:
    """Split into guard and scoring process; returns, in the scoring process only, when the trainer hangs up."""
    channel_fd, lifeline_fd, trainer = (int(a) for a in arguments)
    channel, lifeline = socket.socket(fileno=channel_fd), socket.socket(fileno=lifeline_fd)
    for inherited in (channel, lifeline):
        inherited.set_inheritable(False)  # programs that the reward starts must not keep them open
    adopt_descendants()
    guard = os.getpid()
    scoring = os.fork()
    if scoring:
        channel.close()
        watch(scoring, lifeline, trainer)
    die_with(guard)
    lifeline.close()
    faulthandler.enable()
    try:
        _serve(channel)
    except EOFError:
        return


def _serve(channel: socket.socket) -> None:
    setup = json.loads(receive_frame(channel))
    try:
        reward = _load(setup)
        reward.setup(setup["device"])
        resolve_vector_math()  # by now a reward that uses torch has imported it
    except Exception as error:  # noqa: BLE001 - a stranger's code; the trainer raises it with this traceback
        _send(channel, _failed(error))
        return
    _send(channel, {"batch_size": reward.batch_size})
    loaded = False
    while True:
        batch = pickle.loads(receive_frame(channel))  # noqa: S301 - from the trainer that started this process
        samples = batch["samples"]
        try:
            if not loaded:
                reward.onload()
                loaded = True
            results = check_results(reward.score(samples), len(samples))
            if batch["offload"]:
                reward.offload()
                loaded = False
        except BatchFailedError as error:
            _send(channel, {"error": error.reason, "traceback": ""})
        except Exception as error:  # noqa: BLE001 - a stranger's code; its failure is the batch's failure
            _send(channel, _failed(error))
        else:
            _send(channel, {"results": [[r.value, r.failure, dict(r.scores)] for r in results]})


def _load(setup: dict[str, Any]) -> Any:
    sys.path[:] = setup["sys_path"]
    component = Component(name=setup["name"], summary="", target=setup["target"], options=setup["options_model"])
    found = Found(
        kind="reward", component=component, distribution=setup["distribution"], version=setup["version"]
    )  # fmt: skip
    options = None
    if component.options is not None:
        model = import_string(component.options, f"options of reward {component.name!r}")
        options = model.model_validate(setup["options"])
    return create_reward(Selected(found=found, options=options))


def _failed(error: Exception) -> dict[str, str]:
    reason = str(error) if isinstance(error, MmrlError) else f"{type(error).__name__}: {error}"
    return {"error": reason, "traceback": traceback.format_exc()}


def _send(channel: socket.socket, message: dict[str, Any]) -> None:
    send_frame(channel, json.dumps(message, allow_nan=False).encode())


if __name__ == "__main__":
    main(sys.argv[1:])
