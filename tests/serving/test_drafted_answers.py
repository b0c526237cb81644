"""Requests that draft: the same answers, with counts in `usage` and in the metrics."""

import pytest
from asgi_server import Server, engine_of, running
from test_app import samples
from transformers import PreTrainedTokenizerFast

from yoco_u import YocoUForCausalLM
from yoco_u.inference.drafts import Candidate, DraftLengths

pytestmark = pytest.mark.anyio


class Three(DraftLengths):
    def choose(self, decodes: int, candidates: list[Candidate]) -> list[int]:  # type: ignore[override]
        return [min(3, one.most) for one in candidates]


async def test_drafts(model: YocoUForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    body = {
        "prompt": "def first(x): def first(x): def fir",
        "logprobs": 1,
        "logit_bias": {"70": 5.0, "71": 5.0},
        "temperature": 0,
        "max_tokens": 16,
    }
    async with running(Server(engine_of(model, tokenizer))) as server:
        server.engine.speculation.lengths = Three()
        plain = await server.json("completions", **body)
        details = [plain["usage"]["completion_tokens_details"]]
        for by in ("loops", "prompt"):
            found = await server.json("completions", drafts=by, **body)
            assert found["choices"][0]["text"] == plain["choices"][0]["text"]
            assert found["choices"][0]["logprobs"]["tokens"] == plain["choices"][0]["logprobs"]["tokens"]
            chunks = await server.stream("completions", drafts=by, stream_options={"include_usage": True}, **body)
            assert "".join(one["text"] for chunk in chunks for one in chunk["choices"]) == plain["choices"][0]["text"]
            assert chunks[-1]["usage"] == found["usage"]
            details += [found["usage"]["completion_tokens_details"]] * 2
        accepted, rejected = (sum(one[f"{how}_prediction_tokens"] for one in details) for how in ("accepted", "rejected"))
        assert accepted > 0 and rejected > 0 and details[0]["accepted_prediction_tokens"] == 0
        counted = await samples(server)
        assert counted["yoco_u_drafted_tokens_total[accepted]"] == accepted
        assert counted["yoco_u_drafted_tokens_total[rejected]"] == rejected
        answers = counted["yoco_u_time_to_first_token_seconds_count"]
        assert answers == 5
        assert counted["yoco_u_inter_token_seconds_count"] == counted["yoco_u_generated_tokens_total"] - answers
        refused = await server.post("completions", drafts="loop", **body)
        assert refused.status_code == 400 and refused.json()["error"]["param"] == "drafts"
