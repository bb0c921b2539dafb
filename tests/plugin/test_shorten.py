"""Depth after training: what is left without some blocks, in which order they go, and how it is saved and loaded."""
import json
import subprocess
import sys

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import timm_sd
from support.networks import blocks_of, pictures, toy
from timm_sd.probe import drop_path_slots, residual_blocks
from timm_sd.shorten import _find_blocks, _from_the_ends
from timm_sd.shortened import Shortcut

# A ViT, a ConvNeXt, a Swin, ResNets, and one whose blocks return tuples.
NAMES = ['vit_tiny_patch16_224', 'convnext_atto', 'swin_tiny_patch4_window7_224', 'resnet18', 'resnet50',
         'sd_resnet20_cifar', 'mvitv2_tiny']


class Zero(nn.Module):
    """In a drop path slot: the branch counts for nothing."""

    def forward(self, x):
        return torch.zeros_like(x)


def network(name, **kwargs):
    """In evaluation, with no weight and no statistic as at the start, where branches may be zero."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5, **kwargs).eval()
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.add_(0.02 * torch.rand_like(tensor))
    return model


def image(model, n=1):
    return torch.randn(n, *model.pretrained_cfg['input_size'], generator=torch.Generator().manual_seed(1))


def closable(model):
    return [residual.block for residual in residual_blocks(model).closable]


def without(model, indices):
    """The reference: the branches of these blocks are computed, and multiplied by zero."""
    blocks = closable(model)
    for index in indices:
        for slot in drop_path_slots(blocks[index]):
            setattr(blocks[index], slot, Zero())
    return model


def shorten(model, **kwargs):
    """A `toy`, which timm doesn't know."""
    return timm_sd.shorten(model, example_input=pictures(), **kwargs)


def multiplications(model):
    with FlopCounterMode(display=False) as counter:
        model(image(model))
    return counter.get_total_flops()


# --- what is left


@pytest.mark.parametrize('name', NAMES)
def test_what_is_left_computes_what_the_network_does_without_the_branches(name):
    model, reference = network(name), network(name)
    n = len(closable(model))
    order = [0, n - 1, n // 2]  # one that changes the shape among them
    timm_sd.shorten(model, blocks=n - 3, order=order)
    x = image(model)
    full, left = reference(x), model(x)
    assert torch.allclose(left, without(reference, order)(x), atol=1e-5)
    assert not torch.allclose(left, full, atol=1e-3)
    assert len(timm_sd.removed_blocks(model)) == 3
    assert all(type(getattr(module, slot)) in (nn.Identity, type(None))
               for module in model.modules() for slot in drop_path_slots(module))


def test_the_weights_that_stay_have_their_names_and_values():
    model = network('convnext_atto')
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    timm_sd.shorten(model, blocks=10)
    after = model.state_dict()
    gone = tuple(f'{name}.' for name in timm_sd.removed_blocks(model))
    assert after.keys() == {name for name in before if not name.startswith(gone)} != before.keys()
    assert all(torch.equal(before[name], tensor) for name, tensor in after.items())


def test_a_block_that_was_the_identity_costs_nothing():
    model = shorten(toy(2, drop_path_rate=0.5).eval(), blocks=3)
    last = blocks_of(model)[1]
    assert isinstance(last, Shortcut)
    assert not list(last.children())  # not even its ReLU, whose input came out of one
    x = pictures().relu()
    assert last(x) is x


def test_what_the_block_before_returned_is_left_alone():
    """The activation behind a projection works in place; that of the block stays as it is."""
    model = network('resnet18')
    block, x = model.layer1[0], torch.randn(1, 64, 8, 8)
    before = x.clone()
    assert block.act2.inplace
    shortcut = Shortcut(block, path=['act2'])
    assert torch.equal(shortcut(x), x.relu())
    assert torch.equal(x, before)
    assert block.act2.inplace


def test_a_network_with_gates_becomes_a_plain_one():
    model = shorten(toy(2, drop_path_rate=0.5).train(), blocks=4)
    assert timm_sd.depth_gates(model) is None
    assert torch.equal(model(pictures()), model(pictures()))
    timm_sd.add_stochastic_depth(model, 0.5, example_input=pictures())
    assert len(timm_sd.depth_gates(model).open) == 4


def test_shortened_again_is_shortened_at_once():
    x = pictures()
    once = shorten(toy(3, drop_path_rate=0.).eval(), blocks=4)
    twice = shorten(shorten(toy(3, drop_path_rate=0.).eval(), blocks=7), blocks=4)
    assert timm_sd.removed_blocks(once) == timm_sd.removed_blocks(twice)
    assert torch.equal(once(x), twice(x))


def test_networks_of_other_libraries():
    torch.manual_seed(0)
    x = torch.randn(2, 3, 64, 64)
    model, twin = (torchvision.models.resnet18(num_classes=5).eval() for _ in range(2))
    with pytest.raises(ValueError, match='pass example_input'):
        timm_sd.shorten(model, blocks=6)
    twin.load_state_dict(model.state_dict())
    timm_sd.shorten(model, blocks=6, order=[7, 2], example_input=x)
    removed = timm_sd.removed_blocks(model)
    assert removed == {'layer2.0': dict(path=['downsample', 'relu']), 'layer4.1': {}}
    for name in removed:  # its branch ends in bn2
        nn.init.zeros_(twin.get_submodule(name).bn2.weight)
        nn.init.zeros_(twin.get_submodule(name).bn2.bias)
    assert torch.allclose(model(x), twin(x), atol=1e-6)
    again = timm_sd.remove_blocks(torchvision.models.resnet18(num_classes=5).eval(), removed)
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(x), model(x))


