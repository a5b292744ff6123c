"""Every feature format of the field, opened and read back to the last bit."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numcodecs
import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
import zarr

from vllm_wsi.errors import SlideError
from vllm_wsi.slides import FeatureFile, open_features
from vllm_wsi.slides.formats.named_arrays import NO_COORDS
from vllm_wsi.slides.formats.rows import RawRows

from . import feature_stores as stores

N, D = 21, 8
VALUES = np.random.default_rng(7).standard_normal((N, D))
COORDS = np.stack([np.arange(N) % 5, np.arange(N) // 5], axis=1) * 512
MICRONS = COORDS * 0.499
TRIDENT = {"patch_size": 256, "patch_size_level0": 512.0, "level0_width": 9000, "name": "TCGA-1"}
TRIDENT_READ = {"patch_size": "256", "patch_size_level0": "512.0", "width": "9000", "slide_id": "TCGA-1"}
STAMP = {"unit": "um", "extractor": "uni2", "stamp_version": "2.4.0", "tile_size_um": 256.0}
STAMP_READ = {"unit": "um", "encoder": "uni2", "stamp_version": "2.4.0", "tile_size_um": "256.0"}
OURS = {"slide_id": "S1", "encoder": "uni@abc123", "mpp": "0.499"}


def tensor(dtype: str) -> torch.Tensor:
    return torch.from_numpy(VALUES).to(getattr(torch, dtype))


def raw(dtype: str) -> np.ndarray:
    """The values as open_features delivers them: bfloat16 as its 16 bits."""
    return (tensor(dtype).view(torch.uint16) if dtype == "bfloat16" else tensor(dtype)).numpy()


F32 = raw("float32")


@dataclass
class Case:
    """A file as its producer writes it, and what must be found in it."""

    name: str
    write: Callable[[Path], Any]
    format: str
    key: str = ""
    dtype: str = "float32"
    coords: np.ndarray | None = None
    unit: str | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)
    encoder: str | None = None
    num_patches: int = N

    @property
    def rows(self) -> np.ndarray:
        return raw(self.dtype)[: self.num_patches]


def ours(dtype: str) -> Case:
    tensors = {"features": tensor(dtype), "coords": torch.from_numpy(COORDS).int()}
    return Case(
        f"{dtype}.safetensors", lambda path: safetensors.torch.save_file(tensors, path, OURS),
        "safetensors", "features", dtype, COORDS, "px", OURS,
    )  # fmt: skip


def h5(path: Path, data: Mapping[str, Any], attrs: Mapping[str, Mapping[str, Any]] | None = None, **options) -> None:
    """`data` by key and `attrs` by key ("/" for the root); the options are those of the features."""
    with h5py.File(path, "w") as file:
        for key, values in data.items():
            file.create_dataset(key, data=values, **({} if key == "coords" else options))
        for key, values in (attrs or {}).items():
            file[key].attrs.update(values)


def hdf5(name: str, layout: str, key: str, features: np.ndarray, coords: np.ndarray | None, unit: str | None = "px",
         attrs: Mapping[str, Mapping[str, Any]] | None = None, read: Mapping[str, str] | None = None,
         dtype: str = "float32", num_patches: int = N, **options) -> Case:  # fmt: skip
    data = {key: features} if coords is None else {key: features, "coords": coords}
    found = None if coords is None else coords.reshape(num_patches, -1)[:, :2]
    return Case(
        f"{name}.h5", lambda path: h5(path, data, attrs, **options), f"{layout} h5", key, dtype,
        found, unit, read or {}, num_patches=num_patches,
    )  # fmt: skip


def trident(name: str, features: np.ndarray = F32, **options) -> Case:
    attrs = {"coords": TRIDENT, "features": {"encoder": "uni_v1"}}
    read = TRIDENT_READ | {"encoder": "uni_v1"}
    return hdf5(name, "TRIDENT", "features", features, COORDS, attrs=attrs, read=read, **options)


def atlas(name: str, encoders: Mapping[str, np.ndarray], encoder: str | None, key: str) -> Case:
    five = np.concatenate([COORDS, np.full((N, 2), 448), np.zeros((N, 1), int)], axis=1)
    data = {f"features/{each}": values for each, values in encoders.items()} | {"coords": five}
    read = {"patch_size": "448", "patch_level": "0", "encoder": key.removeprefix("features/")}
    return Case(f"{name}.h5", lambda path: h5(path, data), "AtlasPatch h5", key, "float32", COORDS, "px", read, encoder)


def npy(name: str, dtype: str, version: tuple[int, int]) -> Case:
    def write(path: Path) -> None:
        with open(path, "wb") as file:
            np.lib.format.write_array(file, raw(dtype), version)

    return Case(f"{name}.npy", write, "npy", dtype=dtype)


def pt(name: str, saved: torch.Tensor, dtype: str = "float32", legacy: bool = False) -> Case:
    def write(path: Path) -> None:
        torch.save(saved, path, _use_new_zipfile_serialization=not legacy)

    return Case(f"{name}.pt", write, "pt (before torch 1.6)" if legacy else "pt", dtype=dtype)


def pt_dict(name: str, legacy: bool = False, key: str = "features", **beside: Any) -> Case:
    """As slide2vec and home-made scripts write it."""
    coords = COORDS if {"coords", "coordinates", "x"} & beside.keys() else None
    read = {name: str(value) for name, value in beside.items() if isinstance(value, (str, float))}

    def write(path: Path) -> None:
        torch.save({**beside, key: tensor("float32")}, path, _use_new_zipfile_serialization=not legacy)

    form, unit = "pt (before torch 1.6)" if legacy else "pt", "px" if coords is not None else None
    return Case(f"{name}.pt", write, form, key, coords=coords, unit=unit, metadata=read)


def npz(name: str, key: str = "features", compressed: bool = False, read: Mapping[str, str] | None = None, **arrays):
    save = np.savez_compressed if compressed else np.savez
    placed = bool({"coords", "coordinates", "x"} & arrays.keys())
    return Case(
        f"{name}.npz", lambda path: save(path, **arrays), "npz", key,
        coords=COORDS if placed else None, unit="px" if placed else None, metadata=read or {},
    )  # fmt: skip


def slidechat(name: str, before: str = "", end: str = "\n", newline: str = "\n", quote: str = "") -> Case:
    cells = [[*map(str, range(D)), "patch_name"], *([*map(str, row), f"{i}_53.jpeg"] for i, row in enumerate(F32))]
    lines = [",".join(f"{quote}{cell}{quote}" for cell in row) for row in cells]
    text = before + newline.join(lines) + end
    return Case(f"{name}.csv", lambda path: path.write_bytes(text.encode()), "SlideChat csv")


def narrow_floats(path: Path) -> None:
    """bfloat16 within HDF5: h5py has no such dtype and shows it as float32."""
    kind = h5py.h5t.IEEE_F32LE.copy()
    kind.set_fields(15, 7, 8, 0, 7)
    kind.set_size(2)
    kind.set_ebias(127)
    with h5py.File(path, "w") as file:
        dataset = h5py.h5d.create(file.id, b"features", kind, h5py.h5s.create_simple((N, D)))
        dataset.write(h5py.h5s.ALL, h5py.h5s.ALL, np.ascontiguousarray(raw("bfloat16")), kind)


PLACES = torch.from_numpy(COORDS)


def plain_zarr(name: str, zarr_format: int = 3, coords: np.ndarray = COORDS, key: str = "features", **how) -> Case:
    arrays = {key: F32, "coords": coords}
    return Case(
        f"{name}.zarr", lambda path: stores.zarr_group(path, arrays, zarr_format, **how), "zarr", key,
        coords=COORDS, unit="px",
    )  # fmt: skip


def table(name: str, form: str, write: Callable[..., None], *arguments: Any) -> Case:
    read = stores.LAZYSLIDE_READ | {"patch_size_level0": "448"}
    return Case(name, lambda path: write(path, F32, COORDS, *arguments), form, "X", "float32", COORDS, "px", read)


def spatial(name: str, models: Mapping[str, np.ndarray], encoder: str | None, zarr_format: int = 3) -> Case:
    order = np.random.default_rng(5).permutation(N)
    chosen = encoder or next(iter(models))
    read = stores.LAZYSLIDE_READ | {"encoder": chosen.removesuffix("_tiles"), "patch_size_level0": "448.0"}
    return Case(
        f"{name}.zarr", lambda path: stores.spatial_zarr(path, models, COORDS, order, zarr_format=zarr_format),
        "SpatialData zarr", f"tables/{chosen.removesuffix('_tiles')}_tiles/X", "float32", COORDS, "px", read, encoder,
    )  # fmt: skip


def parquet(name: str, key: str, write: Callable[..., None], *arguments: Any, **others: Any) -> Case:
    placed = {"x", "coords"} & others.keys()
    return Case(
        f"{name}.parquet", lambda path: write(path, F32, *arguments, **others), "parquet", key,
        coords=COORDS if placed else None, unit="px" if placed else None,
    )  # fmt: skip


ZARRS = [
    plain_zarr("v3", chunks=(4, 3)),
    plain_zarr("v3-one-chunk", key="feats", chunks=(100, 100), coords=COORDS[None]),
    plain_zarr("v3-bare", chunks=(1, D), compressors=None),
    plain_zarr("v3-gzip", chunks=(5, D), compressors=zarr.codecs.GzipCodec()),
    plain_zarr("v3-blosc", chunks=(5, 3), compressors=zarr.codecs.BloscCodec()),
    plain_zarr("v3-shards", chunks=(2, 4), shards=(6, 8)),
    plain_zarr("v3-bare-shards", chunks=(3, 2), shards=(9, 4), compressors=None),
    plain_zarr("v3-dots", chunks=(4, 3), chunk_key_encoding={"name": "v2", "separator": "."}),
    plain_zarr("v3-big-endian", chunks=(4, 3), serializer=zarr.codecs.BytesCodec(endian="big")),
    plain_zarr("v2", 2, chunks=(4, 3)),
    plain_zarr("v2-blosc", 2, chunks=(4, 3), compressors=numcodecs.Blosc(shuffle=2)),
    plain_zarr("v2-zlib", 2, chunks=(4, 3), compressors=numcodecs.Zlib()),
    plain_zarr("v2-lz4", 2, chunks=(4, 3), compressors=numcodecs.LZ4()),
    plain_zarr("v2-fortran", 2, chunks=(4, 3), order="F"),
    plain_zarr("v2-slashes", 2, chunks=(4, 3), chunk_key_encoding={"name": "v2", "separator": "/"}),
]
TABLES = [
    table("table.h5ad", "AnnData h5ad", stores.h5ad),
    table("table2.zarr", "AnnData zarr", stores.anndata_zarr, 2),
    table("table3.zarr", "AnnData zarr", stores.anndata_zarr, 3),
    spatial("lazyslide", {"uni": F32}, None),
    spatial("lazyslide2", {"uni": F32}, None, 2),
    spatial("lazyslide-two-models", {"uni": F32, "conch": F32 * 0}, "uni"),
    spatial("lazyslide-by-table", {"uni": F32, "conch": F32 * 0}, "uni_tiles"),
]
PARQUETS = [
    parquet("columns", "0 .. 7", stores.columns_parquet, x=COORDS[:, 0], y=COORDS[:, 1]),
    parquet("prefixed", "feat_0 .. feat_7", stores.columns_parquet, "feat_", slide_id=["S"] * N, tile=["t"] * N),
    parquet("lists", "features", stores.lists_parquet, "features", x=COORDS[:, 0], y=COORDS[:, 1]),
    parquet("fixed-lists", "embedding", stores.lists_parquet, "embedding", True, coords=list(map(list, COORDS))),
]
VIEW = torch.cat([torch.zeros(3, D), tensor("float32"), torch.ones(2, D)])[3 : 3 + N]
BATCH, ONE = COORDS[None], COORDS[:1][None]
CONTIGUOUS = [
    trident("trident"),
    hdf5("clam", "CLAM", "features", F32, COORDS.astype(np.int32)),
    hdf5("clam-no-coords", "CLAM", "features", F32, None, unit=None),
    hdf5("uni2", "UNI2", "features", F32[None], BATCH),
    hdf5("uni2-flat-coords", "UNI2", "features", F32[None], COORDS),
    hdf5("uni2-one-patch", "UNI2", "features", F32[None, :1], ONE, num_patches=1),
    hdf5("stamp", "STAMP", "feats", raw("float16"), MICRONS, "um", {"/": STAMP}, STAMP_READ, "float16"),
    hdf5("stamp-as-bytes", "STAMP", "feats", F32, COORDS, "um", {"/": {"unit": b"um"}}, {"unit": "um"}),
    hdf5("marugoto", "Marugoto", "feats", F32, COORDS),
    hdf5("marugoto-fractions", "Marugoto", "feats", F32, MICRONS, None),
    atlas("atlas-one-encoder", {"uni": F32}, None, "features/uni"),
    atlas("atlas-several-encoders", {"conch": F32 * 0, "uni": F32}, "uni", "features/uni"),
]
BY_LIBRARY = [
    trident("trident-row-chunks", chunks=(1, D)),
    trident("trident-gzip", chunks=(4, D), compression="gzip"),
    trident("trident-big-endian", F32.astype(">f4")),
    hdf5("uni2-gzip", "UNI2", "features", F32[None], BATCH, chunks=(1, 4, D), compression="gzip"),
]
CASES = [
    *map(ours, ["float16", "bfloat16", "float32", "float64"]),
    *CONTIGUOUS,
    *BY_LIBRARY,
    npy("v1", "float32", (1, 0)),
    npy("v2", "float32", (2, 0)),
    npy("half", "float16", (1, 0)),
    npy("double", "float64", (1, 0)),
    pt("new", tensor("float32")),
    pt("bf16", tensor("bfloat16"), "bfloat16"),
    pt("view-with-offset", VIEW),
    pt("data", torch.nn.Parameter(tensor("float16")), "float16"),
    pt("legacy", tensor("float32"), legacy=True),
    pt("legacy-bf16", tensor("bfloat16"), "bfloat16", legacy=True),
    pt("legacy-view", VIEW, legacy=True),
    pt("legacy-with-gradient", tensor("float32").requires_grad_(), legacy=True),
    pt("batch", tensor("float32")[None]),
    pt("legacy-batch", tensor("float32")[None], legacy=True),
    pt_dict("dict", coords=PLACES),
    pt_dict("dict-batch-of-places", coords=PLACES[None].int(), mpp=0.5, encoder="uni"),
    pt_dict("dict-float-places", key="feats", coordinates=PLACES.float(), other=torch.zeros(3, 3)),
    pt_dict("dict-axes", key="embeddings", x=PLACES[:, 0].clone(), y=PLACES[:, 1].clone()),
    pt_dict("dict-no-places", key="tile_features"),
    pt_dict("dict-legacy", legacy=True, coords=PLACES, mpp=0.5),
    npz("plain", features=F32, coords=COORDS),
    npz("compressed", compressed=True, features=F32, coords=COORDS.astype(np.int32)),
    npz("axes", features=F32, x=COORDS[:, 0], y=COORDS[:, 1]),
    npz("batch", "feats", feats=F32[None], coordinates=COORDS[None], names=np.array(["a", "b"])),
    npz("one-array", "arr_0", arr_0=F32),
    npz("numbers", read={"mpp": "0.5", "slide": "S1"}, features=F32, coords=COORDS, mpp=0.5, slide="S1"),
    npz("objects-beside", features=F32, coords=COORDS, extra=np.array([{}])),
    Case("batch.npy", lambda path: np.save(path, F32[None]), "npy"),
    Case(
        "feats.safetensors",
        lambda path: safetensors.torch.save_file({"feats": tensor("float32")[None]}, path),
        "safetensors",
        "feats",
    ),
    *ZARRS,
    *TABLES,
    *PARQUETS,
    slidechat("slidechat"),
    slidechat("slidechat-blank-last-line", end="\n\n"),
    slidechat("slidechat-blank-last-lines-crlf", newline="\r\n", end="\r\n\r\n \r\n"),
    slidechat("slidechat-quoted", quote='"'),
    slidechat("slidechat-quoted-bom", quote='"', before="\ufeff"),
    slidechat("slidechat-bom", before="\ufeff"),
    slidechat("slidechat-no-last-newline", end=""),
    slidechat("slidechat-crlf", newline="\r\n", end="\r\n"),
]
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def opened(case: Case, folder: Path) -> FeatureFile:
    path = folder / case.name
    case.write(path)
    return open_features(path, case.encoder)


@every_case
def test_the_header_tells_format_key_shape_and_dtype(case: Case, tmp_path: Path):
    with opened(case, tmp_path) as slide:
        found = slide.format, slide.key, slide.num_patches, slide.feature_dim, slide.dtype
        assert found == (case.format, case.key, case.num_patches, D, case.dtype)
        assert slide.name == str(tmp_path / case.name)


@every_case
def test_coordinates_and_their_unit_are_the_producers(case: Case, tmp_path: Path):
    with opened(case, tmp_path) as slide:
        coords = slide.read_coords()
        if case.coords is None:
            assert (coords, slide.coord_unit) == (None, None)
        else:
            assert coords.shape == (case.num_patches, 2)
            assert np.array_equal(coords, case.coords)
            assert slide.coord_unit == case.unit


@every_case
def test_metadata_carry_our_names_and_nothing_is_added(case: Case, tmp_path: Path):
    with opened(case, tmp_path) as slide:
        assert slide.metadata == case.metadata


@every_case
def test_rows_by_range_equal_what_was_written(case: Case, tmp_path: Path):
    n = case.num_patches
    with opened(case, tmp_path) as slide:
        for start, stop in {(0, 0), (0, 1), (n // 3, n // 2), (n // 2, n), (n - 1, n), (0, n), (n, n)}:
            rows = slide.read_rows(start, stop)
            assert rows.dtype == slide.storage_dtype
            assert rows.shape == (stop - start, D)
            assert np.array_equal(rows, case.rows[start:stop])


@every_case
def test_rows_go_into_a_given_buffer_and_no_further(case: Case, tmp_path: Path):
    with opened(case, tmp_path) as slide:
        start = case.num_patches // 2
        count = case.num_patches - start
        buffer = np.full((count + 2, D), 9, slide.storage_dtype)
        rows = slide.read_rows(start, case.num_patches, buffer)
        assert np.shares_memory(rows, buffer)
        assert np.array_equal(buffer[:count], case.rows[start:])
        assert (buffer[count:] == 9).all()


@every_case
def test_ranges_beyond_the_file_raise(case: Case, tmp_path: Path):
    n = case.num_patches
    with opened(case, tmp_path) as slide:
        for start, stop in [(-1, 1), (0, n + 1), (n, n + 1), (n, n - 1)]:
            with pytest.raises(IndexError, match=f"rows {start}:{stop} asked of {n}"):
                slide.read_rows(start, stop)


@pytest.mark.parametrize("case", CONTIGUOUS + BY_LIBRARY, ids=lambda case: case.name)
def test_only_chunked_or_foreign_numbers_go_through_the_hdf5_library(case: Case, tmp_path: Path):
    with opened(case, tmp_path) as slide:
        assert isinstance(slide.rows, RawRows) == (case in CONTIGUOUS)


def test_bfloat16_within_hdf5_is_widened(tmp_path: Path):
    narrow_floats(tmp_path / "bf16.h5")
    with open_features(tmp_path / "bf16.h5") as slide:
        assert slide.dtype == "float32"
        assert np.array_equal(slide.read_rows(0, N), tensor("bfloat16").float().numpy())


@pytest.mark.parametrize("suffix", ["pt", "dict.pt", "safetensors"])
@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2"])
def test_8_bit_floats_are_widened_to_float16_as_torch_does(dtype: str, suffix: str, tmp_path: Path):
    codes = torch.arange(256, dtype=torch.uint8).reshape(32, 8).view(getattr(torch, dtype))
    path = tmp_path / f"a.{suffix}"
    if suffix == "safetensors":
        safetensors.torch.save_file({"features": codes}, path)
    else:
        saved = {"features": codes, "coords": torch.zeros(32, 2)} if suffix == "dict.pt" else codes
        torch.save(saved, path)
    with open_features(path) as slide:
        assert (slide.num_patches, slide.feature_dim, slide.dtype) == (32, 8, "float16")
        assert slide.remarks[-1] == f"{slide.key or 'features'}: stored as {dtype}, read as float16"
        assert np.array_equal(slide.read_rows(3, 32), codes[3:].to(torch.float16).numpy(), equal_nan=True)
        assert np.array_equal(slide.read_rows(0, 1), codes[:1].to(torch.float16).numpy(), equal_nan=True)


def test_8_bit_rows_are_widened_in_steps(tmp_path: Path, monkeypatch):
    monkeypatch.setattr("vllm_wsi.slides.formats.rows.FLOAT8_STEP", 20)
    codes = torch.arange(256, dtype=torch.uint8).reshape(32, 8).view(torch.float8_e5m2)
    torch.save(codes, tmp_path / "a.pt")
    with open_features(tmp_path / "a.pt") as slide:
        assert np.array_equal(slide.read_rows(0, 31), codes[:31].to(torch.float16).numpy(), equal_nan=True)


def test_tensors_of_one_record_each_are_told_apart_wherever_they_lie(tmp_path: Path):
    both = {"coords": PLACES, "first": torch.zeros(5), "features": VIEW, "last": torch.ones(D, N)}
    torch.save(both, tmp_path / "a.pt")
    with open_features(tmp_path / "a.pt") as slide:
        assert isinstance(slide.rows, RawRows)
        assert np.array_equal(slide.read_rows(0, N), F32)
        assert np.array_equal(slide.read_coords(), COORDS)


def test_slideflow_tile_centres_are_not_taken_for_corners(tmp_path: Path):
    torch.save(tensor("float32"), tmp_path / "a.pt")
    np.savez(tmp_path / "a.index.npz", COORDS)
    with open_features(tmp_path / "a.pt") as slide:
        assert slide.read_coords() is None
        assert "a.index.npz beside it holds the centres of slideflow's tiles" in slide.remarks[0]
    with pytest.raises(SlideError, match="found slideflow's index of tile centres, wanted the features beside it"):
        open_features(tmp_path / "a.index.npz")


FIELD_NAMES = [
    {"coordinates": COORDS},
    {"coord": COORDS[None]},
    {"xy": COORDS.astype(np.uint16)},
    {"x": COORDS[:, 0], "y": COORDS[:, 1:]},
    {"coord_x": COORDS[None, :, 0], "coord_y": COORDS[:, 1].astype(float)},
]


@pytest.mark.parametrize("arrays", FIELD_NAMES, ids=lambda arrays: ",".join(arrays))
def test_safetensors_and_npz_place_the_same_arrays_the_same_way(arrays, tmp_path: Path):
    arrays = {key: np.ascontiguousarray(values) for key, values in arrays.items()}
    np.savez(tmp_path / "a.npz", features=F32, **arrays)
    safetensors.numpy.save_file({"features": F32, **arrays}, tmp_path / "a.safetensors")
    for name in ("a.npz", "a.safetensors"):
        with open_features(tmp_path / name) as slide:
            assert np.array_equal(slide.read_coords(), COORDS)
            assert (slide.coord_unit, slide.unit_source) == ("px", "guess")
            assert "taken as level-0 pixels because they are whole numbers: a guess" in slide.remarks[0]


def test_a_safetensors_file_without_places_says_so(tmp_path: Path):
    other = {"features": F32, "x": COORDS[:, 0].copy(), "labels": np.zeros(3, bool)}
    safetensors.numpy.save_file(other, tmp_path / "a.safetensors")
    with open_features(tmp_path / "a.safetensors") as slide:
        assert slide.read_coords() is None
        assert slide.remarks == (NO_COORDS,)


@pytest.mark.parametrize(
    ("key", "coords", "unit", "source"),
    [
        ("features", COORDS, "px", "format"),  # CLAM's rule
        ("features", COORDS.astype(float), "px", "format"),
        ("features", MICRONS, None, None),
        ("feats", COORDS, "px", "guess"),
        ("feats", MICRONS, None, None),
        ("feats", COORDS // 512 * 224, "um", "guess"),  # STAMP's first format
    ],
)
def test_coordinates_without_a_unit_follow_their_formats_rule_or_are_a_guess(key, coords, unit, source, tmp_path: Path):
    h5(tmp_path / "a.h5", {key: F32, "coords": coords})
    with open_features(tmp_path / "a.h5") as slide:
        assert (slide.coord_unit, slide.unit_source) == (unit, source)
        assert bool([remark for remark in slide.remarks if "nothing says their unit" in remark]) == (source != "format")
        wanted = coords * 256 / 224 if unit == "um" else coords
        assert np.array_equal(slide.read_coords(), wanted)


def test_the_real_slide_has_its_rows_where_its_tiles_are(shared_data: Path):
    folder = shared_data / "features" / "mopadi_TCGA-AD-6964"
    tiles = {path.name for path in folder.glob("Tile_*.jpg")}
    with h5py.File(folder / "features.h5", locking=False) as file:
        written = file["feats"][()]
    with open_features(folder / "features.h5") as slide:
        assert (slide.num_patches, slide.feature_dim, slide.format) == (777, 512, "Marugoto h5")
        places = {row: tuple(slide.read_coords()[row].tolist()) for row in (139, 375, 462)}
        assert places == {139: (16896, 20480), 375: (22016, 11776), 462: (23040, 25088)}
        assert tiles == {f"Tile_({x},{y}).jpg" for x, y in places.values()}
        assert np.array_equal(slide.read_rows(0, 777), written)
        assert slide.coord_unit == "px"


def test_real_values_survive_a_trident_container_made_here(shared_data: Path, tmp_path: Path):
    with open_features(shared_data / "features" / "mopadi_TCGA-AD-6964" / "features.h5") as real:
        values, coords = real.read_rows(0, 777), real.read_coords()
    h5(tmp_path / "t.h5", {"features": values, "coords": coords}, {"coords": TRIDENT}, chunks=(1, 512))
    with open_features(tmp_path / "t.h5") as slide:
        assert np.array_equal(slide.read_rows(400, 777), values[400:])
        assert np.array_equal(slide.read_coords(), coords)
