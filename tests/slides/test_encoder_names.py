"""Whether features and a checkpoint come from one encoder, by the names that the field's tools write."""

from itertools import combinations, product

import numpy as np
import pytest

from vllm_wsi.errors import CheckpointError, EncoderError, SettingsError, SlideError
from vllm_wsi.model.config import SparseWSIConfig
from vllm_wsi.selection.scorer import PatchScorer, frozen_scorer
from vllm_wsi.selection.selector import SlideSelector
from vllm_wsi.slides import features_in_memory
from vllm_wsi.slides.encoder_names import EncoderCheck, compare_encoders, recorded_encoder

# Each row is one network, as TRIDENT, STAMP, CLAM, lazyslide, AtlasPatch and the hub name it.
NETWORKS = [
    ["conch_v1", "conch", "MahmoodLab/CONCH", "conch@main", "hf-hub:MahmoodLab/conch", "mahmood-conch-0a1b2c3d",
     "conch_ViT-B-16", "https://huggingface.co/MahmoodLab/conch", "features_conch_v1", " CONCH "],
    ["conch_v1_5", "conchv15", "conch_v15", "MahmoodLab/conchv1_5", "conch1_5", "mahmood-conch1_5", "conch_v1.5",
     "CONCH v1.5", "titan"],
    ["uni", "uni_v1", "MahmoodLab/UNI", "mahmood-uni", "hf_hub:MahmoodLab/uni", "uni@unknown"],
    ["uni_v2", "uni2", "UNI2-h", "MahmoodLab/UNI2-h", "mahmood-uni2-89abcdef"],
    ["virchow", "virchow_v1", "paige-ai/Virchow", "virchow-full"],
    ["virchow2", "virchow_v2", "paige-ai/Virchow2", "Virchow-2"],
    ["prov-gigapath", "gigapath", "prov_gigapath", "prov-gigapath/prov-gigapath", "hf_hub:prov-gigapath/prov-gigapath"],
    ["gigapath-flash", "prov-gigapath/prov-gigapath-flash"],
    ["hoptimus0", "h-optimus-0", "h_optimus_0", "bioptimus/H-optimus-0"],
    ["hoptimus1", "h-optimus-1", "bioptimus/H-optimus-1"],
    ["h0-mini", "H0_mini", "bioptimus/H0-mini"],
    ["ctranspath"],
    ["phikon", "phikon_v1", "owkin/phikon"],
    ["phikon_v2", "phikonv2", "owkin/phikon-v2"],
    ["resnet50", "resnet50_trunc", "resnet50.tv_in1k", "timm/resnet50.tv_in1k"],
    ["lunit-bt", "1aurent/resnet50.lunit_bt"],
    ["lunit-vits8", "lunit-dino-s8", "1aurent/vit_small_patch8_224.lunit_dino"],
    ["lunit-dino-s16", "1aurent/vit_small_patch16_224.lunit_dino"],
    ["plip", "vinid/plip"],
    ["quiltnet-b32", "wisdomik/QuiltNet-B-32"],
    ["quiltnet-b16", "wisdomik/QuiltNet-B-16"],
    ["quiltnet-b16-pmb", "wisdomik/QuiltNet-B-16-PMB"],
    ["musk", "xiangjx/musk"],
    ["gpfm", "majiabo/GPFM"],
    ["mstar", "Wangyh/mSTAR"],
    ["hibou_l", "hibou-L", "histai/hibou-L"],
    ["hibou_b", "histai/hibou-b"],
    ["midnight12k", "midnight", "kaiko-ai/midnight"],
    ["openmidnight", "open-midnight", "SophontAI/OpenMidnight"],
    ["kaiko-vits8", "1aurent/vit_small_patch8_224.kaiko_ai_towards_large_pathology_fms"],
    ["kaiko-vits16"],
    ["kaiko-vitb8"],
    ["kaiko-vitb16"],
    ["kaiko-vitl14", "1aurent/vit_large_patch14_reg4_dinov2.kaiko_ai_towards_large_pathology_fms"],
    ["dino-bloom", "dinobloom"],
    ["dinov2_small"],
    ["dinov2_base"],
    ["haystack@0", "haystack@0 (virtual patches, no tissue)"],
    ["haystack@1"],
    ["colour-texture@1"],
    ["my-net-1.1", "MyNet_1-1", "mynet 1_1"],
    ["my-net-11"],
]  # fmt: skip


