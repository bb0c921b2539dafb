"""bench/families.py: what its table says of a family of timm's."""
import pytest
import timm
from torch import nn

import families
from support.commands import bench, refused, run_here
from support.markdown import tables


@pytest.fixture
def family(monkeypatch):
    """Makes every family's smallest network a given one."""
    def family(name, **kwargs):
        real = timm.create_model
        monkeypatch.setattr(families, 'smallest', lambda module: name)
        monkeypatch.setattr(families.timm, 'create_model', lambda name: real(
            name, pretrained_cfg_overlay=dict(input_size=(3, 64, 64)), **kwargs))
    return family


def row_of(module):
    result = run_here('families.py', '--family', module)
    assert result.returncode == 0, result.stderr
    ((row,),) = tables(result.stdout)
    return row


def test_a_family_that_works(family):
    family('resnet18')
    assert row_of('resnet') == ['resnet', 'resnet18', 'yes', '8 of 8', 'yes', 'same', 'yes']


def test_a_family_whose_blocks_close_in_part(family):
    family('nf_regnet_b0')
    _, _, works, blocks, scale_eval, evaluation, step = row_of('nfnet')
    closed, of, total = blocks.split()
    assert (works, of, scale_eval, evaluation, step) == ('partly', 'of', 'yes', 'same', 'yes')
    assert 0 < int(closed) < int(total)


def test_a_family_that_is_refused_with_scale_eval_says_which_branch(family):
    family('seresnet18')
    assert row_of('resnet')[2:5] == ['yes', '8 of 8', 'no: the branch of layer1.0 ends in nothing that can absorb p_l']


def test_a_family_without_residual_blocks_says_why(family):
    family('vgg11')
    _, name, works, *rest = row_of('vgg')
    assert name == 'vgg11'
    assert works == 'no: VGG has no residual block that could be closed'
    assert rest == ['', '', '', '']


def test_a_network_that_gives_another_output_is_seen(family, monkeypatch):
    family('test_resnet')
    real = families.timm_sd.add_stochastic_depth

    def add(model, rate, **kwargs):
        nn.init.zeros_(model.fc.weight)
        return real(model, rate, **kwargs)
    monkeypatch.setattr(families.timm_sd, 'add_stochastic_depth', add)
    assert row_of('resnet')[5] == 'differs'


def test_a_parameter_that_gets_no_gradient_is_seen(family, monkeypatch):
    family('test_resnet')
    monkeypatch.setattr(families, 'without_gradient', lambda model, closed: {'fc.weight'} if closed else set())
    assert row_of('resnet')[6] == 'no'


def test_missing_gradients_are_listed():
    model = timm.create_model('test_resnet', pretrained_cfg_overlay=dict(input_size=(3, 64, 64)))
    families.timm_sd.add_stochastic_depth(model, 0.5)
    assert families.without_gradient(model, closed=True) == set()
    model.fc.bias.requires_grad_(False)
    assert families.without_gradient(model, closed=True) == {'fc.bias'}


def test_the_smallest_network_is_not_one_of_timms_tests():
    assert 'test_mambaout' in timm.list_models(module='mambaout')
    assert families.smallest('mambaout') == 'mambaout_femto'  # 7.3 M parameters


def test_a_family_that_is_not_there():
    assert 'nearest: resnet' in refused('families.py', '--family', 'resnets')


def test_the_table_has_a_row_for_every_family_but_this_projects():
    (_, *rows), = tables(families.TABLE.read_text())
    names = [row[0] for row in rows]
    assert len(set(names)) == len(names)
    assert {'resnet', 'vision_transformer', 'convnext', 'vgg'} <= set(names)
    assert not {'resnet_sd', 'resnet_cifar_sd'} & set(names)
    assert all(len(row) == 7 for row in rows)
    assert all(row[2].startswith(('yes', 'partly', 'no: ')) for row in rows)


@pytest.mark.slow
def test_the_script_by_itself():
    result = bench('families.py', '--family', 'cspnext', 'repghost')
    assert result.returncode == 0, result.stderr
    committed = {row[0]: row[2:] for row in tables(families.TABLE.read_text())[0]}
    ((cspnext, repghost),) = tables(result.stdout)
    assert cspnext[2:] == committed['cspnext'] == [
        'yes', '3 of 3', 'no: the branch of stages.0.1.blocks.0 ends in nothing that can absorb p_l', 'same', 'yes']
    assert repghost[2:] == committed['repghost']
