"""A server with uvicorn's manners at SIGTERM: the door closes, open streams end, then the process goes."""

import signal
import sys
import threading
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "unit"))
from fake_engine import FakeEngine
from lmdeploy.serve.utils.server_utils import AuthenticationMiddleware


class Server:
    """As uvicorn.Server."""

    def __init__(self) -> None:
        """Not asked to end yet."""
        self.should_exit = threading.Event()

    def handle_exit(self, sig: int, frame: object) -> None:
        """End on request."""
        self.should_exit.set()


def run(host: str, port: int, model: str, keys: list[str], timeout_graceful_shutdown: int | None = None) -> None:
    """Serve until a signal."""
    server = Server()
    signal.signal(signal.SIGTERM, server.handle_exit)
    engine = FakeEngine(model=model, host=host, port=port)
    # As in LMDeploy, made when the first request comes; here, when the door opens.
    engine.doorman = AuthenticationMiddleware(None, tokens=keys)
    with engine:
        server.should_exit.wait()
    print(f"streams got {timeout_graceful_shutdown} s to end", flush=True)
