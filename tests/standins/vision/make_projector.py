#!/usr/bin/env python3
"""Write the eyes of a small vision model, for tests: a projector for llama.cpp that fits SmolLM2-135M.

    make_projector.py FILE.gguf

No vision model travels in a package. This one has the shape of InternVL's (InternViT, then pixel shuffle) with few
layers and random weights: an image is decoded, cut, encoded and put before the question, all by the real engine; what
the model then says of it means nothing. Standard library only.
"""

from __future__ import annotations

import random
import struct
import sys
from array import array
from pathlib import Path
from typing import Any

PIXELS, PATCH, WIDTH, INNER, HEADS, BLOCKS, MERGED, TEXT_WIDTH = 224, 16, 64, 128, 4, 2, 2, 576
ALIGNMENT = 32
# Of GGUF's types.
U32, F32, BOOL, STRING, ARRAY = 4, 6, 7, 8, 9


def text(value: str) -> bytes:
    """Return a string as the format has it."""
    return struct.pack("<Q", len(value)) + value.encode()


def entry(key: str, kind: int, value: Any) -> bytes:
    """Return one key with its value."""
    if kind == ARRAY:
        made = struct.pack("<IQ", F32, len(value)) + struct.pack(f"<{len(value)}f", *value)
    elif kind == STRING:
        made = text(value)
    else:
        made = struct.pack({U32: "<I", F32: "<f", BOOL: "<?"}[kind], value)
    return text(key) + struct.pack("<I", kind) + made


def tensors() -> dict[str, tuple[int, ...]]:
    """Return the shape of each tensor, the innermost number first."""
    made: dict[str, tuple[int, ...]] = {
        "v.patch_embd.weight": (PATCH, PATCH, 3, WIDTH),
        "v.patch_embd.bias": (WIDTH,),
        "v.class_embd": (WIDTH,),
        "v.position_embd.weight": (WIDTH, (PIXELS // PATCH) ** 2 + 1),
        "mm.model.mlp.0.weight": (WIDTH * MERGED**2,),
        "mm.model.mlp.0.bias": (WIDTH * MERGED**2,),
        "mm.model.mlp.1.weight": (WIDTH * MERGED**2, TEXT_WIDTH),
        "mm.model.mlp.1.bias": (TEXT_WIDTH,),
        "mm.model.mlp.3.weight": (TEXT_WIDTH, TEXT_WIDTH),
        "mm.model.mlp.3.bias": (TEXT_WIDTH,),
    }
    for number in range(BLOCKS):
        block = f"v.blk.{number}"
        for name, inner, outer in (
            ("attn_q", WIDTH, WIDTH),
            ("attn_k", WIDTH, WIDTH),
            ("attn_v", WIDTH, WIDTH),
            ("attn_out", WIDTH, WIDTH),
            ("ffn_up", WIDTH, INNER),
            ("ffn_down", INNER, WIDTH),
        ):
            made[f"{block}.{name}.weight"], made[f"{block}.{name}.bias"] = (inner, outer), (outer,)
        for name in ("ln1", "ln2"):
            made[f"{block}.{name}.weight"], made[f"{block}.{name}.bias"] = (WIDTH,), (WIDTH,)
    return made


def main() -> None:
    """Write the file."""
    keys = [
        entry("general.architecture", STRING, "clip"),
        entry("general.alignment", U32, ALIGNMENT),
        entry("clip.has_vision_encoder", BOOL, True),
        entry("clip.projector_type", STRING, "internvl"),
        entry("clip.use_gelu", BOOL, True),
        entry("clip.vision.image_size", U32, PIXELS),
        entry("clip.vision.preproc_min_tiles", U32, 1),
        entry("clip.vision.preproc_max_tiles", U32, 1),
        entry("clip.vision.patch_size", U32, PATCH),
        entry("clip.vision.embedding_length", U32, WIDTH),
        entry("clip.vision.feed_forward_length", U32, INNER),
        entry("clip.vision.projection_dim", U32, TEXT_WIDTH),
        entry("clip.vision.block_count", U32, BLOCKS),
        entry("clip.vision.attention.head_count", U32, HEADS),
        entry("clip.vision.attention.layer_norm_epsilon", F32, 1e-6),
        entry("clip.vision.projector.scale_factor", U32, MERGED),
        entry("clip.vision.image_mean", ARRAY, [0.5, 0.5, 0.5]),
        entry("clip.vision.image_std", ARRAY, [0.5, 0.5, 0.5]),
    ]
    dice = random.Random(1)  # noqa: S311 this is no secret
    header, data = [], b""
    for name, shape in tensors().items():
        count = 1
        for length in shape:
            count *= length
        header.append(text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, 0, len(data)))
        # A norm leaves what it gets; all else is small, so that no number runs away.
        one = name.endswith(("ln1.weight", "ln2.weight", "mlp.0.weight"))
        data += array("f", [1.0 if one else dice.gauss(0, 0.02) for _n in range(count)]).tobytes()
        data += b"\0" * (-len(data) % ALIGNMENT)
    head = b"GGUF" + struct.pack("<IQQ", 3, len(header), len(keys)) + b"".join(keys) + b"".join(header)
    Path(sys.argv[1]).write_bytes(head + b"\0" * (-len(head) % ALIGNMENT) + data)


if __name__ == "__main__":
    main()
