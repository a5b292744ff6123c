"""Training in several processes: the same weights, other noise, other items."""

import os
import subprocess
import sys

import pytest
import torch
import yaml

from .small_stage import NEW_MODEL, small_stage

pytestmark = pytest.mark.slow
SCRIPT = """
import os, sys
import torch
import torch.distributed as dist
import vllm_wsi.training.stages as stages
from vllm_wsi.haystack.recipe import GENERATORS
from vllm_wsi.training.model import SparseLearnModel
from vllm_wsi.training.settings import load_settings
from vllm_wsi.training.train import train

seen = []
forward, normal = SparseLearnModel.forward, torch.randn_like

def noted(self, features, *arguments, **options):
    if not seen:
        seen.append({"weights": torch.cat([one.detach().flatten() for one in self.parameters()])})
    seen.append({"features": features.clone()})
    return forward(self, features, *arguments, **options)

def noted_noise(like):
    seen[-1]["noise"] = normal(like)
    return seen[-1]["noise"]

SparseLearnModel.forward, torch.randn_like = noted, noted_noise
train(load_settings(sys.argv[1]), sys.argv[2], GENERATORS)
torch.save(seen, f"{sys.argv[2]}/seen-{os.environ['RANK']}.pt")
"""


def test_processes_begin_with_equal_weights_and_draw_other_noise_for_other_items(tmp_path):
    run = {"model": {"new": NEW_MODEL}, "stages": [small_stage("scorer", trainer={"use_cpu": True})]}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(run))
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(tmp_path / "script.py"), str(tmp_path / "config.yaml"), str(tmp_path / "run")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (torch.load(tmp_path / "run" / f"seen-{rank}.pt", weights_only=True) for rank in (0, 1))
    assert torch.equal(first[0]["weights"], second[0]["weights"])
    assert len(first) == len(second) == 4
    for one, other in zip(first[1:], second[1:], strict=True):
        assert not torch.equal(one["noise"], other["noise"])
    slides = torch.cat([step["features"] for seen in (first[1:], second[1:]) for step in seen])
    assert len(slides) == 12
    assert len(torch.unique(slides, dim=0)) == 12
