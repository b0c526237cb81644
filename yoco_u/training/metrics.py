"""The metrics of a run: one JSON object a line in `metrics.jsonl`, TensorBoard, and Weights & Biases where asked for.

Every record has a `kind`, `train` (one for each step) or `evaluation`, and
- `step`, `tokens`, `flops`: optimizer steps, tokens and model FLOPs (forward and backward) of the run so far,
- `loss` (nats per token), `perplexity`, `bits_per_byte`.

Records of kind `train` also have
- `gradient_norm` (before clipping) and `learning_rate` of the step,
- `tokens_per_second`, `model_flops_per_second`, and `mfu`, the share of the measured GEMM rate of all processes,
- `seconds`: training time so far, without evaluations and checkpoints.
"""

import json
import math
import os
import uuid
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from yoco_u.errors import UserError
from yoco_u.files import beside, publish

METRICS = "metrics.jsonl"
Record = dict[str, Any]


def loss_figures(loss: float, bytes_per_token: float) -> Record:
    """A loss in nats per token, with the perplexity and the bits per byte that follow from it."""
    return {
        "loss": loss,
        "perplexity": math.exp(min(loss, 700.0)),
        "bits_per_byte": loss / math.log(2) / bytes_per_token,
    }


def read_metrics(folder: Path) -> list[Record]:
    """The records of a run folder in their order; none if there is no file yet. A half-written last line is left out."""
    try:
        lines = (folder / METRICS).read_text(encoding="utf-8").splitlines(keepends=True)
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in lines if line.endswith("\n")]


class MetricsWriter:
    """Writes records to all places. Only rank 0 has one.

    Args:
        step: the step after which the run continues; records of later steps are cut from the file.

    Raises:
        UserError: if Weights & Biases is asked for and not installed.
    """

    def __init__(self, folder: Path, step: int, wandb_project: str | None = None, run_config: Record | None = None) -> None:
        self._wandb = _start_wandb(folder, wandb_project, run_config) if wandb_project else None
        path = folder / METRICS
        kept = [record for record in read_metrics(folder) if record["step"] <= step]
        beside(path).write_text("".join(map(_line, kept)), encoding="utf-8")
        publish(path)
        self._file = path.open("a", encoding="utf-8")
        self._tensorboard = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def write(self, record: Record) -> None:
        """Append one record. Once this returns, the record survives the death of the process, though not a power cut."""
        self._file.write(_line(record))
        self._file.flush()
        figures = {f"{record['kind']}/{key}": value for key, value in record.items() if key not in ("kind", "step")}
        for name, value in figures.items():
            self._tensorboard.add_scalar(name, value, record["step"])
        if self._wandb is not None:
            self._wandb.log(figures, step=record["step"])

    def sync(self) -> None:
        """Bring all records to the disk, so that they survive a power cut as well."""
        os.fsync(self._file.fileno())
        self._tensorboard.flush()

    def close(self) -> None:
        self._file.close()
        self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()


def _line(record: Record) -> str:
    return json.dumps(record, allow_nan=False) + "\n"


def _start_wandb(folder: Path, project: str, run_config: Record | None) -> Any:
    try:
        import wandb
    except ImportError:
        raise UserError(
            f"training.wandb_project is {project!r} but wandb is not installed; pip install 'yoco-u[wandb]' or drop the setting"
        ) from None
    identity = folder / "wandb-id"
    if not identity.exists():
        identity.write_text(uuid.uuid4().hex, encoding="utf-8")
    run_id = identity.read_text(encoding="utf-8")
    return wandb.init(project=project, name=folder.name, id=run_id, resume="allow", dir=str(folder), config=run_config)
