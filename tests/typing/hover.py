"""Asks pyright's language server, as an editor does, what it shows for a decorated endpoint under the mouse."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import IO, Any

TEXT = '''\
from cancelonleave import cancel_on_disconnect

@cancel_on_disconnect
async def report(year: int, *, q: str = "") -> list[int]:
    """Return the report."""
    return [year]

report
'''
SHOWN = ["report(", "year: int", 'q: str = ""', "list[int]", "Return the report."]


class Server:
    """A connection to the language server in JSON-RPC."""

    def __init__(self, stdin: IO[bytes], stdout: IO[bytes]) -> None:
        self.stdin = stdin
        self.stdout = stdout

    def send(self, **message: object) -> None:
        body = json.dumps({"jsonrpc": "2.0", **message}).encode()
        self.stdin.write(b"Content-Length: %d\r\n\r\n%s" % (len(body), body))
        self.stdin.flush()

    def request(self, method: str, params: object) -> Any:  # Any: a result of any shape
        self.send(id=method, method=method, params=params)
        while True:
            message = self.receive()
            if "method" in message and "id" in message:  # it asks for the editor's settings
                self.send(id=message["id"], result=None)
            elif message.get("id") == method:
                return message["result"]

    def receive(self) -> dict[str, Any]:
        length = 0
        while header := self.stdout.readline().strip():
            name, value = header.split(b": ")
            length = int(value) if name == b"Content-Length" else length
        message: dict[str, Any] = json.loads(self.stdout.read(length))
        return message


def main() -> None:
    """Exit with an error if the signature of the endpoint isn't shown as written."""
    with subprocess.Popen(["pyright-langserver", "--stdio"], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin
        assert process.stdout
        server = Server(process.stdin, process.stdout)
        root = Path.cwd().as_uri()
        uri = f"{root}/hovered.py"
        server.request("initialize", {"processId": None, "rootUri": root, "capabilities": {}})
        server.send(method="initialized", params={})
        document = {"uri": uri, "languageId": "python", "version": 1, "text": TEXT}
        server.send(method="textDocument/didOpen", params={"textDocument": document})
        position = {"line": TEXT.count("\n") - 1, "character": 2}
        hover = server.request("textDocument/hover", {"textDocument": {"uri": uri}, "position": position})
        server.request("shutdown", None)
        server.send(method="exit")
    print(hover["contents"]["value"])
    assert [part for part in SHOWN if part not in hover["contents"]["value"]] == []


if __name__ == "__main__":
    main()
