"""Which modules a module imports: packages are followed, and what can't be found isn't passed over."""

import pytest

from sdtrain.ground.imports import import_closure
from sdtrain.training.identity import code_hashes

FILES = {
    "lib/__init__.py": "",
    "lib/top.py": "import os\nfrom lib.deep import maths\n",
    "lib/deep/__init__.py": "from . import face\n",
    "lib/deep/face.py": "",
    "lib/deep/maths.py": "def later():\n    from ..other import constant\n",
    "lib/other.py": "constant = 1\n",
    "lib/unused.py": "",
}


@pytest.fixture
def package(tmp_path):
    def write(**changes: str):
        for name, text in {**FILES, **{f"lib/{name}.py": text for name, text in changes.items()}}.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text)
        return tmp_path

    return write


def closure(root, skip=()) -> list[str]:
    return list(import_closure([root / "lib" / "top.py"], {"lib": root}, skip=skip))


def test_folders_relative_imports_and_imports_in_functions_are_followed(package):
    assert closure(package()) == ["lib", "lib.deep", "lib.deep.face", "lib.deep.maths", "lib.other"]


def test_a_module_that_moves_into_a_folder_stays_in_the_closure(package):
    root = package(top="from lib.deep.sub import other\n")
    (root / "lib" / "deep" / "sub").mkdir()
    (root / "lib" / "deep" / "sub" / "__init__.py").touch()
    (root / "lib" / "other.py").rename(root / "lib" / "deep" / "sub" / "other.py")
    assert "lib.deep.sub.other" in closure(root)


@pytest.mark.parametrize(
    "text", ["from lib.gone import x\n", "import lib.deep.gone\n", "from lib.deep.gone.x import y\n"]
)
def test_an_import_that_cannot_be_found_is_an_error(package, text):
    with pytest.raises(ImportError, match=r"lib\.(deep\.)?gone"):
        closure(package(other=text))


def test_skipped_modules_are_neither_named_nor_followed(package):
    assert closure(package(), skip=("lib", "lib.deep.ma*")) == ["lib.deep", "lib.deep.face"]


def test_a_runs_identity_is_of_what_computes():
    names = set(code_hashes("finetune"))
    computing = {"training.step", "training.trainer", "training.selection", "evaluation.held_out", "methods.finetune"}
    computing |= {"methods.method", "ground.diffusion", "ground.randomness", "data.batches", "models.ema"}
    computing |= {"train", "training.curves", "training.state_files", "training.branching", "training.run"}
    assert {f"sdtrain.{name}" for name in computing} <= names
    talking = {"training.preflight", "training.trackers", "training.states", "ground.errors", "params.schema", "cli"}
    assert not {f"sdtrain.{name}" for name in talking} & names
