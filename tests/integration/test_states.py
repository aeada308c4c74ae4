"""A damaged state, checkpoint, base or cache is never used without a word, and never ends in a traceback."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sdtrain.data.shards import LatentShards
from sdtrain.ground import manifests
from sdtrain.ground.errors import InputError
from sdtrain.ground.files import PARTIAL, read_json, seal_folder, write_json
from sdtrain.ground.manifests import encoders_fingerprint
from sdtrain.params.load import check_params
from sdtrain.training.branching import find_origin
from sdtrain.training.state_files import read_head
from sdtrain.training.states import StateStore
from tests.conftest import shrunk_tree
from tests.integration.test_resume import OPEN, STEPS, assert_same, branch, files_of, newest, states_in

LAST = "step-00000006"


@pytest.fixture(scope="module")
def whole(workspace, tmp_path_factory):
    """A run that nothing disturbed: states after 4 and 6 steps, each with another best checkpoint."""
    out = tmp_path_factory.mktemp("whole")
    workspace.train(out, train=STEPS)
    heads = [read_head(state) for state in states_in(out)]
    assert [(head.step, [best.step for best in head.best]) for head in heads] == [(4, [2]), (6, [4])]
    return out


@pytest.fixture(scope="module")
def other(workspace, tmp_path_factory):
    """Another run of the same shape."""
    out = tmp_path_factory.mktemp("other")
    workspace.train(out, train={**STEPS, "snr_gamma": 5.0})
    return out


def origin_of(source: Path, out: Path, reset: list[str]):
    """What a run of eight steps that branches from `source` finds there."""
    train = {"resume": "branch", "branch_from": str(source), "resume_reset": reset}
    return find_origin(check_params(shrunk_tree(train=train)).train, out, 8)


def flip(path: Path, where: float) -> None:
    """Turn one bit over; `where` from 0, the first byte, to 1, the last."""
    data = bytearray(path.read_bytes())
    data[round(where * (len(data) - 1))] ^= 1
    path.write_bytes(data)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def put_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGES = {
    "first bit": lambda path: flip(path, 0),
    "middle bit": lambda path: flip(path, 0.5),
    "last bit": lambda path: flip(path, 1),
    "truncated": truncate,
    "empty": empty,
    "missing": Path.unlink,
    "a folder": put_folder,
}
STATE_FILES = ("weights.safetensors", "ema.safetensors", "optimizer.safetensors", "state.json", "SHA256SUMS")
CHECKPOINT_FILES = (
    "raw/diffusion_pytorch_model.safetensors",
    "raw/config.json",
    "ema/diffusion_pytorch_model.safetensors",
    "training_config.json",
    "SHA256SUMS",
)


def edited(**changes):
    """Change state.json, and seal the state again, as nothing but a fault of ours would."""

    def damage(state: Path, _) -> None:
        head = {**read_json(state / "state.json"), **changes}
        write_json(state / "state.json", {name: value for name, value in head.items() if value is not ...})
        seal_folder(state)

    return damage


def written(text: str, seal: bool):
    def damage(state: Path, _) -> None:
        (state / "state.json").write_text(text)
        if seal:
            seal_folder(state)

    return damage


def on_file(name: str, how):
    return lambda state, _: how(state / name)


def on_checkpoint(name: str, how):
    return lambda state, _: how(state.parent / "checkpoints" / "step-00000004" / name)


def other_file(name: str):
    return lambda state, other: shutil.copy(newest(other) / name, state / name)


def replace(path: Path, source: Path) -> None:
    shutil.rmtree(path)
    shutil.copytree(source, path)


def other_checkpoint(state: Path, other: Path) -> None:
    replace(state.parent / "checkpoints" / "step-00000004", next((other / "resume").glob("*/checkpoints/step-*4")))


def nested(state: Path, _) -> None:
    shutil.copytree(state, state.with_name("x"))
    shutil.rmtree(state)
    state.mkdir()
    state.with_name("x").rename(state / state.name)


def only_a_file(state: Path, _) -> None:
    shutil.rmtree(state)
    state.write_text("not a state")


def one_line_less(state: Path, _) -> None:
    lines = (state / "SHA256SUMS").read_text().splitlines(keepends=True)
    (state / "SHA256SUMS").write_text("".join(line for line in lines if "ema" not in line))


STATE_DAMAGES = {
    **{f"{name} {how}": on_file(name, damage) for name in STATE_FILES for how, damage in DAMAGES.items()},
    **{f"{name} of another run": other_file(name) for name in STATE_FILES},
    "a state of another run": lambda state, other: replace(state, newest(other)),
    "{}": written("{}", seal=False),
    "{} sealed": written("{}", seal=True),
    "[]": written("[]", seal=False),
    "[] sealed": written("[]", seal=True),
    "a number sealed": written("6", seal=True),
    "another identity": edited(identity={"seed": 1}),
    "another fingerprint": edited(fingerprint="0123456789abcdef"),
    "no log": edited(log=...),
    "a log that is text": edited(log="none"),
    "no identity": edited(identity=...),
    "no step": edited(step=...),
    "a step that is text": edited(step="6"),
    "format 1": edited(format_version=1),
    "format 3": edited(format_version=3),
    "no format": edited(format_version=...),
    "nested": nested,
    "a file too many": lambda state, _: (state / "more.safetensors").write_bytes(b"x"),
    "no files": lambda state, _: [path.unlink() for path in state.iterdir()],
    "no line for the average": one_line_less,
}
"""What can be seen of a state alone."""
OWN_DAMAGES = {
    **STATE_DAMAGES,
    "the state before it": lambda state, _: replace(state, state.with_name("step-00000004")),
    "another step": edited(step=5),
    "no best checkpoints' hashes": edited(checkpoints={}),
    "a file": only_a_file,
    **{
        f"checkpoint's {name} {how}": on_checkpoint(name, damage)
        for name in CHECKPOINT_FILES
        for how, damage in DAMAGES.items()
    },
    "no checkpoint": lambda state, _: shutil.rmtree(state.parent / "checkpoints" / "step-00000004"),
    "a checkpoint of another run": other_checkpoint,
}
"""What can be seen of a state in its run's folder."""


