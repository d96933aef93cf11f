"""A FastAPI application with an endpoint of each shape, decorated or not, and requests for each."""

import functools
from collections.abc import AsyncIterator, Coroutine
from typing import Annotated, Any

from fastapi import BackgroundTasks, Body, Depends, FastAPI, File, Form, Header, Path, Query, Response, UploadFile
from fastapi.responses import PlainTextResponse
from fastapi.routing import APIRouter
from pydantic import BaseModel
from starlette.requests import Request

from cancelonleave.testing import Exchange
from tests.shared.annotated_endpoints import Guard, Work, fastapi_router
from tests.shared.asking import ask


class Item(BaseModel):
    name: str
    price: float = 1.0


class OwnRequest(Request):
    pass


class Finder:
    def __init__(self, work: Work) -> None:
        self.work = work

    async def __call__(self, q: str = "instance") -> str:
        await self.work()
        return q


def number() -> int:
    return 1


async def number_async() -> int:
    return 2


async def number_yielded() -> AsyncIterator[int]:
    yield 3


Numbers = tuple[int, int, int, int]


def application(guard: Guard, work: Work) -> FastAPI:
    app = FastAPI(redirect_slashes=False)
    router = APIRouter(prefix="/router/{shop}", tags=["router"])
    mounted = FastAPI()

    @app.get("/no-request")
    @guard
    async def no_request() -> str:
        """Return a word."""
        await work()
        return "word"

    @app.get("/request")
    @guard
    async def own_request(request: Request) -> str:
        await work()
        return request.url.path

    @app.get("/renamed")
    @guard
    async def renamed(q: int, http: Request) -> str:
        await work()
        return f"{http.url.path} {q}"

    @app.get("/subclass")
    @guard
    async def subclass(http: OwnRequest) -> str:
        await work()
        return http.url.path

    @app.get("/annotated")
    @guard
    async def annotated(http: Annotated[Request, "not FastAPI's"]) -> str:
        await work()
        return http.url.path

    @app.post("/model-named-request")
    @guard
    async def model_named_request(request: Item) -> Item:
        await work()
        return request

    @app.post("/optional-model-named-request")
    @guard
    async def optional_model_named_request(request: Item | None = None) -> Item | None:
        await work()
        return request

    @app.post("/annotated-model-named-request")
    @guard
    async def annotated_model_named_request(request: Annotated[Item, Body(embed=True)]) -> Item:
        await work()
        return request

    @app.post("/list-named-request")
    @guard
    async def list_named_request(request: list[Item]) -> int:
        await work()
        return len(request)

    @app.post("/model-and-request")
    @guard
    async def model_and_request(request: Item, http: Request) -> str:
        await work()
        return request.name + http.method

    @app.get("/items/{item_id}")
    @guard
    async def path_and_query(
        item_id: Annotated[int, Path(ge=1)], tag: Annotated[list[str], Query()], limit: int = 10
    ) -> list[Any]:  # Any: a list of mixed types
        await work()
        return [item_id, tag, limit]

    @app.get("/header")
    @guard
    async def header(x_token: Annotated[str, Header()]) -> str:
        await work()
        return x_token

    @app.post("/model")
    @guard
    async def model(item: Item, other: Annotated[int, Body()] = 5) -> Item:
        await work()
        return Item(name=item.name, price=other)

    @app.post("/form")
    @guard
    async def form(name: Annotated[str, Form()], size: Annotated[int, Form()] = 3) -> str:
        await work()
        return name * size

    @app.post("/upload")
    @guard
    async def upload(file: UploadFile, raw: Annotated[bytes, File()] = b"") -> list[str | None]:
        await work()
        return [file.filename, (await file.read()).decode(), raw.decode()]

    @app.get("/depends")
    @guard
    async def depends(
        plain: Annotated[int, Depends(number)],
        coroutine: Annotated[int, Depends(number_async)],
        generator: Annotated[int, Depends(number_yielded)],
        function_scope: Annotated[int, Depends(number_yielded, scope="function", use_cache=False)],
    ) -> Numbers:
        await work()
        return plain, coroutine, generator, function_scope

    @app.get("/background")
    @guard
    async def background(tasks: BackgroundTasks, response: Response) -> None:
        tasks.add_task(number)
        response.headers["x-tasks"] = str(len(tasks.tasks))
        await work()

    @app.get("/status", status_code=202, response_model=Item, response_model_exclude_unset=True)
    @guard
    async def status() -> dict[str, str]:
        await work()
        return {"name": "status", "secret": "hidden by the response model"}

    @app.get("/text", response_class=PlainTextResponse, summary="Text", responses={404: {"description": "None"}})
    @guard
    async def text() -> str:
        await work()
        return "text"

    @app.get("/kwargs")
    @guard
    async def keywords(q: int, **kwargs: str) -> str:
        await work()
        return f"{q} {kwargs}"

    @guard
    async def dependency(http: Request, q: str = "dependency") -> str:
        await work()
        return http.method + q

    @guard
    async def dependency_without_request(q: str = "dependency") -> str:
        await work()
        return q

    @app.get("/decorated-dependency")
    async def decorated_dependency(found: Annotated[str, Depends(dependency)]) -> str:
        return found

    @app.get("/decorated-dependency-without-request")
    async def decorated_dependency_without_request(found: Annotated[str, Depends(dependency_without_request)]) -> str:
        return found

    @guard
    async def quick_dependency(http: Request) -> str:
        return http.method

    @app.get("/both-decorated")
    @guard
    async def both_decorated(found: Annotated[str, Depends(quick_dependency)]) -> str:
        await work()
        return found

    @router.get("/items/{item_id}")
    @guard
    async def routed(shop: str, item_id: int) -> str:
        await work()
        return f"{shop} {item_id}"

    @mounted.get("/items/{item_id}")
    @guard
    async def in_mounted(item_id: int) -> int:
        await work()
        return item_id

    async def multiply(q: int, factor: int) -> int:
        await work()
        return q * factor

    class Methods:
        @guard
        async def bound(self, q: int = 1) -> int:
            await work()
            return q

        @staticmethod
        @guard
        async def static(q: int = 2) -> int:
            await work()
            return q

        @classmethod
        @guard
        async def of_class(cls, q: int = 3) -> str:
            await work()
            return f"{cls.__name__} {q}"

    app.get("/partial", operation_id="partial")(guard(functools.partial(multiply, factor=2)))
    app.get("/partial-of-decorated", operation_id="of")(functools.partial(guard(multiply), factor=3))
    app.get("/instance")(guard(Finder(work)))
    app.get("/bound-method")(Methods().bound)
    app.get("/decorated-bound-method")(guard(Finder(work).__call__))
    app.get("/static-method")(Methods.static)
    app.get("/class-method")(Methods.of_class)
    app.include_router(router)
    app.include_router(fastapi_router(guard, work))
    app.mount("/mounted", mounted)
    return app


