"""Raw files: which root is taken, checksums, fetching, and CSV rows with line numbers."""

import gzip
import hashlib
import io

import pytest

from studies.data.raw_files import check, decompressed, fetch, read_rows, root_with


def test_the_first_root_that_has_all_files_is_taken(tmp_path):
    roots = [tmp_path / name for name in ("empty", "half", "whole", "later")]
    for root, names in zip(roots, ["", "a", "ab", "ab"], strict=True):
        (root / "raw").mkdir(parents=True)
        for name in names:
            (root / "raw" / name).touch()
    assert root_with(roots, ["raw/a", "raw/b"]) == tmp_path / "whole"
    assert root_with(roots, ["raw/a"]) == tmp_path / "half"
    assert root_with(roots, ["raw/c"]) is None
    assert root_with([], ["raw/a"]) is None


def test_a_folder_is_no_file(tmp_path):
    (tmp_path / "a").mkdir()
    assert root_with([tmp_path], ["a"]) is None


def test_another_content_is_refused_with_both_checksums_and_what_reads_it():
    expected, found = (hashlib.sha256(text).hexdigest() for text in (b"right", b"wrong"))
    check(b"right", expected, "a.csv", "read(path)")
    with pytest.raises(ValueError, match="damaged or another one") as caught:
        check(b"wrong", expected, "a.csv", "read(path)")
    message = str(caught.value)
    assert message.startswith(f"a.csv: expected sha256 {expected}, found {found}")
    assert message.endswith("with read(path)")


@pytest.mark.parametrize("length", [0, 5, 20])
def test_a_cut_gzip_file_is_refused(length):
    content = gzip.compress(b"a long enough content")
    assert decompressed(content, "a.gz") == b"a long enough content"
    if length == 0:
        content = b"no gzip at all"
    with pytest.raises(ValueError, match=r"a\.gz: damaged gzip file"):
        decompressed(content[: length or None], "a.gz")


def test_a_url_is_fetched_and_nothing_is_printed(tmp_path, capsys):
    (tmp_path / "a.bin").write_bytes(bytes(range(256)))
    assert fetch((tmp_path / "a.bin").as_uri()) == bytes(range(256))
    assert capsys.readouterr() == ("", "")


def test_a_url_that_cannot_be_had_is_named_on_stderr(tmp_path, capsys):
    url = (tmp_path / "absent.bin").as_uri()
    assert fetch(url) is None
    assert capsys.readouterr().err.startswith(f"could not fetch {url}: ")


def test_rows_are_text_under_their_line_number():
    file = io.BytesIO(b"a,b\n01,NA\n\n,\n,x\n")
    rows = read_rows(file, "t.csv", ["b", "a"])
    assert rows.to_dict("index") == {2: {"a": "01", "b": "NA"}, 5: {"a": "", "b": "x"}}
    assert rows.index.name == "line"
