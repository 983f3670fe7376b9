import json

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from megatron_srft.data.readers import PARQUET_BATCH_ROWS, read_rows
from megatron_srft.data.report import RowCounts

ROWS = [{"prompt": "7+15=", "answer": "2"}, {"prompt": "wie groß? 大きい 🙂", "answer": None}]


def read(path, columns=("prompt", "answer")):
    counts = RowCounts()
    return list(read_rows(path, columns, counts)), counts


def lines(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def write_all_formats(folder, rows):
    (folder / "rows.jsonl").write_bytes(lines(rows))
    (folder / "rows.jsonl.zst").write_bytes(zstandard.compress(lines(rows)))
    (folder / "rows.json").write_text(json.dumps(rows, indent=1))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "rows.parquet")
    return sorted(folder.glob("rows.*"))


def test_every_format_gives_the_same_rows(tmp_path):
    for path in write_all_formats(tmp_path, ROWS):
        rows, counts = read(path)
        assert [row.fields for row in rows] == ROWS
        assert (counts.rows, counts.blank_lines) == (2, 0)


def test_where_names_lines_from_one_and_rows_from_zero(tmp_path):
    json_list, jsonl, compressed, parquet = write_all_formats(tmp_path, ROWS)
    assert [row.where for row in read(jsonl)[0]] == [f"{jsonl}:1", f"{jsonl}:2"]
    assert [row.where for row in read(compressed)[0]] == [f"{compressed}:1", f"{compressed}:2"]
    assert [row.where for row in read(parquet)[0]] == [f"{parquet}:row 0", f"{parquet}:row 1"]
    assert [row.where for row in read(json_list)[0]] == [f"{json_list}:item 0", f"{json_list}:item 1"]


def test_byte_order_mark_crlf_and_blank_lines_are_tolerated_and_counted(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "a"}\r\n\r\n  \n{"prompt": "b"}\r\n\n')
    rows, counts = read(path)
    assert [(row.fields["prompt"], row.number) for row in rows] == [("a", 1), ("b", 4)]
    assert counts.blank_lines == 3


def test_only_line_feeds_end_a_line(tmp_path):
    """Unicode line separators are legal inside JSON strings; a lone carriage return is white space between tokens."""
    path = tmp_path / "a.jsonl"
    path.write_bytes('{"prompt": "x\u2028y\u0085z",\r "answer": "1"}\n'.encode())
    assert [row.fields for row in read(path)[0]] == [{"prompt": "x\u2028y\u0085z", "answer": "1"}]


def test_a_very_long_row(tmp_path):
    path = tmp_path / "a.jsonl"
    text = "0123456789" * 500_000
    path.write_bytes(lines([{"prompt": text}, {"prompt": "short"}]))
    assert [len(row.fields["prompt"]) for row in read(path)[0]] == [5_000_000, 5]


def test_parquet_goes_on_over_batches_and_reads_only_the_named_columns(tmp_path):
    path = tmp_path / "a.parquet"
    many = [{"prompt": str(i), "huge": "x" * 10} for i in range(2 * PARQUET_BATCH_ROWS + 1)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(many), path)
    rows, counts = read(path)
    assert [row.fields for row in rows] == [{"prompt": str(i)} for i in range(len(many))]
    assert counts.rows == len(many) == rows[-1].number + 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"prompt": "a"}\n{"prompt": "b"\n', r"a\.jsonl:2: not JSON: Expecting ',' delimiter"),
        (b"\n\n[1, 2]\n", r"a\.jsonl:3: a row must be an object with named fields, not a list"),
        (b'"text"\n', r"a\.jsonl:1: a row must be an object with named fields, not a string"),
        (b"12\n", r"a\.jsonl:1: a row must be an object with named fields, not a number \(12\)"),
        (b"null\n", r"a\.jsonl:1: a row must be an object with named fields, not null"),
        (b'{"prompt": "a"}\n{"prompt": "\xe9"}\n', r"a\.jsonl:2: not UTF-8 text"),
        ('{"prompt": "a"}\n'.encode("utf-16"), r"a\.jsonl:1: not UTF-8 text"),
        (b'{"prompt": "a", "answer": ' + b"9" * 5000 + b"}\n", r"a\.jsonl:1: not readable as JSON"),
        (b'{"prompt": ' + b"[" * 100_000 + b"\n", r"a\.jsonl:1: not readable as JSON"),
        (b"", r"a\.jsonl: the file is empty"),
        (b"\n\n", r"a\.jsonl: the file is empty"),
    ],
)
def test_the_first_bad_line_is_named(tmp_path, content, message):
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read(path)


def test_json_file_that_is_no_list(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('{"prompt": "a"}')
    with pytest.raises(ValueError, match=r"must hold a list of objects; name it \.jsonl"):
        read(path)
    path.write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    with pytest.raises(ValueError, match=r"name it \.jsonl if it has one object per line"):
        read(path)
    path.write_text('[{"prompt": "a"}, 5]')
    with pytest.raises(ValueError, match=r"a\.json:item 1: a row must be an object"):
        read(path)


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(ValueError, match=r"b\.jsonl: no such file"):
        read(tmp_path / "b.jsonl")
    with pytest.raises(ValueError, match="is a folder; name its files"):
        read(tmp_path)
    (tmp_path / "a.csv").write_text("prompt\n1\n")
    with pytest.raises(ValueError, match=r"a\.csv: unknown file format; the name must end in \.jsonl"):
        read(tmp_path / "a.csv")


def test_cut_off_and_foreign_zstd(tmp_path):
    path = tmp_path / "a.jsonl.zst"
    whole = zstandard.compress(lines([{"prompt": str(i)} for i in range(100_000)]))
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="cut-off zstd file|not JSON"):
        read(path)
    path.write_bytes(lines(ROWS))
    with pytest.raises(ValueError, match="damaged or cut-off zstd file"):
        read(path)


def test_cut_off_zstd_is_noticed_even_at_a_line_boundary(tmp_path):
    """The first frame's blocks end exactly after a line: only the missing end of the frame gives it away."""
    path = tmp_path / "a.jsonl.zst"
    compressor = zstandard.ZstdCompressor().compressobj()
    path.write_bytes(compressor.compress(lines(ROWS)) + compressor.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK))
    with pytest.raises(ValueError, match="damaged or cut-off zstd file"):
        read(path)


def test_damaged_and_empty_parquet(tmp_path):
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"a\.parquet: not a readable parquet file"):
        read(path)
    pyarrow.parquet.write_table(pyarrow.table({"prompt": pyarrow.array([], pyarrow.string())}), path)
    with pytest.raises(ValueError, match="the file is empty"):
        read(path)
