"""How large a model is, and over how many cards it may be split."""

from __future__ import annotations

import pytest
from ansible_collections.selfhost.lmdeploy.plugins.module_utils import model_memory as memory
from ansible_collections.selfhost.lmdeploy.plugins.module_utils.preflight_survey import model_facts
from hypothesis import given
from hypothesis import strategies as st


@pytest.mark.parametrize(
    ("model", "gigabytes"),
    [
        ("OpenGVLab/InternVL3-14B-Instruct", 30),
        ("OpenGVLab/InternVL3-14B", 30),
        ("OpenGVLab/InternVL3-14B-AWQ", 10.5),
        ("/var/lib/models/OpenGVLab--InternVL3-78B-Instruct", 157),
        ("Qwen/Qwen2.5-7B-Instruct", 14),
        ("Qwen/Qwen2.5-7B-Instruct-AWQ", 4.9),
        ("Qwen/Qwen3-30B-A3B", 60),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", 0.27),
        ("SmolLM2-135M-Instruct.Q4_1.gguf", 0.084),
        ("Llama-3.1-405B-Q8_0.gguf", 433),
        ("meta/Llama-3.2-1.5B", 3),
    ],
)
def test_the_name_tells_the_size(model: str, gigabytes: float) -> None:
    size = memory.estimate(model, None)
    assert size is not None
    assert size.weight_bytes == pytest.approx(gigabytes * 1e9, rel=0.01)


def test_a_name_without_a_size_tells_nothing() -> None:
    assert memory.estimate("org/phi-4", None) is None
    assert memory.estimate("org/v2b-model", None) is None


def test_files_on_the_host_count_more_than_the_name() -> None:
    config = {"num_hidden_layers": 2, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 64}
    size = memory.estimate("org/Big-70B", model_facts(config, 5_000))
    assert size is not None
    assert (size.weight_bytes, size.heads, size.kv_bytes_per_token) == (5000, 16, 2 * 2 * 8 * 64 * 2)
    assert "files" in size.source
    # Files that tell no layers leave that to the table.
    known = memory.estimate("OpenGVLab/InternVL3-14B", model_facts({}, 30_000_000_000))
    assert known is not None
    assert known.kv_bytes_per_token == 192 * 1024


@pytest.mark.parametrize(
    ("tp", "heads", "kv_heads", "fits"),
    [
        (2, 40, 8, True),
        (8, 40, 8, True),
        (16, 40, 8, False),  # 40 query heads
        (4, 14, 2, False),
        (4, 12, 2, True),  # two KV heads, each held twice
        (2, 12, 3, False),  # three KV heads would become four
        (8, 0, 0, True),
    ],
)
def test_attention_splits_or_not(tp: int, heads: int, kv_heads: int, *, fits: bool) -> None:
    assert memory.tp_fits_heads(tp, heads, kv_heads) is fits


@given(st.integers(0, 32), st.sampled_from([(0, 0), (14, 2), (12, 2), (28, 4), (40, 8), (64, 8)]))
def test_automatic_tp_is_a_power_of_two_that_fits(cards: int, shape: tuple[int, int]) -> None:
    tp = memory.automatic_tp(cards, *shape)
    assert tp & (tp - 1) == 0
    assert 1 <= tp <= max(1, cards)
    assert memory.tp_fits_heads(tp, *shape)


@pytest.mark.parametrize(("cards", "tp"), [(0, 1), (1, 1), (2, 2), (3, 2), (4, 4), (7, 4), (8, 8)])
def test_automatic_tp_takes_what_there_is(cards: int, tp: int) -> None:
    assert memory.automatic_tp(cards) == tp


@given(st.sampled_from([1, 2, 4, 8]), st.sampled_from([0, 4, 8]))
def test_repeated_kv_heads_take_more_room(tp: int, policy: int) -> None:
    size = memory.ModelSize(1, 28 * 1024, 28, 4, 32768, "")
    share = memory.kv_share_per_card(size, tp, policy)
    width = {0: 1, 4: 0.25, 8: 0.5}[policy]
    assert share == pytest.approx(28 * 1024 * width / min(tp, 4))


def test_the_table_agrees_with_the_published_cache_sizes() -> None:
    kib = {name: memory.kv_bytes_per_token(row[1], row[3], row[4]) // 1024 for name, row in memory.INTERNVL3.items()}
    assert kib == {"1B": 12, "2B": 28, "8B": 56, "9B": 48, "14B": 192, "38B": 256, "78B": 320}
