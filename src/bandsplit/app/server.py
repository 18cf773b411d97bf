"""The page's server: on the loopback unless told otherwise, and without anything from other hosts."""

from __future__ import annotations

import os
import signal
import tempfile
import threading
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from bandsplit.app.uploads import MOST_BYTES
from bandsplit.errors import UserError
from bandsplit.inference.loading import load

POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; worker-src 'self' blob:"
)
"""What a browser may load for the page: nothing from other hosts, where Gradio would look for scripts and fonts."""


@dataclass(frozen=True)
class Request:
    """What the command line asks for."""

    model: Path
    checkpoint: str = "best"
    fusion: str | None = None
    host: str = "127.0.0.1"
    port: int = 7860


def serve(request: Request) -> None:
    """Serves the page until Ctrl-C or SIGTERM.

    Raises UserError if Gradio is missing, the model cannot be loaded, or the port is not free.
    """
    ended = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: ended.set())
    with served(request) as url:
        print(f"Serving {request.model} at {url}; Ctrl-C ends it", flush=True)
        if request.host not in ("127.0.0.1", "localhost", "::1"):
            print(f"--host {request.host}: everyone who reaches this machine can use the page", flush=True)
        ended.wait()


@contextmanager
def served(request: Request) -> Iterator[str]:
    """The URL of the page, which is served meanwhile. Uploads are kept in a folder that goes with it."""
    if find_spec("gradio") is None:
        raise UserError("bandsplit app needs Gradio: pip install -e .[app]")
    model = load(request.model, request.checkpoint, request.fusion)
    with tempfile.TemporaryDirectory(prefix="bandsplit-app-") as folder:
        os.environ |= {"GRADIO_TEMP_DIR": folder, "GRADIO_ANALYTICS_ENABLED": "False"}
        from starlette.middleware import Middleware

        from bandsplit.app import of_run, page

        if (request.model / "config.toml").is_file():
            examples = of_run.examples(request.model, model.description)
            made = page.Page(model, examples, of_run.cascade(request.model, request.checkpoint, model))
        else:
            made = page.Page(model)
        blocks = page.blocks(made, request.model.resolve().name)
        try:
            _, url, _ = blocks.launch(
                server_name=request.host,
                server_port=request.port,
                max_file_size=MOST_BYTES,
                theme=page.theme(),
                css=page.css(made),
                app_kwargs={"middleware": [Middleware(OwnContents)]},
                prevent_thread_lock=True,
                share=False,
                inbrowser=False,
                quiet=True,
                footer_links=[],
                run_history=False,
                ssr_mode=False,
                mcp_server=False,
                enable_monitoring=False,
                pwa=False,
            )
        except OSError as error:
            raise UserError(
                f"--host {request.host} --port {request.port}: the port is in use, or this machine has no such address"
            ) from error
        try:
            yield url
        finally:
            blocks.close(verbose=False)


class OwnContents:
    """ASGI middleware that adds POLICY to all answers."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: MutableMapping[str, Any], receive: Any, send: Any) -> None:
        async def sent(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"content-security-policy", POLICY.encode())]
            await send(message)

        await self._app(scope, receive, sent)
