"""Pretraining: from a config to a run folder with checkpoints, metrics and a model.

`train` opens the run folder, `_Run.run` goes through the phases of a run, and `_Run._step` is one optimizer step.
"""

import math
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, NoReturn

import torch
from rich.console import Console

from yoco_u import budget
from yoco_u.data import Batch, BatchLoader, DatasetIndex, PackedDataset, check_vocabulary, prepare
from yoco_u.device import environment, fast_dtype, gemm_rate, multiplies_bfloat16, peak_memory_bytes, what_compiling_lacks
from yoco_u.errors import UserError, naming
from yoco_u.files import write_json
from yoco_u.formatting import short_count
from yoco_u.loading import tokenizer_folder, weights_digest
from yoco_u.model.loss import EarlyExit
from yoco_u.training.checkpoint import Checkpoints, TrainerState, step_name
from yoco_u.training.config import RunConfig
from yoco_u.training.distillation import compilation, freeze
from yoco_u.training.distributed import Distributed, distributed_session
from yoco_u.training.export import export_model
from yoco_u.training.forward import DTYPES
from yoco_u.training.memory import check_memory
from yoco_u.training.metrics import METRICS, MetricsWriter, Record, loops_key, loss_figures, lost_steps, read_metrics
from yoco_u.training.optimizer import build_optimizer
from yoco_u.training.other_programs import minding_others
from yoco_u.training.ownership import run_id
from yoco_u.training.parallelize import parallelize, unwrap
from yoco_u.training.progress import progress_report
from yoco_u.training.restoring import restore_model
from yoco_u.training.rounding import rounded_weights
from yoco_u.training.run_folder import RunFolder
from yoco_u.training.signals import noting_signals
from yoco_u.training.starting import check_start, check_tokenizers, first_model
from yoco_u.training.step import Pass, StepResult, TrainingStep, scheduled
from yoco_u.training.validation import evaluate, text_digest


class TrainingDiverged(UserError):  # noqa: N818
    """The loss or the gradient is not finite."""


class TrainingInterrupted(UserError):  # noqa: N818
    """A signal asked to stop, and the run stopped or ended; the same command goes on."""


def train(config: RunConfig, folder: str | Path, progress: bool = True) -> dict[str, Any]:
    """Train a model in a run folder, from the beginning or from the newest complete checkpoint there.

    Under torchrun every process calls this. A run that was killed at any moment and is started again continues to exactly the
    losses of the uninterrupted run, on the same machine with the same number of processes.

    Args:
        config: everything that determines the run.
        folder: the run folder; it is made if it does not exist.
        progress: whether to show progress on stderr.

    Returns:
        The summary, as in `summary.json`. If the run is finished already, its summary is returned and nothing else happens, but
        that `model/` is made anew from the last checkpoint if it is missing or damaged.

    Raises:
        UserError: if the config, the dataset or the folder do not fit together, the folder holds something else than a run, or
            the model does not fit into memory.
        OSError: if the disk is full, or the folder cannot be written to. The same call goes on from the newest checkpoint then.
        TrainingDiverged: if the loss or the gradient is not finite.
        TrainingInterrupted: if SIGINT or SIGTERM stopped the run, or came in its last step, after which it is finished.
    """
    run_folder, damaged = RunFolder(Path(folder)), list[str]()
    config = run_folder.located(config)
    with distributed_session(config.training.device) as distributed:
        if config.training.dtype == "auto":
            config = config.with_dtype(fast_dtype(distributed.device))
        if distributed.on_main(run_folder.read_summary) is None:
            check_start(config, distributed)
            check_memory(config, distributed)
        with run_folder.claim(config, distributed):
            summary = distributed.on_main(lambda: run_folder.read_summary(damaged.append))
            if summary is None:
                with naming(run_folder.path):
                    return _Run(config, run_folder, distributed, progress, damaged).run()
            console = Console(stderr=True, quiet=not (progress and distributed.is_main), markup=False)
            with naming(run_folder.path):
                remade = distributed.on_main(lambda: restore_model(config, run_folder))
            told = f"{run_folder.path}: the run is finished, at step {summary['steps']}; {remade or 'nothing to do'}."
            console.print(told, soft_wrap=True)
            return summary


