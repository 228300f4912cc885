"""LMDeploy's way in."""

from .entrypoint import run

__all__ = ["run"]
