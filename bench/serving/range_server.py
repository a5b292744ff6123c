"""A web server of one folder, as object storage answers: ranges, ETag, a delay and a bound for each connection.

`python range_server.py FOLDER DELAY_MS MB_A_SECOND [--whole]` prints its port. 0: no bound. `--whole`: without ranges.
"""

from __future__ import annotations

import re
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

PIECE = 256 << 10


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    folder: Path
    delay: float  # seconds before each answer
    rate: float  # bytes a second of a connection; 0: no bound
    whole: bool

    def do_GET(self) -> None:
        time.sleep(self.delay)
        path = self.folder / Path(self.path).name
        if not path.is_file():
            self.send_error(404)
            return
        size = path.stat().st_size
        asked = None if self.whole else re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        first, last = map(int, asked.groups()) if asked else (0, size - 1)
        last = min(last, size - 1)
        self.send_response(206 if asked else 200)
        if asked:
            self.send_header("Content-Range", f"bytes {first}-{last}/{size}")
        self.send_header("Content-Length", str(last + 1 - first))
        self.send_header("ETag", f'"{path.name}"')
        self.end_headers()
        try:
            self._send(path, first, last + 1)
        except OSError:  # the client knows enough by the headers
            self.close_connection = True

    def _send(self, path: Path, begin: int, end: int) -> None:
        start, sent = time.perf_counter(), 0
        with path.open("rb") as file:
            file.seek(begin)
            while sent < end - begin:
                piece = file.read(min(PIECE, end - begin - sent))
                self.wfile.write(piece)
                sent += len(piece)
                if self.rate:
                    time.sleep(max(0.0, sent / self.rate - (time.perf_counter() - start)))

    def log_message(self, *args: object) -> None:
        pass


class Server(ThreadingHTTPServer):
    request_queue_size = 64
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that hangs up is none of its faults."""


if __name__ == "__main__":
    Handler.folder, Handler.delay = Path(sys.argv[1]), float(sys.argv[2]) / 1e3
    Handler.rate, Handler.whole = float(sys.argv[3]) * 1e6, "--whole" in sys.argv
    server = Server(("127.0.0.1", 0), Handler)
    print(server.server_port, flush=True)
    server.serve_forever()
