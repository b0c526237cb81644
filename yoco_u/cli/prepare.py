"""`yoco-u prepare`."""

from json import dumps
from pathlib import Path
from typing import Annotated

import typer

from yoco_u.cli.output import print_json
from yoco_u.cli.settings import is_override, load_run_config
from yoco_u.config import Config, apply_overrides, parse, shown
from yoco_u.errors import UserError


def prepare(
    config: Annotated[
        str | None,
        typer.Argument(metavar="CONFIG", help="A run config, whose data settings are used: a YAML file or a packaged name."),
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="Settings to change, such as data.vocab_size=2048."),
    ] = None,
    corpus: Annotated[
        list[str] | None,
        typer.Option(
            "--corpus",
            help="What to read: stdlib, packages, documentation, a file, a folder, a glob, hf:dataset, synthetic:TASK; "
            "can be given again.",
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Folder of the dataset. \\[default: the config's dataset]")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the dataset's index as JSON.")] = False,
) -> None:
    """Turn a corpus into a tokenizer and packed shards.

    Reads text, JSON, CSV and Parquet files and Hugging Face datasets; trains a
    byte-level BPE tokenizer unless data.tokenizer names one. A dataset that is
    already there and came from equal settings is left as it is.

    [bold]Examples[/bold]

      yoco-u prepare --corpus stdlib --out data/stdlib

      yoco-u prepare --corpus 'a/*.txt' --out data/a data.vocab_size=8192

      yoco-u prepare --corpus synthetic:p-hop:levels=1-8 --out data/p-hop

      yoco-u prepare 8m
    """
    changes = list(overrides or [])
    if config is not None and is_override(config):
        changes.insert(0, config)
        config = None
    for change in changes if config is not None else []:
        if change.partition(".")[0].partition("=")[0] not in ("data", "dataset"):
            raise UserError(f"{shown(change)} has no effect here: prepare reads the data settings alone; leave it out")
        if change.startswith("dataset=") and out is not None:
            raise UserError(f"{shown(change)} has no effect here: --out names the folder; give one of the two")
    if corpus and any(change.startswith("data.corpus=") for change in changes):
        raise UserError("data.corpus has no effect here: --corpus says what to read; give one of the two")
    changes += [f"data.corpus={dumps(corpus)}"] if corpus else []
    if config is not None:
        run = load_run_config(config, changes)
        if run.data is None:
            raise UserError(f"{config}: has no data settings to prepare from; give --corpus and --out")
        data, target = run.data, out or Path(run.dataset)
    elif corpus and out:
        from yoco_u.data import DataConfig

        class DataOnly(Config):
            data: DataConfig

        data, target = parse(DataOnly, apply_overrides({}, changes), "settings").data, out
    else:
        raise UserError("nothing to prepare: give a CONFIG, or both --corpus and --out; see yoco-u prepare --help")
    from yoco_u.data import prepare as prepare_dataset

    index = prepare_dataset(data, target, progress=not json)
    if json:
        print_json(index.model_dump(mode="json") | {"folder": str(target)})
        return
    for name, split in index.splits.items():
        print(f"{name}: {split.documents:,} documents, {split.bytes:,} bytes, {split.tokens:,} tokens")
    print(f"vocabulary {index.vocab_size:,}, in {target}")
