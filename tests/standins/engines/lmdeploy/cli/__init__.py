"""The way into the stand-in, as into LMDeploy: lmdeploy.cli.run()."""

from .entrypoint import run

__all__ = ["run"]
