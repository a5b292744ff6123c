"""What 32 slide tokens buy, by vLLM's own client: `python -m bench.serving.throughput [--quick] [--decoder NAME]`.

Starts `vllm serve --plugin vllm_wsi` three times (as it is; without prefix caching; with two API servers; on a card a
fourth time, selecting on the GPU) and runs `vllm bench serve` with `custom_image` data sets against them. Slides are
virtual: N log-normal around 20,000 patches, one of 1,000,000; which slide a request asks about is Zipf's law. Every
data set's slides are new to the server (hard links), their pages are warm. What is asked: `throughput_cases.py`.

Rows go to `bench/results/serving.csv`; `throughput_report.py` makes the tables and the figure.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from bench.common.record import RESULTS, ROOT, check_header
from bench.serving.measure import COLUMNS, Bench
from bench.serving.throughput_cases import FULL, LARGE_K, ON_THE_GPU, QUICK, compare, crowd, growth, warm_up
from bench.serving.workload import Workload
from vllm_wsi.model.init_checkpoint import init_checkpoint, init_shape
from vllm_wsi.model.tiny_settings import SlideSettings, TinySettings
from vllm_wsi.serving.server_process import VllmServer

CSV = RESULTS / "serving.csv"
PROBE = ROOT / "bench" / "serving" / "probe"  # counts the bytes that an API server sends to the engine
ROOM = ("--max-model-len", "8192", "--max-num-seqs", "64")
CPU = ("--dtype", "float32", "--enforce-eager")
QWEN2_5_7B = {
    "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "vocab_size": 152064, "hidden_size": 3584,
    "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4,
    "max_position_embeddings": 32768, "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "dtype": "bfloat16",
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
}  # fmt: skip


@dataclass(frozen=True)
class Decoder:
    """A checkpoint to serve.

    Args:
        feature_dim: d of its slides.
        args: of `vllm serve`.
        write: gives its directory, perhaps the one it is handed.
        gpu_gib: of a card's memory that one server needs: weights, and some room for KV blocks.
    """

    feature_dim: int
    args: tuple[str, ...]
    write: Callable[[Path], Path]
    gpu_gib: int = 2


def _demo(folder: Path) -> Path:
    return ROOT / "vllm_wsi" / "haystack" / "demo_checkpoint"


def _small(folder: Path) -> Path:
    init_checkpoint(folder, TinySettings(feature_dim=512, hidden_size=512, num_layers=8, max_position_embeddings=32768))
    return folder


def _qwen(folder: Path) -> Path:
    init_shape(folder, SlideSettings(feature_dim=512), QWEN2_5_7B)
    return folder


DECODERS = {
    "demo": Decoder(64, CPU, _demo),  # 2 layers of 128, trained
    "small": Decoder(512, CPU, _small),  # 8 layers of 512, random weights
    "qwen2.5-7b": Decoder(512, ("--load-format", "dummy", "--dtype", "bfloat16"), _qwen, 22),
}


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(description="What 32 slide tokens buy, by vLLM's own benchmark client.")
    found.add_argument("--quick", action="store_true", help="tiny sizes: shows that it runs, measures nothing")
    found.add_argument("--decoder", default="demo", choices=DECODERS)
    found.add_argument("--csv", type=Path, default=CSV)
    return found


def main() -> None:
    args = parser().parse_args()
    check_header(args.csv, COLUMNS)
    decoder, sizes = DECODERS[args.decoder], QUICK if args.quick else FULL
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="vllm-wsi-bench-") as folder:
        work = Workload(Path(folder), decoder.feature_dim)
        with servers(decoder, Path(folder)) as started:
            print(f"servers up after {time.perf_counter() - began:.0f} s", flush=True)
            bench = Bench(args.decoder, sizes, started, work, args.csv)
            warm_up(bench)
            compare(bench)
            crowd(bench)
            growth(bench)
    print(f"{args.csv}: done in {time.perf_counter() - began:.0f} s")


@contextmanager
def servers(decoder: Decoder, folder: Path) -> Iterator[dict[str, VllmServer]]:
    """Every server that the cases ask, started side by side. K is 4,096 in all: `#k=` asks for less."""
    options: dict[str, object] = {"num_slide_tokens": LARGE_K, "selection_device": "cpu"}
    kwargs = ("--mm-processor-kwargs", json.dumps(options))
    kinds: dict[str, tuple[str, ...]] = {
        "as it is": kwargs,
        "no prefix cache": (*kwargs, "--no-enable-prefix-caching"),
    }
    if torch.cuda.is_available():
        kinds[ON_THE_GPU] = ("--mm-processor-kwargs", json.dumps(options | {"selection_device": "cuda"}))
    kinds["2 API servers"] = (*kwargs, "--api-server-count", "2")  # the first to go where a card has no room
    room: tuple[str, ...] = ROOM
    if torch.cuda.is_available():
        fit = int(0.9 * _gpu_gib() / decoder.gpu_gib)
        for kind in list(kinds)[fit:]:
            print(f"{kind}: left out, for the card has room for {fit} servers")
            del kinds[kind]
        room = (*ROOM, "--gpu-memory-utilization", f"{0.9 / len(kinds):.2f}")
    checkpoint = decoder.write(folder / "checkpoint")
    path = os.pathsep.join(filter(None, [str(PROBE), os.environ.get("PYTHONPATH")]))
    env = {"PYTHONPATH": path, "VLLM_PLUGINS": "vllm_wsi,vllm_wsi_bench"}

    def start(kind: str) -> VllmServer:
        log = folder / f"{kind}.log"
        return VllmServer(checkpoint, folder, log, (*decoder.args, *room, *kinds[kind]), env)

    with ExitStack() as stack:
        # vLLM measures free GPU memory as it starts: on a card one after the other.
        with ThreadPoolExecutor(1 if torch.cuda.is_available() else len(kinds)) as pool:
            flights = {kind: pool.submit(start, kind) for kind in kinds}
        found = {kind: stack.enter_context(flight.result()) for kind, flight in flights.items()}
        yield found


def _gpu_gib() -> float:
    """Of the card, asked by a child: a CUDA context of this process would hold some of it."""
    code = "import torch; print(torch.cuda.get_device_properties(0).total_memory / 2**30)"
    return float(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)


if __name__ == "__main__":
    main()
