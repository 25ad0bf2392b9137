"""Tests of tokenizer_config.json against tokenizer.json: the ids are those of transformers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.support.models import TEST_MODEL, real_model, write_json

from embedq_worker.errors import ModelError
from embedq_worker.inference.tokenizer import Tokenizer
from embedq_worker.model.tokenizer_config import read_tokenizer_config

pytestmark = pytest.mark.model

MAX_LENGTH = 32

TEXTS = [
    "",
    "Hello World",
    "Café NAÏVE Élan",
    "日本語の文章 中文",
    "a[SEP]b [CLS] c",
    "don't STOP" * 30,
    "a\u0301 e\u0300",
    "[PAD] x [MASK] [UNK]",
    "  x  y\n\tz \u200d \ufeff",
    "İstanbul ß ﬁ",
]

Edit = Callable[[Path], None]


def config(**changes: Any) -> Edit:
    """Change tokenizer_config.json; `...` removes a key."""

    def edit(folder: Path) -> None:
        path = folder / "tokenizer_config.json"
        values = {**json.loads(path.read_text()), **changes}
        write_json(path, {key: value for key, value in values.items() if value is not ...})

    return edit


def tokenizer(**changes: Any) -> Edit:
    """Change tokenizer.json."""

    def edit(folder: Path) -> None:
        path = folder / "tokenizer.json"
        write_json(path, {**json.loads(path.read_text()), **changes})

    return edit


def no_config(folder: Path) -> None:
    (folder / "tokenizer_config.json").unlink()


def lowercase_off(folder: Path) -> None:
    path = folder / "tokenizer.json"
    values = json.loads(path.read_text())
    values["normalizer"]["lowercase"] = False
    write_json(path, values)


def lowercase_off_and_general_class(folder: Path) -> None:
    lowercase_off(folder)
    config(tokenizer_class="PreTrainedTokenizerFast")(folder)


def special_tokens_map(folder: Path) -> None:
    write_json(folder / "special_tokens_map.json", {"sep_token": "[MASK]"})


def added(number: str, content: str, **flags: bool) -> Edit:
    """Put one token into added_tokens_decoder."""
    token = {
        "content": content,
        "lstrip": False,
        "rstrip": False,
        "single_word": False,
        "normalized": False,
        "special": True,
        **flags,
    }
    return config(added_tokens_decoder={number: token})


def copy_model(folder: Path, edit: Edit) -> Tokenizer:
    """Copy the tokenizer of the real model, edit it and load it."""
    real_model()  # skips the test without it
    folder.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(TEST_MODEL) / name, folder)
    edit(folder)
    return Tokenizer(folder / "tokenizer.json", MAX_LENGTH, read_tokenizer_config(folder))


@pytest.mark.parametrize(
    "edit",
    [
        config(),
        no_config,
        *(
            config(do_lower_case=lower, strip_accents=strip, tokenize_chinese_chars=chinese)
            for lower in (True, False, ...)
            for strip in (True, False, None)
            for chinese in (True, False)
        ),
        lowercase_off,
        lowercase_off_and_general_class,
        config(truncation_side="left"),
        tokenizer(
            truncation={
                "direction": "Left",
                "max_length": 128,
                "strategy": "LongestFirst",
                "stride": 0,
            }
        ),
        added("102", "[SEP]"),
        config(add_eos_token=True, eos_token="[SEP]"),
    ],
)
def test_ids_are_those_of_transformers(tmp_path: Path, edit: Edit) -> None:
    transformers = pytest.importorskip("transformers", reason="needs torch and transformers")
    ours = copy_model(tmp_path / "m", edit)

    tokens = ours.tokenize(TEXTS)

    theirs = transformers.AutoTokenizer.from_pretrained(str(tmp_path / "m"), local_files_only=True)
    for index, text in enumerate(TEXTS):
        found = tokens.ids[tokens.offsets[index] : tokens.offsets[index + 1]].tolist()
        expected = theirs(text, truncation=True, max_length=MAX_LENGTH)["input_ids"]
        assert found == expected, index


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (tokenizer(normalizer={"type": "NFC"}), "has the normalizer NFC"),
        (config(padding_side="left"), "padding_side is left"),
        (config(sep_token="[MASK]"), r"sep_token is \[MASK\]"),
        (special_tokens_map, r"sep_token is \[MASK\]"),
        (config(cls_token="[NEW]"), r"cls_token is \[NEW\], which is not in"),
        (config(add_bos_token=True, bos_token="[MASK]"), r"bos_token is \[MASK\]"),
        (config(split_special_tokens=True), "split_special_tokens is True"),
        (config(tokenizer_class="RobertaTokenizer"), "has a WordPiece model"),
        (config(do_lower_case="yes"), "do_lower_case is 'yes'"),
        (config(added_tokens_decoder={"x": 1}), "added_tokens_decoder has 'x'"),
        (added("30522", "<x>"), "30522.*no such added token"),
        (added("103", "[MASK]", lstrip=True), "added_tokens_decoder has 103"),
    ],
)
def test_files_that_contradict_each_other_are_refused(
    tmp_path: Path, edit: Edit, reason: str
) -> None:
    with pytest.raises(ModelError, match=reason):
        copy_model(tmp_path / "m", edit)


def test_lower_case_of_sentence_transformers_comes_before_the_normalizer(tmp_path: Path) -> None:
    def edit(folder: Path) -> None:
        config(do_lower_case=False)(folder)
        write_json(folder / "sentence_bert_config.json", {"do_lower_case": True})

    tokens = copy_model(tmp_path / "m", edit).tokenize(["Hello WORLD", "hello world"])

    first, second = (
        tokens.ids[start:stop].tolist()
        for start, stop in zip(tokens.offsets, tokens.offsets[1:], strict=False)
    )
    assert first == second
