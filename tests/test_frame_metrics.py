"""Metrics of frames and latents against scikit-image and plain formulas."""

import math

import numpy as np
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity


@pytest.fixture(scope="module")
def metrics(pack_module):
    return pack_module("frame_metrics")


@pytest.fixture
def frames():
    generator = torch.Generator().manual_seed(0)
    expected = torch.rand(3, 20, 33, 3, generator=generator)
    return (expected + 0.1 * torch.randn(expected.shape, generator=generator)).clamp(0, 1), expected


def test_psnr_is_that_of_scikit_image(metrics, frames):
    a, b = frames
    assert metrics.psnr(a, b) == pytest.approx(peak_signal_noise_ratio(b.numpy(), a.numpy(), data_range=1))
    assert metrics.psnr(b, b) == math.inf


def test_ssim_is_that_of_scikit_image(metrics, frames):
    a, b = frames
    each = [
        structural_similarity(y.double().numpy(), x.double().numpy(), data_range=1, channel_axis=-1)
        for x, y in zip(a, b, strict=True)
    ]
    assert metrics.ssim(a, b) == pytest.approx(np.mean(each), abs=1e-9)
    assert metrics.ssim(b, b) == pytest.approx(1.0)


def test_latents_are_compared_as_vectors(metrics):
    expected = torch.tensor([[3.0, -4.0]])
    assert metrics.relative_l1(torch.tensor([[3.0, -2.0]]), expected) == pytest.approx(2 / 7)
    assert metrics.cosine(2 * expected, expected) == pytest.approx(1.0)
    assert metrics.cosine(torch.tensor([[4.0, 3.0]]), expected) == pytest.approx(0.0)


@pytest.mark.parametrize("name", ["psnr", "ssim", "relative_l1", "cosine"])
def test_different_shapes_are_an_error_in_one_line(metrics, name):
    with pytest.raises(ValueError, match=r"shapes must be equal, got \(1, 8, 8, 3\) and \(1, 8, 9, 3\)"):
        getattr(metrics, name)(torch.zeros(1, 8, 8, 3), torch.zeros(1, 8, 9, 3))


def test_frames_smaller_than_a_window_are_an_error(metrics):
    with pytest.raises(ValueError, match="at least 7 x 7"):
        metrics.ssim(torch.zeros(1, 6, 8, 3), torch.zeros(1, 6, 8, 3))
