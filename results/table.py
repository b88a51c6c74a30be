"""Merge the reports of several runs into one Markdown file, so that no number is typed by hand.

    python results/table.py work_dir/*/test/report.json --output results/README.md

A row per report, a table per convention: numbers of different conventions never share a column. A run is called by its folder,
or as in NAME=path/to/report.json.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from cdiffset.errors import Parser, UserError, run
from cdiffset.images import write_text

RANKING = {"spearman": "Spearman ↑", "ause": "AUSE ↓", "aurg": "AURG ↑"}  # of the absolute error
ENCE = {"absolute": "ENCE, absolute ↓", "squared": "ENCE, squared ↓"}


def read_reports(arguments: list[str]) -> dict[str, dict]:
    """{name of the run: report.json}."""
    reports = {}
    for argument in arguments:
        name, _, path = argument.rpartition("=")
        name = name or run_name(Path(path))
        try:
            report = json.loads(Path(path).read_text(encoding="utf-8"))
            _ = report["images_sha256"], report["conventions"], report["means"], report["set"], report["uncertainty"]
        except OSError as error:
            raise UserError(f"{path}: {error.strerror}") from error
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}: no report of evaluate.py ({error})") from error
        if name in reports:
            raise UserError(f"{path}: a second run called {name}; give names, as in NAME={path}")
        reports[name] = report
    return reports


def run_name(path: Path) -> str:
    """work_dir/X/test/report.json and X/report.json => X."""
    folder = path.resolve().parent
    return folder.parent.name if folder.name == "test" else folder.name


def images_of(report: dict) -> list[str]:
    """How many, and the beginning of the hash of their names: only rows of equal ones compare."""
    return [str(report["images"]), report["images_sha256"][:6]]


def convention_table(reports: dict[str, dict], convention: str) -> list[list[str]]:
    from cdiffset.evaluation.report import LABELS, cell  # heavy, here and below: not before the arguments hold

    entries = {name: report["means"].get(convention, {}) for name, report in reports.items()}
    metrics = [metric for metric in LABELS if any(metric in means for means in entries.values())]
    rows = [
        [name, *images_of(reports[name]), *(cell(means.get(metric), reports[name]["images"]) for metric in metrics)]
        for name, means in entries.items()
    ]
    return [["run", "n", "images", *(LABELS[metric] for metric in metrics)], *rows]


def set_table(reports: dict[str, dict]) -> list[list[str]]:
    from cdiffset.evaluation.report import LABELS, set_cell

    metrics = [metric for metric in LABELS if any(metric in report["set"] for report in reports.values())]
    rows = [
        [
            name,
            *images_of(report),
            *(set_cell(key, report["set"][key], report["images"]) if key in report["set"] else "–" for key in metrics),
        ]
        for name, report in reports.items()
    ]
    return [["run", "n", "images", *(LABELS[metric] for metric in metrics)], *rows]


def map_table(reports: dict[str, dict]) -> list[list[str]]:
    """Maps and trivial baselines, a row each; runs without maps have none."""
    from cdiffset.evaluation.report import number

    rows = [["run", "map", "n", *RANKING.values(), *ENCE.values(), "AUROC SAR-only ↑", "AUROC EO-only"]]
    for name, report in reports.items():
        part = report["uncertainty"] or {"maps": {}}
        for map_name, measures in part["maps"].items():
            ranking = measures.get("ranking", {}).get("absolute", {})
            values = [ranking.get(name) for name in RANKING]
            values += [measures.get("calibration", {}).get(error, {}).get("ence") for error in ENCE]
            values += [measures.get(mask, {}).get("auroc") for mask in ("sar_only", "eo_only")]
            scaled = " (ENCEs after one global scale)" if map_name == "variance" else ""
            rows.append([name, map_name + scaled, str(part["images"]), *(number(value, 3) for value in values)])
    return rows


def render(reports: dict[str, dict]) -> str:
    from cdiffset.evaluation.report import markdown_table

    about = "n is the number of images, beside it a hash of their names: rows of other images do not compare."
    parts = ["# Results", f"Written by `results/table.py`. {about} In brackets: 95 % bootstrap intervals."]
    conventions = {name: text for report in reports.values() for name, text in report["conventions"].items()}
    for convention, description in conventions.items():
        parts += [f"## {convention} convention", f"{description}.", markdown_table(convention_table(reports, convention))]
    if any(report["set"] for report in reports.values()):
        note = "Functions of the 8-bit pictures, alike in every convention. FIDs and KIDs of different n do not compare."
        parts += ["## Whole sets", note, markdown_table(set_table(reports))]
    if len(maps := map_table(reports)) > 1:
        parts += [
            "## Uncertainty maps and trivial baselines",
            "Pooled over pixels; Spearman, AUSE and AURG of the absolute error.",
            markdown_table(maps),
        ]
    return "\n\n".join(parts) + "\n"


def main(argv: list[str] | None = None) -> int:
    parser = Parser(description="Merge reports into one Markdown table.", allow_abbrev=False)
    parser.add_argument("reports", nargs="+", metavar="[NAME=]report.json", help="reports of evaluate.py or phase test")
    parser.add_argument("--output", type=Path, required=True, help="Markdown file to write")
    args = parser.parse_args(argv)
    text = render(read_reports(args.reports))
    try:
        write_text(args.output, text)
    except OSError as error:
        raise UserError(f"--output: cannot write {args.output}: {error.strerror}") from error
    print(f"{len(args.reports)} runs: {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
