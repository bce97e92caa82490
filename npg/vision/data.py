"""Image classification data: CIFAR-10's official archive, or any folder or archive of image files.

Three layouts are read, and told apart by what is inside:

- CIFAR-10's Python archive, ``cifar-10-python.tar.gz``, or the folder ``cifar-10-batches-py`` that it holds;
- a folder of image files, ``train/<class>/*.png`` and ``test/<class>/*.png`` (or JPEG, …), all of one size;
- an archive of such a folder: ``.tar``, ``.tar.gz``, ``.tar.xz`` or ``.zip``. Nothing is unpacked to disk.

Images become RGB with 8 bits per channel: 16 bits are scaled by 255/65535, transparent pixels are laid over black, as
the border of a cropped image is, and a picture taken on its side stands upright, as its Exif data say. Pixels whose
scale is not known (floating point, 32 bits) are refused.

Decoded image files are cached as one uint8 array, so that the second run starts at once.
"""

from __future__ import annotations

import hashlib
import io
import lzma
import os
import pickle
import stat
import tarfile
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError
from tqdm import tqdm

from npg.runs.files import replacing

Members = Iterable[tuple[PurePosixPath, bytes]]
Labelled = tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]

__all__ = ["CIFAR10_URL", "DataError", "ImageData", "cache_folder", "load"]

CIFAR10_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"
CIFAR10_ARCHIVE = "cifar-10-python.tar.gz"
CIFAR10_FOLDER = "cifar-10-batches-py"
CIFAR10_MD5 = {
    CIFAR10_ARCHIVE: "c58f30108f718f92721af3b95e74349a",
    "data_batch_1": "c99cafc152244af753f735de768cd75f",
    "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
    "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
    "data_batch_4": "634d18415352ddfa80567beed471001a",
    "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
    "test_batch": "40351d587109b95175f43aff81a1287e",
}
CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
LARGEST_FILE = 2**28
"""Bytes of a file in an archive; a batch of CIFAR-10 has 31 million."""
_DECODING = 3
"""Counts the changes of what files are decoded to, so that images in the cache from before are not used."""
_IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".ppm", ".tif", ".tiff", ".webp"}
_REPACK = "pack it with what its links mean"
_LAYOUT = (
    f"expected CIFAR-10's Python archive under its own name, {CIFAR10_ARCHIVE}, or image files laid out "
    "train/<class>/<file> and test/<class>/<file> in a folder or in a .tar, .tar.gz, .tar.xz or .zip archive"
)


class DataError(ValueError):
    """The data are missing, corrupt, or not laid out as expected; the message says what to do."""


@dataclass(frozen=True)
class ImageData:
    """Labelled images, split as their source splits them.

    Attributes:
        train_images: uint8, (N, 3, H, W).
        train_labels: int64, (N,), indices into `classes`.
        test_images: uint8, (M, 3, H, W).
        test_labels: int64, (M,).
        classes: the names of the classes.
    """

    train_images: npt.NDArray[np.uint8]
    train_labels: npt.NDArray[np.int64]
    test_images: npt.NDArray[np.uint8]
    test_labels: npt.NDArray[np.int64]
    classes: tuple[str, ...]