def damaged(whole, other, out, name: str) -> dict[str, bytes]:
    """A copy of the run's folder with its last state damaged; what the damaged state holds."""
    shutil.copytree(whole / "resume", out / "resume")
    state = newest(out)
    OWN_DAMAGES[name](state, other)
    return files_of(state) if state.is_dir() else {}


@pytest.mark.parametrize("name", OWN_DAMAGES)
def test_a_damaged_state_is_set_aside_and_the_one_before_it_used(whole, other, tmp_path, capsys, name):
    content = damaged(whole, other, tmp_path, name)
    (run,) = (path for path in (tmp_path / "resume").iterdir() if path.is_dir())
    checkpoint = run / "checkpoints" / "step-00000004"
    spoiled = files_of(checkpoint) if checkpoint.exists() else {}
    state = run / LAST
    store = StateStore(tmp_path / "resume", read_head(newest(whole)).identity)
    store.lock()
    store.prune(1, spare=None)
    assert store.newest_sound(6) == state.with_name("step-00000004")
    out = capsys.readouterr().out
    assert out.startswith(f"{state} isn't used: {state.parent}/")
    assert out.endswith(f"{LAST} is kept as {run.name}/{LAST}.damaged\n")
    assert not state.exists()
    assert not content or files_of(state.with_name(f"{LAST}.damaged")) == content
    store.tidy([])
    store.size_bytes()
    aside = checkpoint.with_name("step-00000004.damaged")
    assert (files_of(aside) if aside.exists() else {}) == (
        spoiled if "checkpoint" in name and "best" not in name else {}
    )
    store.unlock()


