"""Rewards behind HTTP: the same results as local ones, and whatever goes wrong is bounded and said."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from mmrl_core.contracts import Prompt, Sample
from mmrl_core.errors import RewardError
from mmrl_core.hookspecs import Component
from mmrl_core.plugins import Found, Selected, import_string, load_plugins
from mmrl_core.recipe import RewardChoice
from mmrl_core.rewards.checks import BatchFailedError
from mmrl_core.rewards.executor import RewardExecutor, Scored
from mmrl_core.rewards.http_service import RewardServer
from mmrl_core.rewards.options import RemoteOptions
from mmrl_core.rewards.remote import RemoteReward
from mmrl_core.rewards.service import RewardService
from mmrl_core.rewards.wire import PROTOCOL, sample_to_json
from mmrl_core.testing.rewards import IMAGES, TEXTS, RewardConformance, text_sample

MISBEHAVES = '''
"""A reward that does what the sample's text says."""
import os, time
from mmrl_core import Reward, RewardResult


class Misbehaves(Reward):
    batch_size = 4

    def setup(self, device):
        if device == "broken":
            raise ValueError("no weights here")
        if device == "slow":
            time.sleep(600)

    def score(self, samples):
        for sample in samples:
            word, _, amount = sample.text.partition(" ")
            if word == "sleep":
                time.sleep(float(amount))
            if word == "raise":
                raise KeyError("told to")
            if word == "die":
                os._exit(3)
        return [RewardResult(value=float(len(samples)), scores={"pid": float(os.getpid())}) for _ in samples]
