"""Monitoring during training: zeros beside the loss on Trainer's progress bar, histograms of |w| in TensorBoard."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from transformers import TrainerCallback

from lp_dist.report.numbers import percent
from lp_dist.sparsity.measure import Histogram, kind_of


def show_on_bar(callbacks: Iterable[TrainerCallback], logs: Mapping[str, Any]) -> None:
    """Shows loss and zeros at the end of Trainer's progress bar, on the rank that has one.

    Args:
        callbacks: of Trainer; the one with a `training_bar` has the bar.
        logs: entries of a log line; nothing is shown if it has neither a loss nor zeros.
    """
    postfix = {}
    if "loss" in logs:
        postfix["loss"] = f"{float(logs['loss']):.3f}"
    if "lp/measured" in logs:
        postfix["zeros"] = percent(logs["lp/measured"], 1)
        if logs.get("lp/near_zero", logs["lp/measured"]) != logs["lp/measured"]:
            postfix["near zero"] = percent(logs["lp/near_zero"], 1)
    if "lp/groups_measured" in logs:
        postfix["groups"] = percent(logs["lp/groups_measured"], 1)
    for callback in callbacks:
        if postfix and getattr(callback, "training_bar", None) is not None:
            callback.training_bar.set_postfix(postfix)


def tensorboards(callbacks: Iterable[TrainerCallback]) -> list[Any]:
    """TensorBoard's writers of Trainer's callbacks: on rank 0 if `report_to` names TensorBoard, else none."""
    return [callback.tb_writer for callback in callbacks if getattr(callback, "tb_writer", None) is not None]


def write_histograms(writer: Any, histogram: Histogram, step: int) -> None:
    """Writes a histogram of log2 |w| for each kind of layer, and its fraction of zeros as a scalar.

    Zeros are left out of the histogram, where their bar would hide all others.

    Args:
        writer: of TensorBoard.
        histogram: of each parameter.
        step: of the optimizer.
    """
    kinds: dict[str, list[str]] = {}
    for name in histogram.counts:
        kinds.setdefault(kind_of(name), []).append(name)
    for kind, names in kinds.items():
        counts = [sum(numbers) for numbers in zip(*(histogram.counts[name] for name in names))]
        zeros = sum(histogram.zeros[name] for name in names)
        writer.add_scalar(f"zeros/{kind}", zeros / max(1, zeros + sum(counts)), step)
        filled = [i for i, count in enumerate(counts) if count]
        if not filled:
            continue
        bins = range(filled[0], filled[-1] + 1)
        limits = [math.log2(histogram.edges[i + 1]) for i in bins]
        middles = [limit - 0.125 for limit in limits]
        writer.add_histogram_raw(
            f"log2 |w|/{kind}",
            min=limits[0] - 0.25,
            max=limits[-1],
            num=sum(counts),
            sum=sum(middle * counts[i] for middle, i in zip(middles, bins)),
            sum_squares=sum(middle * middle * counts[i] for middle, i in zip(middles, bins)),
            bucket_limits=limits,
            bucket_counts=[counts[i] for i in bins],
            global_step=step,
        )
