# Copyright: the selfhost.lmdeploy maintainers
# Apache-2.0 (see LICENSE)
"""How much memory and disk a model needs, how it may be split over cards, and how one knows. Pure, no Ansible.

In order of trust: the files on the host's disk, the table of InternVL3 sizes, the size in the model's name.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ansible_collections.selfhost.lmdeploy.plugins.module_utils.preflight_survey import ModelFacts

GB = 10**9
GIB = 2**30

# CUDA context, NCCL buffers and activations beside weights and cache, for each card.
WORKSPACE_BYTES = int(1.5 * GIB)
# AWQ keeps embeddings and the vision part at full width: 14B takes 10.5 GB instead of 30.
AWQ_SHARE = 0.35


@dataclass(frozen=True)
class ModelSize:
    """What a model needs; 0 stands for unknown. ``source`` says to people how the sizes are known."""

    weight_bytes: int
    kv_bytes_per_token: int
    heads: int
    kv_heads: int
    max_session: int
    source: str


# Weights in bf16 (GB), then layers, attention heads, KV heads and head size of the language part, which is Qwen2.5
# of 0.5, 1.5, 7, 14, 32 and 72 billion parameters, and InternLM3-8B for 9B. From the family's model cards.
INTERNVL3 = {
    "1B": (1.9, 24, 14, 2, 64),
    "2B": (4.2, 28, 12, 2, 128),
    "8B": (16.0, 28, 28, 4, 128),
    "9B": (18.0, 48, 32, 2, 128),
    "14B": (30.0, 48, 40, 8, 128),
    "38B": (77.0, 64, 40, 8, 128),
    "78B": (157.0, 80, 64, 8, 128),
}
INTERNVL3_SESSION = 32768

# Bytes a parameter, by what the name says about the format; the first that fits counts.
FORMATS = (
    (r"awq|gptq|int4|w4a16|4bit", 2 * AWQ_SHARE),
    (r"q2_k|iq2|iq3|q3_k", 0.45),
    (r"q4_|iq4", 0.62),
    (r"q5_", 0.72),
    (r"q6_", 0.83),
    (r"q8_|fp8|int8|w8a8|8bit", 1.07),
    (r"f32|fp32", 4.0),
    (r"", 2.0),
)


def kv_bytes_per_token(layers: int, kv_heads: int, head_dim: int) -> int:
    """Return the bytes of keys and values of one token in 16 bits."""
    return 2 * layers * kv_heads * head_dim * 2


def from_table(model: str) -> ModelSize | None:
    """Return the size of an InternVL3 model."""
    match = re.fullmatch(r"internvl3-(\d+b)(?:-(?:instruct|pretrained))?(-awq)?(?:-hf)?", model.lower())
    if not match or match.group(1).upper() not in INTERNVL3:
        return None
    gigabytes, layers, heads, kv_heads, head_dim = INTERNVL3[match.group(1).upper()]
    share = AWQ_SHARE if match.group(2) else 1.0
    return ModelSize(
        int(gigabytes * GB * share),
        kv_bytes_per_token(layers, kv_heads, head_dim),
        heads,
        kv_heads,
        INTERNVL3_SESSION,
        "the table of InternVL3 sizes",
    )


def from_name(model: str) -> ModelSize | None:
    """Return the size that a name such as Qwen2.5-7B-Instruct-AWQ or SmolLM2-135M.Q8_0.gguf tells."""
    sizes = re.findall(r"(?<![a-z0-9.])(\d+(?:\.\d+)?)([bm])(?![a-z0-9])", model.lower())
    if not sizes:
        return None
    parameters = max(float(number) * (1e9 if unit == "b" else 1e6) for number, unit in sizes)
    width = next(width for pattern, width in FORMATS if re.search(pattern, model.lower()))
    source = f"the {parameters / 1e9:g} billion parameters that its name tells, at {width:g} bytes each"
    return ModelSize(int(parameters * width), 0, 0, 0, 0, source)


def estimate(model: str, local: ModelFacts | None) -> ModelSize | None:
    """Return what a model needs, or None where nothing tells. ``model`` is an id, a path or a file's name."""
    name = model.rstrip("/").rsplit("/", 1)[-1].rsplit("--", 1)[-1]
    known = from_table(name) or from_name(name)
    if not local or not local["weight_bytes"]:
        return known
    per_token = kv_bytes_per_token(local["layers"], local["kv_heads"], local["head_dim"])
    return ModelSize(
        local["weight_bytes"],
        per_token or (known.kv_bytes_per_token if known else 0),
        local["heads"] or (known.heads if known else 0),
        local["kv_heads"] or (known.kv_heads if known else 0),
        local["max_session"] or (known.max_session if known else 0),
        "the weight files on the host",
    )


def tp_fits_heads(tp: int, heads: int, kv_heads: int) -> bool:
    """Tell whether the engine can split the attention over ``tp`` cards; 0 heads = unknown, which passes.

    The query heads must divide. KV heads that don't are repeated up to the next multiple of tp, so that must be a
    multiple of them.
    """
    if heads and heads % tp:
        return False
    if kv_heads and kv_heads % tp:
        return -(-kv_heads // tp) * tp % kv_heads == 0
    return True


def automatic_tp(cards: int, heads: int = 0, kv_heads: int = 0) -> int:
    """Return the largest power of two that the cards and the model's heads allow."""
    tp = 1
    while tp * 2 <= cards:
        tp *= 2
    while tp > 1 and not tp_fits_heads(tp, heads, kv_heads):
        tp //= 2
    return tp


def kv_share_per_card(size: ModelSize, tp: int, quant_policy: int = 0) -> float:
    """Return the bytes of one token's keys and values on each of ``tp`` cards; repeated KV heads are counted."""
    repeated = 1.0
    if size.kv_heads and size.kv_heads % tp:
        repeated = -(-size.kv_heads // tp) * tp / size.kv_heads
    width = {8: 0.5, 4: 0.25}.get(quant_policy, 1.0)
    return size.kv_bytes_per_token * repeated * width / tp
