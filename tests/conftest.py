"""Shared by all tests: a tiny language model on disk, real text, and groups of ranks."""

from __future__ import annotations

import gc
import importlib
import json
import logging
import os
import pickle
import signal
import sys
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may depend on the network
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
import pytest
import torch

from helpers.paths import ROOT
from lp_dist.attachment.watch import RunEnd

torch.set_num_threads(
    1
    # as the ranks have: how MKL adds up a product depends on the number of threads, and results are compared bit for
    # bit
)

HERE = Path(__file__).resolve().parent
# What ranks import: once, in the server that they are forked from. Each would take seconds to do so.
PRELOADED = [
    "torch",
    "torch.distributed.fsdp",
    "torch.distributed.checkpoint",
    "torch.utils.cpp_extension",
    "deepspeed",
    "deepspeed.runtime.zero.muon.original_muon",  # by every engine of ZeRO, which compiles it
    "transformers.trainer",
    "lp_dist.training.finetune",
]
OF_RANKS = {"run_ranks", "module_ranks", "rank_pool", "run_program", "cpu_op"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks what starts ranks and what is the GPU's; the marks are told in pyproject.toml."""
    for item in items:
        folder = item.path.relative_to(HERE).parts[0]
        if folder == "distributed" or OF_RANKS & set(getattr(item, "fixturenames", ())):
            item.add_marker("distributed")
        if folder == "gpu":
            item.add_marker("gpu")


def pytest_collection_finish() -> None:
    """What was imported for the tests stays: looking through it for garbage would take a second each time."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    gc.unfreeze()  # or what Triton leaves behind is called a leak when Python ends


@pytest.fixture(autouse=True)
def _same_log_level():
    """A program that a test or a fixture calls sets how much is logged, as it would for its own process."""
    logging.getLogger("lp_dist").setLevel(logging.NOTSET)


@pytest.fixture(autouse=True)
def _runs_warn_in_their_own_test(monkeypatch):
    """A run that a test leaves inside of its window would say so in another one, when it is freed."""
    ends, made = [], RunEnd.__init__

    def make(self, *arguments, **values) -> None:
        made(self, *arguments, **values)
        ends.append(self)

    monkeypatch.setattr(RunEnd, "__init__", make)
    yield
    for end in ends:
        end.is_known = True


@pytest.fixture(scope="session")
def topics(tmp_path_factory) -> Path:
    """Real text that every Python carries: its language reference, a topic a line, as JSONL."""
    from pydoc_data.topics import topics as text

    path = tmp_path_factory.mktemp("text") / "topics.jsonl"
    with path.open("w") as file:
        for topic in sorted(text)[:30]:
            file.write(json.dumps({"topic": topic, "text": text[topic][:4000]}) + "\n")
    return path


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory, topics) -> Path:
    """A Llama of about 60 thousand weights with a tokenizer of its own, as a Hugging Face directory."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    directory = tmp_path_factory.mktemp("tiny_model")
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(
        (json.loads(line)["text"] for line in topics.open()),
        vocab_size=384,
        special_tokens=["<|end|>"],
        show_progress=False,
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer._tokenizer, eos_token="<|end|>", pad_token="<|end|>"
    ).save_pretrained(directory)
    torch.manual_seed(0)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=384,
            hidden_size=48,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=128,
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=0,
        )
    ).save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def cpu_op() -> None:
    """DeepSpeed compiles a small communication op on first use; two ranks doing so at the same time have aborted a
    run.
    """
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from deepspeed.comm.torch import build_shm_op

    build_shm_op()


@pytest.fixture
def run_ranks(tmp_path, cpu_op):
    """`run_ranks(fn, world_size, *args)` → what `fn(rank, world_size, *args)` returned on each rank, under gloo.

    The ranks meet at a file, so that tests running side by side can't take each other's port. If a rank fails, the
    test fails with the tracebacks of all that did.
    """

    def run(fn, world_size: int, *args) -> list:
        return _fork_ranks(tmp_path, fn, world_size, args)

    return run


@pytest.fixture(scope="module")
def module_ranks(tmp_path_factory, cpu_op):
    """As `run_ranks`, for a fixture of a whole module."""

    def run(fn, world_size: int, *args) -> list:
        return _fork_ranks(tmp_path_factory.mktemp("ranks"), fn, world_size, args)

    return run


