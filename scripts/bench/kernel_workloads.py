"""Batches for scripts/bench_kernels.py: decode, extend, both at once, drafts."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from packinfer_sgl.kernels.tiles import Tile
from packinfer_sgl.planning.batch import StepBatch
from packinfer_sgl.planning.costs import AttentionShape, CostModel
from packinfer_sgl.planning.device_profile import DeviceProfile
from packinfer_sgl.planning.groups import prune
from packinfer_sgl.planning.items import make_plan
from packinfer_sgl.planning.plan import Plan
from packinfer_sgl.planning.policy import TilePolicy
from packinfer_sgl.planning.prefix_tree import PrefixTree
from packinfer_sgl.planning.profiles import H200
from packinfer_sgl.planning.units import within_units
from packinfer_sgl.runners.cuda import ROOM_TOKENS, extend_planner

HEAD_DIM = 128  # of workloads that name no other
BYTES_PER_US = 4.3e6  # what a large copy reaches on an H200
FLOPS_PER_US = 7.9e8  # what a large bf16 product reaches there
# most of a random batch: new tokens; time of its products, of which the float32 reference takes 30 times; KV tokens
RAGGED_NEW, RAGGED_US, RAGGED_TOKENS = 20_000, 2_000, 400_000


@dataclass
class Workload:
    """A batch: ``paths[r]`` are the shared nodes of request ``r``, ``tails[r]`` its private KV tokens.

    The last ``new[r]`` tokens of a tail are new: each is a query that sees its request's KV up to itself. At decode
    there is one, which is what an empty ``new`` stands for.
    """

    name: str
    qo_heads: int
    kv_heads: int
    node_tokens: list[int]
    paths: list[list[int]]
    tails: list[int]
    new: list[int] = field(default_factory=list)
    head_dim: int = HEAD_DIM
    fp8: bool = False  # KV, e4m3, scales of 1
    sinks: bool = False
    soft_cap: float = 0.0  # of the logits
    shape: AttentionShape = field(init=False)

    def __post_init__(self) -> None:
        self.new = self.new or [1] * len(self.paths)
        self.shape = AttentionShape(self.qo_heads, self.kv_heads, self.head_dim, 1 if self.fp8 else 2)

    @property
    def kind(self) -> str:
        """``decode`` where every request has one new token, ``extend`` where every one has more, else ``mixed``."""
        decodes = self.new.count(1)
        return "decode" if decodes == len(self.new) else "mixed" if decodes else "extend"

    @property
    def kv_lens(self) -> np.ndarray:
        return np.array([sum(self.node_tokens[n] for n in p) + t for p, t in zip(self.paths, self.tails)], np.int32)

    @property
    def qo_indptr(self) -> np.ndarray:
        return np.cumsum([0, *self.new]).astype(np.int32)

    @property
    def visible(self) -> tuple[np.ndarray, np.ndarray]:
        """First KV position that each query sees, and the one after its last."""
        to = np.concatenate([np.arange(end - new, end) + 1 for end, new in zip(self.kv_lens, self.new)])
        return np.zeros(len(to), np.int32), to.astype(np.int32)

    @property
    def unique_tokens(self) -> int:
        return sum(self.node_tokens) + sum(self.tails)

    @property
    def bytes_us(self) -> float:
        """Time to move unique KV, queries and outputs once."""
        kv = self.unique_tokens * self.shape.token_bytes
        return (kv + 4 * sum(self.new) * self.qo_heads * self.head_dim) / BYTES_PER_US

    @property
    def flops_us(self) -> float:
        """Time of the products of each query with what it sees."""
        return int(self.visible[1].sum(dtype=np.int64)) * self.qo_heads * self.head_dim * 4 / FLOPS_PER_US

    @property
    def floor_us(self) -> float:
        return max(self.bytes_us, self.flops_us)

    def tree(self) -> PrefixTree:
        ends = [tuple(np.cumsum([self.node_tokens[n] for n in path]).tolist()) for path in self.paths]
        return PrefixTree.from_paths([tuple(path) for path in self.paths], ends)

    def pruned(self, cost: CostModel) -> PrefixTree:
        """The spans that packinfer reads once."""
        kv_lens = self.kv_lens if self.kind == "decode" else None
        return prune(self.tree(), self.shape, cost, q_lens=np.array(self.new, np.int32), kv_lens=kv_lens)

    def plan(self, tree: PrefixTree, policy: TilePolicy) -> Plan:
        """Of a decode batch as a server makes it: tails have room to grow."""
        more: dict[str, Any] = {"room_tokens": ROOM_TOKENS}
        if self.kind != "decode":
            more = {"qo_indptr": self.qo_indptr, "visible": self.visible}
        return make_plan(tree, self.kv_lens, policy, kv_tokens_unique=self.unique_tokens, **more)

    def unit_plan(self, cost: CostModel, policy: TilePolicy) -> Plan:
        """Of a decode batch in SGLang's deterministic mode."""
        tree = within_units(self.tree(), self.kv_lens, policy)
        return self.plan(prune(tree, self.shape, cost.in_units(), kv_lens=self.kv_lens), policy)

    def extend_plan(self, tiles: tuple[Tile, ...], sms: int, profile: DeviceProfile = H200) -> Plan:
        """With which SGLang's extend batches of this kind are served."""
        planner = extend_planner(self.shape, tiles, sms, grouping="multi", always=True, profile=profile)
        batch = StepBatch(np.array(self.new, np.int32), self.kv_lens, visible=self.visible)
        return planner.fastest(self.tree(), batch)[1].plan


