"""Documentation that a program can check: the generated page, links, commands, example configs."""

import ast
import re
import runpy
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml

from megatron_srft import cli
from megatron_srft.config import from_dict, load

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/*.md"), *ROOT.glob("examples/**/*.md")])
CONFIGS = sorted(ROOT.glob("examples/**/*.yaml"))
config_docs = runpy.run_path(str(ROOT / "tools" / "config_docs.py"))


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_configuration_page_is_fresh():
    rendered = config_docs["render"](config_docs["source"]())
    assert (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8") == rendered, "run `make docs`"


def test_every_config_class_is_on_the_page_and_every_field_has_a_docstring():
    tree = ast.parse(config_docs["source"]())
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef) and node.decorator_list}
    shown = {cls for names in config_docs["SECTIONS"].values() for cls in names}
    bases = {"SamplingConfig", "StreamConfig", "SurrogateConfig", "VerifierConfig"}
    assert set(classes) - shown == bases
    silent = [
        f"{cls}.{field}"
        for cls, node in classes.items()
        for field, (_, _, text) in config_docs["fields"](node, classes).items()
        if not text and field != "kind" and field not in config_docs["SECTIONS"]
    ]
    assert silent == []


@pytest.mark.parametrize("path", CONFIGS, ids=name)
def test_example_configs_load(path):
    load(path)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_configs_shown_load(page):
    shown = re.findall(r"^```yaml\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    for block in shown:
        from_dict(yaml.safe_load(block)).stage_configs()


def test_there_are_example_configs():
    assert ROOT / "examples" / "arithmetic" / "config.yaml" in CONFIGS


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page):
    targets = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
    dead = [t for t in targets if "://" not in t and not (page.parent / t).exists()]
    assert dead == []


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_files_named_in_the_text_exist(page):
    """`megatron_srft/...`, `tools/...` and the like in backticks are files or folders of this repository."""
    text = page.read_text(encoding="utf-8")
    named = re.findall(r"`((?:megatron_srft|tools|tests|examples|docs|requirements|benchmarks)/[\w./-]*)`", text)
    made_by_running = ("examples/arithmetic/data", "examples/arithmetic/base")
    dead = [path for path in named if not (ROOT / path).exists() and not path.startswith(made_by_running)]
    assert dead == []


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_commands_shown_exist(page):
    text = page.read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert set(re.findall(r"`make ([a-z-]+)", text)) | set(re.findall(r"^make ([a-z-]+)", text, re.M)) <= targets
    assert set(re.findall(r"megatron-srft ([a-z-]+)", text)) <= set(cli.COMMANDS)


def test_the_first_command_stands_at_the_top_of_the_readme():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert next(number for number, line in enumerate(lines, 1) if line.startswith("make ")) < 40


def test_the_readme_tree_names_every_module():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    rooms = [p.name for p in (ROOT / "megatron_srft").iterdir() if not p.name.startswith("_")]
    assert [room for room in rooms if room not in text] == []


def test_requirements_pin_every_dependency():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    pinned = "".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "requirements").glob("*.txt")))
    exact = {re.sub(r"[-_.]+", "-", n).lower() for n in re.findall(r"^([\w.-]+)==", pinned, re.MULTILINE)}
    needed = {re.split(r"[<>=! ;\[]", d, maxsplit=1)[0].lower() for d in project["dependencies"]}
    assert needed - exact == set()


def test_no_committed_file_names_the_folder_it_was_written_in():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git clone")
    here = re.compile(rf"(?<![\w.]){re.escape(str(ROOT))}(?![\w.-])")
    paths = [ROOT / line for line in listed.stdout.splitlines()]
    assert [name(path) for path in paths if path.is_file() and here.search(path.read_text("utf-8", "replace"))] == []
