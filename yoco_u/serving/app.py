"""The routes: where every HTTP request enters.

A request for text goes one way: its route here, `Admission`, `EngineLoop.submit`, an `Answer`. The routes are functions of this
module, which get what they need from the application, because FastAPI keeps every route for as long as the process lives.
"""

import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from fastapi import APIRouter, Depends, FastAPI, Query, Request, Response
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import FileResponse

from yoco_u.errors import UserError
from yoco_u.inference import Engine
from yoco_u.inference.chat_template import template_file, why_no_chats
from yoco_u.serving import errors
from yoco_u.serving.admission import Admission
from yoco_u.serving.answers import respond
from yoco_u.serving.auth import ApiKeys
from yoco_u.serving.chat import ChatAnswer
from yoco_u.serving.completions import CompletionAnswer
from yoco_u.serving.engine_loop import EngineLoop
from yoco_u.serving.errors import RESPONSES, ApiError
from yoco_u.serving.jobs import NotServing
from yoco_u.serving.limits import BodyLimit, BodyRoute, HeadRequests, Parsing
from yoco_u.serving.metrics import Metrics
from yoco_u.serving.model_card import ModelCard
from yoco_u.serving.requests import ChatRequest, CompletionRequest
from yoco_u.serving.responses import ChatResponse, CompletionResponse, Health, KVBytes, Model, ModelFacts, ModelList
from yoco_u.serving.settings import ServerSettings
from yoco_u.serving.token_texts import TokenTexts
from yoco_u.version import __version__

log = logging.getLogger("yoco_u.serving")

PAGE = Path(__file__).parent / "page"
_FILES = {path.name: path for path in PAGE.iterdir() if path.is_file()}

_PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


@dataclass(frozen=True)
class _Parts:
    """What the routes use, as `app.state.parts`."""

    admission: Admission
    loop: EngineLoop
    card: ModelCard
    metrics: Metrics
    model_name: str
    texts: TokenTexts


async def _parts(request: Request) -> _Parts:
    parts: _Parts = request.app.state.parts
    return parts


Parts = Annotated[_Parts, Depends(_parts)]

routes = APIRouter(route_class=BodyRoute)


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
    most_loops = max(settings.max_num_loops, engine.num_loops)  # a request may name the T that it has anyway
    settings = settings.model_copy(update={"max_num_loops": most_loops})
    metrics = Metrics(engine)
    loop = EngineLoop(engine, settings.max_waiting, settings.time_limit, settings.step_seconds, metrics, died)
    metrics.watch(loop)
    no_chats = why_no_chats(engine.tokenizer)
    if no_chats is not None and engine.tokenizer.chat_template:
        log.warning("%s: %s", template_file(engine.tokenizer), no_chats)
    if isinstance(engine.exits, UserError):
        log.warning("%s", engine.exits)
    card = ModelCard(engine, settings, no_chats is None)
    admission = Admission(engine, engine.tokenizer, loop, settings, no_chats)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        loop.start()
        yield
        await loop.stop()

    app = FastAPI(
        title="yoco-u", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None, responses=RESPONSES
    )  # without FastAPI's pages for documentation, which load scripts from other sites
    app.state.loop, app.state.parsing = loop, Parsing()
    app.state.parts = _Parts(admission, loop, card, metrics, settings.model_name, TokenTexts(engine.tokenizer))
    app.include_router(routes)
    errors.install(app)
    app.add_middleware(HeadRequests)
    app.add_middleware(BodyLimit, max_bytes=settings.max_body_bytes)
    if settings.api_keys:
        app.add_middleware(ApiKeys, keys=[key.get_secret_value() for key in settings.api_keys])
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=settings.cors_origins, allow_methods=["GET", "POST"], allow_headers=["*"]
        )
    return app


@routes.get("/v1/models")
async def models(parts: Parts) -> ModelList:
    """The one model that is served."""
    return ModelList(data=[parts.card.listed()])


@routes.get("/v1/models/{name:path}")
async def one_model(name: str, parts: Parts) -> Model:
    """The model, by its name."""
    if name != parts.model_name:
        raise ApiError(404, f"no model {name!r} here; there is {parts.model_name!r}", param="model", code="model_not_found")
    return parts.card.listed()


@routes.post("/v1/completions", response_model=CompletionResponse)
async def completions(body: CompletionRequest, parts: Parts) -> Response:
    """Continue prompts; with `stream`, as server-sent events of the same shape."""
    job = await parts.admission.completion(body)
    return await respond(CompletionAnswer(body, job, parts.model_name, parts.texts))


@routes.post("/v1/chat/completions", response_model=ChatResponse)
async def chat_completions(body: ChatRequest, parts: Parts) -> Response:
    """Answer a chat; with `stream`, as server-sent events (`chat.completion.chunk`)."""
    job = await parts.admission.chat(body)
    return await respond(ChatAnswer(body, job, parts.model_name, parts.texts))


@routes.get("/health")
async def health(parts: Parts) -> Health:
    """200 while requests are taken, else 503."""
    if parts.loop.refusal:
        raise NotServing(parts.loop.refusal)
    return Health()


@routes.get("/metrics", responses={200: {"content": {"text/plain": {}}}}, response_class=Response)
async def prometheus(parts: Parts) -> Response:
    """Counts and times for Prometheus."""
    return Response(parts.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


@routes.get("/model")
async def facts(parts: Parts) -> ModelFacts:
    """What the page shows of the model."""
    return parts.card.facts()


@routes.get("/kv")
async def kv(
    parts: Parts, tokens: int = Query(ge=0, le=2**40), num_loops: int | None = Query(default=None, ge=1, le=1000)
) -> KVBytes:
    """Bytes of keys and values of one sequence, by arithmetic; a Transformer's of the same shape beside them."""
    return parts.card.kv_bytes(tokens, num_loops)


@routes.get("/", include_in_schema=False)
async def page() -> Response:
    return FileResponse(PAGE / "index.html", headers=_PAGE_HEADERS)


@routes.get("/page/{name}", include_in_schema=False)
async def part_of_page(name: str) -> Response:
    if name not in _FILES:
        raise ApiError(404, f"the page has no part {name!r}")
    return FileResponse(_FILES[name], headers=_PAGE_HEADERS)
