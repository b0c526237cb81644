"""The findings as data: what each says, what a grid needs for judging it, and the test that judges it."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from yoco_u import paper
from yoco_u.experiment.findings import comparisons, depth, drawn, inside, loops
from yoco_u.experiment.findings.verdicts import OPEN, Outcome
from yoco_u.experiment.intervals import NotDecidable
from yoco_u.experiment.results import Results


@dataclass(frozen=True)
class Finding:
    """A statement that a grid is judged by.

    Attributes:
        id: name of the finding in report.json.
        statement: what the paper (arXiv 2604.01220) says, with its number.
        needs: roles that the models of the grid must have, in words.
        test: judges the results of a grid; raises `NotDecidable` if the grid lacks what the finding needs.
    """

    id: str
    statement: str
    needs: str
    test: Callable[[Results], Outcome]


FINDINGS = (
    Finding(
        "equal-steps",
        "At equal steps YOCO-U has a lower loss than YOCO.",
        "yoco_u and yoco, equal tokens",
        comparisons.equal_tokens,
    ),
    Finding(
        "equal-flops",
        f"At equal training FLOPs YOCO-U has a lower loss than YOCO ({paper.EQUAL_FLOPS_GAIN} nats in the paper).",
        "yoco_u and a yoco matched to its FLOPs",
        comparisons.equal_flops,
    ),
    Finding(
        "equal-loss",
        f"YOCO-U needs fewer tokens than YOCO to the same loss ({paper.TOKEN_SAVING:.0%} fewer in the paper).",
        "yoco_u and yoco, equal tokens",
        comparisons.tokens_to_equal_loss,
    ),
    Finding(
        "order",
        "The order of the 1.3B comparison, from low to high perplexity: RINS, YOCO-U, Deeper, Universal Transformer, Deep, "
        "Upper Loop without shared KV, Upper Loop, YOCO, Transformer, ParScale.",
        "three or more of the paper's architectures, equal tokens",
        comparisons.order,
    ),
    Finding(
        "lower-half",
        "Looping the lower half (YOCO-U) is better than looping the upper half, with shared KV or without.",
        "yoco_u, upper_loop and upper_loop_without_shared_kv, equal tokens",
        comparisons.lower_half,
    ),
    Finding(
        "rins",
        "YOCO-U is on a par with RINS, which loops full attention.",
        "yoco_u and rins, equal tokens",
        comparisons.on_a_par_with_rins,
    ),
    Finding(
        "loops",
        "The loss keeps falling with T = 1, 2, 3, 5.",
        "yoco_u at three or more loop counts (yoco counts as one loop), equal tokens",
        loops.falls_with_loops,
    ),
    Finding(
        "less-by-loop",
        "Each further loop gains less than the one before.",
        "yoco_u at three or more loop counts (yoco counts as one loop), equal tokens",
        loops.each_by_less,
    ),
    Finding(
        "angular",
        "The angular distances between consecutive layers repeat a pattern in each loop, shrink loop by loop, and jump at the "
        "border of self- and cross-decoder.",
        "yoco_u with measures.angular",
        inside.angular,
    ),
    Finding(
        "retrieval",
        "YOCO-U and YOCO find needles far behind their window, as a Transformer does; a model of windows alone does not.",
        "window_only, transformer, yoco and yoco_u with measures.needles",
        inside.retrieval,
    ),
    Finding(
        "early-lag",
        "Not of the paper, which trains looped models without trouble: a plain loop starts slower than YOCO at this scale, and "
        "gates, a growing T, the initialisation or the learning rate remove that.",
        "yoco, plain_loop and tamed_loop or yoco_u (without gates it is a plain loop itself), equal tokens",
        loops.early_lag,
    ),
    Finding(
        "drawn-loops",
        f"Not of the paper, whose T is fixed: one model trained with drawn loop counts is within {drawn.NEAR} nats of those "
        "trained at T = 1, 2 and 3 alone.",
        "drawn_loops with training.evaluate_loops [1, 2, 3], and yoco_u at T = 1, 2, 3 (yoco counts as one loop), equal tokens",
        drawn.as_good_as_one_loop_count,
    ),
    Finding(
        "beyond-three",
        f"Not of the paper either: its loss at T = 5 and 8 is at most {drawn.NEAR} nats above its own at T = 3.",
        "drawn_loops with training.evaluate_loops [3, 5, 8]",
        drawn.no_worse_beyond,
    ),
)


@dataclass(frozen=True)
class Judged:
    """A finding, and what a grid says about it."""

    finding: Finding
    outcome: Outcome


def judge(results: Results) -> list[Judged]:
    """Judge all findings, and those on the generated tasks that models of the grid were asked.

    One that the grid is not made for is not decidable, and its text says what is missing.
    """
    return [Judged(finding, _outcome(finding, results)) for finding in (*FINDINGS, *_on_tasks(results))]


def _on_tasks(results: Results) -> list[Finding]:
    return [
        Finding(
            f"{task}-equal-{equal}",
            depth.statement(task, equal),
            depth.needs(equal),
            partial(depth.more_right, task=task, equal=equal),
        )
        for task in depth.measured_tasks(results)
        for equal in depth.EQUALS
    ]


def _outcome(finding: Finding, results: Results) -> Outcome:
    try:
        return finding.test(results)
    except NotDecidable as reason:
        return Outcome(OPEN, f"{str(reason)[0].upper()}{str(reason)[1:]} (needed: {finding.needs}).")
