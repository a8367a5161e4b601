"""push_to_hub with a stand-in for the Hub: what it asks for, and what becomes of refusals."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import salad_compile
from salad_compile.errors import ConfigError, HubError
from tests.models.zoo import CASES
from tests.support import converted


class Hub:
    """What huggingface_hub.HfApi would be asked."""

    calls: list[tuple[str, dict[str, Any]]]
    failure: Exception | None

    def __init__(self, token: str | None = None) -> None:
        type(self).calls.append(("token", {"token": token}))

    def create_repo(self, repo_id: str, **options: Any) -> None:
        type(self).calls.append(("create", {"repo_id": repo_id, **options}))

    def upload_folder(self, **options: Any) -> Any:
        if type(self).failure is not None:
            raise type(self).failure
        type(self).calls.append(("upload", options))
        return SimpleNamespace(commit_url="https://huggingface.co/me/wan-salad/commit/1")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> type[Hub]:
    Hub.calls, Hub.failure = [], None
    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    return Hub


def test_an_export_is_uploaded_in_one_commit(hub: type[Hub], tmp_path: Path) -> None:
    out = tmp_path / "out"
    salad_compile.export(converted(CASES["handwritten_fused"]), out, "salad")
    url = salad_compile.push_to_hub(out, "me/wan-salad", private=True, token="secret")
    assert url.endswith("commit/1")
    assert hub.calls == [
        ("token", {"token": "secret"}),
        ("create", {"repo_id": "me/wan-salad", "private": True, "exist_ok": True}),
        ("upload", {"repo_id": "me/wan-salad", "folder_path": out, "commit_message": "Export of salad_compile"}),
    ]
    hub.failure = ConnectionResetError("peer")
    with pytest.raises(HubError, match=r"me/wan-salad.*ConnectionResetError: peer"):
        salad_compile.push_to_hub(out, "me/wan-salad")


def test_only_an_export_is_uploaded(hub: type[Hub], tmp_path: Path) -> None:
    (tmp_path / "secrets.txt").write_text("mine")
    with pytest.raises(ConfigError, match="holds no export"):
        salad_compile.push_to_hub(tmp_path, "me/wan-salad")
    assert hub.calls == []
