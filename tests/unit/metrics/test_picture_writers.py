"""What writers leave behind of images and videos: contact sheets, TensorBoard, wandb, and the console's words."""

from __future__ import annotations

import io
import sys
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pluggy
import pytest
from rich.console import Console

from mmrl_core.contracts import Prompt, Sample
from mmrl_core.errors import MediaError, ObserverError
from mmrl_core.hookspecs import PROJECT, LifecycleHooks
from mmrl_core.launch.observers import NoObservers, RunObservers
from mmrl_core.media.images import read_image
from mmrl_core.media.sheets import sample_sheet, side_by_side
from mmrl_core.media.videos import read_video
from mmrl_core.metrics.console import ConsoleWriter
from mmrl_core.metrics.images import ImagesWriter, first_middle_last
from mmrl_core.metrics.options import ConsoleOptions, ImagesOptions, TensorboardOptions, WandbOptions
from mmrl_core.metrics.tensorboard import TensorboardWriter
from mmrl_core.metrics.wandb import WandbWriter
from mmrl_core.plugins import load_plugins
from mmrl_core.recipe import Recipe

RECIPE = Recipe.model_validate(
    {
        "name": "demo",
        "model": {"path": "tiny"},
        "data": "arithmetic",
        "rewards": ["exact"],
        "algorithm": {"steps": 6, "prompts_per_step": 2, "samples_per_prompt": 2},
    }
)
TEXT = [Sample(sample_id=0, group_id=0, prompt=Prompt(index=0, text="2+2"), text="4")]


def images(step: int, count: int = 4) -> list[Sample]:
    """8 x 8 images whose grey level says the step."""
    pixels = [np.full((8, 8, 3), 10 * step + i, np.uint8) for i in range(count)]
    prompt = Prompt(index=0, text="the digit 3")
    return [Sample(sample_id=i, group_id=0, prompt=prompt, image=p) for i, p in enumerate(pixels)]


def videos(step: int) -> list[Sample]:
    frames = np.stack([np.full((33, 48, 3), 10 * step + 20 * f, np.uint8) for f in range(5)])
    return [
        *images(step, 1),
        Sample(sample_id=9, group_id=1, prompt=Prompt(index=1, text="a fox"), video=frames, score=-0.5),
    ]


def play(
    writer: Any,
    run_dir: Path,
    first: int,
    last: int,
    samples: Any = images,
    *,
    every: int = 2,
    end: bool = True,
) -> None:
    """The hooks through pluggy, in the order of a run that evaluates before training and every `every` steps."""
    manager = pluggy.PluginManager(PROJECT)
    manager.add_hookspecs(LifecycleHooks)
    manager.register(writer)
    manager.check_pending()
    hook = manager.hook
    hook.mmrl_run_start(recipe=RECIPE, run_dir=str(run_dir), first_step=first)
    if first == 1:
        hook.mmrl_evaluation_end(step=0, metrics={"eval/score/mean": 0.125}, samples=samples(0))
    for step in range(first, last + 1):
        if step % every == 0:
            hook.mmrl_evaluation_end(step=step, metrics={"eval/score/mean": step / 10}, samples=samples(step))
        hook.mmrl_step_end(step=step, metrics={"grpo/score/mean": step / 20}, samples=samples(step))
    if end:
        hook.mmrl_run_end(summary={"outcome": "finished"})


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


class Picture:
    """Stands in for wandb.Image and wandb.Video; like the latter it takes the file's content when it is logged."""

    def __init__(self, content: Any, caption: str, **more: Any) -> None:
        self.content, self.caption, self.more = content, caption, more


class Run:
    """What the writer uses of a wandb run."""

    id = "abc"

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self.summary: dict[str, Any] = {}

    def define_metric(self, *_: Any, **__: Any) -> None: ...

    def finish(self, exit_code: int) -> None: ...

    def log(self, row: Mapping[str, Any]) -> None:
        for picture in row.get("eval/samples", ()):
            if isinstance(picture.content, str):
                picture.content, _ = read_video(Path(picture.content))
        self.rows.append(dict(row))


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    stand_in = Run()
    module = types.SimpleNamespace(init=lambda **_: stand_in, Image=Picture, Video=Picture)
    monkeypatch.setitem(sys.modules, "wandb", module)
    return stand_in


# --------------------------------------------------------------------------------------------------------------- images


