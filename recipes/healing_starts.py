"""Which start heals best: one source converted in several ways, each healed by equally many tokens.

    python recipes/talk.py --no-chat
    python recipes/healing_starts.py --steps 60
    python recipes/healing_curves.py runs/talk/start-* --results recipes/results/starts

For 15, 5 and 1 global KVs, by each way in which `yoco-u convert` makes them (`fit`, `best`, `mean`), and by the ramp: fewer
made of the many that `talk.py` has healed. Teacher and texts are those of `talk.py`, in whose `--out` all runs lie; the
cross-decoder alone is trained, with nine tenths of the loss from the teacher.
"""

from pathlib import Path

from talk import convert, texts_of, train, write_config

from yoco_u.errors import UserError, in_one_line, script_parser
from yoco_u.folders import check_claim, claim

FEWER = (5, 1)
METHODS = ("fit", "best", "mean")
RAMP = "healed-15"


def main() -> None:
    arguments = script_parser(__doc__)
    arguments.add_argument("--steps", type=int, default=60, help="steps of each run, 1,024 tokens each")
    arguments.add_argument("--out", type=Path, default=Path("runs/talk"), help="the folder of talk.py")
    chosen = arguments.parse_args()

    if chosen.steps < 1:
        raise UserError(f"--steps is {chosen.steps}; expected at least 1")
    out: Path = chosen.out
    check_claim(out, "talk")
    text = texts_of(out)
    if missing := [str(one) for one in (*text, out / RAMP) if not one.exists()]:
        raise UserError(f"{', '.join(missing)} not found; run recipes/talk.py --no-chat first")
    claim(out, "talk")
    ways = [(f"15-{method}", out / "teacher", 15, method) for method in ("fit", "mean")]  # of one layer, `best` is the mean
    ways += [(f"{kvs}-{method}", out / "teacher", kvs, method) for kvs in FEWER for method in METHODS]
    ways += [(f"{kvs}-ramp", out / RAMP, kvs, "fit") for kvs in FEWER]
    for name, source, kvs, method in ways:
        model, heal = out / f"converted-{name}", out / f"start-{name}"
        convert(source, model, kvs, text, method)
        train(
            write_config(out, heal.name, model, text),
            heal,
            chosen.steps,
            "distillation.trains=cross",
            "distillation.share=0.9",
            "optimizer.learning_rate=3e-4",
            "training.sequence_length=1024",
            "training.evaluate_every=10",
            "training.keep_checkpoints=1",
        )


if __name__ == "__main__":
    in_one_line(main)
