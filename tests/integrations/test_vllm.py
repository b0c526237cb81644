"""The vLLM plugin against our own forward pass. What needs vLLM is skipped without it; docs/vllm.md says how to run it.

Each greedy token is judged by our logits behind the answer's own tokens before it, so that an answer can be judged to its end
even where it took the other one of two tied tokens.
"""

import importlib.util
import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hosts import EXPERTS, VOCABULARY, Checkpoint, assert_greedy, checkpoint, prompts

from yoco_u import YocoUConfig
from yoco_u.architecture import preset
from yoco_u.errors import UserError
from yoco_u.integrations.vllm import register
from yoco_u.integrations.vllm.support import served_architecture

needs_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")

LENGTHS = (1, 2, 7, 31, 32, 33, 39, 40, 41, 64, 65, 100, 200, 333, 512, 700)
NEW = 12
BLOCK = 32


def test_plugin_is_declared_and_needs_no_vllm_to_import() -> None:
    project = (Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    assert re.search(r'entry-points\."vllm\.general_plugins"\]\s*yoco_u = "yoco_u\.integrations\.vllm:register"', project)
    code = "import sys; sys.modules['vllm'] = None; import yoco_u.integrations.vllm, yoco_u.integrations.vllm.support"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_without_vllm_the_plugin_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(UserError, match=r"pip install 'yoco-u\[vllm\]'"):
        register()


@pytest.mark.parametrize(("name", "why"), [("parscale", "ParScale"), ("yoco_retention", "gated retention")])
def test_architectures_that_vllm_cannot_express_are_refused(name: str, why: str) -> None:
    with pytest.raises(UserError, match=why):
        served_architecture(YocoUConfig.from_architecture(preset(name, "test")))


def test_loop_count_is_overridden_by_num_loops() -> None:
    config = YocoUConfig.from_architecture(preset("yoco_u", "test", loops=3))
    assert served_architecture(config) == config.architecture
    config.update({"num_loops": 5})  # as vLLM does with --hf-overrides
    assert served_architecture(config).stages[0].loops == 5
    config.update({"num_loops": 0})
    with pytest.raises(UserError, match="num_loops is 0"):
        served_architecture(config)


def test_vllm_finds_no_window_for_all_layers_in_the_configuration() -> None:
    """vLLM would take a field of that name as the window of the global layer too, without a word."""
    config = YocoUConfig.from_architecture(preset("yoco_u", "test"))
    assert not hasattr(config, "sliding_window")
    assert not hasattr(config, "layer_types")


# From here on, tests need vLLM.


@contextmanager
def vllm(folder: Path, **settings: Any) -> Iterator[Any]:
    """vLLM's engine in this process, where a test can look into its caches."""
    os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_NO_USAGE_STATS="1", HF_HUB_OFFLINE="1")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    defaults = {
        "dtype": "float32", "enforce_eager": True, "max_model_len": 1024, "max_num_batched_tokens": 1024, "max_num_seqs": 16,
        "block_size": BLOCK, "kv_cache_memory_bytes": 2**27, "enable_prefix_caching": False, "disable_log_stats": True,
    }  # fmt: skip
    llm = None
    try:
        llm = LLM(str(folder), **(defaults | settings))
        yield llm
    finally:
        del llm
        cleanup_dist_env_and_memory()


def greedy(llm: Any, asked: list[list[int]]) -> list[list[int]]:
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True)
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in asked], params, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


