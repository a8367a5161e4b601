"""load_model(source): the module of a command line's MODEL, with its weights, with random ones or with none.

A source is one of

    a directory of diffusers' save_pretrained     config.json with _class_name, beside the weights
    a directory of a pipeline                     model_index.json; `component` says which of its models
    a JSON file                                   a configuration alone; its _class_name or `class_name` says the class
    module:Class or file.py:Class                 a class of one's own; `config` is a JSON file of its arguments
    owner/name                                    a repository on the Hugging Face Hub, in one of the first two forms

No file runs code: _class_name is the name of a model of diffusers and nothing else. Only what the caller names himself,
as the source or as `class_name`, is imported.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from salad_compile.command_line.bounded_building import bounded_building, first_impossible
from salad_compile.command_line.weight_files import WEIGHTS, require_own_files, stored_dtype
from salad_compile.common.files import read_json
from salad_compile.common.logs import logger
from salad_compile.errors import HubError, MissingPackageError, ModelSourceError, did_you_mean
from salad_compile.salad_files.location import is_repository_id

if TYPE_CHECKING:
    import torch
    import torch.nn as nn

CONFIG, PIPELINE_INDEX = "config.json", "model_index.json"
RANDOM_SEED = 0  # the same random model at every call, so that what was exported for one fits the next


@dataclass(frozen=True)
class ModelSource:
    """Class, configuration and weights of a source.

    Attributes:
        make_class: imports and returns the class. name: what messages call the model.
        config: arguments of the class; for diffusers the content of config.json.
        directory: where the weights lie, or None.
    """

    name: str
    make_class: Callable[[], Any]
    config: Mapping[str, Any]
    directory: Path | None

    @property
    def has_weights(self) -> bool:
        """Whether a file of weights lies beside the configuration."""
        return self.directory is not None and any(any(self.directory.glob(glob)) for glob in WEIGHTS)


def load_model(
    source: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    random: bool = False,
    meta: bool = False,
    component: str = "transformer",
    class_name: str | None = None,
    config: str | os.PathLike[str] | None = None,
    weights: str | os.PathLike[str] | None = None,
) -> nn.Module:
    """The model of `source`, on the CPU, in eval mode.

    Args:
        source: see the top of this file.
        dtype: of the parameters. None: as the weights are stored, float32 without weights.
        random: random weights, always the same, instead of stored ones.
        meta: no weights at all: parameters are on the meta device, and nothing but JSON is read.
        component: which model of a pipeline.
        class_name: the class, where a configuration does not say it: a name of diffusers or `module:Class`.
        config: a JSON file with the arguments of a class of one's own.
        weights: a safetensors file with the state dict of a class of one's own.

    Raises:
        ModelSourceError: no such source, no class, arguments that do not fit, no weights. ConfigError: a file is not a
        JSON object. FileNotFoundError: no such file. MissingPackageError: diffusers is needed. HubError: a download
        broke off.
    """
    found = find_model(source, component=component, class_name=class_name, config=config, with_weights=not meta)
    cls = found.make_class()
    if meta or random:
        model = _build(cls, found, dtype, meta=meta)
    elif weights is not None:
        model = _fill(_build(cls, found, dtype), Path(weights))
    elif hasattr(cls, "from_pretrained") and found.has_weights:
        model = _from_pretrained(cls, found, dtype)
    else:
        raise ModelSourceError(
            f"{found.name} has no weights"
            + (f": no {' or '.join(WEIGHTS)} in {found.directory}. " if found.directory else ". ")
            + "Ask for random ones (--random), or name a directory that holds weights"
            + (" beside its config.json." if hasattr(cls, "from_pretrained") else " (--weights file.safetensors).")
        )
    return model.eval()


def find_model(
    source: str | os.PathLike[str],
    *,
    component: str = "transformer",
    class_name: str | None = None,
    config: str | os.PathLike[str] | None = None,
    with_weights: bool = True,
) -> ModelSource:
    """Class, configuration and place of a model; nothing is built, and no weight is read.

    Args:
        with_weights: of a Hub repository, download weights too, not only JSON.

    Raises:
        ModelSourceError, ConfigError, FileNotFoundError: see :func:`load_model`.
    """
    text, path = os.fspath(source), Path(source)
    if path.is_dir():
        return _in_directory(path, component, class_name)
    if path.is_file():
        if path.suffix != ".json":
            raise ModelSourceError(
                f"{path} is not a configuration: name a .json file, or the directory of a checkpoint."
            )
        return _of_config(read_json(path), str(path), class_name)
    if ":" in text:
        given = {} if config is None else read_json(Path(config))
        return ModelSource(text, lambda: _own_class(text), given, None)
    if is_repository_id(text):
        return _in_directory(_download(text, component, with_weights), component, class_name)
    raise ModelSourceError(
        f"no model at {text!r}: there is no such file or directory. Name a diffusers checkpoint or pipeline directory, "
        "a config.json, module:Class, or a Hub repository (owner/name)."
    )


def pipeline_components(source: str | os.PathLike[str]) -> list[str]:
    """The models of a pipeline directory that can be converted, in order; [] for every other source."""
    from salad_compile.common.wrappers import PIPELINE_COMPONENTS

    index = Path(source) / PIPELINE_INDEX
    if not index.is_file():
        return []
    return [name for name in PIPELINE_COMPONENTS if _has_component(read_json(index), name)]


def import_name(reference: str) -> Any:
    """What `module:name` or `file.py:name` refers to; the working directory comes first in the search.

    Raises:
        ModelSourceError: the module cannot be imported, or has no such name.
    """
    place, _, name = reference.rpartition(":")
    if not place or not name:
        raise ModelSourceError(f"{reference!r} names nothing that can be imported: write module:Name or file.py:Name.")
    try:
        module = _module_of_file(Path(place)) if place.endswith(".py") else _module(place)
    except (KeyboardInterrupt, FileNotFoundError):
        raise
    except Exception as error:  # a module of the user, which may raise anything
        raise ModelSourceError(f"{place!r} cannot be imported: {type(error).__name__}: {error}") from error
    if not hasattr(module, name):
        raise ModelSourceError(f"{place!r} has no {name!r}.{did_you_mean(name, vars(module))}")
    return getattr(module, name)


# --- finding ----------------------------------------------------------------------------------------------------------


def _in_directory(path: Path, component: str, class_name: str | None) -> ModelSource:
    if (path / PIPELINE_INDEX).is_file():
        index = read_json(path / PIPELINE_INDEX)
        if not _has_component(index, component):
            there = ", ".join(pipeline_components(path)) or "no transformer"
            raise ModelSourceError(f"the pipeline in {path} has no {component!r}; it has {there}.")
        path = path / component
    if not (path / CONFIG).is_file():
        raise ModelSourceError(
            f"{path} has no {CONFIG}: it is not what diffusers' save_pretrained writes. Name the directory that holds "
            f"{CONFIG}, or that of a whole pipeline, which holds {PIPELINE_INDEX}."
        )
    found = _of_config(read_json(path / CONFIG), str(path), class_name)
    return ModelSource(found.name, found.make_class, found.config, path)


def _has_component(index: Mapping[str, Any], name: str) -> bool:
    listed = index.get(name)  # Wan 2.1 lists its second expert as [null, null]
    return isinstance(listed, list) and bool(listed) and listed[0] is not None


def _of_config(values: Mapping[str, Any], name: str, class_name: str | None) -> ModelSource:
    if impossible := first_impossible(values):
        raise ModelSourceError(f"{name} says {impossible}, which is no size that a model has.")
    if class_name is not None and ":" in class_name:
        logger.warning("--class %s: the code of %s runs", class_name, class_name.rpartition(":")[0])
        own = {key: value for key, value in values.items() if not key.startswith("_")}
        return ModelSource(name, lambda: _own_class(class_name), own, None)
    stated = class_name or values.get("_class_name")
    if not isinstance(stated, str):
        raise ModelSourceError(
            f"{name} does not say which class it configures (no _class_name): name it, --class WanTransformer3DModel "
            "or --class module:Class."
        )
    if not stated.isidentifier():  # a file, perhaps a downloaded one, must not choose what is imported
        raise ModelSourceError(
            f"{name} says _class_name {stated[:80]!r}, which is no model of diffusers: nothing else is imported "
            "for a file. If you trust that code, name it yourself: --class module:Class."
        )
    return ModelSource(name, lambda: _diffusers_class(stated), values, None)


def _own_class(reference: str) -> Any:
    """A class that the caller names.

    Raises:
        ModelSourceError: it cannot be imported, or is no module of torch.
    """
    import torch.nn as nn

    cls = import_name(reference)
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise ModelSourceError(f"{reference!r} is {cls!r:.80}, and not a class of models (torch.nn.Module).")
    return cls


def _diffusers_class(name: str) -> Any:
    try:
        import diffusers
    except ImportError as error:
        raise MissingPackageError(
            f"{name} is a class of diffusers, which is not installed: pip install 'salad-compile[diffusers]'."
        ) from error
    cls = getattr(diffusers, name, None)
    if not (isinstance(cls, type) and issubclass(cls, diffusers.ModelMixin)):
        hint = did_you_mean(name, (known for known in dir(diffusers) if known.endswith("Model")))
        raise ModelSourceError(f"diffusers {diffusers.__version__} has no model class {name!r}.{hint}")
    return cls


def _download(name: str, component: str, with_weights: bool) -> Path:
    """The part of a Hub repository that one model needs, in the Hub's cache."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        index = Path(snapshot_download(name, allow_patterns=[PIPELINE_INDEX, CONFIG]))
        folder = f"{component}/" if (index / PIPELINE_INDEX).is_file() else ""
        kinds = ("*.json", "*.safetensors") if with_weights else ("*.json",)
        return Path(snapshot_download(name, allow_patterns=[PIPELINE_INDEX, *(folder + kind for kind in kinds)]))
    except (HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError) as error:
        reason = str(error).splitlines()[0]
        raise ModelSourceError(
            f"{name!r} is neither a file nor a directory here, and no such repository could be downloaded: {reason}"
        ) from error
    except Exception as error:  # the classes of the HTTP library, which changes between releases of huggingface_hub
        raise HubError(f"the download of {name!r} broke off: {type(error).__name__}: {error}. Try again.") from error