@pytest.fixture(scope="module")
def rank_pool(tmp_path_factory, cpu_op):
    """`rank_pool(fn, *args)` → what `fn(rank, 2, *args)` returned on each of two ranks that live for the whole module.

    A rank that raises ends the pool, and so do ranks of which one waits for the other for a minute.
    """
    context = torch.multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    directory = tmp_path_factory.mktemp("pool")
    pipes = [context.Pipe() for _ in range(2)]
    ranks = [
        context.Process(target=_rank, args=(_serve, rank, 2, directory, dict(os.environ), (pipes[rank][1], directory)))
        for rank in range(2)
    ]
    for process in ranks:
        process.start()

    def run(fn, *args) -> list:
        for pipe, _ in pipes:
            pipe.send((fn, args))
        results = []
        for rank, (pipe, _) in enumerate(pipes):
            if not pipe.poll(60):
                for process in ranks:
                    os.kill(process.pid, signal.SIGUSR1)
                time.sleep(1)
                stacks = "\n".join((directory / f"stack_{each}").read_text() for each in range(2))
                pytest.fail(f"rank {rank} does not answer: {fn.__name__}{args}\n{stacks}")
            results.append(pipe.recv())
        errors = [error for _, error in results if error]
        assert not errors, "\n".join(errors)
        return [result for result, _ in results]

    yield run
    for pipe, _ in pipes:
        pipe.send(None)
    for process in ranks:
        process.join(20)
        process.kill()


def _serve(rank: int, world_size: int, pipe, directory: Path) -> None:
    import faulthandler
    import traceback

    # Where ranks wait for each other the test wants to know where.
    faulthandler.register(signal.SIGUSR1, file=(directory / f"stack_{rank}").open("w"))
    while (job := pipe.recv()) is not None:
        fn, args = job
        try:
            pipe.send((fn(rank, world_size, *args), ""))
        except BaseException:
            pipe.send((None, f"rank {rank}:\n{traceback.format_exc()}"))
            raise


@pytest.fixture(scope="session")
def run_program(tmp_path_factory, cpu_op):
    """`run_program([arguments, ...])`: the training program on 2 CPU ranks, one run after the other."""

    def run(runs: list[list[str]]) -> None:
        _fork_ranks(tmp_path_factory.mktemp("programs"), _programs, 2, (runs,))

    return run


def _programs(rank: int, world_size: int, runs: list[list[str]]) -> None:
    from lp_dist.training import arguments, finetune

    os.chdir(ROOT)  # recipes and configs are named from there
    for words in runs:
        finetune.run(*arguments.parse(words))


def _fork_ranks(directory: Path, fn, world_size: int, args: tuple) -> list:
    context = torch.multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    ranks = [
        context.Process(target=_rank, args=(fn, rank, world_size, directory, dict(os.environ), args))
        for rank in range(world_size)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(300)
        if process.is_alive():
            process.kill()
    results = []
    errors = [path.read_text() for path in sorted(directory.glob("error_*"))]
    assert not errors, "\n".join(errors)
    for rank, process in enumerate(ranks):
        assert process.exitcode == 0, f"rank {rank} ended with {process.exitcode}"
        results.append(pickle.loads((directory / f"result_{rank}").read_bytes()))
    return results


def _rank(fn, rank: int, world_size: int, directory: Path, environment: dict[str, str], args: tuple) -> None:
    import traceback

    os.environ.clear()
    os.environ.update(environment)
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT="0",
        DS_ACCELERATOR="cpu",
    )
    torch.set_num_threads(1)
    gc.freeze()  # DeepSpeed collects garbage for every engine, which would take longer than the steps
    try:
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{directory}/rendezvous", rank=rank, world_size=world_size
        )
        result = fn(rank, world_size, *args)
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
        (directory / f"result_{rank}").write_bytes(pickle.dumps(result))
    except BaseException:
        (directory / f"error_{rank}").write_text(f"rank {rank}:\n{traceback.format_exc()}")
        sys.exit(1)


@pytest.fixture(scope="module")
def gpu_module():
    """The GPU's step; where there is no GPU, in Triton's interpreter."""
    from helpers.gpu import DEVICE

    module_names = ("lp_dist.optim.kernels.triton", "lp_dist.optim.kernels.triton_kernel")
    with pytest.MonkeyPatch.context() as patch:
        if DEVICE == "cpu":  # read where the kernel is defined
            patch.setenv("TRITON_INTERPRET", "1")
        for name in module_names:
            sys.modules.pop(name, None)
        yield importlib.import_module(module_names[0])
        for name in module_names:
            sys.modules.pop(name, None)


@pytest.fixture
def gpu(gpu_module):
    gpu_module.tables.clear()
    yield gpu_module
    gpu_module.captured_tables.clear()


@pytest.fixture
def launches(gpu, monkeypatch):
    from helpers.gpu import Launches

    monkeypatch.setattr(gpu, "lp_step", Launches(gpu.lp_step))
    return gpu.lp_step
