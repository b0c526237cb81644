"""The folder of a fine-tuning: damage, other processes, changed inputs and losses that are no numbers are told."""

import importlib.util
import json
import resource
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from chat_models import save_chat_model
from filelock import FileLock
from test_checksums import damage

from yoco_u.errors import UserError, describe_system_error
from yoco_u.loading import load_model
from yoco_u.tuning import SFTSettings, fine_tune

pytestmark = pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="TRL is not installed")
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}|{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
SETTINGS = SFTSettings(steps=4, length=64, batch_rows=2, save_every=2, learning_rate=1e-3)


def write_chats(path: Path, count: int, answer: str = "it is") -> Path:
    chats = [[{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": f"{answer} {n}!"}] for n in range(count)]
    path.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    return path


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, chats, and a run of four steps, with checkpoints after the second and the fourth."""
    folder = tmp_path_factory.mktemp("place")
    model = save_chat_model(folder, TEMPLATE, {"window": 16})
    fine_tune(model, [write_chats(folder / "chats.jsonl", 10)], SETTINGS, folder / "run")
    return folder


def again(place: Path, run: Path, **changed: Any) -> tuple[dict[str, Any], str]:
    """The summary of a run that goes on, and what was said."""
    said: list[str] = []
    settings = SETTINGS.model_copy(update=changed)
    return fine_tune(place / "model", [place / "chats.jsonl"], settings, run, said.append), "\n".join(said)


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("model.safetensors", "flip"),
        ("optimizer.pt", "cut"),
        ("scheduler.pt", "missing"),
        ("rng_state.pth", "empty"),
        ("config.json", "cut"),
        ("trainer_state.json", "flip"),
    ],
)
def test_a_damaged_checkpoint_is_passed_over_and_the_run_ends_the_same(
    place: Path, tmp_path: Path, name: str, how: str
) -> None:
    run = tmp_path / "run"
    shutil.copytree(place / "run", run)
    (run / "summary.json").unlink()
    last = run / "checkpoints" / "checkpoint-4"
    damage(last / name, how, at=4321, bit=3)
    summary, said = again(place, run)
    assert f"{last / name}: the file is " in said and f"continuing from {run / 'checkpoints' / 'checkpoint-2'}" in said
    assert summary["losses"] == json.loads((place / "run" / "summary.json").read_text())["losses"]
    left, right = (load_model(folder, torch.device("cpu"))[0].state_dict() for folder in (run, place / "run"))
    for tensor in left:
        torch.testing.assert_close(left[tensor], right[tensor])


@pytest.mark.parametrize("lost", ["model", "model.safetensors", "config.json"])
def test_a_lost_model_of_a_finished_run_is_made_again(place: Path, tmp_path: Path, lost: str) -> None:
    run = tmp_path / "run"
    shutil.copytree(place / "run", run)
    if lost == "model":
        shutil.rmtree(run / "model")
    else:
        damage(run / "model" / lost, "flip", at=99, bit=3)
    summary, said = again(place, run)
    assert "is finished, but not its model, which is made again" in said
    assert f"continuing from {run / 'checkpoints' / 'checkpoint-4'}" in said
    assert summary["losses"] == json.loads((place / "run" / "summary.json").read_text())["losses"]
    left, right = (load_model(folder, torch.device("cpu"))[0].state_dict() for folder in (run, place / "run"))
    assert all(torch.equal(left[tensor], right[tensor]) for tensor in left)
    assert "is finished, at step 4; nothing to do" in again(place, run)[1]


def test_another_process_in_the_folder_is_told(place: Path) -> None:
    with FileLock(place / "run" / ".lock"), pytest.raises(UserError, match="another process is training there"):
        again(place, place / "run")
    assert "is finished, at step 4; nothing to do" in again(place, place / "run")[1]


def test_other_contents_under_the_same_names_are_no_run_that_goes_on(place: Path, tmp_path: Path) -> None:
    here = tmp_path / "here"
    shutil.copytree(place, here, ignore=shutil.ignore_patterns("run", "source"))
    again(here, here / "run", steps=1)
    write_chats(here / "chats.jsonl", 11)
    with pytest.raises(UserError, match="other things were in data"):
        again(here, here / "run", steps=1)
    write_chats(here / "chats.jsonl", 10)
    again(here, here / "run", steps=1)
    sums = here / "model" / "SHA256SUMS"
    count, *lines = sums.read_text().splitlines(keepends=True)
    sums.write_text("".join([count, *reversed(lines)]))
    with pytest.raises(UserError, match="other things were in model"):
        again(here, here / "run", steps=1)
    settings = json.loads((here / "run" / "settings.json").read_text())
    del settings["contents"]  # which earlier versions did not write
    (here / "run" / "settings.json").write_text(json.dumps(settings))
    again(here, here / "run", steps=1)


def test_a_run_goes_on_at_another_time(tmp_path: Path) -> None:
    """With a template that writes the time, here in microseconds, as others write the date."""
    save_chat_model(tmp_path, "{{ strftime_now('%Y %f') }}" + TEMPLATE, {"window": 16})
    write_chats(tmp_path / "chats.jsonl", 2)
    first, _ = again(tmp_path, tmp_path / "run", steps=1)
    (tmp_path / "run" / "summary.json").unlink()
    second, said = again(tmp_path, tmp_path / "run", steps=1)
    assert "continuing from" in said and second["losses"] == first["losses"]
    settings = json.loads((tmp_path / "run" / "settings.json").read_text())
    (tmp_path / "run" / "settings.json").write_text(json.dumps(settings | {"begun": "yesterday"}))
    with pytest.raises(UserError, match=r"settings.json: begun"):
        again(tmp_path, tmp_path / "run", steps=1)


def test_what_is_in_the_way_of_the_model_is_told_first(place: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(place / "run", run, ignore=shutil.ignore_patterns("checkpoints", "summary.json", ".yoco-u-part"))
    (run / "model" / "thesis").write_text("years of work")
    with pytest.raises(UserError, match="model: is in the way"):
        again(place, run)
    assert (run / "model" / "thesis").exists() and not (run / "checkpoints").exists()


def test_a_full_disk_is_told_with_the_folder_and_the_run_goes_on(place: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, hard))
        with pytest.raises(OSError, match="File too large") as raised:
            again(place, run)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert describe_system_error(raised.value).startswith(f"{run}")
    assert again(place, run)[0]["losses"] == json.loads((place / "run" / "summary.json").read_text())["losses"]


@pytest.mark.parametrize(
    ("steps", "said"), [(4, "is (nan|inf) in step [34]"), (2, "holds NaN or infinity after the last step")]
)
def test_a_loss_that_is_no_number_ends_training(place: Path, tmp_path: Path, steps: int, said: str) -> None:
    with pytest.raises(UserError, match=f"{said}; lower learning_rate"):
        again(place, tmp_path / "run", steps=steps, learning_rate=1e25, weight_decay=1e25)
    assert not {"model", "summary.json"} & {path.name for path in (tmp_path / "run").iterdir()}


def test_answers_beyond_the_length_are_not_counted(place: Path, tmp_path: Path) -> None:
    whole = json.loads((place / "run" / "summary.json").read_text())
    summary, said = again(place, tmp_path / "run", length=23, steps=1)
    assert summary["chats"] == 10 and summary["assistant_tokens"] < whole["assistant_tokens"] and summary["tokens"] == 230
    assert "10 chats are longer than length 23" in said
    with pytest.raises(UserError, match=r"no answer within length 16 in .*chats.jsonl"):
        again(place, tmp_path / "other", length=16)
    assert not (tmp_path / "other").exists()
