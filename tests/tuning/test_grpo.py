"""GRPO: answers that our engine samples of the current weights, their rewards, and a model that comes to earn more."""

import functools
import importlib.util
import json
import math
import shutil
import string
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from checkpoints import tokenizer
from models import EXPERTS, architecture, build

from yoco_u import YocoUForCausalLM
from yoco_u.cli import main
from yoco_u.errors import UserError
from yoco_u.files import read_json, write_json
from yoco_u.loading import load_model
from yoco_u.tuning import GRPOSettings, Matches, engine_rollouts, read_problems, reinforce
from yoco_u.tuning.grpo import _checked, _Tests
from yoco_u.tuning.rollouts import token_rollouts

needs_trl = pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="TRL is not installed")
END = 1
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
CHAT = [{"role": "user", "content": "6*7?"}]


def untrained(**settings: Any) -> YocoUForCausalLM:
    ends = {"bos_token_id": 0, "eos_token_id": END, "pad_token_id": END}
    return build(architecture("yoco_u", layers=2, loops=2, vocab_size=300, **settings), **ends)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    untrained().save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def trainer(model: YocoUForCausalLM, **arguments: Any) -> Any:
    """What of TRL's trainer a rollout asks for."""
    plain = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": None, "repetition_penalty": 1.0}
    texts = tokenizer()
    texts.chat_template = TEMPLATE
    return SimpleNamespace(
        args=SimpleNamespace(**plain | {"max_completion_length": 12} | arguments),
        model=model,
        accelerator=SimpleNamespace(unwrap_model=lambda wrapped: wrapped),
        processing_class=texts,
        eos_token_ids=[END, 40],
    )


def logprobs(model: YocoUForCausalLM, prompt: list[int], completion: list[int]) -> torch.Tensor:
    """Those of one plain pass over the whole text."""
    with torch.no_grad():
        logits = model(torch.tensor([prompt + completion]), use_cache=False).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1)[torch.arange(len(completion)), completion]


@pytest.mark.parametrize("settings", [{}, {"experts": EXPERTS}, {"loop_gate": 0.3, "global_kvs": 1}])
def test_rollouts_have_the_probabilities_of_the_model_as_it_is_now(settings: dict[str, Any]) -> None:
    model = untrained(**settings).train()
    with torch.no_grad():
        model.lm_head.weight[[END, 40]] *= 3  # so that some answers end and others do not
    asked: list[Any] = ["12+7=", "12+7=", "12+7=", CHAT, CHAT, "x" * 70, "12+7="]
    torch.manual_seed(3)
    found = []
    for _ in range(2):
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        rollouts = engine_rollouts(asked, trainer(model))
        assert model.training and all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
        found.append(rollouts)
        assert {len(column) for column in rollouts.values()} == {len(asked)}
        texts = [tokenizer().decode(ids) for ids in rollouts["prompt_ids"]]
        assert texts == ["</s>12+7="] * 3 + ["<user>6*7?<assistant>"] * 2 + ["</s>" + "x" * 70, "</s>12+7="]
        for prompt, completion, own in zip(*rollouts.values(), strict=True):
            torch.testing.assert_close(torch.tensor(own), logprobs(model.eval(), prompt, completion), atol=1e-4, rtol=0)
            ends = [token in (END, 40) for token in completion]
            assert not any(ends[:-1]) and (ends[-1] or len(completion) == 12)
        model.train()
        with torch.no_grad():  # what an optimizer step does: in place
            for parameter in model.parameters():
                parameter += 0.1 * torch.randn_like(parameter)
    completions = [rollouts["completion_ids"] for rollouts in found]
    assert len({tuple(one) for one in completions[0][:3]}) == 3 and completions[0] != completions[1]
    assert {one[-1] in (END, 40) for column in completions for one in column} == {True, False}


def test_answers_are_drawn_as_often_as_they_are_likely() -> None:
    model = untrained()
    torch.manual_seed(0)
    drawn = engine_rollouts(["7"] * 600, trainer(model, max_completion_length=1))
    counts = torch.bincount(torch.tensor([one[0] for one in drawn["completion_ids"]]), minlength=300)
    with torch.no_grad():
        expected = model(torch.tensor([drawn["prompt_ids"][0]])).logits[0, -1].softmax(-1) * 600
    often = expected > 5
    assert often.sum() > 20
    assert (((counts - expected) ** 2 / expected)[often]).sum() < 2 * often.sum()


