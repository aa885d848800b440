"""Where samples come from: a folder of pictures, an npz in the ADM layout, a folder of clips, or a pipeline.

Every source is checked when it is opened (missing, damaged, empty, of mixed sizes), before any feature is computed.
`read(indices)` returns uint8 arrays in index order.
"""

import io
import re
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.lib import format as npy_format
from PIL import Image

from dit_suite.data.pictures import on_white
from dit_suite.evaluation.datasets import parse_dataset, read_dataset, split_size
from dit_suite.video import read_video

if TYPE_CHECKING:
    from dit_suite.sampling import SamplingJob

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
CLIP_SUFFIXES = (".mp4", ".gif", ".webm", ".mov")
LOSSY_SUFFIXES = (".jpg", ".jpeg")


class Source(Protocol):
    """Samples by index, all of one shape `(H, W, 3)`, or `(T, H, W, 3)` for clips.

    A source that makes its samples in lots of several says of how many in `made_together`.
    """

    shape: tuple[int, ...]

    def __len__(self) -> int: ...

    def read(self, indices: Sequence[int]) -> np.ndarray:
        """uint8 `(len(indices), *shape)`."""

    def describe(self) -> dict[str, Any]:
        """What goes into the result: kind, and anything that decides the pixels."""


class FolderSource:
    """Pictures (or clips) of a folder and its subfolders, ordered by relative path.

    Where every name is a number, as `sample.py` writes them, the numbers must be 0 .. n-1 without a gap: a run that
    stopped early, or one with a stale file of a longer run, is refused. Transparent pictures are put on white.

    Args:
        folder: where to look.
        expected: refuse any other number of files.
        clips: read clips instead of pictures; all must have the same number of frames.

    Raises:
        ValueError: no files, a gap, another number than `expected`, a damaged file, or files of different sizes.
    """

    def __init__(self, folder: str | Path, expected: int | None = None, clips: bool = False):
        self.folder, self.clips = Path(folder), clips
        suffixes = CLIP_SUFFIXES if clips else PICTURE_SUFFIXES
        found = [p for p in self.folder.rglob("*") if p.suffix.lower() in suffixes and not p.name.startswith(".")]
        if (self.folder / "run.json").is_file():  # a run of sample.py: its contact sheet is no sample
            found = [path for path in found if path.stem.isdigit()]
        self.files = sorted(found, key=lambda path: path.relative_to(self.folder).as_posix())
        if not self.files:
            raise ValueError(f"{folder} holds no {'clips' if clips else 'pictures'} ({', '.join(suffixes)})")
        self._refuse_gaps(expected)
        shapes = {path: self._checked_shape(path) for path in self.files}
        self.shape = shapes[self.files[0]]
        for path, shape in shapes.items():
            if shape != self.shape:
                raise ValueError(
                    f"{path} is {_size(shape)} but {self.files[0].name} is {_size(self.shape)}: "
                    "all samples must have one size (prepare_data.py folder makes them so)"
                )

    def _refuse_gaps(self, expected: int | None) -> None:
        if all(re.fullmatch(r"\d+", path.stem) for path in self.files):
            self.files.sort(key=lambda path: int(path.stem))
            numbers = [int(path.stem) for path in self.files]
            if len(set(numbers)) < len(numbers):
                repeated = next(n for n, after in zip(numbers, numbers[1:], strict=False) if n == after)
                raise ValueError(f"{self.folder} holds sample {repeated} twice")
            missing = sorted(set(range(expected or numbers[-1] + 1)) - set(numbers))
            if missing:
                raise ValueError(
                    f"{self.folder} is incomplete: {len(missing)} samples are missing, the first is {missing[0]}; "
                    "run sample.py with the same options again to finish it"
                )
        if expected is not None and len(self.files) != expected:
            raise ValueError(f"{self.folder} holds {len(self.files)} files, expected {expected}")

    def _checked_shape(self, path: Path) -> tuple[int, ...]:
        try:
            if self.clips:
                return read_video(path).shape
            with Image.open(path) as image:
                width, height = image.size
                image.verify()
            return (height, width, 3)
        except (OSError, SyntaxError, ValueError, EOFError) as error:
            raise ValueError(f"{path} is damaged: {error}") from error

    def __len__(self) -> int:
        return len(self.files)

    def read(self, indices: Sequence[int]) -> np.ndarray:
        reader = read_video if self.clips else read_picture
        return np.stack([reader(self.files[index]) for index in indices])

    def describe(self) -> dict[str, Any]:
        lossy = sum(path.suffix.lower() in LOSSY_SUFFIXES for path in self.files)
        return {"kind": "clips" if self.clips else "folder", **({"lossy_files": lossy} if lossy else {})}


