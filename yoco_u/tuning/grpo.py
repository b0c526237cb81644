"""Reinforcement learning with verifiable rewards: TRL's GRPO on our model, with answers that our engine samples."""

import math
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerFast, TrainerCallback

from yoco_u.config import shown
from yoco_u.device import environment, find_device
from yoco_u.errors import UserError, import_optional
from yoco_u.files import write_json
from yoco_u.folders import check_claim
from yoco_u.inference import SamplingParams
from yoco_u.tuning import runs
from yoco_u.tuning.problems import Matches, placed_problems
from yoco_u.tuning.rollouts import complete, prompt_tokens, token_rollouts
from yoco_u.tuning.settings import GRPOSettings

Reward = Callable[[str, str], float]
"""From the text of a completion and the right answer, to a number that training makes larger."""


def reinforce(
    model_path: str | Path,
    files: Sequence[Path],
    settings: GRPOSettings,
    folder: Path,
    test: Sequence[Path] = (),
    reward: Reward | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Train a model on problems by the rewards of its own answers (GRPO, arXiv 2402.03300), or continue that.

    Args:
        model_path: a run or a saved model.
        files: JSON lines with problems, see `read_problems`.
        folder: gets `checkpoints/`, `summary.json`, and the trained model in `model/`.
        test: files of held-out problems, which are answered greedily before, after and every `test_every` steps.
        reward: by default 1 for the right answer, found by the pattern of the settings, else 0. Whoever continues gives the
            same: its name is compared, not what it does.
        say: told what happens, in lines.

    Returns:
        The summary: steps, the mean reward and completion length of each, and the mean reward of each test.

    Raises:
        UserError: if TRL or PEFT is missing, a problem is damaged, prompts are chats but the model has no chat template, the
            settings do not fit, the folder holds something else, or another process trains there; if a reward is not finite.
    """
    trl, lora = import_optional("trl", "fine-tuning needs trl", "tuning"), runs.lora(settings)
    check_claim(folder, runs.FOLDER)
    rewarded = _checked(reward or Matches(settings.pattern))
    rows, micro = settings.problems * settings.answers, settings.micro_batch_rows
    placed, placed_test = list(placed_problems(files)), list(placed_problems(test))
    train, held_out = ([problem for _, problem in given] for given in (placed, placed_test))
    if test and not held_out:
        raise UserError(f"no problem in {', '.join(map(str, test))}; give files of JSON lines with held-out problems")
    if not test and settings.test_every != GRPOSettings.model_fields["test_every"].default:
        raise UserError(f"test_every is {settings.test_every}, but has no effect: there are no held-out problems; give --test")
    if reward is not None and settings.pattern != GRPOSettings.model_fields["pattern"].default:
        raise UserError("pattern has no effect beside a reward of your own; leave it out")
    if len(train) < settings.problems:
        raise UserError(f"there are {len(train)} problems, but a step takes {settings.problems}; lower problems")
    if rows % micro:
        raise UserError(f"micro_batch_rows {micro} does not divide the {rows} answers of a step; choose a divisor")
    device = find_device("auto")
    model, tokenizer = runs.load(model_path, settings, device)
    now = runs.begin_time(folder)
    prompts, test_prompts = (_tokens(given, tokenizer, now) for given in (placed, placed_test))
    data = {"data": [str(file) for file in files], "test": [str(file) for file in test]}
    named = {"settings": settings.model_dump(mode="json"), "reward": reward and _name(reward)}
    own = {"model": str(model_path)} | data | named
    with runs.begun(folder, own, [train, held_out], now, say) as finished:
        if finished is not None:
            return finished
        say(f"{len(train):,} problems, {len(held_out):,} held out")
        config = trl.GRPOConfig(
            **runs.arguments(settings, folder, device),
            max_steps=settings.steps,
            num_generations=settings.answers,
            gradient_accumulation_steps=rows // micro,
            max_completion_length=settings.max_tokens,
            lr_scheduler_type="constant",
        )

        def rollouts(numbers: list[str], trainer: Any) -> dict[str, list[Any]]:
            return token_rollouts([prompts[int(one)] for one in numbers], trainer)

        def rewards(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
            return [rewarded(text, train[int(one)]["answer"]) for one, text in zip(prompts, completions, strict=True)]

        trainer = trl.GRPOTrainer(
            model=model, args=config, train_dataset=_numbers(len(train)), processing_class=tokenizer, peft_config=lora,
            reward_funcs=rewards, rollout_func=rollouts,
        )  # fmt: skip
        _seed_by_epoch(trainer)
        if held_out:
            trainer.add_callback(_Tests(held_out, test_prompts, trainer, rewarded, settings, say))
        logged = runs.train(trainer, tokenizer, folder, say)
        summary = {
            "steps": trainer.state.global_step,
            "problems": len(train),
            "held_out": len(held_out),
            "environment": environment(device),
            "rewards": [
                {"step": one["step"], "reward": one["reward"], "tokens": one["completions/mean_length"]}
                for one in logged
                if "reward" in one
            ],
            "tests": [{"step": one["step"], "reward": one[_TEST]} for one in logged if _TEST in one],
        }
        write_json(folder / "summary.json", summary)
        return summary


def _tokens(
    problems: Sequence[tuple[str, dict[str, Any]]], tokenizer: PreTrainedTokenizerFast, now: datetime
) -> list[list[int]]:
    """The prompts of problems, each with its place, which the error for one names."""
    found, tokens = prompt_tokens(tokenizer, (problem["prompt"] for _, problem in problems), now), list[list[int]]()
    for place, _ in problems:
        try:
            tokens.append(next(found))
        except UserError as error:
            raise UserError(f"{place}: {error}") from None
    return tokens


def _numbers(count: int) -> Dataset:
    """The numbers of the problems as their prompts: Arrow would give all messages the keys of each, and refuse some."""
    return Dataset.from_dict({"prompt": [str(number) for number in range(count)]})


def _seed_by_epoch(trainer: Any) -> None:
    """Let the order of the data follow from seed and epoch.

    TRL's sampler draws from one generator all along, so a trainer that goes on in a later epoch would draw the first order.
    """
    plain, seed = trainer._get_train_sampler, trainer.args.seed

    def seeded(dataset: Any = None) -> Any:
        sampler = plain(dataset)
        sampler.set_epoch = lambda epoch: sampler.generator.manual_seed(seed + epoch)  # which the data loader calls
        return sampler

    trainer._get_train_sampler = seeded


def _name(reward: Reward) -> str:
    named = reward if hasattr(reward, "__qualname__") else type(reward)
    return f"{named.__module__}.{named.__qualname__}"


def _checked(reward: Reward) -> Reward:
    """A reward that refuses what is no finite number of float32, which a mean would hide."""

    def checked(text: str, answer: str) -> float:
        found: Any = reward(text, answer)
        try:
            number = float(found)
        except (TypeError, ValueError, OverflowError, RuntimeError):
            number = math.nan
        if not abs(number) <= torch.finfo(torch.float32).max:
            raise UserError(f"the reward of {shown(text)} is {shown(found)} where {shown(answer)} is right; expected a number")
        return number

    return checked


_TEST = "held_out_reward"


class _Tests(TrainerCallback):
    """Answers held-out problems greedily, up to where answers of training end.

    The mean reward is noted among what the trainer logs, which checkpoints keep.
    """

    def __init__(
        self,
        problems: Sequence[dict[str, Any]],
        prompts: Sequence[list[int]],
        trainer: Any,
        reward: Reward,
        settings: GRPOSettings,
        say: Callable[[str], None],
    ) -> None:
        self._problems, self._prompts, self._reward = problems, prompts, reward
        self._tokenizer, self._ends = trainer.processing_class, trainer.eos_token_ids
        self._settings, self._say = settings, say

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step == 0:
            self._test(state, model)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step % self._settings.test_every == 0 or state.global_step == state.max_steps:
            self._test(state, model)

    def _test(self, state: Any, model: Any) -> None:
        params = SamplingParams(temperature=0, max_tokens=self._settings.max_tokens, stop_token_ids=self._ends)
        answered = complete(model, self._tokenizer, self._prompts, [params] * len(self._prompts))
        tokens = [request.outputs[0].token_ids for request in answered]
        texts = self._tokenizer.batch_decode(tokens, skip_special_tokens=True)  # as TRL has those of training
        rewards = [self._reward(text, problem["answer"]) for text, problem in zip(texts, self._problems, strict=True)]
        mean = sum(rewards) / len(rewards)
        state.log_history.append({"step": state.global_step, _TEST: mean})
        self._say(f"step {state.global_step}/{state.max_steps}  held-out reward {mean:.3f}")
