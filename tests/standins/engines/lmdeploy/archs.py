"""Which backend LMDeploy would take."""

import os


def autoget_backend(model_path: str, trust_remote_code: bool = False) -> str:
    """Return what the test says."""
    return os.environ.get("FAKE_BACKEND", "turbomind")
