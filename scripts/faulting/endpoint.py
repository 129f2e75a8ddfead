"""A server on loopback that answers chat completions by a rule: the same request, the same text.

python endpoint.py         prints its port; ends with the process that started it
"""

import hashlib
import json
import re
import signal
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from verl_dft.processes import end_with_parent

_DELAY_S = 0.004
"""Of an answer, so that a run takes long enough to be interrupted in it."""


def answer(body: dict) -> str:
    """A text for a request: right, wrong, or without an answer, by a hash of question and seed."""
    asked = body["messages"][-1]["content"]
    number = int(hashlib.sha256(f"{asked}{body.get('seed')}".encode()).hexdigest()[:12], 16)
    found = re.findall(r"\d+", asked)
    value = int(found[0]) if found else 0
    forms = [
        rf"\frac{{{value}+x}}{{2}}",
        rf"\frac{{x}}{{2}}+\frac{{{value}}}{{2}}",
        rf"\frac{{x-{value}}}{{2}}",
        str(value),
    ]
    if number % 7 == 0:
        return f"I do not know ({number})."
    return f"Attempt {number}: it is \\boxed{{{forms[number % len(forms)]}}}."


class Handler(BaseHTTPRequestHandler):
    """Answers POST as an OpenAI-compatible server does."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        time.sleep(_DELAY_S)
        message = {"role": "assistant", "content": answer(body)}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        reply = {"id": "x", "model": "teacher", "choices": [choice], "usage": {"completion_tokens": 9}}
        sent = json.dumps(reply).encode()
        try:
            self.send_response(200)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(sent)))
            self.end_headers()
            self.wfile.write(sent)
        except OSError:
            pass  # whoever asked was killed

    def log_message(self, *_: object) -> None:
        pass


def main() -> None:
    end_with_parent(signal.SIGKILL)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.handle_error = lambda *_: None  # clients are killed here
    print(server.server_address[1], flush=True)
    server.serve_forever()


if __name__ == "__main__":
    sys.exit(main())
