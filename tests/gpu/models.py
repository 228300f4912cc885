#!/usr/bin/env python3
"""Make the small models that script/gpu-check serves, on the spot: no hub is asked.

    models.py text GGUF OUT     SmolLM2 from its GGUF file, as bf16 safetensors: its answers mean something
    models.py heads TEXT OUT    the same model with more heads, all of them silent: cut over 2, 4 and 8 GPUs
    models.py large TEXT OUT    random Llama of 3 billion parameters with its tokenizer: keeps a GPU busy, says nothing
    models.py odds MODEL JSON   of [[question, answer, other answer], ...]: how far apart the tokens are where they part
    models.py vision OUT        random InternVL of a few layers: tiles, image tokens and limits are those of InternVL3

Runs with the Python of LMDeploy's environment; ``text`` also needs the package gguf on PYTHONPATH. Needs no GPU.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

# What a chat is written with, in the way of Qwen2 and InternVL3.
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>", "<video>"]
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] in ['image', 'image_url'] %}{{ '<IMG_CONTEXT>\n' }}"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
VOCABULARY = 1024
KV_HEADS = 8
IMAGE_SIZE, PATCH_SIZE = 448, 14
# 448 / 14 = 32 patches a side, halved by the pixel shuffle: 16 x 16 tokens for each tile, as InternVL3 has it.
TOKENS_PER_TILE = (IMAGE_SIZE // PATCH_SIZE // 2) ** 2


def save_tokenizer(out: Path) -> Any:
    """Train a tokenizer on these very lines, and return it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import Qwen2TokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(SPECIAL), initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    raw.train_from_iterator(Path(__file__).read_text(encoding="utf-8").splitlines() * 4, trainer)
    raw.add_special_tokens(SPECIAL)
    tokenizer = Qwen2TokenizerFast(
        tokenizer_object=raw,
        eos_token="<|im_end|>",  # a token of text, no secret
        pad_token="<|endoftext|>",  # as above
        unk_token="<|endoftext|>",  # as above
        chat_template=TEMPLATE,
        extra_special_tokens={
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "context_image_token": "<IMG_CONTEXT>",
            "video_token": "<video>",
        },
    )
    tokenizer.save_pretrained(out)
    return tokenizer


def save(model: Any, out: Path) -> None:
    """Write a model as bf16 safetensors."""
    import torch

    out.mkdir(parents=True, exist_ok=True)
    model.to(torch.bfloat16).save_pretrained(out)


