import pytest
from pydantic import ValidationError

from yoco_u.config import Config, parse
from yoco_u.errors import UserError
from yoco_u.inference.sampling_params import SamplingParams


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -1}, "temperature: Input should be greater than or equal to 0, got -1"),
        ({"temperature": float("nan")}, "temperature: .*got nan"),
        ({"temperature": float("inf")}, "temperature: .*got inf"),
        ({"top_p": 0}, "top_p: .*greater than 0, got 0"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_p": float("nan")}, "top_p"),
        ({"min_p": -0.1}, "min_p"),
        ({"min_p": 1.1}, "min_p"),
        ({"top_k": -1}, "top_k"),
        ({"presence_penalty": float("inf")}, "presence_penalty"),
        ({"frequency_penalty": float("nan")}, "frequency_penalty"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"n": 0}, "n: "),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": 0, "n": 2}, "max_tokens 0 samples nothing, but n is 2; lower n to 1"),
        ({"prompt_logprobs_start": -1, "prompt_logprobs": 0}, "prompt_logprobs_start"),
        ({"prompt_logprobs_start": 3}, "prompt_logprobs_start needs prompt_logprobs"),
        ({"num_loops": 0}, "num_loops"),
        ({"logprobs": -1}, "logprobs"),
        ({"logprobs": 21}, "logprobs"),
        ({"prompt_logprobs": 21}, "prompt_logprobs"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**64}, "seed"),
        ({"stop": ""}, "stop.0"),
        ({"stop_token_ids": [-1]}, "stop_token_ids.0"),
        ({"min_tokens": 17}, "min_tokens 17 is more than max_tokens 16; lower it"),
        ({"json_schema": "{"}, "json_schema: not JSON: .*line 1 column 2"),
        ({"json_schema": "[1]"}, r"json_schema: .*dictionary, got '\[1\]'|json_schema: .*dictionary, got \[1\]"),
        ({"json_schema": {}, "regex": "a"}, "json_schema and regex exclude each other; give one"),
        ({"regex": "a", "ignore_eos": True}, "ignore_eos does not go with"),
        ({"regex": "a", "min_tokens": 1}, "min_tokens does not go with"),
        ({"temprature": 1}, "unknown key temprature: did you mean temperature?"),
    ],
)
def test_what_does_not_fit_is_one_line(settings: dict, message: str) -> None:
    with pytest.raises(UserError, match=f"^SamplingParams: {message}") as caught:
        SamplingParams(**settings)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=message) as caught:
        parse(SamplingParams, settings, "request")
    assert "\n" not in str(caught.value)


def test_inside_another_model_it_is_that_models_error() -> None:
    class Body(Config):
        sampling: SamplingParams

    with pytest.raises(UserError, match=r"^body: .*temperature: .*got -1$"):
        parse(Body, {"sampling": {"temperature": -1}}, "body")
    assert parse(Body, {"sampling": {"top_k": 3}}, "body").sampling.top_k == 3


def test_one_or_several_stops_and_a_schema_as_text() -> None:
    assert SamplingParams(stop="end").stop == ("end",)
    assert SamplingParams(stop=["a", "b"]).stop == ("a", "b")
    assert SamplingParams(json_schema='{"type": "null"}').json_schema == {"type": "null"}
    assert SamplingParams(json_schema={}).constrained and SamplingParams(regex="a*").constrained
    assert not SamplingParams().constrained


def test_it_does_not_change_and_reads_back() -> None:
    params = SamplingParams(temperature=0.5, stop=["a"], json_schema={"type": "object"}, seed=2**64 - 1)
    with pytest.raises(ValidationError):
        params.temperature = 1.0
    assert SamplingParams.model_validate_json(params.model_dump_json()) == params