def test_sheets_of_evaluations_and_steps(tmp_path: Path) -> None:
    play(ImagesWriter(ImagesOptions(every=3)), tmp_path, 1, 6)
    evaluations = [f"eval_{step:06d}.png" for step in (0, 2, 4, 6)]
    assert names(tmp_path / "images") == [*evaluations, "progress.png", "step_000003.png", "step_000006.png"]
    expected = sample_sheet(images(4), title="step 4: mean score 0.4")
    assert np.array_equal(read_image(tmp_path / "images" / "eval_000004.png"), expected)
    expected = sample_sheet(images(0), title="before training: mean score 0.125")
    assert np.array_equal(read_image(tmp_path / "images" / "eval_000000.png"), expected)
    expected = sample_sheet(images(3), title="step 3: mean score 0.15")
    assert np.array_equal(read_image(tmp_path / "images" / "step_000003.png"), expected)


def test_progress_is_the_first_the_middle_and_the_last_evaluation(tmp_path: Path) -> None:
    play(ImagesWriter(ImagesOptions(every=0)), tmp_path, 1, 6)
    folder = tmp_path / "images"
    chosen = [read_image(folder / f"eval_{step:06d}.png") for step in (0, 2, 6)]
    assert np.array_equal(read_image(folder / "progress.png"), side_by_side(chosen))
    assert "step_" not in "".join(names(folder)), "every: 0"


@pytest.mark.parametrize(
    ("steps", "chosen"),
    [
        ([0], [0]),
        ([0, 10], [0, 10]),
        ([0, 10, 20], [0, 10, 20]),
        ([0, 10, 20, 30, 40], [0, 20, 40]),
        ([0, 2, 4, 6], [0, 2, 6]),
        ([0, 90, 100], [0, 90, 100]),
        ([30, 5, 0], [0, 5, 30]),
    ],
)
def test_which_evaluations_are_chosen(steps: list[int], chosen: list[int]) -> None:
    assert first_middle_last(dict.fromkeys(steps)) == chosen


def test_a_single_evaluation_needs_no_comparison(tmp_path: Path) -> None:
    play(ImagesWriter(ImagesOptions()), tmp_path, 1, 1)
    assert names(tmp_path / "images") == ["eval_000000.png"]


def test_text_leaves_nothing_behind(tmp_path: Path) -> None:
    play(ImagesWriter(ImagesOptions(every=1)), tmp_path, 1, 4, lambda step: TEXT)
    play(ImagesWriter(ImagesOptions(every=1)), tmp_path, 5, 6, lambda step: [])
    assert list(tmp_path.iterdir()) == []


def test_at_most_so_many_samples(tmp_path: Path) -> None:
    play(ImagesWriter(ImagesOptions(samples=3)), tmp_path, 1, 1, lambda step: images(step, 9)[::-1])
    expected = sample_sheet(images(0, 3), title="before training: mean score 0.125")
    assert np.array_equal(read_image(tmp_path / "images" / "eval_000000.png"), expected), "the first by sample id"


def test_a_resume_leaves_what_an_unbroken_run_leaves(tmp_path: Path) -> None:
    options = ImagesOptions(every=1)
    play(ImagesWriter(options), tmp_path / "unbroken", 1, 3)
    play(ImagesWriter(options), tmp_path / "unbroken", 4, 6, every=3)
    play(ImagesWriter(options), tmp_path / "broken", 1, 5, end=False)
    (tmp_path / "broken" / "images" / "mine.png").write_bytes(b"not ours")
    play(ImagesWriter(options), tmp_path / "broken", 4, 6, every=3)
    (tmp_path / "broken" / "images" / "mine.png").unlink()
    wanted = names(tmp_path / "unbroken" / "images")
    assert "eval_000004.png" not in wanted, "evaluated no more: the picture of an undone step must go"
    assert names(tmp_path / "broken" / "images") == wanted
    for name in wanted:
        both = [(tmp_path / run / "images" / name).read_bytes() for run in ("broken", "unbroken")]
        assert both[0] == both[1], name


def test_a_run_that_died_before_its_first_checkpoint_starts_over(tmp_path: Path) -> None:
    play(ImagesWriter(ImagesOptions(every=1)), tmp_path, 1, 5, end=False)
    play(ImagesWriter(ImagesOptions(every=1)), tmp_path, 1, 1)
    assert names(tmp_path / "images") == ["eval_000000.png", "step_000001.png"]


def test_videos_beside_the_sheet(tmp_path: Path) -> None:
    pytest.importorskip("av", reason="pip install 'mmrl-core[video]'")
    play(ImagesWriter(ImagesOptions(videos=True, fps=12, every=1, frames=2)), tmp_path, 1, 1, videos)
    folder = tmp_path / "images"
    assert names(folder) == ["eval_000000.png", "eval_000000_0001.mp4", "step_000001.png", "step_000001_0001.mp4"]
    frames, fps = read_video(folder / "step_000001_0001.mp4")
    assert (frames.shape, fps) == ((5, 34, 48, 3), 12.0)
    assert np.abs(frames[:, 16, 24, 0].astype(int) - [10, 30, 50, 70, 90]).max() <= 3
    expected = sample_sheet(videos(1), frames=2, title="step 1: mean score 0.05")
    assert np.array_equal(read_image(folder / "step_000001.png"), expected)
    play(ImagesWriter(ImagesOptions(videos=True)), tmp_path, 1, 0, lambda step: TEXT)
    assert names(folder) == [], "videos of undone steps go too"


