"""The metrics of a run: one JSON object a line in `metrics.jsonl`, TensorBoard, and Weights & Biases where asked for.

Every record has a `kind`, `train` (one for each step) or `evaluation`, and
- `step`, `tokens`, `flops`: optimizer steps, tokens and model FLOPs (forward and backward) of the run so far,
- `loss` (nats per token), `perplexity`, `bits_per_byte`. Records of kind `train` have the loss alone
  where it is not that of text alone: with a teacher, and with the loss of an earlier exit.

Records of kind `train` also have
- `gradient_norm` (before clipping) and `learning_rate` of the step,
- `tokens_per_second`, `model_flops_per_second`, and `mfu`, the share of the measured GEMM rate of all processes,
- `seconds`: training time so far, without evaluations and checkpoints,
- `loops`: the loop count of the step; if it drew several, their mean.

Records of kind `evaluation` also have `loss_at_T`, the loss at each loop count T that `evaluate_loops` names, if it is finite.
"""

import filecmp
import hashlib
import importlib
import json
import math
import os
import re
import shutil
import uuid
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, FiniteFloat, PositiveInt, model_validator
from torch.utils.tensorboard import SummaryWriter

from yoco_u.errors import UserError
from yoco_u.files import parse_json, replacing, write_text
from yoco_u.folders import beside, discard, numbered
from yoco_u.regular_files import read_regular

METRICS, DAMAGED = "metrics.jsonl", "metrics.damaged.jsonl"
SUMMARY, _LOST = "summary.json", "steps_without_metrics"
Record = dict[str, Any]


def perplexity(loss: float) -> float:
    """exp(loss), and not infinity where that is too large for a float."""
    return math.exp(min(loss, 700.0))


def loss_figures(loss: float, bytes_per_token: float) -> Record:
    """A loss in nats per token, with the perplexity and the bits per byte that follow from it."""
    return {
        "loss": loss,
        "perplexity": perplexity(loss),
        "bits_per_byte": loss / math.log(2) / bytes_per_token,
    }


def loops_key(loops: int) -> str:
    """The key of the validation loss at a loop count."""
    return f"loss_at_{loops}"


_READ = {"train": ("gradient_norm", "learning_rate", "tokens_per_second", "mfu", "seconds"),
         "evaluation": ("perplexity", "bits_per_byte")}  # fmt: skip
"""Figures of a record that are read again, by its kind."""


class _Record(BaseModel, extra="allow"):
    """What every record has. Its other figures are numbers too."""

    kind: Literal["train", "evaluation"]
    step: PositiveInt
    tokens: PositiveInt
    flops: Annotated[int | FiniteFloat, Field(gt=0)]
    loss: FiniteFloat
    __pydantic_extra__: dict[str, int | FiniteFloat]

    @model_validator(mode="after")
    def _is_whole(self) -> "_Record":
        for name in _READ[self.kind]:
            if name not in self.__pydantic_extra__:
                raise ValueError(f"{name} is missing")
        return self


def read_metrics(folder: Path) -> list[Record]:
    """The records of a run folder in their order; none if there is no file yet. A half-written last line is left out.

    Raises:
        UserError: if another line is damaged, or the file is a pipe or a device; it names the file, and the line.
    """
    records, damage = _read(folder / METRICS)
    if damage:
        raise UserError(damage[0])
    return records


def _read(path: Path) -> tuple[list[Record], list[str]]:
    """The records that are whole, and an error for each line that is not."""
    try:
        lines = read_regular(path).split(b"\n")[:-1]
    except FileNotFoundError:
        return [], []
    records, damage = [], []
    for number, line in enumerate(lines, start=1):
        try:
            records.append(parse_json(line, _Record, f"{path}, line {number}").model_dump())
        except UserError as error:
            damage.append(f"{error}, or remove this line to go on without it")
    return records, damage


def missing_steps(records: Sequence[Record], step: int) -> str | None:
    """Which of the steps 1 to `step` have no record, in words; None if all have one."""
    found = sorted({record["step"] for record in records if record["kind"] == "train" and record["step"] <= step})
    gaps = [(a + 1, b - 1) for a, b in pairwise([0, *found, step + 1]) if b - a > 1]
    return ", ".join(str(a) if a == b else f"{a} to {b}" for a, b in gaps) or None


def lost_steps(records: Sequence[Record], steps: int) -> dict[str, str]:
    """What the summary of a run that is finished after `steps` says of those that have no record; nothing if all have one."""
    missing = missing_steps(records, steps)
    return {} if missing is None else {_LOST: missing}


