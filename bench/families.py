"""Tries add_stochastic_depth on the smallest network of each of timm's families: python bench/families.py

Writes FAMILIES.md beside itself: which families work, which partly, and which not, with the reason.
"""
import harness.interrupts  # noqa: F401  (before the imports that take seconds)

# isort: split
import re
import sys
import warnings
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import get_model_input_config
from tqdm import tqdm

import timm_sd
from harness.cli import Parser, run_script
from harness.errors import UserError, nearest, one_line
from harness.files import write_atomic
from timm_sd.probe import residual_blocks

TABLE = Path(__file__).parent / 'FAMILIES.md'
HEAD = """# Stochastic depth on timm's families

Written by `python bench/families.py` with timm {version}: `timm_sd.add_stochastic_depth(model, 0.5)` on the smallest
network of each of timm's modules that isn't one for its tests. Blocks that change more than they add to, such as a
stage's first or one with a mixer beside its residual branch, stay open. "Scale eval" says whether the paper's scale
works too, or which branch can't absorb p_l. "Evaluation" says whether the network's output stayed the same bit for bit,
and "step" whether a training step with all blocks closed gave a gradient to every parameter that has one with all open.

| family | network | works | blocks that close | scale eval | evaluation | step |
|---|---|---|---|---|---|---|
"""


def smallest(module: str) -> str:
    """The network of a timm module with the fewest parameters; not those for timm's tests, of one block a stage."""
    sizes = {}
    for name in timm.list_models(module=module, exclude_filters='test_*'):
        try:
            with torch.device('meta'):
                sizes[name] = sum(param.numel() for param in timm.create_model(name).parameters())
        except Exception:  # a few can't be built without data
            sizes[name] = sys.maxsize
    return min(sizes, key=lambda name: sizes[name])


def pictures(model: Any, number: int) -> torch.Tensor:
    """Random pictures of the network's own size, or of 224 px where that is large and it takes others."""
    config = get_model_input_config(model)
    channels, *size = config['input_size']
    if max(size) > 384 and not config['fixed_input_size']:
        size = [224, 224]
    return torch.rand(number, channels, *size)


def without_gradient(model: Any, closed: bool) -> set[str]:
    """The parameters that a training step, with all gates open or all closed, leaves without a gradient."""
    gates: Any = timm_sd.depth_gates(model)
    gates.draw = lambda: setattr(gates, 'open', [not closed] * len(gates.open))
    model.train()
    output = model(pictures(model, 2))
    (output[0] if isinstance(output, tuple) else output).square().mean().backward()
    missing = {name for name, param in model.named_parameters() if param.grad is None}
    model.zero_grad()
    return missing


def try_family(module: str) -> str:
    """One row of the table."""
    name = smallest(module)
    try:
        model: Any = timm.create_model(name).eval()
        x = pictures(model, 1)
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter('ignore')
            before = model(x)
            closable, open_ = residual_blocks(model, example_input=x)
            scale_eval = 'yes'
            try:
                timm_sd.add_stochastic_depth(model, 0.5, scale='eval', example_input=x)
            except ValueError as error:
                branch = re.search('the branch of .* p_l', str(error))
                if branch is None:  # it is refused with any scale
                    raise
                scale_eval = f'no: {branch[0]}'
                timm_sd.add_stochastic_depth(model, 0.5, example_input=x)
            same = torch.equal(model(x), before) if isinstance(before, torch.Tensor) else True
        step = without_gradient(model, closed=True) <= without_gradient(model, closed=False)
    except Exception as error:
        return f'| {module} | {name} | no: {one_line(error, 120)} | | | | |'
    verdict = 'yes' if not open_ else 'partly'
    return (f'| {module} | {name} | {verdict} | {len(closable)} of {len(closable) + len(open_)} | {scale_eval} | '
            f'{"same" if same else "differs"} | {"yes" if step else "no"} |')


def main() -> None:
    """Goes over the families and writes the table."""
    parser = Parser("Tries stochastic depth on each of timm's families.")
    parser.add_argument('--family', nargs='+', help="timm's modules to try, printed instead of written")
    args = parser.parse_args()
    modules = sorted({timm.models._registry._model_to_module[name] for name in timm.list_models()})
    for name in args.family or ():
        if name not in modules:
            raise UserError(f"--family {name} is none of timm's modules; nearest: {nearest(name, modules)}")
    rows = [try_family(module) for module in tqdm(args.family or [m for m in modules if m not in (
        'resnet_sd', 'resnet_cifar_sd')])]
    if args.family:
        print('\n'.join(rows))
    else:
        write_atomic(TABLE, (HEAD.format(version=timm.__version__) + '\n'.join(rows) + '\n').encode())


if __name__ == '__main__':
    run_script(main)
