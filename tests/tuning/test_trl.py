"""TRL's and PEFT's own trainers and adapters on our model, unpatched."""

import copy
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import tokenizer
from datasets import Dataset
from models import architecture, build, tokens
from torch import nn
from transformers import AutoModelForCausalLM

from yoco_u import YocoUForCausalLM

if importlib.util.find_spec("trl") is None or importlib.util.find_spec("peft") is None:
    pytest.skip("TRL and PEFT are not installed", allow_module_level=True)

from peft import LoraConfig, get_peft_model
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

from yoco_u.tuning import engine_rollouts

ADAPTERS = LoraConfig(r=4, target_modules="all-linear")


def model(**settings: Any) -> YocoUForCausalLM:
    ends = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    return build(architecture("yoco_u", layers=2, loops=3, vocab_size=300, **settings), **ends)


def arguments(folder: Path, **settings: Any) -> dict[str, Any]:
    common: dict[str, Any] = {
        "output_dir": str(folder), "max_steps": 6, "learning_rate": 2e-2, "lr_scheduler_type": "constant", "report_to": [],
        "use_cpu": True, "bf16": False, "disable_tqdm": True, "save_strategy": "no", "logging_steps": 1,
    }  # fmt: skip
    return common | settings


def text_logprob(model: nn.Module, prompt: str, completion: str) -> float:
    texts = tokenizer()
    before, after = (texts(text, add_special_tokens=False).input_ids for text in (prompt, completion))
    with torch.no_grad():
        logits = model(torch.tensor([before + after])).logits[0, len(before) - 1 : -1]
    return float(logits.log_softmax(-1)[torch.arange(len(after)), after].sum())


@pytest.mark.parametrize("adapters", [None, ADAPTERS], ids=["all weights", "LoRA"])
def test_dpo_makes_what_is_preferred_likelier(tmp_path: Path, adapters: Any) -> None:
    pairs = [(f"{n}+1=", str(n + 1), str(n + 3)) for n in range(5)]
    rows = Dataset.from_list([dict(zip(("prompt", "chosen", "rejected"), pair, strict=True)) for pair in pairs])
    model().save_pretrained(tmp_path / "model")
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "model")  # TRL loads its reference from the same place

    def margins() -> torch.Tensor:
        trained.eval()
        return torch.tensor([text_logprob(trained, a, right) - text_logprob(trained, a, wrong) for a, right, wrong in pairs])

    before = margins()
    config = DPOConfig(**arguments(tmp_path, per_device_train_batch_size=5))
    trainer = DPOTrainer(model=trained, args=config, train_dataset=rows, processing_class=tokenizer(), peft_config=adapters)
    trainer.train()
    losses = [one["loss"] for one in trainer.state.log_history if "loss" in one]
    assert losses[0] == pytest.approx(torch.tensor(2.0).log().item(), rel=1e-4)  # nothing is preferred to the reference yet
    assert (margins() > before).all() and losses[-1] < 0.6


@pytest.mark.parametrize("rollouts", [None, engine_rollouts], ids=["generate", "engine"])
def test_grpo_learns_what_is_rewarded(tmp_path: Path, rollouts: Any) -> None:
    """By transformers' `generate()`, as TRL comes, and by our engine."""
    rows = Dataset.from_list([{"prompt": f"{n}+{n}="} for n in range(8)])
    config = GRPOConfig(
        **arguments(tmp_path, per_device_train_batch_size=32), num_generations=8, max_completion_length=6, num_iterations=2,
    )  # fmt: skip

    def digits(completions: list[str], **_: Any) -> list[float]:
        return [sum(one.isdigit() for one in text) / 6 for text in completions]

    trainer = GRPOTrainer(
        model=model(), args=config, train_dataset=rows, processing_class=tokenizer(), reward_funcs=digits, rollout_func=rollouts
    )
    trainer.train()
    rewards = [one["reward"] for one in trainer.state.log_history if "reward" in one]
    assert len(rewards) == 3 and rewards[-1] > rewards[0]  # each answer is learned from twice


def test_sft_packs_texts_that_do_not_see_each_other(tmp_path: Path) -> None:
    """The loss of a packed row is that of each text alone."""
    rows = [tokens(1, length, vocab=300, seed=length)[0].tolist() for length in (9, 14, 6)]
    data = Dataset.from_list([{"input_ids": row} for row in rows])
    config = SFTConfig(**arguments(tmp_path, max_steps=1, learning_rate=1e-9), packing=True, max_length=40)
    trainer = SFTTrainer(model=model(), args=config, train_dataset=data, processing_class=tokenizer())
    assert len(trainer.train_dataset) == 1
    trainer.train()
    alone = model()
    total = sum(float(alone(torch.tensor([row]), labels=torch.tensor([row])).loss) * (len(row) - 1) for row in rows)
    expected = total / sum(len(row) - 1 for row in rows)
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected, rel=1e-4)


def adapted(**settings: Any) -> Any:
    """Our model with adapters whose product is not zero, as it is at first."""
    torch.manual_seed(1)
    found = get_peft_model(model(**settings), ADAPTERS)
    with torch.no_grad():
        for name, parameter in found.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return found


@pytest.mark.parametrize("settings", [{}, {"loop_gate": 0.3, "global_kvs": 1}])
def test_an_adapters_gradient_is_the_sum_over_loops(settings: dict[str, Any]) -> None:
    """Beside a stack whose loops have blocks and adapters of their own, with equal values."""
    looped, ids = adapted(**settings), tokens(2, 15, vocab=300)
    unrolled = adapted(**settings)
    stack = unrolled.base_model.model.model.stages[0]
    own = [stack.layers, *(copy.deepcopy(stack.layers) for _ in range(2))]
    plain = stack.run_loop

    def with_own_blocks(x: torch.Tensor, backend: Any, loop: int, *rest: Any) -> Any:
        stack.layers = own[loop]
        return plain(x, backend, loop, *rest)

    stack.run_loop = with_own_blocks
    losses = [one(ids, labels=ids).loss for one in (looped, unrolled)]
    assert torch.equal(*losses)
    for loss in losses:
        loss.backward()
    found = {name: parameter.grad for name, parameter in looped.base_model.model.model.stages[0].layers.named_parameters()}
    each = [dict(layers.named_parameters()) for layers in own]
    adapters = [name for name in found if "lora" in name]
    assert len(adapters) >= 14
    for name in adapters:
        parts = [one[name].grad for one in each]
        assert all(part.abs().max() > 0 for part in parts)
        torch.testing.assert_close(found[name], sum(parts), msg=name)


@pytest.mark.parametrize("settings", [{}, {"loop_gate": 0.3, "tie_word_embeddings": True, "qk_norm": True}])
def test_merging_and_unloading_are_exact(settings: dict[str, Any]) -> None:
    plain, ids = model(**settings), tokens(2, 15, vocab=300)
    wrapped = adapted(**settings)
    with torch.no_grad():
        expected = wrapped(ids).logits
        assert (expected - plain(ids).logits).abs().max() > 0.1
        with wrapped.disable_adapter():
            assert torch.equal(wrapped(ids).logits, plain(ids).logits)
        merged = wrapped.merge_and_unload()
        torch.testing.assert_close(merged(ids).logits, expected, rtol=1e-4, atol=1e-4)
        assert merged.state_dict().keys() == plain.state_dict().keys()
        unloaded = adapted(**settings).unload()
        assert all(torch.equal(tensor, unloaded.state_dict()[name]) for name, tensor in plain.state_dict().items())
