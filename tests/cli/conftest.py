from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from email.message import Message
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

Answer = Callable[[str, Message], tuple[int, str]]  # of a path and headers: status and text


@pytest.fixture
def http_server() -> Iterator[Callable[[Answer], str]]:
    """Starts a server whose GETs are answered by a function; gives its URL."""
    servers = []

    def start(answer: Answer) -> str:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                status, text = answer(self.path, self.headers)
                self.send_response(status)
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, *args):
                pass

        servers.append(HTTPServer(("127.0.0.1", 0), Handler))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()
