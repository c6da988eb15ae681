"""The AG News reader: its rows, and the line of one that is malformed."""

import gzip
from collections import Counter

import pytest

from fastmeta.data import ag_news

GOOD = '"3","Wall St.","Oil ""falls"" again"\n"4","Moon\nlanding","far, far\\away"\n'


def test_reads(tmp_path):
    (tmp_path / "test.csv").write_text(GOOD, encoding="utf-8")
    (tmp_path / "test.csv.gz").write_bytes(gzip.compress(GOOD.encode()))
    articles = ag_news(tmp_path / "test.csv")
    assert articles == [(3, 'Wall St. Oil "falls" again'), (4, "Moon\nlanding far, far\\away")]
    assert ag_news(tmp_path / "test.csv.gz") == articles


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        (b'"3","title only"\n', "2 fields; a row is class, title, description"),
        (b'"5","a","b"\n', "class '5'; it must be 1, 2, 3 or 4"),
        (b'"class","title","description"\n', "class 'class'; it must be"),
        (b'"3","never closed,"b"\n', "malformed row"),
        (b'"3","caf\xe9","b"\n', "not UTF-8"),
        (b"\n", "0 fields"),
    ],
)
def test_malformed_row_is_named_with_its_line(tmp_path, row, complaint):
    file = tmp_path / "train.csv"
    # the second good row spans two lines: the bad one is on line 4
    file.write_bytes(GOOD.encode() + row + GOOD.encode())
    with pytest.raises(ValueError, match=rf"train\.csv, line 4: {complaint}"):
        ag_news(file)


def test_empty_file_is_named(tmp_path):
    (tmp_path / "test.csv").touch()
    with pytest.raises(ValueError, match=r"test\.csv, line 1: no article"):
        ag_news(tmp_path / "test.csv")


def test_truncated_gzip_is_named(tmp_path):
    (tmp_path / "test.csv.gz").write_bytes(gzip.compress(GOOD.encode())[:-9])
    with pytest.raises(ValueError, match=r"test\.csv\.gz: damaged gzip file"):
        ag_news(tmp_path / "test.csv.gz")


@pytest.mark.parametrize("name", [".", "nowhere.csv"])
def test_missing_file_says_where_to_get_it(tmp_path, name):
    with pytest.raises(FileNotFoundError, match="mhjabreel/CharCnn_Keras"):
        ag_news(tmp_path / name)


def test_real_data(real_data):
    articles = ag_news(real_data / "ag_news" / "test.csv.gz")
    assert Counter(topic for topic, _ in articles) == dict.fromkeys((1, 2, 3, 4), 1900)
    assert articles[0][1].startswith("Fears for T N pension after talks")
