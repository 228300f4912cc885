"""What script/gpu-check must not do to a host that serves already, and how it offers a folder of wheels as an index."""

from __future__ import annotations

import json
from pathlib import Path

import check


def test_an_engine_of_somebody_is_noticed_and_its_own_is_not(tmp_path: Path) -> None:
    for name, model in (("api-server", "/var/lib/models/A--B"), ("api-server-mine", f"{check.MODELS}/text")):
        (tmp_path / f"{name}.json").write_text(json.dumps({"model_path": model}))
    assert check.foreign_engines(tmp_path) == ["api-server"]


def test_a_folder_of_wheels_is_an_index(tmp_path: Path) -> None:
    (tmp_path / "wheels").mkdir()
    wheel = tmp_path / "wheels/Partial_Json.Parser-0.2-py3-none-any.whl"
    wheel.touch()
    url = check.index_of(tmp_path / "wheels", tmp_path / "index")
    assert url == (tmp_path / "index").as_uri()
    assert wheel.as_uri() in (tmp_path / "index/partial-json-parser/index.html").read_text()
