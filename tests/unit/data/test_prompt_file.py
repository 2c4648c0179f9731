"""`mmrl data prompts`: a text file with one prompt a line to Parquet files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pyarrow.parquet
import pytest

from mmrl_core.cli import main as cli
from mmrl_core.data.options import TableOptions
from mmrl_core.data.prompt_file import PromptCounts, PromptJob, read_prompt_file, write_prompts
from mmrl_core.data.tables import ParquetSource
from mmrl_core.errors import DataError

TEXT = "a red dog\n\n  a cat, on a mat \r\na red dog\n \t \nein Bär 🐻"


def rows(path: Path) -> list[tuple[str, int]]:
    return [(row["prompt"], row["index"]) for row in pyarrow.parquet.read_table(path).to_pylist()]


def job(folder: Path, content: bytes, **changes: object) -> PromptJob:
    (folder / "in.txt").write_bytes(content)
    return PromptJob(input=str(folder / "in.txt"), output=folder / "out.parquet", **changes)  # type: ignore[arg-type]


def left(folder: Path) -> Sequence[str]:
    return sorted(path.name for path in folder.iterdir())


def test_lines_are_prompts_and_blank_ones_are_counted(tmp_path: Path) -> None:
    counts = write_prompts(job(tmp_path, TEXT.encode()))
    assert rows(tmp_path / "out.parquet") == [
        ("a red dog", 0),
        ("a cat, on a mat", 1),
        ("a red dog", 2),
        ("ein Bär 🐻", 3),
    ]
    assert counts == PromptCounts(lines=6, blank=2, repeated=1, written=4, test=0)
    assert left(tmp_path) == ["in.txt", "out.parquet"]


def test_unique_keeps_the_first(tmp_path: Path) -> None:
    counts = write_prompts(job(tmp_path, TEXT.encode("utf-8-sig"), unique=True))
    assert rows(tmp_path / "out.parquet") == [("a red dog", 0), ("a cat, on a mat", 1), ("ein Bär 🐻", 2)]
    assert counts == PromptCounts(lines=6, blank=2, repeated=1, written=3, test=0)


def test_lines_are_numbered_as_in_an_editor(tmp_path: Path) -> None:
    (tmp_path / "in.txt").write_bytes(TEXT.encode())
    assert [line.number for line in read_prompt_file(str(tmp_path / "in.txt")).lines] == [1, 3, 4, 6]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"fine\n\nbro\xffken\n", ["in.txt:3", "0xff", "position 4"]),
        ("naïve".encode("latin-1"), ["in.txt:1", "not UTF-8"]),
        (TEXT.encode("utf-16"), ["in.txt:1", "UTF-16"]),
        (b"a\x00b\n", ["in.txt:1", "null character"]),
        (b"\n \n", ["no line holds a prompt"]),
        (b"", ["no line holds a prompt"]),
    ],
)
def test_bad_files_are_named_by_line(tmp_path: Path, content: bytes, words: list[str]) -> None:
    with pytest.raises(DataError) as caught:
        write_prompts(job(tmp_path, content))
    for word in words:
        assert word in str(caught.value)
    assert left(tmp_path) == ["in.txt"]


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere\.txt: cannot read it: No such file"):
        read_prompt_file(str(tmp_path / "nowhere.txt"))


def test_an_output_is_replaced_only_when_asked_for(tmp_path: Path) -> None:
    output = tmp_path / "out.parquet"
    output.write_text("precious")
    with pytest.raises(DataError, match="exists already"):
        write_prompts(job(tmp_path, b"a\n"))
    assert output.read_text() == "precious"
    write_prompts(job(tmp_path, b"a\n", overwrite=True))
    assert rows(output) == [("a", 0)]


def test_the_split_is_a_function_of_the_text(tmp_path: Path) -> None:
    lines = [f"prompt {n % 400}" for n in range(500)]
    test = tmp_path / "test.parquet"
    apart = job(tmp_path, "\n".join(lines).encode(), test_fraction=0.25, test_output=test)
    counts = write_prompts(apart)
    first = {text for text, _ in rows(test)}
    train = {text for text, _ in rows(apart.output)}
    assert not first & train
    assert first | train == set(lines)
    assert counts.written + counts.test == 500
    assert 0.18 < len(first) / 400 < 0.32
    assert sorted(index for path in (test, apart.output) for _, index in rows(path)) == list(range(500))
    # other prompts around them, another order: the same side
    again = job(
        tmp_path, "\n".join([*lines[::-2], "new"]).encode(), test_fraction=0.25, test_output=test, overwrite=True
    )
    write_prompts(again)
    assert {text for text, _ in rows(test)} - {"new"} == first & set(lines[::-2])


def test_a_split_that_leaves_nothing_writes_nothing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"test\.parquet: test fraction 0\.0001 of 2 prompts leaves none"):
        write_prompts(job(tmp_path, b"a\nb\n", test_fraction=0.0001, test_output=tmp_path / "test.parquet"))
    with pytest.raises(DataError, match="both outputs"):
        write_prompts(job(tmp_path, b"a\nb\n", test_fraction=0.5, test_output=tmp_path / "out.parquet"))
    assert left(tmp_path) == ["in.txt"]


def test_the_command_says_what_to_write_in_a_recipe(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in.txt").write_text(TEXT + "\nanother one\nand one more\n")
    arguments = ["data", "prompts", "in.txt", "made/train.parquet", "--unique"]
    assert cli.main([*arguments, "--test-fraction", "0.5", "--test-output", "made/test.parquet"]) == 0
    said = capsys.readouterr().out
    for label, count in (("lines read", 8), ("blank, left out", 2), ("repeated, left out", 1)):
        assert f"{label:<36} {count:>10,}" in said
    assert "data: {name: parquet, path: made/train.parquet, template: raw, answer_column: null}" in said
    assert "eval: data: {name: parquet, path: made/test.parquet" in said
    options = TableOptions(path="made/train.parquet", template="raw", answer_column=None, shuffle=False)
    source = ParquetSource(options, seed=0)
    source.prepare()
    found = [(source.prompt(i).text, source.prompt(i).columns["index"]) for i in range(len(source))]
    assert found == rows(tmp_path / "made" / "train.parquet")
    assert cli.main([*arguments, "--test-fraction", "0.5"]) == 1
    assert "belong together" in capsys.readouterr().err
    assert cli.main(arguments) == 1
    assert "exists already" in capsys.readouterr().err
