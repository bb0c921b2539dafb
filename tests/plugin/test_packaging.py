"""What pyproject.toml says of the package is so."""
import re
from pathlib import Path

import pytest

import timm_sd

ROOT = Path(__file__).parent.parent.parent


def test_ci_tests_the_oldest_releases_that_are_allowed():
    dependencies = re.search(r'^dependencies = \[(.*?)\]', (ROOT / 'pyproject.toml').read_text(), re.MULTILINE)[1]
    allowed = dict(re.findall(r"'([\w-]+)>=([\d.]+)'", dependencies))
    tested = dict(re.findall(r'^([\w-]+)==([\d.]+)$', (ROOT / 'tests' / 'oldest.txt').read_text(), re.MULTILINE))
    assert {'torch', 'timm', 'safetensors', 'huggingface-hub'} == allowed.keys()
    for name, version in allowed.items():
        assert (tested[name] + '.0.0').startswith(version + '.'), name


def test_the_package_is_typed():
    assert (Path(timm_sd.__file__).parent / 'py.typed').exists()


@pytest.mark.parametrize('link', re.findall(r'\]\((?!https?:|#)([^)]+)\)', (ROOT / 'README.md').read_text()))
def test_links_of_the_readme_lead_somewhere(link):
    assert (ROOT / link).exists()
