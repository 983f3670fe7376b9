"""Who may import whom: a module imports from its own room or a lower row, never sideways or upwards."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "megatron_srft"

ROWS = [
    {"config", "sample", "distributed", "metrics", "errors", "presence", "deadline"},
    {"ops"},
    {"data", "rewards", "advantages", "objectives", "weights", "hidden_reward"},
    {"rollout", "trainer"},
    {
        "evaluate",
        "analysis",
        "curation",
        "layout",
        "stages",
        "guards",
        "dynamic_sampling",
        "routing",
        "parity_probe",
        "ahead",
    },
    {"saves", "stage_data", "best_of_n", "hidden_stream", "parity_gate", "sampler"},
    {"session", "convert", "doctor", "dry_run"},
    {"train", "model_options", "policy_sources"},
    {"evaluate_command", "generate_command", "best_of_n_command", "data_command", "analyze_command", "reward_command"},
    {"cli"},
]
"""Rooms (modules and folders of the package) from the bottom up."""

ONLY_IN = {"megatron": {"trainer"}, "vllm": {"rollout"}, "ray": set(), "apex": set()}
"""Packages that only these rooms may import, at any depth of the code."""

LATE = {"transformers": {"rollout"}}
"""Packages that other rooms may import only inside a function."""

HEAVY = {"megatron", "vllm", "transformers", "ray"}


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(tree: ast.AST) -> list[str]:
    """Full names of everything imported anywhere below `tree`."""
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide the row"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


def at_import_time(tree: ast.Module) -> list[str]:
    """Like `imports`, without what stands inside functions."""
    names = []
    for node in ast.iter_child_nodes(tree):
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            names += imports(node) if isinstance(node, (ast.Import, ast.ImportFrom)) else at_import_time(node)
    return names


def violations(owner: str, tree: ast.Module) -> list[str]:
    row = {name: number for number, names in enumerate(ROWS) for name in names}
    found = []
    for name in imports(tree):
        top, _, rest = name.partition(".")
        target = rest.partition(".")[0]
        if top == "megatron_srft" and target in row and target != owner and row[target] >= row[owner]:
            found.append(f"{owner} (row {row[owner]}) imports {target} (row {row[target]})")
        if top in ONLY_IN and owner not in ONLY_IN[top]:
            found.append(f"{owner} imports {name}")
    for name in at_import_time(tree):
        top = name.partition(".")[0]
        if top in LATE and owner not in LATE[top]:
            found.append(f"{owner} imports {name} outside a function")
    return found


def modules() -> list[Path]:
    return sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_downwards(path):
    assert room(path) in {name for names in ROWS for name in names}, f"{room(path)} has no row; give it one in ROWS"
    assert violations(room(path), ast.parse(path.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(
    ("owner", "source"),
    [
        ("data", "from megatron_srft.rollout import engine"),  # upwards
        ("data", "from megatron_srft import objectives"),  # sideways
        ("objectives", "def f():\n    import megatron.core"),  # hidden in a function
        ("config", "import megatron_srft.ops.token_logprob"),
        ("weights", "import transformers"),
    ],
)
def test_the_check_catches(owner, source):
    assert len(violations(owner, ast.parse(source))) == 1


def imported_by(*names: str) -> set[str]:
    """Top-level packages in sys.modules of a fresh interpreter that has imported these modules."""
    code = (
        f"import sys\nfor name in {names!r}: __import__(name)\nprint(*(name.partition('.')[0] for name in sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(result.stdout.split())


def test_importing_the_lower_rows_loads_no_engine():
    lower = {name for names in ROWS[:3] for name in names}
    names = sorted("megatron_srft." + ".".join(p.relative_to(PACKAGE).with_suffix("").parts) for p in modules()
                   if room(p) in lower and p.name != "__init__.py")  # fmt: skip
    assert imported_by(*names).isdisjoint(HEAVY)


def test_config_and_the_command_line_load_no_torch():
    loaded = imported_by("megatron_srft.config", "megatron_srft.errors", "megatron_srft.cli")
    assert "pydantic" in loaded
    assert loaded.isdisjoint(HEAVY | {"torch", "numpy", "matplotlib"})
