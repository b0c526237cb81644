"""The engine as a model of lm-evaluation-harness, held against the harness's own path through transformers."""

import ast
import inspect
import math
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from examples import covering
from harness_models import ours, requests, save_model, theirs
from lm_eval.api.registry import get_model

from yoco_u.errors import UserError
from yoco_u.evaluation.harness import EngineLM
from yoco_u.evaluation.stdlib_tasks import texts
from yoco_u.inference import LLM, SamplingParams

CONTEXTS = [
    inspect.getsource(one)[:350]
    for one in (textwrap.wrap, textwrap.fill, textwrap.shorten, textwrap.dedent, ast.walk, ast.dump)
]
PAIRS = [
    *[(context, choice) for context in CONTEXTS[:4] for choice in ("return None", "\n    return 1", "x", "y", "zz = 3  # ")],
    ("", "def f"),
    ("a context that ends in spaces   ", "and goes on"),
    ("short", " one" * 30),
    (CONTEXTS[4] * 4, "far behind"),
    ("täglich ☃ ", "☃☃"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("harness") / "model"
    save_model(path)
    return path


def assert_close(found: list[tuple[float, bool]], expected: list[tuple[float, bool]]) -> None:
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    for (logprob, _), (truth, _) in zip(found, expected, strict=True):
        assert math.isclose(logprob, truth, rel_tol=1e-5, abs_tol=1e-4)


@pytest.mark.parametrize(("max_length", "begins"), covering([120, 2048], [True, False]))
def test_loglikelihood(folder: Path, max_length: int, begins: bool) -> None:
    """Contexts that are shared, empty or too long; continuations of one token and of many."""
    asked = requests("loglikelihood", PAIRS)
    expected = theirs(folder, max_length=max_length, add_bos_token=begins).loglikelihood(asked, disable_tqdm=True)
    lm = ours(folder, max_length=max_length, add_bos_token=begins)
    assert_close(lm.loglikelihood(asked), expected)
    assert_close(lm.loglikelihood(asked), expected)  # now from the cache
    assert len({round(logprob, 3) for logprob, _ in expected}) > len(PAIRS) / 2


def test_what_greedy_decoding_would_write_is_greedy(folder: Path) -> None:
    lm = ours(folder)
    context = [3, 1, 4, 1, 5]
    [request] = lm.llm.generate(context, SamplingParams(temperature=0, max_tokens=6, ignore_eos=True))
    likeliest = request.outputs[0].token_ids
    pairs = [(None, context, likeliest), (None, context, [*likeliest[:-1], 399 - likeliest[-1]])]
    assert [greedy for _, greedy in lm._loglikelihood_tokens(pairs)] == [True, False]


@pytest.mark.parametrize("loops", [1, 2, 4])
def test_loop_counts(folder: Path, loops: int) -> None:
    """The engine at several loop counts against one pass over the whole text without a cache."""
    llm = LLM(folder, device="cpu", dtype="float32", cache_tokens=8192)
    lm = EngineLM(llm, num_loops=loops)
    found = lm.loglikelihood(requests("loglikelihood", PAIRS[:5]))
    for (context, continuation), (logprob, _) in zip(PAIRS, found, strict=False):
        first, second = lm._encode_pair(context, continuation)
        with torch.no_grad():
            logits = llm.engine.runner.model(torch.tensor([first + second]), use_cache=False, num_loops=loops).logits[0]
        truth = logits.log_softmax(-1)[len(first) - 1 : -1].gather(-1, torch.tensor(second)[:, None]).sum()
        assert math.isclose(logprob, float(truth), abs_tol=1e-4)


def test_a_context_is_computed_once_and_only_scores_reach_the_head(folder: Path) -> None:
    lm = ours(folder)
    computed: list[int] = []
    headed: list[int] = []
    model = lm.engine.runner.model
    model.model.embed_tokens.register_forward_pre_hook(lambda _, inputs: computed.append(inputs[0].shape[1]))
    model.lm_head.register_forward_pre_hook(lambda _, inputs: headed.append(inputs[0].shape[1]))
    pairs = [(context, choice) for context in CONTEXTS for choice in ("return 1", "return 2", "pass", "raise")]
    encoded = [lm._encode_pair(*pair) for pair in pairs]
    lm.loglikelihood(requests("loglikelihood", pairs))
    assert sum(headed) == sum(len(continuation) for _, continuation in encoded)
    once = sum(len(context) for context, _ in encoded[::4])
    assert sum(computed) < once + sum(len(continuation) + 16 for _, continuation in encoded)
    assert sum(computed) < 0.5 * sum(len(context) + len(continuation) for context, continuation in encoded)


@pytest.mark.parametrize("max_length", [33, 100, 2048])
def test_rolling(folder: Path, max_length: int) -> None:
    asked = requests("loglikelihood_rolling", [(text,) for text in texts()["test"]["text"][:40:8]] + [("x",)])
    # With a tokenizer that puts the start token, the harness would put a second one before it, and score the first.
    expected = theirs(folder, max_length=max_length, add_bos_token=False).loglikelihood_rolling(asked, disable_tqdm=True)
    found = ours(folder, max_length=max_length).loglikelihood_rolling(asked)
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=1e-5, atol=1e-4)


def test_generate_until(folder: Path) -> None:
    """Stop strings that occur and that do not, several limits, contexts that are too long."""
    lm = ours(folder, add_bos_token=False)
    likely = lm.generate_until(requests("generate_until", [(CONTEXTS[1], {"until": [], "max_gen_toks": 30})]))[0]
    assert len(likely) > 9
    settings: list[dict[str, Any]] = [
        {"until": [], "max_gen_toks": 20},
        {"until": [likely[6:9], "never comes"], "max_gen_toks": 30},
        {"until": "\n", "do_sample": False, "temperature": 0.7},
        {"until": ["e"], "max_new_tokens": 12},
    ]
    asked = requests("generate_until", [(context, own) for own in settings for context in CONTEXTS[1:4]])
    for max_length in (2048, 300):
        expected = theirs(folder, max_length=max_length, add_bos_token=False).generate_until(asked, disable_tqdm=True)
        assert ours(folder, max_length=max_length, add_bos_token=False).generate_until(asked) == expected


def test_sampled_generations_differ_and_come_again(folder: Path) -> None:
    given = {"until": [], "do_sample": True, "temperature": 1.0, "top_p": 0.9, "max_gen_toks": 12}
    asked = requests("generate_until", [(CONTEXTS[0], given)] * 4)
    first = ours(folder).generate_until(asked)
    assert len(set(first)) == 4
    assert ours(folder).generate_until(asked) == first
    assert ours(folder, seed=100).generate_until(asked) != first


def test_the_harness_finds_it_by_name(folder: Path) -> None:
    cls = get_model("yoco_u")
    lm = cls.create_from_arg_string(f"pretrained={folder},num_loops=2,cache_tokens=8192", {"batch_size": 1, "device": "cuda:0"})
    assert isinstance(lm, EngineLM) and lm.num_loops == 2


def test_documents_begin_once(folder: Path) -> None:
    lm = ours(folder)
    end = lm.prefix_token_id
    assert lm.tok_encode("a")[0] == end and lm.tok_encode("<|endoftext|>a") == lm.tok_encode("a")
    assert lm.tok_encode("a", add_special_tokens=False) == lm.tok_encode("a")[1:]
    assert ours(folder, add_bos_token=False).tok_encode("a") == lm.tok_encode("a")[1:]


def test_mistakes(folder: Path) -> None:
    with pytest.raises(UserError, match="max_length is 8192, but the caches hold 8192 tokens, and one more is needed"):
        ours(folder, max_length=8192)
    with pytest.raises(UserError, match="unknown key cache_token: did you mean cache_tokens"):
        ours(folder, cache_token=1)
    lm = ours(folder, max_length=20)
    with pytest.raises(UserError, match=r"a continuation has [0-9]+ tokens, but max_length is 20"):
        lm.loglikelihood(requests("loglikelihood", [("a", " word" * 50)]))
    with pytest.raises(UserError, match="asks for 64 new tokens, but context and output have to fit into 20"):
        lm.generate_until(requests("generate_until", [("a", {"until": [], "max_gen_toks": 64})]))
    with pytest.raises(UserError, match="generation_kwargs has num_beams"):
        lm.generate_until(requests("generate_until", [("a", {"until": [], "max_gen_toks": 4, "num_beams": 2})]))


def test_a_broken_model_is_no_score(folder: Path) -> None:
    lm = ours(folder)
    with torch.no_grad():
        lm.engine.runner.model.lm_head.weight[7] = math.nan
    with pytest.raises(UserError, match="hold NaN or infinity; the model may be damaged"):
        lm.loglikelihood(requests("loglikelihood", PAIRS[:3]))
    with pytest.raises(UserError, match="hold NaN or infinity; the model may be damaged"):
        lm.generate_until(requests("generate_until", [("a", {"until": [], "max_gen_toks": 4})]))
