"""An independent, naive implementation of the paper's network: explicit loops over blocks, gates as arguments."""
import torch
import torch.nn.functional as F

EPS, MOMENTUM = 1e-5, 0.1


def batch_norm(x, p, name, training):
    return F.batch_norm(x, p[f'{name}.running_mean'], p[f'{name}.running_var'], p[f'{name}.weight'], p[f'{name}.bias'],
                        training, MOMENTUM, EPS)


def pooled_and_padded(x, channels):
    """Mean over 2x2 windows written out, then zero channels last."""
    mean = (x[:, :, ::2, ::2] + x[:, :, 1::2, ::2] + x[:, :, ::2, 1::2] + x[:, :, 1::2, 1::2]) / 4
    zeros = x.new_zeros(x.shape[0], channels - x.shape[1], *mean.shape[2:])
    return torch.cat([mean, zeros], 1)


def survival_probabilities(n_blocks, p_last):
    """Eq. 4."""
    return [1 - (block / n_blocks) * (1 - p_last) for block in range(1, n_blocks + 1)]


def forward(p, x, n, factors=None, training=False):
    """Logits of the 6n+2 network; the output of a block is ReLU(shortcut + factor f).

    Args:
        p: State dict, by the names of timm's ResNet.
        x: Images.
        n: Blocks a stage.
        factors: One number a block, 1 if None: p_l in evaluation by eq. 5; in training the gate, or gate / p_l. At 0
            there is no f.
        training: Normalise by the batch, and move the running statistics.
    """
    x = F.relu(batch_norm(F.conv2d(x, p['conv1.weight'], padding=1), p, 'bn1', training))
    block = 0
    for stage in range(3):
        for i in range(n):
            name = f'layer{stage + 1}.{i}'
            down = stage > 0 and i == 0
            shortcut = pooled_and_padded(x, 16 * 2 ** stage) if down else x
            factor = 1 if factors is None else factors[block]
            if factor == 0:
                x = F.relu(shortcut)
            else:
                f = F.conv2d(x, p[f'{name}.conv1.weight'], stride=2 if down else 1, padding=1)
                f = F.relu(batch_norm(f, p, f'{name}.bn1', training))
                f = batch_norm(F.conv2d(f, p[f'{name}.conv2.weight'], padding=1), p, f'{name}.bn2', training)
                x = F.relu(shortcut + factor * f)
            block += 1
    return F.linear(x.mean((2, 3)), p['fc.weight'], p['fc.bias'])


def last_norms(parameters, n, factors):
    """A copy of the parameters, with weight and bias of each block's last batch norm multiplied by its factor.

    By p_l they are what the package stores of the paper's weights with scale 'eval', by 1 / p_l the way back.
    """
    result = {name: value.detach().clone() for name, value in parameters.items()}
    for block, factor in enumerate(factors):
        for kind in ('weight', 'bias'):
            result[f'layer{block // n + 1}.{block % n}.bn2.{kind}'] *= factor
    return result


def loss_and_gradients(parameters, state, x, target, n, factors):
    """Logits of a training forward pass, and the gradients of the cross-entropy; zero where nothing ran.

    `state` holds the running statistics, which move.
    """
    leaves = {name: value.detach().clone().requires_grad_() for name, value in parameters.items()}
    logits = forward({**state, **leaves}, x, n, factors=factors, training=True)
    gradients = torch.autograd.grad(F.cross_entropy(logits, target), list(leaves.values()), allow_unused=True)
    return logits.detach(), {name: torch.zeros_like(leaves[name]) if grad is None else grad
                             for name, grad in zip(leaves, gradients, strict=True)}


def sgd_step(parameters, gradients, momenta, lr, momentum, weight_decay):
    """Nesterov SGD with weight decay, the original's: a gradient of zero decays and keeps its momentum."""
    for name, value in parameters.items():
        grad = gradients[name] + weight_decay * value
        momenta[name] = grad.clone() if name not in momenta else momentum * momenta[name] + grad
        value -= lr * (grad + momentum * momenta[name])
