"""SGLang's own unit tests of attention backends pass on packinfer, with prefixes that requests share and without."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from dense_kit import LAYOUTS, DenseKit, dense
from sglang.srt.model_executor.forward_batch_info import ForwardMode

from packinfer_sgl.plugin import NAME

CASES = {case.name: case for case in dense.make_dense_cases(NAME)}
DECODES = [name for name, case in CASES.items() if case.forward_mode.is_decode()]
VERIFIES = {
    name: dense.DenseAttentionCase(name, NAME, ForwardMode.TARGET_VERIFY, *shape)
    for name, shape in {
        "mha_verify_page_boundary": (4, 4, 16, (14, 15, 16), (4, 4, 4)),
        "gqa_verify_page_size_1": (8, 2, 1, (3, 9, 30), (2, 2, 2)),
    }.items()
}


@pytest.fixture
def kit(monkeypatch) -> Iterator[DenseKit]:
    """In float32 on the CPU's kernels, or in float16 on those of a GPU."""
    if torch.cuda.is_available():
        kit = DenseKit(monkeypatch, "cuda", torch.float16, tolerance=5e-4)
    else:
        kit = DenseKit(monkeypatch, "cpu", torch.float32, tolerance=1e-6)
    yield kit
    kit.close()


def check(state: dict, name: str, shared: bool, steps: int) -> None:
    """All was packed, and a shared prefix was read once."""
    kind, prefix = ("packed_extends", "extend_") if "extend" in name else ("packed_steps", "")
    assert state[kind] == steps and state["fallback_steps"] == state["fallback_layers"] == {}
    read, unique, logical = (state[f"{prefix}kv_tokens_{count}"] for count in ("read", "unique", "logical"))
    if shared and (kind == "packed_steps" or not torch.cuda.is_available()):  # a GPU's extends may read it once a tile
        assert read < 0.6 * logical
    assert unique <= read and logical > 0


@pytest.mark.contract
@pytest.mark.parametrize("shared", [False, True], ids=["alone", "shared"])
@pytest.mark.parametrize("name", CASES)
def test_eager(kit: DenseKit, name: str, shared: bool) -> None:
    case = CASES[name]
    for layout in LAYOUTS:
        state = kit.run(dense.run_dense_attention_case, case, shared=shared, loc_layout=layout)
        check(state, name, shared and case.batch_size > 1, steps=1)


@pytest.mark.gpu
@pytest.mark.parametrize("shared", [False, True], ids=["alone", "shared"])
@pytest.mark.parametrize("name", DECODES)
def test_decode_graph(kit: DenseKit, name: str, shared: bool) -> None:
    """Eager, captured for 4 rows, and replayed with the others as padding."""
    from sglang.test.kits.attention_unittest.runner_modes import cuda_graph_decode_runner as runner

    state = kit.run(runner.run_dense_cuda_graph_decode_case, CASES[name], shared=shared, head_dim=128)
    check(state, name, shared and CASES[name].batch_size > 1, steps=2)


@pytest.mark.gpu
@pytest.mark.parametrize("shared", [False, True], ids=["alone", "shared"])
@pytest.mark.parametrize("name", VERIFIES)
def test_verify_graph(kit: DenseKit, name: str, shared: bool) -> None:
    """A chain of drafts a request; likewise eager and replayed. The kit writes the prefixes once more, to slots in
    order, which are those of other tokens in the layout that it chooses by itself."""
    from sglang.test.kits.attention_unittest.runner_modes import speculative_target_verify_runner as runner

    run = runner.run_dense_spec_verify_cuda_graph_case
    state = kit.run(run, VERIFIES[name], shared=shared, contiguous=True, topk=1, head_dim=128)
    check(state, name, shared, steps=2)
