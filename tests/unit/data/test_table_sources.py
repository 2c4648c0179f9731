import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from pydantic import ValidationError

from mmrl_core.data.options import TableOptions
from mmrl_core.data.tables import JsonlSource, ParquetSource, TableSource
from mmrl_core.errors import DataError

ROWS = [{"prompt": f"question {i}", "answer": str(i), "level": i % 3, "meta": {"id": i}} for i in range(10)]
VERL = [
    {
        "data_source": "openai/gsm8k",
        "prompt": [{"role": "user", "content": f"How many is {i}?"}],
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": str(i)},
        "extra_info": {"index": i, "split": "train"},
    }
    for i in range(5)
]


def jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def parquet(path: Path, rows: list[Any], **options: Any) -> Path:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, **options)
    return path


def array(path: Path, rows: list[Any]) -> Path:
    path.write_text("\ufeff \n" + json.dumps(rows, indent=2), encoding="utf-8")
    return path


WRITERS = {"jsonl": (jsonl, JsonlSource), "array": (array, JsonlSource), "parquet": (parquet, ParquetSource)}


def make(kind: str, directory: Path, rows: list[Any], seed: int = 0, **options: Any) -> TableSource:
    write, source = WRITERS[kind]
    path = write(directory / f"rows.{'parquet' if kind == 'parquet' else 'json'}", rows)
    return opened(source, seed, path=str(path), **options)


def opened(kind: type[TableSource], seed: int = 0, **options: Any) -> TableSource:
    made = kind(TableOptions.model_validate(options), seed)
    made.prepare()
    return made


def fails(kind: str, directory: Path, rows: list[Any], message: str, **options: Any) -> None:
    with pytest.raises(DataError, match=message):
        make(kind, directory, rows, **options)


every_kind = pytest.mark.parametrize("kind", sorted(WRITERS))


@every_kind
def test_rows_become_chats(kind: str, tmp_path: Path) -> None:
    made = make(kind, tmp_path, ROWS, shuffle=False)
    assert len(made) == 10
    prompt = made.prompt(13)
    assert (prompt.index, prompt.text, prompt.answer) == (13, None, "3")
    assert prompt.messages == ({"role": "user", "content": "question 3"},)
    assert prompt.columns == {"answer": "3", "level": 0, "meta": {"id": 3}}
    assert prompt.origin.endswith("rows.json:4" if kind == "jsonl" else ": row 3")


@every_kind
def test_order_resumes_and_does_not_depend_on_the_process(kind: str, tmp_path: Path) -> None:
    made = make(kind, tmp_path, ROWS, seed=6)
    answers = [made.prompt(i).answer for i in range(35)]
    assert sorted(answers[:10]) == sorted(answers[10:20]) == [str(i) for i in range(10)]
    assert answers[:10] != answers[10:20]
    again = make(kind, tmp_path, ROWS, seed=6)
    assert [again.prompt(i) for i in range(20, 35)] == [made.prompt(i) for i in range(20, 35)]
    code = (
        "import sys; from mmrl_core.data import tables; from mmrl_core.data.options import TableOptions\n"
        "s = getattr(tables, sys.argv[1])(TableOptions(path=sys.argv[2]), 6); s.prepare()\n"
        "print(s.digest(), [s.prompt(i).answer for i in range(35)])"
    )
    arguments = [type(made).__name__, made.options.path]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"{made.digest()} {answers}"


@every_kind
def test_verl_layout(kind: str, tmp_path: Path) -> None:
    made = make(kind, tmp_path, VERL, answer_column="reward_model.ground_truth", shuffle=False)
    prompt = made.prompt(2)
    assert prompt.messages == ({"role": "user", "content": "How many is 2?"},)
    assert prompt.answer == "2"
    assert prompt.columns["data_source"] == "openai/gsm8k"
    assert prompt.columns["extra_info"]["index"] == 2


