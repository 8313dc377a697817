"""Memory and communication of a training run, calculated before anything is started: bytes per rank.

The stages are those of Rajbhandari et al., "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models"
(arXiv 1910.02054). All numbers are what DeepSpeed 0.19 and torch 2.13 really hold, copies of the gradients included.
Tests measure them. Padding is left out: a few elements per tensor and rank.

NOT counted: activations, layers that are gathered for a moment, and what has the same size for every model (reduce
buckets, the CUDA context, fragmentation). `docs/footprint.md` lists what comes on top.

`python -m lp_dist.footprint` prints the table of that page.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from lp_dist.optim import batching

STAGES = (0, 1, 2, 3, "fsdp2")
DTYPES = {"bf16": 2, "fp32": 4}

# fp32 tensors of the parameters' size. LpSGD has one with momentum.
_STATES = {"AdamW": 2, "LpAdamW": 2, "LpLion": 1, "LpSGD": 0}
# fp32 copies of a batch of tiles that a foreach step holds at once, at most. LpAdamW: x, √v̂+ε, and its power if
# precondition is not 0 or 1 (two without). The others: x with √x, later x with the direction. `maximize` takes one
# more. torch's fused AdamW has none.
_TEMPORARIES = {"AdamW": 0, "LpAdamW": 3, "LpLion": 2, "LpSGD": 2}
# DeepSpeed's sub_group_size: ZeRO-3 steps this many elements at a time.
_SUB_GROUP = 10**9


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank on its GPU, or on the host.

    Args:
        model: the weights of forward and backward, if they are a copy and not the masters themselves.
        gradients: gradients and an engine's copies of them, at the moment of a step when they are largest.
        masters: fp32 weights that the optimizer updates.
        optimizer_state: fp32 state, such as exp_avg and exp_avg_sq.
        temporaries: upper bound of what the optimizer's step allocates and frees again. Does not grow with the model.
    """

    model: int = 0
    gradients: int = 0
    masters: int = 0
    optimizer_state: int = 0
    temporaries: int = 0

    @property
    def total(self) -> int:
        return sum(asdict(self).values())


@dataclass(frozen=True)
class Footprint:
    """What one rank needs.

    Args:
        device: memory where forward and backward run.
        host: memory of the host under CPU offload. A node needs it once per rank.
        sent_per_step: bytes that a rank sends in an optimizer step of one micro-batch. The decay adds none.
        sent_per_count: bytes that a rank sends whenever zeros are counted.
    """

    device: Memory
    host: Memory
    sent_per_step: int
    sent_per_count: int


