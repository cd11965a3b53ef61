"""Raw files: which root is taken, what is fetched and kept, and CSV rows with line numbers."""

import threading
from contextlib import contextmanager
from http.client import IncompleteRead
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from studies.data.raw_files import SHA256, read_rows, read_url, root_with


def test_the_first_root_that_has_all_files_is_taken(tmp_path):
    roots = [tmp_path / name for name in ("empty", "half", "whole", "later")]
    for root, names in zip(roots, ["", "a", "ab", "ab"], strict=True):
        (root / "raw").mkdir(parents=True)
        for name in names:
            (root / "raw" / name).touch()
    assert root_with(roots, ["raw/a", "raw/b"], None) == tmp_path / "whole"
    assert root_with(roots, ["raw/a"], None) == tmp_path / "half"
    assert root_with(roots, ["raw/c"], None) is None
    assert root_with(roots, ["raw"], None) is None, "a folder is no file"


def test_files_that_are_fetched_are_kept_together_or_not_at_all(tmp_path, fresh_cache):
    moses = "molecules/moses12k.csv.gz"
    with pytest.raises(ValueError, match=f"{moses}, as fetched: expected sha256 {SHA256[moses]}"):
        root_with([tmp_path], ["new", moses], lambda: {"new": b"1", moses: b"2"})
    assert root_with([tmp_path], ["new", "other"], lambda: {"new": b"1"}["other"]) is None
    assert not fresh_cache.exists()
    assert root_with([tmp_path], ["a/new"], lambda: {"a/new": b"1"}) == fresh_cache
    assert (fresh_cache / "a" / "new").read_bytes() == b"1"


@contextmanager
def server(content, stated):
    """Serves a content that it says has a length."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Length", str(stated))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_):
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{http.server_port}/file"
        http.shutdown()


def test_a_url_is_read_to_its_stated_end_or_not_at_all(tmp_path, fresh_cache, capsys):
    content = bytes(range(256))
    with server(content, 256) as url:
        assert read_url(url) == content
    with server(content, 300) as url:
        with pytest.raises(IncompleteRead):
            read_url(url)
        assert root_with([], ["file"], lambda: {"file": read_url(url)}) is None
    assert capsys.readouterr().err.startswith("could not fetch file: IncompleteRead")
    assert not fresh_cache.exists()


def test_rows_are_text_under_their_line_number(tmp_path):
    (tmp_path / "t.csv").write_text("a,b\n01,NA\n\n,\n,x\n")
    rows = read_rows(tmp_path / "t.csv", ["b", "a"])
    assert rows.to_dict("index") == {2: {"a": "01", "b": "NA"}, 5: {"a": "", "b": "x"}}
    assert rows.index.name == "line"
