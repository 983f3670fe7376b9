"""Write docs/configuration.md from the fields and docstrings of config/; a test fails when the page is stale."""

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted((ROOT / "megatron_srft" / "config").glob("*.py"))
TARGET = ROOT / "docs" / "configuration.md"

SECTIONS = {
    "": ["RunConfig"],
    "model": ["ModelConfig"],
    "parallel": ["ParallelConfig"],
    "ops": ["OpsConfig"],
    "data": ["DataConfig"],
    "batch": ["BatchConfig"],
    "rollout": ["LocalRolloutConfig", "ReplayRolloutConfig", "VllmRolloutConfig", "VllmServerRolloutConfig"],
    "rollout.partial": ["PartialConfig"],
    "rewards": [
        "MathRewardConfig", "ExactRewardConfig", "JudgeRewardConfig", "FormatRewardConfig", "CosineRewardConfig",
        "LengthRewardConfig", "OverlongRewardConfig", "RepetitionRewardConfig", "FunctionRewardConfig",
        "SwiftRewardConfig",
    ],
    "advantage": ["AdvantageConfig"],
    "objective": [
        "SftConfig", "SftKlConfig", "PsftConfig", "GrpoConfig", "PpoConfig", "LuffyConfig", "SrftConfig",
        "RlSftConfig", "ChordConfig", "HptConfig", "ReliftConfig", "DpoConfig",
    ],
    "kl": ["KlConfig"],
    "critic": ["CriticConfig"],
    "critic.optimizer": ["CriticOptimizerConfig"],
    "optimizer": ["OptimizerConfig"],
    "checkpoint": ["CheckpointConfig"],
    "evaluation": ["EvaluationConfig"],
    "logging": ["LoggingConfig"],
    "parity": ["ParityConfig"],
    "accounting": ["AccountingConfig"],
}  # fmt: skip
"""Key of each section -> its classes; several classes are alternatives told apart by `kind`."""

HEADER = """\
# Configuration

This page is made from the docstrings of `megatron_srft/config/` by `make docs`; edit those.

A run is one YAML file. A value comes from the default below, then the file, then the command line
(`key.path=value`, list items by number as in `rewards.0.weight=2`); the later one wins. Unknown keys, wrong types and
impossible combinations end the command with exit status 2 before anything is built. `--dry-run` checks a file together
with its data, model and layout. The resolved settings of a run are written to `runs/<name>/config.yaml`, which can be
run again.

`objective`, `rollout` and each item of `rewards` have a `kind`; giving another kind (or preset) on the command line
drops what the file says about the old one. `null` in an objective's or the advantage's field means what the chosen
preset publishes; [objectives.md](objectives.md) lists those values.
"""


def source() -> str:
    """The text of all files of the config, as if it were one."""
    return "\n".join(path.read_text(encoding="utf-8") for path in SOURCES)


def docstring_after(body: list[ast.stmt], index: int) -> str:
    """The string that stands behind a field, on one line."""
    follower = body[index + 1] if index + 1 < len(body) else None
    if isinstance(follower, ast.Expr) and isinstance(follower.value, ast.Constant):
        return " ".join(str(follower.value.value).split())
    return ""


def fields(node: ast.ClassDef, classes: dict[str, ast.ClassDef]) -> dict[str, tuple[str, str, str]]:
    """name -> (type, default, docstring), a base class's fields first."""
    found: dict[str, tuple[str, str, str]] = {}
    for base in node.bases:
        found |= fields(classes[ast.unparse(base)], classes)
    for index, statement in enumerate(node.body):
        if isinstance(statement, ast.AnnAssign) and "ClassVar" not in ast.unparse(statement.annotation):
            kind, default = ast.unparse(statement.annotation), statement.value
            text = "" if default is None else ast.unparse(default)
            found[ast.unparse(statement.target)] = (kind, text, docstring_after(node.body, index))
    return found


def yaml_form(default: str) -> str:
    """A Python default as one would write it in YAML."""
    plain = {"None": "null", "True": "true", "False": "false", "()": "[]", "''": '""'}
    if default.startswith("field("):
        return "{}"
    return plain.get(default, default.replace("'", '"'))


def type_form(annotation: str) -> str:
    """A Python type as one would say it: 'int or null', 'list of str', 'a, b or c'."""
    if annotation.endswith(" | None"):
        return type_form(annotation.removesuffix(" | None")) + " or null"
    if annotation.startswith("Literal["):
        *most, last = [str(value) for value in ast.literal_eval(annotation.removeprefix("Literal"))]
        return f"{', '.join(most)} or {last}"
    if annotation.startswith("tuple["):
        inner = annotation.removeprefix("tuple[").removesuffix(", ...]")
        return "list of mappings" if inner.startswith("dict") else f"list of {inner}"
    return {"dict[str, Any]": "mapping"}.get(annotation, annotation.lower())


def table(names: dict[str, tuple[str, str, str]]) -> list[str]:
    lines = ["| key | type | default | meaning |", "|---|---|---|---|"]
    for name, (kind, default, text) in names.items():
        text = text.replace("|", "\\|").replace("<", "&lt;")
        lines.append(f"| `{name}` | {type_form(kind)} | `{yaml_form(default)}` | {text} |")
    return lines


def render(source: str) -> str:
    """The whole page."""
    tree = ast.parse(source)
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    lines = [HEADER]
    for section, names in SECTIONS.items():
        lines += [f"## `{section}`" if section else "## Top level", ""]
        if section == "rewards":
            lines += [
                "A list, by default one item of kind math; the total reward is the weighted sum of its items.",
                "",
            ]
        for name in names:
            content = fields(classes[name], classes)
            kind = content.pop("kind", None)
            if kind is not None and len(names) > 1:
                lines += [f"### `kind: {ast.literal_eval(kind[1])}`", ""]
            elif kind is not None:
                content = {"kind": kind, **content}
            if not section:
                content = {key: value for key, value in content.items() if key not in SECTIONS}
            lines += [*table(content), ""]
        if section == "objective":
            lines += denominators(tree)
    return "\n".join(lines).rstrip() + "\n"


def denominators(tree: ast.Module) -> list[str]:
    """The legend of the type that several objectives share."""
    index = next(i for i, node in enumerate(tree.body) if ast.unparse(node).startswith("Denominator ="))
    text = tree.body[index + 1].value.value
    return ["### `denominator`", "", "```text", text.strip(), "```", ""]


if __name__ == "__main__":
    TARGET.write_text(render(source()), encoding="utf-8")
    print(f"wrote {TARGET.relative_to(ROOT)}")
