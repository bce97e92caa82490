import gzip
import hashlib
import io
import os
import pickle
import tarfile
import urllib.request
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from npg.vision import data
from npg.vision.data import CIFAR10_ARCHIVE, CIFAR10_FOLDER, CIFAR10_MD5, DataError, load

BATCHES = [name for name in CIFAR10_MD5 if name != CIFAR10_ARCHIVE]


def batch(seed: int, n: int = 4) -> tuple[bytes, np.ndarray, list[int]]:
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (n, 3072), dtype=np.uint8)
    labels = rng.integers(0, 10, n).tolist()
    return pickle.dumps({b"data": pixels, b"labels": labels}, protocol=3), pixels, labels


def write_tar(path: Path, members: dict[str, bytes], mode: str = "w:gz") -> None:
    with tarfile.open(path, mode) as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


@pytest.fixture
def official(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small archive of CIFAR-10's make, whose checksums are taken for the official ones."""
    members = {f"{CIFAR10_FOLDER}/{name}": batch(i)[0] for i, name in enumerate(BATCHES)}
    archive = tmp_path / CIFAR10_ARCHIVE
    write_tar(archive, members)
    for path, content in {**members, CIFAR10_ARCHIVE: archive.read_bytes()}.items():
        monkeypatch.setitem(CIFAR10_MD5, path.split("/")[-1], hashlib.md5(content).hexdigest())
    return archive


def assert_is_the_official_content(images: data.ImageData) -> None:
    pixels = [batch(i)[1].reshape(-1, 3, 32, 32) for i in range(6)]
    labels = [batch(i)[2] for i in range(6)]
    np.testing.assert_array_equal(images.train_images, np.concatenate(pixels[:5]))
    np.testing.assert_array_equal(images.train_labels, np.concatenate(labels[:5]))
    np.testing.assert_array_equal(images.test_images, pixels[5])
    np.testing.assert_array_equal(images.test_labels, labels[5])
    assert images.classes[:2] == ("airplane", "automobile")


def test_official_archive(official: Path) -> None:
    assert_is_the_official_content(load(official))
    assert_is_the_official_content(load(official.parent))


def test_official_folder(official: Path, tmp_path: Path) -> None:
    unpacked = tmp_path / "unpacked"
    with tarfile.open(official) as tar:
        tar.extractall(unpacked, filter="data")
    assert_is_the_official_content(load(unpacked))
    assert_is_the_official_content(load(unpacked / CIFAR10_FOLDER))
    (unpacked / CIFAR10_FOLDER / "data_batch_3").unlink()
    with pytest.raises(DataError, match=r"lacks data_batch_3. Get the whole archive from https://"):
        load(unpacked)


def test_download_checks_and_keeps(official: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "CIFAR10_URL", official.as_uri())
    assert_is_the_official_content(load(progress=False))
    monkeypatch.setattr(urllib.request, "urlopen", None)  # the second time there is nothing to download
    assert_is_the_official_content(load(progress=False))


def test_a_damaged_download_is_refused_and_not_kept(official: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "CIFAR10_URL", official.as_uri())
    monkeypatch.setitem(CIFAR10_MD5, CIFAR10_ARCHIVE, "0" * 32)
    with pytest.raises(DataError, match="is corrupt: its md5 is"):
        load(progress=False)
    assert list(data.cache_folder().iterdir()) == []


def test_a_failed_download_says_where_to_put_the_archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "CIFAR10_URL", (tmp_path / "nothing").as_uri())
    with pytest.raises(DataError, match=r"cannot download .* put it at .*cifar-10-python.tar.gz"):
        load(progress=False)


def test_corrupt_archive_and_batch(official: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CIFAR10_MD5, "data_batch_2", "0" * 32)
    with pytest.raises(DataError, match=r"data_batch_2 of .* is corrupt"):
        load(official)
    official.write_bytes(official.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"cifar-10-python.tar.gz of .* is corrupt: .* get it again from https://"):
        load(official)


class Evil:
    def __reduce__(self):
        return os.mkdir, ("pickle-was-executed",)


