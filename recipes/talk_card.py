"""Measures models that `talk.py` made beside their source, and writes a model card with a plot of the healing.

    python recipes/talk_card.py runs/talk/healed-15 runs/talk/healed-5 runs/talk/healed-1

The text of the perplexities was read by neither the fit nor the healing; the answers are greedy. `README.md`, `card.json` and
`healing.png` go to the folder `card` of the last run. What was measured is kept there in `measured.json`: a call that is killed
is continued by the same one.
"""

import json
from collections.abc import Callable
from functools import cache, partial
from itertools import pairwise
from pathlib import Path
from statistics import mean
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from talk import CORPORA, HELD_OUT, source_of

from yoco_u.architecture import Architecture
from yoco_u.budget import kv_bytes, parameters
from yoco_u.config import parse
from yoco_u.errors import UserError, in_one_line, script_parser
from yoco_u.evaluation.held_out import score_held_out
from yoco_u.evaluation.needle_grid import NeedleSettings, needle_grid
from yoco_u.evaluation.needles import load_haystack
from yoco_u.files import check_result, read_json, write_result, write_text
from yoco_u.folders import check_claim, claim
from yoco_u.formatting import duration, short_bytes, short_count
from yoco_u.inference import LLM, SamplingParams
from yoco_u.inference.chat_template import chat_tokens
from yoco_u.loading import saved_architecture, weights_digest
from yoco_u.plotting import colour, open_frame, save_png
from yoco_u.training import read_metrics
from yoco_u.training.run_folder import RunFolder, read_run, read_run_config

PROMPTS: list[str] = json.loads(Path(__file__).with_name("talk_prompts.json").read_text())
CONTEXTS = (2048, 6144)
CHATS = {"chats": "chats of the source"}
NEEDLES = NeedleSettings(kinds=("single_1", "single_2"), lengths=(2048, 4096, 7936), depths=3, samples=1)
CACHE = 8192


def main() -> None:
    arguments = script_parser(__doc__)
    arguments.add_argument("runs", type=Path, nargs="+", help="runs of talk.py, each from the one before")
    runs: list[Path] = arguments.parse_args().runs
    last = runs[-1]
    config, read = read_run_config(last), [read_run(run) for run in runs]
    if config.distillation is None:
        raise UserError(f"{last}: is no run of talk.py, since it has no teacher")
    check_chain(runs)
    out, texts = last / "card", last.parent
    check_claim(out, "card")
    for name in ("card.json", "healing.png", "measured.json"):
        check_result(out / name)
    if (out / "README.md").exists():  # in which people may have written since
        raise UserError(f"{out / 'README.md'}: is there already; move it elsewhere")
    if missing := [str(file) for entry in CORPORA | CHATS if not (file := texts / HELD_OUT.format(entry)).exists()]:
        raise UserError(f"{', '.join(missing)} not found; give runs in the folder of talk.py")
    claim(out, "card")
    kept = Measured(out / "measured.json")
    found: dict[str, Any] = {
        "source": measure(RunFolder(last).paths.find(config.distillation.teacher), texts, kept),
        "healed": [healing(run) | measure(str(run), texts, kept) for run in runs],
        "stages": [stage.model_dump() for stage in config.architecture.stages],
        "window": config.architecture.window,
        "environment": {name: value for name, value in read[-1].environment.items() if name != "paths"},
    }
    write_result(out / "card.json", found)
    plot(found["healed"], out / "healing.png")
    write_text(out / "README.md", card(found))
    print(f"wrote {out / 'README.md'}")


def check_chain(runs: list[Path]) -> None:
    """Refuse runs that are not each from the one before, with a number of global KVs of its own, which names its column."""
    numbers = [read_run_config(run).architecture.global_kvs for run in runs]
    for before, run in pairwise(runs):
        if (made := source_of(run)) not in (None, before.name):
            raise UserError(f"{run}: was made of {made}, and not of {before.name}; give runs that are each from the one before")
    for place, run in enumerate(runs):
        if (first := numbers.index(numbers[place])) < place:
            raise UserError(f"{run}: has {numbers[place]} global KVs, as {runs[first]} has; give one run for each number")


def healing(run: Path) -> dict[str, Any]:
    """How a run healed its model, in how many tokens, FLOPs and seconds."""
    records = read_metrics(run)
    return {
        "global_kvs": read_run_config(run).architecture.global_kvs,
        "evaluations": [record for record in records if record["kind"] == "evaluation"],
        "tokens": records[-1]["tokens"],
        "flops": records[-1]["flops"],
        "seconds": max(record["seconds"] for record in records if "seconds" in record),
    }


class Measured:
    """What has been measured so far, in a file."""

    def __init__(self, path: Path) -> None:
        self.path, self.values = path, read_json(path, dict[str, Any], {})

    def get(self, name: str, measured: Callable[[], Any]) -> Any:
        """A value by its name, measured if it is not there yet."""
        if name not in self.values:
            print(f"measuring {name}", flush=True)
            self.values[name] = measured()
            write_result(self.path, self.values)
        return self.values[name]


def measure(path: str, texts: Path, kept: Measured) -> dict[str, Any]:
    """Perplexities, needles, greedy answers, and bytes of the cache of one model."""
    architecture, llm = parse(Architecture, saved_architecture(path), path), cache(partial(engine, path))
    model = f"{path} ({weights_digest(path)[:16]})"

    def perplexity(entry: str, length: int) -> float:
        scores = score_held_out(Path(path), [str(texts / HELD_OUT.format(entry))], sequence_length=length)
        return scores.results[0].perplexity

    return {
        "parameters": parameters(architecture).total,
        "cache_bytes": kv_bytes(architecture, CACHE),
        "perplexity": {
            what: kept.get(f"{model}: perplexity, {what}", partial(perplexity, entry, length))
            for entry, kind in (CORPORA | CHATS).items()
            for length in (CONTEXTS if entry in CORPORA else CONTEXTS[:1])
            for what in [f"{kind}, {length} tokens"]
        },
        "needles": kept.get(f"{model}: needles", lambda: needles(llm(), texts)),
        "answers": kept.get(f"{model}: answers", lambda: answers(llm())),
    }


