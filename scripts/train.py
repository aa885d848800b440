"""Trains a network: `python scripts/train.py --config configs/NAME.yaml [--max-minutes M] [key=value ...]`.

Run it again after an interruption and it goes on where the last state was saved. On several processes:
`accelerate launch --num_processes N scripts/train.py --config ...`. The checkpoint, `<output>/checkpoint`, is a folder
that `dit_suite.load_pipeline` opens.
"""

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dit_suite.files import check_folder
from dit_suite.training.config import load_config


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0 when the run ended or was asked to stop, 2 on bad input."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True, help="YAML file, see configs/")
    parser.add_argument("--max-minutes", type=float, help="stop, save and export after this long")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as run.batch_size=32 optimizer.lr=1e-3")
    arguments = parser.parse_args(argv)
    overrides = list(arguments.overrides)
    if arguments.max_minutes is not None:
        overrides.append(f"run.max_minutes={arguments.max_minutes}")
    try:
        config = load_config(arguments.config, overrides)
        check_folder(config.output)
        from dit_suite.training.trainer import Trainer

        trainer = Trainer(config, report=lambda line: print(line, flush=True))
        for name in (signal.SIGTERM, signal.SIGINT):
            signal.signal(name, lambda *_: trainer.request_stop())
        target = trainer.run()
    except (ValueError, OSError) as error:
        print(f"train.py: {error}", file=sys.stderr)
        return 2
    print(target if target is not None else "stopped; the same command goes on")
    return 0


if __name__ == "__main__":
    sys.exit(main())
