"""Runs the source of the Gluon kernels on a CPU, to test their barriers.

The modules are executed as they stand with stand-ins for ``gl``, ``mbarrier``, ``async_copy`` and the products, over
numpy arrays. Warpgroups are threads of which one runs at a time. At each barrier, copy and product a seed decides which
goes on. Copies land later, in two parts: what threads 0 to 126 copy, and what thread 127 does. Shared memory is NaN
from when a copy begins until it has landed. Raises ``Fault`` for a deadlock, for a stage that is read before it is
full or overwritten while it is read, and for a result that is written twice.
"""

from __future__ import annotations

import ast
import builtins
import importlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
from interleaving import Actor, Cta, Fault, Schedule

from packinfer_sgl.kernels import device_plan

KERNELS = Path(device_plan.__file__).parent
THREADS = 128  # of a warpgroup
POISON = 1 << 30  # integers of shared memory that nobody has written
# What FP8 KV is converted to. Its bytes are not those of a query's float16: what was not converted shows.
OTHER_FLOAT16 = np.dtype(">f2")


class Tensor(np.ndarray):
    """Scalars are tensors without dimensions, as in Triton."""

    def __array_wrap__(self, array: np.ndarray, context: object = None, return_scalar: bool = False) -> Tensor:
        return array.view(Tensor)

    def to(self, dtype: Any, bitcast: bool = False) -> Tensor:
        return self.view(dtype) if bitcast else self.astype(dtype)

    def __iadd__(self, other: Any) -> Tensor:  # values, not places
        return self + other


def tensor(x: Any, dtype: Any = None) -> Tensor:
    return np.asarray(x, dtype).view(Tensor)


class Pointer:
    def __init__(self, memory: np.ndarray, offset: Any, written: np.ndarray | None) -> None:
        self.memory, self.offset, self.written = memory, offset, written
        self.dtype = SimpleNamespace(element_ty=memory.dtype)

    def __add__(self, offset: Any) -> Pointer:
        return Pointer(self.memory, self.offset + offset, self.written)

    def where(self, mask: Any) -> tuple[np.ndarray, np.ndarray]:
        """Places and mask, of one shape."""
        at, mask = np.broadcast_arrays(self.offset, True if mask is None else mask)
        if ((at < 0) | (at >= len(self.memory)))[mask].any():
            raise Fault("global memory past its end")
        return np.where(mask, at, 0), mask


class Shared:
    """Shared memory, or part of it."""

    def __init__(self, array: np.ndarray) -> None:
        self.array, self.shape, self.dtype = array, array.shape, array.dtype

    def index(self, i: Any) -> Shared:
        return Shared(self.array[int(i)])

    def slice(self, start: int, length: int, dim: int = 0) -> Shared:
        part = slice(start, start + length)
        return Shared(self.array[(slice(None),) * dim + (part,)])

    def permute(self, order: tuple[int, ...]) -> Shared:
        return Shared(self.array.transpose(order))

    def _reinterpret(self, dtype: Any, shape: list[int], layout: object) -> Shared:
        return Shared(self.array.view(dtype).reshape(shape))

    def store(self, value: Any) -> None:
        self.array[...] = value

    def load(self, layout: object = None) -> Tensor:
        return self.array.copy().view(Tensor)


class Barrier:
    """An mbarrier of shared memory."""

    def __init__(self) -> None:
        self.count = self.pending = self.phase = 0

    def arrive(self, count: int) -> None:
        for _ in range(count):
            self.pending -= 1
            if self.pending == 0:
                self.pending, self.phase = self.count, self.phase ^ 1


class Barriers:
    def __init__(self, n: int) -> None:
        self.each = [Barrier() for _ in range(n)]

    def index(self, i: Any) -> Barrier:
        return self.each[int(i)]


class Product:
    """A product that runs: what it reads must stay until it is waited for."""

    def __init__(self, a: Any, b: Shared, acc: Any, use_acc: bool) -> None:
        self.operands, self.acc = [x.array if isinstance(x, Shared) else x for x in (a, b)], acc if use_acc else 0.0
        self.shared = [x.array for x in (a, b) if isinstance(x, Shared)]
        self.before = [x.copy() for x in self.shared]

    def result(self) -> Tensor:
        if any(np.isnan(x).any() for x in self.before):
            raise Fault("a stage is read before it is full")
        if any(not np.array_equal(x, old) for x, old in zip(self.shared, self.before, strict=True)):
            raise Fault("a stage is overwritten while it is read")
        a, b = (np.asarray(x, np.float32) for x in self.operands)
        return tensor(a @ b + self.acc, np.float32)


