"""What TurboMind can serve."""

import json
from pathlib import Path


def is_supported(model_path: str, trust_remote_code: bool = False) -> bool:
    """Tell whether the model's architecture is Llama's."""
    content = json.loads((Path(model_path) / "config.json").read_text())
    return bool(content["architectures"] == ["LlamaForCausalLM"])
