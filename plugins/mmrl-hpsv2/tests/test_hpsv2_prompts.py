"""Token ids against an independent byte-pair encoding, and tokenizers that are not CLIP's."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import hpsv2_reference
import hpsv2_tiny
import pytest
from mmrl_hpsv2.prompts import Prompts

from mmrl_core.errors import RewardError

VOCABULARY = len(hpsv2_tiny.vocabulary())
START, END = VOCABULARY - 2, VOCABULARY - 1
TEXTS = [
    "a red dog and the thing on the bed",
    "A RED   dog,\tand\nthe \u00a0 THING!",
    "",
    "   ",
    "it's we'll I'm they've you're he'd don't 'S ''s",
    "12th 3.14 $5 50% #tag a_b c-d ???!!!",
    "&lt;b&gt; &amp;amp; &amp;lt;",
    "na\u00efve caf\u00e9 \u65e5\u672c\u8a9e \U0001f600 \u00bd \u2460",
    "<|endoftext|> dog <|startoftext|>",
    "x" * 300,
    "dog " * 200,
    "\u2018curly\u2019",
]


def prompts(folder: Path, *, vocabulary: int = VOCABULARY, context: int = 77, fix_text: bool = False) -> Prompts:
    return Prompts(folder, vocabulary=vocabulary, context=context, fix_text=fix_text)


@pytest.mark.parametrize("context", [77, 8])
def test_ids_are_clips(tokenizer_folder: Path, context: int) -> None:
    ids = prompts(tokenizer_folder, context=context).encode(TEXTS).tolist()
    for text, row in zip(TEXTS, ids, strict=True):
        assert row == hpsv2_reference.token_ids(text, context), text


def test_every_prompt_ends_and_is_padded_with_zeros(tokenizer_folder: Path) -> None:
    for row in prompts(tokenizer_folder).encode(TEXTS).tolist():
        assert row[0] == START
        end = row.index(END)
        assert not any(row[end + 1 :])
        assert START not in row[1:]
        assert len(row) == 77


def test_composed_and_decomposed_letters_are_the_same(tokenizer_folder: Path) -> None:
    composed, decomposed = prompts(tokenizer_folder).encode(["caf\u00e9", "cafe\u0301"]).tolist()
    assert composed == decomposed


def test_settings_of_the_folder_for_padding_and_length_do_not_count(tokenizer_folder: Path, tmp_path: Path) -> None:
    """A tokenizer.json carries its own; the frame here is open_clip's."""
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(str(tokenizer_folder))
    tokenizer.backend_tokenizer.enable_truncation(5)
    tokenizer.backend_tokenizer.enable_padding(length=9)
    tokenizer.save_pretrained(str(tmp_path))
    (tmp_path / "vocab.json").unlink(missing_ok=True)
    (tmp_path / "merges.txt").unlink(missing_ok=True)
    assert (tmp_path / "tokenizer.json").exists()
    assert prompts(tmp_path).encode(TEXTS).tolist() == prompts(tokenizer_folder).encode(TEXTS).tolist()


def test_ftfy_repairs_when_asked(tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in = SimpleNamespace(fix_text=lambda text: text.replace("\u2019", "'"))
    monkeypatch.setitem(sys.modules, "ftfy", stand_in)
    repaired = prompts(tokenizer_folder, fix_text=True).encode(["the dog\u2019s bed"]).tolist()
    assert repaired == prompts(tokenizer_folder).encode(["the dog's bed"]).tolist()
    assert repaired != prompts(tokenizer_folder).encode(["the dog\u2019s bed"]).tolist()


def test_ftfy_that_is_missing(tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ftfy", None)
    with pytest.raises(RewardError, match=r"pip install 'mmrl-hpsv2\[ftfy\]'"):
        prompts(tokenizer_folder, fix_text=True)


# --------------------------------------------------------------------------------------------------- what is not CLIP's


def test_no_tokenizer(tokenizer_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(RewardError, match=r"does not exist.*Cure: give the `tokenizer` folder"):
        prompts(tmp_path / "nowhere")
    (tmp_path / "file").touch()
    with pytest.raises(RewardError, match="is not a folder"):
        prompts(tmp_path / "file")
    with pytest.raises(RewardError, match=r"holds no CLIP tokenizer\. Cure"):
        prompts(tmp_path)
    shutil.copytree(tokenizer_folder, tmp_path / "tokenizer")
    with pytest.raises(RewardError, match=f"Did you mean {tmp_path}/tokenizer"):
        prompts(tmp_path)


@pytest.mark.parametrize("vocabulary", [VOCABULARY - 1, VOCABULARY + 1, 49408])
def test_a_vocabulary_of_another_size(tokenizer_folder: Path, vocabulary: int) -> None:
    with pytest.raises(RewardError, match=f"has {VOCABULARY} tokens, but.*has {vocabulary} rows"):
        prompts(tokenizer_folder, vocabulary=vocabulary)


def test_tokens_added_above_the_end_token(tmp_path: Path) -> None:
    hpsv2_tiny.write_tokenizer(tmp_path, extra=("<mine>",))
    with pytest.raises(RewardError, match=f"its end token has id {END}; the highest, {END + 1}"):
        prompts(tmp_path, vocabulary=VOCABULARY + 1)


def test_a_damaged_file(tokenizer_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(tokenizer_folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / "vocab.json").write_text('{"a": ')
    with pytest.raises(RewardError, match="cannot be loaded"):
        prompts(tmp_path)


def test_another_models_tokenizer(tmp_path: Path) -> None:
    from mmrl_core.testing.tiny import tiny_language_model

    folder = tiny_language_model(tmp_path / "model")
    size = len(json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"])
    with pytest.raises(RewardError, match="is not CLIP's"):
        prompts(folder, vocabulary=size)
