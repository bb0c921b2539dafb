"""The 6N+2 networks: the paper's figures, equality with the naive reference, a golden training run."""
import pytest
import timm
import torch
import torch.nn.functional as F

import timm_sd
from support import reference
from support.networks import force, pictures, toy

# blocks of each depth, by hand
BLOCKS = {20: 9, 32: 15, 38: 18, 44: 21, 56: 27, 74: 36, 92: 45, 110: 54, 152: 75, 1202: 600}


def parts(model):
    """Parameters and state of a model as dictionaries of copies."""
    parameters = {name: p.detach().clone() for name, p in model.named_parameters()}
    return parameters, {**{name: t.detach().clone() for name, t in model.named_buffers()}, **parameters}


def test_all_depths_and_tags_are_registered():
    assert set(timm.list_models('sd_resnet*_cifar')) == {f'sd_resnet{depth}_cifar' for depth in BLOCKS}
    for tag, classes in (('c10', 10), ('c100', 100), ('svhn', 10)):
        model = timm.create_model(f'sd_resnet20_cifar.{tag}')
        assert model.num_classes == classes
        assert model.pretrained_cfg['input_size'] == (3, 32, 32)


@pytest.mark.parametrize('depth', [depth if depth < 1202 else pytest.param(depth, marks=pytest.mark.slow)
                                   for depth in BLOCKS])
def test_block_counts(depth):
    with torch.device('meta'):
        model = timm.create_model(f'sd_resnet{depth}_cifar')
    assert len(timm_sd.depth_gates(model).open) == BLOCKS[depth]


def test_parameters_and_defaults_of_110_layers():
    with torch.device('meta'):
        model = timm.create_model('sd_resnet110_cifar')
    assert sum(p.numel() for p in model.parameters()) == 1_727_962
    gates = timm_sd.depth_gates(model)
    assert [gates.drop_path_rates[index] for index in (0, 26, 53)] == pytest.approx([1 / 108, 0.25, 0.5])
    assert gates.expected_depth == pytest.approx(40.25)


def test_another_classifier_is_where_the_network_is():
    model = toy().double()
    model.reset_classifier(5, 'catavgmax')
    assert model(pictures().double()).shape == (4, 5)
    assert model.head_hidden_size == 128


@pytest.mark.parametrize('scale', ['train', 'eval'])
def test_equals_the_reference_in_evaluation(scale):
    model = toy(2, drop_path_scale=scale).double().eval()
    x = pictures().double()
    parameters, state = parts(model)
    torch.testing.assert_close(model(x), reference.forward(state, x, 2))
    if scale == 'eval':  # of the paper's weights, the paper's eq. 5
        survival = reference.survival_probabilities(6, 0.5)
        papers = {**state, **reference.last_norms(parameters, 2, [1 / p for p in survival])}
        torch.testing.assert_close(model(x), reference.forward(papers, x, 2, factors=survival))


@pytest.mark.parametrize('scale', ['train', 'eval'])
def test_equals_the_reference_over_five_updates(scale):
    n, lr, momentum, weight_decay = 2, 0.1, 0.9, 1e-2
    model = toy(n, drop_path_scale=scale).double().train()
    survival = reference.survival_probabilities(6, 0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr, momentum, nesterov=True, weight_decay=weight_decay)
    parameters, state = parts(model)
    if scale == 'eval':  # the reference has the paper's weights, the network p_l times them
        parameters = reference.last_norms(parameters, n, [1 / p for p in survival])
    momenta = {}

    def stored(papers):
        return reference.last_norms(papers, n, survival) if scale == 'eval' else papers

    drawn = set()
    for step in range(5):
        x, target = torch.randn(8, 3, 8, 8).double(), torch.randint(10, (8,))
        optimizer.zero_grad()
        logits = model(x)
        F.cross_entropy(logits, target).backward()
        gates = list(timm_sd.depth_gates(model).open)
        drawn.add(tuple(gates))

        factors = [is_open / p if scale == 'train' else float(is_open)
                   for is_open, p in zip(gates, survival, strict=True)]
        reference_logits, gradients = reference.loss_and_gradients(parameters, state, x, target, n, factors)
        torch.testing.assert_close(logits, reference_logits, msg=lambda text, step=step: f'step {step}: {text}')
        expected = stored(gradients)  # what moves p_l times the weight moves p_l times as much
        for name, p in model.named_parameters():
            torch.testing.assert_close(p.grad, expected[name])

        optimizer.step()
        reference.sgd_step(parameters, gradients, momenta, lr, momentum, weight_decay)
        expected = stored(parameters)
        for name, p in model.named_parameters():
            torch.testing.assert_close(p.detach(), expected[name])
        for name, buffer in model.named_buffers():
            if 'tracked' not in name:
                torch.testing.assert_close(buffer, state[name])
    assert len(drawn) > 1  # the patterns did differ
    assert any(False in gates for gates in drawn)


def test_bfloat16_channels_last_keeps_the_layout():
    model = toy().to(memory_format=torch.channels_last).train()
    x = pictures().contiguous(memory_format=torch.channels_last)
    for gates in ([True] * 3, [True, False, True], [False] * 3):
        force(model, gates)
        with torch.autocast('cpu', torch.bfloat16):
            features = model.forward_features(x)
        assert features.is_contiguous(memory_format=torch.channels_last), gates


def test_odd_image_sizes():
    model = toy().train()
    assert [model(pictures(2, size)).shape for size in (7, 9, 10)] == [(2, 10)] * 3


# Ten steps of sd_resnet20_cifar on fixed noise, fp32: a change of any number here is a change of the method. Those of
# scale 'eval' come from code that multiplied the branch by p_l in evaluation and did nothing to it in training.
GOLDEN = {
    'train': [2.5051, 2.3197, 2.3402, 2.3470, 2.2884, 1.9011, 2.3448, 2.3271, 1.9928, 2.0178],
    'eval': [2.4033, 2.3184, 2.2941, 2.2990, 2.3017, 2.1897, 2.3286, 2.3105, 2.1650, 2.1606],
}


@pytest.mark.parametrize('scale', timm_sd.SCALES)
def test_golden_losses(scale):
    torch.manual_seed(0)
    model = timm.create_model('sd_resnet20_cifar', drop_path_scale=scale).train()
    optimizer = torch.optim.SGD(model.parameters(), 0.05, 0.9, nesterov=True, weight_decay=1e-4)
    x, target = torch.randn(32, 3, 32, 32), torch.arange(32) % 10
    losses = []
    for _ in range(10):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses == pytest.approx(GOLDEN[scale], rel=2e-3), losses
