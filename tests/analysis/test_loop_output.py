"""Pictures, tables and page of a study, of every architecture."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from loop_models import LOOPED, PLAIN, batch, make
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from yoco_u.analysis.output import JSON, PAGE, About, write_study
from yoco_u.analysis.pictures import FILES, side_by_side
from yoco_u.analysis.study import COMPARED, MEASURES, Study, StudySettings, Subject, study, why_not
from yoco_u.analysis.tables import tables
from yoco_u.analysis.trace import unroll
from yoco_u.errors import UserError
from yoco_u.folders import is_mark, mark
from yoco_u.inference.exits import Exits

TOKENIZER = PreTrainedTokenizerFast(
    tokenizer_object=Tokenizer(models.WordLevel({f"<w{i}>": i for i in range(96)}, unk_token="<w0>"))
)


def studied(variant: str, name: str = "", num_loops: int | None = None, chosen: tuple[str, ...] = MEASURES) -> Study:
    model = make(variant)
    most = model.model.at_loops(num_loops).num_loops
    subject = Subject(name or variant, model, num_loops, Exits(num_loops=most, score="angular", threshold=0.3))
    wanted = [measure for measure in chosen if why_not(measure, [subject]) is None]
    return study(subject, lambda: [batch(2)], StudySettings(wanted), TOKENIZER)


def about(**left_out: str) -> About:
    return About("a <file>", 34, 17, left_out)


def assert_sound(source: str) -> None:
    """Loads nothing, and every identifier is there once."""
    assert not re.search(r"https?:|//[a-z]|@import|url\((?!#)|data:", source)
    ids = re.findall(r' id="([^"]+)"', source)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:url\(|href=")#([^)"]+)', source)) <= set(ids)
    HTMLParser().feed(source)


DRAWN = ("yoco_retention", "gated")


@pytest.mark.parametrize("variant", DRAWN)
def test_every_architecture_gets_what_makes_sense(variant: str, tmp_path: Path) -> None:
    found = studied(variant)
    measured = {measure for measure in MEASURES if getattr(found, measure)}
    assert measured == (set(MEASURES) if variant in LOOPED else {"angular", "attention"})
    paths = write_study([found], about(), tmp_path / "deep" / "out")
    assert set(paths) == {path for path in (tmp_path / "deep" / "out").iterdir() if not is_mark(path)}
    assert len(paths) == 2 + len(measured)
    for path in paths:
        if path.suffix == ".png":
            assert path.read_bytes().startswith(b"\x89PNG")
    source = (tmp_path / "deep" / "out" / PAGE).read_text()
    assert_sound(source)
    assert set(re.findall(r'<section id="(\w+)"', source)) == measured
    assert "a &lt;file&gt;" in source
    data = json.loads((tmp_path / "deep" / "out" / JSON).read_text())
    assert data["about"]["tokens"] == 34
    [told] = data["studies"]
    assert told == json.loads(json.dumps(found.as_json()))
    assert len(re.findall("<span style=", source)) == len(told["shown"]) == (34 if variant in LOOPED else 0)
    assert len(told["unrolled"]) == len(told["angular"]["layers"])
    assert {key for key in MEASURES if told[key]} == measured


def test_why_not_says_it_in_a_line() -> None:
    for variant in PLAIN:
        subject = Subject("run", make(variant))
        assert {measure for measure in MEASURES if why_not(measure, [subject])} == {
            "lens", "loss", "convergence", "exits", "drafts",
        }  # fmt: skip
        assert why_not("loss", [subject]) == "run has no loop"
        assert why_not("lens", [subject]) == "run runs no loop, and this measure follows one looped stage"
        assert why_not("loss", [subject, Subject("other", make("rins"))]) is None
        assert why_not("exits", [subject]) == "the model runs one loop, which no token can leave"
        assert why_not("drafts", [subject]) == "run runs no loop"
        assert why_not("lens", [Subject("run", make(variant), 2)]) is None
    once = Subject("once", make("yoco_u"), 1)
    assert why_not("loss", [once]) is None
    assert why_not("convergence", [once])
    assert (
        why_not("exits", [Subject("x", make("rins"))])
        == "x has no exits.json; run yoco-u exits first, or give --exit-threshold"
    )
    other = Subject("x", make("rins"), 2, Exits(num_loops=3, score="angular", threshold=0.1))
    assert "exits.json is for 3 loops, and 2 run here" in (why_not("exits", [other]) or "")
    assert "cannot take a wrong draft back" in (why_not("drafts", [Subject("x", make("yoco_retention"), 2)]) or "")


def test_several_models_in_one_picture(tmp_path: Path) -> None:
    first = studied("yoco_u", "_odd $name$")
    others = [studied(variant, variant, None, COMPARED) for variant in ("gated", "rins")]
    plain = study(Subject("yoco", make("yoco")), lambda: [batch()], StudySettings(COMPARED), TOKENIZER)
    assert [row.loops for row in plain.loss or []] == [1]
    studies = [first, *others, plain]
    write_study(studies, about(convergence="x has no loop"), tmp_path)
    source = (tmp_path / PAGE).read_text()
    assert_sound(source)
    assert "Left out: convergence, as x has no loop." in source
    assert len(json.loads((tmp_path / JSON).read_text())["studies"]) == 4
    shown = tables(studies)
    [losses] = shown["loss"]
    assert losses.head == ["loops", "_odd $name$", "gated", "rins", "yoco"]
    assert len(shown["angular"]) == 4
    assert [row[4] for row in losses.rows] == [f"T {plain.loss[0].loss:.4f}", *[""] * 7]  # type: ignore[index]


def test_layers_of_several_models_lie_side_by_side() -> None:
    looped, plain, full = (unroll(make(variant).model.architecture) for variant in ("yoco_u", "yoco", "rins"))
    assert side_by_side([looped]) == looped
    assert side_by_side([plain, looped]) == looped
    both = side_by_side([looped, full])
    assert [(layer.stage, layer.loop, layer.layer) for layer in both] == [(x.stage, x.loop, x.layer) for x in looped]
    assert {layer.attention for layer in both} == {"sliding or full", "cross or full"}


def test_tables_hold_the_figures() -> None:
    found = studied("yoco_u")
    shown = tables([found])
    [angular] = shown["angular"]
    assert angular.head == ["layer", "loop 1", "loop 2", "loop 3"]
    assert [row[0] for row in angular.rows] == ["sliding 1", "sliding 2", "cross 1", "cross 2", "whole loop of stage 1"]
    assert angular.rows[1][1:] == [f"{found.angular.layers[i]:.3f}" for i in (1, 3, 5)]  # type: ignore[union-attr]
    assert angular.rows[2][2:] == ["", ""]
    lens, samples = shown["lens"]
    assert lens.rows[-1][2] == "0.0000"
    assert lens.rows[-1][4] == "100.0%"
    assert all(len(row) == len(samples.head) for row in samples.rows)
    [losses] = shown["loss"]
    assert losses.rows[2] == ["3", f"T {found.loss[2].loss:.4f}"]  # type: ignore[index]
    assert len(losses.rows) == 8
    for measure in MEASURES:
        for table in shown[measure]:
            assert {len(row) for row in table.rows} == {len(table.head)}


def test_pictures_of_an_earlier_analysis_do_not_stay(tmp_path: Path) -> None:
    mark(tmp_path, "analysis")
    (tmp_path / FILES["attention"]).write_bytes(b"\x89PNG...Software\0yoco-u 0.1.0")
    (tmp_path / FILES["lens"]).write_bytes(b"the user's own")
    paths = write_study([studied("yoco", chosen=("angular",))], about(), tmp_path)
    assert {path.name for path in paths} == {PAGE, JSON, FILES["angular"]}
    assert {path for path in tmp_path.iterdir() if not is_mark(path)} == {*paths, tmp_path / FILES["lens"]}


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match=r"file is a file; name a folder"):
        write_study([studied("yoco", chosen=("angular",))], about(), tmp_path / "file" / "out")
