"""The 6N+2 networks: the paper's figures, equality with the naive reference, a golden training run."""
import pytest
import timm
import torch
import torch.nn.functional as F

import reference
import timm_sd

DEPTHS = (20, 32, 38, 44, 56, 74, 92, 110, 152, 1202)


def parts(model):
    """Parameters and state of a model as dictionaries of copies."""
    return ({name: p.detach().clone() for name, p in model.named_parameters()},
            {name: t.detach().clone() for name, t in model.state_dict().items()})


def test_all_depths_and_tags_are_registered():
    assert set(timm.list_models('sd_resnet*_cifar')) == {f'sd_resnet{depth}_cifar' for depth in DEPTHS}
    for tag, classes in (('c10', 10), ('c100', 100), ('svhn', 10)):
        model = timm.create_model(f'sd_resnet20_cifar.{tag}')
        assert model.num_classes == classes
        assert model.pretrained_cfg['input_size'] == (3, 32, 32)


@pytest.mark.parametrize('depth', DEPTHS)
def test_block_counts(depth):
    with torch.device('meta'):
        model = timm.create_model(f'sd_resnet{depth}_cifar')
    assert len(timm_sd.depth_gates(model).open) == (depth - 2) // 2


def test_parameters_and_defaults_of_110_layers():
    model = timm.create_model('sd_resnet110_cifar')
    assert sum(p.numel() for p in model.parameters()) == 1_727_962
    gates = timm_sd.depth_gates(model)
    assert gates.drop_path_rates == timm_sd.drop_path_rates(54, 0.5, 'linear')
    assert gates.expected_depth == pytest.approx(40.25)


def test_another_classifier_is_where_the_network_is():
    model = timm.create_model('sd_resnet20_cifar').double()
    model.reset_classifier(5, 'catavgmax')
    assert model(torch.randn(2, 3, 32, 32).double()).shape == (2, 5)
    assert model.head_hidden_size == 128


@pytest.mark.parametrize('scale', ['train', 'eval'])
def test_equals_the_reference_in_evaluation(scale):
    torch.manual_seed(0)
    model = timm.create_model('sd_resnet32_cifar', drop_path_scale=scale).double().eval()
    x = torch.randn(3, 3, 32, 32).double()
    _, state = parts(model)
    if scale == 'eval':  # the raw weights: a state_dict is folded
        state.update({name: p.detach() for name, p in model.named_parameters()})
    survival = reference.survival_probabilities(15, 0.5) if scale == 'eval' else None
    torch.testing.assert_close(model(x), reference.forward(state, x, 5, survival=survival))


def test_equals_the_reference_over_five_updates():
    torch.manual_seed(0)
    n, lr, momentum, weight_decay = 3, 0.1, 0.9, 1e-2
    model = timm.create_model('sd_resnet20_cifar', drop_path_scale='eval').double().train()
    optimizer = torch.optim.SGD(model.parameters(), lr, momentum, nesterov=True, weight_decay=weight_decay)
    parameters, state = parts(model)
    state.update({name: p.detach().clone() for name, p in model.named_parameters()})
    momenta = {}
    drawn = set()
    for step in range(5):
        x, target = torch.randn(8, 3, 32, 32).double(), torch.randint(10, (8,))
        optimizer.zero_grad()
        logits = model(x)
        F.cross_entropy(logits, target).backward()
        gates = list(timm_sd.depth_gates(model).open)
        drawn.add(tuple(gates))

        leaves = {name: value.requires_grad_() for name, value in parameters.items()}
        reference_logits = reference.forward({**state, **leaves}, x, n, gates=gates)
        torch.testing.assert_close(logits, reference_logits, msg=lambda text, step=step: f'step {step}: {text}')
        gradients = torch.autograd.grad(F.cross_entropy(reference_logits, target), list(leaves.values()),
                                        allow_unused=True)
        gradients = {name: torch.zeros_like(leaves[name]) if grad is None else grad
                     for name, grad in zip(leaves, gradients, strict=True)}
        for name, p in model.named_parameters():
            torch.testing.assert_close(p.grad, gradients[name])

        optimizer.step()
        parameters = {name: value.detach() for name, value in parameters.items()}
        reference.sgd_step(parameters, gradients, momenta, lr, momentum, weight_decay)
        for name, p in model.named_parameters():
            torch.testing.assert_close(p.detach(), parameters[name])
        for name, buffer in model.named_buffers():
            if 'tracked' not in name:
                torch.testing.assert_close(buffer, state[name])
    assert len(drawn) > 1  # the patterns did differ
    assert any(False in gates for gates in drawn)


def test_bfloat16_channels_last_keeps_the_layout():
    model = timm.create_model('sd_resnet20_cifar', drop_path_seed=1).to(memory_format=torch.channels_last).train()
    x = torch.randn(2, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    with torch.autocast('cpu', torch.bfloat16):
        features = model.forward_features(x)
    assert features.is_contiguous(memory_format=torch.channels_last)


def test_odd_image_sizes():
    model = timm.create_model('sd_resnet20_cifar').train()
    assert [model(torch.randn(2, 3, size, size)).shape for size in (27, 30, 33)] == [(2, 10)] * 3


# Ten steps of sd_resnet20_cifar on fixed noise, fp32: a change of any number here is a change of the method.
GOLDEN = [2.5051, 2.3197, 2.3402, 2.3470, 2.2884, 1.9011, 2.3448, 2.3271, 1.9928, 2.0178]


def test_golden_losses():
    torch.manual_seed(0)
    model = timm.create_model('sd_resnet20_cifar').train()
    optimizer = torch.optim.SGD(model.parameters(), 0.05, 0.9, nesterov=True, weight_decay=1e-4)
    x, target = torch.randn(32, 3, 32, 32), torch.arange(32) % 10
    losses = []
    for _ in range(10):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses == pytest.approx(GOLDEN, rel=2e-3), losses