def _module(name: str) -> Any:
    with _importable_from(Path.cwd()):
        return importlib.import_module(name)


def _module_of_file(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(path.stem, module)  # dataclasses and pickle look their module up
    with _importable_from(path.parent.resolve()):
        spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def _importable_from(directory: Path) -> Iterator[None]:
    sys.path.insert(0, str(directory))
    try:
        yield
    finally:
        sys.path.remove(str(directory))


# --- building ---------------------------------------------------------------------------------------------------------


def _build(cls: Any, found: ModelSource, dtype: torch.dtype | None, *, meta: bool = False) -> nn.Module:
    """The model with weights as its class initialises them, or with none."""
    import torch
    import torch.nn as nn

    device = torch.device("meta") if meta else torch.device("cpu")
    with torch.random.fork_rng(devices=[]), device, bounded_building():
        torch.manual_seed(RANDOM_SEED)
        try:
            model = cls.from_config(dict(found.config)) if hasattr(cls, "from_config") else cls(**found.config)
        except Exception as error:  # a constructor of others, which may raise anything
            raise ModelSourceError(
                f"{getattr(cls, '__name__', cls)} cannot be built from the configuration of {found.name}: "
                f"{type(error).__name__}: {error}" + (" (without memory; does it work with --random?)" if meta else "")
            ) from error
    if not isinstance(model, nn.Module):
        raise ModelSourceError(f"{found.name} makes a {type(model).__name__}, which is not a torch.nn.Module.")
    # not model.to: that of diffusers warns about modules that from_pretrained would have kept in float32
    return nn.Module.to(model, dtype)


def _from_pretrained(cls: Any, found: ModelSource, dtype: torch.dtype | None) -> nn.Module:
    import torch
    from safetensors import SafetensorError

    silence_progress()
    assert found.directory is not None
    require_own_files(found.directory)
    dtype = dtype or stored_dtype(found.directory) or torch.float32
    try:
        with bounded_building():
            model: nn.Module = cls.from_pretrained(str(found.directory), torch_dtype=dtype)
    except (OSError, ValueError, RuntimeError, LookupError, TypeError, AttributeError, SafetensorError) as error:
        raise ModelSourceError(f"the weights of {found.name} cannot be read: {error}") from error
    missing = [name for name, tensor in model.state_dict().items() if tensor.is_meta]
    if missing:  # diffusers warns, and leaves them without values
        raise ModelSourceError(f"the weights of {found.name} lack {missing[0]!r} and {len(missing) - 1} more: a shard?")
    return model


def silence_progress() -> None:
    """Bars of loading belong on terminals only."""
    if not sys.stderr.isatty():
        for library in ("diffusers", "transformers"):
            with contextlib.suppress(ImportError):
                importlib.import_module(f"{library}.utils.logging").disable_progress_bar()


def _fill(model: nn.Module, file: Path) -> nn.Module:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not file.is_file():
        raise FileNotFoundError(f"no weights at {file}")
    try:
        model.load_state_dict(load_file(file))
    except SafetensorError as error:
        raise ModelSourceError(f"{file} is not a complete safetensors file: {error}") from error
    except RuntimeError as error:
        raise ModelSourceError(f"{file} does not fit {type(model).__name__}: {error}") from error
    return model