@pytest.mark.parametrize(
    "name",
    [
        "weights.safetensors middle bit", "optimizer.safetensors truncated", "{}", "a state of another run", "a file",
        "no checkpoint", "checkpoint's ema/diffusion_pytorch_model.safetensors last bit",
        *(pytest.param(name, marks=pytest.mark.full) for name in OWN_DAMAGES),
    ],
)  # fmt: skip
def test_a_run_with_a_damaged_state_ends_as_though_nothing_had_happened(workspace, whole, other, tmp_path, capfd, name):
    damaged(whole, other, tmp_path, name)
    workspace.train(tmp_path, train=STEPS)
    out = capfd.readouterr().out
    assert f"{LAST} isn't used: " in out
    assert "resumes from step 4 of 6" in out
    assert_same(tmp_path, whole)


def test_without_a_sound_state_the_run_starts_over_and_says_why(workspace, whole, tmp_path, capfd):
    shutil.copytree(whole / "resume", tmp_path / "resume")
    for number, state in enumerate(states_in(tmp_path)):
        flip(state / STATE_FILES[number], 0.3)
    workspace.train(tmp_path, train=STEPS)
    out = capfd.readouterr().out
    assert "ema.safetensors has SHA-256" in out
    assert "weights.safetensors has SHA-256" in out
    assert "starts over: none of its saved states can be used" in out
    assert_same(tmp_path, whole)
    assert {path.name for path in newest(tmp_path).parent.glob("*.damaged")} == {
        "step-00000004.damaged", "step-00000006.damaged",
    }  # fmt: skip


def test_what_is_set_aside_is_never_overwritten(whole, tmp_path):
    shutil.copytree(whole / "resume", tmp_path / "resume")
    state = newest(tmp_path)
    store = StateStore(tmp_path / "resume", read_head(state).identity)
    for number in range(3):
        (state / "weights.safetensors").write_text(f"{number}")
        store.newest_sound(6)
        shutil.copytree(newest(whole), state)
    kept = {path.name: (path / "weights.safetensors").read_text() for path in state.parent.glob("*.damaged*")}
    assert kept == {f"{LAST}.damaged": "0", f"{LAST}.damaged-2": "1", f"{LAST}.damaged-3": "2"}


def test_what_is_named_otherwise_is_no_state(workspace, whole, tmp_path, capfd):
    shutil.copytree(whole / "resume", tmp_path / "resume")
    run = newest(tmp_path).parent
    for name in ("step-x", "step-", "step-7", "step-0000000x", "step-000000060", "step-00000006.damaged"):
        shutil.copytree(newest(whole), run / name)
    (run / "step-y").write_text("")
    (run / "checkpoints" / "step-x").mkdir()
    before = files_of(run)
    workspace.train(tmp_path, train=STEPS)
    assert "resumes from step 6 of 6" in capfd.readouterr().out
    assert before.items() <= {**files_of(run), "owner.json": before["owner.json"]}.items()


def test_a_broken_state_of_another_run_disturbs_nobody(workspace, whole, other, tmp_path):
    shutil.copytree(other / "resume", tmp_path / "resume")
    for state in states_in(tmp_path):
        (state / "state.json").write_text("[]")
    workspace.train(tmp_path, train=STEPS)
    assert files_of(tmp_path / "checkpoints") == files_of(whole / "checkpoints")


@pytest.mark.parametrize("name", STATE_DAMAGES)
def test_a_branch_from_a_damaged_state_is_refused(whole, other, tmp_path, name):
    source = tmp_path / "start"
    shutil.copytree(newest(whole), source)
    STATE_DAMAGES[name](source, other)
    before = files_of(source)
    if name == "a state of another run":  # is what was asked for
        origin_of(source, tmp_path / "out", []).verify()
        return
    with pytest.raises(InputError, match=r"^train.branch_from = '"):
        origin_of(source, tmp_path / "out", []).verify()
    assert files_of(source) == before


@pytest.mark.parametrize("how", DAMAGES)
@pytest.mark.parametrize("name", CHECKPOINT_FILES)
def test_a_branch_from_a_damaged_checkpoint_is_refused(whole, tmp_path, name, how):
    source = tmp_path / "start"
    shutil.copytree(whole / "checkpoints" / "last", source)
    origin_of(source, tmp_path / "out", ["optimizer"]).verify()
    DAMAGES[how](source / name)
    before = files_of(source)
    with pytest.raises(InputError, match=r"start"):
        origin_of(source, tmp_path / "out", ["optimizer"]).verify()
    assert files_of(source) == before