def test_videos_need_their_package_before_the_first_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(MediaError, match=r"writer 'images'.*pip install 'mmrl-core\[video\]'"):
        play(ImagesWriter(ImagesOptions(videos=True)), tmp_path, 1, 1, videos)
    play(ImagesWriter(ImagesOptions()), tmp_path, 1, 1, videos)
    assert names(tmp_path / "images") == ["eval_000000.png"], "sheets need no package"


def test_a_run_that_never_started_ends_quietly() -> None:
    ImagesWriter(ImagesOptions()).mmrl_run_end(summary={"outcome": "failed"})


def test_a_broken_sheet_of_an_earlier_session_is_named(tmp_path: Path) -> None:
    play(ImagesWriter(ImagesOptions()), tmp_path, 1, 3, end=False)
    (tmp_path / "images" / "eval_000000.png").write_bytes(b"torn")
    with pytest.raises(MediaError, match=r"eval_000000\.png"):
        play(ImagesWriter(ImagesOptions()), tmp_path, 4, 4)


# ---------------------------------------------------------------------------------------------------------- TensorBoard


def events(run_dir: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(run_dir / "tensorboard"), size_guidance={"images": 0, "scalars": 0})
    return found.Reload()


def decoded(event: Any) -> Any:
    from PIL import Image

    return np.asarray(Image.open(io.BytesIO(event.encoded_image_string)).convert("RGB"))


def test_tensorboard_shows_evaluations(tmp_path: Path) -> None:
    play(TensorboardWriter(TensorboardOptions(eval_images=2)), tmp_path, 1, 4, videos)
    found = events(tmp_path)
    assert sorted(found.Tags()["images"]) == ["eval/image/0", "eval/image/1"]
    stills, firsts = (found.Images(f"eval/image/{i}") for i in range(2))
    assert [event.step for event in stills] == [event.step for event in firsts] == [0, 2, 4]
    assert np.array_equal(decoded(stills[1]), images(2)[0].image)
    assert np.array_equal(decoded(firsts[2]), videos(4)[1].video[0]), "the first frame"
    scores = found.Scalars("eval/score/mean")
    assert [(event.step, event.value) for event in scores] == [(0, 0.125)], "those of steps come with the step"


def test_tensorboard_shows_steps_when_asked(tmp_path: Path) -> None:
    options = TensorboardOptions(eval_images=0, step_images=1, samples_every=3)
    play(TensorboardWriter(options), tmp_path, 1, 6)
    found = events(tmp_path)
    assert found.Tags()["images"] == ["samples/image/0"]
    assert [event.step for event in found.Images("samples/image/0")] == [1, 3, 6]


@pytest.mark.parametrize("first", [1, 3])
def test_the_evaluation_after_the_last_step_is_written(run: Run, tmp_path: Path, first: int) -> None:
    for writer in (TensorboardWriter(TensorboardOptions()), WandbWriter(WandbOptions())):
        play(writer, tmp_path, first, 3, end=False)
        writer.mmrl_evaluation_end(step=3, metrics={"eval/score/mean": 0.75}, samples=[])
        writer.mmrl_run_end(summary={})
    assert [(e.step, e.value) for e in events(tmp_path).Scalars("eval/score/mean")][-1] == (3, 0.75)
    assert run.rows[-1] == {"step": 3, "eval/score/mean": 0.75}


def test_tensorboard_of_text_has_no_images(tmp_path: Path) -> None:
    play(TensorboardWriter(TensorboardOptions(step_images=4)), tmp_path, 1, 2, lambda step: TEXT)
    assert events(tmp_path).Tags()["images"] == []


# ---------------------------------------------------------------------------------------------------------------- wandb


def test_wandb_shows_evaluations(run: Run, tmp_path: Path) -> None:
    play(WandbWriter(WandbOptions(eval_images=3)), tmp_path, 1, 2)
    before, first, evaluated, second = run.rows
    assert (before["step"], before["eval/score/mean"]) == (0, 0.125)
    assert [p.caption for p in before["eval/samples"]] == ["the digit 3"] * 3
    assert np.array_equal(before["eval/samples"][2].content, images(0)[2].image)
    assert set(evaluated) == {"step", "eval/samples"}, "the metrics come with the step"
    assert (first["step"], evaluated["step"], second["step"]) == (1, 2, 2)


