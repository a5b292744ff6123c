"""The store of finished selections: equal in every bit, and whatever lies there instead is a miss."""

import logging
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from vllm_wsi.errors import SettingsError, SlideError
from vllm_wsi.selection.score_summary import ScoreSummary
from vllm_wsi.selection.scorer import seeded_scorer
from vllm_wsi.selection.selection import Selection
from vllm_wsi.selection.selector import SlideSelector
from vllm_wsi.selection.slide_pools import SlideScores
from vllm_wsi.slides import open_features, write_features
from vllm_wsi.slides.encoder_names import EncoderCheck
from vllm_wsi.slides.feature_file import Unit
from vllm_wsi.store import selection_store
from vllm_wsi.store.selection_key import SelectionKey
from vllm_wsi.store.selection_store import SelectionStore
from vllm_wsi.store.store_settings import StoreSettings, store_settings
from vllm_wsi.store.stored_selector import StoredSelector, scorer_name

D, K = 32, 8


class Counts(dict):
    def __call__(self, event, size):
        self[event] = self.get(event, 0) + 1


class CountingSelector(SlideSelector):
    runs = 0

    def select(self, *args, **kwargs):
        self.runs += 1
        return super().select(*args, **kwargs)


def make_slide(path, n=100, seed=0, dtype="float32", metadata=None):
    rng = np.random.default_rng(seed)
    features = rng.standard_normal((n, D)).astype(dtype)
    write_features(
        path, features, np.arange(2 * n).reshape(n, 2), {"slide_id": path.stem, "encoder": "e@1"} | (metadata or {})
    )
    return path


def selector(k=K, scorer="patch", summary_tokens=0):
    weights = seeded_scorer(scorer, D, 16, seed=0, **({"num_layers": 1, "num_heads": 2} if scorer == "context" else {}))
    weights = weights.requires_grad_(False)
    weights = weights.weights() if scorer == "patch" else weights
    return CountingSelector(weights, k, encoder=EncoderCheck("e@1"), summary_tokens=summary_tokens)


def stored(folder, chooser=None, counts=None, **options):
    return StoredSelector(
        chooser or selector(), "scorer", SelectionStore(folder, count=Counts() if counts is None else counts, **options)
    )


def select(by, path, k=K, **options):
    with open_features(path) as slide:
        key = SelectionKey(slide.identity, None, by.scorer, "cpu")
    return by.select(key, lambda: open_features(path), k, **options)


def assert_equal(found: Selection, wanted: Selection):
    """In every bit and fact, but for the seconds."""
    for name in ("indices", "scores", "features"):
        one, other = getattr(found, name), getattr(wanted, name)
        assert one.dtype == other.dtype
        assert torch.equal(one.view(torch.uint8), other.view(torch.uint8)), name
    assert found.record() == wanted.record()
    assert (found.pooled is None) == (wanted.pooled is None)
    if wanted.pooled is not None:
        assert torch.equal(found.pooled.view(torch.int32), wanted.pooled.view(torch.int32))
    assert (found.summary is None) == (wanted.summary is None)
    if wanted.summary is not None:
        assert found.summary.best == wanted.summary.best
        assert torch.equal(found.summary.quantiles, wanted.summary.quantiles)
    assert (found.coords is None) == (wanted.coords is None)
    if wanted.coords is not None:
        assert (found.coords.dtype, found.coords.tolist()) == (wanted.coords.dtype, wanted.coords.tolist())
    assert (found.all_scores is None) == (wanted.all_scores is None)
    if wanted.all_scores is not None:
        assert torch.equal(found.all_scores.view(torch.int32), wanted.all_scores.view(torch.int32))
        assert found.all_coords.tolist() == wanted.all_coords.tolist()


