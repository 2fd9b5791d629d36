"""Case 24: installed from a copy of the sources, without a network, and used from another
folder.
"""

import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

FOUND = """
import sys
from pathlib import Path
import t2i, geneval, dpg_bench
where = Path(sys.argv[1]).resolve()
for module in (t2i, geneval, dpg_bench):
    assert where in Path(module.__file__).resolve().parents, module.__file__
assert (Path(t2i.__file__).parent / "assets" / "gallery" / "page.css").is_file()
print("used", t2i.__version__)
"""
USE = """
from t2i.shapes.shapes_questions import shapes_questions
from geneval.prompts import official_prompts
from t2i.shapes.shapes_detector import ShapesDetector
model = t2i.load_model("shapes", device="cpu")
images = t2i.generate(model, ["a photo of a red circle"], progress=False)
assert len(images) == 1 and images[0].size == (64, 64)
geneval.score(images, "a photo of a red circle", ShapesDetector())
assert len(official_prompts()) == 553 and shapes_questions().questions
"""


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """A copy: building leaves folders beside the sources."""
    if any(find_spec(name) is None for name in ("pip", "setuptools")):
        pytest.skip("installing needs pip and setuptools in this environment")
    copy = tmp_path_factory.mktemp("sources")
    for name in ("t2i", "geneval", "dpg_bench"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", *(p.name for p in ROOT.glob("requirements*"))):
        shutil.copy(ROOT / name, copy)
    return copy


def install(*arguments) -> None:
    offline = ("--no-deps", "--no-build-isolation", "--no-index", "--no-compile")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "-q"]
    command = [*pip, *offline, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def use(site: Path, packages: Path, elsewhere: Path, script: str) -> None:
    """Use what is installed in `site` from another folder; the modules must be those of
    `packages`.
    """
    # As for an installed package, .pth files count: an editable install is one.
    start = f"import site; site.addsitedir({str(site)!r})\n"
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", start + script, str(packages)],
        cwd=elsewhere,
        env=environment | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and "used" in done.stdout, done.stdout + done.stderr


def test_installed(sources, tmp_path):
    install("--target", tmp_path / "site", sources)
    use(tmp_path / "site", tmp_path / "site", tmp_path, FOUND + USE)


def test_installed_for_editing(sources, tmp_path):
    install("--prefix", tmp_path / "prefix", "-e", sources)
    site = next((tmp_path / "prefix").rglob("site-packages"))
    use(site, sources, tmp_path, FOUND)