# --- which blocks go


def order_of(name, **kwargs):
    blocks = _find_blocks(timm.create_model(name, **kwargs), None)
    names = [blocks[index].name for index in _from_the_ends([block.size for block in blocks])]
    assert sorted(names) == sorted(block.name for block in blocks)
    return names


def test_stages_lose_blocks_from_their_ends_in_proportion():
    names = order_of('resnet50')  # stages of 3, 4, 6 and 3 blocks
    assert names[:7] == ['layer3.5', 'layer2.3', 'layer4.2', 'layer3.4', 'layer1.2', 'layer3.3', 'layer2.2']
    assert set(names[-4:]) == {f'layer{stage}.0' for stage in (1, 2, 3, 4)}


def test_a_stage_is_what_has_one_size_however_its_blocks_are_nested():
    """DaViT's are stages.2.blocks.1.0, for positions, and stages.2.blocks.1.1, for channels."""
    names = order_of('davit_tiny')
    assert names[:4] == ['stages.2.blocks.2.1', 'stages.2.blocks.2.0', 'stages.3.blocks.0.1', 'stages.2.blocks.1.1']
    assert set(names[-4:]) == {f'stages.{stage}.blocks.0.0' for stage in range(4)}


def test_stages_of_as_many_numbers_are_two_all_the_same():
    """Half the height and width and four times the channels."""
    names = order_of('convnext_atto', dims=(8, 32, 64, 128))
    assert set(names[-4:]) == {f'stages.{stage}.blocks.0' for stage in range(4)}


def test_compiled_blocks_are_no_reason_to_find_none():
    model = timm_sd.add_stochastic_depth(timm.create_model('test_convnext'), 0.5)
    timm_sd.compile_blocks(model, backend='eager')
    with pytest.raises(ValueError, match='shorten it before compile_blocks'):
        timm_sd.shorten(model, blocks=3)


@pytest.mark.parametrize(('name', 'share'), [('convnext_atto', 0.75), ('resnet18', 0.6), ('sd_resnet20_cifar', 0.9)])
def test_no_more_blocks_go_than_the_share_needs(name, share):
    full = multiplications(network(name))
    model = timm_sd.shorten(network(name), share=share)
    gone = len(timm_sd.removed_blocks(model))
    n = len(closable(network(name)))
    assert multiplications(model) <= share * full < multiplications(timm_sd.shorten(network(name), blocks=n - gone + 1))


def test_blocks_are_ranked_by_the_loss_without_each():
    model, labels = toy(2, drop_path_rate=0.5).train(), torch.arange(4)
    with torch.no_grad():
        for block in blocks_of(model):
            block.bn2.weight.uniform_(0.2, 2.)
    losses = []
    for index in range(6):
        twin = toy(2, drop_path_rate=0.).eval()
        twin.load_state_dict(model.state_dict())
        blocks_of(twin)[index].drop_path = Zero()
        losses.append(F.cross_entropy(twin(pictures()), labels).item())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    batches = [(pictures()[:1], labels[:1]), (pictures()[1:], labels[1:])]
    for each in (batches, iter(batches)):
        assert timm_sd.rank_blocks(model, each, example_input=pictures()) == sorted(range(6), key=losses.__getitem__)
    assert model.training
    assert timm_sd.depth_gates(model).step == 0
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_a_measured_order_decides():
    model = timm_sd.shorten(network('convnext_atto'), blocks=10, order=[3, 7])
    assert list(timm_sd.removed_blocks(model)) == ['stages.1.blocks.1', 'stages.2.blocks.3']