def cache_folder() -> Path:
    """Where downloads and decoded images are kept: ``npg-toolkit`` in ``$XDG_CACHE_HOME`` or ``~/.cache``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "npg-toolkit"


def load(path: str | os.PathLike[str] | None = None, *, progress: bool = True) -> ImageData:
    """Read the data at `path`; without one, CIFAR-10's archive in the cache folder, downloaded if need be.

    Args:
        path: a folder or an archive, in one of the three layouts that the module's page lists.
        progress: show progress bars while downloading and decoding.

    Raises:
        DataError: nothing is there, a checksum is wrong, a file cannot be read, or the layout is another.
    """
    if path is None:
        archive = cache_folder() / CIFAR10_ARCHIVE
        if not archive.exists():
            _download(archive, progress)
        return _load_cifar10(archive)
    source = Path(path).expanduser()
    if not source.exists():
        raise DataError(
            f"no data at {source}: {_LAYOUT}. CIFAR-10's archive is at {CIFAR10_URL}; "
            f"without a path given, it is downloaded to {cache_folder() / CIFAR10_ARCHIVE}"
        )
    for official in (source, source / CIFAR10_ARCHIVE, source / CIFAR10_FOLDER):
        if (official.name == CIFAR10_ARCHIVE and official.is_file()) or (official / "data_batch_1").is_file():
            return _load_cifar10(official)
    return _load_images(source, progress)


# --- CIFAR-10's own archive


def _download(archive: Path, progress: bool) -> None:
    """Fetch the official archive; it takes its name only once it is whole and its checksum is right."""
    try:
        archive.parent.mkdir(parents=True, exist_ok=True)
        with replacing(archive) as partial, urllib.request.urlopen(CIFAR10_URL, timeout=30) as response:
            size = int(response.headers.get("Content-Length") or 0) or None
            bar = tqdm(total=size, unit="B", unit_scale=True, desc=archive.name, disable=not progress)
            with partial.open("wb") as file, bar:
                while chunk := response.read(1 << 20):
                    file.write(chunk)
                    bar.update(len(chunk))
            _check_md5(partial.read_bytes(), archive.name, CIFAR10_URL)
    except OSError as error:  # URLError, a timeout, a full disk
        raise DataError(
            f"cannot download {CIFAR10_URL}: {error}. Fetch it by other means and put it at {archive}, "
            "or say with --data where it is"
        ) from error


def _load_cifar10(source: Path) -> ImageData:
    """Read the official archive, or the folder in it; nothing is unpickled before its checksum is right."""
    if source.is_file():
        _check_md5(source.read_bytes(), CIFAR10_ARCHIVE, source)
    batches = {
        path.name: _read_batch(content, path.name, source)
        for path, content in _members(source, lambda path: path.name in CIFAR10_MD5)
    }
    if missing := sorted(CIFAR10_MD5.keys() - batches.keys() - {CIFAR10_ARCHIVE}):
        raise DataError(f"{source} lacks {', '.join(missing)}. Get the whole archive from {CIFAR10_URL}")
    train = [batches[name] for name in sorted(batches) if name != "test_batch"]
    return ImageData(
        np.concatenate([images for images, _ in train]),
        np.concatenate([labels for _, labels in train]),
        *batches["test_batch"],
        CIFAR10_CLASSES,
    )


def _check_md5(content: bytes, name: str, source: object) -> None:
    found = hashlib.md5(content).hexdigest()
    if found != CIFAR10_MD5[name]:
        raise DataError(
            f"{name} of {source} is corrupt: its md5 is {found}, and should be {CIFAR10_MD5[name]}. "
            f"Delete it and get it again from {CIFAR10_URL}"
        )


class _ArrayUnpickler(pickle.Unpickler):
    """Unpickles dictionaries, lists, strings and NumPy arrays, and refuses to look anything else up."""

    _ALLOWED = frozenset(
        {
            ("numpy", "ndarray"),
            ("numpy", "dtype"),
            ("numpy.core.multiarray", "_reconstruct"),
            ("numpy._core.multiarray", "_reconstruct"),
        }
    )

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._ALLOWED:
            raise pickle.UnpicklingError(f"it refers to {module}.{name}, which is not part of an array")
        return super().find_class(module.replace("numpy.core", "numpy._core"), name)


def _read_batch(content: bytes, name: str, source: Path) -> Labelled:
    _check_md5(content, name, source)
    try:
        batch = _ArrayUnpickler(io.BytesIO(content), encoding="bytes").load()
        images = np.asarray(batch[b"data"])
        if images.dtype != np.uint8:
            raise ValueError(f"its pixels are {images.dtype} and not uint8")
        images = images.reshape(-1, 3, 32, 32)
        labels = np.asarray(batch[b"labels"], dtype=np.int64)
    except (pickle.UnpicklingError, KeyError, TypeError, ValueError, EOFError) as error:
        raise DataError(f"{name} of {source} is not a batch of CIFAR-10: {error}") from error
    if labels.shape != (len(images),) or labels.min() < 0 or labels.max() > 9:
        raise DataError(f"{name} of {source} is not a batch of CIFAR-10: one label in 0…9 per image is expected")
    return images, labels


# --- image files, in a folder or an archive


def _members(source: Path, wanted: Callable[[PurePosixPath], bool]) -> Iterator[tuple[PurePosixPath, bytes]]:
    """Path and content of each wanted file in a folder, or in a tar or zip archive; nothing is unpacked.

    Links to folders are followed in a folder, and refused in an archive, where a whole class would be missing else.
    A tar archive has to end as one does: cut at the end of a file, it would hold fewer of them in silence.
    """
    if source.is_dir():
        for file in _below(source):
            path = PurePosixPath(file.relative_to(source.parent).as_posix())
            if wanted(path) and file.is_symlink() and not file.exists():
                raise DataError(f"{file} is a link to a file that is missing: restore that, or remove the link")
            if wanted(path) and file.is_file():
                yield path, file.read_bytes()
        return
    try:
        if zipfile.is_zipfile(source):
            with zipfile.ZipFile(source) as archive:
                for info in archive.infolist():
                    if stat.S_ISLNK(info.external_attr >> 16) and _is_inside(path := PurePosixPath(info.filename)):
                        raise DataError(f"{path} of {source} is a link: {_REPACK}")
                    if not info.is_dir() and wanted(path := PurePosixPath(info.filename)):
                        if info.flag_bits & 1:
                            raise DataError(f"{path} of {source} is encrypted: save the archive without a password")
                        _check_size(source, path, info.file_size)
                        yield path, archive.read(info)
        else:
            with tarfile.open(source) as tar:
                for member in tar:
                    path = PurePosixPath(member.name)
                    if (read := wanted(path)) or (member.issym() and _is_inside(path)):
                        _check_size(source, path, member.size)
                        content = _content(tar, member, source)
                        if read and content:
                            yield path, content.read()
                tar.fileobj.seek(tar.offset)
                if tar.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                    raise tarfile.ReadError("it ends without the end mark of a tar archive")
    except NotImplementedError as error:
        raise DataError(f"{source} is packed in a way that Python cannot read ({error}): pack it anew") from error
    except (tarfile.TarError, zipfile.BadZipFile, lzma.LZMAError, zlib.error, EOFError, OSError) as error:
        raise DataError(
            f"{source} is truncated, corrupt or no archive ({error or type(error).__name__}): {_LAYOUT}. "
            f"CIFAR-10's archive is at {CIFAR10_URL}"
        ) from error


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo, source: Path) -> Any:
    try:
        content = tar.extractfile(member)
    except KeyError as error:
        raise DataError(
            f"{member.name} of {source} is a link to {member.linkname}, which the archive lacks: {_REPACK}"
        ) from error
    if content is None and member.issym():
        raise DataError(f"{member.name} of {source} is a link to the folder {member.linkname}: {_REPACK}")
    return content


def _below(folder: Path, above: frozenset[str] = frozenset()) -> Iterator[Path]:
    """All that is below a folder, behind links to folders too, but not behind one to a folder that the link is in."""
    above |= {os.path.realpath(folder)}
    try:
        entries = list(os.scandir(folder))
    except OSError as error:
        raise DataError(f"the folder {folder} cannot be read: {error.strerror}") from error
    for entry in entries:
        yield (path := folder / entry.name)
        if entry.is_dir() and not (entry.is_symlink() and os.path.realpath(path) in above):
            yield from _below(path, above)


def _check_size(source: Path, path: PurePosixPath, size: int) -> None:
    """Refuse a member of an archive that would unpack to more memory than any image file or batch here needs."""
    if size > LARGEST_FILE:
        raise DataError(f"{path} of {source} would be {size:,} bytes, and more than {LARGEST_FILE:,} are not read")


def _is_image(path: PurePosixPath) -> bool:
    """Whether a path ends in train|test/<class>/<image file>; macOS's attribute files start with a dot."""
    return (
        len(path.parts) >= 3
        and path.parts[-3] in ("train", "test")
        and path.suffix.lower() in _IMAGE_SUFFIXES
        and not path.name.startswith(".")
    )