Ask = functools.partial[Coroutine[Any, Any, Exchange]]  # Any: what a coroutine is sent


def get(path: str, **headers: str) -> Ask:
    return functools.partial(ask, path=path, headers=headers)


def post(path: str, *chunks: bytes, content_type: str = "application/json") -> Ask:
    return functools.partial(ask, path=path, method="POST", headers={"Content-Type": content_type}, content=chunks)


def upload(path: str) -> Ask:
    lines = (
        b"--frontier",
        b'Content-Disposition: form-data; name="file"; filename="a.txt"',
        b"",
        b"content",
        b"--frontier--",
        b"",
    )
    body = b"\r\n".join(lines)
    return post(path, body[:30], body[30:], content_type="multipart/form-data; boundary=frontier")


REQUESTS = [
    get("/no-request"),
    get("/request"),
    get("/renamed?q=1"),
    get("/subclass"),
    get("/annotated"),
    post("/model-named-request", b'{"name":', b'"a"}'),
    post("/optional-model-named-request", b'{"name": "a"}'),
    post("/annotated-model-named-request", b'{"request": {"name": "a"}}'),
    post("/list-named-request", b'[{"name": "a"}]'),
    post("/model-and-request", b'{"name": "a"}'),
    get("/items/3?tag=a&tag=b"),
    get("/header", **{"X-Token": "secret"}),
    post("/model", b'{"item": {"name": "a"}, "other": 7}'),
    post("/form", b"name=", b"ab", content_type="application/x-www-form-urlencoded"),
    upload("/upload"),
    get("/depends"),
    get("/background"),
    get("/status"),
    get("/text"),
    get("/kwargs?q=1&kwargs=2"),
    get("/decorated-dependency?q=a"),
    get("/decorated-dependency-without-request?q=a"),
    get("/both-decorated"),
    get("/router/north/items/3"),
    get("/mounted/items/3"),
    get("/partial?q=2"),
    get("/partial-of-decorated?q=2"),
    get("/bound-method?q=5"),
    get("/decorated-bound-method?q=a"),
    get("/static-method?q=5"),
    get("/class-method?q=5"),
    post("/future/model", b'{"item": "a"}'),
    get("/future/own/3"),
    get("/future/hidden"),
    get("/future/result?count=2"),
]
INVALID_REQUESTS = [
    get("/renamed"),
    get("/items/0"),
    get("/header"),
    get("/kwargs?q=1"),
    post("/model", b'{"item": 1}'),
    post("/model-named-request", b"{"),
    post("/form", b"size=2", content_type="application/x-www-form-urlencoded"),
    get("/future/own/x"),
]


IDS = [str(request.keywords["path"]) for request in REQUESTS]
INVALID_IDS = [str(request.keywords["path"]) for request in INVALID_REQUESTS]