def test_a_pickle_that_calls_is_refused_even_with_the_right_checksum(
    official: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / CIFAR10_FOLDER
    folder.mkdir()
    content = pickle.dumps({b"data": Evil(), b"labels": []}, protocol=3)
    for name in BATCHES:
        (folder / name).write_bytes(content)
        monkeypatch.setitem(CIFAR10_MD5, name, hashlib.md5(content).hexdigest())
    official.unlink()
    with pytest.raises(DataError, match=r"refers to posix.mkdir"):
        load(folder)
    assert not (tmp_path / "pickle-was-executed").exists()


@pytest.mark.parametrize(
    "content",
    [
        {b"labels": [1]},
        {b"data": np.zeros((2, 3072), np.uint8), b"labels": [1]},
        {b"data": np.full((1, 3072), 300, np.uint16), b"labels": [1]},  # would be 44
        {b"data": np.full((1, 3072), 0.5), b"labels": [1]},  # would be 0
    ],
)
def test_a_pickle_that_is_no_batch(content: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in BATCHES:
        raw = pickle.dumps(content, protocol=3)
        (tmp_path / name).write_bytes(raw)
        monkeypatch.setitem(CIFAR10_MD5, name, hashlib.md5(raw).hexdigest())
    with pytest.raises(DataError, match="is not a batch of CIFAR-10"):
        load(tmp_path)


# --- image files


def png(value: int, size: tuple[int, int] = (4, 4)) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", size, (value, 2 * value, 3)).save(stream, "PNG")
    return stream.getvalue()


def members(prefix: str = "") -> dict[str, bytes]:
    files = {}
    for split, n in (("train", 3), ("test", 2)):
        for c, label in enumerate(("dog", "cat")):  # not in the order of the alphabet
            for i in range(n):
                files[f"{prefix}{split}/{label}/{i}.png"] = png(10 * c + i)
    return files | {f"{prefix}readme.txt": b"no image", f"{prefix}train/cat/._0.png": b"macOS"}


def assert_is_the_sample(images: data.ImageData) -> None:
    assert images.classes == ("cat", "dog")
    assert images.train_images.shape == (6, 3, 4, 4)
    assert images.train_images.dtype == np.uint8
    assert images.train_images[:, 0, 0, 0].tolist() == [10, 11, 12, 0, 1, 2]
    assert images.train_images[:, 1, 0, 0].tolist() == [20, 22, 24, 0, 2, 4]
    assert images.train_labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert images.test_labels.tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize("kind", ["folder", "tar", "tar.gz", "tar.xz", "zip"])
@pytest.mark.parametrize("prefix", ["", "some/where/"])
def test_images_in_a_folder_or_an_archive(kind: str, prefix: str, tmp_path: Path) -> None:
    path = tmp_path / f"images.{kind}"
    if kind == "folder":
        for name, content in members(prefix).items():
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_bytes(content)
    elif kind == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in members(prefix).items():
                archive.writestr(name, content)
    else:
        write_tar(path, members(prefix), mode=f"w:{kind[4:]}")
    assert_is_the_sample(load(path, progress=False))


def test_decoded_images_are_cached_until_the_source_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "images.tar"
    write_tar(path, members(), mode="w")
    load(path, progress=False)
    (cache,) = data.cache_folder().iterdir()
    with monkeypatch.context() as patch:
        patch.setattr(data, "_decode", None)
        assert_is_the_sample(load(path, progress=False))
    cache.write_bytes(cache.read_bytes()[:100])  # damaged: decoded anew
    assert_is_the_sample(load(path, progress=False))
    write_tar(path, {k: v for k, v in members().items() if not k.endswith("2.png")}, mode="w")
    os.utime(path, ns=(1, 1))
    assert len(load(path, progress=False).train_images) == 4


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"train/cat/0.png": png(1)}, "has no images under test/<class>/"),
        ({"cat/0.png": png(1), "dog/0.png": png(1)}, r"has no images under train/<class>/: expected CIFAR-10's"),
        ({"train/cat/0.png": png(1), "test/dog/0.png": png(1)}, "has cat, dog in only one of train/ and test/"),
        (members() | {"train/cat/9.png": png(1, (5, 4))}, "train/cat/9.png .* has 5×4 pixels, and the first image 4×4"),
        (members() | {"train/cat/9.png": b"not an image"}, "train/cat/9.png .* cannot be read as an image"),
        (members() | {"copy/train/cat/0.png": png(1)}, "holds train/cat/0.png twice"),
        (members() | {"train/cat/9.gif": b""}, r"has 1 images that would not be read, such as train/cat/9\.gif: let"),
        (members() | {"train/cat/more/9.png": png(1)}, "has 1 images that would not be read, such as train/cat/more/9"),
        (members() | {"test/9.png": png(1)}, r"has 1 images that would not be read, such as test/9\.png"),
    ],
)
def test_a_wrong_layout_is_explained(files: dict[str, bytes], message: str, tmp_path: Path) -> None:
    path = tmp_path / "images.tar"
    write_tar(path, files, mode="w")
    with pytest.raises(DataError, match=message):
        load(path, progress=False)
    assert not data.cache_folder().exists()


