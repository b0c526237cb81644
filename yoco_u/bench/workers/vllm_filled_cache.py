"""vLLM's connector for decode benchmarks, for some requests only: theirs are caches that are filled in instead of computed."""

from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.decode_bench_connector import DecodeBenchConnector


class FilledCache(DecodeBenchConnector):
    """Fills in the prompt's keys and values of the requests whose `kv_transfer_params` have `fill`; others are computed."""

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        if not (request.kv_transfer_params or {}).get("fill"):
            return 0, False
        return super().get_num_new_matched_tokens(request, num_computed_tokens)
