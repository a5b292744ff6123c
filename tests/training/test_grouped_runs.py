"""Runs of `vllm-wsi train` whose sequences hold several questions about one slide."""

import json
import logging
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import MistralConfig, MistralForCausalLM

from vllm_wsi.errors import SettingsError
from vllm_wsi.model.init_checkpoint import byte_tokenizer
from vllm_wsi.slides import write_features
from vllm_wsi.training.settings import TrainSettings
from vllm_wsi.training.train import train

from .stopping import stopped_at

pytestmark = pytest.mark.slow
D = 16


@pytest.fixture
def questions(tmp_path):
    """Seven questions about one slide, three about another."""
    folder = tmp_path / "features"
    folder.mkdir()
    rng = np.random.default_rng(0)
    rows = []
    for name, n, count in (("a", 30, 7), ("b", 9, 3)):
        write_features(folder / f"{name}.safetensors", rng.standard_normal((n, D)).astype(np.float32))
        for number in range(count):
            said = [("human", f"<image>\nWhat is number {number}?"), ("gpt", "A sarcoma" + "." * number)]
            talk = [{"from": who, "value": text} for who, text in said]
            rows.append({"id": f"{name}{number}", "image": [f"{name}.csv"], "conversations": talk})
    path = tmp_path / "instruct.json"
    path.write_text(json.dumps(rows))
    return {"questions": [str(path)], "features": str(folder)}


def settings(data: dict, **changes) -> TrainSettings:
    stage = {
        "name": "scorer",
        "data": data,
        "train": ["scorer", "projector"],
        "sparselearn": {"num_slide_tokens": 4, "k_start": 8},
        "steps": 8,
        "batch_size": 1,
        "questions_per_sequence": 3,
        "warmup_steps": 1,
        "save_steps": 3,
        "learning_rate": {"scorer": 1e-2, "denoiser": 1e-2, "projector": 1e-2},
    }
    model = {"new": {"feature_dim": D, "hidden_size": 64, "num_layers": 1, "num_slide_tokens": 4}}
    return TrainSettings.model_validate({"model": model, "stages": [stage | changes]})


def weights(checkpoint):
    return load_file(checkpoint / "model.safetensors")


def test_a_grouped_run_says_what_it_groups_and_one_that_was_stopped_goes_on_to_the_same_bits(
    questions, tmp_path, caplog
):
    asked = settings(questions)  # four sequences, so that eight steps are two epochs
    caplog.set_level(logging.INFO, logger="vllm_wsi")
    whole = train(asked, tmp_path / "whole")
    assert "stage scorer: 10 conversations go in 4 sequences of up to 3" in caplog.text
    with stopped_at(7):
        train(asked, tmp_path / "run")
    torch.randn(99)
    found, wanted = weights(train(asked, tmp_path / "run")), weights(whole)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    alone = weights(train(settings(questions, questions_per_sequence=1), tmp_path / "alone"))
    assert not torch.equal(alone["scorer.out.weight"], wanted["scorer.out.weight"])


# Trains, and notes in a file for each process what is in each sequence that it reads.
NOTING = """
import json, os, sys
from vllm_wsi.training.grouping import GroupedDataset
from vllm_wsi.training.settings import load_settings
from vllm_wsi.training.train import train

config, out, seen = sys.argv[1:]
read = GroupedDataset.__getitem__

def noting(self, number):
    item = read(self, number)
    slide = len(item.slides[0].features)
    with open(f"{seen}-{os.environ['RANK']}", "a") as file:  # of the process or its worker
        file.write(json.dumps(sorted([slide, *ids] for ids in [item.ids, *(one.ids for one in item.siblings)])) + "\\n")
    return item

GroupedDataset.__getitem__ = noting
train(load_settings(config), out)
"""


def test_every_epoch_of_two_processes_holds_each_question_once_beside_other_companions(questions, tmp_path):
    """On gloo: both draw the same sequences and share them; a worker of each reads them."""
    asked = settings(questions, steps=6, workers=1, trainer={"use_cpu": True})
    config, script = tmp_path / "config.yaml", tmp_path / "script.py"
    config.write_text(yaml.safe_dump(json.loads(asked.model_dump_json(exclude_defaults=True))))
    script.write_text(NOTING)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(script), str(config), str(tmp_path / "run"), str(tmp_path / "seen")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    read = [(tmp_path / f"seen-{rank}").read_text().splitlines() for rank in (0, 1)]
    epochs = [[line for lines in read for line in lines[2 * epoch :][:2]] for epoch in range(3)]
    for epoch in epochs:
        asked_ids = [tuple(ids) for line in epoch for ids in json.loads(line)]
        assert len(asked_ids) == len(set(asked_ids)) == 10
    assert len({frozenset(epoch) for epoch in epochs}) == 3


def test_a_grouped_run_with_adapters_and_gradient_checkpointing_comes_near_the_one_without(questions, tmp_path):
    rates = {"scorer": 1e-2, "denoiser": 1e-2, "projector": 1e-2, "lora": 1e-2}
    changes = {"lora": {"r": 4, "alpha": 8}, "learning_rate": rates, "steps": 3}
    plain = weights(train(settings(questions, **changes), tmp_path / "plain"))
    checkpointing = settings(questions, **changes, trainer={"gradient_checkpointing": True})
    found = weights(train(checkpointing, tmp_path / "checkpointing"))
    assert all(torch.allclose(found[name], plain[name], atol=1e-5) for name in plain)


def test_a_decoder_that_cannot_share_a_prefix_is_refused_before_slides_are_read(questions, tmp_path):
    asked = settings(questions)
    decoder = tmp_path / "decoder"
    tokenizer = byte_tokenizer()
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "vocab_size": 320}
    MistralForCausalLM(
        MistralConfig(**sizes, num_attention_heads=2, num_key_value_heads=1, sliding_window=8)
    ).save_pretrained(decoder)
    tokenizer.save_pretrained(decoder)
    for path in (tmp_path / "features").iterdir():
        path.unlink()
    asked = asked.changed(model=asked.model.changed(new=None, decoder=str(decoder), feature_dim=D, num_slide_tokens=4))
    with pytest.raises(SettingsError, match="found MistralForCausalLM with sliding_attention, wanted 1"):
        train(asked, tmp_path / "run")
