"""Time and memory of reading and tokenizing data, against the tokenizer alone on the same texts.

    python benchmarks/tokenizing.py [--megabytes N]      writes benchmarks/results/tokenizing.jsonl and prints the table
SmolLM2's tokenizer on stretches of the demo's text of 200 to 4,000 characters: as plain text; as prompts with answers,
cut between two words; as conversations, whose template is rendered outside of the clock for the tokenizer alone. A
process for each measurement, in turns; the ratio is of the medians. Alone, the tokenizer gets a thousand texts a call
and keeps nothing. Memory is the peak of the process, with everything that is imported and all examples.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from measure import status
from results import FOLDER, write_rows

RESULTS = FOLDER / "tokenizing.jsonl"
FORMS, WAYS = ("text", "prompt", "messages"), ("tokenizer", "qtune")
SHORTEST, LONGEST, CALL, LENGTH = 200, 4000, 1000, 2048


def write_data(folder: Path, text: str, megabytes: float) -> dict[str, Path]:
    """A JSONL file of each form, of the same stretches."""
    draw, files = random.Random(0), {form: folder / f"{form}.jsonl" for form in FORMS}
    lines: dict[str, list[str]] = {form: [] for form in FORMS}
    written = 0
    while written < megabytes * 1e6:
        length = draw.randint(SHORTEST, LONGEST)
        start = draw.randrange(max(1, len(text) - length))
        one = text[start : start + length]
        edge = max(one.find(" ", length // 4), 1)
        asked, answer = one[:edge], one[edge:]
        turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
        for form, record in zip(
            FORMS, ({"text": one}, {"prompt": asked, "completion": answer}, {"messages": turns}), strict=True
        ):
            lines[form].append(json.dumps(record))
        written += len(one.encode())
    for form, path in files.items():
        path.write_text("\n".join(lines[form]), "utf-8")
    return files


def child(way: str, path: Path, folder: Path) -> None:
    """One measurement, printed as JSON."""
    os.environ["QTUNE_CACHE"] = tempfile.mkdtemp(dir=path.parent)  # nothing is known yet
    from qtune.data import load_data
    from qtune.demo import MODEL_FILE
    from qtune.model import load_tokenizer

    tokenizer = load_tokenizer(folder / "model" / MODEL_FILE)
    tokens = 0
    if way == "qtune":
        before = time.perf_counter()
        tokens = load_data(path, tokenizer, max_length=LENGTH)[1].tokens
    else:
        texts = [_text(json.loads(line), tokenizer) for line in path.read_text("utf-8").splitlines()]
        before = time.perf_counter()
        for start in range(0, len(texts), CALL):
            tokens += sum(map(len, tokenizer(texts[start : start + CALL])["input_ids"]))
    seconds = time.perf_counter() - before
    print(json.dumps({"seconds": seconds, "tokens": tokens, "peak_bytes": status("VmHWM")}))


def _text(record: dict[str, Any], tokenizer: Any) -> str:
    if "messages" in record:
        return str(tokenizer.apply_chat_template(record["messages"], tokenize=False))
    return "".join(record.values())


def main() -> None:
    from qtune.demo import fetch
    from qtune.screen import Screen

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--megabytes", type=float, default=100, help="of text, in each form")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="where model and data lie or go")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.child[0], Path(options.child[1]), options.folder)
        return
    with tempfile.TemporaryDirectory() as fresh:
        folder = options.folder or Path(fresh)
        fetch(folder, Screen(quiet=True))
        records = (folder / "train.jsonl").read_text("utf-8").splitlines()
        text = "\n".join(m["content"] for record in records for m in json.loads(record)["messages"])
        rows = []
        for form, path in write_data(Path(fresh), text, options.megabytes).items():
            found: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
            for _ in range(options.rounds):
                for way in WAYS:
                    command = [sys.executable, __file__, "--child", way, str(path), "--folder", str(folder)]
                    done = subprocess.run(command, capture_output=True, text=True, check=True)
                    found[way].append(json.loads(done.stdout))
            seconds = {way: statistics.median(one["seconds"] for one in some) for way, some in found.items()}
            ours = found["qtune"][-1]
            row = {
                "form": form, "megabytes": options.megabytes, "rounds": options.rounds, "tokens": ours["tokens"],
                "qtune_s": seconds["qtune"], "tokenizer_s": seconds["tokenizer"],
                "ratio": seconds["qtune"] / seconds["tokenizer"], "peak_bytes": ours["peak_bytes"],
            }  # fmt: skip
            rows.append(row)
            print(
                f"{form:9} {row['tokens']:,} tokens  tokenizer {row['tokenizer_s']:.1f} s  "
                f"qtune {row['qtune_s']:.1f} s ({row['ratio']:.2f}x)  peak {row['peak_bytes'] / 2**20:,.0f} MiB"
            )
    write_rows(RESULTS, "python benchmarks/tokenizing.py", rows)


if __name__ == "__main__":
    main()
