"""The rules of the house that a machine can check: one-way imports, bans, sizes, names, light imports, a pinned interface."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import planner

ROOT = Path(planner.__file__).parent
LEVELS: dict[str, int] = {
    **dict.fromkeys(("arrays", "units", "errors", "registry", "files", "spec", "catalog_files", "workers"), 0),
    **dict.fromkeys(("precision", "optimizers", "model_spec", "workload", "layout", "curves", "hardware", "coefficients"), 1),
    **dict.fromkeys(("op_cost", "attention_op", "collective_op", "loss_op", "ops", "collectives", "layout_rules"), 2),
    "architectures": 3,
    "run_files": 1,
    "stack": 2,
    "efficiency": 3,  # it prices an OpCost
    **dict.fromkeys(("schedules", "graph"), 4),
    **dict.fromkeys(("states", "sharding", "backward", "framework_buffers", "part_memory", "pipeline_buffers", "stage_memory", "memory"), 5),
    **dict.fromkeys(("step_work", "nearby", "timing"), 5),
    **dict.fromkeys(("economics", "scaling_laws"), 6),
    **dict.fromkeys(("plan", "options", "resolve", "layout_grid", "pricing", "layout_space", "best_layouts", "assemble"), 7),
    "estimate": 8,
    **dict.fromkeys(("listing", "explain", "explanations", "compare", "peaks", "remedies", "validation", "calibration", "measurements", "report"), 9),
    **dict.fromkeys(("exporters", "importers", "fitting", "cases", "stack_fits", "measured_models", "measured_requests", "summaries"), 9),
    **dict.fromkeys(("measured_values", "ranking", "step_trace"), 9),
    **dict.fromkeys(("hardware_options", "advice", "points", "reasons", "search", "sensitivity", "sweep"), 9),
    **dict.fromkeys(("cli", "cli_export", "cli_options", "cli_calibrate", "cli_trace", "__main__"), 10),
    **dict.fromkeys(("cli_advise", "cli_search", "cli_sensitivity"), 10),
}  # fmt: skip
"""What a file may import: its own level and below. A new file needs a place in this list."""
BANNED = {"torch", "streamlit", "requests", "httpx", "urllib", "socket", "http", "ftplib", "pickle", "reftrain", "transformers"}
MAX_FILE_LINES, MAX_FUNCTION_LINES = 400, 60
FILES = sorted(ROOT.rglob("*.py"))
UNIT_SUFFIX = re.compile(
    r"(^|_)(s|bytes|flops|bytes_per_s|flops_per_s|usd|usd_per_hour|usd_per_device_hour|watts|tokens|fraction|hours|kwh|kg|params|per_token"
    r"|per_token_causal|per_device|range|factor|exponent|dropout)\Z"
)
DIMENSIONLESS = {
    "base", "loss", "loss_low", "loss_high",
    "value", "low", "high", "mfu", "hfu", "mfu_causal", "tokens_per_s", "tokens_per_s_per_device", "total", "irreducible", "tokens", "share",
    "rope_theta", "usd", "software_year", "last_year", "distance", "spearman", "judged_spread", "left_out_spread",
    "mean_spearman",
}  # fmt: skip
"""Float fields that carry their unit elsewhere: intervals and coefficients, ratios, counts of tokens."""


def module_of(path: Path) -> str:
    """First part of a module's name below `planner`."""
    relative = path.relative_to(ROOT)
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


def imports(tree: ast.AST) -> Iterator[str]:
    """Dotted names of everything imported, anywhere in the file, but for type checkers only."""
    typing_only = {id(n) for node in ast.walk(tree) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test) for n in ast.walk(node)}
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_one_way(path: Path) -> None:
    tree = ast.parse(path.read_text())
    own = module_of(path)
    if own != "__init__":
        assert own in LEVELS, f"{own} has no level: add it to LEVELS and to docs/decisions"
    for name in imports(tree):
        top = name.split(".")[0]
        assert top not in BANNED, f"{path.name} imports {name}"
        if top == "planner" and "." in name and own != "__init__":
            other = name.split(".")[1]
            assert LEVELS[other] <= LEVELS[own], f"{own} (level {LEVELS[own]}) imports {other} (level {LEVELS[other]})"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_and_functions_are_short(path: Path) -> None:
    text = path.read_text()
    assert text.count("\n") <= MAX_FILE_LINES
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef) and node.end_lineno is not None and not (path.name == "cli.py" and node.name == "estimate"):
            assert node.end_lineno - node.lineno <= MAX_FUNCTION_LINES, node.name


