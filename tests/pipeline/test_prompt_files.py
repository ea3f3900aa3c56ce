"""Prompts of text files, tables and JSON."""

import json

import pyarrow
import pytest
from pyarrow import parquet

from glide_jax.errors import GlideError, UsageError
from glide_jax.pipeline.prompt_files import read_prompt_file, read_text_prompts

COCO = {
    "images": [{"id": 9, "file_name": "9.jpg"}, {"id": 4, "file_name": "4.jpg"}],
    "annotations": [
        {"image_id": 4, "id": 1, "caption": "A cat.\n"},
        {"image_id": 9, "id": 2, "caption": "Two  dogs "},
        {"image_id": 4, "id": 3, "caption": "It sleeps"},
    ],
}


@pytest.mark.parametrize(
    ("name", "content", "field", "prompts"),
    [
        ("a.txt", "a cat\n\n  a dog \r\n", None, ("a cat", "a dog")),
        ("a.captions", "a, b\n{1}\n", None, ("a, b", "{1}")),
        ("a.csv", 'file,caption\n1.png,"a cat, black"\n2.png,\n', None, ("a cat, black",)),
        ("a.csv", "id;text;title\n1;a cat;Cat\n", None, ("a cat",)),
        ("a.csv", "id;text;title\n1;a cat;Cat\n", "title", ("Cat",)),
        ("a.tsv", "prompt\na cat, black\na dog\n", None, ("a cat, black", "a dog")),
        ("a.txt", "x\ty\na\tb\n", "y", ("b",)),
        ("a.jsonl", '{"caption": ["a cat", "a dog"]}\n\n{"caption": "a\\nb"}\n', None,
         ("a cat", "a dog", "a b")),
        ("a.jsonl", '"a cat"\n"a dog"\n', None, ("a cat", "a dog")),
        ("a.json", '["a cat", "", "a dog"]', None, ("a cat", "a dog")),
        ("a.json", '{"1.png": "a cat", "2.png": ["b", "c"]}', None, ("a cat", "b", "c")),
        ("a.json", json.dumps(COCO), None, ("Two dogs", "A cat.", "It sleeps")),
        ("a.JSON", '[{"a": {"b": "deep"}}]', "a/b", ("deep",)),
    ],
)  # fmt: skip
def test_prompts_are_read_in_the_order_of_the_file(tmp_path, name, content, field, prompts):
    (tmp_path / name).write_bytes(content.encode())
    assert read_prompt_file(tmp_path / name, field) == prompts


@pytest.mark.parametrize(
    ("name", "content", "field", "message"),
    [
        ("a.csv", "id,words\n1,a\n", None, "a.csv, line 2: has id, words, not caption or captions "
         "or text: name the field with --prompts-field"),
        ("a.csv", "id,caption\n1,a\n", "words", "a.csv, line 2: has id, caption, not words: name "
         "the field with --prompts-field"),
        ("a.csv", "caption,text\na,b\n", None, "a.csv, line 2: has captions in caption and text: "
         "choose one with --prompts-field"),
        ("a.csv", "id,caption\n1,a,b\n", None, "line 2: has 3 columns, the first line has 2"),
        ("a.jsonl", '{"caption": "a"}\n{"caption": 3}\n', None, "line 2: the text of its caption "
         "is int, not text"),
        ("a.jsonl", '{"caption": "a"}\n{\n', None, "a.jsonl, line 2: is not JSON"),
        ("a.json", "{", None, "a.json is not JSON"),
        ("a.md", "a", "caption", "a.md must be .jsonl, .csv, .tsv or .parquet"),
    ],
)  # fmt: skip
def test_a_row_that_cannot_be_used_is_named(tmp_path, name, content, field, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(GlideError) as error:
        read_prompt_file(tmp_path / name, field)
    assert message in str(error.value)


@pytest.mark.parametrize("name", ["absent.txt", "absent.csv", "absent.json"])
def test_a_missing_file_is_named(tmp_path, name):
    with pytest.raises(GlideError, match=name):
        read_prompt_file(tmp_path / name)


def test_the_captions_of_a_parquet_file_are_prompts(tmp_path):
    path = tmp_path / "captions.parquet"
    parquet.write_table(pyarrow.table({"caption": ["a", "b"], "id": [1, 2]}), path)
    assert read_prompt_file(path) == ("a", "b")


LINES = "a red apple\r\n\n \ufeff \n  a rocket \rcaf\u00e9 \u2028x"


@pytest.mark.parametrize(
    ("encoding", "mark", "said"),
    [
        ("utf-8", "", ""),
        ("utf-8", "\ufeff", ""),
        ("utf-16-le", "\ufeff", "UTF-16"),
        ("utf-16-be", "\ufeff", "UTF-16"),
        ("utf-16-le", "", "UTF-16"),
        ("utf-16-be", "", "UTF-16"),
        ("utf-32-le", "\ufeff", "UTF-32"),
    ],
)
def test_files_of_prompts_in_unicode_are_read(tmp_path, capsys, encoding, mark, said):
    path = tmp_path / "p.txt"
    path.write_bytes((mark + LINES).encode(encoding))
    assert read_text_prompts(path) == ("a red apple", "a rocket", "caf\u00e9 \u2028x")
    wanted = f"note: {path} is {said}: read as such\n" if said else ""
    assert capsys.readouterr().err == wanted


def test_files_of_prompts_that_cannot_be_read_are_named(tmp_path):
    path = tmp_path / "p.txt"
    for data, reason in (
        ("caf\u00e9".encode("latin-1"), "it is not UTF-8 (byte 3); save it as UTF-8"),
        (b"\xff\xfea\0b", "it is not UTF-16 (byte 4); save it as UTF-8"),
        (None, "No such file or directory; check the path"),
    ):
        path.unlink(missing_ok=True)
        if data is not None:
            path.write_bytes(data)
        with pytest.raises(UsageError) as caught:
            read_text_prompts(path)
        assert str(caught.value) == f"cannot read the prompts in {path}: {reason}"
