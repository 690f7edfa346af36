"""report/TRAINING.md and report/training.html from the result files of the training experiments.

    python sage_kernels/benchmarks/training_report.py

The result files come from training.py, training_profile.py, layer_latency.py, training_gradients.py, fine_tuning.py,
pretraining.py and lora.py; what is missing is named in the report.
"""

import argparse
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent))
from training_study.report import write_report

FOLDER = Path(__file__).parent


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=FOLDER / "results")
    parser.add_argument("--report", type=Path, default=FOLDER / "report")
    options = parser.parse_args()
    write_report(options.results, options.report)


if __name__ == "__main__":
    main()
