"""A tiny copy of Omniglot's files, made of random strokes."""

import io
import zipfile
from pathlib import Path

import torch
from PIL import Image

SETS = ("images_background", "images_evaluation")
BACKGROUND, EVALUATION = SETS


def png(seed: int) -> bytes:
    """One drawing as published: 105x105, one bit, black strokes on white paper."""
    generator = torch.Generator().manual_seed(seed)
    row, column = torch.randint(10, 80, (2,), generator=generator).tolist()
    drawing = Image.new("1", (105, 105), 1)
    drawing.paste(0, (column, 5, column + 8, 100))
    drawing.paste(0, (5, row, 100, row + 8))
    file = io.BytesIO()
    drawing.save(file, "PNG")
    return file.getvalue()


def entries(root: str, alphabets: int, characters: int, drawings: int) -> dict[str, bytes]:
    """File names and contents of one of the two sets."""
    files: dict[str, bytes] = {}
    for alphabet in range(alphabets):
        for character in range(1, characters + 1):
            for drawer in range(1, drawings + 1):
                name = f"{root}/Alphabet_{alphabet}/character{character:02}/{drawer:04}.png"
                files[name] = png(len(root) + 100 * alphabet + character)
    return files


def write_zips(folder: Path, alphabets: int = 2, characters: int = 3, drawings: int = 4) -> Path:
    """Both sets as zip files, entries for the folders included."""
    for root in SETS:
        with zipfile.ZipFile(folder / f"{root}.zip", "w") as archive:
            archive.writestr(f"{root}/", b"")
            for name, content in entries(root, alphabets, characters, drawings).items():
                archive.writestr(name, content)
    return folder


def write_folders(folder: Path, alphabets: int = 2, characters: int = 3, drawings: int = 4) -> Path:
    """Both sets unpacked."""
    for root in SETS:
        for name, content in entries(root, alphabets, characters, drawings).items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
    return folder
