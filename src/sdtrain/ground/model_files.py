"""A model's files among those of a folder or a repository: configs, tokenizers and safetensors; never a pickle."""

import shutil
from collections.abc import Collection, Sequence
from pathlib import Path

from sdtrain.ground.errors import InputError
from sdtrain.ground.hub import is_lfs_pointer

VOCABULARIES = (("tokenizer.json",), ("vocab.json", "merges.txt"))
"""A tokenizer has one of these; SD 1.5's repository has the second."""


def choose_files(
    where: str, names: Collection[str], prefix: str, small: Sequence[str], stem: str | None, tokenizer: bool = False
) -> list[str]:
    """The files of one model among all `names` below a prefix, e.g. `unet/`.

    Args:
        where: key and value that name the place, for messages.
        small: files that it must have.
        stem: of its weights, `<stem>.safetensors` or shards with an index; None if it has none.
        tokenizer: it has a tokenizer's vocabulary, too.

    Raises:
        InputError: some are missing.
    """
    wanted = list(small)
    if tokenizer:
        has = [files for files in VOCABULARIES if all(prefix + name in names for name in files)]
        wanted += has[0] if has else VOCABULARIES[0]
        wanted += [name for name in ("special_tokens_map.json", "added_tokens.json") if prefix + name in names]
    missing = [prefix + name for name in wanted if prefix + name not in names]
    found = [prefix + name for name in wanted if prefix + name in names]
    if stem is not None:
        whole = f"{prefix}{stem}.safetensors"
        weights = [name for name in names if name == whole] or [
            name
            for name in names
            if name == f"{whole}.index.json" or (name.startswith(f"{prefix}{stem}-") and name.endswith(".safetensors"))
        ]
        if not weights:
            missing.append(whole)
        found += weights
    if missing:
        pickles = any(name.startswith(prefix) and name.endswith((".bin", ".ckpt", ".pt")) for name in names)
        hint = " (it has pickled weights, which sdtrain never loads: convert them to safetensors)" if pickles else ""
        raise InputError(f"{where}: lacks {', '.join(missing)}{hint}")
    return found


def copy_file(where: str, name: str, source: Path, folder: Path) -> None:
    """Copy a file into a folder, under the last part of its name.

    Raises:
        InputError: it is a Git LFS pointer.
    """
    if is_lfs_pointer(source):
        raise InputError(f"{where}: {name} is a Git LFS pointer, not the file itself; run `git lfs pull` there")
    shutil.copyfile(source, folder / Path(name).name)