def test_batch_norm_is_estimated_anew_only_where_it_is_asked_for():
    batches = [pictures(8), pictures(8) + 1]
    kept, anew = (shorten(toy(2, drop_path_rate=0.).eval(), blocks=4, bn_batches=each)
                  for each in (None, batches))
    fresh = nn.BatchNorm2d(16)
    assert torch.equal(kept.bn1.running_mean, fresh.running_mean)
    means = torch.stack([anew.conv1(x).mean((0, 2, 3)) for x in batches]).mean(0)
    assert torch.allclose(anew.bn1.running_mean, means, atol=1e-6)
    assert not anew.training


@pytest.mark.parametrize(('flags', 'words'), [
    (dict(blocks=7), 'blocks is 7; ResNetCifar has 6 residual blocks'),
    (dict(blocks=-1), 'blocks is -1'),
    (dict(blocks=3.), 'blocks is 3.0'),
    (dict(blocks=True), 'blocks is True'),
    (dict(share=True), 'share is True'),
    (dict(blocks='3'), "blocks is '3'"),
    (dict(share='0.8'), "share is '0.8'"),
    (dict(blocks=3, bn_batches=iter(())), 'bn_batches holds no images'),
    (dict(), 'blocks is None and share None; give one of them'),
    (dict(blocks=3, share=0.5), 'give one of them'),
    (dict(share=0.), r'share is 0.0; it must be a number in \(0, 1\]'),
    (dict(share=1.5), 'share is 1.5'),
    (dict(share=1e-3), 'of the multiplications lie outside'),
    (dict(blocks=3, order=[0, 0, 1]), 'different numbers of the blocks'),
    (dict(blocks=3, order=[0, 1, 6]), 'different numbers of the blocks'),
    (dict(blocks=3, order=[0, 1]), 'order has 2 blocks, and 3 would have to go'),
])
def test_bad_values_are_named_and_no_block_goes(flags, words):
    model = toy(2, drop_path_rate=0.5)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=words) as error:
        shorten(model, **flags)
    assert '\n' not in str(error.value)
    assert not timm_sd.removed_blocks(model)
    assert timm_sd.depth_gates(model).active
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_a_network_without_residual_blocks():
    with pytest.raises(ValueError, match='VGG has no residual block that could be taken out'):
        timm_sd.shorten(timm.create_model('vgg11'), blocks=1)


def test_a_wrapped_network_is_refused():
    """Its config would not say which blocks are gone."""
    with pytest.raises(ValueError, match='DataParallel wraps a network; pass the network itself'):
        shorten(nn.DataParallel(toy(2)), blocks=3)
    with pytest.raises(ValueError, match='OptimizedModule wraps a network'):
        shorten(torch.compile(toy(2)), blocks=3)


def test_images_that_rank_nothing_are_refused():
    model = toy(2, drop_path_rate=0.)
    for batches in ([], iter(())):
        with pytest.raises(ValueError, match='there are no images to rank blocks by'):
            timm_sd.rank_blocks(model, batches, example_input=pictures())
    with pytest.raises(ValueError, match=r'without layer1\.0 the loss is not a number'):
        timm_sd.rank_blocks(model, [(pictures() * float('nan'), torch.arange(4))], example_input=pictures())
    assert not timm_sd.removed_blocks(model)


# --- saved and loaded

LOAD = """
import sys, timm, torch
import timm_sd
folder, out = sys.argv[1:]
model = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
x = torch.randn(1, *model.pretrained_cfg['input_size'], generator=torch.Generator().manual_seed(1))
again = timm.create_model(f'local-dir:{folder}', pretrained=True, num_classes=3)
timm.models.save_for_hf(model, f'{folder}/again', safe_serialization=True)
twice = timm.create_model(f'local-dir:{folder}/again', pretrained=True).eval()
torch.save((model(x), twice(x), again(x).shape, timm_sd.removed_blocks(model)), out)
"""


@pytest.mark.parametrize('name', ['vit_tiny_patch16_224', 'convnext_atto', 'swin_tiny_patch4_window7_224', 'resnet18',
                                  'sd_resnet20_cifar'])