def _size(shape: tuple[int, ...]) -> str:
    return "x".join(str(side) for side in shape[:-1])


def read_picture(path: Path) -> np.ndarray:
    """uint8 `(H, W, 3)`; transparency is put on white."""
    try:
        with Image.open(path) as image:
            return np.asarray(on_white(image))
    except (OSError, SyntaxError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error


class NpzSource:
    """An npz whose `arr_0` is uint8 `(N, H, W, 3)` (the ADM layout) or `(N, T, H, W, 3)`.

    An uncompressed member is mapped, not read, so that every process does not hold 10 GB. A name like
    `samples_1000x64x64x3.npz` must agree with what is inside.

    Raises:
        ValueError: not an npz, another key, type or shape, or not the `expected` number of samples.
    """

    def __init__(self, path: str | Path, expected: int | None = None):
        self.path = Path(path)
        try:
            self.array = _member_array(self.path, "arr_0.npy")
        except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zipfile.LargeZipFile) as error:
            raise ValueError(f"{path} is no sample npz (uint8 arr_0, N x H x W x 3): {error}") from error
        array = self.array
        if array.dtype != np.uint8 or array.ndim not in (4, 5) or array.shape[-1] != 3:
            raise ValueError(f"{path} holds arr_0 of {array.dtype} {array.shape}, expected uint8 (N, H, W, 3)")
        if len(array) == 0:
            raise ValueError(f"{path} holds no samples")
        named = re.search(r"_(\d+(?:x\d+){3,4})$", self.path.stem)
        if named and tuple(int(side) for side in named[1].split("x")) != array.shape:
            raise ValueError(f"{self.path.name} holds {'x'.join(map(str, array.shape))}, which its name denies")
        if expected is not None and len(array) != expected:
            raise ValueError(f"{path} holds {len(array)} samples, expected {expected}")
        self.shape = array.shape[1:]

    def __len__(self) -> int:
        return len(self.array)

    def read(self, indices: Sequence[int]) -> np.ndarray:
        return np.ascontiguousarray(self.array[list(indices)])

    def describe(self) -> dict[str, Any]:
        return {"kind": "npz"}


def _member_array(path: Path, member: str) -> np.ndarray:
    """One array of an npz: mapped where it is stored uncompressed, else read."""
    with zipfile.ZipFile(path) as archive:
        if member not in archive.namelist():
            raise KeyError(f"it holds {', '.join(archive.namelist())} but no {member}")
        info = archive.getinfo(member)
        if info.compress_type != zipfile.ZIP_STORED:
            with archive.open(member) as file:
                return npy_format.read_array(file, allow_pickle=False)
        with archive.open(member) as file:
            version = npy_format.read_magic(file)
            reader = npy_format.read_array_header_1_0 if version == (1, 0) else npy_format.read_array_header_2_0
            shape, fortran_order, dtype = reader(file)
            header_bytes = file.tell()
    if fortran_order or dtype.hasobject:
        raise ValueError("arr_0 must be a plain C-ordered array")
    with path.open("rb") as file:
        file.seek(info.header_offset + 26)
        name_bytes, extra_bytes = np.frombuffer(file.read(4), "<u2")
    offset = info.header_offset + 30 + int(name_bytes) + int(extra_bytes) + header_bytes
    if header_bytes + int(np.prod(shape)) * dtype.itemsize != info.file_size:
        raise ValueError("arr_0 is cut short")
    return np.memmap(path, dtype=dtype, mode="r", offset=offset, shape=shape)


