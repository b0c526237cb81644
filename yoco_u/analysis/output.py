"""The files of a study: one JSON file, one page, and a PNG for each measure."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from yoco_u.analysis.pictures import FILES, pictures, write_png
from yoco_u.analysis.study import Study
from yoco_u.analysis.tables import tables
from yoco_u.files import check_result, is_result, write_result
from yoco_u.folders import check_claim, check_place, claim
from yoco_u.plotting import svg
from yoco_u.report.page import render_page, write_page

JSON, PAGE = "analysis.json", "analysis.html"


@dataclass(frozen=True)
class About:
    """What a study measured on, for the head of the page.

    Attributes:
        text: description of the text: the names of the files, or "validation split".
        tokens: number of targets in it.
        sequence_length: tokens per row.
        left_out: the measures that make no sense for the model, each with the reason.
    """

    text: str
    tokens: int
    sequence_length: int
    left_out: dict[str, str]


def write_study(studies: Sequence[Study], about: About, folder: Path) -> list[Path]:
    """Write all files, each whole or not at all, and remove the pictures of an earlier analysis that this one has not.

    Args:
        studies: the study that is shown whole, then those that it is compared with.
        about: what the studies measured on.
        folder: where the files go; it is made if it is missing.

    Returns:
        Paths of the files.

    Raises:
        UserError: if the folder holds anything but an analysis.
        OSError: if it cannot be written to.
    """
    drawn = pictures(studies)
    page = _page(studies, about)
    claim(folder, *_OURS)
    write_result(folder / JSON, {"about": asdict(about), "studies": [study.as_json() for study in studies]})
    for picture in drawn.values():
        write_png(picture, folder / picture.file)
    write_page(folder / PAGE, page)
    for measure, name in FILES.items():
        if measure not in drawn and (folder / name).is_file() and is_result(folder / name):
            (folder / name).unlink()
    return [folder / name for name in (JSON, PAGE, *(picture.file for picture in drawn.values()))]


def check_folder(folder: Path) -> None:
    """Check, before anything is computed, that an analysis may be written to a folder; errors as of `write_study`."""
    check_claim(folder, *_OURS)
    if not folder.exists() and folder.parent.is_dir():
        check_place(folder)
    for name in (PAGE, JSON, *FILES.values()):
        check_result(folder / name)


def _was_analysis(folder: Path) -> bool:
    page = folder / PAGE
    return page.is_file() and is_result(page)


_OURS = ("analysis", _was_analysis)


def _page(studies: Sequence[Study], about: About) -> str:
    drawn, shown = pictures(studies), tables(studies)
    sections = [
        {
            "measure": measure,
            "title": _TITLES[measure],
            "how": _HOW[measure],
            "plots": [(panel.title, svg(panel.draw, panel.size), panel.size[0] > 7) for panel in picture.panels],
            "tables": shown[measure],
            "heat": _heat(studies[0]) if measure == "exits" else [],
        }
        for measure, picture in drawn.items()
    ]
    return render_page(
        "analysis.html.jinja",
        title=f"Inside the loops of {studies[0].name}",
        studies=studies,
        about=about,
        sections=sections,
    )


def _heat(study: Study) -> list[tuple[str, float, int]]:
    """Of each token that is shown its text, how dark it is from 0 to 1, and how many loops it ran."""
    return [(one.text, (one.loops - 1) / (study.num_loops - 1), one.loops) for one in study.shown]


_TITLES = {
    "angular": "Angular distance",
    "lens": "Logit lens",
    "loss": "Loss against loops",
    "convergence": "Loops to convergence",
    "attention": "Attention span",
    "exits": "Where tokens exit",
    "drafts": "What speculation accepts",
}
_HOW = {
    "angular": (
        "arccos of the cosine similarity of what a layer reads and what it writes, over pi, averaged over all tokens: "
        "0 is the same direction, 0.5 a right angle. Dotted lines part loops, solid ones stages."
    ),
    "lens": (
        "What the model predicts after each loop: directly, by final norm and LM head on the state of that loop, or by the "
        "rest of the network run from it, which is the model at this loop count. KL is that of the final prediction from the "
        "loop's."
    ),
    "loss": (
        "The same weights run with fewer and with more loops than they were trained with. A model without a loop is one point."
    ),
    "convergence": (
        "A token's prediction is steady from the first loop whose likeliest next token is also that of every later loop; its "
        "state, from the first loop after which no loop moves it by more than the tolerance, as a share of its length. The "
        "last loop counts those that change to the end. Kinds are of the token to be predicted; quarters of tokens are by "
        "their loss."
    ),
    "attention": (
        "Softmax weights from captured queries and keys, at evenly spaced positions of every row, averaged over heads. "
        "Even weights are what a layer would have if it looked at all tokens it sees alike. The first token is the document's, "
        "over positions that see it behind themselves."
    ),
    "exits": (
        "How many loops tokens run in the engine, where each leaves the loop once its score is below the threshold. Kinds are "
        "of the token to be predicted; quarters of tokens are by the loss of its prediction; places are counted from where the "
        "document, or its part in the row, begins. In the text, a token is the darker the more loops it ran."
    ),
    "drafts": (
        "Behind evenly spaced places of the text, the engine drafts tokens of the greedy continuation and verifies them in one "
        "step: by the first loop and the cross-decoder, or by what stood behind the same tokens before (prompt). A draft is "
        "accepted up to its first token that all loops would not have chosen."
    ),
}
