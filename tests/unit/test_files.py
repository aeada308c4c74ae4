"""Files and folders that are whole or not there, their manifests; and intervals, which need no file of their own."""

import numpy as np
import pytest

from sdtrain.ground.errors import InputError
from sdtrain.ground.files import new_folder, read_json, sha256_file, sha256_json, write_json, write_text
from sdtrain.ground.manifests import BaseManifest, DatasetManifest, LatentsManifest, encoders_fingerprint
from sdtrain.ground.statistics import bootstrap_interval, wilson_interval


def test_new_folder_appears_when_its_body_has_ended(tmp_path):
    out = tmp_path / "deep" / "out"
    with new_folder(out) as folder:
        (folder / "a.txt").write_text("new")
        assert not out.exists()
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    assert (out / "a.txt").read_text() == "new"


def test_new_folder_replaces_the_old_one_wholly(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "old.txt").write_text("old")
    with new_folder(out) as folder:
        (folder / "a.txt").write_text("new")
    assert [path.name for path in out.iterdir()] == ["a.txt"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_new_folder_leaves_the_old_one_where_its_body_raises(tmp_path, error):
    out = tmp_path / "out"
    out.mkdir()
    (out / "old.txt").write_text("old")

    def write_half() -> None:
        with new_folder(out) as folder:
            (folder / "a.txt").write_text("half")
            raise error

    with pytest.raises(error):
        write_half()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (out / "old.txt").read_text() == "old"


def test_new_folder_starts_empty_after_a_killed_run(tmp_path):
    left_behind = tmp_path / "out.partial"
    left_behind.mkdir()
    (left_behind / "half.txt").write_text("half")
    with new_folder(tmp_path / "out") as folder:
        assert folder == left_behind
        assert list(folder.iterdir()) == []


def test_write_text_makes_folders_and_leaves_one_file(tmp_path):
    path = tmp_path / "a" / "b.txt"
    write_text(path, "one")
    write_text(path, "zwölf")
    assert path.read_bytes() == "zwölf".encode()
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_write_json_refuses_what_json_does_not_have(tmp_path, value):
    path = tmp_path / "a.json"
    write_json(path, {"loss": 1.5})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, {"loss": value})
    assert read_json(path) == {"loss": 1.5}
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("data", "words"), [(None, "no such file"), (b"{", "not valid JSON"), (b"\xff", "not valid JSON")]
)
def test_read_json_names_the_file_at_fault(tmp_path, data, words):
    path = tmp_path / "a.json"
    if data:
        path.write_bytes(data)
    with pytest.raises(InputError, match=rf"a\.json: {words}"):
        read_json(path)


def test_hashes_of_known_bytes(tmp_path):
    (tmp_path / "abc").write_bytes(b"abc")
    assert sha256_file(tmp_path / "abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    # printf '{"a":[1,2],"b":null}' | sha256sum
    assert sha256_json({"b": None, "a": [1, 2]}) == "f25109c4111335e4a32d49373585e7a788ff5b10e70023f7004b170e7f84716a"


BASE = BaseManifest(sources=[{"path": "a", "parts": ["unet"]}], files={"unet/c": "3"})


def test_a_manifest_reads_as_it_was_written(tmp_path):
    BASE.write(tmp_path)
    assert BaseManifest.read(tmp_path) == BASE
    assert read_json(tmp_path / "manifest.json")["format_version"] == BaseManifest.VERSION


@pytest.mark.parametrize(
    ("kind", "stage"), [(BaseManifest, "base"), (DatasetManifest, "dataset"), (LatentsManifest, "precompute")]
)
def test_missing_manifest_names_the_stage_to_run(tmp_path, kind, stage):
    with pytest.raises(InputError, match=f"{tmp_path.name} has no manifest.json; run `dvc repro {stage}`"):
        kind.read(tmp_path)


@pytest.mark.parametrize("version", [0, 99, None])
def test_manifest_of_another_format_names_both_versions(tmp_path, version):
    write_json(tmp_path / "manifest.json", {"format_version": version})
    with pytest.raises(InputError, match=rf"format_version {version}, this code reads 2; run `dvc repro precompute`"):
        LatentsManifest.read(tmp_path)


def test_encoders_fingerprint_changes_with_vae_and_tokenizer_only(tmp_path):
    def fingerprint(**changes) -> str:
        files = {"vae/a": "1", "tokenizer/b": "2", "unet/c": "3", "text_encoder/d": "4"}
        BaseManifest(sources=[], files=files | changes).write(tmp_path)
        return encoders_fingerprint(tmp_path)

    same = fingerprint()
    assert fingerprint(**{"unet/c": "9", "text_encoder/d": "9"}) == same
    assert len({same, fingerprint(**{"vae/a": "9"}), fingerprint(**{"tokenizer/b": "9"})}) == 3


@pytest.mark.parametrize(
    ("num_right", "num", "interval"),
    [(8, 10, (0.4902, 0.9433)), (0, 10, (0.0, 0.2775)), (10, 10, (0.7225, 1.0)), (50, 100, (0.4038, 0.5962))],
)
def test_wilson_interval(num_right, num, interval):
    assert wilson_interval(num_right, num) == pytest.approx(interval, abs=1e-4)


def test_bootstrap_interval_covers_the_mean_19_times_of_20():
    rng = np.random.default_rng(0)
    intervals = [bootstrap_interval(rng.normal(3, 1, 60), 400, rng) for _ in range(300)]
    covered = sum(low < 3 < high for low, high in intervals)
    assert 270 < covered < 297  # 285 expected; the percentile interval is a little narrow at 60 values


def test_bootstrap_interval_has_the_width_of_the_normal_one():
    values = np.random.default_rng(1).normal(0, 2, 400)
    low, high = bootstrap_interval(values, 4000, np.random.default_rng(2))
    assert high - low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.05)
    assert (low + high) / 2 == pytest.approx(values.mean(), abs=0.02)


def test_bootstrap_interval_of_equal_values_is_a_point():
    assert bootstrap_interval(np.full(5, 0.25), 100, np.random.default_rng(0)) == (0.25, 0.25)


def test_json_is_written_for_people(tmp_path):
    write_json(tmp_path / "a.json", {"a": [1]})
    assert (tmp_path / "a.json").read_text() == '{\n  "a": [\n    1\n  ]\n}\n'