def _is_inside(path: PurePosixPath) -> bool:
    """Whether a path is train or test, or below one of them."""
    return not {"train", "test"}.isdisjoint(path.parts)


def _looks_like_one(path: PurePosixPath) -> bool:
    """Whether a file below train or test has the name of an image of any kind, though not of one that is read."""
    suffix = path.suffix.lower()
    return _is_inside(path.parent) and suffix in Image.registered_extensions() and not path.name.startswith(".")


def _has_no_suffix(path: PurePosixPath) -> bool:
    """Whether its content has to tell whether a file of a class is an image."""
    return _is_image(path.with_name(f"{path.name}.png")) and not path.suffix


def _is_an_image_inside(content: bytes) -> bool:
    try:
        with Image.open(io.BytesIO(content)):
            return True
    except (UnidentifiedImageError, OSError, ValueError, Image.DecompressionBombError):
        return False


def _load_images(source: Path, progress: bool) -> ImageData:
    """Decode the image files once; the same source, unchanged, comes from the cache the next time."""
    files = sorted(_below(source)) if source.is_dir() else [source]
    digest = hashlib.sha256(f"{_DECODING} {source.resolve()}".encode())
    for file in files:
        try:
            status = file.stat()
        except FileNotFoundError as error:
            raise DataError(f"{file} is a link to a file that is missing: restore that, or remove it") from error
        digest.update(f"{file.relative_to(source)} {status.st_size} {status.st_mtime_ns}\n".encode())
    cache = cache_folder() / f"{source.name.split('.')[0]}-{digest.hexdigest()[:16]}.npz"
    if cache.exists():
        try:
            with np.load(cache, allow_pickle=False) as arrays:
                columns = {name: arrays[name] for name in arrays.files}
            classes = tuple(str(name) for name in columns.pop("classes"))
            return ImageData(**columns, classes=classes)
        except (zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError, KeyError, TypeError):
            pass  # a damaged cache is only a cache: decode again and replace it
    unread: list[PurePosixPath] = []

    def wanted(path: PurePosixPath) -> bool:
        read = _is_image(path)
        if not read and _looks_like_one(path):
            unread.append(path)
        return read or _has_no_suffix(path)

    def read(members: Members) -> Members:
        for path, content in members:
            if _is_image(path):
                yield path, content
            elif _is_an_image_inside(content):
                unread.append(path)

    data = _decode(read(_members(source, wanted)), source, progress)
    if unread:
        raise DataError(
            f"{source} has {len(unread)} images that would not be read, such as {unread[0]}: let them be "
            f"train/<class>/<file> or test/<class>/<file>, of {', '.join(sorted(_IMAGE_SUFFIXES))}, or remove them"
        )
    columns = {name: value for name, value in vars(data).items() if name != "classes"}
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        with replacing(cache) as partial, partial.open("wb") as stream:
            np.savez(stream, **columns, classes=np.array(data.classes))
    except OSError as error:
        tqdm.write(f"the decoded images cannot be kept in {cache} and are decoded anew next time: {error}")
    return data


