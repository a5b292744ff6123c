"""Do features and checkpoint come from one patch encoder? Their names are compared as the field writes them.

TRIDENT, STAMP, CLAM, lazyslide, AtlasPatch and the hub each write the same network in their own way. Different networks
are never taken for one: v1, v1.5 and v2, base and large, patch sizes 8 and 16 are told apart.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

from vllm_wsi.errors import EncoderError, SettingsError

from .places import said_patch_um

Mismatch = Literal["refuse", "allow"]
Verdict = Literal["same", "different", "unknown"]

ENCODER_KEYS = ("encoder", "extractor", "patch_encoder", "feature_extractor", "encoder_name", "model_name")
"""Metadata keys that name the encoder of features, the most reliable first."""

# By network: its spellings, as `_key` leaves them (lower case; a separator stays between two digits alone).
NETWORKS = {
    "conch": ("conchv1", "conchvitb16", "mahmoodconch"),
    "conchv15": ("conch15", "conch1-5", "conchv1-5", "mahmoodconch1-5", "titan"),  # TITAN's patch encoder
    "uni": ("univ1", "uni1", "mahmooduni"),
    "uni2h": ("uni2", "univ2", "mahmooduni2"),
    "virchow": ("virchow1", "virchowv1", "virchowfull", "virchowconcat"),  # pooled otherwise, d differs
    "virchow2": ("virchowv2", "virchow2cls", "virchow2full"),
    "gigapath": ("provgigapath",),
    "gigapathflash": ("provgigapathflash",),
    "hoptimus0": (),
    "hoptimus1": (),
    "h0mini": ("hoptimus0mini",),
    "ctranspath": ("ctp",),
    "ctranspathchief": ("chief", "chiefctranspath", "chiefctp"),
    "phikon": ("phikonv1", "phikon1"),
    "phikonv2": ("phikon2",),
    "resnet50": ("resnet50trunc", "resnet50tvin1k", "resnet50imagenet"),
    "resnet50lunitbt": ("lunitbt", "lunitresnet50bt"),
    "resnet50lunitmocov2": ("lunitmocov2", "lunitresnet50mocov2"),
    "resnet50lunitswav": ("lunitswav", "lunitresnet50swav"),
    "plip": ("vinidplip",),
    "hiboub": ("hiboubase",),
    "hiboul": ("hiboularge",),
    "midnight12k": ("midnight", "kaikomidnight"),
    "kaikovits8": ("vitsmallpatch8-224kaikoaitowardslargepathologyfms",),
    "kaikovits16": ("vitsmallpatch16-224kaikoaitowardslargepathologyfms",),
    "kaikovitb8": ("vitbasepatch8-224kaikoaitowardslargepathologyfms",),
    "kaikovitb16": ("vitbasepatch16-224kaikoaitowardslargepathologyfms",),
    "kaikovitl14": ("kaikol", "vitlargepatch14reg4dinov2kaikoaitowardslargepathologyfms"),
    "lunitvits8": (
        "lunitdinos8",
        "vitsmallpatch8-224lunitdino",
    ),
    "lunitvits16": (
        "lunitdinos16",
        "vitsmallpatch16-224lunitdino",
    ),
    "musk": (),
    "gpfm": (),
    "mstar": (),
    "keep": (),
    "openmidnight": (),
}
BY_SPELLING = {spelling: name for name, others in NETWORKS.items() for spelling in (name, *others)}

FAMILIES = ("ctranspath", "hibou", "hoptimus", "kaiko", "lunit", "quilt", "quiltnet")
"""Names that some write for any of several networks: TRIDENT's «ctranspath» has CHIEF's weights."""

OFFICIAL = {"1aurent", "astaxanthin", "bioptimus", "histai", "kaiko-ai", "mahmoodlab", "majiabo", "owkin", "paige-ai",
            "prov-gigapath", "sophontai", "timm", "vinid", "wangyh", "wisdomik", "xiangjx"}  # fmt: skip
"""Owners on the hub whose repositories are the networks themselves."""

NO_NAME = {"", "custom", "default", "encoder", "model", "na", "nan", "none", "null", "pytorchmodel", "unknown"}
MOVING = {"", "main", "master", "head", "latest", "unknown"}  # revisions that say nothing
WEIGHTS = re.compile(r"\.(bin|ckpt|pth?|safetensors)$", re.IGNORECASE)
COMMIT = re.compile(r"[0-9a-f]{7,40}")
CODE_HASH = re.compile(r"-(?=[0-9a-f]*\d)[0-9a-f]{7,40}$")  # what STAMP appends: of its own code
ALLOWED = "which encoder_mismatch: allow takes nevertheless"
SAME_SIZE = 0.1  # edges of patches may differ by so much: scanners' microns per pixel differ by a few percent
NAME_CHARS = 256  # that are read of a name
SHOWN_CHARS = 80


class EncoderMatch(NamedTuple):
    """How a file's encoder compares with a checkpoint's."""

    features: str | None  # as the file names it; None: not recorded
    checkpoint: str | None  # as config.json names it; None: not recorded
    match: Verdict
    remark: str | None = None  # what a user should know of it; None: nothing


@dataclass(frozen=True)
class EncoderCheck:
    """Refuses features of another encoder than a checkpoint's, or of patches of another size on the glass.

    Args:
        encoder: as the checkpoint's config.json names it; None: not recorded, and nothing is refused.
        mismatch: "allow" takes features of a known other encoder or size too; the record says so.
        reason: why it is wanted, for the error.
        patch_um: edge of a patch in microns, as config.json has it; None: not recorded. A file that says none is taken.

    Raises:
        SettingsError: an unknown `mismatch`.
    """

    encoder: str | None = None
    mismatch: Mismatch = "refuse"
    reason: str = "as the checkpoint was trained on"
    patch_um: float | None = None

    def __post_init__(self) -> None:
        if self.mismatch not in get_args(Mismatch):
            raise SettingsError(f"encoder_mismatch: found {self.mismatch!r}, wanted {' or '.join(get_args(Mismatch))}")

    def __call__(self, name: str, metadata: Mapping[str, str]) -> EncoderMatch:
        """Compares a file's metadata with the checkpoint.

        Raises:
            EncoderError: they name different encoders or sizes, and that is not allowed.
            SlideError: the file says two sizes of a patch.
        """
        return self.compare(name, recorded_encoder(metadata), said_patch_um(name, metadata) if self.patch_um else None)

    def compare(self, name: str, encoder: str | None, patch_um: float | None) -> EncoderMatch:
        """Compares what a file said, None where it said nothing; raises EncoderError as `__call__` does."""
        found = compare_encoders(encoder, self.encoder)
        if found.match == "different":
            wrong, other = (
                f"encoder: found features of {_shown(found.features)}, wanted {_shown(found.checkpoint)}",
                "encoder",
            )
        elif patch_um and self.patch_um and abs(patch_um / self.patch_um - 1) > SAME_SIZE:
            wrong, other = (
                f"patches: found an edge of {patch_um:.4g} um, wanted {self.patch_um:g} um",
                "size of patches",
            )
        else:
            return found
        if self.mismatch == "refuse":
            raise EncoderError(f"{name}: {wrong}, {self.reason}; encoder_mismatch: allow takes them nevertheless")
        return found._replace(remark=f"features of another {other}, {ALLOWED}")


def recorded_encoder(metadata: Mapping[str, str]) -> str | None:
    """What a file's metadata say of its encoder; None where they name none."""
    return next((name for key in ENCODER_KEYS if (name := metadata.get(key)) and _is_name(name)), None)