class ParquetSource:
    """Pictures of a data set that `prepare_data.py` wrote: a parquet with encoded pictures in the column `image`.

    Args:
        text: the file and the choice of rows, see `datasets.parse_dataset`; `size=N` resizes the way the trainer does.

    Raises:
        ValueError: not a parquet of pictures, an unknown split, a damaged picture, or pictures of different sizes.
    """

    def __init__(self, text: str):
        path, self.where = parse_dataset(text)
        chosen, size = split_size(self.where)
        pictures = []
        for number, row in enumerate(read_dataset(path, chosen, ["image"])):
            try:
                with Image.open(io.BytesIO(row["image"])) as image:
                    image = image.convert("RGB")
                    if size and image.size != (size, size):
                        image = image.resize((size, size), Image.Resampling.LANCZOS)
                    pictures.append(np.asarray(image))
            except (OSError, SyntaxError, TypeError) as error:
                raise ValueError(f"picture {number} of {path} is damaged: {error}") from error
        if len({picture.shape for picture in pictures}) > 1:
            raise ValueError(f"{path} holds pictures of different sizes")
        self.array = np.stack(pictures)
        self.shape = self.array.shape[1:]

    def __len__(self) -> int:
        return len(self.array)

    def read(self, indices: Sequence[int]) -> np.ndarray:
        return self.array[list(indices)]

    def describe(self) -> dict[str, Any]:
        return {"kind": "parquet", "where": {column: list(values) for column, values in self.where.items()}}


class GeneratedSource:
    """Samples made when they are read, with `dit_suite.sampling`: nothing is written.

    Pictures are made in the batches that `sample.py` uses for the same job, so the bytes are those of its files.
    """

    def __init__(self, pipe: Any, job: "SamplingJob", num_samples: int):
        if num_samples < 1:
            raise ValueError(f"the number of samples must be at least 1, got {num_samples}")
        self.pipe, self.job, self.num_samples = pipe, job, num_samples
        self.shape: tuple[int, ...] = ()
        self._last: tuple[int, np.ndarray] | None = None

    def __len__(self) -> int:
        return self.num_samples

    @property
    def made_together(self) -> int:
        return self.job.batch_size

    def read(self, indices: Sequence[int]) -> np.ndarray:
        size = self.job.batch_size
        return np.stack([self._batch(index // size)[index % size] for index in indices])

    def _batch(self, number: int) -> np.ndarray:
        from dit_suite.sampling import sample_batch

        if self._last is None or self._last[0] != number:
            start = number * self.job.batch_size
            indices = list(range(start, min(start + self.job.batch_size, self.num_samples)))
            self._last = (number, sample_batch(self.pipe, self.job, indices))
            self.shape = self._last[1].shape[1:]
        return self._last[1]

    def describe(self) -> dict[str, Any]:
        return {"kind": "generated", "job": self.job.to_dict()}


def is_statistics_file(path: str | Path) -> bool:
    """True for an npz that holds `mu` (such a file may hold reference pictures beside it)."""
    path = Path(path)
    if path.suffix != ".npz" or not path.is_file():
        return False
    try:
        with zipfile.ZipFile(path) as archive:
            return "mu.npy" in archive.namelist()
    except (OSError, zipfile.BadZipFile):
        return False


def open_source(text: str | Path, expected: int | None = None, clips: bool = False) -> Source:
    """Opens a folder, an npz, or a data set as `FILE.parquet[:SPLIT[+SPLIT]]`.

    Raises:
        FileNotFoundError: there is nothing of that name.
        ValueError: see the classes.
    """
    if ".parquet" in str(text):
        return ParquetSource(str(text))
    location = Path(text)
    if not location.exists():
        raise FileNotFoundError(f"there is no {location}")
    if location.is_dir():
        return FolderSource(location, expected, clips)
    if location.suffix == ".npz":
        return NpzSource(location, expected)
    raise ValueError(f"{location} is neither a folder, nor an npz, nor a parquet file")