def engine(path: str) -> LLM:
    return LLM(path, max_model_len=CACHE, cache_tokens=2 * CACHE, max_num_seqs=4)


def needles(llm: LLM, texts: Path) -> dict[str, float]:
    """The share of the facts that the answers have, by length."""
    found = needle_grid(llm, NEEDLES, load_haystack([str(texts / HELD_OUT.format("documentation"))]))
    return {str(length): mean(one.recall for one in found if one.length == length) for length in NEEDLES.lengths}


def answers(llm: LLM) -> list[str]:
    """Greedy answers to `PROMPTS`."""
    tokenizer = llm.engine.tokenizer
    assert tokenizer is not None
    prompts = [chat_tokens(tokenizer, [{"role": "user", "content": prompt}]) for prompt in PROMPTS]
    return [answer.outputs[0].text for answer in llm.generate(prompts, SamplingParams(temperature=0, max_tokens=80))]


def plot(healed: list[dict[str, Any]], path: Path) -> None:
    figure = Figure(figsize=(6, 4), layout="constrained", dpi=150)
    axes = figure.add_subplot()
    before = 0
    for number, one in enumerate(healed):
        points = one["evaluations"]
        axes.plot(
            [before + point["tokens"] for point in points], [point["perplexity"] for point in points], marker="o",
            markersize=3.5, color=colour(number), label=in_words(one),
        )  # fmt: skip
        before += one["tokens"]
    axes.legend(frameon=False)
    style(axes)
    save_png(figure, path)


def style(axes: Axes) -> None:
    """How perplexities over tokens of healing are drawn."""
    axes.set(xlabel="tokens of healing", ylabel="perplexity of the validation split", yscale="log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    open_frame(axes, grid=0.2, which="both")


def card(found: dict[str, Any]) -> str:
    """The model card, in Markdown."""
    source, healed, machine = found["source"], found["healed"], found["environment"]
    last = healed[-1]
    share = source["cache_bytes"] / last["cache_bytes"]
    parts = [
        "---\nlicense: apache-2.0\nbase_model: HuggingFaceTB/SmolLM2-135M-Instruct\nlibrary_name: yoco-u\n---\n",
        "# SmolLM2-135M-Instruct as a YOCO-U\n",
        f"{short_count(last['parameters'])} parameters: " + ", then ".join(map(_stage, found["stages"])) + ". "
        f"The sliding layers see {found['window']} tokens; the cross layers read {in_words(last)}. "
        f"At 8K tokens the cache takes {short_bytes(last['cache_bytes'])}, {share:.1f} times less than the source's.\n",
        "It was converted by `yoco-u convert` with least squares, and healed by distillation from the source, on "
        f"{machine['cpus']} cores ({machine['cpu']}):\n",
        *(
            f"- with {in_words(one)}: {short_count(one['tokens'])} tokens, {one['flops']:.2g} FLOPs, {duration(one['seconds'])}"
            for one in healed
        ),
        "\nThe source's weights come from a GGUF file in Q4_1.\n",
        "![Perplexity over the tokens of healing](healing.png)\n",
        "## Beside the source\n",
        _table({"source": source} | {in_words(one): one for one in healed}),
        "\nPerplexity is that of documentation (English) and sources (code) of installed packages, and of chats that the "
        "source wrote, none of which the fit or the healing read, in rows of so many tokens. Half of the loss of healing is "
        "that of the text itself, so the model also learns what such documentation and sources are like, which the source "
        "never did; of its own chats the source knows all there is to know. Needles are facts hidden in long texts: how many "
        "the answers have.\n",
        "## Answers\n\nGreedy, at most 80 tokens.\n",
        *(
            f"**{prompt}**\n\n- source: {_inline(source['answers'][number])}\n"
            + "".join(f"- {in_words(one)}: {_inline(one['answers'][number])}\n" for one in healed)
            for number, prompt in enumerate(PROMPTS)
        ),
    ]
    return "\n".join(parts)


def in_words(healed: dict[str, Any]) -> str:
    many = healed["global_kvs"]
    return f"{many} global KV{'s' * (many > 1)}"


def _stage(stage: dict[str, Any]) -> str:
    loops = f", {stage['loops']} loops" if stage["loops"] > 1 else ""
    return f"{stage['layers']} {stage['attention']} layers{loops}"


def _table(models: dict[str, Any]) -> str:
    rows = [["", *models], ["---"] * (len(models) + 1)]
    for what, best in models["source"]["perplexity"].items():
        of_all = (one["perplexity"][what] for one in models.values())
        rows.append([f"perplexity, {what}", *(f"{own:.2f} ({own / best:.2f}x)" for own in of_all)])
    for length in models["source"]["needles"]:
        rows.append([f"needles, {length} tokens", *(f"{one['needles'][length]:.0%}" for one in models.values())])
    rows.append([f"cache, {CACHE} tokens", *(short_bytes(one["cache_bytes"]) for one in models.values())])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _inline(text: str) -> str:
    return " ".join(text.split()) or "(nothing)"


if __name__ == "__main__":
    in_one_line(main)
