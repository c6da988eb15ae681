"""Reader of the Omniglot characters, from the published zip files or unpacked."""

import io
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

_SETS = ("images_background", "images_evaluation")
_ENCRYPTED = 1  # in an entry's flag bits


class Omniglot(NamedTuple):
    """The drawings of all characters."""

    images: Tensor  # uint8 [C, E, size, size], strokes high
    names: list[str]  # [C], "Alphabet/characterNN"


def omniglot(path: str | Path, size: int = 28) -> Omniglot:
    """Read Omniglot.

    Drawings are turned to grey and made smaller with the Lanczos filter that MAML's script asks
    for. (On one-bit images Pillow takes the nearest pixel instead, so that script's own images lost
    their thin strokes.) Nothing is ever written to `path`.

    **Arguments:**

    - `path`: a folder with `images_background.zip` and `images_evaluation.zip`, or with one of
      them; one of these files; or an unpacked folder, `<Alphabet>/character<NN>/*.png`, with or
      without `images_background` and `images_evaluation` above.
    - `size`: height and width of the images.

    **Returns:** `Omniglot(images, names)`: images uint8 [C, E, size, size], strokes high; the name
    of each class. Classes stand in order of set, alphabet and character, drawings in order of their
    file names.

    **Raises:** `FileNotFoundError` where there is no such data; `ValueError`, with the file, the
    entry and its byte, where it is damaged, encrypted or larger than Pillow takes; `ImportError`
    without Pillow.

    **Source:** Lake, Salakhutdinov, Tenenbaum (2015), Human-level concept learning through
    probabilistic program induction.
    """
    pillow = _import_pillow()
    classes: dict[tuple[Path, PurePosixPath], list[Tensor]] = {}
    for source in _sources(Path(path)):
        drawings = _zip_drawings(source) if source.is_file() else _folder_drawings(source)
        for entry, place, png in drawings:
            drawing = _decode(pillow, png, place, size)
            classes.setdefault((source, entry.parent), []).append(drawing)
    if not classes:
        raise FileNotFoundError(
            _where_to_get(Path(path), "holds no <Alphabet>/character<NN>/*.png")
        )
    _require_equal_counts(classes)
    paper_high = torch.stack([torch.stack(drawings) for drawings in classes.values()])
    return Omniglot(255 - paper_high, [_name(character) for _, character in classes])


def _import_pillow() -> ModuleType:
    try:
        import PIL.Image
    except ImportError as error:
        raise ImportError(
            'reading Omniglot\'s PNG images takes Pillow: pip install "fastmeta[demo]"'
        ) from error
    return PIL.Image


def _sources(path: Path) -> list[Path]:
    """List the zip files and folders of alphabets that `path` stands for."""
    if not path.exists():
        raise FileNotFoundError(_where_to_get(path, "is not there"))
    if path.is_file():
        return [path]
    sources: list[Path] = []
    for name in _SETS:
        if (path / f"{name}.zip").is_file():
            sources.append(path / f"{name}.zip")
        elif (path / name).is_dir():
            sources.append(path / name)
    return sources or [path]


def _where_to_get(path: Path, complaint: str) -> str:
    return (
        f"path: {path} {complaint}. Omniglot is published at github.com/brendenlake/omniglot: "
        "download python/images_background.zip and python/images_evaluation.zip into one folder "
        "and name that folder, one of the zip files, or an unpacked copy"
    )


def _is_drawing(entry: PurePosixPath) -> bool:
    return (
        entry.suffix == ".png"
        and len(entry.parts) >= 3
        and entry.parent.name.startswith("character")
        and "__MACOSX" not in entry.parts
    )


def _name(character: PurePosixPath) -> str:
    return "/".join(character.parts[-2:])


def _folder_drawings(folder: Path) -> Iterator[tuple[PurePosixPath, str, bytes]]:
    """Yield the path within the folder, the place and the content of every drawing."""
    for file in sorted(folder.glob("*/*/*.png")):
        entry = PurePosixPath(file.relative_to(folder).as_posix())
        if _is_drawing(entry):
            yield entry, str(file), file.read_bytes()


def _zip_drawings(path: Path) -> Iterator[tuple[PurePosixPath, str, bytes]]:
    """Yield the path within the zip file, the place and the content of every drawing."""
    try:
        archive = zipfile.ZipFile(path)
    except zipfile.BadZipFile as error:
        raise ValueError(
            f"{path}: not a readable zip file ({error}). Its table of contents should stand at its "
            f"end, before byte {path.stat().st_size}: a broken download lacks it. Fetch it again"
        ) from error
    with archive:
        for info in sorted(archive.infolist(), key=lambda info: info.filename):
            entry = PurePosixPath(info.filename)
            if not _is_drawing(entry):
                continue
            place = f"{path}, entry {info.filename} (byte {info.header_offset})"
            if info.flag_bits & _ENCRYPTED:
                raise ValueError(
                    f"{place}: encrypted, which Omniglot as published is not. Fetch the file again"
                )
            try:
                yield entry, place, archive.read(info)
            except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
                raise ValueError(f"{place}: damaged ({error}). Fetch the file again") from error


def _decode(pillow: ModuleType, png: bytes, place: str, size: int) -> Tensor:
    try:
        with pillow.open(io.BytesIO(png), formats=["PNG"]) as drawing:
            grey = drawing.convert("L").resize((size, size), pillow.Resampling.LANCZOS)
    except (pillow.DecompressionBombError, pillow.DecompressionBombWarning) as error:
        raise ValueError(
            f"{place}: no drawing of Omniglot's, which are 105 by 105 ({error}); {len(png)} bytes"
        ) from error
    except (OSError, SyntaxError, ValueError) as error:
        # Pillow's own words for an unknown file name a memory address: say it plainly
        reason = "not a PNG image" if "BytesIO" in str(error) else str(error)
        raise ValueError(f"{place}: damaged drawing ({reason}); {len(png)} bytes") from error
    # bytearray: torch wants memory that may be written to
    return torch.frombuffer(bytearray(grey.tobytes()), dtype=torch.uint8).view(size, size)


def _require_equal_counts(classes: dict[tuple[Path, PurePosixPath], list[Tensor]]) -> None:
    usual = max(len(drawings) for drawings in classes.values())
    for (source, character), drawings in classes.items():
        if len(drawings) != usual:
            raise ValueError(
                f"{source}: {_name(character)} has {len(drawings)} drawings where others have "
                f"{usual}; the copy is incomplete. Fetch it again"
            )
