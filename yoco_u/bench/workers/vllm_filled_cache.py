"""vLLM's own connector for decode benchmarks: it fills the cache instead of computing a prompt, where a request asks for it."""

from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.decode_bench_connector import DecodeBenchConnector


class FilledCache(DecodeBenchConnector):
    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        if not (request.kv_transfer_params or {}).get("fill"):
            return 0, False
        return super().get_num_new_matched_tokens(request, num_computed_tokens)
