"""transformers' own common tests of causal language models, run on our classes.

They are not part of its wheel. With `parameterized` and `httpx` installed and a checkout of the transformers repository at the
installed version:

    TRANSFORMERS_SOURCE=/path/to/transformers pytest -o addopts= -W ignore tests/model/test_transformers_common.py

(`addopts` is emptied because those tests bring markers of their own.)
"""

import os
import sys
import unittest
from pathlib import Path
from typing import Any

import pytest

from yoco_u import YocoUConfig, YocoUForCausalLM, YocoUModel

SOURCE = os.environ.get("TRANSFORMERS_SOURCE")
if not SOURCE:
    pytest.skip("TRANSFORMERS_SOURCE names no checkout of the transformers repository", allow_module_level=True)
if not (Path(SOURCE) / "tests" / "causal_lm_tester.py").exists():
    pytest.fail(f"TRANSFORMERS_SOURCE is {SOURCE}, which holds no tests/causal_lm_tester.py")
sys.path.insert(0, SOURCE)

from tests.causal_lm_tester import CausalLMModelTest, CausalLMModelTester  # noqa: E402

STAGES: dict[str, list[dict[str, Any]]] = {
    "yoco_u": [{"attention": "sliding", "layers": 1, "loops": 2}, {"attention": "cross", "layers": 1}],
    "rins": [{"attention": "full", "layers": 1, "loops": 2, "loop_gate": 0.3}, {"attention": "full", "layers": 1}],
    "yoco_retention": [{"attention": "retention", "layers": 2}, {"attention": "cross", "layers": 1}],
}
EXPERTS = {"num_experts": 8, "experts_per_token": 2, "intermediate_size": 16}

SKIPPED = {
    "test_past_key_values_format": "slots hold a window, a state or the global KV, not one row per token and layer",
    "test_num_layers_is_small": "three blocks are the fewest that have a loop and something behind it",
    "test_fsdp2": "models are sharded from outside, by yoco_u.training.parallelize, which tests/training covers",
    "test_hsdp": "models are sharded from outside, by yoco_u.training.parallelize, which tests/training covers",
    "test_ddp": "models are replicated from outside, by yoco_u.training.parallelize, which tests/training covers",
    "test_fsdp": "models are sharded from outside, by yoco_u.training.parallelize, which tests/training covers",
}
"""Reasons by the beginning of a test's name."""


class Tester(CausalLMModelTester):
    base_model_class = YocoUModel
    config_class = YocoUConfig
    causal_lm_class = YocoUForCausalLM
    kind = "yoco_u"

    def __init__(self, parent: Any, **kwargs: Any) -> None:
        super().__init__(parent, **kwargs)
        self.stages = STAGES[self.kind]
        self.window = 4 if self.kind == "yoco_u" else None
        self.num_hidden_layers = 3


class RinsTester(Tester):
    kind = "rins"


class RetentionTester(Tester):
    kind = "yoco_retention"


class ExpertsTester(Tester):
    def __init__(self, parent: Any, **kwargs: Any) -> None:
        super().__init__(parent, **kwargs)
        self.experts = EXPERTS


class Common(CausalLMModelTest):
    has_attentions = False  # no weights of attention are returned: kernels don't make them

    def setUp(self) -> None:
        super().setUp()
        for name, reason in SKIPPED.items():
            if self._testMethodName.startswith(name):
                self.skipTest(reason)

    def _check_hidden_states_for_generate(
        self, batch_size: int, hidden_states: Any, prompt_length: int, output_length: int, config: Any, use_cache: bool = False
    ) -> None:
        """The last blocks run on the kept positions only, so lengths differ from layer to layer."""
        self.assertEqual(len(hidden_states), output_length - prompt_length)
        for step in hidden_states:
            self.assertEqual(len(step), config.num_hidden_layers + 1)
            self.assertEqual({(h.shape[0], h.shape[2]) for h in step}, {(batch_size, config.hidden_size)})

    def _check_past_key_values_for_generate(self, batch_size: int, past_key_values: Any, seq_length: int, config: Any) -> None:
        """Slots hold a window or a state; only the last, the global KV or the last full layer, has a row per token."""
        self.assertEqual(past_key_values.get_seq_length(), seq_length)
        shape = (batch_size, config.num_key_value_heads, seq_length, config.head_dim)
        self.assertEqual(past_key_values.layers[-1].keys.shape, shape)

    def test_left_padding_compatibility(self, *args: Any, **kwargs: Any) -> None:
        """With rows that have no padding on the right: there padding sees only padding, so its own logits mean nothing."""
        self.has_attentions = True  # without attentions the test takes padding for unsupported
        super().test_left_padding_compatibility(unpadded_custom_inputs={"attention_mask": None})


class TestYocoU(Common, unittest.TestCase):
    model_tester_class = Tester


class TestRins(Common, unittest.TestCase):
    model_tester_class = RinsTester


class TestRetention(Common, unittest.TestCase):
    model_tester_class = RetentionTester

    def test_assisted_decoding_matches_greedy_search_0_random(self) -> None:
        self.skipTest("a retention state cannot take back the tokens that an assistant guessed wrongly")

    def test_assisted_decoding_matches_greedy_search_1_same(self) -> None:
        self.skipTest("a retention state cannot take back the tokens that an assistant guessed wrongly")


class TestExperts(Common, unittest.TestCase):
    model_tester_class = ExpertsTester


del CausalLMModelTest, Common  # or they are collected on their own
