"""Reading rows: every kind of file, and mistakes that name their place."""

import bz2
import gzip
import json
import lzma
import sys
from types import SimpleNamespace

import pyarrow
import pyarrow.parquet
import pytest

from ardor.data import readers, sources
from ardor.data.sources import Source, read_rows
from ardor.errors import DataError

ROWS = [{"text": "one, two"}, {"text": 'café "x"\nline'}, {"text": ""}]


def values(source, split=None):
    return [dict(row.values) for row in read_rows(source, split)]


def write_jsonl(path, rows=ROWS):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_every_kind_of_table_gives_the_same_rows(tmp_path):
    write_jsonl(tmp_path / "a.jsonl")
    with gzip.open(tmp_path / "a.jsonl.gz", "wb") as file:
        file.write((tmp_path / "a.jsonl").read_bytes())
    (tmp_path / "a.json").write_text(json.dumps(ROWS), encoding="utf-8")
    write_jsonl(tmp_path / "lines.json")
    quoted = "".join('"' + row["text"].replace('"', '""') + '"\n' for row in ROWS)
    (tmp_path / "a.csv").write_text("text\n" + quoted, encoding="utf-8")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    for name in ("a.jsonl", "a.jsonl.gz", "a.json", "lines.json", "a.csv", "a.parquet"):
        assert values(tmp_path / name) == ROWS, name


def test_rows_know_the_line_they_start_on(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n\n{"text": "b"}\n')
    assert [row.where for row in read_rows(tmp_path / "a.jsonl")] == [
        f"{tmp_path}/a.jsonl:1",
        f"{tmp_path}/a.jsonl:3",
    ]
    (tmp_path / "a.csv").write_text('text\n"a\nb"\nc\n')
    lines = [row.where.rpartition(":")[2] for row in read_rows(tmp_path / "a.csv")]
    assert lines == ["2", "4"]  # not 2 and 3: the first cell holds a line end


def test_a_line_separator_inside_a_string_does_not_end_a_json_line(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "a\u2028b\x85c"}, ensure_ascii=False), encoding="utf-8")
    assert values(path) == [{"text": "a\u2028b\x85c"}]


def test_a_byte_order_mark_is_not_part_of_the_first_column(tmp_path):
    for name, text in (("a.csv", "text\nx\n"), ("a.jsonl", '{"text": "x"}'), ("a.txt", "x")):
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + text.encode())
        assert values(tmp_path / name) == [{"text": "x"}]


def test_a_text_file_is_one_document_with_its_line_ends_kept(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"a\r\nb\n")
    (row,) = read_rows(tmp_path / "a.txt")
    assert row.values == {"text": "a\r\nb\n"} and row.where == str(tmp_path / "a.txt")


