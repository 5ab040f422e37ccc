"""Run every benchmark of this folder on one device and write the tables.

    python experiments/bench/run.py --device cpu            all of them, as the README quotes them
    python experiments/bench/run.py --device cuda --quick   small sizes, to see that they run
    python experiments/bench/run.py --only harvest

A benchmark is a module beside this one with `main(device: str, quick: bool)` that returns a row or a list of rows, each
a dictionary of columns. Written are `results-DEVICE.md` and `results-DEVICE.json` (`-quick` added for quick runs).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import sys
import time
import traceback
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, mps (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="small sizes: shows that it runs, not how fast it is")
    parser.add_argument("--only", metavar="NAME", nargs="+", help="these benchmarks only")
    parser.add_argument(
        "--out", metavar="DIR", type=Path, default=HERE, help="where to write (default: beside this file)"
    )
    options = parser.parse_args(arguments)
    names = find(options.only)
    missing = _missing_device(options.device)
    if missing:
        parser.error(missing)
    results: dict[str, Any] = {"machine": machine(options.device), "quick": options.quick, "benchmarks": {}}
    failed = []
    for name in names:
        print(f"== {name} on {options.device}", flush=True)
        start = time.perf_counter()
        try:
            rows = _load(name).main(device=options.device, quick=options.quick)
        except Exception:  # the others are still worth their time
            traceback.print_exc()
            failed.append(name)
            continue
        rows = [rows] if isinstance(rows, dict) else list(rows)
        results["benchmarks"][name] = {"seconds": round(time.perf_counter() - start, 1), "rows": rows}
        print(f"{table(rows)}\n", flush=True)
    stem = f"results-{options.device.replace(':', '-')}{'-quick' if options.quick else ''}"
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / f"{stem}.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    (options.out / f"{stem}.md").write_text(markdown(results), encoding="utf-8")
    print(f"Written: {options.out / stem}.md and .json")
    if failed:
        print(f"Failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def find(only: Sequence[str] | None = None) -> list[str]:
    """Names of the benchmarks; those asked for, if any are."""
    names = sorted(path.stem for path in HERE.glob("*.py") if path.stem != "run" and not path.stem.startswith("_"))
    unknown = set(only or ()) - set(names)
    if unknown:
        raise SystemExit(f"no benchmark {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    return [name for name in names if not only or name in only]


def machine(device: str) -> dict[str, Any]:
    """What the numbers depend on."""
    import torch

    kind = torch.device(device).type
    name = torch.cuda.get_device_name(device) if kind == "cuda" else platform.processor() or platform.machine()
    return {
        "device": device,
        "name": name,
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{package: version(package) for package in ("torch", "transformers", "transformer-lens", "interp")},
    }


def markdown(results: dict[str, Any]) -> str:
    facts = ", ".join(f"{key} {value}" for key, value in results["machine"].items())
    lines = ["# Benchmarks", "", f"Measured with: {facts}."]
    if results["quick"]:
        lines += ["", "A quick run: small sizes, not to be quoted."]
    for name, benchmark in results["benchmarks"].items():
        lines += ["", f"## {name} ({benchmark['seconds']} s)", "", table(benchmark["rows"])]
    return "\n".join(lines) + "\n"


def table(rows: Sequence[dict[str, Any]]) -> str:
    """A Markdown table; a column that some rows lack is empty there."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    cells = [[_text(row.get(column, "")) for column in columns] for row in rows]
    widths = [max(len(cell) for cell in column) for column in zip(columns, *cells, strict=True)]
    lines = [columns, ["-" * width for width in widths], *cells]
    return "\n".join("| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |" for line in lines)


def _text(value: Any) -> str:
    text = (
        f"{value:.4g}"
        if isinstance(value, float) and abs(value) < 1e4
        else f"{value:,.0f}"
        if isinstance(value, float)
        else str(value)
    )
    return text.replace("|", "\\|")


def _load(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"bench_{name}", HERE / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up there
    if str(HERE) not in sys.path:
        sys.path.insert(0, str(HERE))  # for what benchmarks share
    spec.loader.exec_module(module)
    return module


def _missing_device(device: str) -> str | None:
    import torch

    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        return f"--device {device} is not available: {str(error).splitlines()[0]}"
    return None


if __name__ == "__main__":
    sys.exit(main())
