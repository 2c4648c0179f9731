import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mmrl_core.cli import data as data_command
from mmrl_core.data.options import TableOptions
from mmrl_core.data.preprocess import Job, Summary, preprocess
from mmrl_core.data.tables import ParquetSource
from mmrl_core.data.templates import load_template
from mmrl_core.errors import DataError, MmrlError, ModelError

WORDS = ["<unk>", "<bos>", "one", "two", "three", "four"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Words separated by white space; everything unknown is one token a word."""
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    path = tmp_path_factory.mktemp("tokenizer")
    PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", bos_token="<bos>").save_pretrained(path)
    return path


def problems(count: int) -> list[dict[str, Any]]:
    """Row i has i % 7 + 1 words; every 10th has no answer, every 25th (from 3) no problem."""
    rows: list[dict[str, Any]] = []
    for i in range(count):
        row = {"problem": " ".join(["one"] * (i % 7 + 1)), "answer": f"{i}", "solution": "because"}
        if i % 10 == 0:
            row["answer"] = ["", None, "  "][i // 10 % 3]
        if i % 25 == 3:
            row["problem"] = [None, " \n"][i // 25 % 2]
        rows.append(row)
    return rows


def written(path: Path, rows: list[Any]) -> Path:
    path.write_text(json.dumps(rows))
    return path


def job(tmp_path: Path, folder: Path, **changes: Any) -> Job:
    values = {
        "input": str(tmp_path / "in.json"),
        "output": tmp_path / "out.parquet",
        "tokenizer": str(folder),
        "template": "raw",
        "max_prompt_tokens": 5,
    }
    return Job(**{**values, **changes})


def leftovers(tmp_path: Path) -> list[str]:
    return sorted(p.name for p in tmp_path.rglob("*") if p.name != "in.json")


def test_rows_are_rendered_filtered_and_counted(tmp_path: Path, tokenizer: Path) -> None:
    rows = problems(1000)
    written(tmp_path / "in.json", rows)
    seen: list[tuple[int, int, int]] = []
    counter = PreTrainedTokenizerFast.from_pretrained(tokenizer)
    limit = len(counter(load_template("qwen_r1").render([{"role": "user", "content": "one " * 4 + "one"}])).input_ids)
    made = job(tmp_path, tokenizer, template="qwen_r1", max_prompt_tokens=limit)
    summary = preprocess(made, lambda *counts: seen.append(counts))
    expected, too_long, no_answer, no_problem = [], 0, 0, 0
    for i, row in enumerate(rows):
        if not (row["problem"] or "").strip():
            no_problem += 1
        elif not (row["answer"] or "").strip():
            no_answer += 1
        else:
            text = load_template("qwen_r1").render([{"role": "user", "content": row["problem"]}])
            tokens = len(counter(text).input_ids)
            if tokens > limit:
                too_long += 1
            else:
                expected.append({"prompt": text, "answer": str(i), "prompt_tokens": tokens, "source_row": i})
    assert too_long > 0
    assert max(row["prompt_tokens"] for row in expected) == limit
    assert pyarrow.parquet.read_table(made.output).to_pylist() == expected
    assert summary == Summary(
        rows=1000,
        kept=len(expected),
        too_long=too_long,
        without_answer=no_answer,
        without_problem=no_problem,
        longest=limit,
    )
    assert seen[-1] == (1000, 1000, 1000 - len(expected))
    assert [s[0] for s in seen] == sorted({s[0] for s in seen})


def test_end_to_end_with_two_workers(tmp_path: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written(tmp_path / "in.json", problems(900))
    alone = job(tmp_path, tokenizer, output=tmp_path / "alone.parquet")
    preprocess(alone)
    parser = argparse.ArgumentParser()
    data_command.add_parser(parser.add_subparsers())
    output = tmp_path / "made" / "two.parquet"
    command = ["data", "deepscaler", str(tmp_path / "in.json"), str(output), "--tokenizer", str(tokenizer)]
    args = parser.parse_args([*command, "--template", "raw", "--max-prompt-tokens", "5", "--workers", "2"])
    assert args.func(args) == 0
    assert output.read_bytes() == alone.output.read_bytes()
    assert not _workers(psutil.Process())
    printed = capsys.readouterr().out
    kept = pyarrow.parquet.read_metadata(output).num_rows
    for label, count in (
        ("rows read", 900),
        ("kept", kept),
        ("dropped, longer than 5 tokens", 900 - kept - 90 - 36),
        ("dropped, without an answer", 90),
        ("dropped, without a problem", 36),
    ):
        assert f"{label:<36} {count:>10,}" in printed
    source = ParquetSource(TableOptions(path=str(output), template="raw"), seed=0)
    source.prepare()
    assert source.prompt(0).text in {" ".join(["one"] * n) for n in range(1, 6)}


def _workers(parent: psutil.Process) -> list[psutil.Process]:
    return [child for child in parent.children() if "spawn_main" in " ".join(child.cmdline())]


def test_tokens_are_counted_without_a_second_begin_token(tmp_path: Path) -> None:
    from tokenizers.processors import TemplateProcessing

    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    folder = tmp_path / "tokenizer"
    fast = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", bos_token="<bos>")
    fast.chat_template = "{{ bos_token }} {{ messages[0]['content'] }} two"
    fast.save_pretrained(folder)
    written(tmp_path / "in.json", [{"problem": "one one", "answer": 4}])
    for template, prompt, tokens in (("raw", "one one", 3), ("chat", "<bos> one one two", 4)):
        made = job(tmp_path, folder, template=template, overwrite=True)
        preprocess(made)
        [row] = pyarrow.parquet.read_table(made.output).to_pylist()
        assert (row["prompt"], row["prompt_tokens"], row["answer"]) == (prompt, tokens, "4")


def test_system_message_and_metadata(tmp_path: Path, tokenizer: Path) -> None:
    written(tmp_path / "in.json", problems(20))
    made = job(tmp_path, tokenizer, template="qwen", system="Be brief.", max_prompt_tokens=50)
    preprocess(made)
    table = pyarrow.parquet.read_table(made.output)
    assert table.column("prompt")[0].as_py().startswith("<|im_start|>system\nBe brief.<|im_end|>\n")
    noted = json.loads(table.schema.metadata[b"mmrl"])
    assert (noted["template"], noted["max_prompt_tokens"]) == ("qwen", 50)


# ------------------------------------------------------------------------------------------------------------ failures


@pytest.mark.parametrize(
    ("rows", "changes", "error", "message"),
    [
        ([], {}, DataError, "the file holds no rows"),
        ([{"problem": "one"}], {}, DataError, r"every row\): no column 'answer'. Columns: problem"),
        ([{"question": "one", "answer": "1"}], {}, DataError, "no column 'problem'"),
        ([{"problem": 3, "answer": "1"}], {}, DataError, "row 0: column 'problem' must be a string, not int"),
        ([{"problem": "one", "answer": ["1"]}], {}, DataError, "row 0: column 'answer' must be a string or a number"),
        (problems(20), {"max_prompt_tokens": 70, "template": "qwen_r1"}, DataError, "nothing is left of 20 rows"),
        (problems(20), {"template": "qwen_r2"}, DataError, "Did you mean 'qwen_r1'"),
        (problems(20), {"template": "chat"}, ModelError, "has no chat template"),
        (problems(20), {"tokenizer": "/nowhere/at/all"}, ModelError, "tokenizer '/nowhere/at/all' cannot be loaded"),
        (problems(20), {"input": "gone.json"}, DataError, r"gone\.json: no such file"),
        (problems(20), {"output": Path("/proc/none/out.parquet")}, DataError, "cannot write it"),
    ],
)
def test_failures_leave_nothing(
    tmp_path: Path, tokenizer: Path, rows: list[Any], changes: dict[str, Any], error: type[MmrlError], message: str
) -> None:
    written(tmp_path / "in.json", rows)
    with pytest.raises(error, match=message):
        preprocess(job(tmp_path, tokenizer, **changes))
    assert leftovers(tmp_path) == []


def test_an_existing_output_is_kept_unless_told_otherwise(tmp_path: Path, tokenizer: Path) -> None:
    written(tmp_path / "in.json", problems(20))
    made = job(tmp_path, tokenizer)
    made.output.write_text("precious")
    with pytest.raises(DataError, match=r"out\.parquet: exists already.*--overwrite"):
        preprocess(made)
    with pytest.raises(DataError, match="nothing is left"):
        preprocess(job(tmp_path, tokenizer, overwrite=True, template="qwen_r1"))
    assert made.output.read_text() == "precious"
    preprocess(job(tmp_path, tokenizer, overwrite=True))
    assert pyarrow.parquet.read_metadata(made.output).num_rows > 0
    assert leftovers(tmp_path) == ["out.parquet"]


def test_an_output_that_appears_meanwhile_is_not_replaced(tmp_path: Path, tokenizer: Path) -> None:
    written(tmp_path / "in.json", problems(20))
    made = job(tmp_path, tokenizer)
    with pytest.raises(DataError, match="appeared while this was running"):
        preprocess(made, lambda *counts: made.output.write_text("other"))
    assert made.output.read_text() == "other"
    assert leftovers(tmp_path) == ["out.parquet"]


def test_a_full_disk_is_an_error_and_leaves_nothing(tmp_path: Path, tokenizer: Path) -> None:
    rows = [{"problem": f"one {os.urandom(40).hex()}", "answer": "1"} for _ in range(600)]
    written(tmp_path / "in.json", rows)
    code = (
        "import resource, sys\nfrom pathlib import Path\n"
        "from mmrl_core.data.preprocess import Job, preprocess\nfrom mmrl_core.errors import DataError\n"
        "job = Job(input=sys.argv[1], output=Path(sys.argv[2]), tokenizer=sys.argv[3], template='raw',\n"
        "          max_prompt_tokens=9)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\n"
        "try:\n    preprocess(job)\nexcept DataError as error:\n    print(error)\n"
    )
    arguments = [str(tmp_path / "in.json"), str(tmp_path / "out.parquet"), str(tokenizer)]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    assert "out.parquet: cannot write it" in done.stdout
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("victim", ["worker", "parent"])
def test_a_kill_leaves_no_output_and_no_orphan(tmp_path: Path, tokenizer: Path, victim: str) -> None:
    rows = [{"problem": "one " * 2000, "answer": "1"} for _ in range(20_000)]
    written(tmp_path / "in.json", rows)
    script = tmp_path / "run.py"
    script.write_text(
        "import sys\nfrom pathlib import Path\n"
        "from mmrl_core.data.preprocess import Job, preprocess\nfrom mmrl_core.errors import DataError\n"
        "if __name__ == '__main__':\n"
        "    job = Job(input=sys.argv[1], output=Path(sys.argv[2]), tokenizer=sys.argv[3], template='raw',\n"
        "              max_prompt_tokens=9999, workers=2)\n"
        "    try:\n        preprocess(job)\n    except DataError as error:\n        print(error)\n"
    )
    arguments = [str(tmp_path / "in.json"), str(tmp_path / "out.parquet"), str(tokenizer)]
    run = subprocess.Popen([sys.executable, script, *arguments], stdout=subprocess.PIPE, text=True)
    try:
        workers = _wait_for_workers(run)
        os.kill(workers[0].pid if victim == "worker" else run.pid, signal.SIGKILL)
        printed, _ = run.communicate(timeout=60)
    finally:
        if run.poll() is None:
            run.kill()
    if victim == "worker":
        assert "a preprocessing worker died" in printed
    else:
        assert run.returncode == -signal.SIGKILL
    _, alive = psutil.wait_procs(workers, timeout=30)
    assert alive == []
    assert not (tmp_path / "out.parquet").exists()


def _wait_for_workers(run: "subprocess.Popen[str]") -> list[psutil.Process]:
    """Both worker processes, once they exist."""
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline:
        assert run.poll() is None, "ended before it could be killed"
        workers = _workers(psutil.Process(run.pid))
        if len(workers) == 2:
            return workers
        time.sleep(0.05)
    raise AssertionError("no workers within 200 s")


def test_the_command_refuses_numbers_below_one() -> None:
    parser = argparse.ArgumentParser()
    data_command.add_parser(parser.add_subparsers())
    with pytest.raises(SystemExit):
        parser.parse_args(["data", "deepscaler", "a", "b", "--tokenizer", "t", "--workers", "0"])
