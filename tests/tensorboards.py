"""A real TensorBoard, asked over HTTP as its page asks it."""

import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from urllib.parse import urlencode

PATIENCE = 90
"""Seconds that TensorBoard may take to start and to read."""


@contextmanager
def tensorboard(folder):
    """A server of the runs below a folder: a function from a path, and what to ask for, to the answer."""
    with socket.socket() as probing:
        probing.bind(("127.0.0.1", 0))
        port = probing.getsockname()[1]
    command = ["-m", "tensorboard.main", "--logdir", str(folder), "--host", "127.0.0.1", "--port", str(port)]
    server = subprocess.Popen([sys.executable, *command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def ask(path, post=None, **query):
        address = f"http://127.0.0.1:{port}/data/{path}" + (f"?{urlencode(query)}" if query else "")
        data = None if post is None else json.dumps(post).encode()
        request = urllib.request.Request(address, data, {"Content-Type": "application/json"} if data else {})
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.load(answer)

    try:
        yield ask
    finally:
        server.terminate()
        server.wait(timeout=20)


def wait_for(ask, path, is_there):
    """What a path answers as soon as it is complete."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        try:
            answer = ask(path)
            if is_there(answer):
                return answer
        except urllib.error.URLError:  # Not started yet.
            pass
        time.sleep(0.2)
    raise AssertionError(f"TensorBoard did not serve {path} in {PATIENCE} seconds")
