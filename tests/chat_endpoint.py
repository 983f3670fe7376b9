"""A chat-completions server on this machine that answers by a script, and every way in which it can misbehave."""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Endpoint(ThreadingHTTPServer):
    """Answers each request with the next of `script`, the last one for ever; records what it was asked."""

    daemon_threads, request_queue_size = True, 64

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.script, self.asked, self.times = [], [], []
        self.lock, self.busy, self.most_busy = threading.Lock(), 0, 0
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def handle_error(self, request, address):
        """A client that hangs up is what some of the tests are about."""


class Handler(BaseHTTPRequestHandler):
    """An action of the script is called with this; `body` is what was asked."""

    def do_POST(self):
        self.body = body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server = self.server
        with server.lock:
            server.asked.append({"path": self.path, "key": self.headers["Authorization"], **body})
            server.times.append(time.monotonic())
            action = server.script.pop(0) if len(server.script) > 1 else server.script[0]
            server.busy += 1
            server.most_busy = max(server.most_busy, server.busy)
            self.counted = True
        try:
            action(self)
        finally:
            self.release()

    def release(self):
        """Count this request as answered, once: with the reply in hand its client may already send the next."""
        with self.server.lock:
            self.server.busy -= self.counted
            self.counted = False

    def reply(self, data: bytes, status=200, length=None):
        self.release()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data) if length is None else length))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *arguments):
        pass


def says(content, finish_reason="stop", tokens=None, **message):
    """A chat completion; `tokens` is what the endpoint says it generated."""
    choice = {"message": {"role": "assistant", "content": content, **message}, "finish_reason": finish_reason}
    usage = {} if tokens is None else {"usage": {"completion_tokens": tokens}}
    body = json.dumps({"choices": [choice], **usage}).encode()
    return lambda handler: handler.reply(body)


def status(number):
    return lambda handler: handler.reply(b'{"error": "no"}', number)


def silent(handler):
    time.sleep(1.5)


def dripping(handler):
    handler.send_response(200)
    handler.end_headers()
    for _ in range(60):
        handler.wfile.write(b" ")
        handler.wfile.flush()
        time.sleep(0.05)


def dripping_header(handler):
    for _ in range(60):
        handler.wfile.write(b"H")
        handler.wfile.flush()
        time.sleep(0.05)


def reset(handler):
    handler.connection.close()


def sends(data, length=None):
    return lambda handler: handler.reply(data, length=length)
