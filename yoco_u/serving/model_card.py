"""What the server tells its clients about the model, without asking the engine to run it."""

import time

from yoco_u.budget import bytes_per_kv_element, kv_bytes, parameters
from yoco_u.inference import Engine
from yoco_u.serving.responses import KVBytes, Model, ModelFacts
from yoco_u.serving.settings import ServerSettings


class ModelCard:
    """Describes the one model of a server: for OpenAI's clients in `/v1/models`, for the page in `/model` and `/kv`.

    Args:
        has_chats: whether the model's chat template can be used.
    """

    def __init__(self, engine: Engine, settings: ServerSettings, has_chats: bool) -> None:
        self._engine, self._settings, self._has_chats, self._created = engine, settings, has_chats, int(time.time())

    def listed(self) -> Model:
        """The model's entry in `/v1/models`."""
        return Model(id=self._settings.model_name, created=self._created, max_model_len=self._engine.max_model_len)

    def facts(self) -> ModelFacts:
        """The model's size and shape, and how far requests may go."""
        engine, settings = self._engine, self._settings
        return ModelFacts(
            name=settings.model_name,
            chat=self._has_chats,
            parameters=parameters(engine.architecture).total,
            stages=[
                f"{stage.attention} x {stage.layers}" + (f", {stage.loops} loops" if stage.loops > 1 else "")
                for stage in engine.architecture.stages
            ],
            window=engine.architecture.window,
            num_loops=engine.num_loops,
            auto_loops=engine.auto_loops,
            auto_by_default=engine.settings.num_loops == "auto",
            max_num_loops=settings.max_num_loops,
            max_model_len=engine.max_model_len,
            max_output_tokens=settings.max_output_tokens,
            max_n=settings.max_n,
        )

    def kv_bytes(self, tokens: int, num_loops: int | None) -> KVBytes:
        """Bytes of keys and values that one sequence occupies, computed, not measured.

        Args:
            tokens: length of the sequence.
            num_loops: T; None for the engine's own.
        """
        architecture, kind = self._engine.architecture, self._engine.cache.shape.kind
        own, twin = architecture.with_loops(num_loops or self._engine.num_loops), architecture.dense_transformer()
        kept, usual = (kv_bytes(one, tokens, bytes_per_kv_element(one, kind)) for one in (own, twin))
        return KVBytes(bytes=kept, transformer_bytes=usual)