SIXTEEN = np.array([[0, 257, 65535], [128, 129, 40000]], dtype=np.uint16)
EIGHT = [[0, 1, 255], [0, 1, 156]]  # nearest of v · 255 / 65535


def grey(values: object) -> np.ndarray:
    return np.repeat(np.asarray(values, dtype=np.uint8)[..., None], 3, axis=2)


def palette(mode: str) -> Image.Image:
    image = Image.fromarray(np.array([[0, 1, 2]], dtype=np.uint8)).convert("P")
    image.putdata([0, 1, 2])
    image.putpalette([10, 20, 30, 200, 100, 50, 255, 255, 255])
    return image.convert("PA") if mode == "PA" else image


COLOURS = [[10, 20, 30], [200, 100, 50], [255, 255, 255]]
ALPHA = np.array([[255, 128, 0]], dtype=np.uint8)
OVER_BLACK = [[10, 20, 30], [100, 50, 25], [0, 0, 0]]  # round(c α / 255)


def with_alpha(image: Image.Image, mode: str) -> Image.Image:
    image = image.convert(mode)
    image.putalpha(Image.fromarray(ALPHA))
    return image


IMAGES = {
    "1": (Image.fromarray(np.array([[False, True]])), grey([[0, 255]])),
    "L": (Image.fromarray(np.array([[0, 7, 255]], dtype=np.uint8)), grey([[0, 7, 255]])),
    "RGB": (Image.fromarray(np.array([COLOURS], dtype=np.uint8)), [COLOURS]),
    "CMYK": (
        Image.frombytes("CMYK", (2, 1), bytes([245, 235, 225, 0, 55, 155, 205, 0])),
        [COLOURS[:2]],
    ),
    "YCbCr": (Image.new("RGB", (1, 1), (200, 100, 50)).convert("YCbCr"), [[[200, 100, 50]]]),
    "HSV": (Image.new("RGB", (1, 1), (200, 100, 50)).convert("HSV"), [[[200, 100, 50]]]),
    "P": (palette("P"), [COLOURS]),
    "PA": (with_alpha(palette("P"), "PA"), [OVER_BLACK]),
    "LA": (with_alpha(Image.fromarray(np.array([[10, 200, 255]], np.uint8)), "LA"), grey([[10, 100, 0]])),
    "RGBA": (with_alpha(palette("P"), "RGBA"), [OVER_BLACK]),
    "I": (Image.fromarray(SIXTEEN.astype(np.int32)), grey(EIGHT)),
    "I;16": (Image.fromarray(SIXTEEN), grey(EIGHT)),
    "I;16L": (Image.frombytes("I;16L", (3, 2), SIXTEEN.astype("<u2").tobytes()), grey(EIGHT)),
    "I;16B": (Image.frombytes("I;16B", (3, 2), SIXTEEN.astype(">u2").tobytes()), grey(EIGHT)),
}


@pytest.mark.parametrize("mode", IMAGES)
def test_every_mode_becomes_rgb_with_the_right_values(mode: str) -> None:
    image, expected = IMAGES[mode]
    assert image.mode == mode
    pixels = data._rgb(image)
    assert pixels.dtype == np.uint8
    # Pillow's own conversions between spaces of colour round in between.
    np.testing.assert_allclose(pixels.astype(int), expected, atol=2 if mode in ("YCbCr", "HSV") else 0)


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGB", "RGBA", "I;16"])
def test_every_mode_that_a_png_has_survives_the_file(mode: str) -> None:
    image, expected = IMAGES[mode]
    stream = io.BytesIO()
    image.save(stream, "PNG")
    with Image.open(stream) as read:
        np.testing.assert_array_equal(data._rgb(read), expected)


