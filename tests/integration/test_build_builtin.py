"""The built-in model's build as a whole, with a few steps a part."""

import importlib.util
import shutil

import pytest
import torch

from sdtrain.ground.errors import InputError
from sdtrain.ground.files import read_json

SHRUNK = {
    "VAE_SCENES": 40, "VAE_COLLAGES": 10, "VAE_STEPS": 6, "TEXT_STEPS": 20, "UNET_SCENES": 40, "UNET_STEPS": 6,
    "HELD_OUT": 8, "PROMPTS": 2, "READ_CAPTIONS": 300, "NUM_THREADS": 1,
}  # fmt: skip


@pytest.fixture(scope="module")
def builder(root):
    """The script as a module, shrunk; what it sets in the process is put back."""
    spec = importlib.util.spec_from_file_location("build_builtin", root / "scripts" / "build_builtin.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name, value in SHRUNK.items():
        assert hasattr(module, name)
        setattr(module, name, value)
    num_threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    with torch.random.fork_rng():
        yield module
    torch.set_num_threads(num_threads)
    torch.use_deterministic_algorithms(deterministic)


@pytest.fixture(scope="module")
def built(builder, tmp_path_factory):
    """`.build/` after the one command, and the shipped model's hashes before it."""
    builder.BUILD = tmp_path_factory.mktemp("build") / ".build"
    before = builder.hashes_of(builder.SHIPPED)
    builder.BUILD.mkdir()
    (builder.BUILD / "of a run before").mkdir()
    builder.main([])
    return builder.BUILD, before


@pytest.fixture
def copy(builder, built, tmp_path, monkeypatch):
    """A copy of `.build/` for a test to spoil."""
    shutil.copytree(built[0], tmp_path / ".build")
    monkeypatch.setattr(builder, "BUILD", tmp_path / ".build")
    return tmp_path / ".build"


def test_one_command_builds_a_whole_candidate_and_leaves_the_shipped_model(builder, built):
    build, before = built
    names = {path.name for path in build.iterdir()}
    assert names == {"vae", "text_encoder", "unet", "builtin", "report.json"}
    assert builder.hashes_of(build / "builtin").keys() == before.keys()
    assert builder.hashes_of(builder.SHIPPED) == before


def test_the_report_measures_both_alike_and_compares_every_file(builder, built):
    build, before = built
    report = read_json(build / "report.json")
    shipped, candidate = report["measured"]["shipped"], report["measured"]["candidate"]
    assert shipped.keys() == candidate.keys()
    assert shipped["vae_psnr_db"] > 30 > 20 > candidate["vae_psnr_db"]
    assert shipped["text_exact_reading"] > 0.99 > candidate["text_exact_reading"]
    assert shipped["unet_held_out_loss"] < 0.1 < candidate["unet_held_out_loss"]
    known = [name for name in shipped if name.startswith("known_")]
    assert [shipped[name] for name in known] == [1] * 6 > [candidate[name] for name in known]
    assert report["files"].keys() == before.keys()
    same = {name for name, row in report["files"].items() if row["identical"]}
    assert {"tokenizer/tokenizer.json", "unet/config.json", "scheduler/scheduler_config.json"} <= same
    assert not {name for name in same if name.endswith(".safetensors")}
    assert report["num_threads"] == 1
    assert report["built"]["unet"]["steps"] == SHRUNK["UNET_STEPS"]


@pytest.mark.full
def test_the_same_build_gives_the_same_bits(builder, built, tmp_path, monkeypatch):
    monkeypatch.setattr(builder, "BUILD", tmp_path)
    torch.manual_seed(0)  # the state before is no seed of it
    builder.main(["unet", "text_encoder", "vae"])
    for part in builder.TRAINED:
        weights = builder.hashes_of(tmp_path / part / part)
        assert weights == builder.hashes_of(built[0] / part / part)
        assert any(name.endswith(".safetensors") for name in weights)


@pytest.mark.parametrize(
    ("part", "optimizer"), [("vae", "MuonAndAdam"), ("unet", "MuonAndAdam"), ("text_encoder", "AdamW")]
)
def test_a_stopped_part_leaves_nothing_that_looks_finished(builder, copy, monkeypatch, part, optimizer):
    def stop(*_) -> None:
        raise KeyboardInterrupt

    shutil.rmtree(copy / part)
    owner = builder.MuonAndAdam if optimizer == "MuonAndAdam" else torch.optim.AdamW
    monkeypatch.setattr(owner, "step", stop)
    with pytest.raises(KeyboardInterrupt):
        builder.main([part])
    assert part not in {path.name.removesuffix(".partial") for path in copy.iterdir()}
    with pytest.raises(InputError, match=f"assemble needs .*{part}, which isn't there: name {part} as well"):
        builder.main(["assemble"])


@pytest.mark.parametrize("part", ["vae", "text_encoder"])
def test_a_unet_is_not_assembled_with_what_it_was_not_trained_on(builder, copy, part):
    before = {path: path.read_bytes() for path in copy.rglob("*.*") if path.is_file()}
    config = copy / part / part / "config.json"
    config.write_text(config.read_text() + "\n")
    with pytest.raises(InputError, match=f"unet was trained on another {part} than .*{part}: build unet again"):
        builder.main(["assemble"])
    assert [path for path in before if path.read_bytes() != before[path]] == [config]


def test_a_part_that_does_not_exist_is_refused(builder, built, capsys):
    with pytest.raises(SystemExit):
        builder.main(["vea"])
    assert "no such part: vea; there are vae, text_encoder, unet, assemble" in capsys.readouterr().err
    assert (built[0] / "report.json").exists()
