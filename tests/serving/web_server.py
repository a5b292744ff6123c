"""A web server of one slide on 127.0.0.1, with the ranges, states and faults of servers of the field."""

import re
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
from safetensors.numpy import save

D = 64


def body(seed, n=300):
    return save({"features": np.random.default_rng(seed).standard_normal((n, D)).astype(np.float32)})


class Answer:
    """What is sent; a fault changes it."""

    def __init__(self, status, headers, data):
        self.status, self.headers, self.data = status, headers, data
        self.cut = None  # bytes after which the connection is closed
        self.pause = 0.0  # seconds before each piece of `piece` bytes
        self.piece = 1 << 20


class WebServer:
    """Counts requests for one byte, readings from the front (`body`), and requests by their ranges."""

    def __init__(self, data=None):
        self.data, self.etag, self.modified, self.ranges = data or body(0), '"one"', None, True
        self.asked, self.status, self.body_status, self.before_body = Counter(), None, None, lambda: None
        self.ranges_asked, self.at_once, self.most_at_once = [], 0, 0
        self.fault = lambda number, handler, answer: None  # number: of the request among those for more than a byte
        self.lock = threading.Lock()
        web = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                with web.lock:
                    web.at_once += 1
                    web.most_at_once = max(web.most_at_once, web.at_once)
                try:
                    web.answer(self)
                finally:
                    with web.lock:
                        web.at_once -= 1

            do_HEAD = do_GET

            def log_message(self, *args):
                pass

        class Server(ThreadingHTTPServer):
            request_queue_size = 64  # connections that wait; of five, one more would come a second late
            daemon_threads = True

        self.server = Server(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()  # polls for its end
        self.url = f"http://127.0.0.1:{self.server.server_port}/slides/a.safetensors"

    def close(self):
        self.server.shutdown()
        self.server.server_close()

    def answer(self, handler):
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", handler.headers.get("Range", ""))
        first, last = map(int, asked.groups()) if asked else (0, len(self.data) - 1)
        one_byte = last == 0
        number = len(self.ranges_asked)
        if one_byte:
            self.asked["one byte"] += 1
        else:
            self.ranges_asked.append((first, last))
            if first == 0:
                self.asked["body"] += 1
                self.before_body()
        answer = self._answer(handler, first, last, asked and self.ranges)
        if one_byte:
            answer.status = self.status or answer.status
        else:
            answer.status = self.body_status or self.status or answer.status
            self.fault(number, handler, answer)
        self._send(handler, answer)

    def _answer(self, handler, first, last, partly):
        data, status, headers = self.data, 200, {}
        if handler.headers.get("If-Match", self.etag) != self.etag:
            return Answer(412, {"Content-Length": "0"}, b"")
        if partly and first >= len(data):
            return Answer(416, {"Content-Range": f"bytes */{len(data)}", "Content-Length": "0"}, b"")
        if partly:
            last = min(last, len(data) - 1)
            status, headers = 206, {"Content-Range": f"bytes {first}-{last}/{len(data)}"}
            data = data[first : last + 1]
        headers |= {"ETag": self.etag, "Last-Modified": self.modified, "Content-Length": str(len(data))}
        return Answer(status, headers, data)

    def _send(self, handler, answer):
        handler.send_response(answer.status)
        for name, value in answer.headers.items():
            if value is not None:
                handler.send_header(name, value)
        handler.end_headers()
        if handler.command == "HEAD":
            return
        data = answer.data if answer.cut is None else answer.data[: answer.cut]
        try:
            for begin in range(0, len(data), answer.piece):
                threading.Event().wait(answer.pause)
                handler.wfile.write(data[begin : begin + answer.piece])
        except OSError:  # a client that knows enough by the headers hangs up
            handler.close_connection = True
