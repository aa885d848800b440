"""Grafting a checkpoint: the plan carried out, stage 1 on samples of the original, the result as a pipeline folder."""

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dit_suite.checkpoints import SAMPLING_FILE, SHARD_SIZE, Checkpoint
from dit_suite.files import write_json
from dit_suite.grafting.distill import DistillConfig, Distiller
from dit_suite.grafting.locality import AttentionLocality
from dit_suite.grafting.models import graft
from dit_suite.grafting.plan import GraftPlan, count_parameters
from dit_suite.grafting.surgery import block_list
from dit_suite.sampling import SamplingJob, batches, open_job, sample_batch

STATE_FILE, REPORT_FILE = "stage1.pt", "stage1.json"


def distil(
    pipe: Any,
    distiller: Distiller,
    job: SamplingJob,
    epochs: int,
    state: Path,
    deadline: float | None = None,
    report: Callable[[str], None] = print,
) -> int:
    """Samples every batch of every epoch that is not done yet; returns the number done in all.

    Args:
        pipe: the original's pipeline.
        job: its conditions; epoch e samples them with other noise than epoch e - 1.
        state: file that is written after every batch and taken up if it is there.
        deadline: `time.monotonic` after which no further batch is begun.

    Raises:
        ValueError: the file belongs to another plan, other settings, conditions, sampling options or epochs.
    """
    count = len(job.conditions)
    todo = [range(e * count + part.start, e * count + part.stop) for e in range(epochs)
            for part in batches(count, job.batch_size)]  # fmt: skip
    sampling = {key: value for key, value in job.to_dict().items() if key not in ("model", "conditions")}
    about = {"conditions": list(job.conditions), "epochs": epochs, "sampling": sampling}
    done = distiller.load(state, about) if state.is_file() else 0
    with distiller:
        for number, indices in enumerate(todo[done:], start=done + 1):
            if deadline is not None and time.monotonic() > deadline:
                break
            distiller.anneal((number - 1) / len(todo))
            sample_batch(pipe, job, indices)
            distiller.save(state, number, about)
            done = number
            mean = sum(row["relative_error"] for row in distiller.report()) / max(1, len(distiller.students))
            report(f"batch {number} of {len(todo)}: mean relative error {mean:.3f}")
    return done


def locality_of(pipe: Any, job: SamplingJob, band: int, grid: bool) -> list[float]:
    """How local every layer's attention is while the first batch of a job is sampled."""
    with AttentionLocality(pipe.transformer, band, grid) as locality:
        sample_batch(pipe, job, batches(len(job.conditions), job.batch_size)[0])
    return locality.values()


def graft_checkpoint(
    checkpoint: Checkpoint,
    plan_file: Path,
    job: SamplingJob,
    config: DistillConfig,
    output: Path,
    *,
    epochs: int = 1,
    device: Any = None,
    deadline: float | None = None,
    report: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Grafts, distils and saves into `output`; returns what `stage1.json` says.

    Args:
        checkpoint: the original.
        plan_file: YAML or JSON plan.
        job: samples of the original that stage 1 learns from; without conditions there is no stage 1.

    Raises:
        ValueError: the plan does not fit, stage 1 has nothing to learn from, or `output` holds another stage 1.
    """
    pipe = open_job(job, device=device, checkpoint=checkpoint)
    pipe.set_progress_bar_config(disable=True)
    teacher = pipe.transformer
    plan = GraftPlan.load(plan_file, len(block_list(teacher)), lambda band, grid: locality_of(pipe, job, band, grid))
    grafted = graft(teacher, plan, config.seed)
    sizes = {"before": count_parameters(teacher), "after": count_parameters(grafted)}
    report(f"{sizes['before']:,} parameters before, {sizes['after']:,} after")
    distiller = Distiller(teacher, grafted, plan, config)
    if distiller.students and set(job.conditions) == {""}:
        raise ValueError(
            "stage 1 learns from samples of the original; give --prompts, --prompts-file or --class-labels"
        )
    done = 0
    if distiller.students:
        done = distil(pipe, distiller, job, epochs, output / STATE_FILE, deadline, report)
    pipe.transformer = grafted
    if pipe.config.get("text_encoder_source"):
        pipe.register_modules(text_encoder=None, tokenizer=None)
    pipe.save_pretrained(output, max_shard_size=SHARD_SIZE)
    recommended = checkpoint.folder / SAMPLING_FILE
    if recommended.is_file():
        shutil.copyfile(recommended, output / SAMPLING_FILE)
    facts = {
        "plan": plan.to_dict(),
        "distillation": config.to_dict(),
        "batches": done,
        "parameters": sizes,
        "operators": distiller.report(),
    }
    write_json(facts, output / REPORT_FILE)
    return facts
