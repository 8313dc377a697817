"""Checkpoints that a run is to go on from: no code of theirs runs unless they are trusted, and what is damaged ends in
one line before anything is loaded.
"""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
from pathlib import Path

import pytest
import torch

from helpers.checkpoints import RUNS, tagged, zero2
from helpers.damage import Touching, altered, files_of, fuzz, is_taken
from lp_dist.checkpoints.resuming import check_engine, check_run
from lp_dist.errors import UsageError

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

RUNS_CODE = r"names posix.mkdir, whose code would run .*--trust-pickles"


@pytest.fixture(params=RUNS)
def run(request, tmp_path) -> Path:
    directory = tmp_path / "checkpoint-3"
    directory.mkdir()
    RUNS[request.param](directory)
    return directory


def test_what_trainer_and_engines_write_is_taken(run):
    check_run(run)


def test_code_in_any_file_that_is_loaded_is_refused_unless_it_is_trusted(run, tmp_path):
    marker, sent = tmp_path / "it ran", tmp_path / "sent"
    pickles = [file for file in files_of(run) if file.suffix in (".pt", ".pth") or file.name == ".metadata"]
    assert len(pickles) >= 3
    for file in pickles:
        shutil.copytree(run, sent)
        if file.name == ".metadata":
            index = pickle.loads((run / file).read_bytes())
            index.planner_data = Touching(marker)
            (sent / file).write_bytes(pickle.dumps(index))
        else:
            torch.save({"more": Touching(marker)}, sent / file)
        with pytest.raises(UsageError, match=RUNS_CODE):
            check_run(sent)
        check_run(sent, trust_pickles=True)
        assert not marker.exists(), "the check itself runs nothing"
        shutil.rmtree(sent)


