"""Case 24: the package is installed from a copy of the sources, offline, and used elsewhere."""

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
assert (Path(t2i.__file__).parent / "assets" / "pages" / "gallery.css").is_file()
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
    """A copy of the sources, because building leaves folders next to them."""
    if any(find_spec(name) is None for name in ("pip", "setuptools")):
        pytest.skip("installing needs pip and setuptools in this environment")
    copy = tmp_path_factory.mktemp("sources")
    for name in ("t2i", "geneval", "dpg_bench", "launch"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", *(p.name for p in ROOT.glob("requirements*"))):
        shutil.copy(ROOT / name, copy)
    return copy


def run(*command, **options) -> str:
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def pip(command: str, *arguments) -> None:
    offline = ("--no-deps", "--no-build-isolation", "--no-index")
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", command, "-q")
    run(*pip, *offline, *arguments)


def use(site: Path, packages: Path, elsewhere: Path, script: str) -> None:
    """Run a script in `elsewhere` with what is installed in `site`; the modules must come from
    `packages`.
    """
    # addsitedir reads .pth files, which an editable install consists of.
    start = f"import site; site.addsitedir({str(site)!r})\n"
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    command = (sys.executable, "-c", start + script, packages)
    assert "used" in run(*command, cwd=elsewhere, env=environment)


@pytest.mark.slow
def test_a_wheel_is_complete(sources, tmp_path):
    """A wheel contains everything that the programs need, and the `t2i` command."""
    pip("wheel", "--wheel-dir", tmp_path, sources)
    (wheel,) = tmp_path.glob("t2i-*.whl")
    site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    pip("install", "--no-compile", "--target", site, wheel)
    assert not any((site / name).exists() for name in ("tests", "docs", "launch/lab"))
    elsewhere.mkdir()
    use(site, site, elsewhere, FOUND + USE)
    draw = ("generate", "--ckpt", "shapes", "--prompt", "a photo of a red circle", "--samples", 1)
    run(site / "bin" / "t2i", *draw, cwd=elsewhere, env=os.environ | {"PYTHONPATH": str(site)})
    assert len(list(elsewhere.glob("outputs/shapes-*/00000/samples/00000.png"))) == 1


@pytest.mark.slow
def test_an_editable_install_uses_the_sources(sources, tmp_path):
    pip("install", "--prefix", tmp_path / "prefix", "-e", sources)
    site = next((tmp_path / "prefix").rglob("site-packages"))
    use(site, sources, tmp_path, FOUND)
