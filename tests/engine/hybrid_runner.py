"""SGLang's own model runner around a tiny model, in a process of its own: what packinfer makes of its layers.

Its weights are loaded and nothing is computed: linear attention and gpt-oss's experts have no kernels for a CPU.

    python tests/engine/hybrid_runner.py qwen3_next|nemotron_h|gpt_oss FOLDER
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import faults
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
torch.get_device_module = lambda device=None: torch.cpu  # Qwen3-Next asks for CUDA's current device


HYBRID = {"attention_backend": "packinfer", "mamba_radix_cache_strategy": "no_buffer", "disable_overlap_schedule": True}
SETTINGS = {
    "qwen3_next": HYBRID,
    "nemotron_h": HYBRID,
    "gpt_oss": {"attention_backend": "triton", "dtype": "bfloat16", "moe_runner_backend": "triton"},
}


def runner_of(path: Path):
    from sglang.srt.configs.model_config import ModelConfig
    from sglang.srt.model_executor.model_runner import ModelRunner
    from sglang.srt.runtime_context import publish
    from sglang.srt.server_args import PortArgs, ServerArgs

    args = ServerArgs(
        model_path=str(path), device="cpu", disable_cuda_graph=True, max_total_tokens=2048, max_running_requests=4,
        context_length=1024, mem_fraction_static=0.3, **{"dtype": "float32", **SETTINGS[path.name]},
    )  # fmt: skip
    port, given = PortArgs.init_new(args).nccl_port, {}
    config = ModelConfig.from_server_args(args)
    try:
        from sglang.srt.distributed.parallel_state_wrapper import ParallelState  # 0.5.17
    except ImportError:
        from sglang.srt.distributed import bootstrap
        from sglang.srt.managers.scheduler import SpawnRanks

        publish(args, role="scheduler", ranks=SpawnRanks(world_rank=0, dp_rank=None, gpu_id=0))
        bootstrap.init_parallel_runtime(server_args=args, device="cpu", dist_port=port)
        bootstrap.init_layer_runtime(model_config=config)
    else:
        publish(args, role="scheduler")
        given["ps"] = ParallelState.trivial(gpu_id=0)
    runner = ModelRunner(
        model_config=config, mem_fraction_static=0.3, gpu_id=0, nccl_port=port, server_args=args, **given
    )
    if getattr(runner, "token_to_kv_pool", None) is None:  # 0.5.23 makes them later
        runner.alloc_memory_pool()
    if getattr(runner, "attn_backend", None) is None:
        runner.init_attention_backends()
    return runner


def main(kind: str, folder: str) -> None:
    from sglang.srt.plugins import load_plugins

    load_plugins()
    from check.models import write_model

    if kind == "gpt_oss":
        # SGLang checks the name for it; of the backends that it names, a CPU can only run those of Intel's CPUs
        faults.take_sinks()
        from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS

        ATTENTION_BACKENDS["triton"].factory = ATTENTION_BACKENDS["torch_native"].factory
    runner = runner_of(write_model(kind, Path(folder)))
    from packinfer_sgl.serving.layers import sinks_of
    from packinfer_sgl.serving.metrics import STATS

    outer = runner.attn_backend
    ours = getattr(outer, "full_attn_backend", outer)
    told = {
        "backends": [type(backend).__name__ for backend in (outer, ours)],
        "pool": type(runner.token_to_kv_pool).__name__,
        "arena_buffers": [] if ours._packinfer.arena is None else [b.shape for b in ours._packinfer.arena._buffers],
        "sinks": {layer.layer_id: (*sinks.shape, str(sinks.dtype)) for layer, sinks in sinks_of(runner.model).items()},
        "sinks_sum": sum(float(sinks.float().sum()) for sinks in sinks_of(runner.model).values()),
        **{name: STATS.as_dict()[name] for name in ("active", "fallback_layers")},
    }
    print("RESULT " + json.dumps(told), flush=True)
    os._exit(0)  # what a server's scheduler would have ended is still there


if __name__ == "__main__":
    main(*sys.argv[1:])
