"""The MNIST reader: idx files, gzipped or not, and where a damaged one broke."""

import gzip
import struct

import pytest
import torch

from fastmeta.data import Episodes, mnist

IMAGES, LABELS = "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"


def idx(*shape: int, magic: int | None = None, announce: int | None = None) -> bytes:
    """An idx file of counting bytes; its header may be made to lie."""
    count = torch.Size(shape).numel()
    content = bytes(i % 10 for i in range(count))
    header = (shape[0] if announce is None else announce, *shape[1:])
    magic = 0x800 + len(shape) if magic is None else magic
    return struct.pack(f">{1 + len(shape)}I", magic, *header) + content


@pytest.fixture
def folder(tmp_path):
    (tmp_path / IMAGES).write_bytes(idx(12, 28, 28))
    (tmp_path / LABELS).write_bytes(idx(12))
    return tmp_path


@pytest.mark.parametrize("gzipped", [False, True])
def test_reads(folder, gzipped):
    if gzipped:
        for name in (IMAGES, LABELS):
            (folder / f"{name}.gz").write_bytes(gzip.compress((folder / name).read_bytes()))
            (folder / name).unlink()
    images, labels = mnist(folder, train=False)
    assert images.shape == (12, 28, 28)
    assert images.dtype == torch.uint8
    assert labels.dtype == torch.int64
    assert labels.tolist() == [i % 10 for i in range(12)]
    assert images.flatten().tolist() == [i % 10 for i in range(12 * 784)]


def test_missing_data_says_where_to_get_it(folder):
    with pytest.raises(FileNotFoundError, match=r"train-images-idx3-ubyte.*fgnt/mnist"):
        mnist(folder)


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        (IMAGES, idx(12, 28, 28, magic=0x801), "byte 0 holds the magic number 0x00000801; .*0803"),
        (LABELS, b"\x1f\x8b\x08\x00" + bytes(9), "byte 0 holds the magic number 0x1f8b0800"),
        (IMAGES, idx(12, 28, 28)[:9], "ends at byte 9, within its 16-byte header"),
        (LABELS, b"\x00", "ends at byte 1, within its 8-byte header"),
        (IMAGES, idx(12, 28, 28)[:-5], "ends at byte 9419; .* take 9424 bytes"),
        (LABELS, idx(12) + b"\x00", "goes on after byte 20; .* there are 21"),
        (LABELS, idx(12, announce=13), "ends at byte 20; its header announces 13 items"),
        (IMAGES, idx(12, 20, 28), "byte 8 announces images of 20x28"),
        (LABELS, idx(11), "byte 4 announces 11 labels, but .* holds 12 images"),
        (LABELS, idx(12)[:-1] + b"\x0b", "byte 19 holds label 11"),
    ],
)
def test_damage_is_named_with_file_and_byte(folder, name, content, complaint):
    (folder / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name}: {complaint}"):
        mnist(folder, train=False)


@pytest.mark.parametrize("damage", ["truncated", "flipped", "no gzip"])
def test_damaged_gzip_is_named(folder, damage):
    packed = bytearray(gzip.compress((folder / IMAGES).read_bytes()))
    if damage == "truncated":
        packed = packed[: len(packed) // 2]
    elif damage == "flipped":
        packed[-6] ^= 0xFF  # its checksum
    else:
        packed[0] = 0
    (folder / IMAGES).unlink()
    (folder / f"{IMAGES}.gz").write_bytes(packed)
    with pytest.raises(ValueError, match=rf"{IMAGES}\.gz: damaged gzip file, after at least \d+"):
        mnist(folder, train=False)


def test_real_data(real_data):
    images, labels = mnist(real_data / "mnist", train=False)
    assert images.shape == (10_000, 28, 28)
    assert labels[:5].tolist() == [7, 2, 1, 0, 4]
    counts = [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    assert labels.bincount().tolist() == counts
    (x, _), _ = Episodes.from_labels(images, labels, ways=10, shots=5, queries=15).sample(2)
    assert x.shape == (2, 50, 28, 28)
