"""Fine-tuning on chats: which tokens are learned, that chats do not see each other, and that a model learns to answer."""

import codecs
import importlib.util
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from chat_models import save_chat_model
from models import architecture, build

from yoco_u.cli import main
from yoco_u.errors import UserError
from yoco_u.inference.chat_template import chat_text
from yoco_u.loading import load_model
from yoco_u.model import save_model
from yoco_u.tuning import Chat, SFTSettings, examples, fine_tune, read_chats

needs_trl = pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="TRL is not installed")
CPU = torch.device("cpu")
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>\n{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
FORGETFUL = (
    "{% for m in messages %}<{{ m.role }}>"
    "{% if m.role == 'assistant' and not loop.last %}-{% else %}{{ m.content }}{% endif %}|"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small YOCO-U of two gated loops, with a chat template."""
    return save_chat_model(tmp_path_factory.mktemp("model"), TEMPLATE, {"window": 16, "loops": 2, "loop_gate": 0.3})


def chat(*contents: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]


def write_chats(path: Path, *chats: list[dict[str, str]]) -> Path:
    path.write_text("".join(json.dumps({"messages": one, "id": 1}) + "\n\n" for one in chats))
    return path


def marked(model: Path, template: str, messages: list[dict[str, str]]) -> list[tuple[str, str]]:
    """The whole text of each example, and what of it is the assistant's."""
    _, tokenizer = load_model(model, CPU)
    tokenizer.chat_template = template
    found = []
    for one in examples([Chat("here", messages)], tokenizer):
        own = [token for token, is_own in zip(one.input_ids, one.assistant, strict=True) if is_own]
        found.append((tokenizer.decode(one.input_ids), tokenizer.decode(own)))
    return found


def test_what_the_assistant_says_is_marked(model: Path) -> None:
    messages = [{"role": "system", "content": "be <assistant>"}, *chat("hi", "hello ä🦉", "how?", "well"), *chat("more")]
    [(text, own)] = marked(model, TEMPLATE, messages)
    assert own == "hello ä🦉</s>\nwell</s>\n"
    assert text == chat_text_of(model, messages[:-1])


def chat_text_of(model: Path, messages: list[dict[str, str]]) -> str:
    return chat_text(load_model(model, CPU)[1], messages, generation_prompt=False)


def test_a_template_that_forgets_gives_an_example_for_each_answer(model: Path) -> None:
    found = marked(model, FORGETFUL, chat("a", "think 1", "b", "think 2"))
    assert found == [
        ("<user>a|<assistant>think 1|", "think 1|"),
        ("<user>a|<assistant>-|<user>b|<assistant>think 2|", "think 2|"),
    ]


def test_a_template_that_writes_the_time_writes_one_time(model: Path) -> None:
    [(text, own)] = marked(model, "{{ strftime_now('%f') }}" + TEMPLATE, chat("hi", "hello", "how?", "well"))
    assert own == "hello</s>\nwell</s>\n" and text[6:] == chat_text_of(model, chat("hi", "hello", "how?", "well"))


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b"{", "not JSON"),
        (b'{"text": "x"}', "messages"),
        (b'{"messages": []}', "messages"),
        (b'{"messages": [{"role": "user", "content": "x"}]}', "nothing to learn"),
        (b'{"messages": [{"role": "robot", "content": "x"}]}', "messages.0.role"),
        (b'{"messages": [{"role": "assistant", "content": 5}]}', "messages.0.content"),
        (b"\xff", "not JSON"),
    ],
)
def test_lines_that_are_no_chat_are_named(tmp_path: Path, line: bytes, said: str) -> None:
    file = write_chats(tmp_path / "chats.jsonl", chat("a", "b"))
    file.write_bytes(file.read_bytes() + line + b"\n")
    with pytest.raises(UserError, match=said) as error:
        list(read_chats([file]))
    assert "chats.jsonl, line 3" in str(error.value)


def test_a_byte_order_mark_is_no_part_of_the_first_line(tmp_path: Path) -> None:
    file = write_chats(tmp_path / "chats.jsonl", chat("a", "b"))
    file.write_bytes(codecs.BOM_UTF8 + file.read_bytes())
    assert [one.messages for one in read_chats([file])] == [chat("a", "b")]


def test_a_template_that_refuses_names_the_chat(model: Path) -> None:
    _, tokenizer = load_model(model, CPU)
    tokenizer.chat_template = "{{ raise_exception('no') }}"
    with pytest.raises(UserError, match=r"line 7: .*no"):
        list(examples([Chat("x, line 7", chat("a", "b"))], tokenizer))
    for silent in ("{# nothing #}", " ", "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"):
        tokenizer.chat_template = silent
        with pytest.raises(UserError, match="line 7: the chat template writes nothing of what the assistant says"):
            list(examples([Chat("x, line 7", chat("a", "b"))], tokenizer))
    tokenizer.chat_template = "{{ messages | length }}"
    with pytest.raises(UserError, match="behind the prompt"):
        list(examples([Chat("x, line 7", chat("a", "b"))], tokenizer))


