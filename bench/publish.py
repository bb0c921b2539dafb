"""Makes a finished run's weights public: python bench/publish.py RUN_FOLDER --bundle.

--bundle puts the weights into the package (timm_sd/pretrained/), and the card with the run's results.json and
summary.csv under hub_cards/. The card is built from results.json; nothing in it is typed by hand.
"""
import json
from pathlib import Path
from typing import Any

import timm
from huggingface_hub import EvalResult, ModelCard, ModelCardData

import timm_sd
from config import Parser, UserError, check_model_name, parse, run
from run_folder import RunFolder, write_atomic

CARDS = Path(__file__).parent.parent / 'hub_cards'
PRETRAINED = Path(timm_sd.__file__).parent / 'pretrained'

DATASETS = dict(c10='uoft-cs/cifar10', c100='uoft-cs/cifar100', svhn='ufldl-stanford/svhn')

# test error in percent, Table 1 of the paper: 500 epochs, and selection as here
PAPER = {
    'sd_resnet110_cifar.c10': '5.25 for stochastic depth (p_L = 0.5) and 6.41 for constant depth after 500 epochs',
    'sd_resnet110_cifar.c100': '24.98 for stochastic depth (p_L = 0.5) and 27.76 for constant depth after 500 epochs',
}


def full_name(model: str) -> str:
    """The model's name with its tag."""
    cfg: Any = timm.get_pretrained_cfg(model)
    if cfg is None or cfg.tag is None:
        raise UserError(f'model {model!r} has no tag, and so no place to publish it under')
    return f'{cfg.architecture}.{cfg.tag}'


def make_card(folder: Path) -> str:
    """The model card of the results.json in `folder`."""
    results: Any = json.loads((folder / 'results.json').read_text())
    name, accuracy = full_name(results['model']), round(100 - results['test_best']['top1_err'], 2)
    data = ModelCardData(
        library_name='timm', license='apache-2.0', pipeline_tag='image-classification', model_name=name,
        tags=['image-classification', 'timm', 'stochastic-depth'], datasets=[results['dataset']], metrics=['accuracy'],
        eval_results=[EvalResult(
            task_type='image-classification', dataset_type=results['dataset'], dataset_name=results['dataset'],
            dataset_split='test', metric_type='accuracy', metric_value=accuracy, metric_name='Top-1 accuracy (%)')])
    card = ModelCard.from_template(
        data, template_path=str(CARDS / 'template.md'), name=name, r=results, paper=PAPER.get(name),
        classes=timm.create_model(name).num_classes)
    return str(card)


def bundle(run_folder: Path) -> None:
    """Copies a finished run's weights into the package and its results under hub_cards/."""
    results = RunFolder(run_folder).read_results()
    if results is None:
        raise UserError(f'{run_folder} is no finished run: it has no results.json')
    check_model_name(results['model'])
    name = full_name(results['model'])
    tag = name.partition('.')[2]
    if results['dataset'] != DATASETS[tag] or results['drop_path_rate'] == 0:
        raise UserError(f'{run_folder} was trained on {results["dataset"]} at drop_path_rate '
                        f'{results["drop_path_rate"]}; {name} stands for {DATASETS[tag]} with stochastic depth')
    card_folder = CARDS / name
    card_folder.mkdir(exist_ok=True)
    results['args']['data_dir'] = None  # a path of this machine
    write_atomic(card_folder / 'results.json', (json.dumps(results, indent=2) + '\n').encode())
    write_atomic(card_folder / 'summary.csv', (run_folder / 'summary.csv').read_bytes())
    write_atomic(card_folder / 'README.md', make_card(card_folder).encode())
    write_atomic(PRETRAINED / f'{name}.safetensors', (run_folder / 'model.safetensors').read_bytes())
    print(f'bundled {name}: test error {results["test_best"]["top1_err"]} %')


def main() -> None:
    """Parses the command line."""
    parser = Parser('Makes the weights of a finished run public.')
    parser.add_argument('run_folder', type=Path)
    parser.add_argument('--bundle', action='store_true', required=True, help='into the package and hub_cards/')
    args: Any = parse(parser)
    bundle(args.run_folder)


if __name__ == '__main__':
    run(main)
