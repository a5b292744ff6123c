"""Zarr stores and parquet files that are odd, damaged or hostile; and what makes a store another one."""

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import h5py
import numcodecs
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zarr

from vllm_wsi.errors import SlideError
from vllm_wsi.haystack.recipe import DEMO_CHECKPOINT
from vllm_wsi.model.checkpoint import load_selector
from vllm_wsi.slides import SlideIdentity, open_features
from vllm_wsi.slides.formats.zarr_store import ZarrStore

from . import feature_stores as stores

N, D = 21, 8
FEATURES = np.random.default_rng(3).standard_normal((N, D)).astype(np.float32)
CORNERS = np.stack([np.arange(N) % 5, np.arange(N) // 5], axis=1) * 448
ORDER = np.random.default_rng(4).permutation(N)


def plain(path: Path, **how) -> Path:
    stores.zarr_group(path, {"features": FEATURES, "coords": CORNERS}, **{"chunks": (4, 8), **how})
    return path


def spatial(path: Path, models=("uni",)) -> Path:
    stores.spatial_zarr(path, dict.fromkeys(models, FEATURES), CORNERS, ORDER)
    return path


def read_all(path: Path, encoder: str | None = None) -> None:
    with open_features(path, encoder) as slide:
        slide.read_coords()
        slide.read_rows(0, slide.num_patches)


def refusal(path: Path, encoder: str | None = None) -> str:
    with pytest.raises(SlideError) as caught:
        read_all(path, encoder)
    message = str(caught.value)
    assert message.isprintable()
    assert message.startswith(str(path))
    assert ": found " in message
    return message


def edit(file: Path, change: Callable[[dict], object]) -> None:
    meta = json.loads(file.read_text())
    change(meta)
    file.write_text(json.dumps(meta))


FEATURES_JSON = "features/zarr.json"
Change = Callable[[dict], object]


def chunk_shape(*shape: int) -> Change:
    return lambda meta: meta["chunk_grid"]["configuration"].update(chunk_shape=list(shape))


def says(**values: object) -> Change:
    return lambda meta: meta.update(values)


BROKEN = "features: found broken metadata"
ODD = [
    ("chunks of gibibytes", chunk_shape(1 << 25, 8), "features: found chunks of 1024 MiB, wanted at most 64"),
    ("no chunks", chunk_shape(0, 8), "found chunks that do not cut"),
    ("chunks of one axis", chunk_shape(4), "found chunks that do not cut"),
    ("an irregular grid", lambda meta: meta["chunk_grid"].update(name="rectangular"), "or an irregular grid"),
    ("text", says(data_type="string"), "found the type string or an irregular grid"),
    ("whole numbers", says(data_type="int32"), "features: found dtype int32, wanted one of float16"),
    ("one vector", says(shape=[21]), "found chunks that do not cut"),
    ("no patches", says(shape=[0, 8]), "features: found no patches"),
    ("a negative shape", says(shape=[-21, 8]), BROKEN),
    ("a shape in words", says(shape="21"), BROKEN),
    ("no codecs", lambda meta: meta.pop("codecs"), BROKEN),
    ("codecs that are no list", says(codecs=7), BROKEN),
    ("another codec", lambda meta: meta["codecs"][1].update(name="x" * 99), f"the codec {'x' * 40}..., wanted"),
    ("a filter", lambda meta: meta["codecs"].insert(0, {"name": "transpose"}), "the codecs bytes, transpose, zstd"),
    ("stores elsewhere", says(storage_transformers=[{"name": "http"}]), "found storage transformers"),
    ("names that lead out", says(chunk_key_encoding={"name": "v2", "configuration": {"separator": "/../"}}), BROKEN),
    ("no array", says(node_type="group"), "found the keys coords, wanted features named"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "said"), [odd[1:] for odd in ODD], ids=[odd[0] for odd in ODD])
def test_a_store_whose_metadata_are_odd_is_refused(change, said, tmp_path: Path):
    path = plain(tmp_path / "a.zarr")
    edit(path / FEATURES_JSON, change)
    assert said in refusal(path)


def test_a_shape_far_beyond_its_chunks_is_refused_before_anything_is_looked_for(tmp_path: Path):
    path = plain(tmp_path / "a.zarr")
    shutil.rmtree(path / "coords")
    for rows in (10**15, 10**40):
        edit(path / FEATURES_JSON, says(shape=[rows, 8]))
        assert f"features: found 0 of {rows // 4} chunks, wanted all" in refusal(path)


@pytest.mark.parametrize("text", ["", "{", "[]", "7", '{"a":' + "[" * 100_000, "\xff"])
@pytest.mark.parametrize("file", ["zarr.json", FEATURES_JSON])
def test_broken_json_is_refused(file: str, text: str, tmp_path: Path):
    path = plain(tmp_path / "a.zarr")
    (path / file).write_text(text, encoding="latin-1")
    assert "wanted zarr metadata" in refusal(path)


def test_metadata_without_end_are_not_read(tmp_path: Path, monkeypatch):
    path = plain(tmp_path / "a.zarr")
    monkeypatch.setattr("vllm_wsi.slides.formats.zarr_store.MAX_METADATA_FILE", 100)
    assert "zarr.json: found more than 100 bytes, wanted zarr metadata" in refusal(path)


def test_what_a_root_says_of_its_arrays_is_not_believed(tmp_path: Path):
    path = plain(tmp_path / "a.zarr")
    zarr.consolidate_metadata(path)
    edit(
        path / "zarr.json", lambda meta: meta["consolidated_metadata"]["metadata"]["features"].update(shape=[10**9, 8])
    )
    with open_features(path) as slide:
        assert np.array_equal(slide.read_rows(0, N), FEATURES)


def test_pickled_objects_in_a_store_are_refused(tmp_path: Path):
    path = plain(tmp_path / "a.zarr", zarr_format=2)
    edit(path / "features/.zarray", lambda meta: meta.update(dtype="|O", filters=[{"id": "pickle", "protocol": 5}]))
    assert "features: found filters, wanted plain chunks" in refusal(path)
    edit(path / "features/.zarray", lambda meta: meta.update(filters=None))
    assert "features: found objects or records, wanted plain chunks" in refusal(path)


@pytest.mark.parametrize("target", ["zarr.json", "features/c/1/0", "features/c", "features"])
def test_a_link_in_a_store_is_refused(target: str, tmp_path: Path):
    path = plain(tmp_path / "a.zarr")
    shutil.move(path / target, tmp_path / "elsewhere")
    (path / target).symlink_to(tmp_path / "elsewhere")
    assert f"{target}: found a link or a device, wanted files of this store alone" in refusal(path)


def test_a_pipe_in_a_store_is_refused(tmp_path: Path):
    path = plain(tmp_path / "a.zarr")
    os.mkfifo(path / "features/pipe")
    assert "features/pipe: found a link or a device" in refusal(path)


def test_a_chunk_that_was_never_written_is_no_zeros(tmp_path: Path):
    path = plain(tmp_path / "a.zarr")
    (path / "features/c/2/0").unlink()
    assert "features: found 5 of 6 chunks, wanted all; the store was not written whole" in refusal(path)


SHARDS = {"chunks": (2, 4), "shards": (6, 8)}


@pytest.mark.parametrize("fill", [0.0, float("nan")])
def test_a_chunk_that_was_never_written_into_its_shard_is_no_zeros_either(fill: float, tmp_path: Path):
    path = tmp_path / "a.zarr"
    group = zarr.open_group(path, mode="w")
    array = group.create_array("features", shape=(N, D), dtype="f4", fill_value=fill, **SHARDS)
    array[:12] = FEATURES[:12]
    array[12:14, :4] = FEATURES[12:14, :4]
    wanted = "features: found 13 of 22 chunks, wanted all; the store was not written whole"
    assert wanted in refusal(path)
    array[14:] = FEATURES[14:]
    assert "features: found 21 of 22 chunks" in refusal(path)
    array[12:14] = FEATURES[12:14]
    with open_features(path) as slide:  # the last shard has room for chunks beyond the last row
        assert np.array_equal(slide.read_rows(0, N), FEATURES)


@pytest.mark.parametrize("fill", [0.0, 2.5, float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("how", [{"zarr_format": 2}, {}, {"shards": (4, 4)}])
def test_a_chunk_beside_the_features_that_was_never_written_has_the_fill_value(how, fill: float, tmp_path: Path):
    how = {"zarr_format": 3, **how}
    group = zarr.open_group(tmp_path / "a.zarr", mode="w", zarr_format=how.pop("zarr_format"))
    array = group.create_array("x", shape=(6, 4), chunks=(2, 4), dtype="f4", fill_value=fill, **how)
    array[:2] = FEATURES[:2, :4]
    read = ZarrStore(tmp_path / "a.zarr").array("x").read()
    assert np.array_equal(read, array[...], equal_nan=True)
    assert np.array_equal(read[2:], np.full((4, 4), fill, np.float32), equal_nan=True)


@pytest.mark.parametrize(("fill", "dtype"), [("0x7fc00000", "float32"), ([1], "float32"), ("NaN", "int64")])
def test_a_fill_value_that_is_no_number_of_the_array_is_refused_where_it_is_needed(fill, dtype: str, tmp_path: Path):
    path = tmp_path / "a.zarr"
    array = zarr.open_group(path, mode="w").create_array("x", shape=(6,), chunks=(2,), dtype=dtype)
    array[:2] = 1
    edit(path / "x/zarr.json", says(fill_value=fill))
    said = "nan" if fill == "NaN" else str(fill)
    with pytest.raises(SlideError) as caught:
        ZarrStore(path).array("x").read()
    assert str(caught.value) == f"{path}: x: found no chunk and the fill_value {said} at [1], wanted whole chunks"


@pytest.mark.parametrize("how", [{}, {"compressors": None}, SHARDS])
@pytest.mark.parametrize("length", [0, 1, 30])
def test_a_chunk_that_was_cut_is_refused_when_it_is_read(how, length: int, tmp_path: Path):
    path = plain(tmp_path / "a.zarr", **how)
    chunk = path / "features/c/1/0"
    chunk.write_bytes(chunk.read_bytes()[:length])
    assert "features: found " in (message := refusal(path))
    assert "wanted whole chunks" in message


PACKERS = {
    "zstd": numcodecs.Zstd(9), "gzip": numcodecs.GZip(9), "blosc": numcodecs.Blosc("zstd"), "lz4": numcodecs.LZ4(),
    "nothing": None,
}  # fmt: skip


@pytest.mark.parametrize("size", [127, 129, 1 << 24])
@pytest.mark.parametrize("codec", ["zstd", "gzip", "blosc", "lz4"])
def test_a_chunk_that_unpacks_to_another_size_than_the_array_says_is_refused(codec: str, size: int, tmp_path: Path):
    path = plain(tmp_path / "a.zarr", zarr_format=2, compressors=PACKERS[codec])
    (path / "features/1.0").write_bytes(bytes(PACKERS[codec].encode(bytes(size))))
    assert "wanted whole chunks" in refusal(path)


@pytest.mark.parametrize("codec", PACKERS)
def test_damaged_chunks_give_a_refusal_or_rows_and_no_other_error(codec: str, tmp_path: Path):
    path = plain(tmp_path / "a.zarr", zarr_format=2, compressors=PACKERS[codec])
    chunk = path / "features/1.0"
    whole = chunk.read_bytes()
    refused = 0
    for place in range(len(whole)):
        chunk.write_bytes(whole[:place] + bytes([whole[place] ^ 0x55]) + whole[place + 1 :])
        try:
            read_all(path)
        except SlideError:
            refused += 1
    assert (refused > 3) == (codec != "nothing")


def test_a_shard_whose_index_leads_out_of_it_is_refused(tmp_path: Path):
    path = plain(tmp_path / "a.zarr", chunks=(2, 4), shards=(6, 8))
    shard = path / "features/c/0/0"
    whole = shard.read_bytes()
    for offset, length in [(1 << 40, 10), (0, 1 << 40), (len(whole), 32)]:
        index = np.frombuffer(whole[-100:-4], "<u8").copy()
        index[:2] = offset, length
        shard.write_bytes(whole[:-100] + index.tobytes() + whole[-4:])
        assert "wanted whole chunks" in refusal(path)


def test_a_store_of_too_many_files_is_refused(tmp_path: Path, monkeypatch):
    path = plain(tmp_path / "a.zarr")
    monkeypatch.setattr("vllm_wsi.slides.identity.MAX_STORE_FILES", 5)
    assert "found a store of more than 5 files, wanted fewer, larger chunks" in refusal(path)


def test_coordinates_of_other_patches_are_refused(tmp_path: Path):
    stores.zarr_group(tmp_path / "a.zarr", {"features": FEATURES, "coords": CORNERS[1:]})
    assert "coords: found int64 of shape (20, 2), wanted one x, y for each of 21 patches" in refusal(
        tmp_path / "a.zarr"
    )


def test_a_patch_of_a_store_that_lies_nowhere_is_named(tmp_path: Path):
    places = CORNERS.astype(float)
    places[4, 1] = np.nan
    stores.zarr_group(tmp_path / "a.zarr", {"features": FEATURES, "coords": places})
    assert "coords: found [1792.0, nan] in row 4, wanted finite numbers" in refusal(tmp_path / "a.zarr")


def test_tiatoolbox_boxes_of_an_unknown_resolution_are_not_placed(tmp_path: Path):
    boxes = np.concatenate([CORNERS, CORNERS + 224], axis=1)
    stores.zarr_group(tmp_path / "a.zarr", {"features": FEATURES, "coordinates": boxes})
    with open_features(tmp_path / "a.zarr") as slide:
        assert (slide.format, slide.read_coords()) == ("tiatoolbox zarr", None)
        assert "pixels of the resolution that was read" in slide.remarks[0]


def test_a_store_that_is_one_array_is_read(tmp_path: Path):
    zarr.save_array(tmp_path / "a.zarr", FEATURES[None])
    with open_features(tmp_path / "a.zarr") as slide:
        assert (slide.num_patches, slide.feature_dim, slide.read_coords()) == (N, D, None)
        assert np.array_equal(slide.read_rows(3, N), FEATURES[3:])


def test_a_store_is_another_one_after_any_change_of_its_files(tmp_path: Path):
    path = spatial(tmp_path / "a.zarr")
    known = {SlideIdentity.of_file(path)}
    chunk = next((path / "tables/uni_tiles/X/c").rglob("0"))
    for change in (
        lambda: os.utime(chunk, ns=(1, 1)),
        lambda: (path / "shapes/tiles/shapes.parquet").write_bytes(b"PAR1"),
        lambda: (path / "tables/uni_tiles/X/new").touch(),
        lambda: os.rename(path / "tables/uni_tiles/X/new", path / "tables/uni_tiles/X/other"),
        lambda: (path / "tables/uni_tiles/X/other").unlink(),
    ):
        change()
        identity = SlideIdentity.of_file(path)
        assert identity not in known
        known.add(identity)
    assert SlideIdentity.of_file(path) == identity


def test_the_pictures_in_a_spatialdata_store_cost_nothing(tmp_path: Path):
    path = spatial(tmp_path / "a.zarr")
    known = SlideIdentity.of_file(path)
    (path / "images/wsi_thumbnail").mkdir(parents=True)
    (path / "images/wsi_thumbnail/link").symlink_to("/")
    assert SlideIdentity.of_file(path).content == known.content


def test_the_table_of_a_store_is_chosen_by_encoder(tmp_path: Path):
    path = spatial(tmp_path / "a.zarr", ["conch", "uni"])
    assert "tables: found conch_tiles, uni_tiles, wanted one choice among them (#encoder=NAME)" in refusal(path)
    for encoder in ("virchow", "../uni_tiles", "", "uni_tiles/X"):
        assert "tables: found conch_tiles, uni_tiles, wanted encoder" in refusal(path, encoder)
    with open_features(path, "conch") as slide:
        assert (slide.key, slide.metadata["encoder"]) == ("tables/conch_tiles/X", "conch")


def test_tiles_that_are_not_what_the_features_name_are_refused(tmp_path: Path):
    path = spatial(tmp_path / "a.zarr")
    tiles = path / "shapes/tiles/shapes.parquet"
    ids = np.arange(N) * 3 + 7
    stores.write_tiles(tiles, ids[1:], CORNERS[1:], 448)
    assert "shapes/tiles: found no tile with the tile_id 7, wanted one for each row of features" in refusal(path)
    stores.write_tiles(tiles, np.where(ids == 10, 7, ids), CORNERS, 448)
    assert "shapes/tiles: tile_id: found one of them twice, wanted each once" in refusal(path)
    stores.write_tiles(tiles, ids[:0], CORNERS[:0], 448)
    assert "found no tile with the tile_id 7" in refusal(path)
    pq.write_table(pa.table({"tile_id": ids, "geometry": [b"\1\3\0\0\0" + bytes(88)] * N}), tiles)
    assert "geometry: found other shapes than rectangles, wanted lazyslide's tiles" in refusal(path)
    tiles.write_bytes(tiles.read_bytes()[:-9])
    assert "found an unreadable parquet file" in refusal(path)


def test_more_tiles_than_rows_are_no_fault(tmp_path: Path):
    path = spatial(tmp_path / "a.zarr")
    more = np.concatenate([CORNERS, [[9, 9]]])
    stores.write_tiles(path / "shapes/tiles/shapes.parquet", np.append(np.arange(N) * 3 + 7, 1), more, 448)
    with open_features(path) as slide:
        assert np.array_equal(slide.read_coords(), CORNERS)


def test_tiles_that_nothing_joins_or_that_are_moved_have_no_place(tmp_path: Path):
    path = spatial(tmp_path / "a.zarr")
    edit(path / "shapes/tiles/zarr.json", lambda meta: meta["attributes"].update(
        coordinateTransformations=[{"type": "scale", "scale": [2, 2]}]))  # fmt: skip
    with open_features(path) as slide:
        assert slide.read_coords() is None
        assert "moved by a transformation" in slide.remarks[0]
    path = spatial(tmp_path / "b.zarr")
    shutil.rmtree(path / "tables/uni_tiles/obs/tile_id")
    with open_features(path) as slide:
        assert slide.read_coords() is None
        assert "no tile_id says which tile of tiles a row is" in slide.remarks[0]


def test_a_store_as_lazyslide_writes_it_has_its_tiles_in_place(shared_data: Path, tmp_path: Path):
    lazyslide = pytest.importorskip("lazyslide")
    wsidata = pytest.importorskip("wsidata")
    shutil.copyfile(shared_data / "slides" / "CMU-1-Small-Region.svs", tmp_path / "s.svs")
    slide = wsidata.open_wsi(str(tmp_path / "s.svs"))
    lazyslide.pp.find_tissues(slide)
    lazyslide.pp.tile_tissues(slide, tile_px=224, mpp=0.5)
    tiles = slide.shapes["tiles"]
    features = np.random.default_rng(1).standard_normal((len(tiles), D)).astype(np.float32)
    wsidata.io.add_features(slide, "toy_tiles", "tiles", features)
    slide.shapes["tiles"] = tiles.iloc[::-1]  # the tiles' order is no longer the features'
    slide.write(str(tmp_path / "s.zarr"))
    slide.fetch.features_anndata("toy").write_h5ad(tmp_path / "s.h5ad")
    corners = tiles.bounds[["minx", "miny"]].to_numpy()
    with open_features(tmp_path / "s.zarr") as store:
        assert (store.metadata["encoder"], store.metadata["mpp"]) == ("toy", "0.499")
        assert (store.metadata["patch_size_level0"], store.metadata["width"]) == ("224.0", "2220")
        assert np.array_equal(store.read_rows(0, len(tiles)), features)
        assert np.array_equal(store.read_coords(), corners)
    with open_features(tmp_path / "s.h5ad") as table:
        places = {
            tuple(row): tuple(place)
            for row, place in zip(table.read_rows(0, len(tiles)), table.read_coords(), strict=True)
        }
    assert places == {tuple(row): tuple(place) for row, place in zip(features, corners, strict=True)}


def h5ad(path: Path, **data) -> Path:
    with h5py.File(path, "w") as file:
        file.attrs["encoding-type"] = "anndata"
        for key, values in data.items():
            file[key] = values
    return path


def test_a_table_without_a_dense_matrix_of_its_own_is_refused(tmp_path: Path):
    path = h5ad(tmp_path / "sparse.h5ad", **{"X/data": [1.0], "obs/x": [1]})
    with h5py.File(path, "a") as file:
        file["X"].attrs["encoding-type"] = "csr_matrix"
    assert "X: found a csr_matrix, wanted dense features (N, d); write it once: adata.X = adata.X.toarray()" in refusal(
        path
    )
    assert "X: found no X, wanted dense" in refusal(h5ad(tmp_path / "none.h5ad", **{"obs/x": [1]}))
    h5ad(tmp_path / "secret.h5ad", X=FEATURES)
    linked = h5ad(tmp_path / "linked.h5ad", X=h5py.ExternalLink("secret.h5ad", "X"), obs=np.zeros(1))
    assert "X: found a group, wanted dense features" in refusal(linked)
    places = h5ad(tmp_path / "places.h5ad", X=FEATURES, obsm=h5py.ExternalLink("secret.h5ad", "/"))
    with open_features(places) as slide:
        assert slide.read_coords() is None
    assert "coords: found" in refusal(h5ad(tmp_path / "few.h5ad", **{"X": FEATURES, "obsm/spatial": CORNERS[1:]}))


def test_columns_of_a_table_are_places(tmp_path: Path):
    columns = {"X": FEATURES, "obs/x": CORNERS[:, 0], "obs/y": CORNERS[:, 1]}
    with open_features(h5ad(tmp_path / "a.h5ad", **columns)) as slide:
        assert np.array_equal(slide.read_coords(), CORNERS)


def test_a_parquet_file_cut_anywhere_is_refused(tmp_path: Path):
    path = tmp_path / "a.parquet"
    stores.columns_parquet(path, FEATURES, x=CORNERS[:, 0], y=CORNERS[:, 1])
    whole = path.read_bytes()
    for length in {*range(1, 200, 7), *range(200, len(whole), 97), len(whole) - 1}:
        path.write_bytes(whole[:length])
        refusal(path)


COLUMNS = {f"f{i}": FEATURES[:, i] for i in range(D)}
LISTS = [row.tolist() for row in FEATURES]
TABLES = [
    ("nothing to read", {"a": [1.0], "b": ["x"]}, "found the columns a, b, wanted a column of lists named 'features'"),
    ("a gap", {k: v for k, v in COLUMNS.items() if k != "f3"}, "found the columns f0, f1"),
    (
        "from two on",
        {f"f{i + 2}": FEATURES[:, i] for i in range(D)},
        "found a first column f2, wanted columns 0 .. d-1",
    ),
    ("two sets", COLUMNS | {f"g{i}": FEATURES[:, i] for i in range(D)}, "found several sets of features (f, g0 ..)"),
    ("two lists", {"features": LISTS, "embedding": LISTS}, "found several sets of features (features, embedding)"),
    ("two dtypes", COLUMNS | {"f3": FEATURES[:, 3].astype("f8")}, "found columns of double, float, wanted columns"),
    ("two slides", COLUMNS | {"slide_id": ["a"] * 20 + ["b"]}, "slide_id: found patches of several slides, wanted one"),
    ("a short list", {"features": [*LISTS[:-1], [1.0]]}, "features: found 1 numbers in row 20, wanted 8"),
    ("a missing list", {"features": [LISTS[0], None, *LISTS[2:]]}, "features: found nothing in row 1, wanted 8"),
    ("lists of words", {"features": [["a", "b"]] * N}, "features: found dtype string, wanted one of float16"),
    ("no rows", {k: v[:0] for k, v in COLUMNS.items()}, "f0 .. f7: found no patches"),
    ("places in words", COLUMNS | {"x": ["a"] * N, "y": ["b"] * N}, "x: found string of shape (21,), wanted one x, y"),
    ("places of three", COLUMNS | {"coords": [[1, 2, 3]] * N}, "coords: found 3 numbers in row 0, wanted 2"),
]


@pytest.mark.parametrize(("columns", "said"), [table[1:] for table in TABLES], ids=[table[0] for table in TABLES])
def test_a_parquet_table_that_is_no_slide_is_refused(columns: dict, said: str, tmp_path: Path):
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    assert said in refusal(tmp_path / "a.parquet")


def test_a_parquet_footer_without_end_is_not_read(tmp_path: Path, monkeypatch):
    stores.columns_parquet(tmp_path / "a.parquet", FEATURES)
    monkeypatch.setattr("vllm_wsi.slides.formats.parquet_table.MAX_FOOTER", 64)
    assert "found a footer of" in refusal(tmp_path / "a.parquet")


def test_more_rows_than_a_slide_can_have_are_refused(tmp_path: Path, monkeypatch):
    stores.columns_parquet(tmp_path / "a.parquet", FEATURES)
    monkeypatch.setattr("vllm_wsi.slides.formats.parquet_table.MAX_ROWS", 20)
    assert "found 21 rows, wanted at most 20" in refusal(tmp_path / "a.parquet")


def test_a_number_that_a_table_leaves_out_is_nan(tmp_path: Path):
    table = pa.table({k: pa.array(v, pa.float32()) for k, v in (COLUMNS | {"f3": [None, *FEATURES[1:, 3]]}).items()})
    pq.write_table(table, tmp_path / "a.parquet")
    with open_features(tmp_path / "a.parquet") as slide:
        rows = slide.read_rows(0, N)
    assert np.isnan(rows[0, 3])
    assert np.isfinite(rows).sum() == N * D - 1


def test_what_the_core_install_lacks_is_named_and_the_rest_is_read(tmp_path: Path, monkeypatch):
    stores.columns_parquet(tmp_path / "a.parquet", FEATURES)
    stores.zarr_group(tmp_path / "bare.zarr", {"features": FEATURES}, compressors=None)
    stores.zarr_group(tmp_path / "packed.zarr", {"features": FEATURES})
    for module in ("pyarrow", "numcodecs", "zarr"):
        monkeypatch.setitem(sys.modules, module, None)
    extra = "pip install 'vllm-wsi[slides]' to read zarr stores and parquet files"
    assert f"found a parquet file but no pyarrow; {extra}" in refusal(tmp_path / "a.parquet")
    assert f"features: found zstd chunks but no pyarrow; {extra}" in refusal(tmp_path / "packed.zarr")
    read_all(tmp_path / "bare.zarr")


def test_no_file_stays_open_behind_a_slide_or_a_refusal(tmp_path: Path, open_files_below):
    stores.columns_parquet(tmp_path / "a.parquet", FEATURES)
    stores.h5ad(tmp_path / "a.h5ad", FEATURES, CORNERS)
    stores.lists_parquet(tmp_path / "bad.parquet", FEATURES, "features", coords=[[1, 2, 3]] * N)
    for path in (plain(tmp_path / "a.zarr"), spatial(tmp_path / "b.zarr"), tmp_path / "a.parquet", tmp_path / "a.h5ad"):
        with open_features(path) as slide:
            slide.read_rows(0, N)
            slide.read_coords()
        assert open_files_below() == 0
    refusal(tmp_path / "bad.parquet")
    assert open_files_below() == 0


def test_a_slide_of_many_chunks_is_selected_alike_from_every_format(tmp_path: Path):
    features = np.random.default_rng(8).standard_normal((5000, 64)).astype(np.float32)
    np.save(tmp_path / "a.npy", features)
    np.savez_compressed(tmp_path / "b.npz", features=features)
    stores.zarr_group(tmp_path / "c.zarr", {"features": features}, chunks=(700, 48))
    stores.zarr_group(tmp_path / "d.zarr", {"features": features}, chunks=(50, 16), shards=(500, 64))
    stores.columns_parquet(tmp_path / "e.parquet", features)
    stores.lists_parquet(tmp_path / "f.parquet", features, "features")
    selector = load_selector(DEMO_CHECKPOINT)
    found = []
    for path in sorted(tmp_path.iterdir()):
        with open_features(path) as slide:
            found.append(selector.select(slide, 100))
    for one in found[1:]:
        assert np.array_equal(one.indices, found[0].indices)
        assert np.array_equal(one.scores, found[0].scores)
        assert np.array_equal(one.features, features[one.indices])
