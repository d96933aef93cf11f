import anyio, pytest
from fastapi import FastAPI, Depends
from cancelonleave import cancel_on_disconnect
from client import Client
pytestmark = pytest.mark.anyio

async def test_it(anyio_backend):
    app = FastAPI(); seen=[]
    async def tx():
        try: yield 1
        except BaseException as e: seen.append(type(e).__name__); raise
    @app.get("/x/{a}")
    @cancel_on_disconnect
    async def x(a: int, t: int = Depends(tx)) -> int:
        try: await anyio.sleep(1)
        finally: seen.append("clean")
        return a
    c = await Client(path="/x/3").request(app)
    assert c.status==200 and c.content==b"3"
    c = await Client(path="/x/3", leave_after=.1).request(app)
    assert c.status==499, c.sent
    assert seen==["clean","clean","ClientClosedRequest"]