def test_all_spellings_of_one_network_are_one():
    for spellings in NETWORKS:
        for pair in product(spellings, repeat=2):
            assert compare_encoders(*pair).match == "same", pair


def test_no_spelling_of_one_network_is_taken_for_another():
    for one, other in combinations(NETWORKS, 2):
        for features, checkpoint in product(one, other):
            assert compare_encoders(features, checkpoint).match == "different", (features, checkpoint)
            assert compare_encoders(checkpoint, features).match == "different", (checkpoint, features)


@pytest.mark.parametrize(
    ("features", "checkpoint", "match", "remark"),
    [
        ("uni@0123abc", "uni@0123abc456de", "same", None),
        ("uni@0123abc", "MahmoodLab/UNI@main", "same", None),
        ("uni@0123abc", "uni@fedc321", "same", "other revisions of one encoder: 0123abc and fedc321"),
        ("lab/enc@v1.0", "lab/enc@v2.0", "different", None),
        ("colour-texture@1", "colour-texture@2", "different", None),
        ("any-folder@sha256-0123456789ab", "another@sha256-0123456789ab", "same", None),
        ("enc@sha256-0123456789ab", "enc@sha256-ba9876543210", "different", None),
        ("download@sha256-0123456789ab", "uni", "unknown", "'download@sha256-0123456789ab' may be any encoder"),
        ("conch@sha256-0123456789ab", "uni", "different", None),
        ("/data/ckpts/pytorch_model.bin", "uni", "unknown", "'/data/ckpts/pytorch_model.bin' may be any encoder"),
        ("C:\\ckpts\\uni_v2.pth", "MahmoodLab/UNI2-h", "same", None),
        ("./uni2", "uni", "different", None),
        ("lab/enc", "enc", "same", None),
        ("lab/enc", "other/enc", "unknown", "repositories of two owners: one is a copy, or was trained further"),
        ("someone/uni", "uni", "unknown", "repositories of two owners: one is a copy, or was trained further"),
        ("ctranspath", "chief-ctranspath-0a1b2c3d", "unknown", None),
        ("quilt", "wisdomik/QuiltNet-B-32", "unknown", None),
        ("quilt", "uni", "different", None),
        (None, "uni", "unknown", "the encoder of the features is not recorded"),
        ("uni", None, "unknown", "the encoder of the checkpoint is not recorded"),
        ("unknown", "", "unknown", "the encoder of the features and of the checkpoint is not recorded"),
    ],
)
def test_what_else_a_name_says(features, checkpoint, match, remark):
    found = compare_encoders(features, checkpoint)
    assert found.match == match
    if match != "unknown" or remark is not None:
        assert found.remark == remark
    else:
        assert found.remark


@pytest.mark.parametrize(
    ("metadata", "encoder"),
    [
        ({"encoder": "uni", "extractor": "conch"}, "uni"),
        ({"encoder": "unknown", "extractor": "mahmood-conch"}, "mahmood-conch"),
        ({"patch_encoder": "uni_v2"}, "uni_v2"),
        ({"encoder": "None"}, None),
        ({"mpp": "0.5"}, None),
    ],
)
def test_files_name_their_encoder_by_several_keys(metadata, encoder):
    assert recorded_encoder(metadata) == encoder


def test_a_long_or_odd_name_costs_nothing_and_is_cut_in_the_sentence():
    for name in ("(" * 65000, " " * 65000 + "x", "@" * 65000, "1-" * 32000, "a/" * 32000):
        assert compare_encoders(name, "uni").match in ("different", "unknown")
        assert len(str(compare_encoders(name, "uni").remark)) < 200
    with pytest.raises(SlideError) as raised:
        EncoderCheck("uni")("a.h5", {"encoder": "x" * 65000})
    assert len(str(raised.value)) < 300


def select(check, metadata):
    slide = features_in_memory(np.random.default_rng(0).standard_normal((40, 8)).astype(np.float32), "a.h5")
    slide.metadata = metadata
    return SlideSelector(frozen_scorer(PatchScorer(8, 4)), 5, encoder=check).select(slide)


