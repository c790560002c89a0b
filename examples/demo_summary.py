"""Ends the demo: one table of what was learned beside its baselines, and the same numbers in summary.json."""

import json
import sys
from pathlib import Path

PARTS = ("r2", "mean", "neighbour", "ridge")


def main(out: Path) -> None:
    """Reads what the stages wrote below `out`, writes summary.json and prints the table."""
    summary = {
        "reconstruction": {kind: reconstruction(out / f"pretrain-{kind}" / "metrics.json") for kind in ("bold", "t1")},
        "adhd": adhd(json.loads((out / "adhd" / "metrics.json").read_text())),
        "seconds": seconds(out / "seconds.txt"),
    }
    (out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    print(table(summary, out))


def reconstruction(path: Path) -> dict[str, float]:
    """Returns r2 on hidden voxels of held-out subjects, of the model and of each baseline."""
    found = json.loads(path.read_text())["reconstruction"]["test"]
    return {part: found[part] for part in PARTS}


def adhd(numbers: dict) -> dict[str, float]:
    """Returns the fine-tuned model's numbers over within-site pairs, and its baselines'."""
    rows = numbers["models"]
    model, connectivity = rows["fine-tuned model"], rows["connectivity + logistic"]
    within = model["within_site_auroc"]
    return {
        "auroc": within["value"],
        "low": within["low"],
        "high": within["high"],
        "balanced_accuracy": model["balanced_accuracy"]["value"],
        "majority": model["majority_accuracy"],
        "connectivity": connectivity["within_site_auroc"]["value"],
        "num_subjects": model["num_subjects"],
    }


def seconds(path: Path) -> dict[str, int]:
    """Returns how long each stage took, over all runs of the demo."""
    took: dict[str, int] = {}
    for line in path.read_text().splitlines():
        name, number = line.split()
        took[name] = took.get(name, 0) + int(number)
    return took


def table(summary: dict, out: Path) -> str:
    """Returns the lines a person reads at the end."""
    lines = ["", "What was learned (phantom scans: this shows that the chain works, nothing about brains)", ""]
    lines.append(
        f"  {'hidden voxels of held-out subjects, R2':<44}{'model':>8}{'mean':>8}{'neighbour':>11}{'ridge':>8}"
    )
    for kind, name in (("bold", "4D fMRI"), ("t1", "T1")):
        r2 = summary["reconstruction"][kind]
        lines.append(f"  {name:<44}{r2['r2']:>8.3f}{r2['mean']:>8.3f}{r2['neighbour']:>11.3f}{r2['ridge']:>8.3f}")
    found = summary["adhd"]
    interval = f"[{found['low']:.3f}, {found['high']:.3f}]"
    lines += [
        "",
        f"  ADHD against control, {found['num_subjects']} held-out subjects",
        f"  {'AUROC within sites, fine-tuned model':<44}{found['auroc']:>8.3f}  {interval}",
        f"  {'AUROC within sites, connectivity + logistic':<44}{found['connectivity']:>8.3f}",
        f"  {'balanced accuracy':<44}{found['balanced_accuracy']:>8.3f}",
        f"  {'accuracy of always saying the majority':<44}{found['majority']:>8.3f}",
        "",
        "  seconds: " + ", ".join(f"{name} {took}" for name, took in summary["seconds"].items()),
        f"  in all: {sum(summary['seconds'].values())} s",
        "",
        f"  report   {out}/adhd/report.html",
        f"  numbers  {out}/summary.json",
        f"  runs     .venv/bin/mlflow ui --backend-store-uri sqlite:///{out}/mlflow.db",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
