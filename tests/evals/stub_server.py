"""An OpenAI-compatible server that answers, misbehaves or keeps silent, as a test says."""

import contextlib
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

MODEL = "stub"


class Stub(ThreadingHTTPServer):
    """`behave(question, body)` gives a text to answer with, or the name of a misbehaviour.

    Attributes:
      bodies: every request of a completion.
      most_at_once: questions that were thought about together.
    """

    daemon_threads = True
    request_queue_size = 64
    SILENT, DRIP, GARBAGE, NULL, CLOSE, BUSY, BROKEN, REFUSED = (
        *("<silent>", "<drip>", "<garbage>", "<null>", "<close>", "<busy>", "<500>", "<400>"),
    )

    def __init__(self, behave):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.behave, self.bodies, self.ended = behave, [], threading.Event()
        self.lock, self.open, self.most_at_once = threading.Lock(), 0, 0

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class _Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_GET(self):
        self._reply(200, json.dumps({"data": [{"id": MODEL}]}))

    def do_POST(self):
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server.bodies.append(body)
        chat = self.path.endswith("/chat/completions")
        question = body["messages"][-1]["content"] if chat else body["prompt"]
        with server.lock:
            server.open += 1
            server.most_at_once = max(server.most_at_once, server.open)
        text = server.behave(question, body)
        with server.lock:  # before the reply, whose reader may call again at once
            server.open -= 1
        self._behave(text, chat)

    def _behave(self, text, chat):
        if text == Stub.SILENT:
            self.server.ended.wait(30)
        elif text == Stub.DRIP:
            self.send_response(200)
            self.end_headers()
            end = time.monotonic() + 30
            with contextlib.suppress(OSError):
                while time.monotonic() < end and not self.server.ended.wait(0.05):
                    self.wfile.write(b" ")
                    self.wfile.flush()
        elif text == Stub.CLOSE:
            self.close_connection = True
        elif text in (Stub.BUSY, Stub.BROKEN, Stub.REFUSED):
            status = {Stub.BUSY: 429, Stub.BROKEN: 500, Stub.REFUSED: 400}[text]
            self._reply(status, json.dumps({"error": {"message": "no"}}))
        elif text == Stub.GARBAGE:
            self._reply(200, "<html>{")
        else:
            text = None if text == Stub.NULL else text
            said = {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
            choice = {"index": 0, "finish_reason": "stop", **said}
            self._reply(200, json.dumps({"choices": [choice]}))

    def _reply(self, status, text):
        data = text.encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@contextlib.contextmanager
def stub(behave):
    """A running `Stub`."""
    server = Stub(behave)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield server
    finally:
        server.ended.set()
        server.shutdown()
        thread.join()
        server.server_close()
