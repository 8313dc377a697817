"""The training program end to end on a tiny model, in one process: what it saves, reports, resumes and refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from helpers.tasks import TASKS
from lp_dist.export.model_task import other_than_causal
from lp_dist.report import inspection, schema
from lp_dist.training import arguments, finetune


@pytest.fixture(scope="session")
def common(tiny_model, topics) -> list[str]:
    return [
        "--model",
        str(tiny_model),
        "--dataset",
        str(topics),
        "--block_size",
        "64",
        "--max_steps",
        "12",
        "--learning_rate",
        "1e-2",
        "--weight_decay",
        "0.05",
        "--decay_start",
        "0.25",
        "--decay_end",
        "0.75",
        "--per_device_train_batch_size",
        "4",
        "--logging_steps",
        "3",
        "--eval_strategy",
        "steps",
        "--eval_steps",
        "3",
        "--use_cpu",
        "true",
    ]


@pytest.fixture(scope="session")
def run(common, tmp_path_factory) -> Path:
    """One finished run, with checkpoints on its way and TensorBoard listening."""
    out = tmp_path_factory.mktemp("runs") / "sparse"
    finetune.main([*common, "--output_dir", str(out), "--save_steps", "6", "--report_to", "tensorboard"])
    return out


def test_zeros_are_exact_in_the_files_and_after_a_plain_reload(run):
    saved = schema.read(run)
    weights = load_file(run / "model.safetensors")
    kinds = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    decayed = {name: w for name, w in weights.items() if name.split(".")[-2] in kinds}
    assert len(decayed) == 14
    zeros = sum(int((w == 0).sum()) for w in decayed.values())
    assert zeros == saved["zeros"] > 0.1 * saved["decayed_weights"]
    assert saved["sparsity"] == zeros / sum(w.numel() for w in decayed.values())
    assert all(int((w == 0).sum()) == 0 for name, w in weights.items() if name not in decayed)
    reloaded = AutoModelForCausalLM.from_pretrained(run).state_dict()
    assert all(torch.equal(reloaded[name], w) for name, w in weights.items())
    AutoTokenizer.from_pretrained(run)


def test_the_config_has_no_key_that_a_loader_could_trip_over(run, tiny_model):
    before, after = (json.loads((d / "config.json").read_text()) for d in (tiny_model, run))
    assert set(after) <= set(before) | {"use_cache", "pad_token_id", "dtype", "transformers_version"}


def test_the_report_tells_the_run(run):
    saved = schema.read(run)
    assert saved["perplexity_after"] < saved["perplexity_before"]
    assert saved["versions"]["torch"] == torch.__version__ and "transformers" in saved["versions"]
    assert sum(zeros for zeros, _ in saved["kinds"].values()) == saved["zeros"]
    assert saved["sparsity_of_all"] == saved["zeros"] / saved["parameters"]
    assert (
        saved["decay"]["cutoff"] == "inf" and "Infinity" not in (run / schema.FILE).read_text()
    )  # strict JSON has no infinity
    assert saved["steps"] == 12 and saved["decay"]["p"] == 0.5 and saved["weight_decay"] == 0.05
    assert saved["configuration"]["weight_decay"] == 0.05 and "eval_on_start" not in saved["configuration"], (
        "what was requested"
    )
    assert (
        saved["window"] == [3, 9]
        and saved["engine"] == "one process"
        and saved["environment"]["ranks"] == 1
        and saved["seconds"] > 0
    )


def test_the_report_counts_every_weight_in_the_order_of_the_model(run, tiny_model):
    saved, weights = schema.read(run), load_file(run / "model.safetensors")
    assert (
        list(saved["tensors"])[:3] == [f"model.layers.0.self_attn.{kind}_proj.weight" for kind in "qkv"]
        and len(saved["tensors"]) == 14
    )
    assert all(
        counts == [int((weights[name] == 0).sum()), weights[name].numel()] for name, counts in saved["tensors"].items()
    )
    histograms = saved["histograms"]
    for when, of in (("before", load_file(tiny_model / "model.safetensors")), ("after", weights)):
        values = torch.cat([of[name].abs().flatten() for name in saved["tensors"]])
        wanted = torch.histogram(
            values[values > 0].double(), torch.tensor(histograms["edges"], dtype=torch.float64)
        ).hist
        assert histograms[when] == wanted.tolist() and sum(histograms[when]) + histograms[f"zeros_{when}"] == saved[
            "decayed_weights"
        ] == len(values)
    assert histograms["zeros_after"] == saved["zeros"] > histograms["zeros_before"] == 0


def test_the_run_leaves_its_page(run):
    text, saved = (run / "report.html").read_text(), schema.read(run)
    assert (
        f"{saved['perplexity_after']:,.2f}" in text
        and f"{100 * saved['sparsity']:.2f} %" in text
        and text.count("<figure>") == 5
    )


def test_sparsity_follows_warm_up_decay_and_freeze(run):
    curve = {entry["step"]: entry["eval_sparsity"] for entry in schema.read(run)["log"] if "eval_sparsity" in entry}
    assert set(curve) == {0, 3, 6, 9, 12}
    assert curve[0] == curve[3] == 0.0
    assert 0.0 < curve[6] < curve[9] == curve[12]


def test_loss_perplexity_and_sparsity_reach_the_loggers(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (directory,) = {path.parent for path in run.rglob("events.out.tfevents.*")}
    events = EventAccumulator(str(directory))
    events.Reload()
    assert {"eval/loss", "eval/perplexity", "eval/sparsity", "train/loss"} <= set(events.Tags()["scalars"])
    assert events.Scalars("eval/sparsity")[-1].value == pytest.approx(schema.read(run)["sparsity"])


def test_an_interrupted_run_resumes_to_the_same_weights(run, common, tmp_path):
    finetune.main(
        [*common, "--output_dir", str(tmp_path / "resumed"), "--resume_from_checkpoint", str(run / "checkpoint-6")]
    )
    uninterrupted, resumed = (
        load_file(run / "model.safetensors"),
        load_file(tmp_path / "resumed" / "model.safetensors"),
    )
    assert all(torch.equal(resumed[name], w) for name, w in uninterrupted.items())
    first, second = schema.read(run), schema.read(tmp_path / "resumed")
    assert first["perplexity_before"] == second["perplexity_before"]
    assert [(e["step"], e["eval_perplexity"]) for e in first["log"] if "eval_perplexity" in e] == [
        (e["step"], e["eval_perplexity"]) for e in second["log"] if "eval_perplexity" in e
    ]  # nothing is evaluated again


@pytest.mark.parametrize(
    "base, words", [("sgd", ["--weight_decay", "0.02"]), ("lion", ["--learning_rate", "2e-3", "--p", "0"])]
)
def test_other_bases_and_a_compared_run(base, words, run, common, tmp_path, capsys):
    finetune.main(
        [
            *common,
            *words,
            "--base",
            base,
            "--output_dir",
            str(tmp_path),
            "--compare_with",
            str(run),
            "--eval_strategy",
            "no",
        ]
    )
    saved, other = schema.read(tmp_path), schema.read(run)
    assert saved["zeros"] > 0 and saved["reference"]["perplexity_after"] == other["perplexity_after"]
    assert {
        "step": 3,
        "loss": next(entry["loss"] for entry in other["log"] if entry["step"] == 3 and "loss" in entry),
    } in saved["reference"]["log"]
    assert "compared run" in (tmp_path / "report.html").read_text()
    out = " ".join(capsys.readouterr().out.split())
    assert (
        "compared run" in out
        and "Exact zeros per kind of layer" in out
        and "Next: " in out
        and f"Page: {tmp_path / 'report.html'}" in out
        and "from transformers import pipeline" in out
    )


def test_without_decay_it_is_a_dense_fine_tune(common, tmp_path):
    finetune.main([*common, "--weight_decay", "0", "--output_dir", str(tmp_path)])
    assert schema.read(tmp_path)["zeros"] == 0


def test_a_layer_can_be_left_dense(common, tmp_path):
    finetune.main(
        [
            *common,
            "--overrides",
            '{"*.layers.0.*": {"weight_decay": 0}}',
            "--output_dir",
            str(tmp_path),
            "--eval_strategy",
            "no",
        ]
    )
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    zeros = [sum(int((p == 0).sum()) for p in layer.parameters() if p.ndim == 2) for layer in model.model.layers]
    assert zeros[0] == 0 and zeros[1] > 1000


def test_what_an_override_adds_by_its_full_name_is_counted(common, tmp_path):
    name = "model.embed_tokens.weight"
    overrides = f'{{"{name}": {{"weight_decay": 0.5}}}}'
    finetune.main([*common, "--overrides", overrides, "--output_dir", str(tmp_path), "--eval_strategy", "no"])
    weights, saved = load_file(tmp_path / "model.safetensors"), schema.read(tmp_path)
    assert saved["tensors"][name] == [int((weights[name] == 0).sum()), weights[name].numel()]
    assert saved["tensors"][name][0] > 0 and saved["sparsity_before"] == 0
    assert saved["decayed_weights"] == sum(weights[tensor].numel() for tensor in saved["tensors"])


def test_a_decay_that_made_no_zeros_says_what_to_try(common, tmp_path, capsys):
    finetune.main(
        [
            *common,
            "--weight_decay",
            "1e-4",
            "--precondition",
            "0",
            "--output_dir",
            str(tmp_path),
            "--eval_strategy",
            "no",
        ]
    )
    assert schema.read(tmp_path)["sparsity"] < 0.01
    assert (
        "--weight_decay 0.001" in schema.read(tmp_path)["next"] and "--weight_decay 0.001" in capsys.readouterr().out
    )


def test_a_recipe_and_the_command_line_say_the_same(common, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "model: m\ndataset: d\nmax_steps: 7\nlearning_rate: 1.0e-4\nbf16: false\nlr_scheduler_kwargs: {num_cycles:"
        f" 2}}\noutput_dir: {tmp_path / 'out'}\nreport_to: [tensorboard]\neval_steps: null\nweight_decay: 0.5\n"
    )
    model, data, decays, training = arguments.parse(
        ["--local_rank=0", str(recipe), "--weight_decay", "0.25", "--p", "0"]
    )
    assert (model.model, data.dataset, training.max_steps, training.learning_rate) == ("m", "d", 7, 1e-4)
    assert (training.bf16, training.lr_scheduler_kwargs, training.report_to) == (
        False,
        {"num_cycles": 2},
        ["tensorboard"],
    )
    assert (training.weight_decay, decays.p) == (0.25, 0.0)  # the command line wins


@pytest.mark.parametrize("pattern", ["2:4", "'4:8'"])
def test_a_recipe_may_name_a_pattern(tmp_path, pattern):
    (tmp_path / "recipe.yaml").write_text(
        f"model: m\ndataset: d\noutput_dir: {tmp_path / 'out'}\npattern: {pattern}\nscope: layer\n"
    )
    target = arguments.parse([str(tmp_path / "recipe.yaml")])[2].targets()[0]
    assert (target.pattern, target.sparsity, target.scope) == (pattern.strip("'"), 0.5, "layer")
    assert arguments.parse([str(tmp_path / "recipe.yaml"), "--sparsity", "0"])[2].targets() == [], (
        "a dense run by the same recipe"
    )


def test_a_pattern_is_in_the_saved_model(common, tmp_path):
    finetune.main(
        [
            *common,
            "--weight_decay",
            "0",
            "--decay_start",
            "0.1",
            "--decay_end",
            "0.9",
            "--pattern",
            "2:4",
            "--output_dir",
            str(tmp_path),
            "--eval_strategy",
            "no",
        ]
    )
    zeros = inspection.inspect(tmp_path)
    matrices = [tensor for tensor in zeros.tensors if tensor.counted]
    assert len(matrices) == 14
    assert all(
        tensor.conforming == tensor.blocks == tensor.elements / 4 and tensor.zeros == tensor.elements / 2
        for tensor in matrices
    )
    assert schema.read(tmp_path)["sparsity"] == 0.5 and schema.read(tmp_path)["decay"]["pattern"] == "2:4"


@pytest.mark.parametrize(
    "words, phrases",
    [
        (["--p", "5"], ["--p 5.0", "[-4, 4]"]),
        (["--weight_decay", "-1"], ["--weight_decay -1.0", ">= 0"]),
        (["--base", "sgd", "--precondition", "1"], ["--precondition 1.0", "--base adamw"]),
        (["--decay_start", "0.8", "--decay_end", "0.2"], ["--decay_start 0.8", "--decay_end 0.2"]),
        (["--decay_start", "50", "--decay_end", "60"], ["from step 50 to 60", "12 steps"]),
        (["--optim", "adafactor"], ["--optim adafactor", "--base"]),
        (["--dataset", "nowhere.jsonl"], ["nowhere.jsonl", "existing file"]),
        (["--text_column", "body"], ["--text_column body", "topic", "text"]),
        (["--eval_split", "test"], ["--eval_split test", "--eval_fraction"]),
        (["--eval_fraction", "1.5"], ["--eval_fraction 1.5", "between 0 and 1"]),
        (["--block_size", "4096"], ["--block_size 4096", "128 tokens"]),
        (["--block_size", "1"], ["--block_size 1", "at least 2"]),
        (["--compare_with", "nowhere"], ["nowhere", "finished run"]),
        (["--model", "nowhere.gguf"], ["nowhere.gguf", "not a file"]),
        (["--resume_from_checkpoint", "true"], ["holds no checkpoint"]),
        (["--pattern", "2:4"], ["--pattern 2:4 finds λ by itself", "--weight_decay", "must be 0"]),
        (
            ["--pattern", "2:4", "--sparsity", "0.7", "--weight_decay", "0"],
            ["--sparsity 0.7 contradicts --pattern 2:4"],
        ),
        (["--distill", "2"], ["--distill 2.0", "at most 1", "leave the teacher out"]),
        (["--distill", "0.3"], ["--distill 0.3 belongs to a --teacher"]),
        (["--teacher", "dense", "--label_smoothing_factor", "0.1"], ["--label_smoothing_factor 0.1", "two losses"]),
        (["--overrides", "{p: 0}"], ["--overrides is no JSON", '"*.layers.0.*"']),
        (["--overrides", '{"*": 1}'], ["--overrides", "must map patterns to values"]),
        (["--overrides", '{"*": {"p": 9}}'], ["--p 9", "[-4, 4]"]),
        (["--overrides", '{"layers.0.*": {"p": 0}}'], ["'layers.0.*'", "matches no parameter", "'*layers.0.*'"]),
        (["--load_best_model_at_end", "true", "--save_steps", "3"], ["--load_best_model_at_end", "set it to false"]),
    ],
)
def test_bad_input_ends_with_one_line_that_says_what_to_do(words, phrases, common, tmp_path):
    with pytest.raises(SystemExit) as caught:
        finetune.main([*common, "--output_dir", str(tmp_path), *words])
    message = str(caught.value.code)
    assert message.startswith("lp-dist: error: ") and all(phrase in message for phrase in phrases), message


def refusal(words: list[str]) -> str:
    with pytest.raises(SystemExit) as caught:
        finetune.main(words)
    return str(caught.value.code)


def test_an_adapter_is_no_model_and_a_directory_without_a_model_is_none(common, tiny_model, tmp_path):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    output = ["--output_dir", str(tmp_path / "run")]
    assert "can't be read: its config.json ended with" in refusal([*common, *output, "--model", str(adapter)])
    (adapter / "adapter_config.json").write_text("{}")
    for words in (["--model", str(adapter)], ["--teacher", str(adapter)]):
        message = refusal([*common, *output, *words])
        assert "holds an adapter" in message and f"lp-dist merge BASE {adapter} OUT" in message, message
    shutil.copy(tiny_model / "config.json", adapter)  # a base that lies beside an adapter of its own
    assert "holds an adapter" in refusal([*common, *output, "--model", str(adapter)])


@pytest.mark.parametrize("name", sorted(TASKS.keys() - {"experts", "images in a text, as pixels"}))
def test_what_is_no_causal_model_is_told_by_its_config_alone(name, common, tmp_path):
    """There is nothing else in the directory, and the text is not read either."""
    model, directory = TASKS[name].model(), tmp_path / "model"
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(directory)
    words = [*common, "--output_dir", str(tmp_path / "run"), "--dataset", "absent.txt"]
    message = refusal([*words, "--model", str(directory)])
    assert f"--model {directory} is {type(model).__name__}, and this program trains causal" in message
    assert "LpCallback" in message and "\n" not in message
    assert f"--teacher {directory} is {type(model).__name__}" in refusal(
        [*common, "--output_dir", str(tmp_path / "run"), "--teacher", str(directory)]
    )


@pytest.mark.parametrize(
    "family, changes, name",
    [
        ("llama", {}, None),
        ("llama", {"architectures": None}, None),
        ("llama", {"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
        ("llama", {"architectures": ["LlamaModel"]}, "LlamaModel"),
        ("llama", {"architectures": ["LlamaModel"], "tie_word_embeddings": True}, None),
        ("llama", {"architectures": ["SomeoneElsesModel"]}, None),
        ("gemma3", {"architectures": ["Gemma3ForConditionalGeneration"]}, None),
        ("t5", {"architectures": None}, "T5Config"),
        ("bert", {"architectures": None}, "BertConfig"),
        ("bert", {"architectures": ["BertModel"], "is_decoder": True, "tie_word_embeddings": True}, None),
    ],
)
def test_which_class_is_no_causal_model(family, changes, name):
    config = transformers.AutoConfig.for_model(family)
    config.architectures = ["LlamaForCausalLM"]
    for key, value in changes.items():
        setattr(config, key, value)
    assert other_than_causal(config) == name


def test_chats_are_no_text(common, tmp_path):
    chat = tmp_path / "chat.jsonl"
    turns = [{"role": "user", "content": "w1 w2"}, {"role": "assistant", "content": "w3"}]
    chat.write_text(20 * (json.dumps({"messages": turns}) + "\n"))
    message = refusal([*common, "--output_dir", str(tmp_path / "run"), "--dataset", str(chat)])
    assert "its columns are ['messages']" in message and "apply_chat_template" in message and "SFTTrainer" in message


@pytest.mark.parametrize("words, dtype", [([], torch.float32), (["--bf16", "true"], torch.bfloat16)])
def test_a_teacher_is_loaded_in_the_dtype_of_its_forward_pass_and_handed_over(
    words, dtype, common, tiny_model, tmp_path, monkeypatch
):
    given: dict = {}

    class Stop(Exception):
        pass

    def record(**arguments):
        given.update(arguments)
        raise Stop

    monkeypatch.setattr(finetune, "LpTrainer", record)
    with pytest.raises(Stop):
        finetune.main(
            [*common, *words, "--output_dir", str(tmp_path), "--teacher", str(tiny_model), "--distill", "0.3"]
        )
    assert given["distill"] == 0.3 and given["teacher"] is not given["model"]
    assert given["teacher"].dtype == dtype and given["model"].dtype == torch.float32
    with pytest.raises(Stop):
        finetune.main([*common, "--output_dir", str(tmp_path)])
    assert given["teacher"] is None
    with pytest.raises(Stop):
        finetune.main([*common, *words, "--output_dir", str(tmp_path), "--teacher", "self"])
    assert given["teacher"] is not given["model"] and given["teacher"].dtype == dtype
    pairs = zip(given["teacher"].parameters(), given["model"].parameters(), strict=True)
    assert all(a.equal(b.to(dtype)) for a, b in pairs)


@pytest.mark.parametrize(
    "file, old, new, word",
    [
        ("config.json", '"vocab_size": 384', '"vocab_size": 400', "the teacher knows 400 tokens and the model 384"),
        ("tokenizer.json", '"<|end|>"', '"<|fin|>"', "has another tokenizer than"),
    ],
)
def test_a_teacher_of_other_tokens_is_refused_before_it_is_loaded(file, old, new, word, common, tiny_model, tmp_path):
    teacher = tmp_path / "teacher"
    teacher.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        text = (tiny_model / name).read_text()
        assert name != file or text.count(old) >= 1
        (teacher / name).write_text(text.replace(old, new) if name == file else text)
    with pytest.raises(SystemExit, match=word):
        finetune.main([*common, "--output_dir", str(tmp_path / "out"), "--teacher", str(teacher)])


def test_a_finished_run_is_not_overwritten_by_default(run, common):
    with pytest.raises(SystemExit) as caught:
        finetune.main([*common, "--output_dir", str(run)])
    assert "holds a run already" in str(caught.value.code) and "--overwrite" in str(caught.value.code)


def test_lines_of_a_plain_text_are_joined_as_they_stand(common, tmp_path):
    text = tmp_path / "book.txt"
    text.write_text("".join(f"line {i}\n" for i in range(300)))
    model, data, _, training = arguments.parse(
        [*common, "--dataset", str(text), "--output_dir", str(tmp_path / "out")]
    )
    _, tokenizer, train, held_out = finetune.read_inputs(model, data, training)
    assert len(train) > len(held_out) > 0
    assert not any(tokenizer.eos_token_id in block for block in train["input_ids"])  # a line is no document