def damaged(path: Path):
    """Every way in which a file can be torn or foreign, each written over `path`."""
    whole = path.read_bytes()
    other = bytearray(whole)
    other[-1] ^= 1
    yield from (b"", whole[:7], whole[:8], whole[: len(whole) // 2], whole[:-1], whole + b"\0", bytes(len(whole)))
    yield bytes(other)
    yield whole.replace(b"format", b"fOrmat")
    yield (2**63).to_bytes(8, "little") + whole[8:]
    yield b"\x08\0\0\0\0\0\0\0" + b"[[[[1]]]"
    yield os.urandom(1000)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("scorer", ["patch", "context"])
@pytest.mark.parametrize("n", [1, K - 1, K, K + 1, 100])
def test_a_stored_selection_equals_a_fresh_one_in_every_bit(n, scorer, dtype, tmp_path):
    path = make_slide(tmp_path / "a.safetensors", n, dtype=dtype)
    first = select(stored(tmp_path / "store", selector(scorer=scorer)), path)
    again = selector(scorer=scorer)
    second = select(stored(tmp_path / "store", again), path)
    assert (first.source, second.source, again.runs) == ("file", "store", 0)
    with open_features(path) as slide:
        fresh = selector(scorer=scorer).select(slide)
    assert_equal(first.selection, fresh)
    assert_equal(second.selection, fresh)


def test_bfloat16_features_nan_rows_and_what_the_file_says_are_kept(tmp_path):
    from safetensors.torch import save_file

    x = torch.randn(50, D, generator=torch.Generator().manual_seed(0)).bfloat16()
    x[3:7] = float("nan")
    save_file({"features": x}, tmp_path / "a.safetensors", {"encoder": "e@1", "größe": '≥ 1 "quoted"'})
    wanted = select(stored(tmp_path / "store"), tmp_path / "a.safetensors").selection
    found = select(stored(tmp_path / "store"), tmp_path / "a.safetensors")
    assert found.source == "store"
    assert found.selection.features.dtype == torch.bfloat16
    assert found.selection.num_nonfinite == 4
    assert_equal(found.selection, wanted)


@pytest.mark.parametrize("scorer", ["patch", "context"])
@pytest.mark.parametrize("k", [1, K - 1, K + 1, 99, 100, 101, 256])
def test_another_k_and_all_scores_come_from_the_stored_scores_with_equal_bits(k, scorer, tmp_path):
    path = make_slide(tmp_path / "a.safetensors", 100)
    with open_features(path) as slide:  # ties: the same row again
        rows = slide.read_rows(0, 100)
    rows[50:] = rows[:50]
    rows[7, 0] = np.inf
    write_features(path, rows, np.arange(200).reshape(100, 2), {"encoder": "e@1"})
    select(stored(tmp_path / "store", selector(scorer=scorer)), path)
    for keep in (False, True):
        chooser = selector(scorer=scorer)
        found = select(stored(tmp_path / "store", chooser), path, k, keep_all_scores=keep)
        assert chooser.runs == 0
        assert found.source == "stored scores"
        with open_features(path) as slide:
            assert_equal(found.selection, selector(scorer=scorer).select(slide, k, keep_all_scores=keep))
        for file in (tmp_path / "store").glob("*/*.selection.safetensors"):
            file.unlink()


@pytest.mark.parametrize("scorer", ["patch", "context"])
@pytest.mark.parametrize("n", [1, K - 1, K, K + 1, 100])
def test_summary_tokens_come_from_the_store_with_equal_bits_for_every_k(n, scorer, tmp_path):
    path = make_slide(tmp_path / "a.safetensors", n, dtype="float16")
    for k, source in ((K, "file"), (K, "store"), (4, "stored scores"), (101, "stored scores"), (101, "store")):
        found = select(stored(tmp_path / "store", selector(scorer=scorer, summary_tokens=3)), path, k)
        assert found.source == source
        with open_features(path) as slide:
            assert_equal(found.selection, selector(scorer=scorer, summary_tokens=3).select(slide, k))
        assert found.selection.num_tokens <= k


def test_stored_scores_without_the_pools_that_are_wanted_are_a_miss(tmp_path):
    path = make_slide(tmp_path / "a.safetensors")
    sizes = (0, 3, 4)
    names = {scorer_name("digest", selector(summary_tokens=size)) for size in sizes}
    assert len(names) == len(sizes)
    for size in sizes:  # under one name, which no two of them have in service
        found = select(stored(tmp_path / "store", selector(summary_tokens=size)), path, 10 + size)
        assert found.source == "file"


def test_another_state_scorer_encoder_device_or_k_has_another_digest(tmp_path):
    with open_features(make_slide(tmp_path / "a.safetensors")) as slide:
        key = SelectionKey(slide.identity, None, "scorer", "cpu")
    others = [
        key._replace(identity=key.identity._replace(**{name: value}))
        for name, value in (
            ("path", "/b"),
            ("size", 1),
            ("mtime_ns", 1),
            ("inode", 1),
            ("ctime_ns", 1),
            ("content", "x"),
        )
    ]
    others += [
        key._replace(encoder="e"),
        key._replace(scorer="other"),
        key._replace(scored_on="NVIDIA H100, sm_90, Triton 3.9"),
    ]
    digests = [one.of_selection(k) for one in (key, *others) for k in (8, 9)] + [
        one.of_scores() for one in (key, *others)
    ]
    assert len(set(digests)) == len(digests)


def test_a_damaged_or_foreign_file_is_a_miss_and_is_removed_and_counted(tmp_path, caplog):
    path, folder = make_slide(tmp_path / "a.safetensors"), tmp_path / "store"
    wanted = select(stored(folder), path).selection
    scores = next(folder.glob("*/*.scores.safetensors"))
    (file,) = folder.glob("*/*.selection.safetensors")
    for target in (file, scores):
        for content in list(damaged(target)):
            if target is scores:
                file.unlink()
            target.write_bytes(content)
            counts = Counts()
            with caplog.at_level(logging.WARNING, logger="vllm_wsi"):
                found = select(stored(folder, counts=counts), path)
            assert found.source == ("stored scores" if target is file else "file"), content[:40]
            assert counts["damaged"] == 1
            assert_equal(found.selection, wanted)
            assert select(stored(folder), path).source == "store"
    assert "found a damaged or foreign file, which is removed" in caplog.text


def test_a_whole_file_under_another_digest_is_foreign(tmp_path):
    folder = tmp_path / "store"
    one, two = (make_slide(tmp_path / f"{seed}.safetensors", seed=seed) for seed in (1, 2))
    select(stored(folder), one)
    (mine,) = folder.glob("*/*.selection.safetensors")
    data = mine.read_bytes()
    wanted = select(stored(folder), two).selection
    (other,) = set(folder.glob("*/*.selection.safetensors")) - {mine}
    other.write_bytes(data)
    assert_equal(select(stored(folder), two).selection, wanted)


def test_a_slide_that_changes_while_it_is_read_is_not_stored(tmp_path):
    path, by = make_slide(tmp_path / "a.safetensors"), stored(tmp_path / "store")

    @contextmanager
    def changing():
        with open_features(path) as slide:
            yield slide
        raise SlideError("changed")

    with open_features(path) as slide:
        key = SelectionKey(slide.identity, None, "scorer", "cpu")
    with pytest.raises(SlideError, match="changed"):
        by.select(key, changing, K)
    assert not list((tmp_path / "store").glob("*/*.safetensors"))


WRITER = """
import sys, torch
from pathlib import Path
from vllm_wsi.selection.slide_pools import SlideScores
from vllm_wsi.store.selection_store import SelectionStore
store = SelectionStore(Path(sys.argv[1]))
print("ready", flush=True)
for i in range(100_000):
    store.save_scores(f"{i % 5:040x}", SlideScores(torch.full((200_000,), float(i % 5))))
"""


def test_a_process_that_is_killed_while_it_writes_leaves_no_file_that_is_read_as_good(tmp_path):
    for attempt in range(12):
        process = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE)
        assert process.stdout.readline() == b"ready\n"
        time.sleep(0.003 * attempt)
        process.send_signal(signal.SIGKILL)
        process.wait()
        counts = Counts()
        for i in range(5):
            scores = SelectionStore(tmp_path, count=counts).load_scores(f"{i:040x}")
            assert scores is None or scores.scores.eq(i).all()
        assert "damaged" not in counts  # not even under its final name


def test_what_a_killed_process_left_aside_is_removed_after_an_hour(tmp_path):
    store, name = SelectionStore(tmp_path), f".abc{'0' * 37}.scores.safetensors"
    (tmp_path / "abc").mkdir()
    old, new = (tmp_path / "abc" / f"{name}.{end}" for end in ("x1", "x2"))
    for file in (old, new):
        file.write_bytes(b"half")
    os.utime(old, (0, time.time() - 7200))
    store.prune()
    assert (old.exists(), new.exists()) == (False, True)


def test_the_least_recently_used_go_when_the_store_is_full(tmp_path):
    size = 4 * 10_000 + 400
    counts = Counts()
    store = SelectionStore(tmp_path, max_bytes=10 * size, count=counts)
    digests = [f"{i:03x}{'0' * 37}" for i in range(10)]
    for age, digest in enumerate(digests):
        store.save_scores(digest, SlideScores(torch.zeros(10_000)))
        os.utime(store.path("scores", digest), (0, time.time() - 1000 + age))
    assert store.load_scores(digests[0]) is not None  # used now
    store.save_scores("f" * 40, SlideScores(torch.zeros(10_000)))
    store.prune()
    left = {file.path.name.partition(".")[0] for file in store.files()}
    assert left == {digests[0], *digests[3:], "f" * 40}
    assert counts["evicted"] == 2


def test_a_store_that_outgrows_its_bound_prunes_itself(tmp_path):
    store = SelectionStore(tmp_path, max_bytes=500_000)
    for i in range(40):
        store.save_scores(f"{i:040x}", SlideScores(torch.zeros(10_000)))
    until = time.monotonic() + 10
    while sum(file.num_bytes for file in store.files()) > 500_000 and time.monotonic() < until:
        time.sleep(0.02)
    assert sum(file.num_bytes for file in store.files()) <= 500_000


def test_files_that_are_not_the_stores_are_never_removed_also_behind_links(tmp_path):
    """A folder of slides may be named as a store by mistake, and one of its folders may be a link."""
    store, elsewhere = SelectionStore(tmp_path / "store", max_bytes=1000), tmp_path / "elsewhere"
    elsewhere.mkdir()
    own = f"abc{'0' * 37}.scores.safetensors"
    others = [store.folder / "svs" / "a.svs", store.folder / "svs" / "svs1.scores.safetensors", elsewhere / own]
    others += [store.folder / "abc" / name for name in ("notes.txt", ".hidden", f"def{own[3:]}", f"{own}.bak")]
    for path in others:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"x" * 5000)
        os.utime(path, (0, 0))
    (store.folder / "def").symlink_to(elsewhere)
    (store.folder / "abc" / own).symlink_to(elsewhere / own)
    store.check()
    store.prune(0)
    assert all(path.read_bytes() == b"x" * 5000 for path in others)
    assert store.load_scores(own.partition(".")[0]) is None  # the link goes, what it leads to stays
    assert others[2].exists()


