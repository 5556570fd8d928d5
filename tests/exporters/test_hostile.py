"""Names from a plan inside shell, YAML, JSON and Python: whatever they are, they stay text."""

from __future__ import annotations

import ast
import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from planner import InputError, estimate
from planner.exporters import EXPORTERS, Export, export_plan
from planner.files import parse_yaml
from tests.exporters.test_ledger import BASE

CANARY = "CANARY"
NAMES = (
    f"$(touch {CANARY})", f"`touch {CANARY}`", f"; touch {CANARY};", f"&& touch {CANARY}", f"| touch {CANARY}", f"\n touch {CANARY}\n",
    f"'; touch {CANARY}; '",
    f'"; touch {CANARY}; "', f"'$(touch {CANARY})'", f'"$(touch {CANARY})"', f"\\'; touch {CANARY} #", "$HOME", "${PATH}", "~root", "*",
    "?", "[a-z]", "a b",
    "a\tb", "", " ", "-rf", "--help", "-", "--", "#", "# comment", "a # b", "a: b", "a:", ": b", "- a", "? a", "! a",
    "!!python/object:os.system", "&a", "*a",
    "{a: b}", "[a, b]", "{{ a }}", "%a", "@a", "|", ">", "on", "no", "yes", "true", "null", "~", "1", "1.5", "1e3", "0x10", "0o7", "1:30",
    "2026-01-01", ".nan",
    "'''", '"""', '\\"', "\\", "\\n", "\x00", "\x1b[2J", "\u2028", "\u202e", "é", "日本", "𝕏", "\ud800", "../../etc/passwd", "/etc/passwd",
    "<RUN_DIR>", "$(HOME)",
    "<script>", f"EOF\ntouch {CANARY}\n", f"name\nrun: touch {CANARY}", f"x\n#SBATCH --wrap='touch {CANARY}'", "a" * 3000, "'\"`$\\",
    "\r\n", "%s%n",
    f"__import__('os').system('touch {CANARY}')", f"'+__import__('os').system('touch {CANARY}')+'",
)  # fmt: skip

FULL = ("slurm", "jobset", "torchtitan", "megatron-lm")
"""Targets that get every name; the others write by the same functions and get every eighth."""
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def request_named(name: str) -> dict[str, Any]:
    """A plan with a name wherever a user's text may stand."""
    training = BASE["training"] | {"data": name or "x", "init_from": name or "x"}
    return BASE | {"model": BASE["model"] | {"name": name, name: name} | BASE["model"] | {"name": name}, "training": training}


@pytest.fixture(scope="module")
def found() -> dict[tuple[str, str], Export]:
    """Every target's files for every name; launchers around reftrain."""
    exports: dict[tuple[str, str], Export] = {}
    for i, name in enumerate(("plain", *NAMES)):
        try:
            plan = estimate(request_named(name))
            exports |= {(target, name): export_plan(plan, target) for target in EXPORTERS if target in FULL or i % 8 == 0}
        except InputError:
            assert name != "plain"  # half a surrogate pair, say
    return exports


def test_enough_names_get_this_far(found: dict[tuple[str, str], Export]) -> None:
    assert len(NAMES) >= 50
    assert len({name for target, name in found if target == "slurm"}) >= 50


def shape(value: Any) -> Any:
    """Structure with text and numbers hidden: what an injection would change. Keys of the model are a user's too."""
    if isinstance(value, dict):
        return {key: shape(item) for key, item in value.items() if key not in ("model", "data", "provenance", "prediction")}
    return [shape(item) for item in value] if isinstance(value, list) else type(value).__name__


def test_yaml_keeps_its_shape_in_both_dialects(found: dict[tuple[str, str], Export]) -> None:
    for (target, name), export in found.items():
        for file, text in export.files.items():
            if file.endswith((".yaml", ".yml")):
                plain = found[target, "plain"].files[file]
                assert [shape(d) for d in yaml.load_all(text, LOADER)] == [shape(d) for d in yaml.load_all(plain, LOADER)], (target, name)
                for document in text.split("\n---\n"):
                    assert file == "plan.yaml" or parse_yaml(document) == yaml.load(document, LOADER), (target, name)