def test_the_same_seed_gives_the_same_rollouts() -> None:
    model, found = untrained(), []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        found.append(engine_rollouts(["1+1=", "1+1=", "2"], trainer(model))["completion_ids"])
    assert found[0] == found[1] != found[2]


@pytest.mark.parametrize("setting", [{"temperature": 0.7}, {"top_p": 0.9}, {"top_k": 5}, {"min_p": 0.1}])
def test_other_ways_to_sample_are_refused(setting: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=f"{next(iter(setting))} is {next(iter(setting.values()))}; set it to"):
        engine_rollouts(["1"], trainer(untrained(), **setting))


@pytest.mark.parametrize("name", ["generation_kwargs", "chat_template_kwargs", "tools"])
def test_what_rollouts_do_not_follow_is_refused(name: str) -> None:
    asked = trainer(untrained())
    for what in (asked, asked.args):
        setattr(what, name, {"enable_thinking": False})
    with pytest.raises(UserError, match=f"does not follow {name}, which is .*enable_thinking"):
        engine_rollouts(["1"], asked)


def test_a_model_that_computes_no_numbers_is_told() -> None:
    model = untrained()
    with torch.no_grad():
        model.lm_head.weight[:] = torch.nan
    with pytest.raises(UserError, match="NaN"):
        engine_rollouts(["1"], trainer(model))


@pytest.mark.parametrize(
    ("pattern", "completion", "answer", "reward"),
    [
        (None, " 19\n", "19", 1),
        (None, "19 or so", "19", 0),
        (None, "", "19", 0),
        (None, "two\nlines ", "two\nlines", 1),
        (r"-?\d+", "12 and 7 are 19.", "19", 1),
        (r"-?\d+", "19, so -19", "19", 0),
        (r"#### (.*)", "12+7\n#### 19", "19", 1),
        (r"#### (\d+)", "19", "19", 0),
        (r"a(b)?", "a", "", 0),
        (None, "5", " 5 ", 1),
        (r"#### (.*)", "#### 19\n", "19", 1),
    ],
)
def test_an_answer_is_the_last_match(pattern: str | None, completion: str, answer: str, reward: float) -> None:
    assert Matches(pattern or GRPOSettings().pattern)(completion, answer) == reward


def write_problems(path: Path, *problems: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(one) + "\n\n" for one in problems))
    return path


def test_problems_are_read(tmp_path: Path) -> None:
    file = write_problems(tmp_path / "p.jsonl", {"prompt": "1+1=", "answer": 2}, {"prompt": "1", "answer": "1", "id": 5})
    assert list(read_problems([file, file])) == [{"prompt": "1+1=", "answer": "2"}, {"prompt": "1", "answer": "1"}] * 2
    numbers = [4.5, 1.0, 10**30, -0, "true", " 5 "]
    file = write_problems(tmp_path / "chats.jsonl", *({"prompt": CHAT, "answer": one} for one in numbers))
    assert list(read_problems([file])) == [{"prompt": CHAT, "answer": str(one)} for one in numbers]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "not JSON"),
        ('{"prompt": "x"}', "answer"),
        ('{"prompt": "", "answer": "x"}', "prompt"),
        ('{"prompt": [], "answer": "x"}', "prompt"),
        ('{"prompt": [{"role": "user"}], "answer": "x"}', "prompt"),
        ('{"prompt": "x", "answer": null}', "answer"),
        ('{"prompt": "x", "answer": true}', "answer"),
        ('{"prompt": "x", "answer": 1.2e400}', "answer"),
        ('{"prompt": [{"role": "user", "content": "x"}], "answer": 1}', "are texts"),
    ],
)
def test_lines_that_are_no_problem_are_named(tmp_path: Path, line: str, said: str) -> None:
    file = write_problems(tmp_path / "p.jsonl", {"prompt": "1+1=", "answer": 2})
    file.write_text(file.read_text() + line)
    with pytest.raises(UserError, match=said) as error:
        list(read_problems([file]))
    assert "p.jsonl, line 3" in str(error.value)


def letters(completion: str, answer: str) -> float:
    """How much of a completion is a small letter, of which an untrained model writes few."""
    return sum(one in string.ascii_lowercase for one in completion) / 8


