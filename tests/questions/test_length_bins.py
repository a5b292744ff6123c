"""The bins of slide length."""

from vllm_wsi.questions.length_bins import LENGTH_BINS, length_bin


def test_lengths_fall_into_the_bins_of_the_papers_figure_and_an_edge_into_the_bin_above_it():
    assert LENGTH_BINS == (
        "<64", "64-128", "128-256", "256-512", "512-1024", "1024-2048", "2048-4096", ">=4096",
    )  # fmt: skip
    lengths = (1, 63, 64, 127, 128, 4095, 4096, 10**6)
    assert [length_bin(n) for n in lengths] == [
        "<64", "<64", "64-128", "64-128", "128-256", "2048-4096", ">=4096", ">=4096",
    ]  # fmt: skip
