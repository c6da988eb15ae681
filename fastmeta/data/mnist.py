"""Reader of the MNIST digits in their published idx files."""

from pathlib import Path

import torch
from torch import Tensor

from fastmeta.data.files import read_bytes

_IMAGES_MAGIC = 0x00000803  # idx: unsigned bytes, three dimensions
_LABELS_MAGIC = 0x00000801  # idx: unsigned bytes, one dimension


def mnist(path: str | Path, train: bool = True) -> tuple[Tensor, Tensor]:
    """Read MNIST.

    **Arguments:** `path`: the folder of the four published files, gzipped or not
    (`train-images-idx3-ubyte.gz`, …). `train`: the 60,000 training digits, or the 10,000 of the
    test set.

    **Returns:** images, uint8 [M, 28, 28], strokes high; labels, int64 [M].

    **Raises:** `FileNotFoundError` where a file is missing; `ValueError`, with the file and the
    byte, where one is damaged.

    **Source:** LeCun, Bottou, Bengio, Haffner (1998), Gradient-based learning applied to document
    recognition.
    """
    split = "train" if train else "t10k"
    image_file = _find(Path(path), f"{split}-images-idx3-ubyte")
    label_file = _find(Path(path), f"{split}-labels-idx1-ubyte")
    images = _read_idx(image_file, _IMAGES_MAGIC)
    labels = _read_idx(label_file, _LABELS_MAGIC)
    if len(images) != len(labels):
        raise ValueError(
            f"{label_file}: byte 4 announces {len(labels)} labels, but {image_file} holds "
            f"{len(images)} images; the two files do not belong together"
        )
    if len(labels) and int(labels.max()) > 9:
        first = int((labels > 9).nonzero()[0])
        raise ValueError(
            f"{label_file}: byte {8 + first} holds label {int(labels[first])}; digits are 0 to 9"
        )
    return images, labels.long()


def _find(folder: Path, name: str) -> Path:
    for candidate in (folder / name, folder / f"{name}.gz"):
        if candidate.is_file():
            return candidate
    raise FileNotFoundError(
        f"path: {folder} holds neither {name} nor {name}.gz. MNIST is published at "
        "yann.lecun.com/exdb/mnist (mirrored at github.com/fgnt/mnist); download its four .gz "
        "files into one folder and name that folder"
    )


def _read_idx(path: Path, magic: int) -> Tensor:
    content = read_bytes(path)
    dimensions = magic & 0xFF
    header = 4 * (1 + dimensions)
    found = int.from_bytes(content[:4], "big")
    if len(content) >= 4 and found != magic:
        raise ValueError(
            f"{path}: byte 0 holds the magic number 0x{found:08x}; "
            f"an idx file of this kind begins with 0x{magic:08x}"
        )
    if len(content) < header:
        raise ValueError(f"{path}: ends at byte {len(content)}, within its {header}-byte header")
    shape = [int.from_bytes(content[i : i + 4], "big") for i in range(4, header, 4)]
    if dimensions == 3 and shape[1:] != [28, 28]:
        raise ValueError(f"{path}: byte 8 announces images of {shape[1]}x{shape[2]}, not 28x28")
    expected = header + torch.Size(shape).numel()
    if len(content) != expected:
        kind = "ends at" if len(content) < expected else "goes on after"
        place = min(len(content), expected)
        raise ValueError(
            f"{path}: {kind} byte {place}; its header announces {shape[0]} items, "
            f"which take {expected} bytes, and there are {len(content)}"
        )
    if expected == header:
        return torch.zeros(shape, dtype=torch.uint8)
    # bytearray: torch wants memory that may be written to
    return torch.frombuffer(bytearray(content), dtype=torch.uint8, offset=header).view(shape)