@pytest.mark.parametrize("text", ["{}", "[]", '{"step": "6", "identity": {}, "ema_step": null}'])
def test_a_checkpoint_whose_config_says_nothing_is_refused(whole, tmp_path, text):
    source = tmp_path / "start"
    shutil.copytree(whole / "checkpoints" / "last", source)
    (source / "training_config.json").write_text(text)
    seal_folder(source)
    with pytest.raises(InputError, match="training_config.json: "):
        origin_of(source, tmp_path / "out", ["optimizer"])


def test_a_run_that_branches_from_a_damaged_state_never_trains(workspace, whole, tmp_path):
    shutil.copytree(newest(whole), tmp_path / "start")
    flip(tmp_path / "start" / "optimizer.safetensors", 0.5)
    with pytest.raises(InputError, match=r"start': is damaged: .*optimizer.safetensors has SHA-256 .*copy it again"):
        branch(workspace, whole, tmp_path / "run", tmp_path / "start", resume_reset=["scheduler"])


def test_a_checkpoint_that_is_damaged_while_the_run_works_never_becomes_an_out(
    workspace, whole, tmp_path, monkeypatch, capfd
):
    from sdtrain import train as train_module

    original = train_module.write_outs

    def write_outs(run, step):
        flip(run.store.checkpoint(run.best[0].step) / "ema" / "diffusion_pytorch_model.safetensors", 0.5)
        original(run, step)

    with monkeypatch.context() as patch:
        patch.setattr(train_module, "write_outs", write_outs)
        with pytest.raises(InputError, match=r"checkpoints/step-\d+/ema/.*safetensors has SHA-256"):
            workspace.train(tmp_path, train=STEPS)
    assert not (tmp_path / "checkpoints").exists()
    workspace.release_locks()
    workspace.train(tmp_path, train=STEPS)
    assert_same(tmp_path, whole)


def test_two_states_are_kept_with_the_checkpoints_of_both(workspace, tmp_path):
    workspace.train(tmp_path, train={**OPEN, "max_steps": 8})
    states = states_in(tmp_path)
    assert [path.name for path in states] == ["step-00000006", "step-00000008"]
    wanted = {best.step for state in states for best in read_head(state).best}
    wanted |= {json.loads((tmp_path / "checkpoints/best/training_config.json").read_text())["step"]}
    kept = {int(path.name[-8:]) for path in (states[0].parent / "checkpoints").iterdir()}
    assert kept == wanted


def test_a_sealed_folder_is_checked_by_coreutils(whole):
    for folder in (newest(whole), whole / "checkpoints" / "last", whole / "checkpoints" / "best"):
        assert os.system(f"cd {folder} && sha256sum --check --strict --quiet SHA256SUMS") == 0


# The base and the latent cache


def shard_of(latents: Path) -> Path:
    return latents / "train-00000.safetensors"


def manifest_edit(**changes):
    def damage(folder: Path) -> None:
        manifest = {**read_json(folder / "manifest.json"), **changes}
        write_json(folder / "manifest.json", {name: value for name, value in manifest.items() if value is not ...})

    return damage


def one_row_more(latents: Path) -> None:
    manifest = read_json(latents / "manifest.json")
    manifest["splits"]["train"][0]["num_rows"] += 1
    write_json(latents / "manifest.json", manifest)


