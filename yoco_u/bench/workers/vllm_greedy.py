"""A worker for `benchmarks/vllm_plugin.py`: the tokens that vLLM generates greedily from a checkpoint.

a job    {"checkpoint": folder, "dtype", "tokens": of the longest sequence, "settings": further settings of vLLM}
a case   {"prompts": token ids of each prompt, "new": how many tokens to generate}
answer   {"tokens": the new tokens of each prompt}
"""

from typing import Any

from vllm_worker import preload_openmp, set_environment
from worker_protocol import Case, Job, Run, serve


def start(job: Job) -> tuple[Run, dict[str, Any]]:
    set_environment(job)

    import vllm
    from vllm import LLM, SamplingParams

    llm = LLM(
        job["checkpoint"],
        skip_tokenizer_init=True,
        dtype=job["dtype"],
        max_model_len=job["tokens"],
        disable_log_stats=True,
        **job["settings"],
    )

    def run(case: Case) -> dict[str, Any]:
        params = SamplingParams(temperature=0, max_tokens=case["new"], ignore_eos=True, detokenize=False)
        outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in case["prompts"]], params, use_tqdm=False)
        return {"tokens": [list(output.outputs[0].token_ids) for output in outputs]}

    return run, {"version": vllm.__version__}


if __name__ == "__main__":
    preload_openmp()
    serve(start)