def test_what_other_processes_save_counts_for_the_bound(tmp_path):
    stores = [SelectionStore(tmp_path, max_bytes=500_000) for _ in range(6)]
    for i in range(60):
        stores[i % 6].save_scores(f"{i:03x}{'0' * 37}", SlideScores(torch.zeros(10_000)))
        time.sleep(0.01)  # for the walks aside
    until = time.monotonic() + 10
    while sum(file.num_bytes for file in stores[0].files()) > 600_000 and time.monotonic() < until:
        time.sleep(0.02)
    assert sum(file.num_bytes for file in stores[0].files()) <= 600_000


def test_what_cannot_be_removed_is_not_counted_as_evicted(tmp_path, monkeypatch):
    counts = Counts()
    store = SelectionStore(tmp_path, count=counts)
    for i in range(4):
        store.save_scores(f"{i:03x}{'0' * 37}", SlideScores(torch.zeros(1000)))
    monkeypatch.setattr(Path, "unlink", no_space)
    size = sum(file.num_bytes for file in store.files())
    assert store.prune(size // 2) == size
    assert "evicted" not in counts
    assert counts["fault"] >= 4


@pytest.mark.parametrize("dtype", [">i4", ">f8", "longdouble", "uint16", "int8"])
def test_coordinates_of_every_dtype_are_stored(dtype, tmp_path):
    chosen = Selection(torch.arange(3), torch.zeros(3), torch.zeros(3, D), 3, 0, coords=np.ones((3, 2), dtype))
    SelectionStore(tmp_path).save_selection("a" * 40, chosen)
    assert SelectionStore(tmp_path).load_selection("a" * 40).coords.tolist() == chosen.coords.tolist()


def test_what_the_numbers_of_the_coordinates_are_is_stored(tmp_path):
    unit, coords = Unit("um", "guess", 256 / 224), np.arange(6).reshape(3, 2) * 224
    chosen = Selection(torch.arange(3), torch.zeros(3), torch.zeros(3, D), 3, 0, coords=coords, unit=unit)
    SelectionStore(tmp_path).save_selection("a" * 40, chosen)
    assert SelectionStore(tmp_path).load_selection("a" * 40).unit == unit


@pytest.mark.parametrize(
    "change",
    [
        {"indices": torch.tensor([0, 2, 1])},
        {"indices": torch.tensor([0, 1, 3])},
        {"indices": torch.tensor([-1, 0, 1])},
        {"indices": torch.arange(3.0)},
        {"scores": torch.zeros(2)},
        {"scores": torch.full((3,), float("nan"))},
        {"features": torch.zeros(2, D)},
        {"features": torch.zeros(3, D, dtype=torch.int32)},
        {"coords": np.zeros((3, 3))},
        {"num_patches": 2},
        {"summary": ScoreSummary(0.0, torch.zeros(2))},
    ],
    ids=str,
)
def test_a_whole_file_that_makes_no_selection_is_a_miss(change, tmp_path):
    facts = {"indices": torch.arange(3), "scores": torch.zeros(3), "features": torch.zeros(3, D), "num_patches": 3}
    counts = Counts()
    store = SelectionStore(tmp_path, count=counts)
    store.save_selection("a" * 40, Selection(num_nonfinite=0, **facts | change))
    assert store.load_selection("a" * 40) is None
    assert counts["damaged"] == 1


def test_a_new_slide_is_one_miss_and_a_heat_map_saves_nothing_twice(tmp_path):
    path, counts = make_slide(tmp_path / "a.safetensors"), Counts()
    by = stored(tmp_path / "store", counts=counts)
    select(by, path)
    assert counts == {"miss": 1, "saved": 2}
    for _ in range(2):
        select(by, path, keep_all_scores=True)
    assert counts == {"miss": 1, "saved": 2, "scores hit": 2}


def no_space(*args, **kwargs):
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("fault", ["vanished", "a file in its place", "full", "unreadable"])
def test_a_store_with_a_fault_says_so_once_and_slides_are_selected_without_it(fault, tmp_path, monkeypatch, caplog):
    folder, counts, chooser = tmp_path / "store", Counts(), selector()
    by = stored(folder, chooser, counts)
    paths = [make_slide(tmp_path / f"{i}.safetensors", seed=i) for i in range(3)]
    if fault in ("vanished", "a file in its place"):
        os.rename(folder, tmp_path / "gone")
    if fault == "a file in its place":
        folder.touch()
    if fault == "full":
        monkeypatch.setattr(selection_store, "replacing", no_space)
    if fault == "unreadable":
        monkeypatch.setattr(SelectionStore, "_read", no_space)
    with caplog.at_level(logging.WARNING, logger="vllm_wsi"):
        for path in paths:
            found = select(by, path)
            with open_features(path) as slide:
                assert_equal(found.selection, selector().select(slide))
    assert chooser.runs == 3
    assert counts["fault"] >= 3
    kinds = [record.getMessage().partition(" failed")[0] for record in caplog.records]
    assert kinds
    assert len(kinds) == len(set(kinds))


HOLDER = """
import sys, time
from pathlib import Path
from vllm_wsi.store.selection_store import SelectionStore
with SelectionStore(Path(sys.argv[1])).alone(sys.argv[2]):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """A process that holds the lock of a digest."""
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path), "a" * 40], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"held\n"
    yield process
    process.kill()
    process.wait()


def test_a_lock_is_waited_for_and_is_free_when_its_holder_is_killed(tmp_path, holder):
    waited = []

    def waiting():
        waited.append(None)
        if len(waited) == 5:
            holder.kill()

    with SelectionStore(tmp_path).alone("b" * 40, waiting):
        assert not waited  # another digest
    with SelectionStore(tmp_path).alone("a" * 40, waiting):
        assert len(waited) >= 5


def test_a_holder_that_takes_too_long_is_waited_for_no_more(tmp_path, holder, monkeypatch):
    monkeypatch.setattr(selection_store, "WAIT_SECONDS", 0.1)
    with SelectionStore(tmp_path).alone("a" * 40):
        assert holder.poll() is None


def test_who_waits_may_give_up(tmp_path, holder):
    def giving_up():
        raise SlideError("the end")

    with pytest.raises(SlideError, match="the end"), SelectionStore(tmp_path).alone("a" * 40, giving_up):
        pass


def test_a_slide_that_another_process_has_just_selected_is_not_selected_again(tmp_path):
    path, folder, chooser = make_slide(tmp_path / "a.safetensors"), tmp_path / "store", selector()
    first, second = stored(folder), stored(folder, chooser)
    sources = []

    class Late(SelectionStore):
        """Finds nothing at first, as if the other process had not ended yet."""

        def load_selection(self, digest, count_miss=True):
            sources.append(super().load_selection(digest, count_miss))
            if len(sources) == 1:
                select(first, path)
            return sources[-1]

    second.store = Late(folder)
    assert select(second, path).source == "store"
    assert (chooser.runs, len(sources)) == (0, 2)


def test_settings_name_a_folder_and_a_bound(tmp_path, monkeypatch):
    monkeypatch.delenv("VLLM_WSI_STORE", raising=False)
    assert store_settings(None) is None
    assert store_settings("x", "0.5") == StoreSettings(Path("x").absolute(), 1 << 29)
    monkeypatch.setenv("VLLM_WSI_STORE", str(tmp_path))
    assert store_settings(None) == StoreSettings(tmp_path, 10 << 30)
    assert store_settings("/other").folder == Path("/other")
    for bound in (0, -1, "much", float("nan"), [1]):
        with pytest.raises(SettingsError, match=r"selection_store_gib: found .*, wanted a positive number"):
            store_settings("x", bound)
    monkeypatch.setenv("VLLM_WSI_STORE", "")
    with pytest.raises(SettingsError, match="found no selection_store, wanted its folder too"):
        store_settings(None, 1)
    (tmp_path / "file").touch()
    with pytest.raises(SettingsError, match="wanted a folder that can be made"):
        SelectionStore(tmp_path / "file" / "store")