def test_a_selector_refuses_a_known_other_encoder_in_one_sentence():
    with pytest.raises(SlideError) as raised:
        select(EncoderCheck("MahmoodLab/CONCH@main"), {"encoder": "uni_v1"})
    assert str(raised.value) == (
        "a.h5: encoder: found features of 'uni_v1', wanted 'MahmoodLab/CONCH@main', as the checkpoint was trained on; "
        "encoder_mismatch: allow takes them nevertheless"
    )


@pytest.mark.parametrize(
    ("check", "metadata", "wanted"),
    [
        (EncoderCheck("conch"), {"encoder": "conch_v1"}, ("conch_v1", "conch", "same", None)),
        (EncoderCheck("conch", "allow"), {"encoder": "uni"}, (
            "uni", "conch", "different", "features of another encoder, which encoder_mismatch: allow takes nevertheless"
        )),
        (EncoderCheck("conch"), {}, (None, "conch", "unknown", "the encoder of the features is not recorded")),
        (None, {"encoder": "uni"}, ("uni", None, "unknown", "the encoder of the checkpoint is not recorded")),
    ],
)  # fmt: skip
def test_the_record_of_a_selection_says_how_the_encoders_compare(check, metadata, wanted):
    match = select(check, metadata).record()["encoder_match"]
    assert match == dict(zip(("features", "checkpoint", "match", "remark"), wanted, strict=True))


OF_200_UM = [
    {"patch_size_level0": "400", "mpp": "0.5"},
    {"patch_size": "50", "patch_mpp": "4"},
    {"patch_size_level0": "402", "mpp": "0.4990", "patch_size": "50", "patch_mpp": "4"},
    {"tile_size_um": "200", "unit": "um"},
    {"patch_size_level0": "439", "mpp": "0.5"},  # 219.5 um: within a tenth
    {},  # says nothing
    {"patch_size_level0": "448"},  # pixels of unknown microns
]


@pytest.mark.parametrize("metadata", OF_200_UM)
def test_patches_of_the_same_size_on_the_glass_are_taken_and_so_are_those_of_no_known_size(metadata):
    assert EncoderCheck("conch", patch_um=200)("a.h5", {"encoder": "conch"} | metadata).match == "same"


@pytest.mark.parametrize(
    ("metadata", "found"),
    [
        ({"patch_size_level0": "224", "mpp": "0.5"}, "112"),
        ({"patch_size": "224", "patch_mpp": "0.5"}, "112"),
        ({"tile_size_um": "256", "unit": "um"}, "256"),
        ({"patch_size_level0": "441", "mpp": "0.5"}, "220.5"),
    ],
)
def test_patches_of_another_size_on_the_glass_are_refused_in_one_sentence_unless_allowed(metadata, found):
    metadata = metadata | {"encoder": "conch"}
    with pytest.raises(EncoderError) as raised:
        select(EncoderCheck("conch", patch_um=200), metadata)
    assert str(raised.value) == (
        f"a.h5: patches: found an edge of {found} um, wanted 200 um, as the checkpoint was trained on; "
        "encoder_mismatch: allow takes them nevertheless"
    )
    match = select(EncoderCheck("conch", "allow", patch_um=200), metadata).record()["encoder_match"]
    assert match["remark"] == "features of another size of patches, which encoder_mismatch: allow takes nevertheless"
    assert select(EncoderCheck("conch"), metadata).record()["encoder_match"]["remark"] is None


@pytest.mark.parametrize("patch_um", [0, -1, "200", float("nan"), float("inf")])
def test_a_checkpoint_whose_patches_have_no_size_is_refused(patch_um):
    with pytest.raises(CheckpointError, match=r"patch_um: found .*, wanted microns above 0"):
        SparseWSIConfig(patch_um=patch_um)


def test_a_checkpoint_keeps_the_size_of_its_patches(tmp_path):
    SparseWSIConfig(encoder="conch", patch_um=200.0).save_pretrained(tmp_path)
    check = SparseWSIConfig.from_pretrained(tmp_path).encoder_check("allow")
    assert (check.encoder, check.mismatch, check.patch_um) == ("conch", "allow", 200.0)


def test_an_unknown_rule_is_refused():
    with pytest.raises(SettingsError, match="encoder_mismatch: found 'warn', wanted refuse or allow"):
        EncoderCheck("uni", "warn")
