"""An SGLang plugin of the tests: breaks or changes things on purpose in the processes of a real server.

``PACKINFER_TEST_FAULTS`` names the faults, comma-separated. ``install`` makes the plugin visible to SGLang by an entry
point of its own, as any plugin is.
"""

from __future__ import annotations

import os
from pathlib import Path

ENV = "PACKINFER_TEST_FAULTS"


def install(folder: Path, *faults: str) -> dict[str, str]:
    """Write the plugin's metadata to ``folder``; returns the environment that a server needs to load it."""
    info = folder / "packinfer_test_faults-0.dist-info"
    info.mkdir(parents=True, exist_ok=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: packinfer-test-faults\nVersion: 0\n")
    (info / "entry_points.txt").write_text("[sglang.srt.plugins]\npackinfer_test_faults = faults:register\n")
    path = os.pathsep.join(filter(None, [str(folder), str(Path(__file__).parent), os.environ.get("PYTHONPATH")]))
    return {"PYTHONPATH": path, ENV: ",".join(faults)}


def register() -> None:
    for fault in filter(None, os.environ.get(ENV, "").split(",")):
        name, _, argument = fault.partition("=")
        {
            "poison": poison_freed_slots,
            "drop-token": drop_token,
            "forget-retractions": forget_retractions,
            "break-hook": break_hook,
            "sinks": give_sinks,
        }[name](argument)


def poison_freed_slots(_: str) -> None:
    """Before each forward pass, every KV slot that belongs to nobody is NaN (slot 0 takes padding's writes)."""
    import torch
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    def poison(runner, *args, **kwargs):
        pool, allocator = runner.token_to_kv_pool, runner.token_to_kv_pool_allocator
        pages = torch.cat([allocator.free_pages, allocator.release_pages]).long()
        slots = (pages[:, None] * allocator.page_size + torch.arange(allocator.page_size)).view(-1)
        for buffer in (*pool.k_buffer, *pool.v_buffer):
            buffer[slots] = float("nan")

    HookRegistry.register("sglang.srt.model_executor.model_runner.ModelRunner.forward", poison, HookType.BEFORE)


def drop_token(_: str) -> None:
    """The last token of the first group is not read."""
    import numpy as np

    import packinfer_sgl.planning.fitting as fitting
    from packinfer_sgl.planning.plan import Col

    def faulty(*args, __make=fitting.grouped_plan, **kwargs):
        tree, plan, saves_little = __make(*args, **kwargs)
        if tree.n_nodes:
            last = (plan.items[:, Col.A_POS] + plan.items[:, Col.A_LEN] == tree.end[0]) & (plan.items[:, Col.Q_CNT] > 1)
            plan.items[np.flatnonzero(last)[0], Col.A_LEN] -= 1
        return tree, plan, saves_little

    fitting.grouped_plan = faulty


def forget_retractions(_: str) -> None:
    """A batch compares equal to one before its requests' KV was taken from them."""
    from packinfer_sgl.serving.batch_rows import BatchRows

    read = BatchRows.of

    def faulty(batch):
        rows = read(batch)
        return rows._replace(rows=[(*row[:3], 0) for row in rows.rows])

    BatchRows.of = faulty


def break_hook(target: str) -> None:
    """SGLang's registry cannot apply the hooks on ``target``."""
    from sglang.srt.plugins.hook_registry import HookRegistry

    apply = HookRegistry._apply_target.__func__

    def refuse(cls, name, hooks):
        if name.endswith(target):
            raise AttributeError(f"{name} is not there (broken by the test)")
        return apply(cls, name, hooks)

    HookRegistry._apply_target = classmethod(refuse)


def give_sinks(_: str) -> None:
    """Every attention layer has sinks, about as large as the logarithm of what a query's tokens add up to. Models that
    have them do not run on a CPU."""
    import torch
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    def ask(forward, layer, *args, **more):
        sinks = 10 + 2 * torch.cos(torch.arange(layer.tp_q_head_num) + layer.layer_id)
        return forward(layer, *args, sinks=sinks, **more)

    HookRegistry.register("sglang.srt.layers.radix_attention.RadixAttention.forward", ask, HookType.AROUND)
    take_sinks()


def take_sinks() -> None:
    """The stock CPU backend takes sinks: as one more token with a key and a value of 0, whose logit the mask adds."""
    import torch
    from sglang.srt.layers.attention import torch_native_backend as native
    from torch.nn.functional import pad

    given, product = [None], native.scaled_dot_product_attention

    def with_sinks(q, k, v, *, attn_mask=None, is_causal=False, **more):
        if given[0] is None or attn_mask is not None:
            return product(q, k, v, attn_mask=attn_mask, is_causal=is_causal, **more)
        seen = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool)
        logits = torch.zeros(seen.shape, dtype=q.dtype).masked_fill_(~(seen.tril() if is_causal else seen), -torch.inf)
        sinks = given[0].to(q.dtype)[None, :, None, None].expand(1, -1, len(logits), 1)
        mask = torch.cat([logits.expand(1, q.shape[1], -1, -1), sinks], -1)
        k, v = (pad(x, (0, 0, 0, 1)) for x in (k, v))
        return product(q, k, v, attn_mask=mask, **more)

    native.scaled_dot_product_attention = with_sinks

    def taking(stock):
        def attend(self, *args, sinks=None, **more):
            given[0] = sinks
            return stock(self, *args, **more)

        return attend

    for name in ("forward_decode", "forward_extend"):
        setattr(native.TorchNativeAttnBackend, name, taking(getattr(native.TorchNativeAttnBackend, name)))
