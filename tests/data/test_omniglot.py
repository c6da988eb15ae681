"""The Omniglot reader: layouts, order, and where a damaged copy broke."""

import struct
import sys
import zipfile
import zlib

import pytest
import torch
from data.tiny_omniglot import BACKGROUND, EVALUATION, entries, write_folders, write_zips

from fastmeta.data import omniglot


def test_zips_and_folders_hold_the_same(tmp_path):
    zips, folders = tmp_path / "zips", tmp_path / "folders"
    zips.mkdir()
    packed = omniglot(write_zips(zips))
    unpacked = omniglot(write_folders(folders))
    assert packed.images.shape == (12, 4, 28, 28)
    assert packed.images.dtype == torch.uint8
    assert packed.names == unpacked.names
    assert torch.equal(packed.images, unpacked.images)
    one_set = omniglot(zips / f"{EVALUATION}.zip")
    assert torch.equal(one_set.images, packed.images[6:])
    assert torch.equal(omniglot(folders / BACKGROUND).images, packed.images[:6])


def test_classes_stand_in_order_whatever_the_order_of_the_file(tmp_path):
    files = entries(BACKGROUND, alphabets=2, characters=2, drawings=2)
    with zipfile.ZipFile(tmp_path / "any name.zip", "w") as archive:
        for name in reversed(files):
            archive.writestr(name, files[name])
        archive.writestr(f"__MACOSX/{next(iter(files))}", b"rubbish")
        archive.writestr(f"{BACKGROUND}/.DS_Store", b"rubbish")
    names = omniglot(tmp_path / "any name.zip").names
    assert names == [f"Alphabet_{a}/character0{c}" for a in (0, 1) for c in (1, 2)]


def test_strokes_are_high_and_size_is_as_asked(tmp_path):
    images = omniglot(write_zips(tmp_path), size=20).images
    assert images.shape[-2:] == (20, 20)
    assert (images.flatten(2).max(2).values > 200).all()
    assert images.float().mean() < 100
    assert (images[..., 0, 0] < 10).all()


def test_nothing_is_written(tmp_path):
    write_zips(tmp_path)
    before = sorted((file.name, file.stat().st_mtime_ns) for file in tmp_path.iterdir())
    omniglot(tmp_path)
    assert sorted((file.name, file.stat().st_mtime_ns) for file in tmp_path.iterdir()) == before


@pytest.mark.parametrize("empty", [False, True], ids=["missing", "empty"])
def test_missing_data_says_where_to_get_it(tmp_path, empty):
    path = tmp_path if empty else tmp_path / "nowhere"
    with pytest.raises(FileNotFoundError) as caught:
        omniglot(path)
    assert str(path) in str(caught.value)
    assert "github.com/brendenlake/omniglot" in str(caught.value)
    assert "python/images_background.zip" in str(caught.value)


def test_truncated_zip_is_named(tmp_path):
    broken = write_zips(tmp_path) / f"{EVALUATION}.zip"
    broken.write_bytes(broken.read_bytes()[:2000])
    with pytest.raises(ValueError, match=rf"{EVALUATION}\.zip: not a readable zip .* byte 2000"):
        omniglot(tmp_path)


def test_damaged_entry_is_named_with_its_byte(tmp_path):
    broken = write_zips(tmp_path) / f"{BACKGROUND}.zip"
    with zipfile.ZipFile(broken) as archive:
        entry = archive.infolist()[7]
    content = bytearray(broken.read_bytes())
    content[entry.header_offset + 30 + len(entry.filename) + entry.compress_size // 2] ^= 0xFF
    broken.write_bytes(content)
    with pytest.raises(ValueError, match=rf"{BACKGROUND}\.zip, entry {entry.filename} ") as caught:
        omniglot(tmp_path)
    assert f"(byte {entry.header_offset}): damaged" in str(caught.value)


@pytest.mark.parametrize("rubbish", [b"not a PNG", None, b""], ids=["text", "truncated", "empty"])
def test_damaged_drawing_is_named(tmp_path, rubbish):
    drawing = write_folders(tmp_path) / BACKGROUND / "Alphabet_1" / "character02" / "0003.png"
    drawing.write_bytes(drawing.read_bytes()[:60] if rubbish is None else rubbish)
    with pytest.raises(ValueError, match=r"character02/0003\.png: damaged drawing") as caught:
        omniglot(tmp_path)
    assert f"{drawing.stat().st_size} bytes" in str(caught.value)
    assert "0x" not in str(caught.value)


def test_encrypted_entry_is_named(tmp_path):
    locked = write_zips(tmp_path) / f"{BACKGROUND}.zip"
    with zipfile.ZipFile(locked) as archive:
        entry = archive.infolist()[7]
    content = bytearray(locked.read_bytes())
    listed = content.rfind(entry.filename.encode())  # in the table of contents
    content[entry.header_offset + 6] |= 1
    content[listed - 46 + 8] |= 1
    locked.write_bytes(content)
    with pytest.raises(ValueError, match=rf"{BACKGROUND}\.zip, entry {entry.filename} .*encrypted"):
        omniglot(tmp_path)


@pytest.mark.parametrize("side", [10_000, 20_000], ids=["Pillow warns", "Pillow raises"])
def test_image_bomb_is_named(tmp_path, side):
    drawing = write_folders(tmp_path) / BACKGROUND / "Alphabet_1" / "character02" / "0003.png"
    header = b"IHDR" + struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    content = bytearray(drawing.read_bytes())
    content[12:33] = header + struct.pack(">I", zlib.crc32(header))
    drawing.write_bytes(content)
    with pytest.raises(ValueError, match=rf"0003\.png: .*105 by 105.* {len(content)} bytes"):
        omniglot(tmp_path)


def test_incomplete_class_is_named(tmp_path):
    (write_folders(tmp_path) / EVALUATION / "Alphabet_0" / "character03" / "0004.png").unlink()
    with pytest.raises(ValueError, match="Alphabet_0/character03 has 3 drawings where others"):
        omniglot(tmp_path / EVALUATION)


def test_without_pillow_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    with pytest.raises(ImportError, match=r'pip install "fastmeta\[demo\]"'):
        omniglot(tmp_path)


def test_real_data(real_data):
    images, names = omniglot(real_data / "omniglot" / "images_evaluation.zip")
    assert images.shape == (659, 20, 28, 28)
    assert len(set(names)) == 659
    assert names[0] == "Angelic/character01"
    assert names[-1] == "ULOG/character26"
    # paper is most of a drawing, and no drawing is empty
    assert 5 < images.float().mean() < 50
    assert (images.flatten(2).max(2).values > 100).all()
