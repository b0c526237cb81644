"""Recipes overwrite nothing that is not theirs, and say what is wrong in one line, before they compute anything."""

import importlib
import random
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from models import architecture, build

from yoco_u.errors import UserError

RECIPES = Path(__file__).parents[1] / "recipes"


@pytest.mark.parametrize(
    ("recipe", "arguments", "mine", "said"),
    [
        ("talk.py", ["--out", "mine"], "mine/thesis", "mine: holds other files"),
        ("talk.py", ["--minutes", "nan", "--out", "new"], "mine", "--minutes is nan"),
        ("talk.py", ["--steps", "0", "--out", "new"], "mine", "--steps is 0"),
        ("arithmetic.py", ["--out", "mine"], "mine/thesis", "mine: holds other files"),
        (
            "arithmetic.py",
            ["--out", "new", "--results", "mine"],
            "mine/curves.json",
            "curves.json: is there and was not made by",
        ),
        ("healing_curves.py", ["run", "--results", "mine"], "mine/healing.png", "healing.png: is there and was not made by"),
        ("healing_loops.py", ["--results", "mine"], "mine/loops.json", "loops.json: is there and was not made by"),
        ("healing_starts.py", ["--out", "mine"], "mine/thesis", "mine: holds other files"),
        ("needle_corpus.py", ["--out", "mine"], "mine", "mine: is there already"),
        ("talk_card.py", ["run"], "mine", "run: no run here"),
    ],
)
def test_what_a_user_has_stays(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    recipe: str,
    arguments: list[str],
    mine: str,
    said: str,
) -> None:
    (tmp_path / mine).parent.mkdir(exist_ok=True)
    (tmp_path / mine).write_text("years of work")
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(RECIPES))
    monkeypatch.setattr(sys, "argv", [recipe, *arguments])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(RECIPES / recipe), run_name="__main__")
    line = capsys.readouterr().err
    assert ended.value.code == 2 and line.startswith("error: ") and said in line and line.count("\n") == 1, line
    assert sorted(tmp_path.rglob("*")) == before and (tmp_path / mine).read_text() == "years of work"


def test_what_a_fit_never_reaches_has_no_number_of_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(RECIPES)
    reached = importlib.import_module("healing_curves").reached
    assert reached(0.0, -0.5, 0.1) == pytest.approx(100.0)
    assert [reached(0.0, slope, 0.1) for slope in (0.0, 0.3, -1e-6)] == [None] * 3


@pytest.mark.parametrize("name", ["dataset", "teacher", "sequence_length", "evaluation_tokens", "dtype"])
def test_runs_that_were_measured_differently_are_refused(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.syspath_prepend(RECIPES)
    curves = importlib.import_module("healing_curves")
    plain = {"dataset": "data", "teacher": "source", "sequence_length": 2048, "evaluation_tokens": 8192, "dtype": "float32"}
    settings = [plain, plain, plain | {name: 5}]
    configs = [
        SimpleNamespace(distillation=SimpleNamespace(teacher=one["teacher"]), training=SimpleNamespace(**one))
        for one in settings
    ]
    runs = [Path(f"run-{number}") for number in range(3)]
    monkeypatch.setattr(curves, "run_dataset", lambda run: Path(str(settings[runs.index(run)]["dataset"])))
    monkeypatch.setattr(curves, "RunFolder", lambda run: SimpleNamespace(paths=SimpleNamespace(find=lambda path: path)))
    curves.check_measured_alike(runs[:2], configs[:2])
    with pytest.raises(UserError, match=rf"run-2: {name} is \S*5, but .* in run-0"):
        curves.check_measured_alike(runs, configs)


@pytest.mark.parametrize("made", ["healed-5", "converted-5"])
def test_a_model_that_was_made_of_another_one_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, made: str) -> None:
    """Also if it was only converted: what it is made of is written before."""
    monkeypatch.syspath_prepend(RECIPES)
    talk = importlib.import_module("talk")
    heal, model = tmp_path / "healed-5", tmp_path / "converted-5"
    talk.check_source(heal, model, tmp_path / "healed-15")
    talk.check_source(heal, model, tmp_path / "teacher")  # nothing was made of the other
    model.mkdir()
    if made == "healed-5":
        (tmp_path / "converted-5.json").unlink()
        (tmp_path / "healed-5.json").write_text('{"steps": 4, "asked": {"steps": 4}, "source": "teacher"}')
    talk.check_source(heal, model, tmp_path / "teacher")
    with pytest.raises(UserError, match=f"{made}: was made of teacher, and not of healed-15"):
        talk.check_source(heal, model, tmp_path / "healed-15")


def test_texts_are_as_many_as_the_first_call_reads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(RECIPES)
    talk = importlib.import_module("talk")
    teacher = tmp_path / "teacher"
    build(architecture("yoco_u")).save_pretrained(teacher)
    assert [talk.tokens_of(tmp_path, teacher, 20.0, steps) for steps in (30, 60, None)] == [30 * 2048] * 3
    total = sum(parameter.numel() for parameter in build(architecture("yoco_u")).parameters())
    for rate in (1e12, 3e14):  # of two cores, and of a GPU
        monkeypatch.setattr(talk, "gemm_rate", lambda *_, rate=rate, **__: rate)
        (tmp_path / "texts.json").unlink()
        assert talk.tokens_of(tmp_path, teacher, 20.0, None) == pytest.approx(0.5 * rate * 1200 / (8 * total), abs=1)


def test_a_card_is_of_runs_each_from_the_one_before(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(RECIPES)
    card = importlib.import_module("talk_card")
    numbers = {"healed-15": 15, "healed-5": 5, "again": 5}
    configs = {name: SimpleNamespace(architecture=SimpleNamespace(global_kvs=kvs)) for name, kvs in numbers.items()}
    monkeypatch.setattr(card, "read_run_config", lambda run: configs[run.name])
    first, second, again = (tmp_path / name for name in numbers)
    (tmp_path / "healed-5.json").write_text('{"steps": 4, "source": "healed-15"}')
    card.check_chain([first, second])
    with pytest.raises(UserError, match="healed-5: was made of healed-15, and not of again"):
        card.check_chain([again, second])
    with pytest.raises(UserError, match=r"again: has 5 global KVs, as \S*healed-5 has"):
        card.check_chain([first, second, again])


def test_a_recall_answers_with_the_one_part_that_a_question_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(RECIPES)
    recall_chats = importlib.import_module("recall_texts").recall_chats
    drawn = random.Random(0)

    def part(number: int) -> str:
        begin = "the same six words begin it" if number % 4 == 0 else f"part {number} of this text says"
        return begin + "".join(f" w{drawn.randrange(10**6)}" for _ in range(drawn.choice((1, 8, 90))))

    documents = ["\n \n".join(map(part, range(60))) for _ in range(30)] + ["", "one line", "\n\n" * 9]
    chats = list(recall_chats(documents))
    assert 10 < len(chats) <= 30 and chats == list(recall_chats(documents))
    for chat in chats:
        assert [turn["role"] for turn in chat] == ["user", "assistant"] * (len(chat) // 2) and len(chat) <= 8
        text, question, begin = chat[0]["content"].rpartition("Repeat, word for word, the part that begins with: ")
        for turn, answer in zip(chat[::2], chat[1::2], strict=True):
            begin = turn["content"].rpartition(question)[2]
            assert [one for one in text.split("\n\n") if one.startswith(begin)] == [answer["content"]]
            assert 40 <= len(answer["content"]) < 500