def test_a_folder_is_read_in_sorted_order_without_hidden_files(tmp_path):
    for name in ("b.txt", "a/z.md", "c.py", ".hidden.txt", ".git/x.txt", "picture.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert [row["text"] for row in values(tmp_path)] == ["a/z.md", "b.txt", "c.py"]


def test_a_card_beside_tables_is_not_data(tmp_path):
    write_jsonl(tmp_path / "a.jsonl")
    (tmp_path / "README.md").write_text("about the data")
    assert values(tmp_path) == ROWS


def test_a_folder_of_splits_must_be_told_which(tmp_path):
    (tmp_path / "test").mkdir()
    write_jsonl(tmp_path / "train-00000-of-00001.jsonl", [{"text": "train"}])
    write_jsonl(tmp_path / "test" / "a.jsonl", [{"text": "test"}])
    with pytest.raises(DataError, match="holds the splits test, train; name the one"):
        values(tmp_path)
    assert values(tmp_path, "train") == [{"text": "train"}]
    assert values(tmp_path, "test") == [{"text": "test"}]
    with pytest.raises(DataError, match="no files of split 'dev'; splits found: test, train"):
        values(tmp_path, "dev")
    with pytest.raises(DataError, match="one file and has no split"):
        values(tmp_path / "test" / "a.jsonl", "test")


def test_rows_in_memory_are_a_source():
    assert values(ROWS) == ROWS
    with pytest.raises(DataError, match=r"row 2: found str, expected an object"):
        values(row for row in ({}, "text"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": 1}\n{"text": }\n', r"a\.jsonl:2: not valid JSON at column 10"),
        ("a.jsonl", '{"a": 1}\n[1]\n', r"a\.jsonl:2: found list, expected an object"),
        ("a.jsonl", b'{"a": 1}\n"\xff"\n', r"a\.jsonl:2 is not UTF-8 text"),
        ("a.jsonl", "\n", "holds no rows"),
        (
            "a.jsonl",
            "{}\n" + "[" * 100_000,
            r"a\.jsonl:2: this JSON cannot be read: .*drop the row",
        ),
        ("a.jsonl", '{"a": ' + "1" * 5000 + "}", r"a\.jsonl:1: this JSON cannot be read: .*digits"),
        ("a.json", "[" * 100_000, r"a\.json: this JSON cannot be read: .*mend the file"),
        ("a.json", '[{"a": 1},\n {"a" 2}]', r"a\.json:2: not valid JSON at column 7"),
        ("a.json", '{"a": 1}\n{"a": ]\n', r"a\.json:2: not valid JSON at column 7"),
        ("a.json", "[[1]]", r"a\.json row 1: found list"),
        ("a.json", "[]", "holds no rows"),
        ("a.csv", "a,b\n1,2\n1,2,3\n", r"a\.csv:3: the row does not have the 2 cells"),
        ("a.csv", "a,b\n1\n", r"a\.csv:2: the row does not have the 2 cells"),
        ("a.csv", 'a\n"x" y\n', r"a\.csv:2: .* expected after"),
        ("a.parquet", "nothing", "not a readable Parquet file"),
        ("a.jsonl.gz", "not compressed", "damaged"),
        ("a.json", '[{"a": 1} {"a": 2}]', r"a\.json:1: not valid JSON at column 11: Expecting ','"),
        ("a.json", '[{"a": 1},', r"a\.json:1: not valid JSON at column 11"),
        ("a.json", b'[{"a": 1},\n{"a": "\xff"}]', r"a\.json:2 is not UTF-8 text"),
        ("a.json", "\n", "holds no rows"),
        ("a.csv", b"a\nx\n\xff\n", r"a\.csv:3 is not UTF-8 text"),
        ("a.csv", "", "holds no rows"),
        ("a.txt", b"caf\xe9", r"a\.txt is not UTF-8 text \(byte 3"),
        ("a.jsonl.zst", "not compressed", "damaged"),
        ("a.jsonl.bz2", "not compressed", "damaged"),
        ("a.jsonl.xz", "not compressed", "damaged"),
        ("a.docx", "x", r"unknown kind '\.docx'; known are \.csv, \.json"),
    ],
)
def test_what_cannot_be_read_is_refused_with_its_place(tmp_path, name, content, message):
    raw = content if isinstance(content, bytes) else content.encode()
    (tmp_path / name).write_bytes(raw)
    with pytest.raises(DataError, match=message):
        values(tmp_path / name)


def test_a_cut_gzip_file_is_refused(tmp_path):
    whole = gzip.compress(b'{"text": "a"}\n' * 1000)
    (tmp_path / "a.jsonl.gz").write_bytes(whole[:-20])
    with pytest.raises(DataError, match="damaged"):
        values(tmp_path / "a.jsonl.gz")


def test_a_missing_file_is_told_its_neighbours(tmp_path):
    write_jsonl(tmp_path / "pairs.jsonl")
    with pytest.raises(DataError, match=r"does not exist; nearest in .*: pairs\.jsonl"):
        values(tmp_path / "pair.jsonl")
    with pytest.raises(DataError, match=r"does not exist; .* holds pairs\.jsonl"):
        values(tmp_path / "zzz.csv")
    with pytest.raises(DataError, match="neither does the folder"):
        values(tmp_path / "nowhere" / "pair.jsonl")
    with pytest.raises(DataError, match="holds no file that can be read"):
        (tmp_path / "empty").mkdir()
        values(tmp_path / "empty")


def fake_hub(monkeypatch, load):
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load))
    monkeypatch.setattr(sources, "dataset_unreachable", lambda name: False)


def test_a_name_that_is_no_file_goes_to_the_hub(monkeypatch):
    asked = []

    def load(name, configuration, split):
        asked.append((name, configuration, split))
        return ROWS

    fake_hub(monkeypatch, load)
    (row, *_) = read_rows("owner/name:main", "test")
    assert row.values == ROWS[0] and row.where == "owner/name:main[test] row 1"
    assert values("owner/data-v1.5") == ROWS
    assert asked == [("owner/name", "main", "test"), ("owner/data-v1.5", None, "train")]


