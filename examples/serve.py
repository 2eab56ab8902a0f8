"""Serve a merged model with its experts: `python examples/serve.py merged --port 8000`.

    curl localhost:8000/generate -d '{"prompt": "2 + 2 =", "expert": "math", "max_new_tokens": 20}'
    curl localhost:8000/generate -N -d '{"prompt": "def f(", "stream": true}'

Requests that wait are generated together, each with the expert it names; without "expert" the router chooses that was
saved in the merged model, where there is one, else the backbone answers; null is the backbone alone. A stream is
server-sent events, {"text": ...} as it grows, then {"done": true, ...}. What is wrong with a request is said as
{"error": {"type", "message"}}. GET /experts, /health and /metrics (Prometheus). On SIGTERM what has begun is finished.

Batches are static: a request that comes while one is generated waits for its end. It needs
`pip install 'freemerge[serve]'`.
"""

import argparse
import asyncio
import json
import queue
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers
import uvicorn
from fastapi import FastAPI
from fastapi.requests import Request as HttpRequest
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from serve_batches import ROUTER, Engine, Request, emitter
from serve_metrics import Metrics
from starlette.exceptions import HTTPException

import freemerge
from freemerge.errors import InputError
from freemerge.routers import load_router
from freemerge.routers.files import find_router


@dataclass(frozen=True)
class Limits:
    """What the service takes; patience is in seconds."""

    max_batch: int = 32
    patience: float = 0.005
    max_waiting: int = 512
    max_prompt_tokens: int = 2048
    max_new_tokens: int = 512
    max_body_bytes: int = 1 << 20

    def __post_init__(self):
        wrong = [f"{name} {value}" for name, value in vars(self).items() if value < (0 if name == "patience" else 1)]
        if wrong:
            raise InputError(f"{', '.join(wrong)}: limits are at least 1, patience is not negative")


class Body(BaseModel):
    """What /generate takes."""

    model_config = ConfigDict(extra="forbid", strict=True)

    prompt: str
    expert: str | None = None
    max_new_tokens: int = Field(64, ge=1)
    temperature: float = Field(0.0, ge=0, le=100, allow_inf_nan=False)
    seed: int = Field(0, ge=0, lt=2**63)
    stream: bool = False


class Refused(Exception):
    """A request that is not answered."""

    def __init__(self, status: int, kind: str, message: str):
        super().__init__(message)
        self.status, self.kind = status, kind


class Service:
    """The parts of a running service."""

    def __init__(self, model: Any, tokenizer: Any, router: Any = None, limits: Limits | None = None):
        self.model, self.tokenizer = model.eval(), tokenizer
        self.route = router.bind(model) if router is not None else None
        self.limits, self.metrics = limits or Limits(), Metrics()
        self.engine: Engine | None = None

    @classmethod
    def load(cls, merged: str, limits: Limits, device: str | None = None) -> "Service":
        """Of a merged folder: model, tokenizer, and the router if there is one."""
        model = freemerge.load(merged, device=device)
        router = load_router(merged) if find_router(Path(merged)) else None
        return cls(model, transformers.AutoTokenizer.from_pretrained(merged), router, limits)

    def start(self) -> None:
        limits = {name: getattr(self.limits, name) for name in ("max_batch", "patience", "max_waiting")}
        self.engine = Engine(self.model, self.tokenizer, self.route, metrics=self.metrics, **limits)

    def checked(self, data: bytes) -> tuple[Body, list[int], Any]:
        """A request's body, its prompt's tokens, and its expert. Raises Refused."""
        try:
            body = Body.model_validate_json(data)
        except ValidationError as error:
            said = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'body'}: {e['msg']}" for e in error.errors())
            raise Refused(400, "malformed", said) from None
        expert = self._expert(body)
        if body.max_new_tokens > self.limits.max_new_tokens:
            message = f"max_new_tokens {body.max_new_tokens}: at most {self.limits.max_new_tokens}"
            raise Refused(400, "too_long", message)
        try:
            ids = self.tokenizer(body.prompt)["input_ids"]
        except UnicodeEncodeError:
            raise Refused(400, "malformed", "prompt: half a character (a lone surrogate)") from None
        longest = self._longest_prompt(body.max_new_tokens)
        if longest < 1:
            message = f"max_new_tokens {body.max_new_tokens} leaves no room for a prompt in the model's context"
            raise Refused(400, "too_long", message)
        if not 0 < len(ids) <= longest:
            message = f"the prompt has {len(ids)} tokens, allowed are 1 to {longest}"
            raise Refused(400, "too_long" if ids else "empty", message)
        return body, ids, expert

    def _longest_prompt(self, new_tokens: int) -> int:
        context = getattr(self.model.config, "max_position_embeddings", None)
        return min(self.limits.max_prompt_tokens, context - new_tokens if context else self.limits.max_prompt_tokens)

    def _expert(self, body: Body) -> Any:
        if "expert" not in body.model_fields_set:
            return ROUTER if self.route is not None else None
        if body.expert is not None and body.expert not in self.model.experts:
            message = f"no expert {body.expert!r}; there are: {', '.join(self.model.experts)}"
            raise Refused(404, "unknown_expert", message)
        return body.expert