'''


def selected(word: str, **options: Any) -> Selected:
    found = load_plugins().get("reward", word)
    model = found.component.options
    made = None if model is None else import_string(model, word).model_validate(options)
    return Selected(found=found, options=made)


@pytest.fixture(scope="module")
def misbehaving(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Selected]:
    folder = tmp_path_factory.mktemp("misbehaving")
    (folder / "misbehaving_reward.py").write_text(textwrap.dedent(MISBEHAVES))
    sys.path.insert(0, str(folder))
    component = Component(name="misbehaves", summary="", target="misbehaving_reward:Misbehaves")
    yield Selected(found=Found(kind="reward", component=component, distribution="strange", version="1.2"), options=None)
    sys.path.remove(str(folder))


class Served:
    """A service in this process."""

    def __init__(self, chosen: Selected, device: str = "cpu", *, port: int = 0, **settings: Any) -> None:
        waiting = settings.setdefault("waiting", 8)
        settings.setdefault("deadline_s", 30.0)
        self.service = RewardService(chosen, device, **settings)
        self.server = RewardServer(
            ("127.0.0.1", port), self.service, deadline_s=settings["deadline_s"], waiting=waiting, max_bytes=1 << 20
        )
        self.service.start()
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05})
        self.thread.start()

    def ready(self) -> Served:
        until = time.monotonic() + 60
        while self.service.status == "starting" and time.monotonic() < until:
            time.sleep(0.02)
        assert self.service.status == "ready", self.service.error
        return self

    def close(self) -> None:
        self.service.stop(1.0)
        self.server.finish(2.0)
        self.server.shutdown()
        self.server.server_close()
        self.thread.join(10)

    def remote(self, **options: Any) -> RemoteReward:
        values = {"url": self.server.url, "timeout_s": 20, "retries": 0, "retry_wait_s": 0.05, **options}
        made = RemoteReward(RemoteOptions.model_validate(values))
        made.setup("cpu")
        return made

    def ask(self, method: str, path: str, body: bytes | None = None, **headers: str) -> tuple[int, Any]:
        host, port = self.server.server_address[:2]
        with contextlib.closing(http.client.HTTPConnection(str(host), int(port), timeout=30)) as connection:
            connection.request(method, path, body, headers)
            response = connection.getresponse()
            return response.status, json.loads(response.read())


@contextlib.contextmanager
def serving(chosen: Selected, device: str = "cpu", **settings: Any) -> Iterator[Served]:
    made = Served(chosen, device, **settings)
    try:
        yield made
    finally:
        made.close()


@pytest.fixture(scope="module")
def numeric() -> Iterator[Served]:
    with serving(selected("numeric")) as made:
        yield made.ready()


@pytest.fixture(scope="module")
def strange(misbehaving: Selected) -> Iterator[Served]:
    with serving(misbehaving, deadline_s=2.0) as made:
        yield made.ready()


def words(*texts: str) -> list[Sample]:
    return [text_sample(text, sample_id=i) for i, text in enumerate(texts)]


def executed(choice: Mapping[str, Any], chosen: Selected, samples: Sequence[Sample]) -> list[Scored]:
    """As in a run."""
    with RewardExecutor([RewardChoice.model_validate(choice)], [chosen], "cpu") as rewards:
        rewards.setup()
        return rewards.score(samples)


# ----------------------------------------------------------------------------------------------------- the same results


class TestRemoteNumeric(RewardConformance):
    """The whole kit on `remote`, with a text rule behind it."""

    component = "remote"
    expected = (1.0, 1.0, 0.0, 0.0, 0.0, 1.0, 1.0, 0.0, 1.0, 0.0)
    served: ClassVar[Served]

    @pytest.fixture(scope="class", autouse=True)
    @classmethod
    def _served(cls, numeric: Served) -> None:
        cls.served = numeric

    @classmethod
    def make_options(cls, folder: Path) -> Mapping[str, Any]:
        return {"url": cls.served.server.url, "reward": "numeric"}


@pytest.mark.parametrize(
    ("word", "options", "samples"),
    [
        ("length", {"maximum": 3, "ramp": 2}, words(*TEXTS)),
        ("jpeg_compressibility", {"quality": 80}, [*IMAGES, text_sample("no image")]),
    ],
)
def test_results_equal_those_of_the_local_reward(word: str, options: dict[str, Any], samples: list[Sample]) -> None:
    local = executed({"name": word, "run": "inline"}, selected(word, **options), samples)
    with serving(selected(word, **options)) as made:
        made.ready()
        remote = selected("remote", url=made.server.url, reward=word, version=">=0.1", samples_per_request=2)
        there = executed({"name": "remote", "label": word, "run": "inline"}, remote, samples)
    strip = re.compile(r"reward '\w+' of [\w-]+ [\w.]+: ")
    assert [(s.value, s.sub_scores) for s in there] == [(s.value, s.sub_scores) for s in local]
    assert [strip.sub("", s.failure or "") for s in there] == [strip.sub("", s.failure or "") for s in local]
    assert any(s.value is not None for s in there)


def test_a_sample_that_cannot_be_sent_fails_alone(numeric: Served) -> None:
    odd = replace(text_sample("42"), prompt=Prompt(index=0, text="?", answer="42", columns={"at": b"x"}, origin="f:1"))
    results = numeric.remote().score([text_sample("42"), odd, text_sample("41")])
    assert [r.value for r in results] == [1.0, None, 0.0]
    assert "column 'at' of f:1" in str(results[1].failure)
    assert [r.value for r in numeric.remote(columns=[]).score([odd])] == [1.0]


# ------------------------------------------------------------------------------------------------------ what goes wrong


def test_health_says_what_is_served(numeric: Served) -> None:
    status, health = numeric.ask("GET", "/health")
    assert status == 200
    assert (health["status"], health["reward"], health["distribution"]) == ("ready", "numeric", "mmrl-core")
    assert health["options"]["correct_weight"] == 1.0
    assert health["batch_size"] == 64


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        (b"{", 400, "Expecting"),
        (b"[" * 100_000, 400, "recursion"),
        (b"[]", 400, "JSON object"),
        (b'{"samples": []}', 400, "protocol None; this service speaks"),
        (b'{"protocol": 1, "samples": [{}]}', 400, "not a sample"),
        (b'{"protocol": 1, "samples": [], "deadline_s": -1}', 400, "deadline_s"),
        (b"x" * ((1 << 20) + 1), 413, "the most is 1 MiB"),
    ],
)
def test_a_request_that_is_none_is_refused(numeric: Served, body: bytes, status: int, said: str) -> None:
    got, answer = numeric.ask("POST", "/score", body)
    assert got == status
    assert said in answer["error"]


def test_paths_and_missing_lengths_are_refused(numeric: Served) -> None:
    assert numeric.ask("GET", "/score")[0] == 404
    assert numeric.ask("POST", "/health", b"{}")[0] == 404
    assert numeric.ask("POST", "/score", None, **{"Content-Length": "many"})[0] == 411


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"reward": "math"}, "serves the reward 'numeric', not 'math'"),
        ({"version": ">=9"}, "the recipe wants version >=9"),
    ],
)
def test_another_reward_or_version_stops_the_run_before_it_begins(
    numeric: Served, options: dict[str, str], said: str
) -> None:
    with pytest.raises(RewardError, match=said):
        numeric.remote(**options)


def test_a_service_that_is_not_there_is_said_in_time() -> None:
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{reserved.getsockname()[1]}"
        begin = time.monotonic()
        with pytest.raises(RewardError, match=rf"{url} is not there after 1 s: .*refused.*mmrl serve-reward"):
            RemoteReward(RemoteOptions(url=url, start_wait_s=1)).setup("cpu")
    assert time.monotonic() - begin < 10


def test_a_service_that_goes_away_fails_samples_and_comes_back(misbehaving: Selected) -> None:
    """A run that has begun goes on: samples fail, with the reason, until the service is there again."""
    with serving(misbehaving) as made:
        remote = made.ready().remote(retries=1)
        port = made.server.server_address[1]
        assert remote.score(words("fine"))[0].value == 1.0
    begin = time.monotonic()
    with pytest.raises(BatchFailedError, match=rf"at http://127.0.0.1:{port}: .*refused.* \(2 attempts\)"):
        remote.score(words("fine"))
    assert time.monotonic() - begin < 10


def test_a_slow_reward_is_given_up_at_the_clients_limit(misbehaving: Selected) -> None:
    with serving(misbehaving) as made:
        remote = made.ready().remote(timeout_s=1.0, retries=5)
        begin = time.monotonic()
        with pytest.raises(BatchFailedError, match=r"no (result|answer) within"):
            remote.score(words("sleep 25"))
        assert time.monotonic() - begin < 15


def test_a_reward_that_hangs_is_killed_and_replaced(strange: Served) -> None:
    before = strange.service.health()["restarts"]
    (failed,) = strange.remote().score(words("sleep 600"))
    assert failed.failure == "timed out after 2 s"
    (fine,) = strange.remote().score(words("fine"))
    assert fine.value == 1.0
    assert strange.service.health()["restarts"] == before + 1


@pytest.mark.parametrize(("word", "said"), [("raise", "KeyError: 'told to'"), ("die", "exited with status 3")])
def test_a_reward_that_breaks_fails_its_samples_only(strange: Served, word: str, said: str) -> None:
    results = strange.remote().score(words("fine", "fine", "fine", "fine", word, "fine"))
    assert [r.value for r in results] == [4.0] * 4 + [None] * 2, "batches of 4: the second has the sample that breaks"
    assert all(said in str(r.failure) for r in results[4:])


def at_once(made: Served, *calls: Callable[[], Any]) -> list[Any]:
    """Every call in a thread of its own, begun when the one before has arrived; results or exceptions, in order. The
    first is being scored when the second comes."""
    answers: list[Any] = [None] * len(calls)

    def arrived() -> int:
        health = made.service.health()
        return int(health["requests"] + health["refused_requests"])

    def until(condition: Callable[[], bool]) -> None:
        limit = time.monotonic() + 20
        while not condition() and time.monotonic() < limit:
            time.sleep(0.005)

    def one(place: int, call: Callable[[], Any]) -> None:
        try:
            answers[place] = call()
        except BatchFailedError as error:
            answers[place] = error

    threads = [threading.Thread(target=one, args=item) for item in enumerate(calls)]
    for place, thread in enumerate(threads):
        before = arrived()
        thread.start()
        until(lambda before=before: arrived() > before or made.service.status != "ready")  # type: ignore[misc]
        if place == 0:
            until(lambda: made.service.health()["waiting_requests"] == 0)
    for thread in threads:
        thread.join(60)
    return answers


def test_requests_that_wait_are_scored_together(strange: Served) -> None:
    """The value of each sample is the size of its batch: while the first request sleeps three others gather."""
    remote = strange.remote()
    sleeping, *waiting = at_once(strange, *(lambda t=t: remote.score(words(t)) for t in ("sleep 1", "a", "b", "c")))
    assert [r.value for r in sleeping] == [1.0]
    assert [[r.value for r in results] for results in waiting] == [[3.0]] * 3


def test_one_requests_mistake_is_not_anothers(strange: Served) -> None:
    remote = strange.remote()
    _, bad, good = at_once(strange, *(lambda t=t: remote.score(words(t)) for t in ("sleep 1", "raise", "fine")))
    assert "told to" in bad[0].failure
    assert [r.value for r in good] == [1.0]


def test_a_full_queue_refuses_and_a_later_attempt_succeeds(misbehaving: Selected) -> None:
    with serving(misbehaving, waiting=1) as made:
        impatient, patient = made.ready().remote(), made.remote(retries=6, retry_wait_s=0.2)
        _, _, refused, served = at_once(
            made,
            lambda: impatient.score(words("sleep 1.2")),
            lambda: impatient.score(words("fine")),
            lambda: impatient.score(words("fine")),
            lambda: patient.score(words("fine")),
        )
        assert isinstance(refused, BatchFailedError)
        assert "status 503: 1 requests are waiting already" in refused.reason
        assert served[0].value is not None
        assert made.service.health()["refused_requests"] >= 2


def test_what_waits_is_answered_before_the_end(misbehaving: Selected) -> None:
    with serving(misbehaving) as made:
        remote = made.ready().remote()
        running, waiting, stopped = at_once(
            made,
            lambda: remote.score(words("sleep 0.6")),
            lambda: remote.score(words("fine")),
            lambda: made.service.stop(10.0),
        )
        assert (running[0].value, waiting[0].value, stopped) == (1.0, 1.0, None)
        with pytest.raises(BatchFailedError, match="status 503: the service is stopping"):
            remote.score(words("fine"))


def test_not_ready_is_waited_for_and_broken_is_said(misbehaving: Selected) -> None:
    with serving(misbehaving, "slow") as made:
        assert made.ask("GET", "/health")[1]["status"] == "starting"
        body = json.dumps({"protocol": PROTOCOL, "samples": [sample_to_json(text_sample("x"))]}).encode()
        assert made.ask("POST", "/score", body) == (503, {"error": "the service is starting"})
        with pytest.raises(RewardError, match="it is 'starting', not ready"):
            made.remote(start_wait_s=0.1)
        made.service.stop(0.1)
    with serving(misbehaving, "broken") as made:
        assert made.service.ended.wait(60)
        assert "no weights here" in str(made.service.error)


class Fake(BaseHTTPRequestHandler):
    """Answers /health as a service would, and everything else as the test says."""

    protocol: ClassVar[int] = PROTOCOL
    reply: ClassVar[Callable[[Fake], None]]

    def do_GET(self) -> None:
        identity = {"reward": "r", "distribution": "d", "version": "1", "options": None}
        self.say(200, {"status": "ready", "protocol": self.protocol, **identity})

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        type(self).reply(self)

    def say(self, status: int, message: Any) -> None:
        self.send_response(status)
        self.end_headers()
        self.wfile.write(message if isinstance(message, bytes) else json.dumps(message).encode())

    def drip(self) -> None:
        with contextlib.suppress(OSError):
            for _ in range(200):
                self.wfile.write(b"HTTP/1.0 200 OK\r\nX: y\r\n"[:1])
                time.sleep(0.05)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        pass


@contextlib.contextmanager
def pretending(reply: Callable[[Fake], None], protocol: int = PROTOCOL) -> Iterator[str]:
    handler = type("Handler", (Fake,), {"reply": reply, "protocol": protocol})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)


GOOD = {"value": 1.0, "scores": {}}
OTHER = {"reward": "r", "distribution": "d", "version": "2", "options": None, "results": [GOOD]}


@pytest.mark.parametrize(
    ("reply", "said"),
    [
        (lambda h: h.say(500, {"error": "out of luck"}), "status 500: out of luck"),
        (lambda h: h.say(404, b"<html>nginx</html>"), "status 404: <html>nginx"),
        (lambda h: h.say(503, b""), r"status 503: without a reason \(2 attempts\)"),
        (lambda h: h.say(200, b"no json"), "no JSON object"),
        (lambda h: h.say(200, [1]), "no JSON object"),
        (lambda h: h.say(200, OTHER), "something else than at the start of the run: version '1' -> '2'"),
        (lambda h: h.say(200, {**OTHER, "version": "1", "results": [GOOD, GOOD]}), "2 results for 1 samples"),
        (lambda h: h.connection.shutdown(socket.SHUT_RDWR), r"\(2 attempts\)"),
        (lambda h: h.drip(), "no answer within"),
    ],
)
def test_answers_that_are_none_fail_the_batch_in_time(reply: Callable[[Fake], None], said: str) -> None:
    with pretending(reply) as url:
        remote = RemoteReward(RemoteOptions(url=url, timeout_s=1.5, retries=1, retry_wait_s=0.05))
        remote.setup("cpu")
        begin = time.monotonic()
        with pytest.raises(BatchFailedError, match=said):
            remote.score(words("x"))
        assert time.monotonic() - begin < 6


def test_another_protocol_stops_the_run_before_it_begins() -> None:
    with (
        pretending(lambda h: None, protocol=99) as url,
        pytest.raises(RewardError, match="protocol 99, this mmrl-core 1"),
    ):
        RemoteReward(RemoteOptions(url=url)).setup("cpu")


# ---------------------------------------------------------------------------------------------------------------- runs


def rewards(url: str) -> str:
    """For a run: the service's reward under the name of the local one."""
    return f"rewards=[{{name: remote, label: numeric, url: {url!r}, retries: 0, start_wait_s: 5}}]"


def test_a_run_learns_the_same_from_a_service(workshop: Any) -> None:
    with serving(selected("numeric", format_weight=0.25)) as made:
        workshop.train("remote", "algorithm.steps=2", rewards(made.ready().server.url))
    workshop.train("local", "algorithm.steps=2", "rewards=[{name: numeric, run: inline, format_weight: 0.25}]")
    score = [(row["grpo/score/mean"], row["grad_norm"]) for row in workshop.metrics("remote")]
    assert score == [(row["grpo/score/mean"], row["grad_norm"]) for row in workshop.metrics("local")]
    here, there = workshop.weights("local"), workshop.weights("remote")
    assert all(torch.equal(here[name], there[name]) for name in here)


def test_a_run_whose_service_dies_loses_nothing(workshop: Any) -> None:
    """Steps without the service learn nothing; three of them end the run, with a checkpoint that goes on later."""
    steps, checkpoints = "algorithm.steps=8", "checkpoint.every=1"
    numeric = selected("numeric", format_weight=0.25)
    with serving(numeric) as made:
        url = made.ready().server.url

        def die_after_two_steps() -> None:
            until = time.monotonic() + 200
            while made.service.health()["requests"] < 2 and time.monotonic() < until:
                time.sleep(0.005)
            made.close()

        killer = threading.Thread(target=die_after_two_steps)
        killer.start()
        done = workshop.train("dying", steps, checkpoints, rewards(url), check=False)
        killer.join(30)
    assert done.status == 1
    assert f"the reward service at {url}: " in done.all
    assert "3 steps in a row had no group to learn from" in done.err
    failed = [row["rewards/failed_samples"] for row in workshop.metrics("dying")]
    assert failed[0] == 0
    assert failed[-1] == 12
    assert len(failed) < 8
    port = int(url.rpartition(":")[2])
    with serving(numeric, port=port) as made:
        workshop.train("dying", steps, checkpoints, rewards(made.ready().server.url))
    rows = workshop.metrics("dying")
    assert [row["step"] for row in rows] == list(range(1, 9))
    assert rows[-1]["rewards/failed_samples"] == 0


# ---------------------------------------------------------------------------------------------------------- the command


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


@contextlib.contextmanager
def command(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-m", "mmrl_core.cli.main", "serve-reward", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


def test_the_command_serves_until_it_is_told_to_stop() -> None:
    with command("numeric", "correct_weight=2.5", "--port", "0", "--batch-size", "3") as process:
        assert process.stdout is not None
        said = process.stdout.readline()
        found = re.fullmatch(r"mmrl: reward 'numeric' of mmrl-core [\w.]+ on (http://127\.0\.0\.1:\d+)\n", said)
        assert found, said
        remote = RemoteReward(RemoteOptions(url=found[1], reward="numeric"))
        remote.setup("cpu")
        assert [r.value for r in remote.score(words("42", "41", "42", "42"))] == [2.5, 0.0, 2.5, 2.5]
        assert process.stdout.readline() == "mmrl: ready\n"
        process.send_signal(signal.SIGTERM)
        rest, _ = process.communicate(timeout=60)
        assert (process.returncode, rest) == (0, "mmrl: stopped after 1 requests\n")


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["numeic"], 1, "Did you mean 'numeric'"),
        (["numeric", "tolerence=1"], 2, "override 'tolerence=1': tolerence: unknown field"),
        (["numeric", "--port", "70000"], 2, "70000 is not a port"),
        (["length"], 2, "maximum: required field is missing"),
    ],
)
def test_the_command_says_what_is_wrong(arguments: list[str], status: int, said: str) -> None:
    with command(*arguments) as process:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == status
        assert said in errors


def test_a_reward_that_cannot_be_set_up_ends_the_command() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        with command("numeric", "--port", port) as process:
            _, errors = process.communicate(timeout=120)
            assert process.returncode == 1
            assert f"cannot listen on 127.0.0.1 port {port}" in errors
    with command("remote", "url=http://127.0.0.1:9", "start_wait_s=0", "--port", "0") as process:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 1
        assert "failed to set up: the reward service at http://127.0.0.1:9 is not there" in errors


def test_pictures_and_text_of_one_request_keep_their_order(numeric: Served) -> None:
    samples = words(*(str(42 + i % 2) for i in range(40)))
    values = [r.value for r in numeric.remote().score(samples)]
    assert values == [float(i % 2 == 0) for i in range(40)]
    assert np.mean(values) == 0.5
