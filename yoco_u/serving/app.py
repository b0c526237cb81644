"""The routes: where every HTTP request enters.

A request for text goes one way: its route here, `Admission`, `EngineLoop.submit`, an `Answer`.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

from fastapi import FastAPI, Query, Request, Response
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import FileResponse

from yoco_u.errors import UserError
from yoco_u.inference import Engine
from yoco_u.serving import errors
from yoco_u.serving.admission import Admission
from yoco_u.serving.answers import respond
from yoco_u.serving.auth import ApiKeys
from yoco_u.serving.chat import ChatAnswer
from yoco_u.serving.completions import CompletionAnswer
from yoco_u.serving.engine_loop import EngineLoop
from yoco_u.serving.errors import RESPONSES, ApiError
from yoco_u.serving.jobs import NotServing
from yoco_u.serving.limits import BodyLimit, OneBodyAtATime
from yoco_u.serving.metrics import Metrics
from yoco_u.serving.model_card import ModelCard
from yoco_u.serving.requests import ChatRequest, CompletionRequest
from yoco_u.serving.responses import ChatResponse, CompletionResponse, Health, KVBytes, Model, ModelFacts, ModelList
from yoco_u.serving.settings import ServerSettings
from yoco_u.serving.token_texts import TokenTexts
from yoco_u.version import __version__

PAGE = Path(__file__).parent / "page"

_PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def create_app(engine: Engine, settings: ServerSettings, died: Callable[[], None] = lambda: None) -> FastAPI:
    """The server's ASGI application.

    Args:
        engine: belongs to the application from now on, and runs while the application's lifespan does.
        died: called if the engine has failed for good; requests for text and /health are answered with 503 from then on.

    Returns:
        The application; `state.loop` is its engine loop.

    Raises:
        UserError: if the engine has no tokenizer.
    """
    if engine.tokenizer is None:
        raise UserError("the engine has no tokenizer; texts cannot be served without one")
    metrics = Metrics(engine)
    loop = EngineLoop(engine, settings.max_waiting, settings.time_limit, settings.step_seconds, metrics, died)
    metrics.watch(loop)
    card = ModelCard(engine, settings)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        loop.start()
        yield
        await loop.stop()

    app = FastAPI(
        title="yoco-u", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None, responses=RESPONSES
    )  # without FastAPI's pages for documentation, which load scripts from other sites
    app.router.route_class = OneBodyAtATime
    app.state.loop, app.state.parsing = loop, asyncio.Lock()
    errors.install(app)
    _add_models(app, card, settings.model_name)
    admission = Admission(engine, engine.tokenizer, loop, settings)
    _add_generation(app, admission, loop, settings.model_name, TokenTexts(engine.tokenizer))
    _add_state(app, loop, metrics)
    _add_figures(app, card)
    _add_page(app)
    app.add_middleware(BodyLimit, max_bytes=settings.max_body_bytes)
    if settings.api_keys:
        app.add_middleware(ApiKeys, keys=[key.get_secret_value() for key in settings.api_keys])
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=settings.cors_origins, allow_methods=["GET", "POST"], allow_headers=["*"]
        )
    return app


def _add_models(app: FastAPI, card: ModelCard, model_name: str) -> None:
    @app.get("/v1/models")
    async def models() -> ModelList:
        """The one model that is served."""
        return ModelList(data=[card.listed()])

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str) -> Model:
        """The model, by its name."""
        if name != model_name:
            raise ApiError(404, f"no model {name!r} here; there is {model_name!r}", param="model", code="model_not_found")
        return card.listed()


def _add_generation(app: FastAPI, admission: Admission, loop: EngineLoop, model_name: str, texts: TokenTexts) -> None:
    @app.post("/v1/completions", response_model=CompletionResponse)
    async def completions(body: CompletionRequest, request: Request) -> Response:
        """Continue prompts; with `stream`, as server-sent events of the same shape."""
        prompts, params = await admission.completion(body)
        job = await loop.submit(prompts, params)
        return await respond(CompletionAnswer(body, job, model_name, texts), request)

    @app.post("/v1/chat/completions", response_model=ChatResponse)
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        """Answer a chat; with `stream`, as server-sent events (`chat.completion.chunk`)."""
        prompts, params = await admission.chat(body)
        job = await loop.submit(prompts, params)
        return await respond(ChatAnswer(body, job, model_name, texts), request)


def _add_state(app: FastAPI, loop: EngineLoop, metrics: Metrics) -> None:
    @app.get("/health")
    async def health() -> Health:
        """200 while requests are taken, else 503."""
        if loop.refusal:
            raise NotServing(loop.refusal)
        return Health()

    @app.get("/metrics", responses={200: {"content": {"text/plain": {}}}}, response_class=Response)
    async def prometheus() -> Response:
        """Counts and times for Prometheus."""
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


def _add_figures(app: FastAPI, card: ModelCard) -> None:
    @app.get("/model")
    async def facts() -> ModelFacts:
        """What the page shows of the model."""
        return card.facts()

    @app.get("/kv")
    async def kv(tokens: int = Query(ge=0, le=2**40), num_loops: int | None = Query(default=None, ge=1, le=1000)) -> KVBytes:
        """Bytes of keys and values of one sequence, by arithmetic; a Transformer's of the same shape beside them."""
        return card.kv_bytes(tokens, num_loops)


def _add_page(app: FastAPI) -> None:
    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        return FileResponse(PAGE / "index.html", headers=_PAGE_HEADERS)

    files = {path.name: path for path in PAGE.iterdir() if path.is_file()}

    @app.get("/page/{name}", include_in_schema=False)
    async def part_of_page(name: str) -> Response:
        if name not in files:
            raise ApiError(404, f"the page has no part {name!r}")
        return FileResponse(files[name], headers=_PAGE_HEADERS)