def test_an_unreachable_hub_is_said_plainly(monkeypatch):
    def load(name, configuration, split):
        raise ConnectionError("Couldn't reach the Hub\n(traceback)")

    fake_hub(monkeypatch, load)
    message = "no file or folder here, and its split 'train' could not be had .*reach the Hub;"
    with pytest.raises(DataError, match=message):
        values("owner/name")


def test_a_local_path_never_goes_to_the_hub(monkeypatch, tmp_path):
    fake_hub(monkeypatch, lambda *_, **__: pytest.fail("asked the hub"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    for source in ("pairs.jsonl", "./pairs", "data/pairs", "a/b/c", str(tmp_path / "x")):
        with pytest.raises(DataError, match="does not exist"):
            values(source)


@pytest.mark.parametrize("pack", ["zst", "bz2", "xz"])
def test_packed_files_are_unpacked_as_they_are_read(tmp_path, pack):
    raw = write_jsonl(tmp_path / "a.jsonl").read_bytes()
    packed = tmp_path / f"a.jsonl.{pack}"
    if pack == "zst":
        with pyarrow.output_stream(str(packed), compression="zstd") as file:
            file.write(raw)
    else:
        packed.write_bytes({"bz2": bz2, "xz": lzma}[pack].compress(raw))
    assert values(packed) == ROWS


def test_a_json_list_is_read_through_a_window(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "_FIRST", 3)
    rows = [{"text": "é" * i, "n": [i, {"x": None}]} for i in range(20)]
    (tmp_path / "a.json").write_text(json.dumps(rows, indent=1, ensure_ascii=False))
    assert values(tmp_path / "a.json") == rows
    (tmp_path / "b.json").write_text('[{"a": 1},\n\n {"a": 2},\n {"a" 3}]')
    with pytest.raises(DataError, match=r"b\.json:4: not valid JSON at column 7"):
        values(tmp_path / "b.json")
    (tmp_path / "c.json").write_text(json.dumps(rows[1], indent=1))
    assert values(tmp_path / "c.json") == [rows[1]]  # one row, over several lines


def test_a_gigantic_row_is_refused_with_its_place(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "LARGEST", 50)
    monkeypatch.setattr(readers, "_FIRST", 8)
    rows = [{"text": "short"}, {"text": "long" * 50}]
    write_jsonl(tmp_path / "a.jsonl", rows)
    (tmp_path / "a.json").write_text(json.dumps(rows))
    (tmp_path / "a.txt").write_text("long" * 50)
    for name, where in (("a.jsonl", ":2"), ("a.json", " row 2"), ("a.txt", "")):
        with pytest.raises(DataError, match=rf"{name}{where} is larger than .*divide it into"):
            values(tmp_path / name)
    assert values(write_jsonl(tmp_path / "b.jsonl", rows[:1])) == rows[:1]


def test_a_source_can_be_gone_through_again_and_is_known_by_its_content(tmp_path):
    source = Source(write_jsonl(tmp_path / "a.jsonl"), part=2)
    assert [*source] == [*source] and {row.part for row in source} == {2}
    identity = source.identity()
    assert identity == Source(tmp_path / "a.jsonl").identity()
    write_jsonl(tmp_path / "a.jsonl", ROWS[::-1])
    assert source.identity() != identity
    assert Source(ROWS).identity() is None


def test_a_hub_dataset_is_loaded_once_or_streamed(monkeypatch):
    asked = []

    def load(name, configuration, **options):
        asked.append(options)
        return Loaded(ROWS)

    class Loaded(list):
        _fingerprint = "f00"

    fake_hub(monkeypatch, load)
    kept, streamed = Source("owner/name"), Source("owner/name", streaming=True)
    assert kept.identity() == ["owner/name", "train", "f00"] and [r.values for r in kept] == ROWS
    assert streamed.identity() is None and [r.values for r in streamed] == ROWS
    assert asked == [{"split": "train"}, {"split": "train", "streaming": True}]


def test_the_first_rows_are_those_of_each_table(tmp_path):
    write_jsonl(tmp_path / "a.jsonl")
    write_jsonl(tmp_path / "b.jsonl", ROWS[1:])
    assert [row.values for row in Source(tmp_path).first_rows()] == ROWS[:2]
    with pytest.raises(DataError, match="holds no rows"):
        next(Source([]).first_rows())
