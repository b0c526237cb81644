"""`yoco-u exits` on a run, and what its file changes."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from yoco_u.analysis import scaling
from yoco_u.inference import LLM, SamplingParams
from yoco_u.inference.exits import FILE


def test_exits_of_a_run(run: Any, workspace: Path, tmp_path: Path) -> None:
    folder = tmp_path / "a"
    shutil.copytree(workspace / "a", folder)
    options = ("--tokens", 640, "--sequence-length", 32)  # the mean is 1.5, in the middle of 1 and T
    shown = run("exits", folder, *options)
    assert shown.status == 0 and str(folder / "model" / FILE) in shown.err
    assert all(score in shown.out for score in ("angular", "divergence", "gain"))
    before = (folder / "model" / FILE).read_text()
    outcome = run("exits", folder, *options, "--json")
    assert (folder / "model" / FILE).read_text() == before
    exits = json.loads(before)
    assert outcome.json["chosen"] == {name: exits[name] for name in ("score", "threshold", "num_loops")}
    assert [one["mean_loops"] for one in outcome.json["results"][:2]] == [1, 2]

    generated = run("generate", folder, "--prompt", "def ", "--num-loops", "auto", "--greedy", "--max-tokens", 6, "--json")
    [output] = generated.json["requests"][0]["outputs"]
    params = SamplingParams(num_loops="auto", temperature=0, max_tokens=6)
    [request] = LLM(folder, cache_tokens=512).generate(["def "], params)
    assert output["text"] == request.outputs[0].text
    assert output["mean_loops"] == sum(request.outputs[0].loops) / len(request.outputs[0].loops)

    another_t = {"num_loops": 3, "score": "angular", "heads": [], "threshold": 0.0}  # which auto runs
    (folder / "model" / FILE).write_text(json.dumps({"generator": exits["generator"]} | another_t))
    auto = ("generate", folder, "--prompt", "a", "--num-loops", "auto", "--max-tokens", 2, "--json")
    for threshold in ((), ("--exit-threshold", 0)):
        assert run(*auto, *threshold).json["requests"][0]["outputs"][0]["mean_loops"] == 3
    (folder / "model" / FILE).unlink()
    assert "no exits.json" in run(*auto).error
    assert run(*auto, "--exit-threshold", 0).json["requests"][0]["outputs"][0]["mean_loops"] == 2

    for content, problem in {
        "{": "EOF while parsing an object at line 1 column 1); remove the file, and fit it anew with yoco-u exits",
        json.dumps(exits | {"score": "gain", "heads": [[0.0, 1.0]]}): "a head has 2 numbers; expected 33",
        json.dumps(exits | {"score": "angular", "heads": [[0.0]]}): "1 heads came with score angular; expected 0",
        json.dumps(exits | {"model": "0" * 64}): "is fitted to another model, or to this one before it changed; remove",
        json.dumps(exits | {"threshold": -1}): "got -1; remove the file, and fit it anew with yoco-u exits",
    }.items():
        (folder / "model" / FILE).write_text(content)
        assert problem in run("generate", folder, "--prompt", "a", "--num-loops", "auto").error
        if content == "{":
            assert run("generate", folder, "--prompt", "a", "--max-tokens", 1).status == 0
            assert str(folder / "model" / FILE) in run("serve", folder, "--num-loops", "auto").error
    (folder / "model" / FILE).write_text("{}")
    assert "was not made by yoco-u" in run("exits", folder, *options).error


def test_the_test_time_scaling_curve(run: Any, workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaling, "_TOKENS", 4)
    monkeypatch.setattr(scaling, "_ROUNDS", 1)
    folder, plot = tmp_path / "a", tmp_path / "scaling.png"
    shutil.copytree(workspace / "a", folder)
    found = run("exits", folder, "--tokens", 320, "--plot", plot, "--json").json
    assert plot.read_bytes().startswith(b"\x89PNG")
    drawn = [one for one in found["results"] if one["tokens_per_second"] is not None]
    assert drawn == [one for one in found["results"] if one["score"] in (None, found["chosen"]["score"])]
    assert [one["decoded_loops"] for one in drawn[:2]] == [1, 2]
    assert found["dtype"] in ("float32", "bfloat16") and found["environment"]["cpus"] >= 1
    assert "tokens/s" in run("exits", folder, "--tokens", 320, "--plot", plot).out
    assert "tokens/s" not in run("exits", folder, "--tokens", 320).out
    assert "no such folder" in run("exits", folder, "--plot", tmp_path / "none" / "a.png").error


def test_mistakes(run: Any, workspace: Path) -> None:
    assert "the mean is to be 2 loops, but tokens run 1 to 2" in run("exits", workspace / "a", "--mean-loops", 2).error
    too_many = run("exits", workspace / "a", "--num-loops", 10**11, "--tokens", 64, "--sequence-length", 32)
    assert "100000000000 loops are too many, each takes the time of a pass; expected at most 256" in too_many.error
    one_loop = run("exits", workspace / "b").error
    assert "the model runs one loop, which no token can leave; give another model" in one_loop and "auto" not in one_loop
    assert not (workspace / "a" / "model" / FILE).exists()
