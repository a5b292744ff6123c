"""The order of patches: keys sort as scores do, ties to the lower row, non-finite never."""

import struct

import pytest
import torch

from vllm_wsi.kernels.keys import ABSENT, MAX_ROW, pack_keys, unpack_keys

CLASSES = [
    -3.4028235e38, -1.5, -1.1754944e-38, -1e-45, 0.0, 1e-45, 1.1754944e-38, 1.0, 1.0000001, 3.4028235e38,
]  # fmt: skip


def nan(bits: int) -> float:
    return struct.unpack("<f", struct.pack("<I", bits))[0]


def test_keys_order_every_class_of_float_as_the_floats_do():
    scores = torch.tensor(CLASSES)
    keys = torch.stack([pack_keys(s[None], first_row=7)[0] for s in scores])
    assert torch.equal(torch.argsort(keys), torch.arange(len(CLASSES)))


def test_minus_zero_ties_with_zero_and_the_lower_row_wins():
    keys = pack_keys(torch.tensor([-0.0, 0.0, -0.0]))
    assert torch.equal(torch.argsort(keys, descending=True), torch.arange(3))


@pytest.mark.parametrize("bits", [0x7FC00000, 0xFFC00000, 0x7F800001, 0x7FFFFFFF, 0x7F800000, 0xFF800000])
def test_nan_of_any_payload_and_infinities_are_absent(bits):
    assert pack_keys(torch.tensor([nan(bits)])).tolist() == [ABSENT]


def test_round_trip_is_bit_exact_and_keys_are_unique():
    scores = torch.randn(5000, generator=torch.Generator().manual_seed(0)).round(decimals=1)
    keys = pack_keys(scores, first_row=123_456)
    rows, back = unpack_keys(keys)
    assert torch.equal(rows, torch.arange(123_456, 128_456))
    assert torch.equal(back.view(torch.int32), (scores + 0.0).view(torch.int32))
    assert len(set(keys.tolist())) == len(keys)


def test_the_last_row_that_fits_is_packed_and_the_next_is_refused():
    assert unpack_keys(pack_keys(torch.tensor([1.0]), MAX_ROW))[0].tolist() == [MAX_ROW]
    with pytest.raises(ValueError, match="does not fit"):
        pack_keys(torch.tensor([1.0]), MAX_ROW + 1)


def test_no_scores_give_no_keys():
    assert pack_keys(torch.empty(0)).shape == (0,)
