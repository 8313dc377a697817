"""A checkpoint that someone sent, on several ranks: before a DeepSpeed engine unpickles it the ranks check its files,
and what one of them finds ends all of them.
"""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.damage import Touching
from helpers.engines import ended, quiet
from helpers.killed_runs import attached, case_of
from helpers.target_runs import engine_of, trained
from lp_dist.errors import UsageError
from lp_dist.sharding.deepspeed import check_in_shares


def loaded(engine_name: str, directory: Path, **more: Any) -> str:
    """What loading it into a new engine raises."""
    engine = engine_of(case_of(engine_name))
    attached(engine, "target")
    try:
        engine.handle.load_checkpoint(directory, **more)
        return ""
    except UsageError as error:
        return str(error)
    finally:
        ended(engine)


def on_a_rank(rank: int, world_size: int, directory: Path) -> dict[str, Any]:
    quiet()
    results: dict[str, Any] = {}
    for name in ("ZeRO-1", "ZeRO-3"):
        case = case_of(name)
        engine = engine_of(case)
        trained(engine, attached(engine, "target"), case, 0, 2)
        engine.save(directory / name, "2")
        ended(engine)
        results[name] = [loaded(name, directory / name)]
        for file in sorted((directory / name / "2").glob("*_states.pt")):
            before = file.read_bytes()
            torch.distributed.barrier()
            if rank == 0:
                torch.save({**torch.load(file, weights_only=False), "more": Touching(directory / "it ran")}, file)
            torch.distributed.barrier()
            results[name].append((file.name, loaded(name, directory / name), loaded(name, directory / name, tag="2")))
            torch.distributed.barrier()
            if rank == 0:
                results["ran"] = (directory / "it ran").exists()
                file.write_bytes(before)
    if rank == 0:
        file = directory / "ZeRO-1" / "2" / "mp_rank_00_model_states.pt"
        torch.save(
            {**torch.load(file, weights_only=False), "more": Touching(directory / f"it ran {os.getpid()}")}, file
        )
    torch.distributed.barrier()
    # It makes a directory, which the second rank can't make again.
    try:
        results["trusted"] = loaded("ZeRO-1", directory / "ZeRO-1", trust_pickles=True)
    except FileExistsError:
        results["trusted"] = ""
    return results


def test_no_rank_loads_what_one_of_them_refuses(run_ranks, tmp_path_factory):
    directory = tmp_path_factory.mktemp("sent")
    for results in run_ranks(on_a_rank, 2, directory):
        for name, files in (("ZeRO-1", 3), ("ZeRO-3", 4)):
            taken, *refused = results[name]
            assert taken == "" and len(refused) == files
            for file, *messages in refused:
                assert all(f"{file} names posix.mkdir, whose code would run" in message for message in messages), file
        assert not results.get("ran") and results["trusted"] == ""
    assert len(list(directory.glob("it ran *"))) == 1, "trusted, it does"


def shares(rank: int, world_size: int, one_node: bool) -> tuple[list[tuple[int, int]], str]:
    seen: list[tuple[int, int]] = []

    def check(share: tuple[int, int]) -> None:
        seen.append(share)
        if rank == 1:
            raise UsageError("of rank 1; leave it out")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(platform, "node", lambda: "a" if one_node else f"node {rank}")
        with pytest.raises(UsageError) as caught:
            check_in_shares(check)
    return seen, str(caught.value)


@pytest.mark.parametrize("one_node, expected", [(True, [(0, 2), (1, 2)]), (False, [(0, 1), (0, 1)])])
def test_the_ranks_of_a_node_divide_the_files(one_node, expected, run_ranks):
    for share, (seen, message) in zip(expected, run_ranks(shares, 2, one_node)):
        assert seen == [share] and message == "of rank 1; leave it out"