@every_kind
def test_named_template_system_and_user_template(kind: str, tmp_path: Path) -> None:
    options = {"user_template": r"Level {level}, {meta.id}: {prompt} Use \boxed{}.", "shuffle": False}
    prompt = make(kind, tmp_path, ROWS, template="qwen", system="Think.", **options).prompt(4)
    assert prompt.messages is None
    assert prompt.text == (
        "<|im_start|>system\nThink.<|im_end|>\n<|im_start|>user\nLevel 1, 4: question 4 Use \\boxed{}.<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    raw = make(kind, tmp_path, ROWS, template="raw", **options).prompt(4)
    assert raw.text == "Level 1, 4: question 4 Use \\boxed{}."


def test_own_template_file_and_its_place_in_the_digest(tmp_path: Path) -> None:
    template = tmp_path / "t.jinja"
    template.write_text("Q: {{ messages[0].content }}\nA:")
    first = make("jsonl", tmp_path, ROWS, template=str(template), shuffle=False)
    assert first.prompt(0).text == "Q: question 0\nA:"
    template.write_text("Q. {{ messages[0].content }}\nA:")
    assert make("jsonl", tmp_path, ROWS, template=str(template), shuffle=False).digest() != first.digest()


def test_chats_keep_their_turns_and_take_a_system_message(tmp_path: Path) -> None:
    chat = [
        {"role": "system", "content": "old"},
        {"role": "user", "content": "A", "name": None},
        {"role": "assistant", "content": "B", "name": None},
        {"role": "user", "content": "C", "name": "me"},
    ]
    rows = [{"prompt": chat, "answer": "x"}]
    prompt = make("jsonl", tmp_path, rows, system="new", user_template="{prompt}!").prompt(0)
    assert prompt.messages == (
        {"role": "system", "content": "new"},
        {"role": "user", "content": "A"},
        {"role": "assistant", "content": "B"},
        {"role": "user", "content": "C!", "name": "me"},
    )
    assert make("jsonl", tmp_path, rows).prompt(0).messages[0]["content"] == "old"  # type: ignore[index]


def test_several_files_globs_skip_and_limit(tmp_path: Path) -> None:
    jsonl(tmp_path / "b.jsonl", ROWS[3:6])
    jsonl(tmp_path / "a.jsonl", ROWS[:3])
    last = jsonl(tmp_path / "z.rows", ROWS[6:])
    paths = [str(tmp_path / "*.jsonl"), str(last)]
    made = opened(JsonlSource, path=paths, shuffle=False)
    assert [made.prompt(i).answer for i in range(10)] == [str(i) for i in range(10)]
    assert made.prompt(7).origin == f"{last}:2"
    for seed in (0, 1):
        made = opened(JsonlSource, seed, path=paths, skip=2, limit=5)
        assert sorted(made.prompt(i).answer for i in range(len(made))) == ["2", "3", "4", "5", "6"]
    assert len(opened(JsonlSource, path=paths, skip=8, limit=5)) == 2


def test_rows_left_out_are_not_checked_but_the_others_are(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('broken\n\n{"prompt": "a", "answer": 1}\n\r\n{"prompt": "b", "answer": 2}\nbroken')
    assert opened(JsonlSource, path=str(path), skip=1, limit=2, shuffle=False).prompt(1).origin == f"{path}:5"
    with pytest.raises(DataError, match=rf"{path}:6: not a JSON value"):
        opened(JsonlSource, path=str(path), skip=1)
    with pytest.raises(DataError, match=rf"{path}:1: not a JSON value .*one JSON object a line"):
        opened(JsonlSource, path=str(path))


def test_columns_limits_what_rewards_see(tmp_path: Path) -> None:
    for kind in sorted(WRITERS):
        made = make(kind, tmp_path, ROWS, columns=["level"], answer_column="meta.id", shuffle=False)
        prompt = made.prompt(5)
        assert (prompt.columns, prompt.answer) == ({"level": 2}, 5)


def test_parquet_with_many_row_groups(tmp_path: Path) -> None:
    path = parquet(tmp_path / "p.parquet", ROWS, row_group_size=3)
    made = opened(ParquetSource, path=str(path), shuffle=False)
    assert [made.prompt(i).answer for i in range(10)] == [str(i) for i in range(10)]


def test_a_dotted_name_may_be_a_column_itself(tmp_path: Path) -> None:
    rows = [{"prompt": "q", "a.b": "flat", "a": {"b": "nested", "c": "deep"}}]
    for kind in sorted(WRITERS):
        assert make(kind, tmp_path, rows, answer_column="a.b").prompt(0).answer == "flat"
        assert make(kind, tmp_path, rows, answer_column="a.c", columns=[]).prompt(0).answer == "deep"


def test_the_digest_is_of_contents_options_and_seed_not_of_the_path(tmp_path: Path) -> None:
    one = opened(JsonlSource, path=str(jsonl(tmp_path / "one.jsonl", ROWS)))
    moved = opened(JsonlSource, path=str(jsonl(tmp_path / "two.jsonl", ROWS)))
    assert one.digest() == moved.digest()
    others = [
        opened(JsonlSource, 1, path=str(tmp_path / "one.jsonl")),
        opened(JsonlSource, path=str(tmp_path / "one.jsonl"), limit=9),
        opened(JsonlSource, path=str(tmp_path / "one.jsonl"), template="qwen"),
        opened(JsonlSource, path=str(jsonl(tmp_path / "three.jsonl", [*ROWS[:9], {**ROWS[9], "level": 8}]))),
    ]
    assert len({one.digest(), *(o.digest() for o in others)}) == 5


# ------------------------------------------------------------------------------------------------------------ failures


def test_missing_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    jsonl(tmp_path / "a.jsonl", ROWS)
    for path, message in (
        ("gone.jsonl", r"gone\.jsonl: no such file \(working directory"),
        ("*.json", r"\*\.json: no file matches"),
        ("folder", r"folder: this is a folder; name its files, for example folder/\*"),
        (["a.jsonl", "./*.jsonl"], r"a\.jsonl: listed twice"),
    ):
        with pytest.raises(DataError, match=message):
            opened(JsonlSource, path=path)


@every_kind
def test_no_rows(kind: str, tmp_path: Path) -> None:
    empty = pyarrow.table(
        {"prompt": pyarrow.array([], pyarrow.string()), "answer": pyarrow.array([], pyarrow.string())}
    )
    if kind == "parquet":
        pyarrow.parquet.write_table(empty, tmp_path / "rows")
    else:
        (tmp_path / "rows").write_text("\n \n" if kind == "jsonl" else "[]")
    with pytest.raises(DataError, match="rows: the file holds no rows"):
        opened(WRITERS[kind][1], path=str(tmp_path / "rows"))


def test_nothing_left_after_skip(tmp_path: Path) -> None:
    fails("jsonl", tmp_path, ROWS, "skip 10 leaves nothing of 10 rows", skip=10)


def test_files_of_another_kind(tmp_path: Path) -> None:
    table = parquet(tmp_path / "t.parquet", ROWS)
    with pytest.raises(DataError, match="use the prompt source `parquet`"):
        opened(JsonlSource, path=str(table))
    with pytest.raises(DataError, match="not a readable Parquet file"):
        opened(ParquetSource, path=str(jsonl(tmp_path / "t.jsonl", ROWS)))
    whole = table.read_bytes()
    (tmp_path / "cut.parquet").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"cut\.parquet: not a readable Parquet file"):
        opened(ParquetSource, path=str(tmp_path / "cut.parquet"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[\n{"prompt": "a"},\n{"prompt" "b"}\n]', r"x:3: not a JSON array: Expecting ':'"),
        ('[{"prompt": "a"}', "x:1: not a JSON array"),
        ("[1]", "x: row 0: a row must be a JSON object, not int"),
        ('{"prompt": "a", "answer": 1}\n[]\n', "x:2: a row must be a JSON object, not list"),
        ('{\n"prompt": "a"\n}', "x:1: not a JSON value.*one JSON array"),
        (b'{"prompt": "\xff"}', "x:1: not a JSON value .*utf-8"),
        ('{"prompt": ' + "[" * 100_000, "x:1: not a JSON value"),
    ],
)
def test_bad_json(tmp_path: Path, content: str | bytes, message: str) -> None:
    path = tmp_path / "x"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=message):
        opened(JsonlSource, path=str(path))