def test_held_out_answers_end_where_those_of_training_do() -> None:
    """At the tokenizer's end token too, where the model's own is another."""
    model, answers, log = untrained(), list[str](), list[Any]()
    model.generation_config.eos_token_id = 40
    with torch.no_grad():
        model.lm_head.weight[[END, 40]] *= 3
    prompts = [[0, n, n + 1] for n in range(50, 62)]
    expected, ends = [], set()
    for ids in prompts:
        own: list[int] = []
        while len(own) < SMALL.max_tokens and not {END, 40} & set(own):
            with torch.no_grad():
                own.append(int(model(torch.tensor([ids + own])).logits[0, -1].argmax()))
        expected.append(tokenizer().decode(own, skip_special_tokens=True))
        ends.add(own[-1])
    assert END in ends

    def reward(completion: str, answer: str) -> float:
        answers.append(completion)
        return 1.0

    tests = _Tests([{"answer": ""}] * len(prompts), prompts, trainer(model), reward, SMALL, lambda _: None)
    tests.on_train_begin(None, SimpleNamespace(global_step=0, max_steps=1, log_history=log), None, model=model)
    assert answers == expected and [one["held_out_reward"] for one in log] == [1.0]


@needs_trl
@pytest.mark.parametrize("refused", ["p.jsonl", "t.jsonl"])
def test_a_prompt_that_the_template_refuses_is_named_beforehand(tmp_path: Path, refused: str) -> None:
    untrained().save_pretrained(tmp_path / "chats")
    texts = tokenizer()
    texts.chat_template = "{% if messages[0].content == 'no' %}{{ raise_exception('never') }}{% endif %}" + TEMPLATE
    texts.save_pretrained(tmp_path / "chats")
    fine = [{"prompt": CHAT, "answer": "42"}] * 2
    last = {"prompt": [{"role": "user", "content": "no"}], "answer": ""}
    files = [write_problems(tmp_path / name, *fine, *([last] if name == refused else [])) for name in ("p.jsonl", "t.jsonl")]
    with pytest.raises(UserError, match=rf"{refused}, line 5: .*never"):
        reinforce(tmp_path / "chats", files[:1], GRPOSettings(problems=2), tmp_path / "out", files[1:])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "reward", [math.nan, math.inf, -1e39, None, "best", 10**400, pytest.param(-(10**5000), id="long"), torch.ones(2)]
)
def test_a_reward_that_is_no_number_is_refused(reward: Any) -> None:
    with pytest.raises(UserError, match=r"the reward of 'text' is .* where 'right' is right; expected a number"):
        _checked(lambda text, answer: reward)("text", "right")


@needs_trl
@pytest.mark.parametrize("held_out", [False, True])
def test_one_reward_that_is_no_number_among_others(model: Path, tmp_path: Path, held_out: bool) -> None:
    """Where the mean of the others would be one."""
    problems, test = (write_problems(tmp_path / name, *PROBLEMS) for name in ("p.jsonl", "t.jsonl"))
    given = iter([1.0, math.nan] if held_out else [1.0] * 9 + [math.nan])
    settings = GRPOSettings(**SMALL.model_dump(exclude={"test_every"}) | {"steps": 1})
    tests = [test] if held_out else []
    with pytest.raises(UserError, match=r"the reward of .* is nan where .* is right"):
        reinforce(model, [problems], settings, tmp_path / "run", tests, reward=lambda text, answer: next(given, 1.0))


SMALL = GRPOSettings(steps=8, problems=4, answers=8, micro_batch_rows=16, max_tokens=8, learning_rate=2e-2, test_every=4)
PROBLEMS = [{"prompt": f"{n}+{n}=", "answer": str(2 * n)} for n in range(12)]


@needs_trl
@pytest.mark.parametrize("rank", [0, 4])
def test_a_model_comes_to_earn_more(model: Path, tmp_path: Path, rank: int) -> None:
    file = write_problems(tmp_path / "p.jsonl", *PROBLEMS)
    settings = SMALL.model_copy(update={"lora_rank": rank, "learning_rate": 8e-2 if rank else 2e-2})
    summary = reinforce(model, [file], settings, tmp_path / "out", [file], letters)
    rewards = [one["reward"] for one in summary["rewards"]]
    assert len(rewards) == 8 and rewards[-1] > rewards[0] + 0.2
    tests = summary["tests"]
    assert [one["step"] for one in tests] == [0, 4, 8] and tests[-1]["reward"] > tests[0]["reward"] + 0.2
    after, _ = load_model(tmp_path / "out", torch.device("cpu"))
    assert after.state_dict().keys() == untrained().state_dict().keys()


