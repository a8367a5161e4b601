"""push_to_hub: an export as a repository on the Hugging Face Hub."""

from __future__ import annotations

import os

from salad_compile.common.paths import as_path
from salad_compile.errors import ConfigError, HubError
from salad_compile.exchange.export_directory import HEADER_COPY


def push_to_hub(
    directory: str | os.PathLike[str],
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    message: str = "Export of salad_compile",
) -> str:
    """Upload what :func:`salad_compile.export` wrote, in one commit.

    Args:
        directory: of the export. repo_id: "name/repository", made if it does not exist.
        private: of a repository that is made now; None: as the account has it.
        token: None: as huggingface_hub finds it. message: of the commit.

    Returns:
        The address of the commit.

    Raises:
        ConfigError: the directory holds no export. HubError: the Hub refused or the transfer broke off; the directory
        is as it was, and files that were complete are not sent again.
    """
    folder = as_path(directory)
    if not (folder / HEADER_COPY).is_file():
        raise ConfigError(f"{folder} holds no export (no {HEADER_COPY}): write one with salad_compile.export.")
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        return str(api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=message).commit_url)
    except Exception as error:  # the classes of the HTTP library, which changes between releases of huggingface_hub
        raise HubError(f"{folder} could not be pushed to {repo_id!r}: {type(error).__name__}: {error}") from error