def tree_workload(
    name: str, heads: tuple[int, int], nodes: list[int], tokens: list[int], jitter: int = 0, head_dim: int = HEAD_DIM
) -> Workload:
    """``nodes[i]`` nodes of ``tokens[i]`` tokens at level ``i``; the last level are the requests' tails."""
    rng = np.random.default_rng(7)
    first = np.cumsum([0, *nodes[:-1]]).tolist()
    n = nodes[-1]
    paths = [[first[level] + r * nodes[level] // n for level in range(len(nodes) - 1)] for r in range(n)]
    tails = [tokens[-1] + (int(rng.integers(-jitter, jitter + 1)) if jitter else 0) for _ in range(n)]
    shared = [t for c, t in zip(nodes[:-1], tokens) for _ in range(c)]
    return Workload(name, *heads, shared, paths, tails, head_dim=head_dim)


def workloads() -> list[Workload]:
    return [*decodes(), *ranks(), *extends(), *drafts(), *chunks(), *ragged(), *models()]


def decodes() -> list[Workload]:
    rng = np.random.default_rng(7)
    flat = lambda name, lens: Workload(name, 32, 8, [], [[]] * len(lens), [int(x) for x in lens])  # noqa: E731
    return [
        tree_workload("D1 16k prefix, 64 x 512", (32, 8), [1, 64], [16384, 512], 128),
        tree_workload("D2 8 groups of 2k, 64 x 256", (32, 8), [8, 64], [2048, 256], 64),
        tree_workload("D3 three levels", (32, 8), [1, 8, 64], [2048, 1024, 256], 64),
        flat("D4 unequal 100 to 32k", np.exp(rng.uniform(np.log(100), np.log(32768), 64))),
        flat("D5 64 x 2k", [2048] * 64),
        flat("D6 short 32 to 1k, batch 128", rng.integers(32, 1025, 128)),
        tree_workload("D7 4k prefix, 256 x 128", (32, 8), [1, 256], [4096, 128], 64),
        tree_workload("D8 8/1 heads, 16k, 64 x 512", (8, 1), [1, 64], [16384, 512], 128),
        tree_workload("D9 MHA 2k, 64 x 256", (16, 16), [1, 64], [2048, 256], 64),
        tree_workload("D10 8k prefix, 8 x 256", (32, 8), [1, 8], [8192, 256], 64),
        tree_workload("D11 PAT 1,4,16,512", (32, 8), [1, 4, 16, 512], [1024, 256, 128, 32]),
        flat("S1 1 x 8k", [8192]),
        flat("S2 1 x 32k", [32768]),
        flat("S3 4 x 8k", [8192] * 4),
        tree_workload("E2 2k prefix, 64 x 192", (32, 8), [1, 64], [2048, 192]),  # scripts/bench_engine.py, half-way
    ]


def ranks() -> list[Workload]:
    """Decodes with the heads of one of several GPUs under tensor parallelism, behind a prefix (T) and without (U)."""
    heads = [(8, 1), (4, 1), (12, 1), (16, 2)]
    prefix = [
        tree_workload(f"T{i} 16k prefix, 64 x 512", h, [1, 64], [16384, 512], 128) for i, h in enumerate(heads, 1)
    ]
    return [*prefix, *(Workload(f"U{i} 64 x 4k", *h, [], [[]] * 64, [4096] * 64) for i, h in enumerate(heads, 1))]


def extends() -> list[Workload]:
    """Prompts (P), and prompts beside decodes (M)."""
    # from here on, the generator draws the token counts of the first measurements of these batches
    rng = np.random.Generator(np.random.PCG64(7).advance(420))
    draw = lambda low, high, n: rng.integers(low, high + 1, n).tolist()  # noqa: E731
    suffixes, prompts = draw(20, 200, 64), draw(20, 512, 64)
    answers, new, decoded = draw(256, 768, 60), draw(20, 200, 16), draw(64, 512, 96)
    under = lambda n: [[0] for _ in range(n)]  # noqa: E731
    return [
        Workload("P1 4k prefix, 64 x 20-200 new", 32, 8, [4096], under(64), suffixes, suffixes),
        Workload("P2 64 x 20-512 new", 32, 8, [], [[]] * 64, prompts, prompts),
        Workload("P3 8k prefix, 16 x 16 new", 32, 8, [8192], under(16), [16] * 16, [16] * 16),
        Workload(
            "M1 2k chunk at 8k, 60 decodes under 4k", 32, 8, [4096], [[], *under(60)], [8192 + 2048, *answers],
            [2048, *[1] * 60],
        ),
        Workload(
            "M2 4k prefix, 16 x 20-200 new, 96 decodes", 32, 8, [4096], under(112), [*new, *decoded], [*new, *[1] * 96]
        ),
    ]  # fmt: skip


def drafts() -> list[Workload]:
    """Verify steps of speculative decoding: the drafts of each request are a chain (V)."""

    def step(name: str, prefixes: int, prefix: int, own: list[int], n: int) -> Workload:
        paths = [[r * prefixes // len(own)] if prefixes else [] for r in range(len(own))]
        return Workload(f"{name}, {n} drafts", 32, 8, [prefix] * prefixes, paths, own, [n] * len(own))

    return [
        step("V1 4k prefix, 64 x 512", 1, 4096, [512] * 64, 4),
        step("V2 8 groups of 2k, 64 x 256", 8, 2048, [256] * 64, 4),
        step("V3 64 x 2k", 0, 0, [2048] * 64, 4),
        step("V4 64 x 2k", 0, 0, [2048] * 64, 8),
        step("V5 8 x 8k", 0, 0, [8192] * 8, 4),
        step("V6 8k prefix, 16 x 256", 1, 8192, [256] * 16, 4),
    ]


def chunks() -> list[Workload]:
    """One request of which a chunk is new."""
    return [
        Workload(f"C{chunk}@{at}", 32, 8, [], [[]], [cached + chunk], [chunk])
        for at, cached in (("0", 0), ("8k", 8192), ("32k", 32768))
        for chunk in (256, 512, 1024, 2048, 4096)
    ]


def ragged() -> list[Workload]:
    """Random prompts over cached tokens, private and shared, every second batch beside decodes (R)."""
    rng = np.random.default_rng(11)
    log_uniform = lambda low, high, n: np.exp(rng.uniform(np.log(low), np.log(high + 1), n)).astype(int)  # noqa: E731
    batches = []
    for i in range(40):
        drawn = log_uniform(1, log_uniform(256, 4096, 1)[0], log_uniform(1, 64, 1)[0])
        drawn[0] = max(drawn[0], 2)  # one at least is no decode
        new = drawn[drawn.cumsum() <= RAGGED_NEW].tolist()
        decodes = int(rng.integers(8, 97)) if i % 2 else 0
        lone = int(rng.integers(0, 3))  # rows that share nothing, before all others
        sharers = max(len(new) + decodes - lone, 0)
        groups = min(int(rng.choice([0, 1, 1, rng.integers(2, 9)])), sharers // 2)
        nodes = log_uniform(512, 16384, groups).tolist()
        paths = [[(r - lone) * groups // sharers] if groups and r >= lone else [] for r in range(len(new) + decodes)]
        longest = int(rng.choice([0, 1024, 32768]))
        cached = log_uniform(1, longest, len(new)) if longest else np.zeros(len(new), int)
        private = [*cached.tolist(), *rng.integers(32, 1024, decodes).tolist()]
        q_lens = [*new, *[1] * decodes]
        while True:
            work = Workload("", 32, 8, nodes, paths, [p + q for p, q in zip(private, q_lens)], q_lens)
            if work.flops_us <= RAGGED_US and work.unique_tokens <= RAGGED_TOKENS:
                break
            nodes, private = [t // 2 for t in nodes], [p // 2 for p in private]
        work.name = f"R{i} {len(new)} x {min(new)}-{max(new)} new at {max(private[: len(new)])}"
        work.name += f", {groups} to {max(nodes)}" if groups else ""
        work.name += f", {decodes} decodes" if decodes else ""
        batches.append(work)
    return batches


def models() -> list[Workload]:
    """Of models that people serve: head dimension 256 and many query heads a KV head (H), 64 and sinks (G), FP8 KV (F),
    capped logits (L: Gemma 2 9B's heads and cap).

    Their random batches (HR, GR, FR) are three of four of ``ragged``.
    """
    known = {work.name.split()[0]: work for work in [*decodes(), *extends(), *drafts(), *ragged()]}
    random = [f"R{i}" for i in range(0, 40, 2)] + [f"R{i}" for i in range(1, 40, 4)]

    def as_model(letter: str, names: list[str], **more: float) -> list[Workload]:
        return [replace(known[name], name=letter + known[name].name, **more) for name in names]

    extend = ["P3", "M2", "V1"]

    return [
        tree_workload("H1 16k prefix, 64 x 512", (24, 4), [1, 64], [16384, 512], 128, head_dim=256),
        tree_workload("H2 8 groups of 2k, 64 x 256", (16, 2), [8, 64], [2048, 256], 64, head_dim=256),
        Workload("H3 64 x 4k", 24, 4, [], [[]] * 64, [4096] * 64, head_dim=256),
        tree_workload("H4 16k prefix, 64 x 512", (32, 2), [1, 64], [16384, 512], 128),
        *as_model("H", extend + random, qo_heads=24, kv_heads=4, head_dim=256),
        replace(tree_workload("G1 8k prefix, 64 x 256", (64, 8), [1, 64], [8192, 256], 64, head_dim=64), sinks=True),
        Workload("G2 64 x 2k", 64, 8, [], [[]] * 64, [2048] * 64, head_dim=64, sinks=True),
        *as_model("G", extend + random, qo_heads=64, kv_heads=8, head_dim=64, sinks=True),
        *as_model("F", ["D1", "D2", "D7", "D11", "D5", "D4", *extend, *random], fp8=True),
        *as_model("L", ["D1", "D2", "D5", *extend], qo_heads=16, kv_heads=8, head_dim=256, soft_cap=50.0),
    ]
