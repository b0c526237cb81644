"""transformers' `Trainer`: accumulation changes nothing, packed rows train as padded ones, and the experts are balanced."""

import os
import socket
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from forked import FORKS
from models import EXPERTS, architecture, build, gradients, tokens
from torch.utils.data import SequentialSampler
from transformers import DataCollatorWithFlattening, Trainer, TrainingArguments

from yoco_u import YocoUForCausalLM
from yoco_u.errors import UserError
from yoco_u.model.balancing import BalanceExperts
from yoco_u.model.feed_forward import ExpertMixture


class InOrder(Trainer):
    def _get_train_sampler(self, *args: Any) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)


def train(
    folder: Path,
    rows: list[list[int]],
    size: int,
    collator: Any = None,
    steps: int = 1,
    callbacks: Any = (),
    weight: float = 0.3,
    processes: int = 1,
) -> YocoUForCausalLM:
    """A model of experts after steps of plain gradient descent on eight rows each, in micro-batches of `size` rows."""
    model = build(architecture("yoco_u", layers=2, experts=EXPERTS | {"auxiliary_loss_weight": weight}))
    args = TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=size, gradient_accumulation_steps=8 // size // processes,
        max_steps=steps, ddp_backend="gloo" if processes > 1 else None,
        learning_rate=1.0, lr_scheduler_type="constant", optim="sgd", max_grad_norm=0, use_cpu=True, report_to=[],
        save_strategy="no", disable_tqdm=True, logging_strategy="no",
    )  # fmt: skip
    data = [{"input_ids": row, "labels": row} for row in rows]
    InOrder(model, args, data_collator=collator, train_dataset=data, callbacks=list(callbacks)).train()
    return model


def changes(model: YocoUForCausalLM) -> dict[str, torch.Tensor]:
    """What one step of plain descent changed: the gradients."""
    before = dict(build(model.config.architecture).named_parameters())
    return {name: parameter.detach() - before[name].detach() for name, parameter in model.named_parameters()}


def test_one_batch_of_eight_and_four_of_two_are_one_step(tmp_path: Path) -> None:
    """Micro-batches of the same two rows, for which the mean of the auxiliary losses is that of all rows."""
    rows = tokens(2, 16).tolist() * 4
    whole, parts = (changes(train(tmp_path, rows, size)) for size in (8, 2))
    for name, change in whole.items():
        torch.testing.assert_close(parts[name], change, rtol=1e-3, atol=1e-5, msg=name)
    assert any("router" in name and change.abs().max() > 1e-3 for name, change in whole.items())


def test_two_processes_are_one(tmp_path: Path) -> None:
    """accelerate divides the rows of a step among processes, here of different lengths in packed rows."""
    rows = [tokens(1, length, seed=length)[0].tolist() for length in (9, 12, 5, 16, 7, 11, 3, 14)]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = [FORKS.Process(target=on_rank, args=(tmp_path, rows, rank, port), daemon=True) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(120)
    assert [process.exitcode for process in ranks] == [0, 0]
    expected = train(tmp_path, rows, 8, DataCollatorWithFlattening(), weight=0).state_dict()
    for rank in range(2):
        for name, tensor in torch.load(tmp_path / f"{rank}.pt").items():
            torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=1e-5, msg=name)


def on_rank(folder: Path, rows: list[list[int]], rank: int, port: int) -> None:
    """One of two processes, with the environment that torchrun and `accelerate launch` make."""
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)
    }  # fmt: skip
    model = train(folder, rows, 4, DataCollatorWithFlattening(), weight=0, processes=2)
    learned = {name: parameter.detach() for name, parameter in model.named_parameters()}
    torch.save(learned, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def test_the_flattening_collator_trains_as_single_rows_do(tmp_path: Path) -> None:
    rows = [tokens(1, length, seed=length)[0].tolist() for length in (9, 12, 5, 16, 7, 11, 3, 14)]
    model = train(tmp_path, rows, 4, DataCollatorWithFlattening(), weight=0)
    alone = build(model.config.architecture).train()
    loss = sum(alone(torch.tensor([row]), labels=torch.tensor([row])).loss * (len(row) - 1) for row in rows)
    expected = gradients(alone, loss / sum(len(row) - 1 for row in rows))
    for name, change in changes(model).items():
        torch.testing.assert_close(change, -expected[name], rtol=1e-3, atol=1e-5, msg=name)


def test_smoothed_labels_are_those_of_the_next_token(tmp_path: Path) -> None:
    model, ids = build(architecture("yoco_u", layers=2)), tokens(2, 16)
    args = TrainingArguments(str(tmp_path), label_smoothing_factor=0.3, use_cpu=True, report_to=[])
    found = Trainer(model, args).compute_loss(model, {"input_ids": ids, "labels": ids})
    logits = model(ids).logits[:, :-1]
    torch.testing.assert_close(found, F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), label_smoothing=0.3))


def test_the_callback_balances_after_each_step(tmp_path: Path) -> None:
    rows = tokens(8, 16).tolist()
    biases = []
    for callbacks in ([], [BalanceExperts()]):
        model = train(tmp_path, rows, 4, steps=3, callbacks=callbacks)
        mixtures = [module for module in model.modules() if isinstance(module, ExpertMixture)]
        before = [m.choice_bias for m in build(model.config.architecture).modules() if isinstance(m, ExpertMixture)]
        biases.append([m.choice_bias - b for m, b in zip(mixtures, before, strict=True)])
    assert all((moved == 0).all() for moved in biases[0])
    for moved in biases[1]:  # three steps of 0.001 up or down
        assert moved.abs().max() > 0.0005
        torch.testing.assert_close(moved / 0.001, (moved / 0.001).round(), atol=1e-3, rtol=0)
    assert all(int(m.tokens_per_expert.sum()) == 0 for m in mixtures)


@pytest.mark.parametrize(
    ("settings", "weight", "message"),
    [
        ({"world_size": 2, "ddp_broadcast_buffers": None}, 0.0, "ddp_broadcast_buffers=False"),
        ({"label_smoothing_factor": 0.1}, 0.3, "leaves out the experts' auxiliary one"),
        ({"label_smoothing_factor": 0.1}, 0.0, None),
    ],
)
def test_settings_that_lose_what_the_experts_learn_by_are_refused(
    settings: dict[str, Any], weight: float, message: str | None
) -> None:
    model = build(architecture("yoco_u", layers=2, experts=EXPERTS | {"auxiliary_loss_weight": weight}))
    args: Any = SimpleNamespace(**{"world_size": 1, "label_smoothing_factor": 0.0} | settings)
    with nullcontext() if message is None else pytest.raises(UserError, match=message):
        BalanceExperts().on_train_begin(args, None, None, model=model)  # type: ignore[arg-type]