def _decode(members: Members, source: Path, progress: bool) -> ImageData:
    """Decode images into arrays, in the order of their paths whatever the order of the archive."""
    images: dict[tuple[str, str, str], npt.NDArray[np.uint8]] = {}
    shape: tuple[int, ...] | None = None
    bar = tqdm(members, desc=f"decoding {source.name}", unit=" images", disable=not progress, mininterval=1.0)
    for path, content in bar:
        try:
            with Image.open(io.BytesIO(content)) as image:
                pixels = _rgb(image)
        except (UnidentifiedImageError, OSError, ValueError, Image.DecompressionBombError) as error:
            raise DataError(f"{path} of {source} cannot be read as an image: {error}") from error
        shape = shape or pixels.shape
        if pixels.shape != shape:
            raise DataError(
                f"{path} of {source} has {pixels.shape[1]}×{pixels.shape[0]} pixels, and the first image "
                f"{shape[1]}×{shape[0]}; all must have one size"
            )
        split, label, name = path.parts[-3:]
        if (split, label, name) in images:
            raise DataError(f"{source} holds {split}/{label}/{name} twice, in different folders; keep one")
        images[split, label, name] = pixels
    classes = {split: sorted({c for s, c, _ in images if s == split}) for split in ("train", "test")}
    for split, names in classes.items():
        if not names:
            raise DataError(f"{source} has no images under {split}/<class>/: {_LAYOUT}")
    if odd := set(classes["train"]) ^ set(classes["test"]):
        raise DataError(f"{source} has {', '.join(sorted(odd))} in only one of train/ and test/")

    def stack(split: str) -> Labelled:
        keys = sorted(key for key in images if key[0] == split)
        labels = np.array([classes["train"].index(label) for _, label, _ in keys], dtype=np.int64)
        return np.stack([images[key] for key in keys]).transpose(0, 3, 1, 2).copy(), labels

    return ImageData(*stack("train"), *stack("test"), tuple(classes["train"]))


def _rgb(image: Image.Image) -> npt.NDArray[np.uint8]:
    """RGB pixels (H, W, 3) of an image of any mode.

    Raises:
        ValueError: the scale of the pixels is not known, or Pillow has no way from this mode to RGB.
    """
    image = ImageOps.exif_transpose(image)
    mode = image.mode
    if mode == "I" or mode.startswith("I;16"):  # Pillow itself clips these at 255
        values = np.asarray(image).astype(np.int64)
        if "transparency" in image.info:
            values[values == image.info["transparency"]] = 0
        if values.min() < 0 or values.max() > 65535:
            raise ValueError(
                f"its pixels go from {values.min()} to {values.max()}, and the scale of more than 16 bits is not "
                "known. Save it with 8 or 16 bits per channel"
            )
        return np.repeat(((values + 128) // 257).astype(np.uint8)[..., None], 3, axis=2)
    if mode == "F":
        raise ValueError(
            "its pixels are floating-point numbers (mode F), whose scale is not known. Save it with 8 or 16 bits per "
            "channel"
        )
    if mode in ("LA", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        rgba = np.asarray(image.convert("RGBA")).astype(np.uint16)
        return ((rgba[..., :3] * rgba[..., 3:] + 127) // 255).astype(np.uint8)
    return np.asarray(image.convert("RGB"))
