"""What is said of the package, and what is in its distributions."""
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
RELATIVE_LINK = r'\]\((?!https?:|#)([^)]+)\)'


def test_ci_tests_the_oldest_releases_that_are_allowed():
    dependencies = re.search(r'^dependencies = \[(.*?)\]', (ROOT / 'pyproject.toml').read_text(), re.MULTILINE)[1]
    allowed = dict(re.findall(r"'([\w-]+)>=([\d.]+)'", dependencies))
    tested = dict(re.findall(r'^([\w-]+)==([\d.]+)$', (ROOT / 'tests' / 'oldest.txt').read_text(), re.MULTILINE))
    assert {'torch', 'timm', 'safetensors', 'huggingface-hub'} == allowed.keys()
    for name, version in allowed.items():
        assert (tested[name] + '.0.0').startswith(version + '.'), name


def test_links_of_the_readme_lead_somewhere():
    links = re.findall(RELATIVE_LINK, (ROOT / 'README.md').read_text())
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_the_package_imports_itself_and_its_dependencies_alone():
    """Without the extras: each of their packages would be missing for who installs the plugin."""
    code = 'import sys, timm_sd; print(*sys.modules)'
    loaded = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.split()
    assert not {'accelerate', 'datasets', 'matplotlib', 'sklearn', 'harness'} & set(loaded)


@pytest.mark.slow
def test_distributions_hold_the_package_and_no_tests(tmp_path):
    subprocess.run([sys.executable, '-m', 'build', '-o', str(tmp_path), str(ROOT)], check=True, capture_output=True)
    package = {str(path.relative_to(ROOT)) for path in (ROOT / 'timm_sd').rglob('*') if '__pycache__' not in path.parts
               and path.is_file()}
    assert any(path.endswith('.safetensors') for path in package)
    assert 'timm_sd/py.typed' in package
    with zipfile.ZipFile(next(tmp_path.glob('*.whl'))) as wheel:
        names = wheel.namelist()
        assert {name for name in names if '.dist-info/' not in name} == package
        metadata = wheel.read(next(name for name in names if name.endswith('/METADATA'))).decode()
    assert not re.findall(RELATIVE_LINK, metadata)  # they lead nowhere on the package index
    with tarfile.open(next(tmp_path.glob('*.tar.gz'))) as sdist:
        names = {name.partition('/')[2] for name in sdist.getnames()}
    assert package < names
    assert not any(name.startswith(('tests', 'bench')) for name in names)
