"""How long a grid will train: the arithmetic, the trial on this machine, and `yoco-u plan` on an experiment's file."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_up_grids import grid, preset
from models import architecture, build

from yoco_u.budget import forward_flops
from yoco_u.cli import main
from yoco_u.config import dump_yaml, merged, parse
from yoco_u.data import PackedDataset, prepare, train_tokenizer
from yoco_u.data.index import check_vocabulary
from yoco_u.experiment.duration import measured_rate, predict
from yoco_u.experiment.grid import expand
from yoco_u.loading import with_architectures
from yoco_u.training.config import RunConfig
from yoco_u.training.starting import check_tokenizers

MODELS = {
    "yoco-u": preset("yoco_u", vocab_size=300),
    "yoco": preset("yoco", vocab_size=300, match={"by": "flops", "reference": "yoco-u"}),
}


@given(every=st.integers(1, 2000), evaluated=st.integers(1, 10**6), rate=st.floats(1e6, 1e15))
def test_a_run_takes_the_time_of_its_training_and_its_evaluations(every: int, evaluated: int, rate: float) -> None:
    experiment = grid(MODELS, tokens=[409_600])
    training = experiment.base["training"] | {"evaluate_every": every, "evaluation_tokens": evaluated}
    runs = expand(experiment.model_copy(update={"base": experiment.base | {"training": training}}), Path("x"))
    for run, time in zip(runs, predict(runs, lambda config: rate), strict=True):
        forward = forward_flops(run.config.architecture, 32)
        evaluations = math.ceil(run.config.training.steps / every)
        assert time.seconds == pytest.approx(forward * (3 * run.config.tokens + evaluations * evaluated) / rate)


def test_each_model_is_tried_once_on_this_machine() -> None:
    base = grid(MODELS).base
    training = base["training"] | {"dtype": "float32", "compile": "off"}
    experiment = grid(MODELS, tokens_per_parameter=[10, 20]).model_copy(update={"base": base | {"training": training}})
    tried: list[str] = []
    rate = measured_rate(tried.append)
    runs = expand(experiment, Path("x"))
    rates = {run.name: rate(run.config) for run in runs}
    assert len(rates) == 12
    assert len(set(rates.values())) == len(tried) == 2
    assert all(0 < value < 1e15 for value in rates.values())
    assert [time.seconds for time in predict(runs, rate)] == [time.flops / rates[time.run.name] for time in predict(runs, rate)]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Two models, whose tokenizers have 290 tokens; the teacher's has a further one."""
    found, tokenizer = {}, train_tokenizer(["the rain in Spain stays mainly in the plain " * 9], 290)
    for name in ("start_from", "teacher"):
        folder = tmp_path_factory.mktemp("saved") / name
        build(architecture("yoco_u", vocab_size=300)).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        tokenizer.add_tokens(["<further>"])
        found[name] = str(folder)
    return found


@pytest.mark.parametrize("length", [32, 8192])
@pytest.mark.parametrize("models", [(), ("start_from",), ("teacher",), ("start_from", "teacher")])
def test_the_made_up_text_fits_every_grid(
    length: int, models: tuple[str, ...], saved: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is tokenized as the models that a run begins with or learns from need it, and fills a row of any length."""
    settings: dict[str, Any] = {"training": {"sequence_length": length}}
    if "start_from" in models:
        settings["start_from"] = saved["start_from"]
    if "teacher" in models:
        settings["distillation"] = {"teacher": saved["teacher"]}
    checked = []

    def train(config: RunConfig, folder: Path, progress: bool) -> dict[str, Any]:
        """What training checks before its first step."""
        assert config.data is not None
        index = prepare(config.data, config.dataset, progress=False)
        check_vocabulary(index, config.architecture.vocab_size)
        check_tokenizers(config, index)
        checked.extend(PackedDataset(config.dataset, split, length).row(0) for split in ("train", "validation"))
        return {"model_flops_per_second": 1e9}

    monkeypatch.setattr("yoco_u.training.trainer.train", train)
    monkeypatch.setattr("yoco_u.experiment.duration._WORDS", 100)
    experiment = grid({"yoco-u": preset("yoco_u", vocab_size=300)}, seeds=[0])
    config = expand(experiment, Path("x"))[0].config.model_dump() | {"initializer_range": None}
    config = parse(RunConfig, merged(config, with_architectures(settings) | {"architecture": config["architecture"]}), "run")
    assert measured_rate()(config) == 1e9
    assert [len(row) for row in checked] == 2 * [length + 1]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "grid.yaml"
    dump_yaml(grid(MODELS), path)
    return path


def test_plan_of_an_experiment(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "plan.json"
    assert main(["plan", str(file), "seeds=[0, 4]", "--hardware", "h200", "--json", str(out)]) == 0
    told, found = capsys.readouterr().out, json.loads(out.read_text())
    assert [line.split()[0] for line in told.splitlines()[1:-2]] == [run["run"] for run in found["runs"]]
    assert [run["run"] for run in found["runs"]] == ["yoco-u_seed-0", "yoco_seed-0", "yoco-u_seed-4", "yoco_seed-4"]
    assert "30% of 989 TFLOP/s, the peak of NVIDIA H200 SXM 141 GB, are assumed" in told.splitlines()[-1]
    assert found["minutes"] == pytest.approx(sum(run["minutes"] for run in found["runs"]))
    for run in found["runs"]:
        assert run["minutes"] == pytest.approx(run["flops"] / (0.3 * 989.4e12) / 60)


def test_plan_of_an_experiment_on_this_machine(
    file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def train(config: RunConfig, folder: Path, progress: bool) -> dict[str, Any]:
        return {"model_flops_per_second": 1e9 * config.architecture.num_loops}

    monkeypatch.setattr("yoco_u.training.trainer.train", train)
    settings = ("seeds=[0]", "base.training.evaluation_tokens=1")
    assert main(["plan", str(file), *settings, "--hardware", "this"]) == 0
    told = capsys.readouterr()
    assert [line.partition(" ")[0] for line in told.err.splitlines()] == ["trying", "trying"]
    looped, plain = (float(line.split()[-1]) for line in told.out.splitlines()[1:3])
    assert plain == pytest.approx(3 * looped, rel=0.02)  # equal FLOPs, at a third of the rate
    assert "this machine, measured in a few steps of each model" in told.out


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (("--context", "64"), "--context has no effect here: the runs of"),
        (("--batch", "2"), "--batch has no effect here"),
        (("--plot", "x.png"), "--plot has no effect here"),
        (("--hardware", "h10"), "did you mean h100?"),
        (("sedes=[0]",), "did you mean seeds"),
        (("yoco",), "expected key=value"),
    ],
)
def test_mistakes(file: Path, arguments: tuple[str, ...], part: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(file), *arguments]) == 2
    captured = capsys.readouterr()
    assert part in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""
