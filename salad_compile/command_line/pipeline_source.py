"""load_encoders(source): a pipeline of diffusers without its transformers, for encoding clips and captions.

No file runs code: the classes that `model_index.json` names are those of diffusers and transformers, and nothing else.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from salad_compile.command_line.model_source import CONFIG, PIPELINE_INDEX, silence_progress
from salad_compile.common.files import read_json
from salad_compile.common.wrappers import PIPELINE_COMPONENTS
from salad_compile.errors import HubError, MissingPackageError, ModelSourceError
from salad_compile.salad_files.location import is_repository_id

if TYPE_CHECKING:
    import torch

    from salad_compile.latents.statistics import LatentStatistics

_LIBRARIES = ("diffusers", "transformers")
_NEEDED = ("vae", "text_encoder", "tokenizer")


def load_encoders(
    source: str | os.PathLike[str], *, device: torch.device, dtype: torch.dtype | None, tiling: bool = False
) -> tuple[Any, Mapping[str, Any]]:
    """The pipeline, its VAE in float32 and its other models in `dtype`, and the configuration of its transformer.

    Args:
        source: a directory of a pipeline, or a repository on the Hub.
        dtype: None: as stored.
        tiling: let the VAE encode in tiles, which takes less memory.

    Raises:
        ModelSourceError: no pipeline there, or one that cannot be read. HubError: a download broke off.
        MissingPackageError: diffusers or transformers is needed.
    """
    directory = find_pipeline(source)
    index = read_json(directory / PIPELINE_INDEX)
    cls = _pipeline_class(directory, index)
    config = next(
        (read_json(file) for name in PIPELINE_COMPONENTS if (file := directory / name / CONFIG).is_file()), None
    )
    if config is None:
        raise ModelSourceError(f"the pipeline in {directory} has no transformer/{CONFIG}.")
    import torch

    dtypes = {"vae": torch.float32, "default": dtype or torch.float32}
    left_out = {name: None for name in PIPELINE_COMPONENTS if name in index}
    silence_progress()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # diffusers 0.42 has another name for torch_dtype as well
            pipeline = cls.from_pretrained(str(directory), torch_dtype=dtypes, local_files_only=True, **left_out)
    except ImportError as error:
        raise MissingPackageError(f"the encoders of {directory} need a package that is missing: {error}") from error
    except Exception as error:  # of readers of others, which may raise anything
        raise ModelSourceError(
            f"the pipeline in {directory} cannot be read: {type(error).__name__}: {error}"
        ) from error
    pipeline.set_progress_bar_config(disable=True)
    pipeline.to(device)
    if tiling and pipeline.vae is not None:
        pipeline.vae.enable_tiling()
    return pipeline, config


def find_pipeline(source: str | os.PathLike[str]) -> Path:
    """The directory of a pipeline, downloaded if need be, without the weights of its transformers.

    Raises:
        ModelSourceError: there is none. HubError: the download broke off.
    """
    text, path = os.fspath(source), Path(source)
    if path.is_dir():
        if not (path / PIPELINE_INDEX).is_file():
            raise ModelSourceError(
                f"{path} has no {PIPELINE_INDEX}: encoding needs the VAE and text encoders of a whole pipeline."
            )
        return path
    if path.exists() or not is_repository_id(text):
        raise ModelSourceError(f"no pipeline at {text!r}: name its directory, or a Hub repository (owner/name).")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError

    weights = [f"{name}/*.{suffix}" for name in PIPELINE_COMPONENTS for suffix in ("safetensors", "bin")]
    try:
        return Path(snapshot_download(text, ignore_patterns=[*weights, "*.pth", "*.msgpack", "*.onnx", "*.mp4"]))
    except (HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError) as error:
        reason = str(error).splitlines()[0]
        raise ModelSourceError(f"{text!r} is not a directory here, and could not be downloaded: {reason}") from error
    except Exception as error:  # the classes of the HTTP library, which changes between releases of huggingface_hub
        raise HubError(f"the download of {text!r} broke off: {type(error).__name__}: {error}. Try again.") from error


def statistics_of(source: str | os.PathLike[str]) -> LatentStatistics | None:
    """The statistics of the VAE of a pipeline here, of which `source` is the directory, or that of one of its models.

    None: there is no VAE, or one that states none. Nothing is downloaded.

    Raises:
        ConfigError: they do not fit their VAE. ModelSourceError: its weights cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    from salad_compile.latents.encoding.vae import statistics_of_config

    vae = _vae_of(source)
    if vae is None:
        return None
    config = dict(read_json(vae / CONFIG))
    for file in sorted(vae.glob("*.safetensors")):  # LTX-Video has its statistics among the weights
        try:
            with safe_open(file, framework="pt") as content:
                for name in {"latents_mean", "latents_std"} & set(content.keys()):
                    config[name] = content.get_tensor(name).float().tolist()
        except SafetensorError as error:
            raise ModelSourceError(f"{file} is not a complete safetensors file: {error}") from error
    return statistics_of_config(config)


