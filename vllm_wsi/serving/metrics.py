"""What the selection service counts and times, beside vLLM's own numbers in `/metrics`.

Prometheus appends `_total` to counters, and `_bucket`, `_sum` and `_count` to histograms.
"""

from __future__ import annotations

from prometheus_client import Counter, Gauge, Histogram

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)

SELECTIONS = Counter("vllm_wsi:selections", "Slides that were read and scored.")
PATCHES_READ = Counter("vllm_wsi:patches_read", "Patches that were read and scored.")
CACHE_HITS = Counter("vllm_wsi:selection_cache_hits", "Requests that were answered from a finished selection.")
JOINED = Counter("vllm_wsi:selections_joined", "Requests that waited for a selection already under way.")

FALLBACKS = Counter(
    "vllm_wsi:selection_fallbacks", "Slides that the CPU scored because the GPU could not.", labelnames=["reason"]
)

REMOTE_BYTES = Counter("vllm_wsi:remote_bytes", "Bytes of slides on other machines that came by ranges.")
RANGES_GIVEN_UP = Counter(
    "vllm_wsi:ranges_given_up", "Slides that were fetched whole, because their server's ranges did not fit."
)

STORE_EVENTS = Counter(
    "vllm_wsi:selection_store_events",
    "What the selection store did: hit, scores hit, miss, saved, evicted, damaged (removed), fault (of its disk).",
    labelnames=["event"],
)
STORE_BYTES = Counter(
    "vllm_wsi:selection_store_bytes", "Bytes that the selection store saved, evicted or removed.", labelnames=["event"]
)

READ_SECONDS = Histogram("vllm_wsi:read_seconds", "Reading the features of a new slide.", buckets=SECONDS)
SCORE_SECONDS = Histogram("vllm_wsi:score_seconds", "Scoring the features of a new slide, and Top-K.", buckets=SECONDS)
SELECTION_SECONDS = Histogram(
    "vllm_wsi:selection_seconds", "A new slide from its request to its selection, waiting included.", buckets=SECONDS
)

# With several API servers, the sum over those that live.
CACHE_BYTES_USED = Gauge("vllm_wsi:selection_cache_bytes", "Finished selections.", multiprocess_mode="livesum")
CACHE_SLIDES = Gauge("vllm_wsi:selection_cache_slides", "Finished selections.", multiprocess_mode="livesum")
QUEUED = Gauge(
    "vllm_wsi:selections_queued", "New slides that wait for one of the readers.", multiprocess_mode="livesum"
)
DEVICE = Gauge(
    "vllm_wsi:selection_device",
    "API servers that score slides on this device.",
    labelnames=["device"],
    multiprocess_mode="livesum",
)
RUNNING = Gauge("vllm_wsi:selections_running", "New slides that are read and scored.", multiprocess_mode="livesum")


def count_store(event: str, num_bytes: int) -> None:
    STORE_EVENTS.labels(event).inc()
    if num_bytes:
        STORE_BYTES.labels(event).inc(num_bytes)


_devices: set[str] = set()


def show_device(name: str) -> None:
    """Slides are scored on this device from now on."""
    _devices.add(name)
    for one in _devices:
        DEVICE.labels(one).set(one == name)
