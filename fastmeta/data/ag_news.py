"""Reader of the AG News articles in their published CSV files."""

import csv
import io
from pathlib import Path

from fastmeta.data.files import read_bytes

_CLASSES = {"1": "World", "2": "Sports", "3": "Business", "4": "Sci/Tech"}


def ag_news(path: str | Path) -> list[tuple[int, str]]:
    """Read one file of AG News.

    **Arguments:** `path`: `train.csv` or `test.csv` as published, gzipped or not.

    **Returns:** a list of (class, text): the class as in the file, 1 World, 2 Sports, 3 Business,
    4 Sci/Tech; the text is title and description with a blank between.

    **Raises:** `FileNotFoundError` where there is no such file; `ValueError`, with the file and the
    line, for a malformed row.

    **Source:** Zhang, Zhao, LeCun (2015), Character-level Convolutional Networks for Text
    Classification.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"path: {path} is {'a folder' if path.is_dir() else 'not there'}; it must be one CSV "
            "file. AG News is published at github.com/mhjabreel/CharCnn_Keras, folder "
            "data/ag_news_csv: download train.csv or test.csv and name the file"
        )
    content = read_bytes(path)
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}, line {line}: not UTF-8 (byte {error.start})") from error

    articles: list[tuple[int, str]] = []
    rows = csv.reader(io.StringIO(text, newline=""), strict=True)
    while True:
        line = rows.line_num + 1  # where the row begins: a quoted field may span lines
        try:
            row = next(rows)
        except StopIteration:
            break
        except csv.Error as error:
            raise ValueError(f"{path}, line {line}: malformed row ({error})") from error
        if len(row) != 3:
            raise ValueError(
                f"{path}, line {line}: {len(row)} fields; a row is class, title, description"
            )
        if row[0] not in _CLASSES:
            raise ValueError(f"{path}, line {line}: class {row[0]!r}; it must be 1, 2, 3 or 4")
        articles.append((int(row[0]), f"{row[1]} {row[2]}"))
    if not articles:
        raise ValueError(f"{path}, line 1: no article in the file")
    return articles
