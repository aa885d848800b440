"""Sampling a clip frame by frame: which passes are run, what the cache holds, which noise each frame gets.

Every random number of frame k is a function of (base seed, k): initial noise, re-noising draws and context noise. A
frame that is drafted, discarded and drafted again therefore meets the same noise, and results do not depend on what was
drafted before.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dit_suite.models.nfd import NFDTransformer3DModel
from dit_suite.options import Options, option
from dit_suite.schedulers.fixed_pass import FixedPass
from dit_suite.schedulers.trigflow import FrameFlowScheduler, TrigFlowScheduler
from dit_suite.step_plan import Run, StepContext, publish_step

CONTEXT_MODES = ("rolling", "recompute", "none")
FIXED_PASSES = {"eager": "none", "compiled": "inductor"}


@dataclass(frozen=True)
class FrameSamplerOptions(Options):
    """How frames are sampled."""

    num_inference_steps: int = option(2, "denoising passes per frame", minimum=1, maximum=1000)
    context_noise: float = option(0.05, "noise level of finished frames in the context", minimum=0.0, maximum=0.5)
    context_mode: str = option(
        "rolling",
        "cache finished frames (rolling), encode the window anew for every frame (recompute) or pass (none)",
        choices=CONTEXT_MODES,
    )
    fuse_write: bool = option(True, "store a finished frame during the next frame's first pass")
    fixed_passes: str = option(
        "off",
        "passes of one shape over the whole cache: off, eager, or compiled (a CUDA graph on a GPU)",
        choices=("off", *FIXED_PASSES),
    )

    def validate(self) -> None:
        if self.fixed_passes != "off" and self.context_mode != "rolling":
            raise ValueError(f"fixed_passes need context_mode rolling, got {self.context_mode!r}")


@dataclass
class PassCounts:
    """What has been run, in passes and in frames per pass."""

    denoise_passes: int = 0
    denoise_frames: int = 0
    write_passes: int = 0
    written_frames: int = 0


class FrameNoise:
    """Standard normal noise by absolute frame index, for one or several clips.

    Args:
        base_seeds: one per clip.
        frame_shape: (channels, height, width).
    """

    def __init__(self, base_seeds: Sequence[int], frame_shape: tuple[int, int, int]):
        self.base_seeds, self.frame_shape = tuple(base_seeds), frame_shape

    def _draw(self, purpose: str, frame: int) -> torch.Tensor:
        rows = []
        for base in self.base_seeds:
            digest = hashlib.blake2b(f"{base}/{frame}/{purpose}".encode(), digest_size=8).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
            rows.append(torch.randn(self.frame_shape, generator=generator))
        return torch.stack(rows)

    def _frames(self, purpose: str, first: int, count: int) -> torch.Tensor:
        return torch.stack([self._draw(purpose, first + i) for i in range(count)], dim=2)

    def initial(self, first: int, count: int) -> torch.Tensor:
        """Starting noise of frames `first ...`, `(batch, channels, count, height, width)`."""
        return self._frames("initial", first, count)

    def renoise(self, first: int, count: int, step: int) -> torch.Tensor:
        """Noise added after step `step`."""
        return self._frames(f"step{step}", first, count)

    def context(self, first: int, count: int) -> torch.Tensor:
        """Noise that a finished frame carries as context."""
        return self._frames("context", first, count)


class FrameSampler:
    """Holds a growing clip and samples the frames that follow it.

    The last frame of the clip is not in the cache yet: it is written together with the next frame's first pass, or in
    a pass of its own when `fuse_write` is off. `draft` adds nothing to the clip; `append` does, `rollback` takes back.

    Args:
        transformer: the network.
        scheduler: consistency or flow sampler (its timesteps are set here).
        options: see `FrameSamplerOptions`.
        base_seeds: one seed per clip; their number is the batch size.
        draft_frames: most frames that will be drafted, or run ahead of what is committed, at once.
    """

    def __init__(
        self,
        transformer: NFDTransformer3DModel,
        scheduler: TrigFlowScheduler | FrameFlowScheduler,
        options: FrameSamplerOptions,
        base_seeds: Sequence[int],
        draft_frames: int = 1,
    ):
        config = transformer.config
        shape = (config.in_channels, config.sample_height, config.sample_width)
        self.transformer, self.scheduler, self.options = transformer, scheduler, options
        self.noise = FrameNoise(base_seeds, shape)
        fixed = options.fixed_passes != "off"
        self.cache = transformer.new_cache(len(base_seeds), draft_frames, scratch=2 * draft_frames * fixed)
        self.fixed = FixedPass(transformer, self.cache, FIXED_PASSES[options.fixed_passes]) if fixed else None
        self.draft_frames = draft_frames
        self.counts = PassCounts()
        self.num_frames = 0
        self._frames: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        scheduler.set_timesteps(options.num_inference_steps)
        self.timesteps = [float(t) for t in scheduler.timesteps]

    @property
    def batch_size(self) -> int:
        return len(self.noise.base_seeds)

    def append(self, frame: torch.Tensor, action: torch.Tensor) -> None:
        """Adds a finished frame `(batch, channels, height, width)` and the action `(batch, num_actions)` to it."""
        device, dtype = self.transformer.device, self.transformer.dtype
        self._frames[self.num_frames] = frame.to(device, dtype), action.to(device, dtype)
        self.num_frames += 1
        self._frames.pop(self.num_frames - 1 - self.transformer.config.window - self.draft_frames, None)

    def replace_last(self, frame: torch.Tensor) -> None:
        """Puts `frame` in the place of the last one (which is never in the cache yet)."""
        _, action = self._frames[self.num_frames - 1]
        self._frames[self.num_frames - 1] = frame.to(self.transformer.device, self.transformer.dtype), action

    def extend(self, frames: torch.Tensor, actions: torch.Tensor) -> None:
        """Adds given frames `(batch, channels, count, height, width)` with actions `(batch, count, num_actions)`.

        A clip that starts with more frames than fit the window starts with the last ones.
        """
        if not self.num_frames:
            skipped = max(0, frames.shape[2] - max(1, self.transformer.config.window - 1))
            self.num_frames = skipped
            self.cache.reset(skipped)
            frames, actions = frames[:, :, skipped:], actions[:, skipped:]
        for i in range(frames.shape[2]):
            self.append(frames[:, :, i], actions[:, i])

    def rollback(self, num_frames: int) -> None:
        """Takes back frames until `num_frames` are left; the last one becomes unwritten, as if never built upon.

        Raises:
            ValueError: the clip is shorter, or a frame needed for it has been forgotten.
        """
        if num_frames > self.num_frames or self.num_frames - num_frames > self.draft_frames:
            raise ValueError(f"a clip of {self.num_frames} frames cannot be rolled back to {num_frames}")
        for frame in range(num_frames, self.num_frames):
            del self._frames[frame]
        self.num_frames = num_frames
        self.cache.truncate(min(self.cache.length, max(num_frames - 1, 0)))

    def _context(self, first: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Frames `first ..` of the clip with context noise, and their actions."""
        count, level = self.num_frames - first, self.options.context_noise
        frames = torch.stack([self._frames[first + i][0] for i in range(count)], dim=2)
        actions = torch.stack([self._frames[first + i][1] for i in range(count)], dim=1)
        noise = self.noise.context(first, count).to(frames)
        return (1.0 - level) * frames + level * noise, actions

    def _forget_cache(self) -> None:
        first = max(0, self.num_frames - self.transformer.config.window + 1, min(self._frames, default=0))
        self.cache.reset(first)

    def _pass(
        self, sample: torch.Tensor, level: float | list[float], actions: torch.Tensor, step: StepContext
    ) -> torch.Tensor:
        """One network evaluation of the new frames, at one level or one each, with the unwritten frames in front where
        there are any."""
        first, count = self.cache.length, self.num_frames - self.cache.length
        batch, num_new = sample.shape[0], sample.shape[2]
        levels = torch.tensor(level, device=sample.device, dtype=torch.float32).expand(batch, num_new)
        hidden = sample
        if count:
            context, context_actions = self._context(first)
            hidden = torch.cat([context, sample], dim=2)
            actions = torch.cat([context_actions, actions], dim=1)
            levels = torch.cat([levels.new_full((batch, count), self.options.context_noise), levels], dim=1)
        with publish_step(step):
            if self.fixed is not None:
                out = self.fixed(hidden, levels, actions, count)
            else:
                out = self.transformer(
                    hidden, levels, actions, first_frame=first, kv_cache=self.cache, num_written=count,
                    return_dict=False,
                )[0]  # fmt: skip
        self.counts.written_frames += count
        self.counts.denoise_passes += 1
        self.counts.denoise_frames += num_new
        return out[:, :, count:]

    def _write(self, run: Run) -> None:
        """Stores the unwritten frames in a pass of their own."""
        first, count = self.cache.length, self.num_frames - self.cache.length
        if not count:
            return
        context, actions = self._context(first)
        level = self.options.context_noise
        levels = torch.full((self.batch_size, count), level, device=context.device)
        with publish_step(StepContext(0, len(self.timesteps), level, run=run, extras={"write": True})):
            self.transformer(context, levels, actions, first_frame=first, kv_cache=self.cache, num_written=count)
        self.counts.write_passes += 1
        self.counts.written_frames += count

    def _begin_draft(self, actions: torch.Tensor, run: Run) -> torch.Tensor:
        """Checks the actions, writes what has to be written first, and returns the noise of the new frames."""
        count = actions.shape[1]
        if not 1 <= count <= self.draft_frames:
            raise ValueError(f"between 1 and {self.draft_frames} frames can be drafted, got {count}")
        if self.options.context_mode != "rolling":
            self._forget_cache()
        # more unwritten frames than a draft leaves are start frames: a shape of their own, once
        many = self.fixed is not None and self.num_frames - self.cache.length > self.draft_frames
        if many or not self.options.fuse_write:
            self._write(run)
        noise = self.noise.initial(self.num_frames, count).to(self.transformer.device, self.transformer.dtype)
        return noise * self.scheduler.init_noise_sigma

    def _advance(self, velocity: torch.Tensor, sample: torch.Tensor, index: int, first: int) -> torch.Tensor:
        """The scheduler's step `index` of consecutive frames `first ...`."""
        noise = None
        if index + 1 < len(self.timesteps):
            noise = self.noise.renoise(first, sample.shape[2], index).to(sample)
        return self.scheduler.step(velocity, self.timesteps[index], sample, noise=noise).prev_sample

    @torch.no_grad()
    def draft(self, actions: torch.Tensor) -> torch.Tensor:
        """Samples the next frames together, all at the same noise level at any time.

        Args:
            actions: `(batch, count, num_actions)`, the actions that lead to the new frames.

        Returns:
            Frames `(batch, channels, count, height, width)`; the clip stays as it is.

        Raises:
            ValueError: more frames are asked for than `draft_frames`.
        """
        actions, first, run = actions.to(self.transformer.device, self.transformer.dtype), self.num_frames, Run()
        sample = self._begin_draft(actions, run)
        for index, timestep in enumerate(self.timesteps):
            if index and self.options.context_mode == "none":
                self._forget_cache()
            step = StepContext(index, len(self.timesteps), timestep, run=run, extras={"frame": first})
            hidden = self.scheduler.scale_model_input(sample, timestep)
            velocity = self._pass(hidden, self.scheduler.noise_level(timestep), actions, step)
            sample = self._advance(velocity, sample, index, first)
        return sample

    @torch.no_grad()
    def draft_staggered(self, actions: torch.Tensor) -> torch.Tensor:
        """Like `draft`, but every frame starts one pass after the frame before it, so that it is denoised beside a
        neighbour that is one step cleaner: passes + count - 1 in all. A finished frame of the draft is context.

        With one pass per frame this is plain sampling. Ours; the noise of every frame is that of plain sampling.
        """
        actions, first, run = actions.to(self.transformer.device, self.transformer.dtype), self.num_frames, Run()
        parts = list(self._begin_draft(actions, run).split(1, dim=2))
        context, steps = self.options.context_noise, len(self.timesteps)
        for turn in range(steps + len(parts) - 1):
            if turn and self.options.context_mode == "none":
                self._forget_cache()
            shown, levels = [], []
            for place, part in enumerate(parts[: turn + 1]):
                index = turn - place
                if index < steps:
                    shown.append(self.scheduler.scale_model_input(part, self.timesteps[index]))
                    levels.append(self.scheduler.noise_level(self.timesteps[index]))
                else:
                    shown.append((1.0 - context) * part + context * self.noise.context(first + place, 1).to(part))
                    levels.append(context)
            step = StepContext(turn, steps + len(parts) - 1, levels[-1], run=run, extras={"frame": first})
            velocity = self._pass(torch.cat(shown, dim=2), levels, actions[:, : len(shown)], step)
            for place in range(max(0, turn - steps + 1), len(shown)):
                own = velocity[:, :, place : place + 1]
                parts[place] = self._advance(own, parts[place], turn - place, first + place)
        return torch.cat(parts, dim=2)