def test_code_in_a_file_of_another_kind_is_refused_as_well(run, tmp_path):
    """What torch.load takes besides zip files: a bare pickle, as before torch 1.6."""
    torch.save({"more": Touching(tmp_path / "it ran")}, run / "scheduler.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(UsageError, match=r"scheduler.pt is no complete file of torch.save"):
        check_run(run)
    assert not (tmp_path / "it ran").exists()


def test_code_among_the_tensors_of_a_distributed_checkpoint_is_refused(tmp_path):
    RUNS["under_fsdp2"](tmp_path)
    marker = tmp_path / "it ran"
    (data,) = (tmp_path / "optimizer_0").glob("*.distcp")
    index = pickle.loads((tmp_path / "optimizer_0" / ".metadata").read_bytes())
    part = next(part for part in index.storage_data if "exp_avg" not in part.fqn)
    torch.save(Touching(marker), tmp_path / "code")
    octets = (tmp_path / "code").read_bytes()
    storage = index.storage_data[part]
    storage.offset, storage.length = data.stat().st_size, len(octets)
    data.write_bytes(data.read_bytes() + octets)
    (tmp_path / "optimizer_0" / ".metadata").write_bytes(pickle.dumps(index))
    with pytest.raises(UsageError, match=RUNS_CODE):
        check_run(tmp_path)
    storage.transform_descriptors = ("zstd",)
    (tmp_path / "optimizer_0" / ".metadata").write_bytes(pickle.dumps(index))
    with pytest.raises(UsageError, match=r"packed \(zstd\), so it can't be checked before torch unpickles it"):
        check_run(tmp_path)
    assert not marker.exists()


def test_ranks_that_divide_the_files_check_all_of_them(run, tmp_path):
    pickles = [file for file in files_of(run) if file.suffix in (".pt", ".pth")]
    for file in pickles:
        shutil.copytree(run, tmp_path / "sent")
        torch.save({"more": Touching(tmp_path / "it ran")}, tmp_path / "sent" / file)
        shares = [(index, 3) for index in range(3)]
        refused = [share for share in shares if not is_taken(lambda: check_run(tmp_path / "sent", share=share))]
        assert len(refused) == 1
        shutil.rmtree(tmp_path / "sent")


def test_what_trainer_writes_and_never_loads_may_hold_anything(run, tmp_path):
    torch.save(Touching(tmp_path / "it ran"), run / "training_args.bin")
    check_run(run)
    assert not (tmp_path / "it ran").exists()


def test_links_are_followed_as_loaders_follow_them(tmp_path):
    sent, elsewhere = tmp_path / "sent", tmp_path / "elsewhere"
    sent.mkdir()
    RUNS["of_trainer"](sent)
    elsewhere.mkdir()
    (sent / "global_step3").symlink_to(elsewhere)
    (elsewhere / "up").symlink_to(sent)
    check_run(sent)
    torch.save(Touching(tmp_path / "it ran"), elsewhere / "mp_rank_00_model_states.pt")
    with pytest.raises(UsageError, match=RUNS_CODE):
        check_run(sent)


@pytest.mark.parametrize("name", ["latest", "latest_universal"])
def test_a_tag_that_leads_out_is_refused(name, tmp_path):
    RUNS["under_deepspeed"](tmp_path)
    (tmp_path / name).write_text("../../elsewhere")
    with pytest.raises(UsageError, match="which is no file within the checkpoint"):
        check_run(tmp_path)
    with pytest.raises(UsageError, match="which is no file within the checkpoint"):
        check_engine(tmp_path)


def test_an_engine_has_its_own_tag_checked(tmp_path):
    zero2(tmp_path)
    check_engine(tmp_path)
    shutil.copytree(tagged(tmp_path), tmp_path / "step6")
    torch.save(Touching(tmp_path / "it ran"), tmp_path / "step6" / "mp_rank_00_model_states.pt")
    check_engine(tmp_path)
    check_engine(tmp_path, "step3")
    check_engine(tmp_path, "nowhere")  # of which the engine speaks
    (tmp_path / "latest").write_text("step6")
    for tag in ("step6", None):
        with pytest.raises(UsageError, match=RUNS_CODE):
            check_engine(tmp_path, tag)


@pytest.mark.parametrize(
    "content, words",
    [
        ("[]", "holds a list and no object of JSON"),
        ('{"global_step": ', "is no JSON"),
        ({"global_step": "3"}, "has '3' for global_step, which is no int"),
        ({"global_step": True}, "has True for global_step, which is no int"),
        ({"log_history": 3}, "has 3 for log_history, which is no list"),
        ({"stateful_callbacks": {"LpCallback": 3}}, "has 3 for the state of LpCallback"),
        ({"stateful_callbacks": {"LpCallback": [{"args": {}}]}}, "for the state of LpCallback"),
    ],
)
def test_a_state_of_trainer_that_is_none_is_told(content, words, tmp_path):
    RUNS["of_trainer"](tmp_path)
    (tmp_path / "trainer_state.json").write_text(json.dumps(content) if isinstance(content, dict) else content)
    with pytest.raises(UsageError, match=words):
        check_run(tmp_path, trust_pickles=True)


def test_a_checkpoint_that_is_not_there_is_told(tmp_path):
    with pytest.raises(UsageError, match=r"there is no checkpoint .*nowhere to resume from; name the directory"):
        check_run(tmp_path / "nowhere")


def test_what_is_damaged_is_taken_or_refused_and_nothing_else(run, tmp_path):
    refused, _ = fuzz(run, tmp_path / "scratch", 40, 0, check_run)
    assert refused >= 10


@pytest.mark.long
def test_damaged_in_many_more_ways(run, tmp_path):
    seed = int(os.environ.get("LP_DIST_SEED", random.randrange(10_000)))
    refused, _ = fuzz(run, tmp_path / "scratch", 500, seed, check_run)
    assert refused >= 120, f"seed {seed}"


def test_a_state_of_trainer_altered_anywhere_is_taken_or_refused(tmp_path):
    RUNS["of_trainer"](tmp_path)
    file, chance = tmp_path / "trainer_state.json", random.Random(0)
    state = json.loads(file.read_text())
    taken = 0
    for _ in range(100):
        file.write_text(json.dumps(altered(state, chance)))
        taken += is_taken(lambda: check_run(tmp_path, trust_pickles=True))
    assert 20 <= taken <= 80
