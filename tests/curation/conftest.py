"""A model folder, an endpoint, and the command line with its output, for the data tools."""

import json
from pathlib import Path

import pytest
from chat_endpoint import Endpoint
from tiny_models import make_model

from megatron_srft import cli


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> Path:
    return make_model("qwen2", tmp_path_factory.mktemp("curation") / "model", tied=True)


@pytest.fixture
def endpoint():
    server = Endpoint()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def write(tmp_path):
    """write(name, rows): a JSONL file of these rows."""

    def write(name: str, rows: list[dict]) -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path

    return write


@pytest.fixture
def data(capsys):
    """data(tool, option, ...): exit status, standard output and standard error of the command."""

    def data(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        try:
            status = cli.main(["data", *map(str, arguments)])
        except SystemExit as ended:
            status = ended.code
        return status, *capsys.readouterr()

    return data
