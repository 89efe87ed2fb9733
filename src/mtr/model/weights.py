"""The files that a model's weights are in, and what their headers say. No tensor is read, but for repeated ones."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from mtr.errors import UserError, described

_WHOLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


@dataclass(frozen=True)
class Stored:
    """A tensor as the header of its file describes it."""

    file: Path
    dtype: str
    """In the spelling of safetensors: F32, BF16, I8."""
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        return prod(self.shape)


def weight_files(name: str, revision: str | None) -> list[Path]:
    """The safetensors files that transformers loads for a model: one, or all shards of the index, in order of names.

    Args:
        name: a folder, or a Hub id, which is looked up in the local cache only.
        revision: branch, tag or commit of a Hub id.

    Returns:
        Files that exist. Empty for a Hub id whose weights are not all in the cache.

    Raises:
        UserError: the folder has no safetensors, its index cannot be read, or a shard that it names is missing.
    """
    folder = Path(name)
    if not folder.is_dir():
        found = _resolve(lambda file: _cached(name, file, revision), name)
        return [] if None in found.values() else _present(found)
    if distributed := sorted(path.name for path in folder.glob("shard-*-model-*-of-*.safetensors")):
        raise UserError(
            f"{name}: {distributed[0]} is a part of a distributed checkpoint; save the whole model with save_pretrained"
        )
    found = _resolve(lambda file: path if (path := folder / file).is_file() else None, name)
    if not found:
        raise UserError(f"{name}: {_why_none(folder)}")
    if absent := [shard for shard, path in found.items() if path is None]:
        raise UserError(
            f"{name}: {len(absent)} of the {len(found)} files that {_INDEX} names are not there, for example "
            f"{absent[0]}; copy or download the model again"
        )
    return _present(found)


def stored_tensors(files: Sequence[Path]) -> dict[str, Stored]:
    """Every tensor of these files by name.

    Raises:
        UserError: a file is damaged, or two of them hold one name with different values.
    """
    from safetensors import SafetensorError, safe_open

    found: dict[str, Stored] = {}
    for path in files:
        try:
            with safe_open(str(path), framework="pt") as file:
                for name in file.keys():  # noqa: SIM118  (not a dict)
                    if name in found:
                        _check_repeated(name, found[name].file, path)
                    view = file.get_slice(name)
                    found[name] = Stored(path, str(view.get_dtype()), tuple(view.get_shape()))
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path} is damaged ({described(error)}); copy or download it again") from None
    return found


def unnamed_files(files: Sequence[Path]) -> list[str]:
    """Names of safetensors files that lie beside the weights and are not among them."""
    folders = {path.parent for path in files}
    return sorted(path.name for folder in folders for path in folder.glob("*.safetensors") if path not in files)


def _resolve(find: Callable[[str], Path | None], name: str) -> dict[str, Path | None]:
    """As transformers does: the single file if there is one, else the shards of the index."""
    asked = _explicit(find, name)
    if asked is None and (whole := find(_WHOLE)) is not None:
        return {_WHOLE: whole}
    if asked is not None and not asked.endswith(".index.json"):
        return {asked: find(asked)}
    index = find(asked or _INDEX)
    if index is None:
        return {}
    try:
        shards = sorted(set(_read(index)["weight_map"].values()))
        if not shards or not all(isinstance(shard, str) and _is_inside(shard) for shard in shards):
            raise ValueError("its weight_map names no files of this folder")
        return {shard: find(shard) for shard in shards}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{name}: {index.name} cannot be used ({described(error)}); restore it") from None


def _explicit(find: Callable[[str], Path | None], name: str) -> str | None:
    """The file that config.json asks transformers to load in place of the usual ones.

    Raises:
        UserError: it is no safetensors file of this folder.
    """
    config = find("config.json")
    try:
        asked = _read(config).get("transformers_weights") if config else None
    except (OSError, ValueError, AttributeError, RecursionError):
        return None  # whoever reads the config says what is wrong with it
    if asked is None:
        return None
    kinds = (".safetensors", ".safetensors.index.json")
    if isinstance(asked, str) and asked.endswith(kinds) and _is_inside(asked):
        return asked
    raise UserError(f"{name}: transformers_weights in config.json names {asked!r}, which is no safetensors file in it")


def _is_inside(file: str) -> bool:
    return not Path(file).is_absolute() and ".." not in Path(file).parts


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _cached(name: str, file: str, revision: str | None) -> Path | None:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(name, file, revision=revision)
    except HFValidationError:  # no Hub id: nothing can be cached for it
        return None
    return Path(found) if isinstance(found, str) else None


def _present(found: dict[str, Path | None]) -> list[Path]:
    return [path for path in found.values() if path is not None]


def _why_none(folder: Path) -> str:
    if (folder / "adapter_model.safetensors").is_file():
        return "it holds an adapter and no model; name its base model, and the adapter in lora.init_from"
    pickled = sorted(path.name for pattern in _PICKLED for path in folder.glob(pattern))
    if pickled:
        return (
            f"its weights are only there as pickle ({pickled[0]}), which can run code when it is read and is never "
            "opened; save the model as safetensors first, for example with save_pretrained of transformers"
        )
    return f"there are no weights in it, neither {_WHOLE} nor {_INDEX}"


def _check_repeated(name: str, one: Path, other: Path) -> None:
    """Copies that are equal do no harm; of different ones transformers would take the last, whichever that is."""
    from safetensors import safe_open

    with safe_open(str(one), framework="pt") as first, safe_open(str(other), framework="pt") as second:
        same = first.get_slice(name).get_shape() == second.get_slice(name).get_shape()
        same = same and bool(first.get_tensor(name).equal(second.get_tensor(name)))
    if not same:
        raise UserError(f"{one.parent}: {one.name} and {other.name} both hold {name}, with different values; keep one")