def without_tensor(latents: Path) -> None:
    from safetensors import safe_open

    with safe_open(shard_of(latents), "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys() if name != "logvar"}  # noqa: SIM118
        metadata = file.metadata()
    save_file(tensors, shard_of(latents), metadata)


def without_ids(latents: Path) -> None:
    from safetensors.torch import load_file

    save_file(load_file(shard_of(latents)), shard_of(latents))


STRUCTURE = {
    "shard's first bit": lambda latents: flip(shard_of(latents), 0),
    "shard truncated": lambda latents: truncate(shard_of(latents)),
    "shard empty": lambda latents: empty(shard_of(latents)),
    "shard missing": lambda latents: shard_of(latents).unlink(),
    "shard is a folder": lambda latents: put_folder(shard_of(latents)),
    "a tensor missing": without_tensor,
    "ids missing": without_ids,
    "one row more": one_row_more,
    "{}": lambda latents: (latents / "manifest.json").write_text("{}"),
    "[]": lambda latents: (latents / "manifest.json").write_text("[]"),
    "no JSON": lambda latents: (latents / "manifest.json").write_text("{"),
    "manifest empty": lambda latents: empty(latents / "manifest.json"),
    "manifest a folder": lambda latents: put_folder(latents / "manifest.json"),
    "no splits": manifest_edit(splits=...),
    "one split": manifest_edit(splits={"train": []}),
    "splits of text": manifest_edit(splits={"train": ["a"], "validation": []}),
    "shape of two": manifest_edit(shape=[4, 8]),
    "no shape": manifest_edit(shape=...),
}
"""Damage to a cache that its structure shows."""
CONTENT = {
    "shard's middle bit": lambda latents: flip(shard_of(latents), 0.5),
    "shard's last bit": lambda latents: flip(shard_of(latents), 1),
    "validation's middle bit": lambda latents: flip(latents / "validation-00000.safetensors", 0.5),
    "probe's first bit": lambda latents: flip(latents / "probe.safetensors", 0),
    "probe truncated": lambda latents: truncate(latents / "probe.safetensors"),
    "probe empty": lambda latents: empty(latents / "probe.safetensors"),
    "probe missing": lambda latents: (latents / "probe.safetensors").unlink(),
    "probe of others": lambda latents: save_file({"others": torch.zeros(1)}, latents / "probe.safetensors"),
}


@pytest.mark.parametrize("name", [*STRUCTURE, *CONTENT])
def test_a_damaged_cache_is_refused(workspace, tmp_path, name):
    latents = tmp_path / "latents"
    shutil.copytree(workspace.latents, latents)
    (STRUCTURE | CONTENT)[name](latents)
    with pytest.raises(InputError, match=rf"{latents}.*dvc (repro|checkout)"):
        workspace.train(tmp_path, latents=latents, train={"max_steps": 1})
    assert not states_in(tmp_path) if (tmp_path / "resume").exists() else True


@pytest.mark.parametrize("name", STRUCTURE)
def test_a_large_cache_is_at_least_of_the_right_structure(workspace, tmp_path, monkeypatch, capsys, name):
    monkeypatch.setattr(manifests, "_MAX_HASHED_BYTES", 0)
    latents = tmp_path / "latents"
    shutil.copytree(workspace.latents, latents)
    manifests.check_latent_files(latents)
    assert "their headers are checked, their hashes aren't" in capsys.readouterr().out
    STRUCTURE[name](latents)
    with pytest.raises(InputError, match=rf"{latents}.*dvc repro"):
        LatentShards(latents, "train", encoders_fingerprint(workspace.base))


BASE_FILES = (
    "unet/diffusion_pytorch_model.safetensors",
    "vae/diffusion_pytorch_model.safetensors",
    "text_encoder/config.json",
    "tokenizer/tokenizer_config.json",
    "scheduler/scheduler_config.json",
)


@pytest.mark.parametrize(
    "damage",
    [
        *((name, how) for name in BASE_FILES for how in DAMAGES),
        *(("manifest.json", how) for how in ("first bit", "truncated", "empty", "missing", "a folder")),
        ("unet/more.json", "new"),
    ],
    ids=" ".join,
)
def test_a_damaged_base_is_refused(workspace, tmp_path, damage):
    name, how = damage
    base = tmp_path / "base"
    shutil.copytree(workspace.base, base)
    {**DAMAGES, "new": lambda path: path.write_text("{}")}[how](base / name)
    with pytest.raises(InputError, match=rf"{base}.*dvc repro"):
        manifests.check_base_files(base)


@pytest.mark.parametrize("text", ["{}", "[]", '{"format_version": 1}', '{"format_version": 1, "files": []}'])
def test_a_base_whose_manifest_says_nothing_is_refused(workspace, tmp_path, text):
    base = tmp_path / "base"
    shutil.copytree(workspace.base, base)
    (base / "manifest.json").write_text(text)
    with pytest.raises(InputError, match="manifest.json: .*dvc repro base"):
        workspace.train(tmp_path, base=base)


def test_a_run_on_a_damaged_base_never_trains(workspace, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(workspace.base, base)
    flip(base / "unet" / "diffusion_pytorch_model.safetensors", 0.5)
    with pytest.raises(InputError, match=r"unet/.*has SHA-256 .* expected .* by manifest.json.*dvc checkout"):
        workspace.train(tmp_path, base=base)


# Which runs' states stay


def saved_run(root: Path, number: int, step: int = 3, finished: bool = True) -> StateStore:
    """A run with one state, saved at that hour."""
    store = StateStore(root, {"number": number})
    fields = {
        "best": [], "log": {}, "num_steps": 9, "run_name": "", "num_updates": step, "ema_step": None, "scaler": None,
        "params": {},
        "optimizer_scalars": {},
    }  # fmt: skip
    store._write(step, {"unet": {"weight": torch.zeros(1)}}, fields)
    if finished:
        store.finish(step)
    os.utime(store.state(step), (3600 * number, 3600 * number))
    return store


def pruned(root: Path, num_runs: int, spare=None) -> None:
    mine = StateStore(root, {"number": "mine"})
    mine.lock()
    mine.prune(num_runs, spare)
    mine.unlock()


def left(stores: list[StateStore]) -> list[bool]:
    return [store.folder.exists() for store in stores]


def test_old_runs_are_pruned_and_running_ones_are_left(tmp_path, capsys):
    stores = [saved_run(tmp_path, number) for number in range(4)]
    stores[0].lock()
    pruned(tmp_path, 2)
    assert left(stores) == [True, False, False, True]
    out = capsys.readouterr().out
    assert f"deletes {stores[1].folder} (step 3 of 9, finished, saved " in out
    assert out.count("\n") == 2
    pruned(tmp_path, 1, spare=stores[3].folder)
    assert left(stores) == [True, False, False, True]


def test_a_task_of_a_sweep_deletes_no_unfinished_run(tmp_path, capsys):
    stores = [saved_run(tmp_path, number, finished=number == 0) for number in range(4)]
    mine = StateStore(tmp_path, {"number": "mine"})
    mine.lock()
    mine.prune(1, None, is_swept=True)
    assert left(stores) == [False, True, True, True]
    assert capsys.readouterr().out.count("\n") == 1
    mine.prune(1, None)
    assert left(stores) == [False, False, False, True]
    mine.unlock()


def test_finished_runs_go_before_older_ones_that_are_not(tmp_path, capsys):
    stores = [saved_run(tmp_path, number, finished=number != 0) for number in range(4)]
    pruned(tmp_path, 2)
    assert left(stores) == [True, False, False, False]
    assert str(stores[0].folder) not in capsys.readouterr().out


def test_an_unfinished_run_goes_only_where_too_many_are_and_not_without_a_word(tmp_path, capsys):
    stores = [saved_run(tmp_path, number, finished=False) for number in range(2)]
    pruned(tmp_path, 2)
    assert left(stores) == [True, True]
    warning = f"{stores[0].folder} (step 3 of 9, not finished, saved 1970-01-01 "
    out = capsys.readouterr().out
    assert warning in out
    assert "will be deleted when another new run starts; to keep it, finish it or raise train.num_saved_runs" in out
    stores.append(saved_run(tmp_path, 2, finished=False))
    pruned(tmp_path, 2)
    assert left(stores) == [False, True, True]
    assert f"deletes {warning}" in capsys.readouterr().out


def test_one_saved_run_spares_another_that_is_not_finished(tmp_path):
    stores = [saved_run(tmp_path, 0, finished=False), saved_run(tmp_path, 1)]
    pruned(tmp_path, 1)
    assert left(stores) == [True, False]


def test_a_run_without_a_state_and_one_that_is_broken_are_pruned_too(tmp_path, capsys):
    nothing, broken, sound = StateStore(tmp_path, {"number": 9}), saved_run(tmp_path, 1), saved_run(tmp_path, 2)
    nothing.lock()
    nothing.unlock()
    (broken.state(3) / "state.json").write_text("[]")
    (broken.folder / "step-00000009.damaged").mkdir()
    pruned(tmp_path, 2)
    assert left([nothing, broken, sound]) == [False, False, True]
    out = capsys.readouterr().out
    assert f"deletes {nothing.folder} (no saved state)" in out
    assert f"deletes {broken.folder} (step 3, finished, saved " in out


def test_a_run_is_finished_once_its_outs_are_written_and_until_it_trains_on(workspace, tmp_path, monkeypatch):
    from sdtrain import train as train_module

    marker = "resume/*/finished.json"
    with monkeypatch.context() as patch:
        patch.setattr(train_module, "write_outs", lambda *_: (_ for _ in ()).throw(MemoryError))
        with pytest.raises(MemoryError):
            workspace.train(tmp_path, train={**OPEN, "max_steps": 2})
    assert states_in(tmp_path)
    assert not list(tmp_path.glob(marker))
    workspace.release_locks()
    workspace.train(tmp_path, train={**OPEN, "max_steps": 2})
    assert [read_json(path) for path in tmp_path.glob(marker)] == [{"step": 2}]
    with monkeypatch.context() as patch:
        patch.setattr(train_module, "write_outs", lambda *_: (_ for _ in ()).throw(MemoryError))
        with pytest.raises(MemoryError):
            workspace.train(tmp_path, train={**OPEN, "max_steps": 4})
    assert not list(tmp_path.glob(marker))


def test_starting_another_run_deletes_no_unfinished_one(workspace, tmp_path, monkeypatch, capfd):
    """As it was: `num_saved_runs: 1`, a run that is stopped, another one, and the first one's hours are gone."""
    from tests.integration.test_resume import stopped_after

    one = {**STEPS, "num_saved_runs": 1}
    with monkeypatch.context() as patch:
        stopped_after(patch, 3)
        with pytest.raises(SystemExit):
            workspace.train(tmp_path, train=one)
    workspace.train(tmp_path, train={**one, "snr_gamma": 5.0})
    capfd.readouterr()
    workspace.train(tmp_path, train=one)
    assert "resumes from step 3 of 6" in capfd.readouterr().out
    assert not list(tmp_path.rglob(f"*{PARTIAL}"))


@pytest.mark.parametrize("text", ["{}", "[]", "", None])
def test_a_second_trainer_is_refused_whatever_the_first_one_left_of_its_name(tmp_path, text):
    first, second = StateStore(tmp_path, {"number": 1}), StateStore(tmp_path, {"number": 1})
    first.lock()
    owner = first.folder / "owner.json"
    owner.unlink() if text is None else owner.write_text(text)
    with pytest.raises(InputError, match=r"another process is already training this run \(pid \? on \?"):
        second.lock()
    first.unlock()


@pytest.mark.parametrize("text", ["{}", "[]", "{"])
def test_the_plan_names_a_cache_whose_manifest_says_nothing(workspace, tmp_path, text):
    from sdtrain.tools.plan import plan_run

    shutil.copytree(workspace.latents, tmp_path / "latents")
    (tmp_path / "latents" / "manifest.json").write_text(text)
    files = workspace.files(tmp_path, latents=tmp_path / "latents")
    lines = plan_run(workspace.make_params(), files, workspace.dataset, 0)
    stale = [line for line in lines if line.startswith("out of date")]
    assert any("latents/manifest.json: " in line and "run `dvc repro precompute`" in line for line in stale), lines