@needs_trl
@pytest.mark.parametrize("count", [5, 3])
def test_it_goes_on_where_it_was(model: Path, tmp_path: Path, count: int) -> None:
    """Within an epoch that is not the first, and at the end of one."""
    file = write_problems(tmp_path / "p.jsonl", *PROBLEMS[:count])
    settings = SMALL.model_copy(update={"steps": 4, "save_every": 3, "test_every": 4, "problems": 2, "max_tokens": 4})
    whole = reinforce(model, [file], settings, tmp_path / "whole", [file], letters)
    shutil.copytree(tmp_path / "whole", tmp_path / "part")
    (tmp_path / "part" / "checkpoints" / "checkpoint-4").rename(tmp_path / "gone")
    (tmp_path / "part" / "summary.json").unlink()
    again = reinforce(model, [file], settings, tmp_path / "part", [file], letters)
    assert reinforce(model, [file], settings, tmp_path / "part", [file], letters) == again  # which is finished
    assert (again["rewards"], again["tests"]) == (whole["rewards"], whole["tests"])
    another = write_problems(tmp_path / "q.jsonl", *PROBLEMS[1:])
    with pytest.raises(UserError, match="begun with another test"):
        reinforce(model, [file], settings, tmp_path / "part", [another], letters)
    for reward in (None, Matches("x"), functools.partial(letters, answer=""), lambda text, answer: 1.0):
        with pytest.raises(UserError, match="begun with another reward"):
            reinforce(model, [file], settings, tmp_path / "part", [file], reward)
    noted = read_json(tmp_path / "part" / "settings.json", dict[str, Any])
    write_json(tmp_path / "part" / "settings.json", {k: v for k, v in noted.items() if k not in ("reward", "begun")})
    assert reinforce(model, [file], settings, tmp_path / "part", [file], Matches("x")) == again  # begun by an earlier version


@needs_trl
def test_training_reads_the_chats_that_were_given(model: Path, tmp_path: Path) -> None:
    """Messages with keys that others lack, and keys with values of several types."""
    told = [{"city": "Oslo"}, {"day": 3}, {"day": "today"}, {"day": [1, {"x": None}]}]
    chats = [[{"role": "user", "content": f"{n}", "calls": [{"arguments": one}]}] for n, one in enumerate(told)]
    file = write_problems(tmp_path / "p.jsonl", *({"prompt": chat, "answer": n} for n, chat in enumerate(chats)))
    _, tokenizer = load_model(model, torch.device("cpu"))
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}:{{ m.calls[0].arguments | tojson }}{% endfor %}"
    tokenizer.save_pretrained(tmp_path / "chats")
    untrained().save_pretrained(tmp_path / "chats")
    read, given, plain = set[str](), set[str](), token_rollouts

    def reward(completion: str, answer: str) -> float:
        given.add(answer)
        return 0.0

    settings = GRPOSettings(steps=1, problems=4, answers=2, max_tokens=1)

    def seen(prompts: Any, trainer: Any) -> Any:
        read.update(tokenizer.batch_decode(prompts))
        return plain(prompts, trainer)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("yoco_u.tuning.grpo.token_rollouts", seen)
        reinforce(tmp_path / "chats", [file], settings, tmp_path / "out", reward=reward)
    assert read == {f"{n}:{json.dumps(one)}" for n, one in enumerate(told)}
    assert given == set("0123")


@needs_trl
def test_the_command(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, out = str(write_problems(tmp_path / "p.jsonl", *PROBLEMS)), str(tmp_path / "out")
    few = ["steps=1", "problems=2", "answers=2", "micro_batch_rows=4", "max_tokens=2"]
    assert main(["grpo", str(model), file, *few, "--test", file, "--out", out, "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["held_out"] == 12 and [one["step"] for one in summary["tests"]] == [0, 1]
    for change, said in (
        ("problems=13", "there are 12 problems, but a step takes 13"),
        ("micro_batch_rows=3", "micro_batch_rows 3 does not divide the 4 answers"),
        ("pattern='('", "no regular expression"),
        ("answers=1", "answers"),
        ("step=1", "steps"),
        (f"--test={write_problems(tmp_path / 'empty.jsonl')}", "no problem in"),
        (str(write_problems(tmp_path / "chats.jsonl", {"prompt": CHAT, "answer": 42})), "are texts"),
    ):
        assert main(["grpo", str(model), file, *few, change, "--out", str(tmp_path / "other")]) == 2
        assert said in capsys.readouterr().err and not (tmp_path / "other").exists()
