"""From a file to runs: names, order, axes, and the arithmetic of matching."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from yoco_u.budget import forward_flops, parameters
from yoco_u.config import load_yaml, parse
from yoco_u.errors import UserError
from yoco_u.experiment.config import Experiment
from yoco_u.experiment.grid import GridRun, choose, expand

RECIPES = Path(__file__).parents[2] / "recipes"

BASE = {
    "architecture": {"size": "test"},
    "optimizer": {"warmup_steps": 2},
    "training": {"steps": 100, "sequence_length": 32, "batch_rows": 4, "micro_batch_rows": 4},
}


def experiment(models: dict[str, Any], **settings: Any) -> Experiment:
    return parse(Experiment, {"title": "Test", "base": BASE, "models": models} | settings, "test.yaml")


def model(preset: str, **settings: Any) -> dict[str, Any]:
    plan = {key: settings.pop(key) for key in ("match", "vary", "role", "label") if key in settings}
    return {"settings": {"architecture": {"preset": preset} | settings}} | plan


def runs_of(models: dict[str, Any], **settings: Any) -> dict[str, GridRun]:
    return {run.name: run for run in expand(experiment(models, **settings), Path("runs/x"))}


def flops(run: GridRun) -> float:
    """Three forward passes over every token."""
    training = run.config.training
    tokens = training.steps * training.batch_rows * training.sequence_length
    return 3 * forward_flops(run.config.architecture, training.sequence_length) * tokens


def test_without_axes_a_run_is_named_like_its_model() -> None:
    runs = runs_of({"yoco": model("yoco"), "yoco-u": model("yoco_u", label="YOCO-U")})
    assert list(runs) == ["yoco", "yoco-u"]
    assert [run.config.name for run in runs.values()] == ["yoco", "YOCO-U"]
    assert [run.role for run in runs.values()] == ["yoco", "yoco_u"]
    assert {run.config.dataset for run in runs.values()} == {"runs/x/data"}


def test_names_say_every_axis_that_the_file_has() -> None:
    runs = runs_of(
        {"yoco-u": model("yoco_u", vary={"architecture.loops": [1, 3], "optimizer.learning_rate": [0.01]})},
        tokens=[6400, 1_024_000],
        seeds=[0, 7],
    )
    assert list(runs) == [
        f"yoco-u_loops-{loops}_learning-rate-0.01_tokens-{tokens}_seed-{seed}"
        for seed in (0, 7)
        for tokens in ("6400", "1024K")
        for loops in (1, 3)
    ]
    first = runs["yoco-u_loops-3_learning-rate-0.01_tokens-1024K_seed-7"]
    assert first.series == "yoco-u_loops-3_learning-rate-0.01_tokens-1024K"
    assert first.config.training.seed == first.seed == 7
    assert first.config.training.steps == 8000
    assert first.config.optimizer.learning_rate == 0.01
    assert first.model_label == "yoco-u, loops 3, learning rate 0.01"
    assert first.label == "yoco-u, loops 3, learning rate 0.01, 1.02M tokens"


axis = st.lists(st.integers(0, 99), min_size=1, max_size=3, unique=True)


@given(seeds=axis, tokens=axis, loops=axis, more=st.integers(100, 120))
def test_a_grid_that_grows_keeps_its_runs(seeds: list[int], tokens: list[int], loops: list[int], more: int) -> None:
    models = {"a": model("yoco"), "b": model("yoco_u", vary={"architecture.loops": [n + 1 for n in loops]})}
    counts = [1280 * (n + 1) for n in tokens]
    before = runs_of(models, seeds=seeds, tokens=counts)
    assert len(before) == len(seeds) * len(tokens) * (1 + len(loops))
    assert before == runs_of(models, seeds=seeds, tokens=counts)
    after = runs_of(models, seeds=[*seeds, more], tokens=counts)
    assert list(after)[: len(before)] == list(before)
    grown = runs_of(models | {"c": model("transformer")}, seeds=seeds, tokens=[*counts, 1280 * 200])
    assert all(grown[name] == run for name, run in before.items())


def test_a_gate_is_dropped_where_there_is_one_loop() -> None:
    runs = runs_of({"yoco-u": model("yoco_u", loop_gate=0.1, vary={"architecture.loops": [1, 2]})})
    assert [run.config.architecture.stages[0].loop_gate for run in runs.values()] == [None, 0.1]


@given(loops=st.integers(2, 6), steps=st.integers(20, 5000), rows=st.sampled_from([1, 2, 4, 8]))
def test_equal_flops_to_the_nearest_step(loops: int, steps: int, rows: int) -> None:
    plain = model("yoco", match={"by": "flops", "reference": "looped"})
    plain["settings"]["training"] = {"batch_rows": rows, "micro_batch_rows": rows}
    runs = runs_of({"plain": plain, "looped": model("yoco_u", loops=loops)}, tokens=[steps * 128], seeds=[1])
    matched, reference = runs.values()
    per_step = flops(matched) / matched.config.training.steps
    assert abs(flops(matched) - flops(reference)) <= per_step / 2 * (1 + 1e-9)
    assert flops(reference) == pytest.approx(reference.config.training_flops())
    assert reference.config.training.steps == steps


def test_equal_tokens_whatever_the_batch() -> None:
    wide = model("yoco", match={"by": "tokens", "reference": "yoco-u"})
    wide["settings"]["training"] = {"batch_rows": 16, "micro_batch_rows": 16}
    runs = runs_of({"wide": wide, "yoco-u": model("yoco_u")})
    assert runs["wide"].config.training.steps == 25
    assert runs["wide"].config.training.steps * 16 == runs["yoco-u"].config.training.steps * 4


@pytest.mark.parametrize("preset", ["transformer", "yoco", "parscale", "upper_loop_without_shared_kv", "deeper"])
def test_equal_parameters_are_the_nearest_of_all_widths(preset: str) -> None:
    grid = experiment({"other": model(preset), "yoco-u": model("yoco_u")}, match={"by": "parameters", "reference": "yoco-u"})
    other, reference = expand(grid, Path("x"))
    wanted, a = parameters(reference.config.architecture).total, other.config.architecture

    def distance(width: int) -> int:
        return abs(parameters(a.model_copy(update={"intermediate_size": width})).total - wanted)

    assert distance(a.intermediate_size) == min(map(distance, range(8, 400, 8)))
    assert other.config.training == reference.config.training


def test_parameters_and_flops_together_and_a_match_of_one_models_own() -> None:
    matches = [{"by": "flops", "reference": "yoco-u"}, {"by": "parameters", "reference": "yoco-u"}]
    models = {"long": model("yoco", match=matches), "yoco-u": model("yoco_u"), "short": model("yoco")}
    runs = runs_of(models, match={"by": "parameters", "reference": "yoco-u"})
    assert runs["long"].config.architecture == runs["short"].config.architecture
    assert flops(runs["long"]) == pytest.approx(flops(runs["yoco-u"]), rel=0.01)
    assert runs["short"].config.training.steps == 100


def test_a_reference_follows_the_varied_values() -> None:
    models = {"long": model("yoco", match={"by": "flops", "reference": "yoco-u"}), "yoco-u": model("yoco_u")}
    runs = runs_of(models, vary={"training.sequence_length": [16, 32]})
    for length in (16, 32):
        long, looped = (runs[f"{name}_sequence-length-{length}"] for name in ("long", "yoco-u"))
        assert flops(long) == pytest.approx(flops(looped), rel=0.01)


def test_the_loop_schedule_counts_in_equal_flops() -> None:
    grown = model("yoco_u")
    grown["settings"]["training"] = {"loop_schedule": [{"until": 0.5, "loops": 1}]}
    models = {"grown": grown | {"match": {"by": "flops", "reference": "yoco-u"}}, "yoco-u": model("yoco_u")}
    runs = runs_of(models)
    one, three = (forward_flops(runs["yoco-u"].config.architecture.with_loops(t), 32) for t in (1, 3))
    assert runs["grown"].config.training.steps == round(100 * three / ((one + three) / 2))


SIZES = {
    "8": {"architecture": {"hidden_size": 8, "head_dim": 2}, "optimizer": {"learning_rate": 0.1}},
    "64": {"architecture": {"hidden_size": 64, "head_dim": 16}, "optimizer": {"learning_rate": 0.01}},
}


@given(per_parameter=st.integers(5, 200), smaller=st.booleans())
def test_each_size_is_a_grid_of_its_own(per_parameter: int, smaller: bool) -> None:
    models = {
        "yoco": model("yoco", match={"by": "flops", "reference": "yoco-u"}),
        "yoco-u": {"settings": {"architecture": {"preset": "yoco_u"}, "optimizer": {"learning_rate": 0.03}}},
    }
    axes = {"tokens_per_parameter": [per_parameter], "seeds": [0, 3]}
    runs = runs_of(models, sizes=SIZES, **axes)
    names = [f"{name}_per-parameter-{per_parameter}_seed-{seed}" for seed in (0, 3) for name in models]
    assert list(runs) == [f"{size}/{name}" for size in SIZES for name in names]
    size = "8" if smaller else "64"
    base = {**BASE, "architecture": {"size": "test"} | SIZES[size]["architecture"]}
    for name, alone in runs_of(models, base=base, **axes).items():
        run = runs[f"{size}/{name}"]
        assert (run.size, run.series) == (size, f"{size}/{alone.series}")
        assert run.config.name == f"{size} {alone.config.name}"
        assert (run.config.architecture, run.config.training) == (alone.config.architecture, alone.config.training)
        assert run.config.dataset == "runs/x/data"
        assert run.config.optimizer.learning_rate == (
            0.03 if run.role == "yoco_u" else SIZES[size]["optimizer"]["learning_rate"]
        )


@given(per_parameter=st.integers(5, 200))
def test_tokens_for_each_parameter(per_parameter: int) -> None:
    by_parameters = {"by": "parameters", "reference": "a"}
    models = {"a": model("yoco_u"), "b": model("transformer"), "c": model("transformer", match=by_parameters)}
    runs = runs_of(models, tokens_per_parameter=[per_parameter])
    a, b, c = (run.config for run in runs.values())
    for config in (a, b):
        wanted = per_parameter * parameters(config.architecture).total
        assert abs(config.tokens - wanted) <= config.tokens_per_step / 2
    assert parameters(c.architecture).total != parameters(a.architecture).total
    assert c.training.steps == a.training.steps  # equal parameters, to the multiple of 8, are equal steps


def test_choosing_runs() -> None:
    runs = list(runs_of({"a": model("yoco")}, seeds=list(range(7))).values())
    shards = [choose(runs, only=f"{shard}/3") for shard in (1, 2, 3)]
    assert sorted(run.seed for shard in shards for run in shard) == list(range(7))
    assert [run.seed for run in shards[1]] == [1, 4]
    assert choose(runs, run="a_seed-4") == choose(runs, run="4") == [runs[4]]
    assert choose(runs) == runs
    numbers = list(runs_of({name: model("yoco", label=f"m{name}") for name in ("1", "3", "0")}).values())
    assert [[one.name for one in choose(numbers, run=run)] for run in "0123"] == [["1"], ["3"], ["0"], ["3"]]
    for wrong in ("0/3", "4/3", "1/0", "x", "1/2/3", "-1/2"):
        with pytest.raises(UserError, match="expected SHARD/COUNT"):
            choose(runs, only=wrong)
    with pytest.raises(UserError, match=r"no such run; give a number from 0 to 6 or a name, see --list"):
        choose(runs, run="7")


FLOPS_OF_A = {"by": "flops", "reference": "a"}


@pytest.mark.parametrize(
    ("models", "settings", "message"),
    [
        ({}, {}, "models"),
        ({"a_b": model("yoco")}, {}, "letters, digits and hyphens"),
        ({"data": model("yoco")}, {}, "letters, digits and hyphens"),
        ({"a": model("yocoo")}, {}, "unknown preset 'yocoo'"),
        ({"a": model("yoco", match={"by": "flops", "reference": "b"})}, {}, "no model 'b'; the models are a"),
        ({"a": model("yoco", match=FLOPS_OF_A)}, {}, "a is itself matched so"),
        ({"a": model("yoco", match=[FLOPS_OF_A, FLOPS_OF_A])}, {}, "matched by flops, flops"),
        ({"a": model("yoco", vary={"window": []})}, {}, "models.a.vary.window"),
        ({"a": model("yoco", vary={"architecture.windo": [1]})}, {}, "windo"),
        ({"a": model("yoco")}, {"seeds": [1, 1]}, "each value once"),
        ({"a": model("yoco")}, {"tokens": [0]}, "tokens"),
        ({"a": model("yoco")}, {"tokens_per_parameter": [0]}, "tokens_per_parameter"),
        ({"a": model("yoco")}, {"tokens": [128], "tokens_per_parameter": [1]}, "they are one axis, keep one of them"),
        ({"a": model("yoco")}, {"sizes": {"a/b": {}}}, "sizes.a/b: a name has letters, digits and hyphens"),
        ({"a": model("yoco")}, {"sizes": {"s": {"trainin": {}}}}, "did you mean training"),
        ({"a": model("yoco")}, {"tokens": [128]}, "at most 0 fit"),
        ({"a": model("yoco")}, {"sedes": [1]}, "did you mean seeds"),
        ({"a": model("yoco")}, {"base": BASE | {"dataset": "mine"}}, "base.dataset: a grid names its runs"),
        ({"a": model("yoco") | {"settings": {"name": "x"}}}, {}, "models.a.settings.name: a grid names its runs"),
        ({"a": model("yoco")}, {"vary": {"dataset": ["a", "b"]}}, "vary.dataset: a grid names its runs"),
        ({"a": model("yoco", vary={"training.seed": [1, 2]})}, {"seeds": [0]}, "models.a.vary.training.seed: seeds says it"),
        ({"a": model("yoco")}, {"vary": {"training.steps": [9]}, "tokens": [12800]}, "vary.training.steps: tokens says it"),
        ({"a": model("yoco", label="b"), "b": model("yoco")}, {}, "a and b are both called 'b'"),
        ({"a": model("yoco", role="yoko")}, {}, "role"),
        (
            {
                "a": model("yoco", match={"by": "flops", "reference": "b"}),
                "b": model("yoco_u", vary={"architecture.loops": [2, 3]}),
            },
            {},
            "b could be any of b_loops-2, b_loops-3; name one of them",
        ),
        ({"a": model("yoco", vary={"optimizer.learning_rate": [0.1, 0.10000000001]})}, {}, "two runs come out as"),
        ({"a": model("yoco"), "b": model("yoco") | {"settings": {"data": {}, "architecture": {"preset": "yoco"}}}}, {}, "data"),
        (
            {"a": model("yoco"), "b": model("yoco", hidden_size=512, match={"by": "parameters", "reference": "a"})},
            {},
            "choose other widths",
        ),
    ],
)
def test_mistakes_are_told_in_one_line(models: dict[str, Any], settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as told:
        runs_of(models, **settings)
    assert message in str(told.value)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("file", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_our_own_recipes_are_valid(file: Path) -> None:
    runs = expand(parse(Experiment, load_yaml(file), file.name), Path("runs/x"))
    for size in {run.size for run in runs}:
        alike = [run for run in runs if run.size == size and run.role != "unrolled_yoco"]
        counts = [parameters(run.config.architecture).total for run in alike]
        assert max(counts) < 1.06 * min(counts)
    for run in runs:
        assert run.config.data is not None
        assert run.config.data.vocab_size <= run.config.architecture.vocab_size
