"""Train or test C-DiffSET: python main.py --config configs/X.yaml [--any-key value ...]"""

import os
import sys

from cdiffset.config import load_config
from cdiffset.errors import run
from cdiffset.training.launch import launcher_settings


def main(argv: list[str] | None = None) -> int:
    config = load_config(argv, launcher_settings())
    if config.gpu is not None and "LOCAL_RANK" not in os.environ:  # a launcher deals the GPUs out itself
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, config.gpu))
    if config.phase == "test":  # heavy imports, only once the configuration holds
        from cdiffset.training.validation import run_test

        run_test(config)
    else:
        from train import Trainer

        Trainer(config).run()
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