def footprint(
    parameters: int,
    ranks: int,
    stage: int | str,
    *,
    optimizer: str = "LpAdamW",
    momentum: bool = False,
    dtype: str = "bf16",
    offload: bool = False,
    accelerator: bool = True,
    fused: bool = True,
    counted: int = 0,
    bins: int = 0,
) -> Footprint:
    """Calculates the bytes per rank of the training state, and the bytes that a rank sends.

    Args:
        parameters: elements of the model, all of them trained.
        ranks: number of processes.
        stage: 0 is one process or DDP, 1 to 3 are DeepSpeed's ZeRO, "fsdp2" is torch's fully_shard.
        optimizer: "LpAdamW", "LpLion", "LpSGD", or "AdamW", which is torch's fused one.
        momentum: whether LpSGD has momentum.
        dtype: "bf16" is mixed precision over fp32 masters (by autocast under DDP), "fp32" is fp32 throughout.
        offload: masters and optimizer state are in host memory and are updated there. Under FSDP2 all shards are.
        accelerator: False if the model itself is on the CPU, where a foreach step takes smaller tiles.
        fused: False for the foreach step, which has temporaries. The fused step has none.
        counted: number of tensors whose zeros are counted.
        bins: of a histogram of each of these tensors, reduced at the same time.
    Raises:
        ValueError: a value is out of its range, or the stage has no offload.
    """
    _check(parameters, ranks, stage, optimizer, momentum, dtype, offload, counted, bins)
    shard = -(-parameters // ranks)
    width = DTYPES[dtype]
    stepped = parameters if stage == 0 else shard
    # A batch ends once it has as many elements as a tile, so it has fewer than two tiles have.
    batch = 2 * (batching.TILE_SIZE_ACCELERATOR if accelerator and not offload else batching.TILE_SIZE["cpu"])
    stepping = dict(
        masters=4 * stepped,
        optimizer_state=4 * stepped * (_STATES[optimizer] + momentum),
        temporaries=0 if fused else 4 * _TEMPORARIES[optimizer] * min(batch, stepped),
    )
    device, host = (_torch if stage in (0, "fsdp2") else _deepspeed)(parameters, shard, ranks, stage, width, offload)
    (host if offload else device).update(stepping)
    return Footprint(
        Memory(**device),
        Memory(**host),
        # Ring algorithms: a reduce-scatter or an all-gather sends (N-1)/N of the elements, an all-reduce does both.
        # DDP: one all-reduce of fp32 gradients. ZeRO-1 and 2: an all-reduce of the gradients, which is DeepSpeed's
        # default (the paper has a reduce-scatter), and an all-gather of the weights. ZeRO-3 and FSDP2: all-gathers in
        # forward and backward, and a reduce-scatter.
        sent_per_step=(2 * 4 if stage == 0 else 3 * width) * _passed(parameters, ranks),
        # An all-reduce of int64: zeros, elements, bins.
        sent_per_count=2 * 8 * _passed(counted * (2 + bins), ranks),
    )


def _torch(parameters: int, shard: int, ranks: int, stage: int | str, width: int, offload: bool) -> tuple[dict, dict]:
    """Model and gradients of DDP and FSDP2, which update the parameters themselves, in fp32. Gradients are fp32 too.

    Returns:
        Fields of `Memory` on the device, and on the host.
    """
    if stage == 0:
        # DDP's buckets hold every gradient once more (gradient_as_bucket_view=False).
        copies = 2 if ranks > 1 else 1
        # Under autocast, the graph keeps 16-bit copies of the weights from forward to backward.
        return dict(model=width * parameters if width < 4 else 0, gradients=4 * parameters * copies), {}
    gradients = dict(gradients=4 * shard)
    return ({}, gradients) if offload else (gradients, {})


def _deepspeed(
    parameters: int, shard: int, ranks: int, stage: int | str, width: int, offload: bool
) -> tuple[dict, dict]:
    """The same as `_torch` of ZeRO, which keeps masters beside the model, in fp32 training as well, and copies
    gradients for the step.
    """
    model = width * (shard if stage == 3 else parameters)
    if offload:
        # An fp32 copy of the rank's gradients stays on the host. ZeRO-3 gathers all its gradients there. ZeRO-1 leaves
        # them on the device until the backward pass is over. ZeRO-1 and 2 send weights back through a copy of the
        # rank's shard.
        on_device = width * parameters if stage == 1 else 0
        return dict(model=model, gradients=on_device), dict(
            model=0 if stage == 3 else width * shard, gradients=(4 + width if stage == 3 else 4) * shard
        )
    # Copies of the shard's gradients: flat in their dtype, then in fp32.
    copies = width + 4 if width < 4 else 4
    at_step = width * shard + copies * (min(shard, _SUB_GROUP) if stage == 3 else shard)
    # ZeRO-1 holds all gradients, and then those of its shard once more.
    in_backward = width * (parameters + shard) if stage == 1 else 0
    return dict(model=model, gradients=max(at_step, in_backward)), {}


def _passed(elements: int, ranks: int) -> int:
    """Elements that a rank sends in one pass around the ring."""
    return (ranks - 1) * -(-elements // ranks)


def _check(
    parameters: Any,
    ranks: Any,
    stage: Any,
    optimizer: Any,
    momentum: Any,
    dtype: Any,
    offload: Any,
    counted: Any,
    bins: Any,
) -> None:
    for name, value, least, way_out in (
        ("parameters", parameters, 1, "count the model's elements: sum(p.numel() for p in model.parameters())"),
        ("ranks", ranks, 1, "it is the number of processes, 1 for a single GPU"),
        ("counted", counted, 0, "it is a number of tensors; 0: no zeros are counted"),
        ("bins", bins, 0, "it is the length of a histogram; 0: none"),
    ):
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ValueError(f"{name}={value!r} must be a whole number >= {least}; {way_out}")
    for name, value, allowed, way_out in (
        ("stage", stage, STAGES, "use 0 for DDP or one process"),
        ("optimizer", optimizer, tuple(_STATES), "for another one take the one with as many states"),
        ("dtype", dtype, tuple(DTYPES), "fp16 needs what bf16 does"),
    ):
        if isinstance(value, bool) or value not in allowed:
            raise ValueError(f"{name}={value!r} must be one of {allowed}; {way_out}")
    if momentum and optimizer != "LpSGD":
        raise ValueError(f"momentum={momentum!r} is LpSGD's, not {optimizer}'s; leave it out")
    if offload and stage == 0:
        raise ValueError(
            "offload=True needs an engine that offloads, and stage=0 has none; use stage 1, 2, 3 or 'fsdp2'"
        )


# Llama 3: elements, and decayed matrices (7 in each layer).
_MODELS = (("8B", 8_030_000_000, 224), ("70B", 70_600_000_000, 560))
# What shards the training state: its name, the stage as of `footprint`, and whether it is offloaded to the host.
ENGINES: tuple[tuple[str, int | str, bool], ...] = (
    ("DDP", 0, False),
    ("ZeRO-1", 1, False),
    ("ZeRO-2", 2, False),
    ("ZeRO-2, offload", 2, True),
    ("ZeRO-3", 3, False),
    ("ZeRO-3, offload", 3, True),
    ("FSDP2", "fsdp2", False),
    ("FSDP2, offload", "fsdp2", True),
)
# Of `measure_histogram`, the zeros included.
BINS = 241


def table() -> str:
    """The Markdown table of `docs/footprint.md`: GiB per rank in bf16 mixed precision, LpAdamW beside AdamW."""
    rows = [
        (
            "| model | GPUs | engine | GPU: LpAdamW | AdamW | host: LpAdamW | AdamW | sent a step | sent a count,"
            " bytes | with histograms, bytes |"
        ),
        "|---|---:|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for model, parameters, counted in _MODELS:
        for ranks in (8, 64):
            for name, stage, offload in ENGINES:
                lp_adamw, adamw = (
                    footprint(parameters, ranks, stage, optimizer=optimizer, offload=offload, counted=counted)
                    for optimizer in ("LpAdamW", "AdamW")
                )
                binned = footprint(parameters, ranks, stage, offload=offload, counted=counted, bins=BINS)
                memory = (m.total for m in (lp_adamw.device, adamw.device, lp_adamw.host, adamw.host))
                cells = [
                    model,
                    str(ranks),
                    name,
                    *(f"{n / 2**30:,.2f}" if n else "" for n in (*memory, lp_adamw.sent_per_step)),
                    f"{lp_adamw.sent_per_count:,}",
                    f"{binned.sent_per_count:,}",
                ]
                rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)