def make_text(gguf: Path, out: Path) -> None:
    """Turn a GGUF file into a folder that LMDeploy serves."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    read = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    config = read.config.to_dict()
    config.pop("quantization_config", None)
    model = LlamaForCausalLM(LlamaConfig(**{**config, "architectures": ["LlamaForCausalLM"], "dtype": "bfloat16"}))
    model.load_state_dict(read.state_dict())
    save(model, out)
    tokenizer = AutoTokenizer.from_pretrained(**source)
    tokenizer.save_pretrained(out)


def make_heads(text: Path, out: Path) -> None:
    """Give a Llama 8 KV heads. What is added is zero, so the model says what it said; a random one has no margins.

    A zero value makes a head's output zero, whatever its scores; the columns of the output projection are zero too.
    """
    import torch
    from transformers import AutoTokenizer, LlamaForCausalLM

    source = LlamaForCausalLM.from_pretrained(text, dtype=torch.float32)
    config, size = source.config, source.config.hidden_size // source.config.num_attention_heads
    heads = config.num_attention_heads // config.num_key_value_heads * KV_HEADS
    weights = source.state_dict()
    for name, weight in weights.items():
        if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight")):
            rows = (heads if "q_proj" in name else KV_HEADS) * size
            weights[name] = torch.cat([weight, torch.zeros(rows - weight.shape[0], weight.shape[1])])
        elif name.endswith("o_proj.weight"):
            weights[name] = torch.cat([weight, torch.zeros(weight.shape[0], heads * size - weight.shape[1])], dim=1)
    config.update({"num_attention_heads": heads, "num_key_value_heads": KV_HEADS, "head_dim": size})
    model = LlamaForCausalLM(config)
    model.load_state_dict(weights)
    save(model, out)
    AutoTokenizer.from_pretrained(text).save_pretrained(out)


def make_large(text: Path, out: Path) -> None:
    """Write a random model on which the GPU is what takes the time, as on those that people serve.

    With a small one the processor's share decides, and that differs by a quarter from one start to the next.
    """
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(text)
    known = json.loads((text / "config.json").read_text(encoding="utf-8"))
    config = LlamaConfig(
        vocab_size=known["vocab_size"],
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=known["max_position_embeddings"],
        bos_token_id=known["bos_token_id"],
        eos_token_id=known["eos_token_id"],
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )
    torch.manual_seed(3)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = LlamaForCausalLM(config)
    save(model, out)
    tokenizer.save_pretrained(out)


def odds(model: Path, answers: list[tuple[str, str, str]]) -> list[dict[str, Any]]:
    """Return where two answers part, and how much more transformers (float32) is for one token than for the other."""
    import torch
    from transformers import AutoTokenizer, LlamaForCausalLM

    reference, tokenizer = (
        LlamaForCausalLM.from_pretrained(model, dtype=torch.float32),
        AutoTokenizer.from_pretrained(model),
    )
    found = []
    for question, *both in answers:
        said = [{"role": "user", "content": question}]
        asked = tokenizer.apply_chat_template(said, add_generation_prompt=True, tokenize=False)
        first, second = (tokenizer(answer, add_special_tokens=False)["input_ids"] for answer in both)
        common = 0
        while common < min(len(first), len(second)) and first[common] == second[common]:
            common += 1
        start = tokenizer(asked, add_special_tokens=False)["input_ids"]
        logits = reference(torch.tensor([start + first[:common]])).logits[0, -1]
        # An answer that ends where the other goes on has chosen its end.
        nexts = [answer[common] if common < len(answer) else tokenizer.eos_token_id for answer in (first, second)]
        lead = abs(float(logits[nexts[0]] - logits[nexts[1]]))
        found.append({"question": question, "at_token": common, "lead": round(lead, 4), "answers": both})
    return found


def make_vision(out: Path) -> None:
    """Write a random InternVL with InternVL3's tiles and token counts."""
    import torch
    from transformers import InternVLConfig, InternVLForConditionalGeneration, InternVLProcessor
    from transformers.models.got_ocr2 import GotOcr2ImageProcessor
    from transformers.models.internvl import InternVLVideoProcessor

    torch.manual_seed(2)
    tokenizer = save_tokenizer(out)
    config = InternVLConfig(
        vision_config={
            "hidden_size": 512,
            "intermediate_size": 1024,
            "num_hidden_layers": 2,
            "num_attention_heads": 8,
            "image_size": [IMAGE_SIZE, IMAGE_SIZE],
            "patch_size": [PATCH_SIZE, PATCH_SIZE],
            "attention_bias": True,
        },
        text_config={
            "model_type": "qwen2",
            "architectures": ["Qwen2ForCausalLM"],
            "vocab_size": VOCABULARY,
            "hidden_size": 512,
            "intermediate_size": 1024,
            "num_hidden_layers": 4,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "max_position_embeddings": 32768,
            "tie_word_embeddings": False,
            "eos_token_id": tokenizer.eos_token_id,
        },
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=TOKENS_PER_TILE,
        downsample_ratio=0.5,
        tie_word_embeddings=False,
    )
    save(InternVLForConditionalGeneration(config), out)
    processor = InternVLProcessor(
        image_processor=GotOcr2ImageProcessor(
            size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}, crop_to_patches=True, min_patches=1, max_patches=12
        ),
        tokenizer=tokenizer,
        video_processor=InternVLVideoProcessor(),
        image_seq_length=TOKENS_PER_TILE,
        chat_template=TEMPLATE,
    )
    processor.save_pretrained(out)
    # TurboMind takes the text model by the name of its class.
    path = out / "config.json"
    written = json.loads(path.read_text(encoding="utf-8"))
    written["text_config"]["architectures"] = ["Qwen2ForCausalLM"]
    path.write_text(json.dumps(written, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def main() -> int:
    """Make one model; a folder that is complete stays."""
    parser = argparse.ArgumentParser(prog="models.py", description="Make a small model.")
    parser.add_argument("kind", choices=("text", "heads", "large", "vision", "odds"))
    parser.add_argument("paths", nargs="+", metavar="PATH")
    chosen = parser.parse_args()
    if chosen.kind == "odds":
        sys.stdout.write(json.dumps(odds(Path(chosen.paths[0]), json.loads(chosen.paths[1]))) + "\n")
        return 0
    out = Path(chosen.paths[-1])
    done = out / ".complete"
    if done.exists():
        return 0
    out.mkdir(parents=True, exist_ok=True)
    if chosen.kind == "vision":
        make_vision(out)
    else:
        {"text": make_text, "heads": make_heads, "large": make_large}[chosen.kind](Path(chosen.paths[0]), out)
    for path in out.iterdir():
        # The engine's user reads them; safetensors writes for the owner alone.
        path.chmod(0o644)
    done.touch()
    return 0


if __name__ == "__main__":
    sys.exit(main())
