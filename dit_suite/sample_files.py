"""The folder of a sampling run: numbered files, what they were made with, resuming, and the npz of the whole.

Layout: `run.json` (the job), `000000.png` or `000000.mp4` (thousands in sub-folders above 1,000 samples), and
`samples_NxHxWx3.npz`. Every file is written whole or not at all, so a run that was killed leaves nothing half done.
"""

import json
import zipfile
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dit_suite.checkpoints import makes_clips
from dit_suite.files import check_folder, write_atomically, write_json
from dit_suite.metadata import write_png
from dit_suite.sampling import SamplingJob, batches, open_job, sample_batch, sample_record

FOLDER_SIZE = 1000


def distributed_state() -> Any:
    """accelerate's view of the processes: rank, count, device. One process when nothing was launched.

    Without an accelerator it must be told to use the CPU, else launched processes do not find each other.
    """
    import torch
    from accelerate import PartialState

    return PartialState(cpu=not torch.accelerator.is_available(), timeout=timedelta(days=7))


def _first_difference(name: str, then: Any, now: Any) -> str:
    """Where two unlike values first differ, in words."""
    if isinstance(then, dict) and isinstance(now, dict):
        key = min(key for key in now.keys() | then.keys() if now.get(key) != then.get(key))
        return _first_difference(f"{name}.{key}".removeprefix("."), then.get(key), now.get(key))
    if isinstance(then, list) and isinstance(now, list):
        if len(then) != len(now):
            return f"the number of {name} was {len(then)} and is {len(now)} now"
        index = next(index for index, (a, b) in enumerate(zip(then, now, strict=True)) if a != b)
        return _first_difference(f"{name}[{index}]", then[index], now[index])
    if isinstance(then or now, dict):
        return f"{name} was {'given' if then else 'not given'} and is {'given' if now else 'not given'} now"
    return f"{name} was {then!r} and is {now!r} now"