def test_the_main_path_is_at_most_60_lines() -> None:
    assert (ROOT / "estimate.py").read_text().count("\n") <= 60


@pytest.mark.parametrize("path", [p for p in FILES if not p.name.startswith(("cli", "__main__"))], ids=lambda p: str(p.relative_to(ROOT)))
def test_only_the_command_line_prints_or_exits(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in {"print", "sys.exit", "exit", "quit", "os._exit", "sys.stdout.write", "sys.stderr.write"}, (
                f"{path.name}:{node.lineno}"
            )
    assert "typer" not in set(imports(ast.parse(path.read_text())))


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_float_fields_carry_their_unit(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.ClassDef):
            continue
        for field in node.body:
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and ast.unparse(field.annotation) in ("float", "float | None"):
                name = field.target.id
                ends = UNIT_SUFFIX.search(name) or name in DIMENSIONLESS or name.startswith(("num_", "reads", "writes", "tokens_scale"))
                assert ends or node.name in (
                    "Numerics",
                    "Precision",
                    "StateFormat",
                    "Optimizer",
                    "LossLaw",
                    "Linear",
                    "Elementwise",
                    "Embedding",
                    "Norm",
                    "Loss",
                    "Collective",
                ), name


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_examples_are_found_by_doctest(path: Path) -> None:
    """A prompt that follows other text on its line is never run."""
    hidden = [line for line in path.read_text().splitlines() if re.search(r"^\s*[A-Za-z].*:\s*>>> ", line)]
    assert not hidden, hidden


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout


HEAVY = ("pandas", "scipy", "torch", "streamlit", "matplotlib", "transformers", "jinja2")


@pytest.mark.parametrize(
    "argv",
    [["--help"], ["estimate", "--help"], ["estimate", "--model", "llama-3.1-8b", "--accelerator", "h100", "--num-devices", "8", "--tokens", "1T"]],
    ids=["help", "estimate help", "estimate"],
)
def test_heavy_packages_are_never_imported(argv: list[str]) -> None:
    code = f"import sys; sys.argv = ['planner', *{argv!r}]\nfrom planner.cli import main\ntry:\n    main()\nexcept SystemExit:\n    pass\n"
    out = run_python(code + f"print('LOADED', [m for m in {HEAVY!r} if m in sys.modules])")
    assert out.strip().endswith("LOADED []")


def test_help_needs_neither_numpy_nor_pydantic() -> None:
    code = "import sys; sys.argv = ['planner', '--help']\nfrom planner.cli import main\ntry:\n    main()\nexcept SystemExit:\n    pass\n"
    assert run_python(code + "print('LOADED', [m for m in ('numpy', 'pydantic', 'yaml') if m in sys.modules])").strip().endswith("LOADED []")


def test_import_planner_does_no_work() -> None:
    out = run_python("import sys, planner; print([m for m in ('numpy', 'pydantic', 'yaml', 'typer') if m in sys.modules])")
    assert out.strip() == "[]"


def test_public_interface_is_pinned() -> None:
    assert planner.__all__ == [
        "InfeasibleError", "InputError", "MissingPieceError", "Plan", "PlannerError", "Problem", "Request", "build_request", "compare", "estimate",
        "explain", "load_plan",
    ]  # fmt: skip
    for name in planner.__all__:
        assert getattr(planner, name).__module__.startswith("planner."), name
        assert getattr(planner, name).__doc__, name


def test_the_function_hides_the_file_of_the_same_name() -> None:
    out = run_python("import planner.estimate\nfrom planner import estimate\nprint(callable(estimate), callable(planner.estimate))")
    assert out.strip() == "True True"
