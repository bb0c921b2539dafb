"""A block that is open by scalars on the device, as a CUDA graph needs them, against one that is open by its gate."""
import pytest
import torch

import timm_sd
from support.networks import blocks_of, force, lively, pictures, toy
from timm_sd.functional import add_scaled

FORMATS = [torch.contiguous_format, torch.channels_last]


def gradients(y, x, block):
    """Of x and the parameters, for a gradient of y that isn't constant."""
    weight = torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view(y.shape)
    return torch.autograd.grad((y * weight).sum(), [x, *block.parameters()])


@pytest.mark.parametrize('scale', timm_sd.SCALES)
@pytest.mark.parametrize(('bf16', 'dtype'), [(False, torch.float32), (True, torch.float32), (True, torch.bfloat16)])
@pytest.mark.parametrize('place', [0, 1])  # the second one downsamples
def test_a_block_by_scalars_is_that_of_its_gate_and_follows_them(scale, bf16, dtype, place):
    """In autocast or not; `dtype` is the input's."""
    model = lively(toy(drop_path_rate=0.25, drop_path_scale=scale)).train()
    gates, block = timm_sd.depth_gates(model), blocks_of(model)[place]
    force(model, [True] * 3)
    factors = torch.zeros(2)
    x = pictures(size=8)[:, :1].expand(-1, 16, -1, -1).relu().to(dtype).requires_grad_()
    for rate in (0.25, 0.6, 0.):
        gates.set_drop_path_rate(rate)
        survival = 1. - gates.drop_path_rates[place]
        factors[0], factors[1] = 1. / survival, survival ** 2
        with torch.autocast('cpu', torch.bfloat16, enabled=bf16):
            theirs = block(x)
            ours = block.run_open(x, *factors)
        assert torch.equal(ours, theirs)
        assert ours.dtype == theirs.dtype
        for one, other in zip(gradients(ours, x, block), gradients(theirs, x, block), strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize('memory_format', FORMATS)
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_a_tensor_scales_as_a_number_does(dtype, memory_format):
    # Whole vector registers: a CPU's torch.add rounds what is left over, in bf16, twice.
    shortcut, residual = (torch.randn(3, 16, 8, 8).to(dtype).to(memory_format=memory_format) for _ in range(2))
    for factor in (1., 1.25, 1 / 0.7, 2.):
        ours, theirs = (add_scaled(shortcut, residual, value) for value in (torch.tensor(factor), factor))
        assert torch.equal(ours, theirs)
        assert ours.stride() == theirs.stride()


def test_the_gradient_of_what_a_tensor_scales():
    shortcut, residual = (torch.randn(2, 3, 2, 2, dtype=torch.float64, requires_grad=True) for _ in range(2))
    factor = torch.tensor(1.75, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda *tensors: add_scaled(*tensors, factor), (shortcut, residual))
