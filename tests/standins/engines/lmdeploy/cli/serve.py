"""The part for `serve api_server`, with the kinds of flags that LMDeploy has."""

import argparse
import importlib
import json
import os
import sys
import time

from .cli import CLI


class SubCliServe:
    """As in LMDeploy, adding the parsers twice is an error."""

    parser = CLI.subparsers.add_parser("serve")
    subparsers = parser.add_subparsers()

    @staticmethod
    def add_parsers() -> None:
        """Add `api_server`."""
        parser = SubCliServe.subparsers.add_parser("api_server")
        parser.set_defaults(run=SubCliServe.api_server)
        parser.add_argument("model_path")
        parser.add_argument("--model-name")
        parser.add_argument("--backend", choices=["pytorch", "turbomind"], default="turbomind")
        parser.add_argument("--device", choices=["cuda", "ascend"], default="cuda")
        parser.add_argument("--server-name", default="0.0.0.0")
        parser.add_argument("--server-port", type=int)
        parser.add_argument("--tp", type=int, default=1)
        parser.add_argument("--nnodes", type=int, default=1)
        parser.add_argument("--session-len", type=int)
        parser.add_argument("--chat-template")
        parser.add_argument("--tool-call-parser")
        parser.add_argument("--reasoning-parser")
        parser.add_argument("--trust-remote-code", action="store_true")
        parser.add_argument("--api-keys", nargs="*")

    @staticmethod
    def api_server(args: argparse.Namespace) -> None:
        """Load for as long as the test says, then serve or die."""
        time.sleep(float(os.environ.get("FAKE_LOAD_SECONDS", "0")))
        if os.environ.get("FAKE_DIES"):
            raise RuntimeError("CUDA out of memory")
        print(json.dumps({"given": vars(args) | {"run": ""}, "argv": sys.argv}), flush=True)
        pictures = importlib.import_module("lmdeploy.vl.media.connection")
        for url in os.environ.get("FAKE_PICTURES", "").split():
            try:
                print(f"picture: {pictures.load_from_url(url, None)!r}", flush=True)
            except ValueError as error:
                print(f"picture: {error}", flush=True)
        importlib.import_module("uvicorn").run(
            host=args.server_name, port=args.server_port, model=args.model_name, keys=args.api_keys
        )
