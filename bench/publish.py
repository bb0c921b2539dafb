"""Makes a finished run's weights public.

    python bench/publish.py RUN_FOLDER --repo ORG/NAME              # puts it on the Hub
    python bench/publish.py RUN_FOLDER --repo ORG/NAME --dry-run    # writes the repository folder, for reading
    python bench/publish.py RUN_FOLDER --bundle                     # into the package, the card under hub_cards/

A repository holds model.safetensors, config.json, README.md (the card), results.json, summary.csv, curves.png and
gates.png; never a pickle. The card is built from results.json; nothing in it is typed by hand.
"""
import json
import re
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import timm
import torch
from huggingface_hub import EvalResult, HfApi, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError
from huggingface_hub.utils import httpx
from timm.models import save_for_hf

import paper
import timm_sd
from config import Parser, UserError, check_model_name, parse, run
from contestants import Entry
from figures import save_gates
from run_folder import RunFolder, without_paths, write_atomic

CARDS = Path(__file__).parent.parent / 'hub_cards'
RESULTS = Path(__file__).parent / 'results'
PRETRAINED = Path(timm_sd.__file__).parent / 'pretrained'

DATASETS = dict(c10='uoft-cs/cifar10', c100='uoft-cs/cifar100', svhn='ufldl-stanford/svhn')


def architecture(model: str) -> str:
    """timm's own name of a network where it has one, so that plain timm loads it; else the name without its tag."""
    name = model.partition('.')[0]
    plain = name.removeprefix('sd_')
    return plain if timm.is_model(plain) else name


def full_name(results: dict[str, Any]) -> str:
    """The model's name with its tag: the package's if it stands for the data, else one that says what they are."""
    cfg: Any = timm.get_pretrained_cfg(results['model'])
    if DATASETS.get(cfg.tag) == dataset_of(results):
        return f'{cfg.architecture}.{cfg.tag}'
    return f'{cfg.architecture}.sd_{dataset_of(results).rpartition("/")[2].lower()}'


def kwargs_of(results: dict[str, Any]) -> dict[str, Any]:
    """--model-kwargs without the method's: what the plain network is made with."""
    kwargs = results['args']['model_kwargs']
    return {key: value for key, value in kwargs.items() if not key.startswith('drop_path')}


def dataset_of(results: dict[str, Any]) -> str:
    """The data set without its revision."""
    return results['dataset'].partition('@')[0]


def classes_and_size(results: dict[str, Any]) -> tuple[int, int]:
    """Number of classes, and the side of the images in pixels."""
    cfg: Any = timm.get_pretrained_cfg(results['model'])
    return len(results.get('label_names', ())) or cfg.num_classes, results['args']['img_size'] or cfg.input_size[-1]


def measured_saving(name: str, rate: float, schedule: str, scale: str) -> dict[str, Any] | None:
    """What throughput.py measured for this network at this p_L: its row and the hardware, or None if it did not."""
    wanted = name.partition('.')[0], Entry('batch', rate, schedule).name, scale
    for path in sorted(RESULTS.glob('throughput*.json')):
        measured: Any = json.loads(path.read_text())
        measured_scale = measured['args'].get('drop_path_scale', 'train')  # the oldest were made without the flag
        for row in measured['rows']:
            if (row['model'], row['name'], measured_scale) == wanted:
                return dict(row, hardware=measured['hardware'])
    return None


def make_card(folder: Path, repo: str | None = None) -> str:
    """The model card of the results.json in `folder`; its snippets load from `repo`, or from the package."""
    results: Any = json.loads((folder / 'results.json').read_text())
    name, dataset = full_name(results), dataset_of(results)
    hub_dataset = dataset if re.fullmatch(r'[\w-]+/[\w.-]+', dataset) else None
    classes, size = classes_and_size(results)
    features: Any = timm.create_model(architecture(name), features_only=True, **kwargs_of(results)).eval()
    data = ModelCardData(
        library_name='timm', license='apache-2.0', pipeline_tag='image-classification', model_name=name,
        tags=['image-classification', 'timm', 'stochastic-depth'], datasets=hub_dataset and [hub_dataset],
        metrics=['accuracy'], eval_results=[EvalResult(
            task_type='image-classification', dataset_type=dataset, dataset_name=dataset,
            dataset_split=results['args']['test_split'], metric_type='accuracy',
            metric_value=round(100 - results['test_best']['top1_err'], 2), metric_name='Top-1 accuracy (%)')])
    card = ModelCard.from_template(
        data, template_path=str(CARDS / 'template.md'), name=name, source=f'hf-hub:{repo}' if repo else name, r=results,
        dataset=dataset, hub_dataset=hub_dataset, classes=classes, size=size,
        paper=paper.error_of(name), paper_epochs=paper.EPOCHS.get(results['recipe']),
        saving=measured_saving(name, results['drop_path_rate'], results['args']['drop_path_schedule'] or 'linear',
                               results['args']['drop_path_scale'] or 'train'),
        maps=', '.join(str(tuple(x.shape)) for x in features(torch.zeros(1, 3, size, size))),
        width=timm.create_model(architecture(name), **kwargs_of(results)).num_features)
    return str(card)