@pytest.fixture(scope="module")
def yoco_u(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return checkpoint(tmp_path_factory.mktemp("yoco_u"), "yoco_u", loops=3, loop_gate=0.3)


LLAMA3 = {"type": "llama3", "factor": 4.0, "original_length": 128}

CASES: dict[str, dict[str, Any]] = {
    "transformer": {},
    "yoco": {"rope_cross": True, "qk_norm": True},
    "yoco_u": {"tie_word_embeddings": True, "qk_norm": True},
    "universal_transformer": {"loop_gate": 0.3},
    "rins": {},
    "upper_loop": {},
    "upper_loop_without_shared_kv": {},
    "deep": {"layers": 6},
    "deeper": {"num_key_value_heads": 1},
    "yoco_u with experts": {"experts": EXPERTS},
    "yoco_u as converted": {"global_kvs": 2, "attention_bias": True, "rope_cross": True, "rotary_scaling": LLAMA3},
    "yoco with global KVs": {"global_kvs": 2, "qk_norm": True},
    "transformer with biases": {"attention_bias": True},
}


@needs_vllm
@pytest.mark.parametrize("case", CASES)
def test_greedy_tokens_of_every_architecture(case: str, tmp_path: Path) -> None:
    made = checkpoint(tmp_path, case.split()[0], **CASES[case])
    asked = prompts(LENGTHS)
    with vllm(made.folder) as llm:
        assert_greedy(made.model, asked, greedy(llm, asked))
        assert_greedy(made.model, asked[3:5], [greedy(llm, [prompt])[0] for prompt in asked[3:5]])


@needs_vllm
@pytest.mark.parametrize(
    "settings",
    [
        {"kv_sharing_fast_prefill": True},
        {"max_num_batched_tokens": 48},
        {"max_num_batched_tokens": 48, "kv_sharing_fast_prefill": True},
        {"enforce_eager": False},
        {"enforce_eager": False, "kv_sharing_fast_prefill": True, "max_num_batched_tokens": 64},
        {"block_size": 128},
    ],
    ids=lambda settings: " ".join(settings),
)
def test_ways_of_running_change_no_token(settings: dict[str, Any], yoco_u: Checkpoint) -> None:
    asked = prompts(LENGTHS, seed=1)
    with vllm(yoco_u.folder, **settings) as llm:
        assert_greedy(yoco_u.model, asked, greedy(llm, asked))


@needs_vllm
def test_fast_prefill_leaves_the_cross_decoder_out(yoco_u: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    from yoco_u.integrations.vllm.decoders import CrossDecoder

    rows: list[int] = []
    forward = CrossDecoder.forward

    def watched(self: Any, x: Any, positions: Any) -> Any:
        rows.append(len(x))
        return forward(self, x, positions)

    monkeypatch.setattr(CrossDecoder, "forward", watched)
    with vllm(yoco_u.folder, kv_sharing_fast_prefill=True, max_num_batched_tokens=128) as llm:
        rows.clear()
        greedy(llm, prompts([300]))
    assert rows == [1] * (3 + NEW - 1)  # three chunks, then new tokens but the first


@needs_vllm
@pytest.mark.parametrize("fast_prefill", [False, True])
def test_prefix_cache_changes_no_token(fast_prefill: bool, yoco_u: Checkpoint) -> None:
    begin = prompts([300])[0]
    asked = [begin + end for end in prompts([1, 20, 60])]
    with vllm(yoco_u.folder, enable_prefix_caching=True, kv_sharing_fast_prefill=fast_prefill) as llm:
        assert_greedy(yoco_u.model, [begin], greedy(llm, [begin]))
        from vllm import SamplingParams

        params = SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True)
        outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in asked], params, use_tqdm=False)
    assert all(output.num_cached_tokens >= 256 for output in outputs)
    assert_greedy(yoco_u.model, asked, [output.outputs[0].token_ids for output in outputs])


@needs_vllm
@pytest.mark.parametrize("num_loops", [1, 2, 5])
def test_loop_count_by_override(num_loops: int, yoco_u: Checkpoint) -> None:
    """Also with more loops than the checkpoint has gates for."""
    asked = prompts(LENGTHS[:12], seed=2)
    with vllm(yoco_u.folder, hf_overrides={"num_loops": num_loops}) as llm:
        assert_greedy(yoco_u.model, asked, greedy(llm, asked), num_loops)


@needs_vllm
@pytest.mark.parametrize("case", ["yoco_u", "rins", "yoco_u with one kv head", "yoco_u with experts", "yoco_u as converted"])
def test_tensor_parallel(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    settings: dict[str, Any] = {
        "yoco_u with one kv head": {"num_key_value_heads": 1},
        "yoco_u with experts": {"experts": EXPERTS},
        "yoco_u as converted": CASES["yoco_u as converted"],
    }
    made = checkpoint(tmp_path, case.split()[0], **settings.get(case, {"tie_word_embeddings": True}))
    asked = prompts(LENGTHS, seed=3)
    with vllm(made.folder, tensor_parallel_size=2) as llm:
        assert_greedy(made.model, asked, greedy(llm, asked))


@needs_vllm
@pytest.mark.parametrize(("name", "loops"), [("yoco", 1), ("yoco_u", 3), ("upper_loop", 3)])
def test_blocks_are_those_of_the_architecture(name: str, loops: int, tmp_path: Path) -> None:
    """The global KV grows; each sliding (loop, layer) holds as many blocks as its window reaches."""
    from vllm import SamplingParams

    made = checkpoint(tmp_path, name, **({"loops": loops} if loops > 1 else {}))
    architecture = made.model.config.architecture
    windows = sum(stage.layers * stage.loops for stage in architecture.stages if stage.attention == "sliding")
    window = architecture.window
    assert window is not None
    with vllm(made.folder) as llm:
        engine = llm.llm_engine
        pool = engine.engine_core.engine_core.scheduler.kv_cache_manager.block_pool
        free = pool.get_num_free_blocks()
        params = SamplingParams(temperature=0, max_tokens=80, ignore_eos=True)
        engine.add_request("one", {"prompt_token_ids": prompts([300])[0]}, params)
        engine.step()
        computed = 300  # tokens that are in the caches when the step begins
        while engine.has_unfinished_requests():
            outputs = engine.step()
            if outputs[0].finished:
                break
            blocks = -(-(computed + 1) // BLOCK)
            passed = max(0, computed - window + 1) // BLOCK  # blocks that no later token sees
            assert free - pool.get_num_free_blocks() == blocks + windows * (blocks - passed)
            computed += 1
        assert computed > 370
        assert pool.get_num_free_blocks() == free


@needs_vllm
@pytest.mark.parametrize(
    ("name", "settings", "why"),
    [
        ("parscale", {}, "ParScale"),
        ("yoco_retention", {}, "gated retention"),
        ("yoco", {"head_dim": 40}, "head_dim is 40; vLLM's attention backend CPU_ATTN takes 32, 64"),
    ],
)
def test_vllm_refuses_what_it_cannot_run(name: str, settings: dict[str, Any], why: str, tmp_path: Path) -> None:
    made = checkpoint(tmp_path, name, **settings)
    with pytest.raises(Exception, match=why), vllm(made.folder):
        pass


@needs_vllm
@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"hf_overrides": {"num_loops": 0}}, "num_loops is 0"),
        ({"runner": "pooling", "kv_sharing_fast_prefill": True}, "the runner is pooling"),
        ({"pipeline_parallel_size": 2}, "Pipeline parallelism is not supported"),
        ({"enable_lora": True}, "does not support LoRA"),
    ],
)
def test_vllm_refuses_settings(settings: dict[str, Any], why: str, yoco_u: Checkpoint) -> None:
    with pytest.raises(Exception, match=why), vllm(yoco_u.folder, **settings):
        pass