class Machine:
    """The modules of ``kernels/`` over stand-ins; ``edit`` may change the source of each first."""

    def __init__(self, edit: Callable[[str, ast.Module], ast.Module] = lambda name, tree: tree) -> None:
        self.edit, self.modules, self.schedule = edit, {}, Schedule(0)
        self.events: list[tuple[str, int, int]] = []  # of the last launch: what, by which warpgroup, address
        layout = lambda *args, **kwargs: None  # noqa: E731
        jit = lambda fn=None, **kwargs: fn if fn is not None else lambda fn: fn  # noqa: E731
        elementwise = {name: getattr(np, name) for name in ("maximum", "minimum", "exp2", "log2")}
        gl = SimpleNamespace(
            **elementwise, constexpr=lambda x: x, static_range=range, int32=np.int32, int64=np.int64,
            uint32=np.uint32, float16=OTHER_FLOAT16, float32=np.float32, BlockedLayout=layout, SliceLayout=layout,
            DotOperandLayout=layout, NVMMADistributedLayout=layout, NVMMASharedLayout=layout,
            SwizzledSharedLayout=layout,
            arange=lambda start, end, layout=None: tensor(np.arange(start, end, dtype=np.int32)),
            zeros=lambda shape, dtype, layout=None: tensor(np.zeros(shape, dtype)),
            full=lambda shape, value, dtype, layout=None: tensor(np.full(shape, value, dtype)),
            expand_dims=np.expand_dims, reshape=np.reshape, permute=np.transpose,
            split=lambda x: (x[..., 0], x[..., 1]), convert_layout=lambda x, layout: x,
            max=lambda x, axis: tensor(x.max(axis)), sum=lambda x, axis: tensor(x.sum(axis)),
            multiple_of=self._multiple_of, load=self._load, store=self._store, atomic_add=self._atomic_add,
            program_id=lambda axis: tensor(self._cta.program_id, np.int32),
            num_programs=lambda axis: tensor(self._cta.programs, np.int32),
            allocate_shared_memory=self._allocate, warp_specialize=self._warp_specialize,
        )  # fmt: skip
        gl.where = lambda condition, x, y: tensor(np.where(condition, x, y))
        hopper = SimpleNamespace(
            mbarrier=SimpleNamespace(
                MBarrierLayout=lambda: "barriers", init=self._init, wait=self._wait, arrive=self._arrive
            ),
            async_copy=SimpleNamespace(
                async_copy_global_to_shared=self._copy, mbarrier_arrive=self._arrive_when_copied,
                commit_group=self._commit, wait_group=self._wait_group,
            ),
            fence_async_shared=lambda: None, warpgroup_mma=self._mma, warpgroup_mma_wait=self._mma_wait,
        )  # fmt: skip
        self.stand_ins = {
            "triton.language": SimpleNamespace(language=gl),  # ``import triton.language as tl``
            "triton.experimental": SimpleNamespace(
                gluon=SimpleNamespace(jit=jit, constexpr_function=jit, language=gl)
            ),
            "triton.experimental.gluon": SimpleNamespace(language=gl),
            "triton.experimental.gluon.language.nvidia.hopper": hopper,
            "triton.language.extra.cuda": SimpleNamespace(gdc_launch_dependents=lambda: None, gdc_wait=lambda: None),
        }  # fmt: skip

    def module(self, name: str) -> ModuleType:
        if name not in self.modules:
            module = self.modules[name] = ModuleType(name)
            module.__dict__["__builtins__"] = {**vars(builtins), "__import__": self._import}
            exec(compile(self.edit(name, self.parse(name)), f"{name}.py", "exec"), module.__dict__)
        return self.modules[name]

    @staticmethod
    def parse(name: str) -> ast.Module:
        return ast.parse((KERNELS / f"{name}.py").read_text())

    def _import(self, name: str, *args: Any) -> Any:
        if name in self.stand_ins:
            return self.stand_ins[name]
        if name.startswith("packinfer_sgl.kernels."):
            return self.module(name.rpartition(".")[2])
        return importlib.import_module(name) if args[2] else builtins.__import__(name, *args)

    def launch(self, module: str, kernel: str, programs: int, arguments: dict[str, Any], seed: int) -> None:
        """Run all CTAs of a launch at once. Array arguments are one-dimensional; those named ``out`` or ``part`` or
        ``lse2`` take each element once."""
        self.schedule, self.events = Schedule(seed), []
        schedule = self.schedule
        bound = {}
        for name, x in arguments.items():
            if isinstance(x, np.ndarray):
                once = name.startswith(("out", "part_", "lse2"))
                bound[name] = Pointer(x, tensor(0, np.int64), np.zeros(len(x), bool) if once else None)
            elif name.isupper() or isinstance(x, float):
                bound[name] = x
            else:
                bound[name] = tensor(x, np.int64)
        run = vars(self.module(module))[kernel]
        for i in range(programs):
            cta = Cta(i, programs, schedule.rng)
            for engine in cta.engines:
                schedule.add(engine)
            schedule.add(Actor(schedule, cta, 0, lambda: run(**bound)))
        schedule.run()

    @property
    def _cta(self) -> Cta:
        return self.schedule.current.cta

    def _note(self, what: str, array: np.ndarray) -> None:
        self.events.append((what, self.schedule.current.warpgroup, array.ctypes.data))

    def _warp_specialize(self, parts: list, warps: list[int], registers: list[int]) -> None:
        assert len(parts) - 1 == len(warps) == len(registers)
        (default, args), cta = parts[0], self._cta
        workers = [
            Actor(self.schedule, cta, i, lambda fn=fn, args=args: fn(*args))
            for i, (fn, args) in enumerate(parts[1:], 1)
        ]
        for worker in workers:
            self.schedule.add(worker)
        default(*args)
        self.schedule.pause(until=lambda: all(worker.done for worker in workers))

    def _allocate(self, dtype: Any, shape: list[int], layout: object) -> Any:
        if layout == "barriers":
            return Barriers(shape[0])
        return Shared(np.full(shape, np.nan if np.dtype(dtype).kind == "f" else POISON, dtype))

    def _load(self, pointer: Pointer, mask: Any = None, other: Any = None) -> Tensor:
        at, mask = pointer.where(mask)
        return tensor(np.where(mask, pointer.memory[at], 0 if other is None else other), pointer.memory.dtype)

    def _store(self, pointer: Pointer, value: Any, mask: Any = None) -> None:
        at, mask = pointer.where(mask)
        if pointer.written is not None:
            if pointer.written[at[mask]].any():
                raise Fault("a result is written twice")
            pointer.written[at[mask]] = True
        pointer.memory[at[mask]] = np.broadcast_to(value, at.shape)[mask]

    def _atomic_add(self, pointer: Pointer, value: int, sem: str) -> Tensor:
        self.schedule.pause()
        old = self._load(pointer)
        pointer.memory[int(pointer.offset)] += value
        return old

    def _multiple_of(self, x: Tensor, n: int) -> Tensor:
        assert (x % n == 0).all()
        return x

    def _init(self, barrier: Barrier, count: int) -> None:
        if count < 1:
            raise Fault("a barrier of no arrivals")
        barrier.count = barrier.pending = count

    def _wait(self, barrier: Barrier, phase: Any) -> None:
        self.schedule.pause(until=lambda: barrier.phase != int(phase))

    def _arrive(self, barrier: Barrier, count: int) -> None:
        self.schedule.pause()
        barrier.arrive(count)

    def _copy(self, to: Shared, pointer: Pointer, mask: Any) -> None:
        self.schedule.pause()
        self._note("copy", to.array)
        value, last = self._load(pointer, mask, 0), len(to.array) - 1
        to.array[...] = np.nan
        for engine, rows in zip(self._cta.engines, (slice(0, last), slice(last, None)), strict=True):
            engine.add(lambda rows=rows: to.array.__setitem__(rows, value[rows]), is_last=False)

    def _arrive_when_copied(self, barrier: Barrier, increment_count: bool) -> None:
        self.schedule.pause()
        barrier.pending += THREADS * increment_count
        for engine, threads in zip(self._cta.engines, (THREADS - 1, 1), strict=True):
            engine.add(lambda threads=threads: barrier.arrive(threads), is_last=True)

    def _commit(self) -> None:
        for engine in self._cta.engines:
            engine.commit()

    def _wait_group(self, pending: int) -> None:
        engines = self._cta.engines
        self.schedule.pause(until=lambda: all(engine.landed(pending) for engine in engines))

    def _mma(self, a: Any, b: Shared, acc: Any, use_acc: bool = True, is_async: bool = False) -> Product:
        self.schedule.pause()
        if not use_acc:
            self._note("QK begins", a.array)
        return Product(a, b, acc, use_acc)

    def _mma_wait(self, n: int, deps: list[Product]) -> Tensor | tuple[Tensor, ...]:
        self.schedule.pause()
        if len(deps[0].shared) == 2:
            self._note("QK is done", deps[0].shared[0])
        results = tuple(product.result() for product in deps)
        return results[0] if len(deps) == 1 else results
