"""The figures of the paper (arXiv 1603.09382, v3) that ours stand beside: test errors in percent, times in hours."""
import re
from typing import NamedTuple


class Pair(NamedTuple):
    """One figure at constant depth, and the same with stochastic depth at p_L = 0.5, linear decay."""
    constant: float
    stochastic: float


# Epochs by recipe.
EPOCHS = dict(cifar10=500, cifar100=500, svhn=50, imagenet=120, cifar10_1202=300)

# By data set.
TABLE1 = {
    'cifar10': Pair(6.41, 5.25), 'cifar100': Pair(27.76, 24.98), 'svhn': Pair(1.80, 1.75),
    'imagenet': Pair(21.78, 21.98), 'cifar10_unaugmented': Pair(13.63, 11.66),
    'cifar100_unaugmented': Pair(44.74, 37.80),
}
TABLE2 = {
    'cifar10': Pair(20 + 42 / 60, 15 + 7 / 60), 'cifar100': Pair(20 + 51 / 60, 15 + 20 / 60),
    'svhn': Pair(33 + 43 / 60, 25 + 33 / 60),
}
DEPTH1202 = Pair(6.67, 4.91)

# Final training loss on CIFAR-10 with augmentation.
FIG3 = Pair(6e-4, 1.1e-2)
# Mean absolute gradient of the first block's first convolution in the three phases of the learning rate.
FIG7 = (Pair(0.88e-5, 0.98e-5), Pair(0.087e-5, 0.64e-5), Pair(0.032e-5, 0.35e-5))

# 110 layers on CIFAR-10, by schedule and p_L.
FIG8_LEFT = {
    'linear': dict(zip((0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0),
                       (6.96, 6.30, 5.97, 5.40, 5.25, 5.42, 5.39, 5.64, 5.89, 6.41), strict=True)),
    'uniform': dict(zip((0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0),
                        (6.93, 6.56, 6.14, 5.92, 5.48, 5.27, 5.94, 6.41), strict=True)),
}
# CIFAR-10, linear decay, by p_L and depth.
DEPTHS = (20, 38, 56, 74, 92, 110)
FIG8_RIGHT = {p_last: dict(zip(DEPTHS, errors, strict=True)) for p_last, errors in {
    1.0: (8.31, 6.67, 6.27, 6.53, 6.25, 6.41),
    0.9: (7.60, 6.16, 5.84, 5.88, 5.72, 5.89),
    0.8: (7.72, 6.29, 5.66, 5.59, 5.56, 5.64),
    0.7: (8.23, 6.42, 5.98, 5.72, 5.43, 5.39),
    0.6: (8.63, 6.66, 6.10, 5.94, 5.69, 5.42),
    0.5: (9.39, 7.12, 6.40, 5.79, 5.61, 5.25),
}.items()}


class Beside(NamedTuple):
    """What the paper has beside the runs of 38 layers on one data set.

    Attributes:
        where: Of which network, and where in the paper.
        errors: Its test errors (%) by p_L.
        p_last: The p_L whose error is compared with that of constant depth: 0.5, or where the paper has 38 layers
            themselves one that is better there than constant depth.
    """
    where: str
    errors: dict[float, float]
    p_last: float


BESIDE_38 = {
    **{data: Beside('110 layers, Table 1', {1.: TABLE1[data].constant, 0.5: TABLE1[data].stochastic}, 0.5)
       for data in ('cifar10_unaugmented', 'cifar100_unaugmented')},
    'cifar10': Beside('38 layers, Fig. 8', {p_last: errors[38] for p_last, errors in FIG8_RIGHT.items()}, 0.8),
}


class Public(NamedTuple):
    """The best public weights that we know of: their test error (%), whose they are, and what they do otherwise."""
    error: float
    source: str
    otherwise: str


# By depth and tag.
PUBLIC = {network: Public(error, 'chenyaofo/pytorch-cifar-models', 'two of their shortcuts are convolutions, and they '
                          'were trained on all 50,000 images') for network, error in {
    (20, 'c10'): 7.40, (32, 'c10'): 6.47, (44, 'c10'): 5.99, (56, 'c10'): 5.63,
    (20, 'c100'): 31.17, (32, 'c100'): 29.84, (44, 'c100'): 28.37, (56, 'c100'): 27.37}.items()}
PUBLIC[110, 'c10'] = Public(6.32, 'akamaster/pytorch_resnet_cifar10', 'they were trained on all 50,000 images')


class NetworkErrors(NamedTuple):
    """Test errors (%) of one network by others.

    Attributes:
        stochastic: The paper's, with stochastic depth.
        p_last: Its p_L.
        constant: The paper's, at constant depth.
        where: In the paper.
        epochs: Of the paper.
    """
    stochastic: float
    p_last: float
    constant: float
    where: str
    epochs: int


def depth_and_tag(model: str) -> tuple[int, str] | None:
    """Of a model of this package for CIFAR and SVHN, else None."""
    name, _, tag = model.partition('.')
    network = re.fullmatch(r'sd_resnet(\d+)_cifar', name)
    return (int(network[1]), tag) if network else None


def errors_of(model: str, augment: bool) -> NetworkErrors | None:
    """What the paper reports of a model of this package, trained with augmentation or without, if anything."""
    network, pairs = depth_and_tag(model), {
        (110, 'c10', True): (TABLE1['cifar10'], 'Table 1', 'cifar10'),
        (110, 'c10', False): (TABLE1['cifar10_unaugmented'], 'Table 1', 'cifar10'),
        (110, 'c100', True): (TABLE1['cifar100'], 'Table 1', 'cifar100'),
        (110, 'c100', False): (TABLE1['cifar100_unaugmented'], 'Table 1', 'cifar100'),
        (152, 'svhn', False): (TABLE1['svhn'], 'Table 1', 'svhn'),
        (1202, 'c10', True): (DEPTH1202, 'section 4', 'cifar10_1202')}
    if network is None:
        return None
    depth, tag = network
    if (depth, tag, augment) in pairs:
        pair, where, recipe = pairs[depth, tag, augment]
        return NetworkErrors(pair.stochastic, 0.5, pair.constant, where, EPOCHS[recipe])
    if depth in DEPTHS and tag == 'c10' and augment:
        by_p_last = {p_last: errors[depth] for p_last, errors in FIG8_RIGHT.items()}
        best = min((p_last for p_last in by_p_last if p_last < 1), key=lambda p_last: by_p_last[p_last])
        return NetworkErrors(by_p_last[best], best, by_p_last[1.], 'Fig. 8', EPOCHS['cifar10'])
    return None