def test_python_keeps_its_shape(found: dict[tuple[str, str], Export]) -> None:
    plain = ast.dump(ast.parse(found["torchtitan", "plain"].files["plan_recipe.py"]))
    for (target, name), export in found.items():
        if target == "torchtitan":
            assert ast.dump(ast.parse(export.files["plan_recipe.py"])) == plain, name


def test_json_is_json(found: dict[tuple[str, str], Export]) -> None:
    for export in found.values():
        for file, text in export.files.items():
            if file.endswith(".json"):
                assert isinstance(json.loads(text), dict)


def test_scripts_run_as_if_the_name_were_plain(found: dict[tuple[str, str], Export], tmp_path: Path) -> None:
    """Each script is run, with programs in place of torchrun, srun and scontrol that print what they are given."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("torchrun", "srun", "scontrol"):
        (programs / name).write_text('#!/bin/sh\nprintf "%s|" "$0" "$@"\n')
        (programs / name).chmod(0o755)
    environment = {"PATH": f"{programs}:/usr/bin:/bin", "SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_JOB_NODELIST": "n1", "SLURM_JOB_ID": "7"}
    outputs: dict[str, set[str]] = {}
    for (target, _), export in found.items():
        for file in ("run.sh", "run.sbatch", "megatron_args.sh"):
            if file in export.files:
                text = re.sub("<([A-Z_]+)>", r"\1", export.files[file])
                (tmp_path / file).write_text(text)
                assert subprocess.run(["bash", "-n", str(tmp_path / file)], capture_output=True).returncode == 0
                done = subprocess.run(["bash", str(tmp_path / file)], capture_output=True, text=True, env=environment, cwd=tmp_path)
                outputs.setdefault(f"{target} {file}", set()).add(done.stdout)
    assert set(outputs) == {"torchrun run.sh", "slurm run.sbatch", "megatron-lm megatron_args.sh"}
    assert all(len(texts) == 1 for texts in outputs.values()), "a name changed what is run"
    assert not list(tmp_path.rglob(CANARY))


STRICT = {"ACCOUNT": "slurm", "PARTITION": "slurm", "IMAGE": "jobset", "PVC": "jobset", "KUEUE_QUEUE": "trainjob"}


def test_fills_stay_words(tmp_path: Path) -> None:
    """What the user fills in reaches torchrun as one word each, or is refused."""
    (tmp_path / "torchrun").write_text('#!/bin/sh\nprintf "%s\\0" "$@"\n')
    (tmp_path / "torchrun").chmod(0o755)
    plan, kept = estimate(BASE), 0
    for name in NAMES:
        fills = dict.fromkeys(("RUN_DIR", "MEGATRON_DIR", "DATA_PATH", "TOKENIZER"), name)
        try:
            script = export_plan(plan, "torchrun", trainer="megatron-lm", fills=fills).files["run.sh"]
        except InputError:
            continue
        (tmp_path / "run.sh").write_text(script)
        done = subprocess.run(["bash", str(tmp_path / "run.sh")], capture_output=True, env={"PATH": f"{tmp_path}:/usr/bin:/bin"}, cwd=tmp_path)
        if "<" in name:  # looks like a placeholder that was left open
            continue
        words = done.stdout.decode().split("\0")
        assert words[words.index("--data-path") + 1] == name
        assert words[words.index("--save") + 1] == name
        kept += 1
    assert kept >= 40
    assert not list(tmp_path.rglob(CANARY))


@pytest.mark.parametrize("placeholder", list(STRICT))
def test_fills_of_directives_are_names_only(placeholder: str) -> None:
    plan = estimate(BASE)
    taken = []
    for name in NAMES:
        try:
            export_plan(plan, STRICT[placeholder], fills={placeholder: name})
            taken.append(name)
        except InputError:
            pass
    assert all(name.replace("-", "").replace(".", "").replace(":", "").isalnum() for name in taken), taken