class SampleFolder:
    """Where one job's samples go."""

    def __init__(
        self,
        folder: Path,
        job: SamplingJob,
        *,
        with_metadata: bool = True,
        clip_format: str = "mp4",
        with_frames: bool = False,
    ) -> None:
        """Takes the folder for this job; nothing is written yet.

        Args:
            folder: where the samples go.
            job: what makes them.
            with_metadata: whether files say how they were made.
            clip_format: "mp4" or "gif", for checkpoints that make clips.
            with_frames: also write every clip's frames as PNGs into a folder of its number.

        Raises:
            ValueError: the folder can't be made or written to or holds samples that another job made, or frames are
                asked of pictures.
        """
        self.folder = folder
        self.job = job
        self.with_metadata = with_metadata
        self.with_frames = with_frames
        check_folder(folder)
        self.suffix = f".{clip_format}" if makes_clips(job.model) else ".png"
        if with_frames and self.suffix == ".png":
            raise ValueError(f"frames are written for clips; {job.model} makes pictures")
        self._refuse_other_job()

    def _refuse_other_job(self) -> None:
        path = self.folder / "run.json"
        # a run that failed before its first sample binds nobody
        if not path.is_file() or not any(found.stem.isdigit() for found in self.folder.rglob(f"*{self.suffix}")):
            return
        try:
            there = json.loads(path.read_text("utf-8"))
        except json.JSONDecodeError:
            raise ValueError(f"{path} is not readable; remove the folder or choose another one") from None
        here = json.loads(json.dumps(self.job.to_dict()))
        if here != there:
            raise ValueError(
                f"{self.folder} holds samples that were made otherwise: {_first_difference('', there, here)}; "
                "choose another folder or give the same options"
            )

    def path(self, index: int) -> Path:
        """The file of sample `index`."""
        place = self.folder if index < FOLDER_SIZE else self.folder / f"{index // FOLDER_SIZE * FOLDER_SIZE:06d}"
        return place / f"{index:06d}{self.suffix}"

    def _write(self, index: int, indices: list[int], sample: np.ndarray) -> None:
        path = self.path(index)
        path.parent.mkdir(parents=True, exist_ok=True)
        record = sample_record(self.job, index, indices) if self.with_metadata else None
        if self.suffix == ".png":
            write_png(Image.fromarray(sample), path, record)
            return
        from dit_suite.video import write_frames, write_video

        if self.with_frames:
            write_frames(sample, path.with_suffix(""), record)
        write_video(sample, path, fps=getattr(self.job.options, "fps", 8), record=record)

    def run(self, num_samples: int, *, npz: bool = False, sheet: bool = False, device: Any = None) -> None:
        """Makes what is missing of the samples 0 .. num_samples - 1, sharing the batches between the processes.

        Raises:
            ValueError: `num_samples` is not positive, the folder holds numbered files but no `run.json`, or an npz or
                a sheet is asked of clips.
        """
        if num_samples < 1:
            raise ValueError(f"num_samples must be at least 1, got {num_samples}")
        if npz:
            self._require_pictures("an npz of samples")
        if sheet:
            self._require_pictures("a sheet")
        state = distributed_state()
        mine = batches(num_samples, self.job.batch_size)[state.process_index :: state.num_processes]
        missing = [batch for batch in mine if not all(self.path(i).is_file() for i in batch)]
        if not (self.folder / "run.json").is_file() and self.path(0).is_file():
            raise ValueError(f"{self.folder} holds {self.path(0).name} but no run.json; choose an empty folder")
        if missing:
            self._make(missing, device or state.device, show_progress=state.is_main_process)
        state.wait_for_everyone()
        if npz and state.is_main_process:
            self.write_npz(num_samples)
        if sheet and state.is_main_process:
            self.write_sheet(num_samples)

    def _make(self, todo: list[range], device: Any, *, show_progress: bool) -> None:
        from tqdm import tqdm

        pipe = open_job(self.job, device=device)
        pipe.set_progress_bar_config(disable=True)
        with tqdm(total=sum(map(len, todo)), unit="sample", disable=not show_progress) as bar:
            for batch in todo:
                indices = list(batch)
                samples = sample_batch(pipe, self.job, indices)
                if batch is todo[0]:  # not before: what the pipeline refuses leaves nothing behind
                    self.folder.mkdir(parents=True, exist_ok=True)
                    write_json(self.job.to_dict(), self.folder / "run.json")
                for index, sample in zip(indices, samples, strict=True):
                    if not self.path(index).is_file():
                        self._write(index, indices, sample)
                bar.update(len(indices))

    def _require_pictures(self, what: str) -> None:
        if self.suffix != ".png":
            raise ValueError(f"{what} is written for pictures, not for clips")

    def make_again(self, index: int, indices: list[int], device: Any = None) -> Path:
        """Makes sample `index` once more, in the batch of `indices` that it was made in first."""
        pipe = open_job(self.job, device=device or distributed_state().device)
        samples = sample_batch(pipe, self.job, indices)
        self._write(index, indices, samples[indices.index(index)])
        return self.path(index)

    def _pixels(self, num_samples: int) -> Iterator[np.ndarray]:
        for index in range(num_samples):
            path = self.path(index)
            if not path.is_file():
                raise ValueError(f"sample {index} is missing ({path}); run the same command again to make it")
            with Image.open(path) as image:
                yield np.asarray(image.convert("RGB"))

    def write_npz(self, num_samples: int) -> Path:
        """Writes `samples_NxHxWx3.npz` (key `arr_0`, uint8, NHWC, index order) without holding it in memory.

        Raises:
            ValueError: a sample is missing, or the samples are clips.
        """
        self._require_pictures("an npz of samples")
        pixels = self._pixels(num_samples)
        first = next(pixels)
        shape = (num_samples, *first.shape)
        target = self.folder / f"samples_{'x'.join(map(str, shape))}.npz"

        def write(temporary: Path) -> None:
            with zipfile.ZipFile(temporary, "w") as archive:
                with archive.open(zipfile.ZipInfo("arr_0.npy"), "w", force_zip64=True) as member:
                    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
                    np.lib.format.write_array_header_1_0(member, header)
                    member.write(first.tobytes())
                    for image in pixels:
                        if image.shape != first.shape:
                            raise ValueError(f"the samples have different sizes, {first.shape} and {image.shape}")
                        member.write(image.tobytes())

        write_atomically(target, write)
        return target

    def write_sheet(self, num_samples: int, *, columns: int = 4, scale: int = 3) -> Path:
        """Writes `sheet.png`: the first samples (64 at most) side by side, enlarged without smoothing."""
        import torch
        from torchvision.utils import make_grid

        self._require_pictures("a sheet")
        pictures = [pixels for pixels, _ in zip(self._pixels(num_samples), range(64), strict=False)]
        tensor = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)
        grid = make_grid(tensor, nrow=columns, padding=2, pad_value=255).permute(1, 2, 0).numpy()
        image = Image.fromarray(grid)
        image = image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)
        write_png(image, self.folder / "sheet.png", None)
        return self.folder / "sheet.png"