def test_wandb_shows_the_first_frame_or_the_whole_video(run: Run, tmp_path: Path) -> None:
    pytest.importorskip("av", reason="pip install 'mmrl-core[video]'")
    play(WandbWriter(WandbOptions()), tmp_path, 1, 0, videos)
    play(WandbWriter(WandbOptions(videos=True)), tmp_path, 1, 0, videos)
    (_, frame), (still, whole) = (row["eval/samples"] for row in run.rows)
    assert np.array_equal(frame.content, videos(0)[1].video[0])
    assert still.content.shape == (8, 8, 3)
    assert (whole.content.shape, whole.more, whole.caption) == ((5, 34, 48, 3), {"format": "mp4"}, "a fox  -0.5")
    assert names(tmp_path / "temporary") == [], "nothing is left behind"


def test_wandb_of_text_logs_no_pictures(run: Run, tmp_path: Path) -> None:
    play(WandbWriter(WandbOptions()), tmp_path, 1, 2, lambda step: TEXT)
    assert [row["step"] for row in run.rows] == [0, 1, 2]
    assert not any("eval/samples" in row for row in run.rows)


def test_wandb_videos_need_their_package(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(MediaError, match=r"writer 'wandb'.*pip install 'mmrl-core\[video\]'"):
        play(WandbWriter(WandbOptions(videos=True)), tmp_path, 1, 1)


# -------------------------------------------------------------------------------------------------------------- console


def printed(metrics: Mapping[str, float], samples: Sequence[Sample], *, terminal: bool = False) -> str:
    stream = io.StringIO()
    console = Console(file=stream, width=100, force_terminal=terminal, color_system=None)
    writer = ConsoleWriter(ConsoleOptions(samples=4), console)
    writer.mmrl_run_start(recipe=RECIPE, run_dir="runs/demo", first_step=1)
    writer.mmrl_evaluation_end(step=0, metrics={"eval/score/mean": 0.3333}, samples=samples)
    writer.mmrl_evaluation_end(step=1, metrics={"eval/score/mean": 0.7777}, samples=samples)
    writer.mmrl_step_end(step=1, metrics=metrics, samples=samples)
    writer.mmrl_run_end(summary={"outcome": "finished"})
    return stream.getvalue()


def test_samples_a_second_where_there_are_no_tokens() -> None:
    text = printed({"timing/all": 10.0, "perf/samples_per_second": 3.2}, [])
    assert "3.2 samples/s" in text
    assert "tokens/s" not in text
    both = printed({"timing/all": 10.0, "perf/samples_per_second": 3.2, "perf/tokens": 50.0}, [])
    assert "5 tokens/s" in both
    assert "samples/s" not in both


@pytest.mark.parametrize("terminal", [True, False])
def test_a_picture_has_words(terminal: bool) -> None:
    text = printed({}, [*videos(1), TEXT[0]], terminal=terminal)
    assert "image 8x8" in text
    assert "video 5x33x48" in text
    assert "-0.5" in text, "the score of a sample that has one"
    assert "before training  held-out 0.333" in text
    assert "0.778" not in text, "that of a step stands on the step's line"


# ------------------------------------------------------------------------------------------------------- who is told


class Watcher:
    """An installed plugin that nobody named."""

    def __init__(self, broken: bool) -> None:
        self.broken, self.told = broken, 0

    def mmrl_evaluation_end(self, step: int) -> None:
        self.told += 1
        if self.broken:
            raise ValueError("broken")


class NamedWriter:
    """A writer that the recipe names."""

    found = types.SimpleNamespace(name="mine")

    def create(self) -> Any:
        return Watcher(broken=True)


@pytest.mark.parametrize("broken", [True, False])
def test_observers_are_told_of_evaluations(broken: bool) -> None:
    observers = RunObservers(load_plugins(), [])
    watcher = Watcher(broken)
    observers._observers.append(("watcher", watcher))
    for step in (0, 5):
        observers.evaluation_end(step, {}, TEXT)
    assert watcher.told == (1 if broken else 2), "a broken plugin watches no more"
    NoObservers().evaluation_end(0, {}, TEXT)


def test_a_named_writer_that_fails_in_an_evaluation_stops_the_run() -> None:
    named: Any = NamedWriter()
    with pytest.raises(ObserverError, match="writer 'mine' failed in mmrl_evaluation_end: ValueError: broken"):
        RunObservers(load_plugins(), [named]).evaluation_end(0, {}, TEXT)


def test_a_picture_that_is_none_stops_with_its_name(tmp_path: Path) -> None:
    bad = Sample(sample_id=3, group_id=0, prompt=Prompt(index=0, text="x"), image=np.zeros((4, 4)))
    with pytest.raises(MediaError, match="the image of sample 3"):
        play(ImagesWriter(ImagesOptions()), tmp_path, 1, 1, lambda step: [bad])
    assert not (tmp_path / "images").exists()