def create_app(service: Service) -> FastAPI:
    """The service as an ASGI application."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.start()
        try:
            yield
        finally:
            await asyncio.to_thread(service.engine.close)

    app = FastAPI(title="freemerge", lifespan=lifespan)

    @app.exception_handler(Refused)
    async def refuse(_: HttpRequest, error: Refused) -> JSONResponse:
        service.metrics.requests.add(str(error.status))
        headers = {"Retry-After": "1"} if error.status in (429, 503) else None
        return JSONResponse({"error": {"type": error.kind, "message": str(error)}}, error.status, headers)

    @app.exception_handler(HTTPException)
    async def no_such_page(_: HttpRequest, error: HTTPException) -> JSONResponse:
        kind = error.detail.lower().replace(" ", "_")
        return JSONResponse({"error": {"type": kind, "message": error.detail}}, error.status_code, error.headers)

    @app.get("/health")
    def health() -> JSONResponse:
        well = service.engine.alive
        facts = {
            "status": "ok" if well else "stopping",
            "experts": service.model.experts,
            "waiting": service.engine.waiting,
        }
        return JSONResponse(facts, 200 if well else 503)

    @app.get("/experts")
    def experts() -> dict[str, Any]:
        return {"experts": service.model.experts, "router": service.route is not None}

    @app.get("/metrics")
    def metrics() -> PlainTextResponse:
        text = service.metrics.text(service.engine.waiting)
        return PlainTextResponse(text, media_type="text/plain; version=0.0.4")

    @app.post("/generate")
    async def generate(http: HttpRequest):
        body, ids, expert = service.checked(await limited_body(http, service.limits.max_body_bytes))
        events: asyncio.Queue[dict] = asyncio.Queue()
        emit = emitter(asyncio.get_running_loop(), events)
        request = Request(ids, expert, body.max_new_tokens, body.temperature, body.seed, emit)
        submit(service.engine, request)
        if body.stream:
            return StreamingResponse(streamed(service, request, events), media_type="text/event-stream")
        return await whole(service, http, request, events)

    return app


async def limited_body(http: HttpRequest, limit: int) -> bytes:
    """The body, read no further than the limit whatever its header says."""
    data = bytearray()
    async for part in http.stream():
        data += part
        if len(data) > limit:
            raise Refused(413, "too_large", f"the body is larger than {limit} bytes")
    return bytes(data)


def submit(engine: Engine, request: Request) -> None:
    if not engine.alive:
        raise Refused(503, "stopping", "the service is stopping")
    try:
        engine.submit(request)
    except queue.Full:
        raise Refused(429, "busy", "too many requests wait; try again") from None


async def whole(service: Service, http: HttpRequest, request: Request, events: asyncio.Queue) -> dict[str, Any]:
    """The answer of a request that is not streamed; a client that goes away ends it."""
    watching = asyncio.create_task(cancelled_by(http, request))
    try:
        text = ""
        while "text" in (event := await events.get()):
            text += event["text"]
    finally:
        request.cancelled = True  # where this task is cancelled; else it is done
        watching.cancel()
    if "error" in event:
        raise Refused(500, "failed", event["error"])
    service.metrics.requests.add("200")
    return {"text": text} | {key: value for key, value in event.items() if key != "done"}


async def cancelled_by(http: HttpRequest, request: Request) -> None:
    """Cancel the request when its client goes away; its body has been read."""
    while (await http.receive())["type"] != "http.disconnect":
        pass
    request.cancelled = True


async def streamed(service: Service, request: Request, events: asyncio.Queue) -> AsyncIterator[str]:
    """Server-sent events of a request; a client that goes away ends it."""
    try:
        while True:
            event = await events.get()
            if "error" in event:
                event = {"error": {"type": "failed", "message": event["error"]}}
            yield f"data: {json.dumps(event, ensure_ascii=False)}\n\n"
            if "text" not in event:
                service.metrics.requests.add("200" if "done" in event else "500")
                return
    finally:
        request.cancelled = True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("merged", help="a folder written by freemerge merge with experts")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--device", help="e.g. cuda; the CPU unless given")
    for name, value in vars(Limits()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    options = parser.parse_args()
    try:
        limits = Limits(**{name: getattr(options, name) for name in vars(Limits())})
        service = Service.load(options.merged, limits, options.device)
    except InputError as error:
        raise SystemExit(str(error)) from None
    uvicorn.run(create_app(service), host=options.host, port=options.port, timeout_graceful_shutdown=60)


if __name__ == "__main__":
    main()