def read_run(run_folder: Path) -> tuple[str, dict[str, Any]]:
    """The full model name and the results of a finished run that may stand for it."""
    results = RunFolder(run_folder).read_results()
    if results is None:
        raise UserError(f'{run_folder} is no finished run: it has no results.json')
    results['model'] = check_model_name(results['model'])  # of hf-hub:ORG/NAME too
    name = full_name(results)
    if results['blocks'] is None or results['args']['drop_path_mode'] not in (None, 'batch'):
        raise UserError(f'{run_folder} was not trained with whole blocks dropped; a card would say so')
    return name, without_paths(results)


def write_card_folder(run_folder: Path, results: dict[str, Any], folder: Path, repo: str | None = None) -> None:
    """Writes the card and what it is made from: results.json, summary.csv, curves.png and gates.png."""
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / 'results.json', (json.dumps(results, indent=2) + '\n').encode())
    for file in ('summary.csv', 'curves.png'):
        write_atomic(folder / file, (run_folder / file).read_bytes())
    schedule = results['args']['drop_path_schedule'] or 'linear'
    save_gates(timm_sd.drop_path_rates(results['blocks'], results['drop_path_rate'], schedule), folder / 'gates.png')
    write_atomic(folder / 'README.md', make_card(folder, repo).encode())


def write_repository(run_folder: Path, folder: Path, repo: str) -> None:
    """Writes everything that a Hub repository holds."""
    name, results = read_run(run_folder)
    write_card_folder(run_folder, results, folder, repo)
    classes, size = classes_and_size(results)
    model: Any = timm.create_model(architecture(name), num_classes=classes, **kwargs_of(results))
    labels = dict(label_names=results['label_names']) if 'label_names' in results else {}
    given = {key: results['args'][key] for key in ('mean', 'std') if results['args'][key]}
    if results['args']['in_memory']:  # whole images
        given.update(crop_pct=1.0, interpolation='bilinear')
    save_for_hf(model, str(folder), safe_serialization=True, model_config=dict(labels, pretrained_cfg=dict(
        given, tag=name.partition('.')[2], license='apache-2.0', input_size=(3, size, size),
        paper_name='Deep Networks with Stochastic Depth', paper_ids='arXiv:1603.09382', origin_url=None,
        test_input_size=None, test_crop_pct=None)))
    # the run's own file, in place of the random weights that timm wrote beside config.json
    write_atomic(folder / 'model.safetensors', (run_folder / 'model.safetensors').read_bytes())


def bundle(run_folder: Path) -> None:
    """Copies a finished run's weights into the package and its results under hub_cards/."""
    name, results = read_run(run_folder)
    if name.partition('.')[2] not in DATASETS:
        raise UserError(f'the package holds no {name}, only the tags {", ".join(DATASETS)}; publish it with --repo')
    write_card_folder(run_folder, results, CARDS / name)
    write_atomic(PRETRAINED / f'{name}.safetensors', (run_folder / 'model.safetensors').read_bytes())
    print(f'bundled {name}: test error {results["test_best"]["top1_err"]} %')


def publish(run_folder: Path, args: Any) -> None:
    """Uploads the repository; files that are there already, unchanged, make no commit."""
    api = HfApi()
    with tempfile.TemporaryDirectory() as scratch:
        write_repository(run_folder, Path(scratch), args.repo)
        try:
            with suppress(RepositoryNotFoundError):  # a quick question: the calls that follow would wait for ever
                api.repo_info(args.repo, timeout=3)
            api.create_repo(args.repo, private=args.private, exist_ok=True)
            if args.revision and not args.create_pr:
                api.create_branch(args.repo, branch=args.revision, exist_ok=True)
            commit = api.upload_folder(repo_id=args.repo, folder_path=scratch, revision=args.revision,
                                       create_pr=args.create_pr, commit_message='Weights, card and results')
        except (httpx.HTTPError, HFValidationError, OSError) as error:
            reason = ' '.join(str(error).split())[:300] or type(error).__name__
            raise UserError(f'--repo {args.repo} can not be published: {reason}; log in with hf auth login, or set '
                            'HF_TOKEN') from error
    at = f'@{commit.oid}' if args.create_pr else f'@{args.revision}' if args.revision else ''
    print(f"load it: timm.create_model('hf-hub:{args.repo}{at}', pretrained=True)\nhf_hub_id: {args.repo}@{commit.oid}")


def main() -> None:
    """Parses the command line."""
    parser = Parser('Makes the weights of a finished run public.')
    parser.add_argument('run_folder', type=Path)
    parser.add_argument('--repo', metavar='ORG/NAME', help='the Hub repository')
    parser.add_argument('--dry-run', action='store_true', help='write the repository to RUN_FOLDER/hub/ instead')
    parser.add_argument('--bundle', action='store_true', help='into the package and hub_cards/ instead')
    parser.add_argument('--private', action='store_true', help='create the repository as a private one')
    parser.add_argument('--revision', help='branch to commit to')
    parser.add_argument('--create-pr', action='store_true', help='open a pull request')
    args: Any = parse(parser)
    if args.bundle:
        bundle(args.run_folder)
    elif args.repo is None:
        raise UserError('--repo is not given; give ORG/NAME, or --bundle')
    elif args.dry_run:
        write_repository(args.run_folder, args.run_folder / 'hub', args.repo)
        print(f'wrote {args.run_folder / "hub"}')
    else:
        publish(args.run_folder, args)


if __name__ == '__main__':
    run(main)
