"""SGLang's own kits of server tests pass on packinfer, which packs meanwhile.

Sizes are the kits' attributes and constants, made small for a CPU; limits are those of float32.
"""

from __future__ import annotations

import random
from importlib.metadata import version
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import TestCase

import pytest
from sglang.srt.utils.hf_transformers_utils import get_tokenizer
from sglang.test import kl_test_utils
from sglang.test.kits import (
    abort_timeout_kit,
    kl_divergence_kit,
    pause_generation_kit,
    radix_cache_server_kit,
    spec_server_kits,
    streaming_session_kit,
    unified_radix_cache_kit,
)
from sglang.test.server_fixtures import streaming_session_fixture
from wide_model import VOCABULARY

pytestmark = pytest.mark.engine

KL = 1e-8  # nats


class Ids(random.Random):
    """The kits' numbers, but token ids stay in the tiny model's vocabulary."""

    def randint(self, least: int, most: int) -> int:
        return super().randint(least, min(most, VOCABULARY - 1))


class Kit(NamedTuple):
    kit: type
    shared: tuple[str, ...] = ()  # tests whose requests share enough for a group
    alone: tuple[str, ...] = ()  # others
    attributes: dict[str, Any] = {}
    contract: bool = True  # also on the oldest release


KITS = [
    Kit(
        kl_divergence_kit.KLDivergenceMixin,
        ("test_input_output_logprobs_match_prefill_cache_hit", "test_input_output_logprobs_match_decode_cache_hit"),
        attributes={
            "kl_div_thres": KL, "kl_div_max_samples": 12,
            "kl_div_prefill_max_new_tokens": 24, "kl_div_decode_max_new_tokens": 24,
        },
    ),
    Kit(
        unified_radix_cache_kit.UnifiedRadixTreeTestMixin,
        ("test_multiturn_logprobs_match", "test_multiturn_prefill_cache_hit_branching",
         "test_multiturn_decode_cache_hit_branching"),
        attributes={"kl_threshold": KL, "max_new_tokens": 12, "prefix_len": 256},
        contract=False,
    ),
    Kit(
        spec_server_kits.SpecLogprobKit,
        ("test_logprob_mixed",),
        ("test_logprob_start_len", "test_logprob_match", "test_logprob_decode_match_prefill",
         "test_token_ids_logprob_ragged"),
        {"logprob_match_delta": 1e-3},
        contract=False,
    ),
    Kit(
        streaming_session_kit.StreamingSessionKitMixin,
        (),
        ("test_kv_cache_inheritance", "test_leak_logprob_concurrent", "test_stress_concurrent_sessions",
         "test_nth_mid_abort_recovery", "test_first_mid_abort_recovery", "test_preabort_recovery"),
    ),
    Kit(
        abort_timeout_kit.AbortAllMixin, (), ("test_abort_all",),
        {"abort_all_num_requests": 16, "abort_all_sleep": 1.5},
    ),
    Kit(
        pause_generation_kit.PauseResumeInPlaceMixin, (), ("test_pause_resume_in_place",),
        {"pause_num_requests": 8, "pause_max_new_tokens": 768, "pause_duration": 1.5, "pause_ignore_eos": True},
    ),
]  # fmt: skip


def prompts(families: int, members: int) -> list[list[int]]:
    """Of 300 to 500 tokens: 100 are common to all, 150 to a family."""
    rng = random.Random(0)

    def words(n: int) -> list[int]:
        return [rng.randrange(300, VOCABULARY) for _ in range(n)]

    common, found = words(100), []
    for _ in range(families):
        family = common + words(150)
        found += [family + words(rng.randint(50, 250)) for _ in range(members)]
    return found


@pytest.fixture
def case(packed, monkeypatch, kit: Kit) -> TestCase:
    name = f"{packed.model}_{kl_test_utils.DEFAULT_PROMPT_TOKENS}_{kl_test_utils.DEFAULT_NUM_SAMPLES}"
    # in the place of a data set that would be downloaded
    monkeypatch.setitem(kl_test_utils._cached_input_ids, name, prompts(12, 4))
    monkeypatch.setattr(unified_radix_cache_kit, "random", SimpleNamespace(Random=Ids))
    monkeypatch.setattr(streaming_session_fixture, "CONCURRENT_LOGPROB_ROUNDS", 1)
    monkeypatch.setattr(streaming_session_fixture, "STRESS_NUM_TURNS", 3)
    given = {
        "base_url": packed.url, "model": packed.model, "process": packed.server.process,
        "tokenizer": get_tokenizer(packed.model), "input_ids": prompts(2, 2),
    }  # fmt: skip
    return type(kit.kit.__name__, (kit.kit, TestCase), {**given, **kit.attributes})()


@pytest.mark.parametrize(
    ("kit", "test"),
    [
        pytest.param(kit, test, id=f"{kit.kit.__name__}-{test}", marks=[pytest.mark.contract] * kit.contract)
        for kit in KITS
        for test in (*kit.shared, *kit.alone)
    ],
)
def test_kit(packed, case: TestCase, kit: Kit, test: str) -> None:
    if not hasattr(case, test):
        pytest.skip(f"SGLang {version('sglang')} has no such test")
    before = packed.counted()
    random.seed(0)
    getattr(case, test)()
    check(before, packed.counted(), test in kit.shared)


def test_radix_tree(packed, monkeypatch) -> None:
    """More requests at once than there is room for, behind each other's beginnings."""
    monkeypatch.setattr(radix_cache_server_kit, "random", Ids(0))
    generate = radix_cache_server_kit.gen_radix_tree
    monkeypatch.setattr(radix_cache_server_kit, "gen_radix_tree", lambda: generate(num_nodes=60, chunk_len=64))
    before = packed.counted()
    radix_cache_server_kit.run_radix_attention_test(packed.url)
    check(before, packed.counted(), True)


def check(before: dict, after: dict, shares: bool) -> None:
    new = {name: after[name] - before[name] for name in ("packed_steps", "kv_tokens_logical", "kv_tokens_read")}
    print(new)
    assert new["packed_steps"] > 0 and after["fallback_steps"] == before["fallback_steps"]
    assert not shares or new["kv_tokens_read"] < 0.9 * new["kv_tokens_logical"]