def compare_encoders(features: str | None, checkpoint: str | None) -> EncoderMatch:
    """Compares two names. Where a name says too little, the verdict is "unknown" and the remark says why."""
    features = features if features and _is_name(features) else None
    checkpoint = checkpoint if checkpoint and _is_name(checkpoint) else None
    sides = (features, checkpoint)
    if features is None or checkpoint is None:
        silent = [what for what, name in zip(("features", "checkpoint"), sides, strict=True) if name is None]
        return EncoderMatch(*sides, "unknown", f"the encoder of the {' and of the '.join(silent)} is not recorded")
    one, other = _read(features), _read(checkpoint)
    if one.digest and other.digest:
        is_same = one.digest.startswith(other.digest) or other.digest.startswith(one.digest)
        return EncoderMatch(*sides, "same" if is_same else "different")
    for side in (one, other):
        if side.network is None:
            return EncoderMatch(*sides, "unknown", f"{_shown(side.text)} may be any encoder")
    if one.network != other.network:
        if _vague(one, other) or _vague(other, one):
            return EncoderMatch(*sides, "unknown", f"{_shown(features)} and {_shown(checkpoint)} may be one or two")
        return EncoderMatch(*sides, "different")
    owners = {one.owner, other.owner} - (set() if one.network in NETWORKS else {None})
    if len(owners) > 1:
        return EncoderMatch(*sides, "unknown", "repositories of two owners: one is a copy, or was trained further")
    return EncoderMatch(*sides, *_compare_revisions(one.revision, other.revision))