@pytest.mark.parametrize("transparency", [2, bytes([255, 128, 0])])
def test_transparency_of_a_palette_is_laid_over_black(transparency: object) -> None:
    stream = io.BytesIO()
    palette("P").save(stream, "PNG", transparency=transparency)
    with Image.open(stream) as read:
        assert read.mode == "P"
        expected = OVER_BLACK if isinstance(transparency, bytes) else [*COLOURS[:2], [0, 0, 0]]
        np.testing.assert_array_equal(data._rgb(read), [expected])


@pytest.mark.parametrize(("mode", "colour"), [("L", 200), ("RGB", (200, 100, 50)), ("I;16", 40000)])
def test_a_transparent_colour_is_black(mode: str, colour: object) -> None:
    stream = io.BytesIO()
    Image.new(mode, (2, 2), colour).save(stream, "PNG", transparency=colour)
    with Image.open(stream) as read:
        np.testing.assert_array_equal(data._rgb(read), np.zeros((2, 2, 3)))


def test_sixteen_bits_of_a_folder_are_scaled(tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 65536, (4, 5), dtype=np.uint16)
    for split in ("train", "test"):
        (tmp_path / split / "one").mkdir(parents=True)
        Image.fromarray(values).save(tmp_path / split / "one" / "0.png")
        (tmp_path / split / "one" / "1.ppm").write_bytes(b"P5 5 4 65535\n" + values.astype(">u2").tobytes())
    expected = np.rint(values.astype(float) / 257).astype(np.uint8)
    images = load(tmp_path, progress=False)
    np.testing.assert_array_equal(images.train_images, np.broadcast_to(expected, (2, 3, 4, 5)))


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (Image.fromarray(np.full((2, 2), 0.5, np.float32)), r"floating-point numbers \(mode F\).*8 or 16 bits"),
        (Image.fromarray(np.full((2, 2), 70000, np.int32)), r"from 70000 to 70000.*8 or 16 bits"),
        (Image.fromarray(np.full((2, 2), -1, np.int32)), r"from -1 to -1.*8 or 16 bits"),
    ],
)
def test_pixels_of_unknown_scale_are_refused(image: Image.Image, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        data._rgb(image)


def test_a_refused_image_is_named(tmp_path: Path) -> None:
    for split in ("train", "test"):
        (tmp_path / split / "one").mkdir(parents=True)
        (tmp_path / split / "one" / "0.ppm").write_bytes(b"Pf 1 1 -1.0\n" + np.float32(0.5).tobytes())
    with pytest.raises(DataError, match=r"one/0.ppm of .* cannot be read as an image: .*mode F"):
        load(tmp_path, progress=False)


def test_a_picture_taken_on_its_side_stands_upright() -> None:
    image, stream = Image.fromarray(np.arange(6, dtype=np.uint8).reshape(2, 3)), io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90° clockwise
    image.save(stream, "PNG", exif=exif)
    with Image.open(stream) as read:
        np.testing.assert_array_equal(data._rgb(read)[..., 0], [[3, 0], [4, 1], [5, 2]])


def test_images_decoded_otherwise_are_not_taken_from_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "images.tar"
    write_tar(path, members(), mode="w")
    load(path, progress=False)
    monkeypatch.setattr(data, "_DECODING", data._DECODING + 1)
    monkeypatch.setattr(data, "_rgb", lambda image: np.full((4, 4, 3), 77, np.uint8))
    assert (load(path, progress=False).train_images == 77).all()


def test_nothing_there_and_no_archive(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no data at .*nothing: expected .* is downloaded to"):
        load(tmp_path / "nothing")
    (tmp_path / "text.tar").write_text("text")
    with pytest.raises(DataError, match="is truncated, corrupt or no archive"):
        load(tmp_path / "text.tar", progress=False)
    whole = tmp_path / "whole.tar.xz"
    write_tar(whole, members(), mode="w:xz")
    (tmp_path / "half.tar.xz").write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    with pytest.raises(DataError, match="is truncated, corrupt or no archive"):
        load(tmp_path / "half.tar.xz", progress=False)


@pytest.mark.parametrize("link", ["train/dog", "train", "where"])
def test_links_to_folders_are_followed(link: str, tmp_path: Path) -> None:
    # the class of the link was missing, in silence where train/ and test/ had the same links
    folder = tmp_path / "images"
    prefix = "where/" if link == "where" else ""
    for name, content in members(prefix).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    real = (folder / link).rename(tmp_path / "elsewhere")
    (folder / link).symlink_to(real)
    (folder / "around").symlink_to(folder)  # and they may lead back
    assert_is_the_sample(load(folder, progress=False))
    (folder / prefix / "train/dog/0.png").write_bytes(png(77))
    assert 77 in load(folder, progress=False).train_images  # seen by the cache, too


@pytest.mark.parametrize("kind", ["tar", "zip"])
@pytest.mark.parametrize("link", ["train/plane", "data/test"])
def test_links_to_folders_in_an_archive_are_refused(kind: str, link: str, tmp_path: Path) -> None:
    path = tmp_path / f"images.{kind}"
    if kind == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in members().items():
                archive.writestr(name, content)
            info = zipfile.ZipInfo(link)
            info.external_attr = 0o120777 << 16
            archive.writestr(info, "elsewhere")
    else:
        with tarfile.open(path, "w") as tar:
            for name, kept in ((link, tarfile.SYMTYPE), (f"{Path(link).parent}/elsewhere", tarfile.DIRTYPE)):
                info = tarfile.TarInfo(name)
                info.type, info.linkname = kept, "elsewhere"
                tar.addfile(info)
    with pytest.raises(DataError, match=rf"{link} of .* is a link.*: pack it with what its links mean"):
        load(path, progress=False)


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_images_without_a_suffix_are_not_passed_over(kind: str, tmp_path: Path) -> None:
    files = {**members(), "train/dog/README": b"not an image", "train/dog/0001": png(1)}
    path = tmp_path / f"images.{kind}"
    if kind == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in files.items():
                archive.writestr(name, content)
    else:
        for name, content in files.items():
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_bytes(content)
    with pytest.raises(DataError, match=r"has 1 images that would not be read, such as .*train/dog/0001: let them be"):
        load(path, progress=False)


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_a_tar_that_is_cut_at_the_end_of_a_file_is_refused(mode: str, tmp_path: Path) -> None:
    whole, path = tmp_path / "whole.tar", tmp_path / "images.tar"
    write_tar(whole, members(), mode="w")
    with tarfile.open(whole) as tar:
        third = tar.getmembers()[-1].offset
    for content in (whole.read_bytes()[:third], whole.read_bytes()[: third + 100]):
        path.write_bytes(content if mode == "w" else gzip.compress(content))
        with pytest.raises(
            DataError, match=r"images.tar is truncated, corrupt or no archive \(it ends without the end"
        ):
            data.load(path, progress=False)


def test_odd_archives_are_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, name = tmp_path / "images.tar", next(iter(members()))
    with tarfile.open(path, "w") as tar:
        link = tarfile.TarInfo(name)
        link.type, link.linkname = tarfile.SYMTYPE, "nowhere.png"
        tar.addfile(link)
    with pytest.raises(DataError, match=r"is a link to nowhere.png, which the archive lacks"):
        data.load(path, progress=False)
    folder = tmp_path / "folder" / name
    folder.parent.mkdir(parents=True)
    folder.symlink_to(tmp_path / "nowhere.png")
    with pytest.raises(DataError, match=r"is a link to a file that is missing"):
        data.load(tmp_path / "folder", progress=False)
    bomb = tmp_path / "bomb.zip"
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, bytes(5000))
    monkeypatch.setattr(data, "LARGEST_FILE", 4999)
    with pytest.raises(DataError, match=r"would be 5,000 bytes, and more than 4,999 are not read"):
        data.load(bomb, progress=False)
    content = bytearray(bomb.read_bytes())
    for signature, offset in ((b"PK\x01\x02", 8), (b"PK\x03\x04", 6)):
        content[content.index(signature) + offset] |= 1
    bomb.write_bytes(content)
    with pytest.raises(DataError, match=r"is encrypted: save the archive without a password"):
        data.load(bomb, progress=False)