def test_unreadable_file(tmp_path: Path) -> None:
    loop = tmp_path / "loop.jsonl"
    target = tmp_path / ("n" * 200) / "x"
    loop.symlink_to(target)
    with pytest.raises(DataError, match=r"loop\.jsonl: cannot read it: No such file"):
        opened(JsonlSource, path=str(loop))


@every_kind
def test_missing_columns_name_those_that_exist(kind: str, tmp_path: Path) -> None:
    known = r"Columns: prompt, answer, level, meta"
    fails(kind, tmp_path, ROWS, rf"no column 'promt'. Did you mean 'prompt'\? {known}", prompt_column="promt")
    fails(kind, tmp_path, ROWS, rf"no column 'solution'.*{known}.*answer_column.*null", answer_column="solution")
    fails(kind, tmp_path, ROWS, r"no column 'meta.ident'.*meta\.id", answer_column="meta.ident")
    fails(kind, tmp_path, ROWS, "no column 'topic'", user_template="{topic}: {prompt}")
    fails(kind, tmp_path, ROWS, "no column 'lev'", columns=["lev"])


def test_a_row_without_a_prompt_is_named(tmp_path: Path) -> None:
    fails("jsonl", tmp_path, [*ROWS, {"answer": "x", "level": 1}], r"rows\.json:11: no column 'prompt'.*answer, level")
    fails("array", tmp_path, [*ROWS, {"answer": "x"}], "rows.json: row 10: no column 'prompt'")
    fails("parquet", tmp_path, [*ROWS, {"answer": "x"}], "row 10: column 'prompt': .* not null")