def check_finished(folder: Path, records: Sequence[Record], summary: Record) -> None:
    """Check that the metrics of a finished run are whole, so that a half-written end is not taken for a run that goes on.

    Args:
        summary: the run's, which names the steps that were lost before it was finished.

    Raises:
        UserError: if other steps have no record, or the last one has no evaluation.
    """
    steps: int = summary["steps"]
    missing, none_left = missing_steps(records, steps), not any(record["kind"] == "train" for record in records)
    known = None if none_left else summary.get(_LOST)
    lost = [] if missing in (None, known) else [f"steps {missing}"]
    if not any(record["kind"] == "evaluation" and record["step"] == steps for record in records):
        lost.append(f"the evaluation of step {steps}")
    if lost:
        anew = f"remove {folder / SUMMARY} and run `yoco-u train` again, which finishes the run without the steps that are lost"
        raise UserError(
            f"{folder / METRICS}: lacks {' and '.join(lost)}, though the run is finished; copy the file back, or "
            f"{'train it again in another folder' if none_left else anew}"
        )


class MetricsWriter:
    """Writes records to all places. Only rank 0 has one.

    Args:
        step: the step after which the run continues; records of later steps are cut from the file. If the file is damaged,
            its whole records stay, and a copy of the file as it was is `metrics.damaged.jsonl`, or `-2` and so on behind that.

    Attributes:
        missing: the steps up to `step` that have no record, in words; None if all have one.

    Raises:
        UserError: if Weights & Biases is asked for and not installed.
    """

    def __init__(self, folder: Path, step: int, wandb_project: str | None = None, run_config: Record | None = None) -> None:
        self._wandb = _start_wandb(folder, wandb_project, run_config) if wandb_project else None
        path = folder / METRICS
        records, damage = _read(path)
        if damage:
            _keep_damaged(path)
        kept = [record for record in records if record["step"] <= step]
        self.missing = missing_steps(kept, step)
        write_text(path, "".join(map(_line, kept)))
        self._file = path.open("ab", buffering=0)  # so that a record which a full disk cuts is not written again at the end
        self._tensorboard = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def write(self, record: Record) -> None:
        """Append one record. Once this returns, the record survives the death of the process, though not a power cut."""
        line = _line(record).encode()
        while line:
            line = line[self._file.write(line) :]
        figures = {f"{record['kind']}/{key}": value for key, value in record.items() if key not in ("kind", "step")}
        for name, value in figures.items():
            self._tensorboard.add_scalar(name, value, record["step"])
        if self._wandb is not None:
            self._wandb.log(figures | {"step": record["step"]})

    def sync(self) -> None:
        """Bring all records to the disk, so that they survive a power cut as well."""
        os.fsync(self._file.fileno())
        self._tensorboard.flush()

    def close(self) -> None:
        self._file.close()
        self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()


def _keep_damaged(path: Path) -> None:
    """Copy the file as it is, unless that was done before a process died that was to mend it."""
    for place in numbered(path.with_name(DAMAGED)):
        if not os.path.lexists(place):
            with replacing(place) as copy:
                shutil.copyfile(path, copy)
            return
        if place.is_file() and filecmp.cmp(path, place, shallow=False):
            discard(beside(place))
            return


def _line(record: Record) -> str:
    return json.dumps(record, allow_nan=False) + "\n"


def check_wandb(project: str) -> None:
    """Check that `wandb` can be imported.

    Raises:
        UserError: if it is not installed.
    """
    try:
        importlib.import_module("wandb")
    except ImportError:
        raise UserError(
            f"training.wandb_project is {project!r} but wandb is not installed; pip install 'yoco-u[wandb]' or drop the setting"
        ) from None


def _start_wandb(folder: Path, project: str, run_config: Record | None) -> Any:
    check_wandb(project)
    import wandb

    settings = {"id": _wandb_id(folder), "resume": "allow", "dir": str(folder), "config": run_config}
    run = wandb.init(project=project, name=folder.name, **settings)
    # Figures are drawn over a step of ours. W&B's own only rises, and figures of a lower one are dropped: those of steps that
    # a run trains again from its last checkpoint, after it was killed.
    run.define_metric("step", hidden=True)
    run.define_metric("*", step_metric="step")
    return run


def _wandb_id(folder: Path) -> str:
    """The id under which a run logs, in its file `wandb-id` with the folder that it belongs to.

    A copy of the folder gets one of its own: it has neither the path nor the inode. A run that has moved has the latter,
    unless it is on another file system now, where it cannot be told from a copy.
    """
    file, status = folder / "wandb-id", folder.stat()
    here = hashlib.sha256(os.fsencode(os.path.realpath(folder))).hexdigest(), str(status.st_ino)
    found = _WANDB_ID.fullmatch(file.read_bytes().decode(errors="replace")) if file.is_file() else None
    known = found is not None and (found[2] is None or here[0] == found[2] or here[1] == found[3])
    run_id = found[1] if found is not None and known else uuid.uuid4().hex
    write_text(file, " ".join((run_id, *here)))
    return run_id


_WANDB_ID = re.compile("([0-9a-f]{32})(?: ([0-9a-f]{64}) ([0-9]+))?")  # earlier versions wrote the id alone