@needs_vllm
def test_compiled_experts_in_loops_are_refused(tmp_path: Path) -> None:
    """Compiled they gave wrong tokens (vLLM 0.32.0); without compilation they are among the architectures above."""
    made = checkpoint(tmp_path, "yoco_u", experts=EXPERTS)
    with pytest.raises(Exception, match="add --enforce-eager"), vllm(made.folder, enforce_eager=False):
        pass


@needs_vllm
def test_quantization_is_refused() -> None:
    """Built by hand, because on a CPU vLLM refuses every quantization before it builds a model."""
    from yoco_u.integrations.vllm.model import YocoUForCausalLM

    config = YocoUConfig.from_architecture(preset("yoco_u", "test"))
    vllm_config = SimpleNamespace(model_config=SimpleNamespace(hf_config=config), quant_config=object())
    with pytest.raises(UserError, match="drop --quantization"):
        YocoUForCausalLM(vllm_config=vllm_config)


@needs_vllm
def test_serve_answers_and_refuses_prompt_logprobs_with_fast_prefill(yoco_u: Checkpoint) -> None:
    """The whole way: vLLM's server, which finds the plugin by its entry point, in its own processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    environment.pop("VLLM_ENABLE_V1_MULTIPROCESSING", None)
    command = [
        *serve(yoco_u.folder), "--port", str(port), "--dtype", "float32",
        "--enforce-eager", "--max-model-len", "512", "--kv-cache-memory-bytes", str(2**26), "--block-size", str(BLOCK),
        "--kv-sharing-fast-prefill", "--hf-overrides", json.dumps({"num_loops": 2}),
    ]  # fmt: skip
    prompt = prompts([100])[0]
    asked = {"model": str(yoco_u.folder), "prompt": prompt, "max_tokens": NEW, "temperature": 0, "ignore_eos": True}
    server = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(2):  # the refusal does not end the server
            answer = ask(server, port, asked)
            tokens = [int(token) for token in answer["choices"][0]["text"].split()]
            assert len(tokens) == NEW
            assert all(0 <= token < VOCABULARY for token in tokens)
            assert_greedy(yoco_u.model, [prompt], [tokens], num_loops=2)
            with pytest.raises(urllib.error.HTTPError) as refused:
                ask(server, port, asked | {"prompt_logprobs": 1})
            assert refused.value.code == 400
            assert "kv-sharing-fast-prefill" in refused.value.read().decode()
    finally:
        server.terminate()
        server.wait(60)


def serve(folder: Path) -> list[str]:
    """The command of `vllm serve`; for vllm-cpu 0.32, whose `vllm` command does not start, the module that it would run."""
    try:
        version("vllm")
    except PackageNotFoundError:
        return [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
    return [str(Path(sys.executable).parent / "vllm"), "serve", str(folder)]


def ask(server: subprocess.Popen[bytes], port: int, body: dict[str, Any]) -> Any:
    """Post a request for a completion as soon as the server listens."""
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    for _ in range(240):
        assert server.poll() is None, "the server is gone"
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                return json.load(answer)
        except urllib.error.HTTPError:
            raise
        except OSError:
            time.sleep(1)
    raise AssertionError("the server does not listen")
