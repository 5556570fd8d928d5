"""The commands end to end: what is counted in the report is what is in the shards, and failures leave nothing behind."""

from __future__ import annotations

import contextlib
import gzip
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from planner.errors import InputError, PlannerError
from planner.files import DATA_DIR
from reftrain.cli_data import data_app, tokenizer_app
from reftrain.data import TokenDataset
from reftrain.tokenizer import Tokenizer


def run(app: typer.Typer, *arguments: str | Path) -> str:
    """Standard output of a command; its errors are raised as the main command line would see them."""
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    if isinstance(result.exception, PlannerError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.stdout


def chapters() -> list[dict[str, Any]]:
    with gzip.open(DATA_DIR / "corpus" / "books.valid.jsonl.gz", "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


CHAPTERS = chapters()
QUESTIONS = ["zu kurz", "a question of more than eight words that nobody in either book ever thought to ask another"] + [
    " ".join(next(p for p in chapter["text"].split("\n\n") if len(p.split()) > 20).split()[:20]) for chapter in CHAPTERS[:8]
]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """150 documents (parts of chapters) in three files, and copies, rubbish and a damaged file beside them."""
    folder = tmp_path_factory.mktemp("source")
    paragraphs = [chapter["text"].split("\n\n") for chapter in CHAPTERS]
    parts = ["\n\n".join(p[i : i + 12]) for p in paragraphs for i in range(0, len(p) - 12, 12)][:150]
    with gzip.open(folder / "a.jsonl.gz", "wt", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": part}) + "\n" for part in parts[:140])
    for i, part in enumerate(parts[140:]):
        (folder / f"b{i}.txt").write_text(part, encoding="utf-8")
    (folder / "copy.txt").write_text(parts[3], encoding="utf-8")
    (folder / "near.txt").write_text(parts[4].replace(" the ", "\nthe ", 1) + " Fin.", encoding="utf-8")
    (folder / "rubbish.txt").write_text("# # # #\n" * 30, encoding="utf-8")
    (folder / "short.md").write_text("# Title", encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def prepared(source: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("out") / "tokens"
    items = source.parent / "items.jsonl"
    items.write_text("".join(json.dumps({"id": i, "question": question}) + "\n" for i, question in enumerate(QUESTIONS)))
    text = run(data_app, "prepare", source, "--out", out, "--vocab-size", "500", "--valid-fraction", "0.2", "--eval", items, "--json")
    return out, json.loads(text)


def test_report_adds_up_step_by_step_and_names_reasons(prepared: tuple[Path, dict[str, Any]]) -> None:
    out, report = prepared
    steps = report["steps"]
    assert list(steps) == ["collect", "clean", "dedupe"]
    for before, after in (("collect", "clean"), ("clean", "dedupe")):
        assert steps[before]["documents_out"] == steps[after]["documents_in"]
        assert steps[before]["bytes_out"] == steps[after]["bytes_in"]
    for step in steps.values():
        assert step["documents_in"] - step["documents_out"] == sum(entry["documents"] for entry in step["dropped"].values())
    assert steps["collect"]["documents_in"] == 154
    assert [d["id"] for entry in steps["dedupe"]["dropped"].values() for d in entry["examples"]] == ["copy.txt", "near.txt"]
    assert {d["id"] for entry in steps["clean"]["dropped"].values() for d in entry["examples"]} == {"rubbish.txt", "short.md"}
    assert sum(split["documents"] for split in report["splits"].values()) == steps["dedupe"]["documents_out"] == 150
    assert sum(split["text_bytes"] for split in report["splits"].values()) == steps["dedupe"]["bytes_out"]
    assert json.loads((out / "report.json").read_text()) == report


def test_items_are_flagged_when_they_stand_in_train_and_only_there(prepared: tuple[Path, dict[str, Any]]) -> None:
    out, report = prepared
    train = Tokenizer.load(out).decode(np.concatenate([w[0, 1:] for w in TokenDataset.open(out / "train").iterate_windows(500)]))
    expected = [i for i, question in enumerate(QUESTIONS) if question in train]
    assert len(expected) >= 3
    (found,) = report["contamination"]
    assert found["too_short"] == 1
    assert len(expected) < len(QUESTIONS) - 2, "some stand in valid alone"
    assert found["flagged_items"] == expected


def test_shards_decode_to_the_documents(prepared: tuple[Path, dict[str, Any]]) -> None:
    out, report = prepared
    tokenizer = Tokenizer.load(out)
    seen = []
    for split, counts in report["splits"].items():
        dataset = TokenDataset.open(out / split, verify=True)
        assert dataset.index.tokenizer_sha256 == tokenizer.sha256 == report["tokenizer"]["sha256"]
        stream = np.concatenate([window[0, 1:] for window in dataset.iterate_windows(64)])
        documents = [tokenizer.decode(part) for part in np.split(stream, np.flatnonzero(stream == 0) + 1)[:-1]]
        texts = [text.removesuffix("<|endoftext|>") for text in documents]
        assert len(texts) == counts["documents"]
        assert sum(len(text.encode()) for text in texts) == dataset.text_bytes == counts["text_bytes"]
        seen += texts
    assert len(set(seen)) == len(seen) == 150
    assert all(any(text in chapter["text"] for chapter in CHAPTERS) for text in seen)


def test_valid_is_chosen_by_the_document_alone(prepared: tuple[Path, dict[str, Any]], source: Path, tmp_path: Path) -> None:
    """Fewer files beside it do not move a document to the other split."""
    out, report = prepared
    assert 10 <= report["splits"]["valid"]["documents"] <= 50, "a fifth of 150, give or take"
    less = tmp_path / "less"
    run(data_app, "prepare", source / "a.jsonl.gz", "--out", less, "--tokenizer", out / "tokenizer.json", "--valid-fraction", "0.2")

    def documents(folder: Path) -> set[bytes]:
        stream = np.concatenate([w[0, 1:] for w in TokenDataset.open(folder / "valid").iterate_windows(100)])
        return {part.tobytes() for part in np.split(stream, np.flatnonzero(stream == 0) + 1)[:-1]}

    assert documents(less) < documents(out)


def test_info_reads_checksums(prepared: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    out, report = prepared
    found = json.loads(run(data_app, "info", out, "--json"))
    assert found["splits"]["train"]["tokens"] == report["splits"]["train"]["tokens"]
    assert "checksums match" in run(data_app, "info", out / "train")
    copy = tmp_path / "copy"
    shutil.copytree(out, copy)
    shard = copy / "valid" / "00000.bin"
    shard.write_bytes(shard.read_bytes()[:-2] + b"\1\0")
    with pytest.raises(InputError, match=r"00000\.bin"):
        run(data_app, "info", copy)


def test_lower_case_reaches_text_and_tokenizer(source: Path, tmp_path: Path) -> None:
    run(data_app, "prepare", source, "--out", tmp_path / "o", "--vocab-size", "300", "--lower-case", "--valid-fraction", "0.1")
    tokenizer = Tokenizer.load(tmp_path / "o")
    assert tokenizer.encode("SARA") == tokenizer.encode("sara")
    tokens = next(TokenDataset.open(tmp_path / "o" / "train").iterate_windows(2000))[0]
    assert tokenizer.decode(tokens) == tokenizer.decode(tokens).lower()


def test_shipped_corpus_keeps_its_own_splits(tmp_path: Path, prepared: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    """On a corpus cut to size: a copy of a test chapter in train is what goes, not the test chapter."""
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for name, rows in {
        "books.train": [*CHAPTERS[6:], CHAPTERS[0]],
        "factbook": CHAPTERS[5:6],
        "books.valid": CHAPTERS[1:3],
        "books.test": CHAPTERS[:1],
    }.items():
        with gzip.open(corpus / f"{name}.jsonl.gz", "wt", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    monkeypatch.setattr("reftrain.text.prepare.DATA_DIR", tmp_path)
    report = json.loads(run(data_app, "prepare", "--out", tmp_path / "o", "--tokenizer", prepared[0] / "tokenizer.json", "--json"))
    assert {split: counts["documents"] for split, counts in report["splits"].items()} == {"test": 1, "valid": 2, "train": len(CHAPTERS) - 5}
    assert CHAPTERS[0]["id"] in report["steps"]["dedupe"]["dropped"]["exact duplicate"]["examples"][0]["id"]


@pytest.mark.parametrize(
    ("arguments", "keys"),
    [
        (["--valid-fraction", "2", "--similarity", "0", "--language", "English"], {"--valid-fraction", "--similarity", "--language"}),
        (["--tokenizer", "bpe"], {"--tokenizer"}),
        (["--vocab-size", "10"], {"vocab_size"}),
        (["--eval", "absent.jsonl"], {"file"}),
        (["absent", "also-absent"], {"path"}),
        (["--min-words", "1000000"], {"train"}),
        (["--valid-fraction", "0.0000001"], {"valid"}),
    ],
)  # fmt: skip
def test_bad_options_write_nothing(arguments: list[str], keys: set[str], source: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError) as error:
        run(data_app, "prepare", source, "--out", tmp_path / "o", *arguments)
    assert {p.key for p in error.value.problems} == keys
    assert not list(tmp_path.iterdir())


def test_damaged_files_stop_or_are_listed(source: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad"
    shutil.copytree(source, bad)
    (bad / "c.txt.gz").write_bytes(gzip.compress(b"x" * 1000)[:20])
    (bad / "d.jsonl").write_text("{")
    with pytest.raises(InputError, match="--skip-bad-files") as error:
        run(data_app, "prepare", bad, "--out", tmp_path / "o", "--vocab-size", "300")
    assert len(error.value.problems) == 2
    arguments = ("prepare", bad, "--out", tmp_path / "o", "--vocab-size", "300", "--skip-bad-files", "--valid-fraction", "0.1", "--json")
    report = json.loads(run(data_app, *arguments))
    assert [Path(entry["file"].split(":")[0]).name for entry in report["skipped_files"]] == ["c.txt.gz", "d.jsonl"]


def test_other_peoples_folders_are_never_replaced(prepared: tuple[Path, dict[str, Any]], source: Path, tmp_path: Path) -> None:
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "thesis.txt").write_text("years of work")
    ours = tmp_path / "ours"
    shutil.copytree(prepared[0], ours)
    common = ("prepare", source, "--vocab-size", "300", "--valid-fraction", "0.1")
    for out, extra in ((theirs, "--force"), (ours, "--quality")):
        before = sorted(p.read_bytes() for p in out.rglob("*") if p.is_file())
        with pytest.raises(InputError, match="new or empty"):
            run(data_app, *common, "--out", out, extra)
        assert sorted(p.read_bytes() for p in out.rglob("*") if p.is_file()) == before
    run(data_app, *common, "--out", ours, "--force")
    assert Tokenizer.load(ours).vocab_size == 300
    assert {p.name for p in tmp_path.iterdir()} == {"theirs", "ours"}


def test_killed_while_preparing_leaves_no_output(source: Path, tmp_path: Path) -> None:
    """A real process, killed as soon as it has begun to write: the output folder must not exist."""
    out = tmp_path / "o"
    code = f"from reftrain.cli_data import data_app; data_app(['prepare', {str(source)!r}, '--out', {str(out)!r}, '--tokenizer', 'unigram'])"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not list(tmp_path.glob(".o.*/*.spool")):
        assert process.poll() is None, "ended before it could be killed"
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.005)
    process.kill()
    process.wait()
    assert not out.exists()


def test_tokenizer_commands(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "tokenizer.json"
    trained = json.loads(run(tokenizer_app, "train", source, "--kind", "wordpiece", "--vocab-size", "400", "--out", out, "--json"))
    measured = json.loads(run(tokenizer_app, "info", out, source, "--json"))
    assert trained == measured
    assert measured["vocab_size"] == 400
    assert "bytes per token" in run(tokenizer_app, "info", out, source)
    with pytest.raises(InputError, match="kind"):
        run(tokenizer_app, "train", source, "--kind", "bytebpe", "--out", out)


@pytest.mark.parametrize(("app", "command"), [(data_app, "prepare"), (data_app, "info"), (tokenizer_app, "train"), (tokenizer_app, "info")])
def test_help_has_an_example(app: typer.Typer, command: str) -> None:
    assert "Example: reftrain" in run(app, command, "--help")


def test_help_is_light() -> None:
    heavy = ("torch", "numpy", "tokenizers", "lxml", "pydantic")
    code = f"import sys; from reftrain.cli_data import data_app\nprint([m for m in {heavy} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