def test_it_is_saved_and_loaded_like_any_other(name, tmp_path):
    """In a new process, saved again, and with another head."""
    model = network(name, drop_path_rate=0.2)
    timm_sd.shorten(model, blocks=len(closable(model)) - 3, order=[0, 2, 4])
    timm.models.save_for_hf(model, tmp_path, safe_serialization=True)
    config = json.loads((tmp_path / 'config.json').read_text())
    assert (config['architecture'], config['model_args']['architecture']) == ('shortened', name)
    assert config['model_args']['removed_blocks'] == timm_sd.removed_blocks(model)
    result = subprocess.run([sys.executable, '-c', LOAD, str(tmp_path), str(tmp_path / 'out')], capture_output=True,
                            text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    y, twice, shape, removed = torch.load(tmp_path / 'out')
    assert torch.equal(y, model(image(model)))
    assert torch.equal(y, twice)
    assert (tuple(shape), removed) == ((1, 3), timm_sd.removed_blocks(model))


@pytest.mark.parametrize('name', ['test_resnet', 'test_vit', 'test_convnext', 'sd_resnet20_cifar'])
def test_loaded_as_feature_maps(name, tmp_path):
    model = network(name)
    timm.models.save_for_hf(timm_sd.shorten(model, blocks=3), tmp_path, safe_serialization=True)
    maps = timm.create_model(f'local-dir:{tmp_path}', pretrained=True, features_only=True).eval()(image(model))
    whole = timm.create_model(name, features_only=True).feature_info.out_indices
    expected = model.forward_intermediates(image(model), indices=list(whole), intermediates_only=True)
    assert len(maps) == len(expected) > 0
    assert all(torch.equal(*pair) for pair in zip(maps, expected, strict=True))


@pytest.mark.parametrize('name', ['resnet18', 'sd_resnet20_cifar'])
def test_torchscript_and_exports_see_what_is_left(name):
    model = network(name)
    timm_sd.shorten(model, blocks=len(closable(model)) - 3, order=[0, 2, 4])
    x = image(model)
    scripted, exported = torch.jit.script(model), torch.export.export(model, (x,)).module()
    assert torch.allclose(scripted(x), model(x), atol=1e-6)
    assert torch.allclose(exported(x), model(x), atol=1e-6)


def test_swins_may_change_their_input_size():
    model = timm_sd.shorten(network('swin_tiny_patch4_window7_224'), blocks=8)
    model.set_input_size((256, 256), window_size=8)
    assert model(torch.randn(1, 3, 256, 256)).shape == (1, 5)


def test_what_is_left_by_hand_is_saved_as_well(tmp_path):
    removed = timm_sd.removed_blocks(timm_sd.shorten(network('resnet18'), blocks=5))
    model = timm_sd.remove_blocks(network('resnet18'), removed)
    timm.models.save_for_hf(model, tmp_path, safe_serialization=True)
    loaded = timm.create_model(f'local-dir:{tmp_path}', pretrained=True, drop_path_rate=0.).eval()
    assert torch.equal(loaded(image(model)), model(image(model)))


def test_weights_of_other_blocks_are_refused(tmp_path):
    for name, blocks in (('a', 7), ('b', 5)):
        timm.models.save_for_hf(timm_sd.shorten(network('resnet18'), blocks=blocks), tmp_path / name,
                                safe_serialization=True)
    (tmp_path / 'a' / 'config.json').write_text((tmp_path / 'b' / 'config.json').read_text())
    with pytest.raises(RuntimeError, match='do not fit'):
        timm.create_model(f'local-dir:{tmp_path / "a"}', pretrained=True)
    (tmp_path / 'b' / 'config.json').write_text((tmp_path / 'b' / 'config.json').read_text().replace(
        'layer4.1', 'layer4.7'))
    with pytest.raises(ValueError, match=r'has no block layer4\.7 that could be taken out'):
        timm.create_model(f'local-dir:{tmp_path / "b"}', pretrained=True)


@pytest.mark.parametrize(('kwargs', 'words'), [
    ({}, "can't be created by itself"), (dict(architecture='shortened'), "'shortened' is no network"),
    (dict(architecture='resnet18', drop_path_rate=0.2), 'call timm_sd.add_stochastic_depth'),
])
def test_the_architecture_by_itself_is_refused(kwargs, words):
    with pytest.raises(ValueError, match=words):
        timm.create_model('shortened', **kwargs)