@every_kind
@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "a prompt is a string or a list of messages, not null"),
        (7, "a prompt is a string or a list of messages, not int"),
        ("  \n", "the prompt is empty"),
        ([], "the conversation is empty"),
        (["hello"], "message 0 is str, not an object"),
        ([{"role": "user", "content": None}], "message 0: content must be a string, not null"),
        ([{"content": "hi"}], "message 0: role must be a string"),
        ([{"role": "User", "content": "hi"}], "role 'User' is not one of system, user"),
        ([{"role": "user", "content": "hi"}, {"role": "assistant", "content": "x"}], "ends with role 'assistant'"),
        ([{"role": "user", "content": " "}], "no user message, or an empty one"),
        ([{"role": "user", "content": "hi", "n": 3}], "message 0: n must be a string, not int"),
    ],
)
def test_wrong_prompts(kind: str, tmp_path: Path, value: object, message: str) -> None:
    place = r"rows\.json:1" if kind == "jsonl" else r"row 0"
    fails(kind, tmp_path, [{"prompt": value, "answer": "1"}], f"{place}: column 'prompt'.*{message}")


def test_wrong_values(tmp_path: Path) -> None:
    chat = [{"prompt": [{"role": "user", "content": "hi"}], "answer": "1"}]
    fails(
        "jsonl", tmp_path, chat, "rows.json:1: column 'prompt': template raw needs a string, not list", template="raw"
    )
    fails("jsonl", tmp_path, [{"prompt": "q", "answer": None}], "rows.json:1: column 'answer' is null")
    fails("jsonl", tmp_path, ROWS, "column 'meta' in user_template is dict", user_template="{meta}")
    assert make("jsonl", tmp_path, [{"prompt": "q"}], answer_column=None).prompt(0).answer is None
    strict = tmp_path / "strict.jinja"
    strict.write_text("{{ raise_exception('never') }}")
    fails("jsonl", tmp_path, ROWS, r"rows\.json:1: template .*strict\.jinja: never", template=str(strict))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"template": "qwenr1"}, "Did you mean 'qwen_r1'"),
        ({"template": "raw", "system": "x"}, "no place for `system`"),
        ({"user_template": r"\boxed{}"}, "no {placeholder}"),
        ({"path": []}, "at least 1"),
        ({"limit": 0}, "greater than or equal to 1"),
        ({"colums": ["a"]}, "Extra inputs"),
    ],
)
def test_bad_options(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        TableOptions.model_validate({"path": "x", **options})