class _Name(NamedTuple):
    """What a name says."""

    text: str
    network: str | None  # None: a local name that no network has
    owner: str | None  # of a hub repository that is not the network's own
    revision: str | None  # None: not said, or one that moves
    digest: str | None  # of a local encoder's weights, as `encoders.py` records it


def _read(text: str) -> _Name:
    bare, revision = _bare(text)
    digest = revision.removeprefix("sha256-") if revision.startswith("sha256-") else None
    is_path = bare.startswith(("/", ".", "~")) or "\\" in bare or bare.count("/") > 1 or bool(WEIGHTS.search(bare))
    *folders, name = re.split(r"[/\\]", WEIGHTS.sub("", bare).rstrip("/\\"))
    key = _key(name)
    network = BY_SPELLING.get(key)
    if network is None and not (is_path or digest or key in NO_NAME or COMMIT.fullmatch(key)):
        network = key
    owner = folders[-1].lower() if folders and not is_path and folders[-1].lower() not in OFFICIAL else None
    said = revision if digest is None and revision.lower() not in MOVING else None
    return _Name(text, network, owner, said, digest)


def _bare(text: str) -> tuple[str, str]:
    """(name, revision): without a remark in brackets, the hub's address, and what toolkits put around a name."""
    name, _, revision = re.sub(r"\([^()]*\)$", "", text[:NAME_CHARS].strip()).strip().partition("@")
    name = re.sub(r"^(https?://)?(www\.)?(huggingface\.co|hf\.co)/", "", name, flags=re.IGNORECASE)
    name = re.sub(r"^(hf[-_]hub|local-dir|timm):", "", name, flags=re.IGNORECASE)
    name = re.sub(r"^(features|feats)_|[_-](features|feats|tiles)$", "", name, flags=re.IGNORECASE)
    return CODE_HASH.sub("", name), revision.strip()


def _is_name(text: str) -> bool:
    return _key(_bare(text)[0]) not in NO_NAME


def _key(name: str) -> str:
    """Lower case without separators, of which one stays between two digits."""
    name = re.sub(r"(?<=\d)[^a-z0-9]+(?=\d)", "-", name.lower())
    return re.sub(r"(?<!\d)-|-(?!\d)|[^a-z0-9-]", "", name)


def _vague(one: _Name, other: _Name) -> bool:
    return one.network in FAMILIES and str(other.network).startswith(str(one.network))


def _compare_revisions(one: str | None, other: str | None) -> tuple[Verdict, str | None]:
    """A stated version decides. A commit does not, because each edit of a model card changes it."""
    if one is None or other is None or one == other:
        return "same", None
    commits = [bool(COMMIT.fullmatch(revision)) for revision in (one, other)]
    if all(commits) and (one.startswith(other) or other.startswith(one)):
        return "same", None
    if any(commits):
        return "same", f"other revisions of one encoder: {one[:SHOWN_CHARS]} and {other[:SHOWN_CHARS]}"
    return "different", None


def _shown(name: str | None) -> str:
    return repr(name if name is None or len(name) <= SHOWN_CHARS else f"{name[:SHOWN_CHARS]} ..")