class _Run:
    """One run in one process. Each phase of `run` sets the attributes that the later ones use.

    Args:
        damaged: what to say of files that are made anew.
    """

    def __init__(
        self, config: RunConfig, folder: RunFolder, distributed: Distributed, progress: bool, damaged: list[str]
    ) -> None:
        self.config, self.folder, self.distributed, self.damaged = config, folder, distributed, damaged
        self.progress = progress and distributed.is_main
        self.checkpoints = Checkpoints(folder.checkpoints, distributed)

    def run(self) -> dict[str, Any]:
        self._open_dataset()
        self._build()
        self._resume()
        self._measure_machine()
        device, follow = self.distributed.device, self.config.training.follow_free_cores
        stop: list[int] = []  # the signals that asked the run to stop
        try:
            with closing(self.checkpoints), self._writing_metrics(), self._reporting(), noting_signals(stop, once=True):
                with minding_others(device, follow, self.reporter.say) as mind_others:
                    self._loop(stop, mind_others)
                self.checkpoints.wait()
        except TrainingDiverged as problem:
            if self._asked_to_stop(stop):
                raise TrainingInterrupted(str(problem)) from None
            raise
        summary = self._finish()
        if self._asked_to_stop(stop):
            raise TrainingInterrupted(
                f"{self.folder.path}: the run was asked to stop in its last step, and is finished; run the same command again "
                "for what follows"
            )
        return summary

    def _asked_to_stop(self, stop: list[int]) -> bool:
        """Whether a signal came to any process."""
        return self.distributed.any(bool(stop))

    def _open_dataset(self) -> None:
        config, training = self.config, self.config.training
        path = Path(config.dataset)
        if config.data is not None:
            data = config.data
            self.distributed.on_main(lambda: prepare(data, path, progress=self.progress))
        self.index = self.distributed.on_main(lambda: DatasetIndex.load(path))
        self.distributed.on_main(self.index.verify)
        self.distributed.on_main(lambda: self.folder.check_contents(self._contents()))
        check_vocabulary(self.index, config.architecture.vocab_size)
        self.distributed.on_main(lambda: check_tokenizers(config, self.index))

        def open_splits() -> None:
            self.dataset = PackedDataset(path, "train", training.sequence_length, training.seed)
            self.validation = PackedDataset(path, "validation", training.sequence_length, shuffle=False)

        self.distributed.on_main(open_splits)  # what is wrong with them, all processes learn from one
        if not self.distributed.is_main:
            open_splits()
        start = config.start_from
        self.distributed.on_main(
            lambda: self.folder.copy_tokenizer(tokenizer_folder(start) if start is not None else self.index.tokenizer)
        )

    def _build(self) -> None:
        config, training = self.config, self.config.training
        torch.manual_seed(training.seed)
        model = first_model(config, self.index.eot_id, self.index.tokenizer)
        self.model_config = model.config
        freeze(model, config.distillation)
        self.model = parallelize(model, compilation(config), self.distributed)
        torch.manual_seed(training.seed + self.distributed.rank)
        self.optimizer = build_optimizer(self.model, config.optimizer)
        self.training_step = TrainingStep(self.model, self.optimizer, config, self.distributed)

    def _resume(self) -> None:
        config = self.config
        self.saved, self.lost = self.checkpoints.newest()
        run = self.distributed.on_main(lambda: run_id(self.folder, config, self.saved))
        if self.saved is not None:
            state = self.checkpoints.load(self.saved, self.model, self.optimizer, config.architecture)
            self.state = state.model_copy(update={"run": run})
            return
        self.state = TrainerState(
            seed=config.training.seed, world_size=self.distributed.world_size, architecture=config.architecture, run=run
        )

    def _contents(self) -> dict[str, str | None]:
        """What tells the run's dataset from others, and its teacher, if it has one."""
        teaching = self.config.distillation
        teacher = {} if teaching is None else {"teacher": weights_digest(teaching.teacher)}
        return {"dataset": self.index.digest} | teacher

    def _measure_machine(self) -> None:
        training, device = self.config.training, self.distributed.device
        self.distributed.barrier()  # all processes multiply at the same time, as they do in training
        self.gemm_rate = self.distributed.sum(gemm_rate(device, DTYPES[training.dtype]))
        found = environment(device) | {
            "world_size": self.distributed.world_size, "dtype": training.dtype, "gemm_flops_per_second": self.gemm_rate,
            "special_tokens": self.index.config.special_tokens, "run": self.state.run,
        }  # fmt: skip
        dataset = self.config.dataset

        def note() -> None:
            text = {"validation": text_digest(self.validation, training.evaluation_tokens)}
            self.folder.note_start(self.state.step, found | self._contents() | text, dataset, self.damaged.append)

        self.distributed.on_main(note)

    @contextmanager
    def _writing_metrics(self) -> Iterator[None]:
        config = self.config

        def open_writer() -> None:
            project, settings = config.training.wandb_project, config.model_dump(mode="json")
            self.metrics = MetricsWriter(self.folder.path, self.state.step, project, settings)

        self.distributed.on_main(open_writer)
        try:
            yield
        finally:
            if self.distributed.is_main:
                self.metrics.close()

    @contextmanager
    def _reporting(self) -> Iterator[None]:
        training = compilation(self.config)
        with progress_report(self.config.name, self.state.step, training.steps, self.progress) as self.reporter:
            for problem in [*self.damaged, *self.lost]:
                self.reporter.say(problem)
            if self.saved is not None:
                self.reporter.say(f"continuing from {self.saved}")
            elif self.lost:
                self.reporter.say("no checkpoint is left: beginning again")
            if self.distributed.is_main and self.metrics.missing:
                self.reporter.say(f"{METRICS} was damaged or lost, steps {self.metrics.missing} are missing; going on")
            if (times := training.steps * training.batch_rows / self.dataset.rows_per_epoch) > 1:
                self.reporter.say(
                    f"the training split has {short_count(self.dataset.split.tokens)} tokens: read {times:.1f} times"
                )
            if training.compile == "auto" and (lack := what_compiling_lacks(self.distributed.device)) is not None:
                self.reporter.say(f"training without compiling, which is slower: {lack}")
            if training.dtype == "bfloat16" and not multiplies_bfloat16(self.distributed.device):
                self.reporter.say("bfloat16 is slow without hardware for it; a new run with training.dtype=float32 is faster")
            yield

    def _loop(self, stop: list[int], mind_others: Callable[[], None]) -> None:
        training = self.config.training
        loader = BatchLoader(self.dataset, training.batch_rows, self.distributed.rank, self.distributed.world_size)
        batches = loader.iterate(self.state.step)
        if self.state.step == training.steps and not self.distributed.on_main(self._is_evaluated):
            self._evaluate()
        while self.state.step < training.steps:
            mind_others()
            try:
                self._step(batches)
            except RuntimeError:
                if not stop:
                    raise
                # Ctrl-C also ends the C++ compiler of torch.compile, which fails with pages of its output.
                self.checkpoints.wait()
                raise TrainingInterrupted(
                    f"stopped in step {self.state.step + 1} of {training.steps}; run the same command again to continue from "
                    f"{self.saved or 'the beginning'}"
                ) from None
            last = self.state.step == training.steps
            if last or self.state.step % training.evaluate_every == 0:
                self._evaluate()
            interrupted = self.distributed.any(bool(stop) or self.checkpoints.failed) and not last
            if last or interrupted or self.state.step % training.save_every == 0:
                self._save()
            if interrupted:
                self.checkpoints.wait()
                raise TrainingInterrupted(
                    f"stopped after step {self.state.step} of {training.steps}, with a checkpoint in {self.saved}; "
                    "run the same command again to continue"
                )

    def _step(self, batches: Iterator[Batch]) -> None:
        start = time.perf_counter()
        step = self.state.step
        with scheduled(unwrap(self.model), self.config, step), rounded_weights(self.model, self.config.training.weights):
            result = self.training_step.gradients(next(batches), self._passes(step))
        if not result.finite:
            self._stop_at_step(result)
        rate = self.training_step.update(result, self.state.step)
        seconds = time.perf_counter() - start
        tokens = self.config.tokens_per_step
        self.state = self.state.after_step(tokens, seconds)
        speed = (self.config.training_flops(self.state.step) - self.config.training_flops(self.state.step - 1)) / seconds
        self._record("train", result.loss, self.dataset, {
            "loops": statistics.mean(loops or self.config.architecture.num_loops for loops in self.config.loops_at(step)),
            "gradient_norm": result.norm,
            "learning_rate": rate,
            "tokens_per_second": tokens / seconds,
            "model_flops_per_second": speed,
            "mfu": speed / self.gemm_rate,
            "seconds": self.state.seconds,
        })  # fmt: skip

    def _passes(self, step: int) -> list[Pass]:
        weight, passes = self.config.training.early_exit_weight, []
        for loops in self.config.loops_at(step):
            exit_loop = self.config.exit_at(step, loops)
            passes.append(Pass(loops, None if exit_loop is None else EarlyExit(exit_loop, weight)))
        return passes

    def _evaluate(self) -> None:
        training = self.config.training

        def loss(num_loops: int | None = None) -> float:
            limit, rows = training.evaluation_tokens, self.training_step.micro_batch_rows
            return evaluate(self.model, self.validation, limit, rows, self.distributed, training.dtype, num_loops).loss

        with rounded_weights(self.model, training.weights):
            own = loss()
            others = {loops_key(loops): loss(loops) for loops in training.evaluate_loops if math.isfinite(own)}
        if not math.isfinite(own):
            self._stop_diverged(f"the validation loss is {own} after step {self.state.step}")
        self._record("evaluation", own, self.validation, {key: it for key, it in others.items() if math.isfinite(it)})

    def _is_evaluated(self) -> bool:
        """Whether the validation loss of the last step is among the metrics, as it is unless the file was damaged."""
        kinds = {record["kind"] for record in read_metrics(self.folder.path) if record["step"] == self.config.training.steps}
        return "evaluation" in kinds

    def _record(self, kind: str, loss: float, dataset: PackedDataset, figures: Record) -> None:
        if not self.distributed.is_main:
            return
        step = self.state.step
        so_far = {"step": step, "tokens": self.state.tokens, "flops": self.config.training_flops(step)}
        of_text = kind == "evaluation" or self.config.loss_is_of_text
        losses = loss_figures(loss, dataset.bytes_per_target) if of_text else {"loss": loss}
        record = {"kind": kind} | so_far | losses | figures
        self.metrics.write(record)
        self.reporter.show(record)

    def _save(self) -> None:
        if self.distributed.is_main:
            self.metrics.sync()
        self._begin_checkpoint(step_name(self.state.step))

    def _begin_checkpoint(self, name: str) -> None:
        keep = self.config.training.keep_checkpoints
        self.saved = self.checkpoints.save(name, self.model, self.optimizer, self.state, keep)

    def _stop_at_step(self, result: StepResult) -> NoReturn:
        rows, names = self.config.training.batch_rows, self.training_step.non_finite_gradients()
        where = f" (first in {names[0]}, {len(names)} parameters in all)" if names else ""
        first, rate = self.state.step * rows, self.training_step.learning_rate(self.state.step)
        self._stop_diverged(
            f"the loss is {result.loss} and the gradient norm {result.norm}{where} in step {self.state.step + 1}, at "
            f"learning rate {rate:.3g}, on rows {first} to {first + rows - 1} of the data"
        )

    def _stop_diverged(self, what: str) -> NoReturn:
        """Save the state before the update, under a name that no run resumes from, and raise."""
        self.optimizer.zero_grad(set_to_none=True)
        self._begin_checkpoint(self.checkpoints.spare_name(f"non-finite-{step_name(self.state.step)}"))
        self.checkpoints.wait()
        raise TrainingDiverged(
            f"{what}; the weights and optimizer state before that are in {self.saved}. Look at gradient_norm in metrics.jsonl: "
            "if it rose over many steps, lower optimizer.learning_rate or lengthen optimizer.warmup_steps; if it jumped at "
            "once, look at these data, or compare with training.dtype float32"
        )

    def _finish(self) -> dict[str, Any]:
        """Export the model, then write the summary: a run is finished when it has a summary."""
        export_model(self.model, self.model_config, self.folder, self.distributed)
        return self.distributed.on_main(self._summarize)

    def _summarize(self) -> dict[str, Any]:
        records = read_metrics(self.folder.path)
        steps = [record for record in records if record["kind"] == "train"]
        evaluation = next(record for record in reversed(records) if record["kind"] == "evaluation")
        by_loops = [loops_key(loops) for loops in self.config.training.evaluate_loops]
        speeds = ("tokens_per_second", "model_flops_per_second", "mfu")
        summary = {
            "name": self.config.name,
            "steps": self.state.step,
            "tokens": self.state.tokens,
            "flops": self.config.training_flops(self.state.step),
            "parameters": budget.parameters(self.config.architecture).total,
            "train_loss": steps[-1]["loss"] if steps else None,
            "validation": {
                key: evaluation[key] for key in ("loss", "perplexity", "bits_per_byte", *by_loops) if key in evaluation
            },
            **{key: statistics.median(record[key] for record in steps) if steps else None for key in speeds},
            "gemm_flops_per_second": self.gemm_rate,
            "seconds": self.state.seconds,
            "peak_memory_bytes": peak_memory_bytes(self.distributed.device),
            **lost_steps(records, self.state.step),
        }
        write_json(self.folder.summary, summary)
        return summary
