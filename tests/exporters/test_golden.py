"""Every target's files for two plans, as they were looked at by eye and by the targets' own parsers.

`python -m tests.exporters.test_golden` writes them anew; look at the difference before committing it.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from planner import InputError, estimate
from planner.exporters import EXPORTERS, export_plan
from tests.exporters.test_ledger import BASE, MIXED

FOLDER = Path(__file__).resolve().parent.parent / "golden" / "exports"
PLANS = {"sharded": BASE, "pipeline": MIXED}


def plain(text: str) -> str:
    """Without what changes by itself: version, hash and date of the header, and the predictions."""
    text = re.sub(r"planner [^ ]+, plan [0-9a-f]{12}, for ([^,]+), \d{4}-\d\d-\d\d", r"planner VERSION, plan HASH, for \1, DATE", text)
    text = re.sub(r"predicted: peak [\d.,]+ GiB, [\d,]+ tok/s/device", "predicted: PEAK, RATE", text)
    text = re.sub(r"#SBATCH --time=\S+", "#SBATCH --time=TIME", text)
    # The ConfigMap holds the plan file, and it the predictions.
    return re.sub(r"(?m)^    (prediction|provenance):.*(\n      .*)*", r"    \1: ...", text)


def rendered(target: str, name: str) -> str:
    """All files of one export, or why it is refused."""
    try:
        found = export_plan(estimate(PLANS[name]), target)
    except InputError as error:
        return f"refused\n{error}\n"
    files = "".join(f"==> {file} <==\n{plain(text)}" for file, text in found.files.items() if file != "plan.yaml")
    rest = "".join(f"not exported: {n.key} = {n.value!r}: {n.why}\n" for n in found.not_exported)
    return files + rest + "".join(f"placeholder: {p.name}: {p.meaning}\n" for p in found.placeholders)


@pytest.mark.parametrize("name", list(PLANS))
@pytest.mark.parametrize("target", [name for name in EXPORTERS if name != "reftrain"])
def test_as_it_was(target: str, name: str) -> None:
    assert rendered(target, name) == (FOLDER / f"{target}-{name}.txt").read_text()


if __name__ == "__main__":
    FOLDER.mkdir(parents=True, exist_ok=True)
    for each in EXPORTERS:
        for which in PLANS:
            if each != "reftrain":
                (FOLDER / f"{each}-{which}.txt").write_text(rendered(each, which))