def load_decoder(source: str | os.PathLike[str]) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """A function that decodes normalised latents, (C, T, H, W) -> frames (F, height, width, 3) uint8, on the CPU.

    The VAE is found as by :func:`statistics_of`, and is on the device of the latents only while it decodes. None: there
    is none.

    Raises:
        ModelSourceError: it cannot be read. ConfigError: it does not say how latents are normalised.
    """
    directory = _vae_of(source)
    if directory is None:
        return None
    import diffusers
    import torch

    from salad_compile.latents.encoding.vae import decode_latent, vae_statistics

    name = str(read_json(directory / CONFIG).get("_class_name"))
    cls: Any = getattr(diffusers, name, None) if name.isidentifier() else None
    if not (isinstance(cls, type) and issubclass(cls, diffusers.ModelMixin)):
        raise ModelSourceError(f"{directory / CONFIG} says {name[:80]!r}, no VAE of diffusers {diffusers.__version__}.")
    silence_progress()
    try:
        read: Any = cls.from_pretrained
        vae = read(str(directory), torch_dtype=torch.float32, local_files_only=True)
    except Exception as error:  # of readers of others, which may raise anything
        raise ModelSourceError(f"the VAE in {directory} cannot be read: {type(error).__name__}: {error}") from error
    vae.eval().requires_grad_(False)
    if hasattr(vae, "enable_tiling"):
        vae.enable_tiling()
    statistics = vae_statistics(vae)

    def decode(latent: torch.Tensor) -> torch.Tensor:
        vae.to(latent.device)
        try:
            return decode_latent(vae, statistics, latent)
        finally:
            vae.to("cpu")

    return decode


def _vae_of(source: str | os.PathLike[str]) -> Path | None:
    """The directory of the VAE of a pipeline here, of which `source` is the directory, or that of one of its models."""
    path = Path(source)
    if not path.is_dir():
        return None
    around = path.resolve().parent
    places = (path, path / "vae", *((around / "vae",) if (around / PIPELINE_INDEX).is_file() else ()))
    return next((place for place in places if _is_vae(place)), None)


def _is_vae(directory: Path) -> bool:
    file = directory / CONFIG
    return file.is_file() and str(read_json(file).get("_class_name", "")).startswith("Autoencoder")


def _pipeline_class(directory: Path, index: Mapping[str, Any]) -> Any:
    """The class of a pipeline, and whether all its parts are classes of diffusers and transformers.

    Raises:
        ModelSourceError: they are not. MissingPackageError: diffusers is not installed.
    """
    try:
        import diffusers
    except ImportError as error:
        raise MissingPackageError(
            "encoding needs a pipeline of diffusers, which is not installed: pip install 'salad-compile[clips]'."
        ) from error
    name = index.get("_class_name")
    cls = getattr(diffusers, name, None) if isinstance(name, str) and name.isidentifier() else None
    if not (isinstance(cls, type) and issubclass(cls, diffusers.DiffusionPipeline)):
        raise ModelSourceError(
            f"{directory / PIPELINE_INDEX} says _class_name {str(name)[:80]!r}, which is not a pipeline of diffusers "
            f"{diffusers.__version__}."
        )
    for part, place in index.items():
        if part in _NEEDED and place == [None, None]:
            raise ModelSourceError(f"the pipeline in {directory} has no {part}: encoding needs it.")
        if isinstance(place, list) and place and place[0] not in (*_LIBRARIES, None):
            raise ModelSourceError(
                f"{directory / PIPELINE_INDEX} takes {part!r} from {str(place[0])[:80]!r}: only classes of diffusers "
                "and transformers are imported for a file."
            )
    return cls