@needs_trl
@pytest.mark.parametrize(
    ("files", "settings", "said"),
    [
        (["empty.jsonl"], {}, r"no chat in \S*empty.jsonl"),
        ([], {}, "no chat in no file"),
        (["chats.jsonl"], {"batch_rows": 8, "micro_batch_rows": 3}, "micro_batch_rows 3 does not divide the 8 rows"),
        (["chats.jsonl"], {"batch_rows": 2, "micro_batch_rows": 4}, "micro_batch_rows 4 does not divide the 2 rows"),
        (["chats.jsonl"], {"length": 7}, "no answer within length 7 in"),
    ],
)
def test_what_cannot_be_trained_leaves_nothing(
    model: Path, tmp_path: Path, files: list[str], settings: dict[str, Any], said: str
) -> None:
    write_chats(tmp_path / "empty.jsonl")
    write_chats(tmp_path / "chats.jsonl", chat("a", "b"))
    with pytest.raises(UserError, match=said):
        fine_tune(model, [tmp_path / file for file in files], SFTSettings(**settings), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@needs_trl
@pytest.mark.parametrize("rank", [0, 4])
def test_a_model_learns_what_the_assistant_says(model: Path, tmp_path: Path, rank: int) -> None:
    file = write_chats(tmp_path / "chats.jsonl", *[chat(f"{n}?", f"it is {n}!") for n in range(10)])
    settings = SFTSettings(steps=30, length=64, batch_rows=2, micro_batch_rows=2, learning_rate=2e-2, lora_rank=rank)
    summary = fine_tune(model, [file], settings, tmp_path / "out")
    losses = [one["loss"] for one in summary["losses"]]
    assert summary["steps"] == 30 and summary["chats"] == 10 and losses[-1] < 0.5 * losses[0]
    before, _ = load_model(model, CPU)
    after, _ = load_model(tmp_path / "out", CPU)
    assert after.config.architecture == before.config.architecture
    assert after.state_dict().keys() == before.state_dict().keys()
    if rank:
        untouched = ("norm", "embed_tokens", "loop_gates", "lm_head")
        for name, tensor in before.state_dict().items():
            assert torch.equal(after.state_dict()[name], tensor) == any(part in name for part in untouched), name


@needs_trl
def test_the_first_loss_is_that_of_each_chat_alone(model: Path, tmp_path: Path) -> None:
    """The packed row's loss: every assistant's token, predicted from its own chat alone."""
    chats = [chat("a" * n, "b" * n, "c", "d" * (5 - n)) for n in range(1, 4)]
    file = write_chats(tmp_path / "chats.jsonl", *chats)
    settings = SFTSettings(steps=1, length=256, batch_rows=1, learning_rate=1e-9)
    found = fine_tune(model, [file], settings, tmp_path / "out")["losses"][0]["loss"]
    ours, tokenizer = load_model(model, CPU)
    total, count = 0.0, 0
    for one in examples(read_chats([file]), tokenizer):
        ids = torch.tensor([one.input_ids])
        with torch.no_grad():
            losses = torch.nn.functional.cross_entropy(ours(ids).logits[0, :-1], ids[0, 1:], reduction="none")
        total += float(losses[torch.tensor(one.assistant[1:])].sum())
        count += sum(one.assistant[1:])
    assert found == pytest.approx(total / count, rel=1e-4)


@needs_trl
def test_what_is_cut_is_told_and_not_counted(model: Path, tmp_path: Path) -> None:
    file = write_chats(tmp_path / "chats.jsonl", chat("a", "b" * 100), chat("a" * 100, "b"), chat("a", "b"))
    said: list[str] = []
    settings = SFTSettings(steps=1, length=64, batch_rows=1, seed=2**32 - 1)
    summary = fine_tune(model, [file], settings, tmp_path / "out", said.append)
    alone = list(examples(read_chats([file]), load_model(model, CPU)[1]))
    assert (summary["chats"], summary["assistant_tokens"]) == (2, sum(sum(one.assistant[:64]) for one in alone))
    assert any(line.startswith("2 chats are longer than length 64: cut") for line in said)


@needs_trl
def test_a_model_that_diverged_is_not_saved(model: Path, tmp_path: Path) -> None:
    file = write_chats(tmp_path / "chats.jsonl", chat("a", "b"))
    settings = SFTSettings(steps=3, length=64, batch_rows=1, learning_rate=1e38)
    with pytest.raises(UserError, match=r"(is nan in step \d|holds NaN or infinity).*; lower learning_rate"):
        fine_tune(model, [file], settings, tmp_path / "out")
    assert not (tmp_path / "out" / "model").exists()


@needs_trl
@pytest.mark.parametrize("rank", [0, 4])
def test_it_ends_the_same_wherever_it_was_killed(model: Path, tmp_path: Path, rank: int) -> None:
    """Behind the last checkpoint there is nothing to train; one that was not written to its end is passed over."""
    file = write_chats(tmp_path / "chats.jsonl", *[chat(f"{n}?", f"it is {n}!") for n in range(10)])
    settings = SFTSettings(steps=4, length=64, batch_rows=2, save_every=2, learning_rate=1e-3, lora_rank=rank)
    whole = fine_tune(model, [file], settings, tmp_path / "out")
    weights = load_model(tmp_path / "out", CPU)[0].state_dict()
    state = tmp_path / "out" / "checkpoints" / "checkpoint-4" / "trainer_state.json"
    part = state.read_text()[:99]
    summary = tmp_path / "out" / "summary.json"
    damages = (lambda: state.write_text(part), lambda: None, lambda: summary.write_text("{"), state.unlink)
    for damage in damages[:2] if rank else damages:
        summary.unlink()
        (state.parent / "SHA256SUMS").unlink(missing_ok=True)  # which come last
        damage()
        passed_over = not state.exists() or state.read_text() == part
        said: list[str] = []
        again = fine_tune(model, [file], settings, tmp_path / "out", said.append)
        assert again | {"environment": None} == whole | {"environment": None}
        assert any("checkpoint-4: was not written to its end" in line for line in said) == passed_over
        for name, right in load_model(tmp_path / "out", CPU)[0].state_dict().items():
            torch.testing.assert_close(right, weights[name])


@needs_trl
def test_it_goes_on_and_refuses_another_run(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_chats(tmp_path / "chats.jsonl", *[chat(f"{n}?", f"it is {n}!") for n in range(10)])
    settings = SFTSettings(steps=4, length=64, batch_rows=2, save_every=2, learning_rate=1e-3)
    whole = fine_tune(model, [file], settings, tmp_path / "whole")
    fine_tune(model, [file], settings, tmp_path / "part")
    (tmp_path / "part" / "checkpoints" / "checkpoint-4").rename(tmp_path / "gone")
    (tmp_path / "part" / "summary.json").unlink()
    again = fine_tune(model, [file], settings, tmp_path / "part")
    assert fine_tune(model, [file], settings, tmp_path / "part") == again  # which is finished
    monkeypatch.chdir(tmp_path)
    assert fine_tune(Path(os.path.relpath(model)), [Path("chats.jsonl")], settings, Path("part")) == again
    with pytest.raises(UserError, match="begun with another data"):
        fine_tune(model, [file, file], settings, Path("part"))
    assert again["losses"] == whole["losses"]
    left, right = (load_model(tmp_path / name, CPU)[0].state_dict() for name in ("whole", "part"))
    for name in left:
        torch.testing.assert_close(left[name], right[name])
    with pytest.raises(UserError, match="begun with another settings"):
        fine_tune(model, [file], settings.model_copy(update={"steps": 5}), tmp_path / "part")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis").write_text("x")
    with pytest.raises(UserError, match="other files"):
        fine_tune(model, [file], settings, tmp_path / "mine")


def test_without_trl_it_says_what_to_install(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "trl", None)
    file = write_chats(tmp_path / "chats.jsonl", chat("a", "b"))
    assert main(["sft", str(model), str(file), "--out", str(tmp_path / "out")]) == 2
    assert "pip install 'yoco-u[tuning]'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@needs_trl
def test_the_command(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write_chats(tmp_path / "chats.jsonl", chat("a", "b"))
    line: list[Any] = ["sft", model, file, "steps=1", "length=32", "batch_rows=1", "--out", tmp_path / "out", "--json"]
    assert main([str(part) for part in line]) == 0
    assert json.loads(capsys.readouterr().out)["assistant_tokens"] > 0
    assert main(["sft", str(model), str(file), "stepz=1", "--out", str(tmp_path / "other")]) == 2
    assert "stepz" in capsys.readouterr().err and not (tmp_path / "other").exists()


@needs_trl
def test_experts_stay_balanced_and_a_loose_generation_config_is_saved(tmp_path: Path) -> None:
    experts = {"num_experts": 4, "experts_per_token": 2, "intermediate_size": 16}
    path = tmp_path / "model"
    arch = architecture("yoco_u", vocab_size=300, experts=experts)
    tokenizer = load_model(save_chat_model(tmp_path, TEMPLATE, {}), CPU)[1]
    shutil.rmtree(path)
    save_model(build(arch), tokenizer, path)
    (path / "generation_config.json").write_text('{"bos_token_id": 1, "eos_token_id": 2, "temperature": 0.9, "top_p": 0.6}')
    file = write_chats(tmp_path / "chats.jsonl", *[chat(f"{n}?", f"it is {n}!") for n in range(4)])
    settings = SFTSettings(steps=2, length=64, batch_rows=2, micro_batch_rows=2, save_every=1)
    fine_tune(path, [file], settings, tmp_path / "out")
    before, after = (load_model(one, CPU)[0] for one in (path, tmp_path / "out"))
    moved = [
        name for name, bias in after.state_dict().items() if "choice_bias" in name and (bias != before.state_dict()[name]).any()
    ]
    assert moved and (after.generation_config.do_sample, after.generation_config.temperature) == (True, 0.9)
